"""A matrix cut into tiles: which tiles there are, their logits and their weights.

Memory is that of one tile. Rows of tiles come in order; tiles that the mask empties do not come,
and tiles that it leaves whole come without a test.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from regard.dropout import Dropout
from regard.normalizer import Row, State
from regard.part import positions, widest
from regard.rule import Rule
from regard.runs import Runs, Span

if TYPE_CHECKING:
    from regard.matrix import Attention

# Numbers held by one tile over all batch entries and heads: the fastest, or close to it, in
# bench/tiles.py on two cores (bench/RESULTS.md).
TILE_NUMBERS = 2**21
LARGEST_SIDE = 1024
SMALLEST_SIDE = 16
# Below this side a tile costs as much as its Python does.
NARROW_SIDE = 64


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of a tile: half precision inputs are computed in float32."""
    return torch.promote_types(dtype, torch.float32)


def side(lanes: int, numbers_per_pair: int) -> int:
    """The side of a square tile: a power of two, so that tiles of a mask line up.

    >>> side(1, 1), side(96, 1), side(8, 128)
    (1024, 128, 32)
    """
    pairs = TILE_NUMBERS // max(lanes * numbers_per_pair, 1)
    length = 1 << max(math.isqrt(max(pairs, 1)).bit_length() - 1, 0)
    return min(max(length, SMALLEST_SIDE), LARGEST_SIDE)


@dataclass(frozen=True, eq=False)
class Tiles:
    """What is needed to compute any tile from the operands."""

    rule: Rule
    runs: Runs | None
    dropout: Dropout | None
    lanes: Tensor
    shape: tuple[int, ...]
    side: int

    @staticmethod
    def of(matrix: Attention) -> Tiles:
        """Cut a matrix."""
        lanes = math.prod(matrix.shape[:-2])
        numbers = matrix.rule.numbers_per_pair(matrix.query.shape[-1])
        if matrix.rule.whole_rows:
            rows = max(TILE_NUMBERS // max(lanes * numbers * matrix.shape[-1], 1), 1)
            length = min(rows, LARGEST_SIDE)
            return Tiles(
                matrix.rule, matrix.runs, matrix.dropout, matrix.lanes, tuple(matrix.shape), length
            )
        length = side(lanes, numbers)
        if matrix.runs is not None:
            # Where rows see few keys, smaller tiles waste less on pairs that are not visible: a
            # causal window of 257 takes half the time with side 256 that it takes with 1024.
            near = 1 << round(math.log2(max(matrix.runs.reach, 1)))
            length = min(length, max(near, min(length, NARROW_SIDE)))
        return Tiles(
            matrix.rule, matrix.runs, matrix.dropout, matrix.lanes, tuple(matrix.shape), length
        )

    def with_rule_on(self, tensors: Sequence[Tensor]) -> Tiles:
        """The same tiles with the rule on other tensors."""
        return replace(self, rule=self.rule.with_tensors(tensors))

    @property
    def batch(self) -> tuple[int, ...]:
        """The batch and head axes."""
        return self.shape[:-2]

    def row_blocks(self) -> Iterator[slice]:
        """Slices of `side` rows that cover all rows."""
        return _slices(self.shape[-2], self.side)

    def spans(self, rows: slice) -> list[Span]:
        """The blocks of columns that these rows see."""
        if self.rule.whole_rows:
            return [Span(slice(0, self.shape[-1]), self.runs is None)] if self.shape[-1] else []
        if self.runs is None:
            return [Span(columns, True) for columns in _slices(self.shape[-1], self.side)]
        return self.runs.spans(rows, self.side)

    def keep(self, rows: slice, span: Span) -> Tensor | None:
        """Which pairs of a tile are visible; None if all are."""
        if span.full or self.runs is None:
            return None
        return self.runs.keep(rows, span.columns)

    def logits(
        self, query: Tensor, key: Tensor, rows: slice, span: Span, rule: Rule | None = None
    ) -> Tensor:
        """Logits of a tile, [*batch, r, c], from the operands' own rows `query` and `key`.

        rule: the rule cut to this tile, where the caller has already done so
        """
        rule = self.rule.cut(rows, span.columns) if rule is None else rule
        i, j = self.at(rows, span.columns)
        keep = self.keep(rows, span)
        logits = rule.logits(query, key, i, j, keep)
        return logits.expand(*self.batch, i.numel(), j.numel())

    def drop(self, rows: slice, columns: slice, dtype: torch.dtype) -> Tensor | None:
        """Dropout factors of a tile, or None."""
        if self.dropout is None:
            return None
        return self.dropout.factors(self.lanes, *self.at(rows, columns), dtype)

    def at(self, rows: slice, columns: slice) -> tuple[Tensor, Tensor]:
        """The positions of a tile's rows and columns."""
        device = self.lanes.device
        return positions(rows, self.shape[-2], device), positions(columns, self.shape[-1], device)

    def walk(self, query: Tensor, key: Tensor, row: Row) -> Iterator[Tile]:
        """Every visible tile with its weights: what all looking goes through. `row`: of `rows`."""
        dtype = compute_dtype(query.dtype)
        for rows in self.row_blocks():
            of_rows = query[..., rows, :].to(dtype)
            for span in self.spans(rows):
                logits = self.logits(of_rows, key[..., span.columns, :].to(dtype), rows, span)
                weights = self.rule.normalizer.weights(logits, part_of(row, rows))
                drop = self.drop(rows, span.columns, dtype)
                yield Tile(rows, span, logits, weights if drop is None else weights * drop)

    def rows(self, query: Tensor, key: Tensor) -> Row:
        """What turns the logits of each row into weights, [*batch, n]."""
        if self.rule.normalizer.by_pair:
            empty = query.new_zeros(*self.shape[:-1], dtype=compute_dtype(query.dtype))
            return Row(empty, empty)
        nothing = key.new_zeros(key.shape[-2], 0)
        return self.product(query, key, nothing)[1]

    def product(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Row]:
        """The matrix times value, [*batch, n, e], and its rows, [*batch, n]."""
        dtype = compute_dtype(query.dtype)
        rows_in_all = self.shape[-2]
        batch = self.output_batch(value)
        output = value.new_empty(*batch, rows_in_all, value.shape[-1])
        row = Row(*(value.new_empty(*self.batch, rows_in_all, dtype=dtype) for _ in range(2)))
        normalizer = self.rule.normalizer
        for rows in self.row_blocks():
            of_rows = query[..., rows, :].to(dtype)
            count = rows.stop - rows.start
            zeros = value.new_zeros(*batch, count, value.shape[-1], dtype=widest(value.device))
            state: State = normalizer.neutral((*self.batch, count), zeros, dtype)
            for span in self.spans(rows):
                of_columns, of_values = (x[..., span.columns, :].to(dtype) for x in (key, value))
                logits = self.logits(of_rows, of_columns, rows, span)
                drop = self.drop(rows, span.columns, dtype)
                state = normalizer.absorb(state, logits, of_values, drop)
            output[..., rows, :], (row.peak[..., rows], row.total[..., rows]) = normalizer.finish(
                state
            )
        return output, row

    def output_batch(self, value: Tensor) -> tuple[int, ...]:
        """The batch and head axes of the matrix times value."""
        return output_batch(self.batch, value)


@dataclass(frozen=True)
class Tile:
    """Logits and weights [*batch, r, c] of one tile."""

    rows: slice
    span: Span
    logits: Tensor
    weights: Tensor


def output_batch(batch: Sequence[int], value: Tensor) -> tuple[int, ...]:
    """The batch and head axes of a product: value heads are shared by groups."""
    axes = list(value.shape[:-2])
    if axes and batch:
        axes[-1] = max(axes[-1], batch[-1])
    return tuple(torch.broadcast_shapes(axes, batch))


def part_of(row: Row, rows: slice) -> Row:
    """The rows of one block."""
    return Row(row.peak[..., rows], row.total[..., rows])


def _slices(length: int, step: int) -> Iterator[slice]:
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))
