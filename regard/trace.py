"""Watch a function run, to find and to exchange the tensors that it reads from outside.

A user's score may read tensors that need gradients from a closure, a global or a module. Code that
recomputes tiles must know them (or their gradients are silently lost, as happened elsewhere:
cornellius-gp/linear_operator issue 55) and must run the function on detached copies of them.
Looking into closures misses globals and attributes; watching torch's own calls finds those, too.
What only a compiled or custom operation reads is not seen: `graph_leaves` finds that it was there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode


class Trace(TorchFunctionMode):
    """While active, replace known tensors and collect unknown ones that require gradients.

    stand_ins: for the id of an outside tensor, the tensor to use in its place
    own: tensors that may require gradients without being from outside
    found: outside tensors that require gradients, in the order they were first read

    >>> import torch
    >>> weight = torch.ones(3, requires_grad=True)
    >>> with Trace({}, own=()) as trace:
    ...     _ = (weight * 2).sum()
    >>> [tuple(tensor.shape) for tensor in trace.found]
    [(3,)]
    """

    def __init__(self, stand_ins: Mapping[int, Tensor], own: Iterable[Tensor]) -> None:
        super().__init__()
        self._stand_ins = stand_ins
        # Results are kept alive while watching: a freed tensor's id could be given to a new one.
        self._inside = {id(tensor): tensor for tensor in (*own, *stand_ins.values())}
        self.found: list[Tensor] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run one operation on the stand-ins."""
        result = func(*_each(args, self._read), **_each(kwargs or {}, self._read))
        _each(result, self._wrote)
        return result

    def _read(self, tensor: Tensor) -> Tensor:
        stand_in = self._stand_ins.get(id(tensor))
        if stand_in is not None:
            return stand_in
        if tensor.requires_grad and id(tensor) not in self._inside:
            self._inside[id(tensor)] = tensor
            self.found.append(tensor)
        return tensor

    def _wrote(self, tensor: Tensor) -> Tensor:
        self._inside[id(tensor)] = tensor
        return tensor


def graph_leaves(result: Tensor) -> list[Tensor]:
    """The leaves that a result's gradient would reach.

    >>> import torch
    >>> weight = torch.ones(3, requires_grad=True)
    >>> [leaf is weight for leaf in graph_leaves(weight.exp().sum())]
    [True]
    """
    seen, waiting, leaves = set(), [result.grad_fn], []
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.append(node.variable)
        waiting.extend(following for following, _ in node.next_functions)
    return leaves


def _each(item: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Apply `change` to every tensor in nested tuples, lists and dictionaries."""
    if isinstance(item, Tensor):
        return change(item)
    if isinstance(item, dict):
        return {key: _each(value, change) for key, value in item.items()}
    if isinstance(item, (tuple, list)):
        items = [_each(entry, change) for entry in item]
        if hasattr(item, "_fields"):  # a named tuple takes its entries one by one
            return type(item)(*items)
        return type(item)(items) if type(item) in (tuple, list) else item
    return item
