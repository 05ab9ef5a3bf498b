"""The mask of neighborhood attention: a box of keys around each query, on a grid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from regard import errors
from regard.grid import Grid, Numbers, axes_of, box
from regard.mask import Mask
from regard.runs import Runs

BORDERS = ("shift", "cut")


@dataclass(frozen=True, repr=False)
class Neighborhood(Mask):
    """Each query sees kernel_size keys along each axis of a grid, itself among them.

    Along one axis, of the keys that differ from i by multiples of dilation, counted from i:
    those from -(kernel_size // 2) up, or on a causal axis those from -(kernel_size - 1) to 0.
    At an edge the box moves inward (border="shift"), so that every query sees as many keys as
    any other, or loses what is outside ("cut"), as it does on a causal axis in either case.

    size: of the grid, such as (height, width): n = m = height x width tokens
    kernel_size, dilation: one number for all axes, or one for each
    causal: True, False, or one for each axis
    Cost: linear in n, in every form that skips tiles; one run of keys for each line of the box (one
    for each key where the last axis is dilated).
    Hassani et al. 2023, arXiv:2204.07143; Hassani, Shi 2022, arXiv:2209.15001 (dilation).
    Raises ShapeError where a box that moves does not fit into its grid, or sizes do not fit the
    matrix.

    >>> mask = Neighborhood(5, 3)
    >>> mask.runs(5, 5, torch.device("cpu")).keep(slice(0, 5), slice(0, 5)).int()
    tensor([[1, 1, 1, 0, 0],
            [1, 1, 1, 0, 0],
            [0, 1, 1, 1, 0],
            [0, 0, 1, 1, 1],
            [0, 0, 1, 1, 1]], dtype=torch.int32)
    """

    size: Numbers
    kernel_size: Numbers
    dilation: Numbers = 1
    causal: bool | Sequence[bool] = False
    border: str = "shift"

    def __post_init__(self) -> None:
        size = axes_of("Neighborhood's size", self.size, None, least=0)
        kernel = axes_of("Neighborhood's kernel_size", self.kernel_size, len(size), least=1)
        dilation = axes_of("Neighborhood's dilation", self.dilation, len(size), least=1)
        given = self.causal
        causal = tuple(given) if isinstance(given, Sequence) else (given,) * len(size)
        if len(causal) != len(size) or not all(isinstance(one_way, bool) for one_way in causal):
            raise errors.ShapeError(
                f"Neighborhood's causal is {given!r}; it must be True or False, or {len(size)} of "
                "them, one for each axis."
            )
        if self.border not in BORDERS:
            raise ValueError(
                f"Neighborhood's border is 'shift' (the box moves inward) or 'cut', not "
                f"{self.border!r}."
            )
        for name, value in (
            ("size", size), ("kernel_size", kernel), ("dilation", dilation), ("causal", causal)
        ):  # fmt: skip
            object.__setattr__(self, name, value)
        for n, k, d, one_way in zip(size, kernel, dilation, causal, strict=True):
            if self.border == "shift" and not one_way and k * d > n:
                raise errors.ShapeError(
                    f"a box of {k} keys with dilation {d} needs {k * d} tokens along an axis to "
                    f"move in, but the grid {size} has {n}; use border='cut', or a smaller box."
                )

    @property
    def grid(self) -> Grid:
        """The grid, on which queries and keys are the same."""
        return Grid(self.size)

    @property
    def first(self) -> tuple[int, ...]:
        """Displacement of the first key of a box that no edge moves or cuts."""
        sides = zip(self._kernel, self._dilation, self._causal, strict=True)
        return tuple(-d * (k - 1 if one_way else k // 2) for k, d, one_way in sides)

    def check(self, rows: int, columns: int) -> None:
        self.grid.check(self, rows, columns)

    def keys(self, i: Tensor) -> tuple[Tensor, Tensor]:
        """The keys of queries i [*x], and which there are: [*x, keys of a box] each, in order."""
        start, count = self.boxes(i)
        taps = box(self._kernel, i.device)
        at = start[..., None, :] + taps * self.grid.tensor(self.dilation, taps)
        some = (taps < count[..., None, :]).all(-1)
        return torch.where(some, self.grid.index(at), 0), some

    def runs(self, rows: int, columns: int, device: torch.device) -> Runs:
        i = torch.arange(rows, device=device)
        *_, last = self._dilation
        if last > 1:
            start, some = self.keys(i)
            length = torch.ones_like(start)
        else:  # the keys of a line of the box follow each other: one run
            first, count = self.boxes(i)
            lines = box((*self._kernel[:-1], 1), device)
            at = first[:, None, :] + lines * self.grid.tensor(self.dilation, lines)
            some = (lines < count[:, None, :]).all(-1)
            start, length = self.grid.index(at), count[:, None, -1].expand_as(some)
        counts = torch.cat([start.new_zeros(1), some.sum(-1).cumsum(0)])
        start, length = start[some].int(), length[some].int()
        runs = Runs((), rows, columns, counts, start, start + length)
        return runs | runs  # joins lines that touch, where a box is as wide as the grid

    def boxes(self, i: Tensor) -> tuple[Tensor, Tensor]:
        """First coordinate and number of keys along each axis, [*x, axes] each."""
        at = self.grid.keys(i)
        starts, counts = [], []
        sides = zip(self._size, self._kernel, self._dilation, self._causal, strict=True)
        for axis, (n, k, d, one_way) in enumerate(sides):
            # Keys of one remainder by the dilation are a line of their own, of this length.
            rest, own = at[..., axis] % d, at[..., axis] // d
            length = (n - rest + d - 1).div(d, rounding_mode="floor")
            low = own - (k - 1 if one_way else k // 2)
            high = low + k
            if self.border == "shift" and not one_way:
                low = torch.minimum(low, length - k).clamp(min=0)
                high = low + k
            low = low.clamp(min=0)
            starts.append(low * d + rest)
            counts.append(torch.minimum(high, length) - low)
        return torch.stack(starts, -1), torch.stack(counts, -1)

    @property
    def _size(self) -> tuple[int, ...]:
        return self.size  # type: ignore[return-value]

    @property
    def _kernel(self) -> tuple[int, ...]:
        return self.kernel_size  # type: ignore[return-value]

    @property
    def _dilation(self) -> tuple[int, ...]:
        return self.dilation  # type: ignore[return-value]

    @property
    def _causal(self) -> tuple[bool, ...]:
        return self.causal  # type: ignore[return-value]
