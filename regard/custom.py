"""A user's own score of a tile, in plain PyTorch, with gradients to whatever it reads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from regard import errors, grouped
from regard.score import Score
from regard.trace import Trace, graph_leaves

PairFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False, repr=False)
class Custom(Score):
    """Your own score of a tile: function(query, key, i, j) -> [*batch, heads, r, c], in PyTorch.

    query [*batch, heads, r, d] and key [*batch, heads, c, d] are rows of the whole tensors, i [r]
    and j [c] their positions. The function must be pure: it is called for many tiles, and again
    in the backward pass. Tensors it reads from outside (closures, globals, module parameters) get
    their gradients: they are found by watching one call, and a tile that reads others raises, as
    does an operation that hides them.

    `regard.attention(score=function)` wraps a plain function by itself.

    >>> import regard
    >>> width = torch.tensor(2.0, requires_grad=True)
    >>> def laplace(query, key, i, j):
    ...     return -torch.cdist(query, key, p=1) / width
    >>> A = regard.attention(torch.randn(6, 4), torch.randn(6, 4), score=laplace)
    >>> (A @ torch.randn(6, 4)).sum().backward()
    >>> width.grad.shape
    torch.Size([])
    """

    function: PairFunction
    dtype: torch.dtype = torch.float32
    captured: tuple[Tensor, ...] = ()
    originals: tuple[int, ...] = ()

    foreign: ClassVar[bool] = True

    def pair(self, query: Tensor, key: Tensor, i: Tensor, j: Tensor) -> Tensor:
        wide = query.dtype
        # The function sees the caller's dtype, which is that of the tensors it brings along.
        query, key = query.to(self.dtype), grouped.match(key, errors.heads_of(query)).to(self.dtype)
        trace = Trace(dict(zip(self.originals, self.captured, strict=True)), own=(query, key))
        with trace:
            scores = self.function(query, key, i, j)
        if trace.found:
            raise errors.FormError(
                f"score function {self} read a tensor that needs gradients, of shape "
                f"{errors.show(trace.found[0].shape)}, which it did not read for query 0 and key "
                "0, so that its gradient would be lost; read every such tensor on every call, for "
                "example with torch.where instead of `if`."
            )
        return self._checked(scores, query, key, i, j).to(wide)

    def probe(self, query: Tensor, key: Tensor) -> Custom:
        """Call the function on one pair of zeros to find what it reads that needs gradients."""
        shapes = [(*x.shape[:-2], 1, x.shape[-1]) for x in (query, key)]
        one = [query.new_zeros(shape) for shape in shapes]
        at = torch.zeros(1, dtype=torch.long, device=query.device)
        key_one = grouped.match(one[1], errors.heads_of(query))
        trace, random = Trace({}, own=()), _random_state(query.device)
        with torch.enable_grad(), trace:
            scores = self.function(one[0], key_one, at, at)
            scores = self._checked(scores, one[0], key_one, at, at)
        if not all(map(torch.equal, random, _random_state(query.device))):
            raise errors.FormError(
                f"score function {self} drew random numbers; it is called again for the backward "
                "pass and must give the same scores. For dropout on the weights, give "
                "attention(..., dropout=Dropout(p)); draw noise before, and index it by i, j."
            )
        if one[0]._version or key_one._version:
            raise errors.FormError(
                f"score function {self} changes its query or key in place, and they are views of "
                "yours; write query * 2 instead of query.mul_(2)."
            )
        found = tuple(trace.found)
        if scores.requires_grad:
            self._check_all_found(one[0], key_one, at, found)
        return replace(self, dtype=query.dtype, captured=found, originals=tuple(map(id, found)))

    def _check_all_found(
        self, query: Tensor, key: Tensor, at: Tensor, found: tuple[Tensor, ...]
    ) -> None:
        """On copies of the tensors found, no gradient may lead to any other tensor."""
        copies = {id(tensor): tensor.detach().requires_grad_() for tensor in found}
        with torch.enable_grad(), Trace(copies, own=()):
            scores = self.function(query, key, at, at)
        for leaf in graph_leaves(scores):
            if not any(leaf is copy for copy in copies.values()):
                raise errors.FormError(
                    f"score function {self} reads a tensor that needs gradients, of shape "
                    f"{errors.show(leaf.shape)}, only in an operation that torch does not show (a "
                    "custom autograd.Function, or a scripted function), so that its gradient would "
                    "be lost; give that operation tensor.clone() instead of the tensor."
                )

    def check(self, query: Tensor, key: Tensor) -> None:
        """Any widths fit, as far as `regard` can know."""

    def check_heads(self, batch: object) -> None:
        """Captured tensors have any shape."""

    def narrow(self, batch: tuple[int, ...], index: tuple[object, ...]) -> Custom:
        raise errors.ShapeError(
            f"{self} may hold tensors for all batch entries and heads, so one head cannot be split "
            "off; index rows and columns of all of them first, such as A[..., rows, :][0, 3]."
        )

    def numbers_per_pair(self, width: int) -> int:
        """Assume that the function broadcasts over the width, as additive scores do."""
        return 2 * max(width, 1)

    def __repr__(self) -> str:
        return getattr(self.function, "__name__", type(self.function).__name__)

    def _checked(self, scores: object, query: Tensor, key: Tensor, i: Tensor, j: Tensor) -> Tensor:
        batch = torch.broadcast_shapes(query.shape[:-2], key.shape[:-2])
        wanted = (*batch, i.numel(), j.numel())
        if not isinstance(scores, Tensor) or scores.is_complex():
            given = f"dtype {scores.dtype}" if isinstance(scores, Tensor) else type(scores).__name__
            raise errors.DtypeError(
                f"score function {self} must return a tensor of real numbers, not {given}."
            )
        if scores.shape[-2:] != wanted[-2:] or not errors.fits(scores.shape, wanted):
            raise errors.ShapeError(
                f"score function {self} returned shape {errors.show(scores.shape)} for "
                f"{i.numel()} rows and {j.numel()} columns; it must return {errors.show(wanted)}, "
                "or something that broadcasts over the leading axes."
            )
        return scores


def _random_state(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states
