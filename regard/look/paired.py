"""The same sampled queries of two runs, and the error of the difference of their means.

Both runs draw the same queries, so that what both have in common does not count as error: of a
block with S queries of which s are drawn, and d_i = y_i / V - y'_i / V' for query i of it, with its
weight y and the number of visible cells V in each run,

    difference = S mean(d),    its standard error = S sqrt(var(d) / s (1 - s / S))

(Cochran 1977, Sampling Techniques, equation 2.20, of the d_i; see `regard.look.sampled`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from regard.look.record import Captured
from regard.look.sampled import Estimate, Region


class Paired:
    """Estimates of one region of two runs, advanced together.

    here, there: the two; their queries are the same
    Cost: that of both.

    >>> one, two = (
    ...     Captured("", "arrays", *torch.randn(3, 1, 1, 64, 8), None, scale=1.0) for _ in range(2)
    ... )
    >>> paired = Paired((one, two), Region(0, 0, 0, 0, 64, 64, 16))
    >>> paired.advance(64)
    >>> exact = one.matrix.pool(16)[0, 0] - two.matrix.pool(16)[0, 0]
    >>> torch.allclose(paired.mean(), exact.double(), atol=1e-6), paired.error().max().item()
    (True, 0.0)
    """

    def __init__(self, calls: tuple[Captured, Captured], region: Region, *, seed: int = 0) -> None:
        self.here, self.there = (Estimate(call, region, seed=seed) for call in calls)
        self._products = torch.zeros_like(self.here.sums)

    @property
    def taken(self) -> int:
        """How many queries of each run are there."""
        return self.here.taken

    @property
    def first(self) -> int:
        """How many queries are drawn before every block has an error."""
        return self.here.first

    @property
    def is_exact(self) -> bool:
        """Whether every query of the region was computed, in both runs."""
        return self.here.is_exact

    def advance(self, count: int) -> None:
        """Compute `count` more queries of each run, or those that are left."""
        (block, mine), (_, theirs) = self.here.advance(count), self.there.advance(count)
        self._products.index_add_(0, block, mine * theirs)

    def mean(self) -> Tensor:
        """Mean weights of the first run minus those of the second; NaN where either is masked."""
        return self.here.mean() - self.there.mean()

    def error(self) -> Tensor:
        """The standard error of `mean`, 0 once a block's queries are all there."""
        one, two = self.here, self.there
        mine, theirs = one.per_cell, two.per_cell
        sums = mine * one.sums - theirs * two.sums
        squares = mine.square() * one.squares + theirs.square() * two.squares
        return one.error_of(sums, squares - 2 * mine * theirs * self._products)
