"""Biases by displacement on a grid: the positions of convolutions.

A query stands at a place x of the keys' grid (`regard.grid.Grid`) and a key at y; the bias depends
on y - x, a vector with one number for each axis. Under `PositionOnly` and a softmax a head is then
a filter: a hard one (`Shift`), a soft one that can move (`Gaussian`), or any one (`Field`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from regard import errors
from regard.grid import Grid, Numbers, axes_of, box
from regard.position.base import Position
from regard.position.toeplitz import wide

PADDING_MODES = ("zeros", "replicate", "reflect", "circular")


class OnGrid(Position):
    """Base of biases by displacement on a grid; a part says `by_displacement` or `of_pairs`."""

    grid: Grid

    def by_displacement(self, displacement: Tensor) -> Tensor:
        """Return the biases at displacements key - query, [*x, axes]: [*batch, heads, *x]."""
        raise NotImplementedError

    def of_pairs(self, i: Tensor, j: Tensor) -> Tensor:
        """Return the biases of pairs of query i [*x] and key j [*x]: [*batch, heads, *x]."""
        return self.by_displacement(self.grid.keys(j) - self.grid.places(i))

    def on_score(self, query: Tensor, key: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return self.of_pairs(i[:, None], j)

    def at(self, offset: int) -> Self:
        """The part itself at 0: the queries of a grid continue no sequence of cached keys."""
        if offset:
            raise errors.ShapeError(
                f"{self} has no queries from {offset} on; its queries are those of {self.grid}. "
                "Grid(size, queries=..., start=...) says where other queries stand."
            )
        return self

    def check(self, query: Tensor, key: Tensor) -> None:
        self.grid.check(self, query.shape[-2], key.shape[-2])

    def numbers_per_pair(self) -> int:
        return 3 * self.grid.axes


@dataclass(frozen=True, eq=False, repr=False)
class Shift(OnGrid):
    """One key per query: the one that stands at a fixed offset from it. A head is one tap of a CNN.

    bias_ij = 0 if key j is at pi(x_i + offset), else -inf

    Alone, a row is one-hot. pi says what is read beyond the border, as padding_mode does for
    `torch.nn.Conv2d`: "replicate" clamps, "reflect" mirrors, "circular" wraps, and under "zeros"
    such a row sees no key at all, so its output is 0: rows of a zero-padded convolution sum to 0 or
    1, which no softmax over tokens that exist can do.

    offsets: integers [heads, axes], or what broadcasts to [*batch, heads] before the axes
    Cost: O(1) per query in the form `convolutional`, which reads one key.
    Cordonnier, Loukas, Jaggi 2020, arXiv:1911.03584, theorem 1 (the limit of its attention).
    Raises ShapeError where the offsets do not fit the grid, the heads, or the matrix.

    >>> import regard
    >>> shift = Shift(torch.tensor([[-1], [1]]), Grid(3))
    >>> tokens = torch.zeros(2, 3, 0)
    >>> regard.attention(tokens, tokens, score=regard.PositionOnly(), position=shift).dense()
    tensor([[[0., 0., 0.],
             [1., 0., 0.],
             [0., 1., 0.]],
    <BLANKLINE>
            [[0., 1., 0.],
             [0., 0., 1.],
             [0., 0., 0.]]])
    """

    offsets: Tensor
    grid: Grid
    padding_mode: str = "zeros"

    trailing: ClassVar[dict[str, int]] = {"offsets": 1}

    def __post_init__(self) -> None:
        errors.check_kind("Shift's grid", self.grid, Grid)
        errors.check_integers("Shift's offsets", self.offsets)
        _check_axes("Shift's offsets", self.offsets, self.grid)
        if self.padding_mode not in PADDING_MODES:
            raise ValueError(
                f"Shift's padding_mode is one of {', '.join(map(repr, PADDING_MODES))}, as in "
                f"torch.nn.Conv2d, not {self.padding_mode!r}."
            )

    def keys(self, i: Tensor) -> tuple[Tensor, Tensor]:
        """Return the key that queries i [*x] see, and whether there is one: [*batch, heads, *x]."""
        offsets = self.offsets.reshape(*self.offsets.shape[:-1], *[1] * i.dim(), self.grid.axes)
        at = self.grid.places(i) + offsets
        last = self.grid.tensor(self.grid.size, at) - 1
        if self.padding_mode == "reflect":
            period = (2 * last).clamp(min=1)
            at = at.remainder(period)
            at = torch.where(at > last, period - at, at)
        elif self.padding_mode == "circular":
            at = at.remainder(last.clamp(min=0) + 1)
        elif self.padding_mode == "replicate":
            at = torch.minimum(at, last).clamp(min=0)
        some = self.grid.inside(at)
        return torch.where(some, self.grid.index(at), 0), some

    def of_pairs(self, i: Tensor, j: Tensor) -> Tensor:
        i, j = torch.broadcast_tensors(i, j)
        key, some = self.keys(i)
        return torch.zeros(1, device=j.device).where(some & (j == key), -torch.inf)

    def on_score(self, query: Tensor, key: Tensor, i: Tensor, j: Tensor) -> Tensor:
        seen, some = self.keys(i)
        return query.new_zeros(1).where(some[..., None] & (seen[..., None] == j), -torch.inf)

    def numbers_per_pair(self) -> int:
        return 1


@dataclass(frozen=True, eq=False, repr=False)
class Gaussian(OnGrid):
    """A soft spot that can move and widen: the quadratic encoding of a convolution's tap.

    bias_ij = -|sharpness (y_j - x_i - centre)|^2

    sharpness is a number per head, or a matrix for a spot of any shape; its square is the paper's
    alpha. Up to a constant of the row, which a softmax drops, the bias is v . (|d|^2, d_1, d_2)
    with v = -alpha (1, -2 c_1, -2 c_2) and d = y - x. As sharpness grows, the row becomes that of
    `Shift` where the centre is whole and inside; at the border the nearest key wins. Its weight off
    the centre is at most 2 axes e^-alpha to first order: 2e-4 at alpha = 10 in two dimensions, and
    no float32 tells it from 0 at alpha = 30, nor float64 at 46.

    centre: [heads, axes], or what broadcasts to [*batch, heads] before the axes
    sharpness: [heads], or [heads, axes, axes]: one axis fewer than centre, or one more
    Cost: O(axes) flops per pair, O(axes^2) with matrices.
    Cordonnier, Loukas, Jaggi 2020, arXiv:1911.03584, theorem 1; matrices as in their code.
    Raises ShapeError where the tensors do not fit each other, the grid, the heads or the matrix.

    >>> spot = Gaussian.of(torch.tensor([[0.0, 1.0]]), Grid((1, 3)), alpha=4.0)
    >>> tokens = torch.zeros(1, 3, 1)
    >>> spot.on_score(tokens, tokens, torch.arange(1), torch.arange(3)).tolist()
    [[[-4.0, -0.0, -4.0]]]
    """

    centre: Tensor
    sharpness: Tensor
    grid: Grid

    def __post_init__(self) -> None:
        errors.check_kind("Gaussian's grid", self.grid, Grid)
        errors.check_tensor("Gaussian's centre", self.centre, shape="[heads, axes]", dims=1)
        _check_axes("Gaussian's centre", self.centre, self.grid)
        errors.check_tensor("Gaussian's sharpness", self.sharpness, shape="[heads]", dims=0)
        axes, given = self.grid.axes, self.sharpness.shape
        if self._is_matrix and given[-2:] == (axes, axes):
            return
        if self.sharpness.dim() >= self.centre.dim():
            raise errors.ShapeError(
                f"Gaussian's sharpness has shape {errors.show(given)} beside a centre "
                f"{errors.show(self.centre.shape)}; it must be [heads], one number for each head, "
                f"or [heads, {axes}, {axes}], a matrix for each."
            )

    @staticmethod
    def of(centre: Tensor, grid: Grid, *, alpha: float = 1.0, matrix: bool = False) -> Gaussian:
        """Spots of one width that require gradients: sharpness alpha^0.5, or that times I.

        centre: [heads, axes], numbers or integers
        """
        errors.check_number("Gaussian.of's alpha", alpha, least=0)
        centre = centre.detach().to(torch.promote_types(centre.dtype, torch.float32)).clone()
        sharpness = centre.new_full(centre.shape[:-1], math.sqrt(alpha))
        if matrix:
            eye = torch.eye(centre.shape[-1], dtype=centre.dtype, device=centre.device)
            sharpness = sharpness[..., None, None] * eye
        return Gaussian(centre.requires_grad_(), sharpness.requires_grad_(), grid)

    @property
    def trailing(self) -> dict[str, int]:  # type: ignore[override]
        """Matrices have two axes of their own."""
        return {"centre": 1, "sharpness": 2 if self._is_matrix else 0}

    @property
    def _is_matrix(self) -> bool:
        return self.sharpness.dim() == self.centre.dim() + 1

    def by_displacement(self, displacement: Tensor) -> Tensor:
        dtype = torch.promote_types(wide(self.centre), self.sharpness.dtype)
        centre, sharpness = self.centre.to(dtype), self.sharpness.to(dtype)
        ones = [1] * (displacement.dim() - 1)
        away = displacement.to(dtype) - centre.reshape(*centre.shape[:-1], *ones, -1)
        if not self._is_matrix:  # the square after the product: alpha = sharpness^2 may overflow
            scaled = away * sharpness.reshape(*sharpness.shape, *ones, 1)
        else:
            *heads, a, b = sharpness.shape
            scaled = (sharpness.reshape(*heads, *ones, a, b) @ away[..., None])[..., 0]
        return -scaled.square().sum(-1)

    def numbers_per_pair(self) -> int:
        return 2 * self.grid.axes


@dataclass(frozen=True, eq=False, repr=False)
class Field(OnGrid):
    """A free bias for every tap of a receptive field, and no key outside it.

    bias_ij = table[tau] where y_j = x_i + first + dilation tau for a tap tau, else -inf

    With softmax, head h is the filter softmax(table[h]), renormalised over the keys that exist.
    A field of 2 size - 1 taps reaches every key: the relative bias of Swin, in any dimension.

    table: [heads, *taps], one axis of taps for each of the grid, or [*batch, heads] before them
    first: displacement of tap 0; default so that the field is centred, -(taps // 2) dilation
    Cost: O(taps) per query in the form `convolutional`.
    Liu et al. 2021 (Swin), arXiv:2103.14030, eq. 4.
    Raises ShapeError where the table does not fit the grid, the heads or the matrix.

    >>> field = Field(torch.tensor([[1.0, 2.0, 3.0]]), Grid(4))
    >>> tokens = torch.zeros(1, 4, 1)
    >>> field.on_score(tokens, tokens, torch.arange(2), torch.arange(4))
    tensor([[[2., 3., -inf, -inf],
             [1., 2., 3., -inf]]])
    """

    table: Tensor
    grid: Grid
    first: Numbers | None = None
    dilation: Numbers = 1

    def __post_init__(self) -> None:
        grid = errors.check_kind("Field's grid", self.grid, Grid)
        errors.check_tensor("Field's table", self.table, shape="[heads, *taps]", dims=grid.axes)
        dilation = axes_of("Field's dilation", self.dilation, grid.axes, least=1)
        first = self.first
        if first is None:
            first = [-(t // 2) * d for t, d in zip(self.taps, dilation, strict=True)]
        object.__setattr__(self, "dilation", dilation)
        object.__setattr__(self, "first", axes_of("Field's first", first, grid.axes))

    @property
    def trailing(self) -> dict[str, int]:  # type: ignore[override]
        """As many axes as the grid."""
        return {"table": self.grid.axes}

    @property
    def taps(self) -> tuple[int, ...]:
        """How many taps each axis has."""
        return tuple(self.table.shape[-self.grid.axes :])

    def by_displacement(self, displacement: Tensor) -> Tensor:
        assert self.first is not None
        dilation = self.grid.tensor(self.dilation, displacement)
        from_first = displacement - self.grid.tensor(self.first, displacement)
        tap = from_first.div(dilation, rounding_mode="floor")
        there = Grid(self.taps)
        some = there.inside(tap) & (tap * dilation == from_first).all(-1)
        at = torch.where(some, there.index(tap), 0)
        if not math.prod(self.taps):
            return self.table.new_full((*self.table.shape[: -self.grid.axes], *at.shape), -math.inf)
        return self.table.flatten(-self.grid.axes)[..., at].where(some, -torch.inf)

    def displacements(self, device: torch.device) -> Tensor:
        """The displacement of each tap, [taps in all, axes]."""
        assert self.first is not None
        taps = box(self.taps, device)
        return taps * self.grid.tensor(self.dilation, taps) + self.grid.tensor(self.first, taps)


def _check_axes(name: str, tensor: Tensor, grid: Grid) -> None:
    if tensor.dim() < 1 or tensor.shape[-1] != grid.axes:
        raise errors.ShapeError(
            f"{name} has shape {errors.show(tensor.shape)}, but {grid} has {grid.axes} axes; its "
            f"last axis must be {grid.axes}, one number for each, and the one before it heads."
        )
