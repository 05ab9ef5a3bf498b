"""A position-only matrix as one convolution of a box of rows, and other rows each for itself.

In the box, output_i = sums_i / total_i, where both are convolutions of what lies within the grid,

    sums = conv(value, w),  total = conv(1, share)

w are the weights of a row that sees all taps, and share is what each tap has of the number by which
the normalizer divides: w itself under softmax. A row at a border may see only shares far below the
others, which have lost digits: where its total is below `least_total`, it is computed for itself.

Gradients of w are sums over rows of gradient . value / total less gradient . output / total, each
rounded for itself: their error is that of a sum of |gradient| |value|, also where a row at a border
sees one weight alone and the two are the same number, which `dense` subtracts row by row.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from regard import errors
from regard.form.filters import Box
from regard.form.support import Support
from regard.form.tiles import compute_dtype
from regard.normalizer import Normalizer, Relu, Softmax
from regard.part import widest

if TYPE_CHECKING:
    from regard.matrix import Attention

BLOCK = 2**24
"""Bytes of a block of rows that are computed each for itself."""


@dataclass(frozen=True)
class Split:
    """The two kinds of rows of a matrix.

    weights: of the box, [*batch, heads, 1, taps]
    total: what its sums are divided by, [*batch, heads, rows, 1]; None where that is 1
    rows: the others, [r]
    """

    matrix: Attention
    box: Box
    weights: Tensor
    total: Tensor | None
    rows: Tensor

    @staticmethod
    def of(matrix: Attention, found: Support, dtype: torch.dtype) -> Split:
        """Split a matrix, and compute its weights inside."""
        box = Box(found, found.inner())
        alone = torch.ones(found.grid.queries, dtype=torch.bool, device=matrix.device)  # type: ignore[arg-type]
        alone[box.taken] = False
        if not box.count:
            nothing = matrix.query.new_zeros(1, 0, dtype=dtype)
            return Split(matrix, box, nothing, None, alone.flatten().nonzero()[:, 0])
        weights, total, small = _weights(matrix, box, dtype)
        if small is not None:
            alone[box.taken] |= small
        return Split(matrix, box, weights, total, alone.flatten().nonzero()[:, 0])

    def product(self, value: Tensor) -> Tensor:
        """The matrix times value [*batch, heads, m, e]: [*batch, heads, n, e]."""
        grid = self.box.support.grid
        if not self.box.count:
            return torch.cat([*self._single_product(value)], -2)
        sums = self.box.product(self.weights, value).flatten(-grid.axes - 1, -2)
        if self.total is not None:
            alone = not (sums.requires_grad or self.total.requires_grad)
            fits = torch.broadcast_shapes(sums.shape, self.total.shape) == sums.shape
            sums = sums.div_(self.total) if alone and fits else sums / self.total
        if not len(self.rows):
            return sums
        if self.box.count < grid.rows:
            sums = sums.unflatten(-2, [len(side) for side in self.box.sides])
            sums = F.pad(sums, [0, 0, *self._around()]).flatten(-grid.axes - 1, -2)
        rows = torch.cat([*self._single_product(value)], -2)
        batch = torch.broadcast_shapes(rows.shape[:-2], sums.shape[:-2])
        rows, sums = (each.expand(*batch, -1, -1) for each in (rows, sums))
        return sums.index_copy(-2, self.rows, rows)

    def transposed(self, x: Tensor) -> Tensor:
        """The transpose of the matrix times x [*batch, heads, n, e]: [*batch, heads, m, e]."""
        grid, box = self.box.support.grid, self.box
        output = x.new_zeros(grid.columns, x.shape[-1])
        if box.count:
            kept = x.index_fill(-2, self.rows, 0) if len(self.rows) else x
            inside = kept.unflatten(-2, grid.queries)[(..., *box.taken, slice(None))]
            sides = [len(side) for side in box.sides]
            inside = inside.flatten(-grid.axes - 1, -2)
            inside = inside if self.total is None else inside / self.total
            output = box.transposed(self.weights, inside.unflatten(-2, sides))
        if len(self.rows) or not box.count:
            for each in self._single_transposed(x[..., self.rows, :]):
                output = output + each
        return output

    def _around(self) -> list[int]:
        """How many queries lie around the box, as F.pad wants it."""
        sides = zip(self.box.sides, self.box.support.grid.queries, strict=True)  # type: ignore[arg-type]
        return [end for side, q in reversed([*sides]) for end in (side.start, q - side.stop)]

    def _single_product(self, value: Tensor) -> Iterator[Tensor]:
        """The other rows, some at a time: [*batch, heads, r, e]."""
        support = self.box.support
        for rows in self.rows.split(block_rows(self.matrix, support, value)):
            keys, weights = _of_rows(self.matrix, support, rows, value.dtype)
            if support.spread(value.shape[-1]):
                yield self._matrix(keys, weights) @ value
            else:
                of_rows = value.index_select(-2, keys.flatten()).unflatten(-2, keys.shape)
                yield (weights[..., None, :] @ of_rows)[..., 0, :]

    def _single_transposed(self, x: Tensor) -> Iterator[Tensor]:
        """The other rows, transposed, times x [*batch, heads, r, e], some at a time."""
        support = self.box.support
        block = block_rows(self.matrix, support, x)
        for rows, some in zip(self.rows.split(block), x.split(block, -2), strict=True):
            keys, weights = _of_rows(self.matrix, support, rows, x.dtype)
            if support.spread(x.shape[-1]):
                yield self._matrix(keys, weights).mT @ some
            else:
                terms = (weights[..., None] * some[..., None, :]).flatten(-3, -2)
                zeros = terms.new_zeros(*terms.shape[:-2], support.grid.columns, terms.shape[-1])
                yield zeros.index_add(-2, keys.flatten(), terms)

    def _matrix(self, keys: Tensor, weights: Tensor) -> Tensor:
        zeros = weights.new_zeros(*weights.shape[:-1], self.box.support.grid.columns)
        return zeros.scatter_add(-1, keys.expand_as(weights), weights)


def _weights(
    matrix: Attention, box: Box, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Weights and totals of a box, and which of its rows have too small ones, [*sides]."""
    found = box.support
    logits = found.tap_logits(matrix.query.new_zeros(0, dtype=widest(matrix.device)))
    heads = torch.broadcast_shapes(logits.shape[:-2], (1,) * (len(matrix.shape) - 2))
    logits = logits.expand(*heads, -1, -1)
    if matrix.normalizer.by_pair or not any(found.cut):
        return matrix.normalizer.whole(logits).to(dtype), None, None
    weights, shares, sink = (x.to(dtype) for x in _shares(matrix.normalizer, logits))
    total, small = box.totals(shares) + sink, None
    low = total < least_total(dtype)
    if bool(low.any()):
        # A row that sees no tap at all has sums of 0, which are right.
        sees = box.totals((logits != -torch.inf).to(dtype)) > 0.5
        small = (low & sees).flatten(0, -2).any(0).unflatten(0, [len(side) for side in box.sides])
        total = torch.where(low, 1, total)
    return weights, total[..., None], small


def _shares(normalizer: Normalizer, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Weights of all taps [*batch, heads, 1, taps], their shares, and the share of a sink."""
    if isinstance(normalizer, Relu):  # which divides by the number of keys
        there = (logits != -torch.inf).to(logits.dtype)
        count = there.sum(-1, keepdim=True).clamp(min=1)
        return normalizer.whole(logits), there / count, logits.new_zeros(())
    assert isinstance(normalizer, Softmax)
    if normalizer.sink is None:
        weights = normalizer.whole(logits)
        return weights, weights, logits.new_zeros(())
    # A sink is one more tap, which every row sees and whose value is 0.
    sink = torch.as_tensor(normalizer.sink, dtype=logits.dtype)[..., None, None]
    batch = torch.broadcast_shapes(logits.shape[:-2], sink.shape[:-2])
    both = torch.cat([each.expand(*batch, 1, each.shape[-1]) for each in (logits, sink)], -1)
    weights = Softmax().whole(both)
    return weights[..., :-1], weights[..., :-1], weights[..., -1]


def least_total(dtype: torch.dtype) -> float:
    """The least part of all shares that a row in the box sees.

    Its weights e^(logit - peak) have errors of eps |logit - peak|: 8 eps at most in float64, and
    where float64 serves coarser dtypes none that these see.
    """
    return 2.0**-16 if dtype == torch.float64 else 2.0**-40


def _of_rows(
    matrix: Attention, found: Support, rows: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Keys of rows, [r, taps], and weights [*batch, heads, r, taps]."""
    keys, there = found.keys(rows)
    like = matrix.query.new_zeros(0, dtype=dtype)
    logits = found.logits(rows[:, None], keys, like).masked_fill(~there, -torch.inf)
    heads = torch.broadcast_shapes(logits.shape[:-2], (1,) * (len(matrix.shape) - 2))
    return keys, matrix.rule.normalizer.whole(logits.expand(*heads, *keys.shape))


def lanes(matrix: Attention, value: Tensor) -> int:
    """How many matrices are multiplied."""
    batch = torch.broadcast_shapes(value.shape[:-3], matrix.shape[:-3])
    heads = matrix.shape[-3] if len(matrix.shape) > 2 else 1
    return int(math.prod(batch)) * max(heads, errors.heads_of(value))


def row_bytes(matrix: Attention, found: Support, value: Tensor) -> int:
    """Of a single row: places of its taps, logits and weights, the vectors or the row they make."""
    taps, size = found.count, compute_dtype(matrix.dtype).itemsize
    wide = lanes(matrix, value) * min(taps * value.shape[-1], found.grid.columns)
    return 8 * (found.grid.axes + 3) * taps + size * (2 * taps * matrix.shape[:-2].numel() + wide)


def block_rows(matrix: Attention, found: Support, value: Tensor) -> int:
    """How many single rows are computed at once."""
    return max(BLOCK // max(row_bytes(matrix, found, value), 1), 1)
