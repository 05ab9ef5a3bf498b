"""Weights summed by relative position: what each row gives to each offset, [*batch, n, offsets].

sum_ij left_i[o(i, j)] weight_ij is linear in the weights like a product with a value, so it has the
same backward pass over tiles, where dweight_ij = left_i[o(i, j)].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from regard.form.first_order import FirstOrder, Gradient, each
from regard.form.tiled_grad import Backward
from regard.form.tiles import Tiles, compute_dtype
from regard.normalizer import Row
from regard.position.toeplitz import clipped
from regard.runs import Span

if TYPE_CHECKING:
    from regard.matrix import Attention


@dataclass(frozen=True)
class Offsets:
    """clip(j - i - offset, -left, right), counted from -left."""

    left: int
    right: int
    offset: int

    @property
    def count(self) -> int:
        """How many there are."""
        return self.left + 1 + self.right

    def of(self, i: Tensor, j: Tensor, batch: tuple[int, ...]) -> Tensor:
        """The offset of each pair of a tile, [*batch, r, c]."""
        at = clipped(i[:, None] + self.offset - j, self.left, self.count)
        return at.expand(*batch, *at.shape)


def offsets(matrix: Attention, which: Offsets) -> Tensor:
    """The weights of each row by offset, [*batch, n, offsets], differentiable once."""
    query, key = matrix.rule.operands(matrix.query, matrix.key)
    tiles = Tiles.of(matrix)
    run: Any = _ByOffset.apply  # torch leaves its type out
    found, _, _ = run(tiles, which, query, key, *tiles.rule.tensors())
    by_offset: Tensor = found.to(matrix.dtype)
    return by_offset


class _ByOffset(FirstOrder):
    @staticmethod
    def forward(
        tiles: Tiles, which: Offsets, query: Tensor, key: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        tiles = tiles.with_rule_on(tensors)
        row = tiles.rows(query, key)
        shape = (*tiles.shape[:-1], which.count)
        output = query.new_zeros(shape, dtype=compute_dtype(query.dtype))
        for tile in tiles.walk(query, key, row):
            at = which.of(*tiles.at(tile.rows, tile.span.columns), tiles.batch)
            output[..., tile.rows, :].scatter_add_(-1, at, tile.weights)
        return output, row.peak, row.total

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.tiles, ctx.which, *tensors = inputs
        _, peak, total = output
        ctx.save_for_backward(peak, total, *tensors)
        ctx.mark_non_differentiable(peak, total)

    @staticmethod
    def backward(ctx: Any, *from_above: Tensor) -> Sequence[Tensor | None]:
        return each(_backward, ctx, from_above)


def _backward(ctx: Any, saved: Sequence[Tensor], *from_above: Tensor) -> tuple[Tensor | None, ...]:
    wanted = tuple(ctx.needs_input_grad[2:])
    run: Any = _Gradient.apply
    found = iter(run(ctx.tiles, ctx.which, wanted, from_above[0], *saved))
    return None, None, *(next(found) if wants else None for wants in wanted)


class _Gradient(Gradient):
    """The gradients, of those inputs from which one is wanted."""

    @staticmethod
    def forward(
        tiles: Tiles, which: Offsets, wanted: tuple[bool, ...], above: Tensor, *saved: Tensor
    ) -> tuple[Tensor, ...]:
        peak, total, query, key, *tensors = saved
        tiles = tiles.with_rule_on([tensor.detach() for tensor in tensors])
        wants_query, wants_key, *wants_own = wanted
        with torch.no_grad():
            every = (wants_query, wants_key, False, *wants_own)
            back = _Backward(tiles, query, key, which, every)
            back.run(above, Row(peak, total), None)
        gradients = (back.query, back.key, *back.home.tensors())
        return tuple(
            gradient.to(tensor.dtype)
            for gradient, tensor, wants in zip(
                gradients, (query, key, *tensors), wanted, strict=True
            )
            if wants
        )


class _Backward(Backward):
    def __init__(
        self, tiles: Tiles, query: Tensor, key: Tensor, which: Offsets, wanted: tuple[bool, ...]
    ) -> None:
        super().__init__(tiles, query, key, key[..., :0], wanted)
        self.which = which

    def _dweights(self, rows: slice, span: Span, of_left: Tensor) -> Tensor:
        at = self.which.of(*self.tiles.at(rows, span.columns), self.tiles.batch)
        return of_left.gather(-1, at)
