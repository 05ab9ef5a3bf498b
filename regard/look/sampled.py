"""Blocks of a long map from a sample of its queries, and the error that sampling makes.

Whole rows are computed, so each sampled weight is exact; queries are drawn without replacement,
equally many of every block of rows. Of a block with S queries of which s are drawn, y_i is the
weight that query i gives to the block's keys and V the number of visible cells:

    mean weight = S / V mean(y),    its standard error = S / V sqrt(var(y) / s (1 - s / S))

(Cochran 1977, Sampling Techniques, equations 2.7 and 2.20; var with s - 1.) Once s = S it is exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from regard.look.record import Captured
from regard.matrix import Attention

FIRST = 2  # queries of each block before anything is shown: one alone has no variance


@dataclass(frozen=True)
class Region:
    """Cells of one head, in blocks of size x size; `top` and `left` are where they begin."""

    number: int
    head: int
    top: int
    left: int
    rows: int
    columns: int
    size: int


class Estimate:
    """The mean weight of every block of a region; better with every `advance`, exact at the end.

    call: one sequence;  region: inside its matrix;  seed: of the draw
    Cost: O(m d) per sampled query and O(blocks) memory.

    >>> call = Captured("", "arrays", *torch.randn(3, 1, 1, 64, 8), None, scale=1.0)
    >>> estimate = Estimate(call, Region(0, 0, 0, 0, 64, 64, 16))
    >>> _ = estimate.advance(8)
    >>> estimate.taken, estimate.mean().shape, bool((estimate.error() > 0).all())
    (8, torch.Size([4, 4]), True)
    >>> _ = estimate.advance(56)
    >>> torch.allclose(estimate.mean(), call.matrix.pool(16)[0, 0].double(), atol=1e-6)
    True
    """

    def __init__(self, call: Captured, region: Region, *, seed: int = 0) -> None:
        self.region, self.taken = region, 0
        self._call = call
        head = call.matrix[0, region.head]
        assert isinstance(head, Attention)
        self._matrix = head
        down, across = (-(-cells // region.size) for cells in (region.rows, region.columns))
        self._order = _order(region, down, seed)
        self._drawn = torch.zeros(down, 1, dtype=torch.float64)
        self.sums = torch.zeros(down, across, dtype=torch.float64)
        self.squares, self._largest = torch.zeros_like(self.sums), torch.zeros_like(self.sums)
        self._there = torch.full_like(self._drawn, region.size)
        self._there[-1] = region.rows - region.size * (down - 1)
        self._cells, self.keys = self._visible(down, across)

    @property
    def first(self) -> int:
        """How many queries are drawn before every block has an error."""
        return min(FIRST * len(self._there), self.region.rows)

    @property
    def is_exact(self) -> bool:
        """Whether every query of the region was computed."""
        return self.taken == self.region.rows

    @property
    def per_cell(self) -> Tensor:
        """1 / V: what one query's weight on a block counts per visible cell; NaN where masked."""
        return 1 / self._cells

    def advance(self, count: int) -> tuple[Tensor, Tensor]:
        """Compute `count` more queries, or those that are left.

        Returns their blocks [count], and their weights on each block of keys [count, blocks].
        """
        region = self.region
        rows = self._order[self.taken : self.taken + count].sort().values
        stop = region.left + region.columns
        weights = self._matrix[region.top + rows, region.left : stop]
        assert isinstance(weights, Tensor)
        padded = self._padded(weights)
        # Widened after the sum, which adds in pairs: before it, it takes as long as the product.
        sums = padded.sum(-1).double()
        block = rows // region.size
        self.sums.index_add_(0, block, sums)
        self.squares.index_add_(0, block, sums.square())
        place = block[:, None].expand_as(sums)
        self._largest.scatter_reduce_(0, place, padded.amax(-1).double(), "amax")
        self._drawn.index_add_(0, block, torch.ones(len(rows), 1, dtype=torch.float64))
        self.taken += len(rows)
        return block, sums

    def mean(self) -> Tensor:
        """Mean weight over the visible cells of each block, float64; NaN where all are masked."""
        return self._there / self._cells * self.sums / self._drawn

    def largest(self) -> Tensor:
        """The largest weight of the drawn queries in each block, at most that of all."""
        return torch.where(self._cells.isnan(), torch.nan, self._largest)

    def error(self) -> Tensor:
        """The standard error of `mean`, 0 once a block's queries are all there."""
        return self.error_of(self.per_cell * self.sums, self.per_cell.square() * self.squares)

    def error_of(self, sums: Tensor, squares: Tensor) -> Tensor:
        """The standard error of S / s sums, of numbers of the drawn queries and their squares."""
        s, whole = self._drawn, self._there
        variance = (squares - sums.square() / s).clamp(min=0) / (s - 1).clamp(min=1)
        found = whole * (variance / s * (1 - s / whole)).sqrt()
        return torch.where((s < 2) & (s < whole), torch.inf, found)

    def _padded(self, numbers: Tensor) -> Tensor:
        """[rows, columns] -> [rows, blocks, columns of a block], with zeros at the end."""
        size = self.region.size
        return pad(numbers, (0, -numbers.shape[-1] % size)).reshape(len(numbers), -1, size)

    def _visible(self, down: int, across: int) -> tuple[Tensor, Tensor]:
        """Visible cells of each block, and the mean number of keys that its queries may see."""
        region, call = self.region, self._call
        m = call.key.shape[2]
        starts = region.left + region.size * torch.arange(across)
        stops = (starts + region.size).clamp(max=region.left + region.columns)
        cells = torch.zeros(down, across, dtype=torch.float64)
        keys = torch.zeros(down, dtype=torch.float64)
        for at in range(0, region.rows, 1024):
            rows = torch.arange(at, min(at + 1024, region.rows))
            i = (region.top + rows)[:, None]
            if call.mask is None:
                last = i + 1 if call.causal else torch.full_like(i, m)
                seen = (torch.minimum(last, stops) - starts).clamp(min=0).double()
                count = last.clamp(max=m)[:, 0].double()
            else:
                mask = call.mask[0].expand(call.mask.shape[1], *self._matrix.shape)
                keep = mask[region.head % mask.shape[0]][i[:, 0]]
                if call.causal:
                    keep = keep & (torch.arange(m) <= i)
                inside = keep[:, region.left : region.left + region.columns]
                seen = self._padded(inside).sum(-1).double()
                count = keep.sum(-1).double()
            cells.index_add_(0, rows // region.size, seen)
            keys.index_add_(0, rows // region.size, count)
        return torch.where(cells > 0, cells, torch.nan), keys / self._there[:, 0]


def _order(region: Region, down: int, seed: int) -> Tensor:
    """All rows of a region, in rounds that take one random row of every block."""
    draw = torch.rand(down, region.size, generator=torch.Generator().manual_seed(seed))
    rows = torch.arange(down * region.size).reshape(down, -1)
    # The last block may be lower than the others: what is below it comes after all that is not.
    order = draw.masked_fill(rows >= region.rows, torch.inf).argsort(-1)
    rounds = rows.gather(-1, order).mT.reshape(-1)
    return rounds[rounds < region.rows]


class Means(Protocol):
    """Means of blocks, and their standard errors."""

    @property
    def is_exact(self) -> bool: ...
    def mean(self) -> Tensor: ...
    def error(self) -> Tensor: ...


def typical_error(estimate: Means) -> float:
    """The root mean square of all standard errors, by that of all means: one number for a map."""
    mean, error = estimate.mean(), estimate.error()
    there = ~mean.isnan()
    if estimate.is_exact or not bool(there.any()):
        return 0.0
    size = float(mean[there].square().mean().sqrt())
    return float(error[there].square().mean().sqrt()) / size if size > 0 else 0.0
