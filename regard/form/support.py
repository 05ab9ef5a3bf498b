"""Which keys a row of a position-only matrix can see at all: what the form `convolutional` reads.

A row sees a box of taps, at displacements first + dilation tau from where its query stands. Rows
whose taps are all within the grid have the same weights; those at a border lose the keys beyond it,
or their box moves inward, and then they have weights of their own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from regard.form.spectral import Long
from regard.grid import Grid, box
from regard.mask import And, Causal, Mask, Window
from regard.neighborhood import Neighborhood
from regard.normalizer import Identity, Relu, Sigmoid, Softmax
from regard.position.base import terms
from regard.position.grid import Field, OnGrid, Shift
from regard.position.toeplitz import Toeplitz

if TYPE_CHECKING:
    from regard.matrix import Attention

SLOW = (torch.float64,)
"""Dtypes in which PyTorch convolves more slowly than it computes rows at a border.

On two cores, forward and backward, 7 x 7 on 64 x 64 takes 430 ms instead of 310, and 31 x 31 on
32 x 32 six times as long; in float32 they take 27 instead of 62 and 145 instead of 172."""

Keys = Callable[[Tensor], tuple[Tensor, Tensor]]
"""From rows [r] to their keys and which of them there are, [r, taps] each."""


@dataclass(frozen=True)
class Support:
    """The taps of a matrix's rows, and the biases of pairs.

    taps: along each axis
    keys: of rows, also of those at a border
    cut: along each axis, whether rows at a border are what any row is, less the keys beyond it
    """

    grid: Grid
    first: tuple[int, ...]
    dilation: tuple[int, ...]
    taps: tuple[int, ...]
    keys: Keys
    parts: tuple[OnGrid | Toeplitz, ...]
    cut: tuple[bool, ...]

    @property
    def count(self) -> int:
        """How many taps there are."""
        return math.prod(self.taps)

    def inner(self) -> list[range]:
        """Along each axis, the queries that one filter serves.

        Where rows are cut, those that see a key; else those whose taps are all within the grid.
        """
        found = []
        for n, q, s, at, first, d, k, cut in zip(
            self.grid.size, self.grid.queries, self.grid.stride, self.grid.start,  # type: ignore[arg-type]
            self.first, self.dilation, self.taps, self.cut, strict=True,
        ):  # fmt: skip
            reach = d * (k - 1)
            # From the smallest query with at + s query + first + (reach) >= 0 on.
            low = -((at + first + (reach if cut else 0)) // s)
            high = (n - 1 - at - first - (0 if cut else reach)) // s + 1
            found.append(range(max(low, 0), max(min(high, q), low, 0)) if k else range(0))
        return found

    @property
    def border(self) -> int:
        """How many queries have weights of their own."""
        return self.grid.rows - math.prod(map(len, self.inner()))

    @property
    def edge(self) -> int:
        """How many queries miss a tap."""
        return replace(self, cut=(False,) * self.grid.axes).border

    def spread(self, width: int) -> bool:
        """Whether whole border rows are fewer numbers than the vectors, this wide, of all taps."""
        return self.grid.columns < self.count * width

    def pairs(self, width: int) -> int:
        """Weights of one head that are multiplied with vectors of a width."""
        at_border = self.grid.columns if self.spread(width) else self.count
        return (self.grid.rows - self.border) * self.count + self.border * at_border

    def tap_logits(self, like: Tensor) -> Tensor:
        """The biases of all taps, summed: [*batch, heads, 1, taps]."""
        at = box(self.taps, like.device)
        at = at * self.grid.tensor(self.dilation, at) + self.grid.tensor(self.first, at)
        total = like.new_zeros(1, self.count)
        for part in self.parts:
            if isinstance(part, Toeplitz):  # on a line, where query i stands at start + i
                start = self.grid.tensor(self.grid.start, at)
                bias = part.by_distance((part.offset - start - at).mT)
            else:
                bias = part.by_displacement(at[None])
            total = total + bias.to(like.dtype)
        return total

    def logits(self, i: Tensor, j: Tensor, like: Tensor) -> Tensor:
        """The biases of pairs of row i [*x] and key j [*x], summed: [*batch, heads, *x]."""
        total = like.new_zeros(i.shape if i.dim() else ())
        total = total.expand(torch.broadcast_shapes(i.shape, j.shape))
        for part in self.parts:
            total = total + part.of_pairs(i, j).to(like.dtype)
        return total


def find(matrix: Attention) -> Support | Long | Shift | str:
    """The support of a matrix, all it has, its only Shift, or the sentence why it has none."""
    known: Support | Long | Shift | str | None = matrix.__dict__.get("_support")
    if known is None:  # asked by `needs`, by `pays` and by the product
        known = matrix.__dict__["_support"] = _find(matrix)
    return known


def _find(matrix: Attention) -> Support | Long | Shift | str:
    parts = terms(matrix.position)
    for part in parts:
        if not isinstance(part, (OnGrid, Toeplitz)):
            return f"needs positions that are added by displacement; {part} is not."
    if any(isinstance(part, Shift) for part in parts):
        if len(parts) == 1 and matrix.mask is None:
            return parts[0]  # type: ignore[return-value]
        return "needs a Shift to be alone, without a mask and other positions."
    known = [part for part in parts if isinstance(part, (OnGrid, Toeplitz))]
    found = _of_mask(matrix, known) if matrix.mask is not None else _of_field(matrix, known)
    if isinstance(found, Support) and not _divides_sums(matrix):
        return replace(found, cut=(False,) * found.grid.axes)
    return found


def _divides_sums(matrix: Attention) -> bool:
    """Whether rows at a border are sums of what is left of them, divided by a total.

    The sums of other normalizers may cancel. Which totals are too small for that is read from them,
    which torch.vmap does not let one do.
    """
    known = type(matrix.normalizer) in (Softmax, Sigmoid, Relu, Identity)
    transformed = torch._C._are_functorch_transforms_active()
    return known and matrix.dtype not in SLOW and not transformed


def _of_field(matrix: Attention, parts: list[OnGrid | Toeplitz]) -> Support | Long | str:
    fields = [part for part in parts if isinstance(part, Field)]
    if not fields:
        grids = [part.grid for part in parts if isinstance(part, OnGrid)]
        grid = grids[0] if grids else Grid(matrix.shape[-1], matrix.shape[-2])
        return _disagree(grid, parts) or Long(grid, tuple(parts))
    field = fields[0]
    keys = partial(_keys, field.grid, field.displacements(field.table.device))
    first: tuple[int, ...] = field.first  # type: ignore[assignment]
    dilation: tuple[int, ...] = field.dilation  # type: ignore[assignment]
    cut = (True,) * field.grid.axes
    return _agreed(Support(field.grid, first, dilation, field.taps, keys, tuple(parts), cut))


def _of_mask(matrix: Attention, parts: list[OnGrid | Toeplitz]) -> Support | Long | str:
    mask = matrix.mask
    if isinstance(mask, Neighborhood):
        sizes: tuple[int, ...] = mask.kernel_size  # type: ignore[assignment]
        steps: tuple[int, ...] = mask.dilation  # type: ignore[assignment]
        cut = tuple(mask.border == "cut" or one_way for one_way in mask.causal)  # type: ignore[union-attr]
        return _agreed(Support(mask.grid, mask.first, steps, sizes, mask.keys, tuple(parts), cut))
    band = _band(mask)
    if band is None:
        return f"needs a mask by displacement: Neighborhood, Window, Causal; {mask} is not."
    low, high = band
    n, m = matrix.shape[-2:]
    grid = Grid(m, n)
    if math.isinf(low) or math.isinf(high):
        return _disagree(grid, parts) or Long(grid, tuple(parts), low, high)
    taps = (max(int(high - low) + 1, 0),)
    keys = partial(_keys, grid, box(taps, matrix.device) + int(low))
    return _agreed(Support(grid, (int(low),), (1,), taps, keys, tuple(parts), (True,)))


def _agreed(found: Support) -> Support | str:
    return _disagree(found.grid, found.parts) or found


def _disagree(grid: Grid, parts: Sequence[OnGrid | Toeplitz]) -> str | None:
    """Why positions are not on this grid, or None."""
    if grid.axes > 3:
        return f"has 1, 2 or 3 axes; {grid} has {grid.axes}."
    for part in parts:
        if isinstance(part, Toeplitz):
            # i - j is a displacement only on a line where queries stand side by side.
            if grid.axes > 1 or grid.stride != (1,):
                return f"needs positions on one grid; {part} is for lines, not for {grid}."
        elif part.grid != grid:
            return f"needs positions and mask on one grid; {part.grid} is not {grid}."
    return None


def _keys(grid: Grid, displacements: Tensor, i: Tensor) -> tuple[Tensor, Tensor]:
    coordinates = grid.places(i)[:, None] + displacements
    some = grid.inside(coordinates)
    return torch.where(some, grid.index(coordinates), 0), some


def _band(mask: Mask | None) -> tuple[float, float] | None:
    """The least and largest j - i that a mask of one line shows; None if it is not of that kind."""
    if isinstance(mask, Causal):
        return -math.inf, mask.offset
    if isinstance(mask, Window):
        left = math.inf if mask.left is None else mask.left
        right = math.inf if mask.right is None else mask.right
        return mask.offset - left, mask.offset + right
    if isinstance(mask, And):
        one, other = _band(mask.one), _band(mask.other)
        if one is not None and other is not None:
            return max(one[0], other[0]), min(one[1], other[1])
    return None
