"""Grids: tokens that stand in one, two or three dimensions, and images as sets of vectors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from regard import errors

Numbers = int | Sequence[int]
"""One whole number for each axis, or one for all of them."""


@dataclass(frozen=True, repr=False)
class Grid:
    """Keys on a grid, and where the queries stand among them.

    key j stands at its coordinates, the last axis fastest; query q at start + stride q

    By default the queries are the keys. A convolution's output is a smaller grid of queries: with
    stride s and padding p, output q reads its first tap at s q - p.

    size: of the keys' grid, such as (height, width); a number is a grid of one axis
    queries: of the queries' grid; default the keys'
    stride, start: one number for all axes, or one for each
    Raises ShapeError where the axes do not agree.

    >>> grid = Grid((2, 3))
    >>> grid.keys(torch.tensor([0, 2, 3]))
    tensor([[0, 0],
            [0, 2],
            [1, 0]])
    >>> Grid(7, queries=3, stride=2, start=-1).places(torch.arange(3))
    tensor([[-1],
            [ 1],
            [ 3]])
    """

    size: Numbers
    queries: Numbers | None = None
    stride: Numbers = 1
    start: Numbers = 0

    def __post_init__(self) -> None:
        size = axes_of("Grid's size", self.size, None, least=0)
        count = len(size)
        queries = size if self.queries is None else self.queries
        for name, numbers, least in (
            ("size", size, 0),
            ("queries", queries, 0),
            ("stride", self.stride, 1),
            ("start", self.start, None),
        ):
            object.__setattr__(self, name, axes_of(f"Grid's {name}", numbers, count, least=least))

    @property
    def axes(self) -> int:
        """How many axes it has."""
        return len(self._size)

    @property
    def rows(self) -> int:
        """How many queries there are."""
        return math.prod(self._queries)

    @property
    def columns(self) -> int:
        """How many keys there are."""
        return math.prod(self._size)

    def keys(self, j: Tensor) -> Tensor:
        """The coordinates of keys j [*x]: [*x, axes]."""
        return _unravel(j, self._size)

    def places(self, i: Tensor) -> Tensor:
        """Where queries i [*x] stand in the coordinates of keys: [*x, axes]."""
        return _unravel(i, self._queries) * self.tensor(self.stride, i) + self.tensor(self.start, i)

    def index(self, coordinates: Tensor) -> Tensor:
        """The keys at coordinates [*x, axes] within the grid: [*x]."""
        strides = [math.prod(self._size[a + 1 :]) for a in range(self.axes)]
        found: Tensor = (coordinates * self.tensor(strides, coordinates)).sum(-1)
        return found

    def inside(self, coordinates: Tensor) -> Tensor:
        """Whether coordinates [*x, axes] are those of a key: bool [*x]."""
        return ((coordinates >= 0) & (coordinates < self.tensor(self.size, coordinates))).all(-1)

    def tensor(self, numbers: Numbers, like: Tensor) -> Tensor:
        """One number for each axis, as a tensor on the device of another."""
        return torch.tensor(axes_of("numbers", numbers, self.axes), device=like.device)

    @property
    def _size(self) -> tuple[int, ...]:
        return self.size  # type: ignore[return-value]

    @property
    def _queries(self) -> tuple[int, ...]:
        return self.queries  # type: ignore[return-value]

    def check(self, what: object, rows: int, columns: int) -> None:
        """Raise ShapeError unless a matrix of these lengths is on this grid."""
        if (rows, columns) != (self.rows, self.columns):
            raise errors.ShapeError(
                f"{what} is for {self.rows} queries {self.queries} and {self.columns} keys "
                f"{self.size}, but the matrix has {rows} rows and {columns} columns; an image "
                "[height, width] is Grid((height, width)) and height x width tokens."
            )

    def __repr__(self) -> str:
        shown = [_short(self.size)]
        if self.queries != self.size:
            shown.append(f"queries={_short(self.queries)}")
        for name, numbers, default in (("stride", self.stride, 1), ("start", self.start, 0)):
            if set(numbers) != {default}:  # type: ignore[arg-type]
                shown.append(f"{name}={_short(numbers)}")
        return f"Grid({', '.join(shown)})"


def axes_of(
    name: str, numbers: Numbers, count: int | None, *, least: int | None = None
) -> tuple[int, ...]:
    """One whole number for each of `count` axes (None: as many as are given).

    >>> axes_of("kernel_size", 3, 2), axes_of("kernel_size", [3, 5], 2)
    ((3, 3), (3, 5))
    """
    if isinstance(numbers, Sequence) and not isinstance(numbers, str):
        given = tuple(numbers)
    else:
        given = (numbers,) * (count or 1)
    for number in given:
        errors.check_number(name, number, whole=True, least=least)
    if not given or (count is not None and len(given) != count):
        raise errors.ShapeError(
            f"{name} is {tuple(given)}, {len(given)} numbers; it must be one number, or "
            f"{count or 'at least 1'} of them, one for each axis of the grid."
        )
    return tuple(int(number) for number in given)


def box(sizes: Sequence[int], device: torch.device) -> Tensor:
    """All coordinates of a box, [count, axes], the last axis fastest.

    >>> box((1, 2), torch.device("cpu"))
    tensor([[0, 0],
            [0, 1]])
    """
    return _unravel(torch.arange(math.prod(sizes), device=device), tuple(sizes))


def to_patches(image: Tensor, size: Sequence[int]) -> tuple[Tensor, Grid]:
    """An image as a set of vectors: [*batch, channels, *size] -> [*batch, n, channels patch].

    A vector holds the pixels of one patch, channel by channel, as `torch.nn.Conv2d` orders its
    weights: the first layer of a vision transformer, Conv2d(channels, d_model, p, stride=p), is
    to_patches(image, (p, p)) @ weight.flatten(1).mT + bias. The grid says where each patch stands.

    size: of a patch, a number for each axis of the image, such as (height, width)
    Dosovitskiy et al. 2021, arXiv:2010.11929, section 3.1.
    Raises ShapeError where patches do not tile the image.

    >>> tokens, grid = to_patches(torch.arange(8.0).reshape(1, 2, 4), (1, 2))
    >>> tokens.tolist(), grid
    ([[0.0, 1.0], [2.0, 3.0], [4.0, 5.0], [6.0, 7.0]], Grid((2, 2)))
    >>> from_patches(tokens, grid, (1, 2)).tolist()
    [[[0.0, 1.0, 2.0, 3.0], [4.0, 5.0, 6.0, 7.0]]]
    """
    if not isinstance(size, Sequence):
        raise errors.ShapeError(
            f"to_patches' size is {size!r}; it must be one number for each axis of the image, such "
            f"as ({size}, {size}), since they tell the image's axes from those of a batch."
        )
    patch = axes_of("to_patches' size", size, None, least=1)
    axes = len(patch)
    errors.check_tensor("image", image, shape="[*batch, channels, *size]", dims=axes + 1)
    whole = image.shape[-axes:]
    if any(n % p for n, p in zip(whole, patch, strict=True)):
        raise errors.ShapeError(
            f"an image of {tuple(whole)} cannot be cut into patches of {patch}: each axis must be "
            "a multiple of the patch's; pad or crop it first."
        )
    grid = Grid(tuple(n // p for n, p in zip(whole, patch, strict=True)))
    lead = image.dim() - axes
    split = [side for n, p in zip(whole, patch, strict=True) for side in (n // p, p)]
    apart = image.reshape(*image.shape[:lead], *split)  # [*batch, c, n_1, p_1, n_2, p_2, ..]
    counts = [lead + 2 * a for a in range(axes)]
    order = (*range(lead - 1), *counts, lead - 1, *(c + 1 for c in counts))
    tokens = apart.permute(order).flatten(lead - 1 + axes).flatten(lead - 1, lead + axes - 2)
    return tokens, grid


def from_patches(tokens: Tensor, grid: Grid, size: Numbers) -> Tensor:
    """The image that `to_patches` cut: [*batch, n, channels patch] -> [*batch, channels, *size].

    Raises ShapeError where the vectors are not patches of that size on that grid.
    """
    patch = axes_of("from_patches' size", size, grid.axes, least=1)
    errors.check_tensor("tokens", tokens, shape="[*batch, n, channels patch]")
    if tokens.shape[-2] != grid.columns or tokens.shape[-1] % math.prod(patch):
        raise errors.ShapeError(
            f"tokens have shape {errors.show(tokens.shape)}; patches of {patch} on {grid} are "
            f"{grid.columns} vectors whose width is a multiple of {math.prod(patch)}."
        )
    lead, axes = tokens.dim() - 2, grid.axes
    channels = tokens.shape[-1] // math.prod(patch)
    apart = tokens.reshape(*tokens.shape[:-2], *grid._size, channels, *patch)
    sides = [place for a in range(axes) for place in (lead + a, lead + axes + 1 + a)]
    image = apart.permute(*range(lead), lead + axes, *sides)
    whole = [n * p for n, p in zip(grid._size, patch, strict=True)]
    return image.reshape(*image.shape[: lead + 1], *whole)


def _unravel(index: Tensor, sizes: tuple[int, ...]) -> Tensor:
    found = []
    for size in reversed(sizes):
        found.append(index % max(size, 1))
        index = index.div(max(size, 1), rounding_mode="floor")
    return torch.stack(found[::-1], -1)


def _short(numbers: Numbers | None) -> str:
    return str(numbers[0] if isinstance(numbers, tuple) and len(numbers) == 1 else numbers)
