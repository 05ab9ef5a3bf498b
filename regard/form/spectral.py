"""Position alone, all keys visible: a convolution as long as the grid, by Fourier transforms.

output_i = sum_j w(y_j - x_i) value_j / sum_j w(y_j - x_i),  w = exp(bias)

A transform rounds relative to its largest numbers, everywhere: what it is exact for is decided by
numbers, in `needs`. It is computed in float64 for dtypes that are coarser, and refused for float64.
So it runs by name alone, form="convolutional".
error      absolute, of every row: at most the dtype's eps times the largest |value| of all keys,
           also of keys that the row does not see (4 eps' log2(displacements) max|value| sum w / Z,
           with eps' of float64 and Z the least sum of a row, which `needs` keeps below that)
reference  regard/form/dense.py::product
work       O(n log n) per channel
memory     inputs and outputs, and 8 numbers of float64 for each of value's, forward
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from regard.grid import Grid, box
from regard.normalizer import Softmax
from regard.position.grid import OnGrid
from regard.position.toeplitz import Toeplitz

if TYPE_CHECKING:
    from regard.matrix import Attention

LEAST = 4096
"""Keys from which on transforms can be worth it: on two busy cores, 8 causal heads of width 64 took
1.2 s with 4096 keys and 2.5 s with 8192, the compiled tiles 1.1 s and 4.5 s."""
EPS = torch.finfo(torch.float64).eps


@dataclass(frozen=True)
class Long:
    """The biases of all displacements of a matrix, and which of them the mask shows.

    low, high: the least and largest displacement that is visible, on a line
    """

    grid: Grid
    parts: tuple[OnGrid | Toeplitz, ...]
    low: float = -math.inf
    high: float = math.inf

    @property
    def spans(self) -> tuple[int, ...]:
        """Along each axis, how many places lie from the first query to the last."""
        sides = zip(self.grid.queries, self.grid.stride, strict=True)  # type: ignore[arg-type]
        return tuple(s * (q - 1) + 1 for q, s in sides)

    def weights(self, device: torch.device) -> Tensor:
        """w of all displacements, the greatest of a head is 1: [*batch, heads, *displacements]."""
        sides = list(zip(self.grid.size, self.spans, strict=True))  # type: ignore[arg-type]
        counts = [n + span - 1 for n, span in sides]
        at = box(counts, device) - torch.tensor([span - 1 for _, span in sides], device=device)
        away = at - self.grid.tensor(self.grid.start, at)
        logits = torch.zeros(len(away), dtype=torch.float64, device=device)
        for part in self.parts:
            if isinstance(part, Toeplitz):  # j - i, of which a line's start is no part
                bias = part.by_distance(part.offset - at[:, 0])
            else:
                bias = part.by_displacement(away)
            logits = logits + bias.to(torch.float64)
        if len(counts) == 1:
            shown = (at[:, 0] >= self.low) & (at[:, 0] <= self.high)
            logits = logits.masked_fill(~shown, -math.inf)
        peak = logits.detach().amax(-1, keepdim=True)
        peak = torch.where(peak == -math.inf, 0, peak)
        found: Tensor = (logits - peak).exp().unflatten(-1, counts)
        return found

    def totals(self, weights: Tensor) -> Tensor:
        """The sum of each row, [*batch, heads, *queries]."""
        return self.rows(weights, weights.new_ones(self.grid.size))

    def rows(self, weights: Tensor, image: Tensor) -> Tensor:
        """sum_j w(y_j - x_i) image_j: [*, *size] -> [*, *queries]."""
        axes = tuple(range(-self.grid.axes, 0))
        both = _convolved(weights.flip(axes), image, self.grid.axes)
        sides = zip(self.grid.size, self.grid.stride, self.spans, strict=True)  # type: ignore[arg-type]
        picks: Any = (..., *(slice(n - 1, n - 1 + span, s) for n, s, span in sides))
        return both[picks]

    def columns(self, weights: Tensor, image: Tensor) -> Tensor:
        """sum_i w(y_j - x_i) image_i: [*, *queries] -> [*, *size]."""
        apart = image.new_zeros(*image.shape[: -self.grid.axes], *self.spans)
        steps: Any = (..., *(slice(None, None, s) for s in self.grid.stride))  # type: ignore[union-attr]
        apart[steps] = image
        both = _convolved(weights, apart, self.grid.axes)
        sides = zip(self.grid.size, self.spans, strict=True)  # type: ignore[arg-type]
        picks: Any = (..., *(slice(span - 1, span - 1 + n) for n, span in sides))
        return both[picks]


def needs(matrix: Attention, found: Long) -> str | None:
    """Many keys, a dtype coarser than float64, and rows among which none is all but empty."""
    n, m = matrix.shape[-2:]
    if type(matrix.normalizer) is not Softmax or matrix.normalizer.sink is not None:
        return f"sums long rows under Softmax() alone; this normalizer is {matrix.normalizer}."
    if matrix.dtype == torch.float64 or matrix.device.type == "mps":
        return (
            "takes long rows through a Fourier transform in float64, whose rounding would show in "
            f"{matrix.dtype} on {matrix.device.type}; rows that see few keys are exact."
        )
    if min(n, m) < 1 or m < LEAST:
        return (
            f"transforms rows of {LEAST} keys or more; below, tiles are faster, and these are {m}."
        )
    with torch.no_grad():
        weights = found.weights(matrix.device)
        whole = weights.flatten(-found.grid.axes).sum(-1)
        least = found.totals(weights).flatten(-found.grid.axes).amin(-1)
        # A transform's error is at most about eps log2(size) of the sum of all weights.
        error = (
            4
            * EPS
            * math.log2(math.prod(weights.shape[-found.grid.axes :]) + 1)
            * whole
            / least.clamp(min=1e-300)
        )
        largest = float(error.max())
    allowed = torch.finfo(matrix.dtype).eps
    if largest > allowed:
        return (
            "takes long rows through a Fourier transform, which here could be wrong by "
            f"{largest:.1g} of a value: some row sees next to nothing of what its head prefers."
        )
    return None


def flops(found: Long, lanes: int, out: int) -> int:
    """Of a product: 2.5 N log2 N for a real transform of N numbers, 3 N to multiply two spectra.

    Transformed are each head's weights, for rows and for their sums, the ones that these sum, and
    values; and back.
    """
    sides = zip(found.grid.size, found.spans, strict=True)  # type: ignore[arg-type]
    size = math.prod(_fast(n + span - 1) for n, span in sides)
    transforms = 1 + lanes * (3 + 2 * out)
    return int(size * (2.5 * math.log2(size) * transforms + 3 * lanes * (1 + out)))


def product(found: Long, value: Tensor) -> Tensor:
    """The matrix times value [*batch, heads, m, e]."""
    weights, axes = found.weights(value.device), found.grid.axes
    image = value.to(torch.float64).mT.unflatten(-1, found.grid.size)
    sums = found.rows(weights.unsqueeze(-axes - 1), image)
    output = sums / found.totals(weights).unsqueeze(-axes - 1)
    return output.flatten(-axes).mT.to(value.dtype)


def product_transposed(found: Long, x: Tensor) -> Tensor:
    """The transpose of the matrix times x [*batch, heads, n, e]."""
    weights, axes = found.weights(x.device), found.grid.axes
    image = x.to(torch.float64).mT.unflatten(-1, found.grid.queries)
    image = image / found.totals(weights).unsqueeze(-axes - 1)
    return found.columns(weights.unsqueeze(-axes - 1), image).flatten(-axes).mT.to(x.dtype)


def _convolved(filters: Tensor, image: Tensor, axes: int) -> Tensor:
    """Their convolution, right from the place on where the image lies within the filter."""
    sizes = [_fast(n) for n in filters.shape[-axes:]]
    dims = tuple(range(-axes, 0))
    spectra = [torch.fft.rfftn(x, s=sizes, dim=dims) for x in (filters, image)]
    found: Tensor = torch.fft.irfftn(spectra[0] * spectra[1], s=sizes, dim=dims)
    return found


def _fast(size: int) -> int:
    """The next number with factors 2, 3 and 5 alone, whose transforms are fast.

    >>> _fast(7), _fast(121)
    (8, 125)
    """
    while True:
        rest = size
        for factor in (2, 3, 5):
            while rest % factor == 0:
                rest //= factor
        if rest == 1:
            return size
        size += 1
