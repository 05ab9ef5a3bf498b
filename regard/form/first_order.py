"""Products that have first derivatives only, and say so where more is asked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from regard import errors


class FirstOrder(torch.autograd.Function):
    """Base of products that recompute tiles: no forward mode, no second derivatives.

    torch.vmap takes one entry of its axis after another, as a batch axis is the fast way.
    """

    @classmethod
    def vmap(cls, info: Any, in_dims: Any, *inputs: Any) -> Any:
        entries = []
        run: Any = cls.apply
        for entry in range(info.batch_size):
            pairs = zip(inputs, in_dims, strict=True)
            mapped = (x.select(d, entry) if isinstance(d, int) else x for x, d in pairs)
            entries.append(run(*mapped))
        outputs = tuple(torch.stack(each) for each in zip(*entries, strict=True))
        return outputs, (0,) * len(outputs)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise errors.FormError(
            "form 'tiled' has no forward-mode derivatives; A.matmul(value, form='dense') has."
        )


class Gradient(FirstOrder):
    """Base of the gradients of a `FirstOrder`, which have none themselves."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *from_above: Tensor) -> Any:
        raise errors.FormError(
            "this form has first derivatives only; multiply with "
            "A.matmul(value, form='dense') to differentiate twice."
        )


def check_transforms(tensors: Iterable[Tensor | None]) -> None:
    """Raise FormError for tensors of torch.func transforms."""
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor
    if any(tensor is not None and wrapped(tensor) for tensor in tensors):
        raise errors.FormError(
            "this form has no gradients inside torch.func transforms; use torch.autograd.grad or "
            ".backward(), or A.matmul(value, form='tiled') or form='dense'."
        )


def each(
    backward: Callable[..., Sequence[Tensor | None]], ctx: Any, from_above: Sequence[Tensor | None]
) -> Sequence[Tensor | None]:
    """A backward pass, for one after another where several are asked for at once.

    They come as is_grads_batched=True (and so torch.autograd.functional.jacobian) or torch.vmap
    around torch.autograd.grad give them: as a tensor that hides its first axis.
    backward: of ctx, its saved tensors and the gradients from above
    """
    saved = ctx.saved_tensors  # once: a checkpoint gives them once
    kinds = torch._C._functorch
    level = -1
    add: Callable[..., Tensor] = kinds._add_batch_dim
    remove: Callable[..., Tensor] = kinds._remove_batch_dim
    for x in from_above:
        if x is not None and kinds.is_legacy_batchedtensor(x):
            level = torch._C._vmapmode_increment_nesting() - 1
            torch._C._vmapmode_decrement_nesting()
            add, remove = torch._add_batch_dim, torch._remove_batch_dim
        elif x is not None and kinds.is_batchedtensor(x):
            level = kinds.maybe_get_level(x)
    if level < 0:
        return backward(ctx, saved, *from_above)
    # Nothing but the count of entries is lost on a gradient that hides no axis.
    count = max(len(remove(x, level, 1, 0)) for x in from_above if x is not None)
    shown = [x if x is None else remove(x, level, count, 0) for x in from_above]
    entries = [
        backward(ctx, saved, *(x if x is None else x[entry] for x in shown))
        for entry in range(count)
    ]
    return tuple(
        None if found[0] is None else add(torch.stack(found), 0, level)
        for found in zip(*entries, strict=True)
    )


def once(gradients: Iterable[Tensor | None], *depends_on: Tensor) -> list[Tensor | None]:
    """The gradients; under create_graph=True they raise where they are differentiated again."""
    if not torch.is_grad_enabled():
        return list(gradients)
    apply: Any = _Once.apply
    return [g if g is None else apply(g, *depends_on) for g in gradients]


class _Once(Gradient):
    """A gradient that may be part of a graph, as create_graph=True asks, but has no gradient."""

    @staticmethod
    def forward(gradient: Tensor, *depends_on: Tensor) -> Tensor:
        return gradient.view_as(gradient)
