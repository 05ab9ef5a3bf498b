"""A box of rows of a position-only matrix as convolutions, one for each filter.

    sum_i = sum_tau w_tau value_{place_i + first + dilation tau}

where keys beyond the grid are zeros, which add nothing.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.form.support import Support

CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)
TRANSPOSED = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)


@dataclass(frozen=True)
class Box:
    """Rows whose queries are a box of the grid, each of which sees a key of it along each axis.

    sides: along each axis, which queries
    """

    support: Support
    sides: list[range]

    @property
    def count(self) -> int:
        """How many rows there are."""
        return math.prod(map(len, self.sides))

    @property
    def taken(self) -> tuple[slice, ...]:
        """Its place among the queries."""
        return tuple(slice(side.start, side.stop) for side in self.sides)

    def reads(self) -> list[tuple[int, int]]:
        """Along each axis, from which key to which it reads, also beyond the grid."""
        found = []
        for side, s, at, first, d, k in zip(
            self.sides, self.support.grid.stride, self.support.grid.start,  # type: ignore[arg-type]
            self.support.first, self.support.dilation, self.support.taps, strict=True,
        ):  # fmt: skip
            low = at + s * side.start + first
            found.append((low, low + s * (len(side) - 1) + d * (k - 1) + 1))
        return found

    def product(self, weights: Tensor, value: Tensor) -> Tensor:
        """Sums of values [*batch, heads, m, e]: [*batch, heads, *sides, e].

        weights: [*batch, heads, 1, taps]
        """
        grid = self.support.grid
        seen, pads = self._cut(value.unflatten(-2, grid.size))
        lanes = Lanes.of(weights, seen, grid.axes)
        return lanes.each(CONVOLUTIONS, weights, seen, self.support, pads)

    def transposed(self, weights: Tensor, x: Tensor) -> Tensor:
        """The transpose, times x [*batch, heads, *sides, e]: [*batch, heads, m, e]."""
        grid = self.support.grid
        lanes = Lanes.of(weights, x, grid.axes)
        sums = lanes.each(TRANSPOSED, weights, x, self.support)
        around: list[int] = []
        for axis, (low, high), n in self._axes():
            start, stop = max(low, 0), min(high, n)
            sums = sums.narrow(axis, start - low, stop - start)
            around = [start, n - stop, *around]
        return F.pad(sums, [0, 0, *around]).flatten(-grid.axes - 1, -2)

    def totals(self, terms: Tensor) -> Tensor:
        """Sums of terms [*batch, heads, 1, taps] over keys that there are: [.., rows].

        All filters are channels of one convolution, which reads a single image of ones: for 2 heads
        of 7 x 7 on 64 x 64 a tenth of what a group for each head takes.
        """
        if not terms.numel():
            return terms.new_zeros(*terms.shape[:-2], self.count)
        axes = self.support.grid.axes
        ones, pads = self._cut(terms.new_ones(1, *self.support.grid.size, 1))  # type: ignore[misc]
        sums = CONVOLUTIONS[axes - 1](
            F.pad(ones.movedim(-1, 1), _both(pads)),
            terms.reshape(-1, 1, *self.support.taps),
            stride=self.support.grid.stride,
            dilation=self.support.dilation,
        )
        return sums.reshape(*terms.shape[:-2], self.count)

    def _cut(self, image: Tensor) -> tuple[Tensor, list[tuple[int, int]]]:
        """What is read of an image [.., *size, e], and how many zeros are around it."""
        pads = []
        for axis, (low, high), n in self._axes():
            start, stop = max(low, 0), min(high, n)
            image = image.narrow(axis, start, stop - start)
            pads.append((start - low, high - stop))
        return image, pads

    def _axes(self) -> list[tuple[int, tuple[int, int], int]]:
        grid = self.support.grid
        places = range(-grid.axes - 1, -1)
        return list(zip(places, self.reads(), grid.size, strict=True))  # type: ignore[arg-type]


def _both(pads: Sequence[tuple[int, int]]) -> list[int]:
    """The argument of F.pad: the last axis first."""
    return [side for pair in reversed(pads) for side in pair]


@dataclass(frozen=True)
class Lanes:
    """How batch axes become convolutions [N, channels, *size], one for each filter.

    Their channels are those of value, e, which all have the same filter and lie together in memory,
    as the vectors of tokens do: PyTorch's kernels for that order take a quarter to a tenth of what
    they take where the filters of all heads are channels, and e is N.

    lanes, others: places of the axes along which weights differ, and of those that are N; of
    `image` and `weights`, the sizes of all of them
    """

    lanes: tuple[int, ...]
    others: tuple[int, ...]
    image: tuple[int, ...]
    weights: tuple[int, ...]
    axes: int

    @staticmethod
    def of(weights: Tensor, image: Tensor, axes: int) -> Lanes:
        """Of weights [*batch, heads, 1, taps] and an image [*batch, heads, *size, e]."""
        given = tuple(image.shape[: -axes - 1]), tuple(weights.shape[:-2])
        count = max(map(len, given))
        one, other = ((1,) * (count - len(each)) + each for each in given)
        lanes = tuple(a for a in range(count) if other[a] > 1)
        others = tuple(a for a in range(count) if a not in lanes)
        return Lanes(lanes, others, one, other, axes)

    def each(
        self,
        kinds: tuple[Any, ...],
        weights: Tensor,
        image: Tensor,
        support: Support,
        pads: Sequence[tuple[int, int]] = (),
    ) -> Tensor:
        """Every filter over its part of an image: [*batch, heads, *size, e].

        pads: zeros around the image, before and after along each axis
        """
        size, e = image.shape[-self.axes - 1 : -1], image.shape[-1]
        image, filters = image.reshape(*self.image, *size, e), weights.reshape(*self.weights, -1)
        # A line is an image of one row: PyTorch has no such order for a single axis.
        line = (1,) if self.axes == 1 else ()
        run, outputs, more = kinds[self.axes + len(line) - 1], [], {}
        if any(map(any, pads)):
            # What lies on both sides the convolution adds itself, without a copy.
            both = tuple(map(min, pads))
            more = {"padding": (*(0 for _ in line), *both)}
            pads = [(a - p, b - p) for (a, b), p in zip(pads, both, strict=True)]
        for lane in itertools.product(*(range(self.weights[a]) for a in self.lanes)):
            at = dict(zip(self.lanes, lane, strict=True))
            own = tuple(
                slice(None) if a in self.others else at[a] if n > 1 else 0
                for a, n in enumerate(self.image)
            )
            taps = filters[tuple(at.get(a, 0) for a in range(len(self.weights)))]
            seen = image[own].reshape(-1, *line, *size, e)
            if any(map(any, pads)):
                seen = F.pad(seen, [0, 0, *_both(pads)])
            output = run(
                seen.movedim(-1, 1),
                taps.view(1, 1, *line, *support.taps).expand(e, -1, *line, *support.taps),
                stride=(*line, *support.grid.stride),  # type: ignore[misc]
                dilation=(*line, *support.dilation),
                groups=e,
                **more,
            )
            outputs.append(output.movedim(1, -1))
        whole = torch.stack(outputs)
        sizes = [self.weights[a] for a in self.lanes] + [self.image[a] for a in self.others]
        whole = whole.reshape(*sizes, *whole.shape[2 + len(line) :])
        came_from = (*self.lanes, *self.others)
        order = [came_from.index(a) for a in range(len(sizes))]
        return whole.permute(*order, *range(len(sizes), whole.dim()))
