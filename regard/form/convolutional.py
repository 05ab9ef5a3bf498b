"""Position alone: the matrix is a convolution, divided by its rows' sums.

output_i = sum_tau w_tau value_{i + tau} / sum_tau w_tau,  w = exp(bias)

(another normalizer takes softmax's place). Rows whose taps are all within the grid have the same
weights and are one convolution; each row at a border has its own. A `Shift` is a read of one key.
Rows that see all keys go through Fourier transforms (regard/form/spectral.py), by name alone, since
their error is relative to the largest value of all keys, also of those that a row does not see.
reference  regard/form/dense.py::product
work       2 taps n e flops, forward (`flops`)
memory     `memory`; a backward pass keeps the weights of border rows, and what they read
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from regard import errors, grouped
from regard.form import fused, spectral, support
from regard.form.spectral import Long
from regard.form.support import Support
from regard.form.tiles import compute_dtype
from regard.position.grid import Shift
from regard.score import PositionOnly

if TYPE_CHECKING:
    from regard.matrix import Attention

CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)
TRANSPOSED = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)

BLOCK = 2**24
"""Bytes of a block of border rows."""


def needs(matrix: Attention) -> str | None:
    """A score and a mask by displacement alone."""
    if type(matrix.score) is not PositionOnly:
        # Most matrices come by here: a sentence without their names costs them nothing.
        return "needs a score of position alone, PositionOnly(); this one compares vectors."
    if matrix.dropout is not None:
        return "has no dropout, which draws for single pairs."
    found = support.find(matrix)
    if isinstance(found, Long):
        return spectral.needs(matrix, found)
    return found if isinstance(found, str) else None


def pays(matrix: Attention) -> bool:
    """Whether nothing else that applies is faster or more exact.

    A Fourier transform rounds to the largest value of all keys, so that one of 1e14 would show in
    rows that may not see it. Where the compiled tiles know all parts they are as fast.
    """
    if type(matrix.score) is not PositionOnly:
        return False
    found = support.find(matrix)
    if isinstance(found, Support):
        return fused.needs(matrix) is not None
    return isinstance(found, Shift)


def kernel(matrix: Attention) -> tuple[str, int, int]:
    """What `explain` says: the code that runs, bytes beyond inputs and outputs, side of a tile."""
    found, bytes_beyond = support.find(matrix), memory(matrix, matrix.key)
    if isinstance(found, Shift):
        return "a read of one key for each row", bytes_beyond, 1
    if isinstance(found, Long):
        return "Fourier transforms in float64", bytes_beyond, 1
    assert isinstance(found, Support)
    name = f"convolution with {found.count} taps, and {found.border} rows at borders"
    return name, bytes_beyond, 1


def memory(matrix: Attention, value: Tensor) -> int:
    """Bytes of a forward product beyond inputs and outputs, and what torch's convolution takes."""
    found, size = support.find(matrix), compute_dtype(matrix.dtype).itemsize
    lanes, (n, m), e = _lanes(matrix, value), matrix.shape[-2:], value.shape[-1]
    if isinstance(found, Shift):  # a key, whether there is one, a weight; what is read, times it
        return matrix.shape[:-1].numel() * (9 + size) + 2 * lanes * n * e * size
    if isinstance(found, Long):  # values and weights, their transforms, twice as long as the grid
        return 8 * 8 * lanes * (m + 1) * (e + 1)
    assert isinstance(found, Support)
    block = min(found.border, _block_rows(matrix, found, value)) * _row_bytes(matrix, found, value)
    # What the convolution reads and gives, in an order of its own, and all rows before they are
    # put in order.
    return block + size * lanes * e * (m + 2 * n)


def flops(matrix: Attention, out: int) -> int:
    """Of the forward product with values of width `out`."""
    found, lanes = support.find(matrix), matrix.shape[:-2].numel()
    if isinstance(found, Shift):  # what is read, times its weight
        return lanes * matrix.shape[-2] * out
    if isinstance(found, Long):
        return spectral.flops(found, lanes, out)
    assert isinstance(found, Support)
    return 2 * lanes * found.pairs(out) * out


def _lanes(matrix: Attention, value: Tensor) -> int:
    """How many matrices are multiplied."""
    batch = torch.broadcast_shapes(value.shape[:-3], matrix.shape[:-3])
    heads = matrix.shape[-3] if len(matrix.shape) > 2 else 1
    return int(math.prod(batch)) * max(heads, errors.heads_of(value))


def _row_bytes(matrix: Attention, found: Support, value: Tensor) -> int:
    """Of a border row: places of its taps, logits and weights, the vectors or the row they make."""
    taps, size = found.count, compute_dtype(matrix.dtype).itemsize
    wide = _lanes(matrix, value) * min(taps * value.shape[-1], found.grid.columns)
    return 8 * (found.grid.axes + 3) * taps + size * (2 * taps * matrix.shape[:-2].numel() + wide)


def _block_rows(matrix: Attention, found: Support, value: Tensor) -> int:
    return max(BLOCK // max(_row_bytes(matrix, found, value), 1), 1)


def product(matrix: Attention, value: Tensor) -> Tensor:
    """The matrix times value, differentiable."""
    with torch.autocast(value.device.type, enabled=False):  # sums keep the dtype chosen here
        return _product(matrix, value)


def product_transposed(matrix: Attention, x: Tensor) -> Tensor:
    """The transpose of the matrix times x, differentiable."""
    with torch.autocast(x.device.type, enabled=False):
        return _product_transposed(matrix, x)


def _product(matrix: Attention, value: Tensor) -> Tensor:
    dtype, found = compute_dtype(value.dtype), support.find(matrix)
    wide = grouped.match(value.to(dtype), matrix.shape[-3] if len(matrix.shape) > 2 else 1)
    batch = torch.broadcast_shapes(wide.shape[:-2], matrix.shape[:-2])
    if not value.shape[-1]:
        return value.new_zeros(*batch, matrix.shape[-2], 0)
    if isinstance(found, Shift):
        return _read(matrix, found, wide).expand(*batch, -1, -1).to(value.dtype)
    if isinstance(found, Long):
        return spectral.product(found, wide).expand(*batch, -1, -1).to(value.dtype)
    assert isinstance(found, Support)
    split = Split.of(matrix, found, dtype)
    pieces = [split.inner_product(wide), *split.border_product(wide)]
    both = torch.cat([piece.expand(*batch, -1, -1) for piece in pieces], -2)
    return both[..., split.order.argsort(), :].to(value.dtype)


def _product_transposed(matrix: Attention, x: Tensor) -> Tensor:
    dtype, found = compute_dtype(x.dtype), support.find(matrix)
    wide, batch = x.to(dtype), torch.broadcast_shapes(x.shape[:-2], matrix.shape[:-2])
    if not x.shape[-1]:
        return x.new_zeros(*batch, matrix.shape[-1], 0)
    if isinstance(found, Shift):
        return _add(matrix, found, wide).expand(*batch, -1, -1).to(x.dtype)
    if isinstance(found, Long):
        return spectral.product_transposed(found, wide).expand(*batch, -1, -1).to(x.dtype)
    assert isinstance(found, Support)
    split = Split.of(matrix, found, dtype)
    ordered = wide[..., split.order, :]
    inside = len(split.order) - len(split.rows)
    inner, border = ordered[..., :inside, :], ordered[..., inside:, :]
    output = split.inner_transposed(inner)
    for each in split.border_transposed(border):
        output = output + each
    return output.expand(*batch, -1, -1).to(x.dtype)


@dataclass(frozen=True)
class Split:
    """A matrix as one convolution inside and single rows at the border.

    weights: of all inner rows, [*batch, heads, 1, taps]
    rows: at the border, [r]
    order: inner rows, then border rows
    """

    matrix: Attention
    support: Support
    inner: list[range]
    weights: Tensor
    rows: Tensor
    order: Tensor

    @staticmethod
    def of(matrix: Attention, found: Support, dtype: torch.dtype) -> Split:
        """Split a matrix, and compute its weights inside."""
        grid, inner = found.grid, found.inner()
        every = torch.arange(grid.rows, device=matrix.device)
        image: Tensor = every.unflatten(0, grid.queries)
        inside = image[tuple(slice(r.start, r.stop) for r in inner)].flatten()
        outside = torch.ones(grid.rows, dtype=torch.bool, device=matrix.device)
        outside[inside] = False
        rows = outside.nonzero()[:, 0]
        _, weights = _of_rows(matrix, found, inside[:1], dtype)  # an inner row stands for all
        return Split(matrix, found, inner, weights, rows, torch.cat([inside, rows]))

    def border_product(self, value: Tensor) -> Iterator[Tensor]:
        """Rows of the border, some at a time: [*batch, heads, r, e]."""
        for rows in self.rows.split(_block_rows(self.matrix, self.support, value)):
            keys, weights = _of_rows(self.matrix, self.support, rows, value.dtype)
            if self.support.spread(value.shape[-1]):
                yield self._matrix(keys, weights) @ value
            else:
                of_rows = value.index_select(-2, keys.flatten()).unflatten(-2, keys.shape)
                yield (weights[..., None, :] @ of_rows)[..., 0, :]

    def border_transposed(self, x: Tensor) -> Iterator[Tensor]:
        """Rows of the border, transposed, times x [*batch, heads, r, e], some at a time."""
        columns, block = self.support.grid.columns, _block_rows(self.matrix, self.support, x)
        for rows, some in zip(self.rows.split(block), x.split(block, -2), strict=True):
            keys, weights = _of_rows(self.matrix, self.support, rows, x.dtype)
            if self.support.spread(x.shape[-1]):
                yield self._matrix(keys, weights).mT @ some
            else:
                terms = (weights[..., None] * some[..., None, :]).flatten(-3, -2)
                zeros = terms.new_zeros(*terms.shape[:-2], columns, terms.shape[-1])
                yield zeros.index_add(-2, keys.flatten(), terms)

    def _matrix(self, keys: Tensor, weights: Tensor) -> Tensor:
        zeros = weights.new_zeros(*weights.shape[:-1], self.support.grid.columns)
        return zeros.scatter_add(-1, keys.expand_as(weights), weights)

    def inner_product(self, value: Tensor) -> Tensor:
        """Rows inside, as a convolution: [*batch, heads, rows, e]."""
        image = value.unflatten(-2, self.support.grid.size)
        if not self._has_inner:
            batch = torch.broadcast_shapes(value.shape[:-2], self.weights.shape[:-2])
            return value.new_zeros(*batch, 0, value.shape[-1])
        axes = self.support.grid.axes
        lanes = Lanes.of(self.weights, image, axes)
        seen = image[(..., *self._window(), slice(None))]
        return lanes.each(CONVOLUTIONS, self.weights, seen, self.support).flatten(-axes - 1, -2)

    def inner_transposed(self, x: Tensor) -> Tensor:
        """Rows inside, transposed, times x [*batch, heads, rows, e]: [*batch, heads, m, e]."""
        grid, axes = self.support.grid, self.support.grid.axes
        if not self._has_inner:
            batch = torch.broadcast_shapes(x.shape[:-2], self.weights.shape[:-2])
            return x.new_zeros(*batch, grid.columns, x.shape[-1])
        image = x.unflatten(-2, [len(r) for r in self.inner])
        output = Lanes.of(self.weights, image, axes).each(
            TRANSPOSED, self.weights, image, self.support
        )
        sides = zip(self._window(), grid.size, strict=True)  # type: ignore[arg-type]
        pads = [side for w, n in reversed([*sides]) for side in (w.start, n - w.stop)]
        return F.pad(output, [0, 0, *pads]).flatten(-axes - 1, -2)

    @property
    def _has_inner(self) -> bool:
        return self.support.count > 0 and all(self.inner)

    def _window(self) -> list[slice]:
        """The keys that inner rows see, along each axis."""
        found = []
        for r, s, at, first, d, k in zip(
            self.inner, self.support.grid.stride, self.support.grid.start,  # type: ignore[arg-type]
            self.support.first, self.support.dilation, self.support.taps, strict=True,
        ):  # fmt: skip
            start = at + s * r.start + first
            found.append(slice(start, start + s * (len(r) - 1) + d * (k - 1) + 1))
        return found


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
        self, kinds: tuple[Any, ...], weights: Tensor, image: Tensor, support: Support
    ) -> Tensor:
        """Every filter over its part of an image: [*batch, heads, *size, e]."""
        size, e = image.shape[-self.axes - 1 : -1], image.shape[-1]
        image, filters = image.reshape(*self.image, *size, e), weights.reshape(*self.weights, -1)
        # A line is an image of one row: PyTorch has no such order for a single axis.
        line = (1,) if self.axes == 1 else ()
        run, outputs = kinds[self.axes + len(line) - 1], []
        for lane in itertools.product(*(range(self.weights[a]) for a in self.lanes)):
            at = dict(zip(self.lanes, lane, strict=True))
            own = tuple(
                slice(None) if a in self.others else at[a] if n > 1 else 0
                for a, n in enumerate(self.image)
            )
            taps = filters[tuple(at.get(a, 0) for a in range(len(self.weights)))]
            output = run(
                image[own].reshape(-1, *line, *size, e).movedim(-1, 1),
                taps.view(1, 1, *line, *support.taps).expand(e, -1, *line, *support.taps),
                stride=(*line, *support.grid.stride),  # type: ignore[misc]
                dilation=(*line, *support.dilation),
                groups=e,
            )
            outputs.append(output.movedim(1, -1))
        whole = torch.stack(outputs)
        sizes = [self.weights[a] for a in self.lanes] + [self.image[a] for a in self.others]
        whole = whole.reshape(*sizes, *whole.shape[2 + len(line) :])
        came_from = (*self.lanes, *self.others)
        order = [came_from.index(a) for a in range(len(sizes))]
        return whole.permute(*order, *range(len(sizes), whole.dim()))


def _of_rows(
    matrix: Attention, found: Support, rows: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Keys of rows, [r, taps], and weights [*batch, heads, r, taps]."""
    keys, there = found.keys(rows)
    like = matrix.query.new_zeros(0, dtype=dtype)
    logits = found.logits(rows[:, None], keys, like).masked_fill(~there, -torch.inf)
    heads = torch.broadcast_shapes(logits.shape[:-2], (1,) * (len(matrix.shape) - 2))
    return keys, matrix.rule.normalizer.whole(logits.expand(*heads, *keys.shape))


def _read(matrix: Attention, shift: Shift, value: Tensor) -> Tensor:
    """Each row's only key, times its weight: [*batch, heads, n, e]."""
    key, some, weights = _of_shift(matrix, shift, value)
    if value.shape[-2] == 0:
        value = F.pad(value, (0, 0, 0, 1))  # something to read, for rows that see nothing
    if key.dim() == 1:  # all heads read the same
        read = value[..., key, :]
    elif value.dim() == 2 or (value.shape[-3] == 1 and key.dim() == 2):
        # Heads that share a value read it where it is.
        flat = value if value.dim() == 2 else value[..., 0, :, :]
        read = flat[..., key.flatten(), :].unflatten(-2, key.shape)
    else:
        batch = torch.broadcast_shapes(value.shape[:-2], key.shape[:-1])
        at = key.expand(*batch, -1)[..., None].expand(*batch, -1, value.shape[-1])
        read = value.expand(*batch, -1, -1).gather(-2, at)
    return torch.where(some[..., None], read * weights, 0)


def _add(matrix: Attention, shift: Shift, x: Tensor) -> Tensor:
    """Each row of x [*batch, heads, n, e], times its weight, added to its only key."""
    key, some, weights = _of_shift(matrix, shift, x)
    terms = torch.where(some[..., None], x * weights, 0)
    columns = matrix.shape[-1]
    zeros = terms.new_zeros(*terms.shape[:-2], max(columns, 1), x.shape[-1])
    sums = zeros.scatter_add(-2, key[..., None].expand_as(terms), terms)
    return sums[..., :columns, :]


def _of_shift(matrix: Attention, shift: Shift, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and which there are, [*batch, heads, n], and their weights [*batch, heads, n, 1]."""
    key, some = shift.keys(torch.arange(matrix.shape[-2], device=matrix.device))
    logits = like.new_zeros(1).where(some, -torch.inf)[..., None]
    return key, some, matrix.rule.normalizer.whole(logits)
