"""Position alone: the matrix is a convolution, divided by its rows' sums.

output_i = sum_tau w_tau value_{i + tau} / sum_tau w_tau,  w = exp(bias)

(another normalizer takes softmax's place): two convolutions, of what lies within the grid. Rows at
a border are computed each for itself where their box moves inward, or where they see only a very
small part of the weights (regard/form/split.py). A `Shift` is a read of one key.
Rows that see all keys go through Fourier transforms (regard/form/spectral.py), by name alone, since
their error is relative to the largest value of all keys, also of those that a row does not see.
reference  regard/form/dense.py::product
work       2 taps n e flops, forward (`flops`)
memory     `memory`; a backward pass keeps the sums before they are divided, the weights of single
           rows, and what these read
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from regard import grouped
from regard.form import fused, spectral, split, support
from regard.form.filters import Box
from regard.form.spectral import Long
from regard.form.split import Split
from regard.form.support import Support
from regard.form.tiles import compute_dtype
from regard.position.grid import Shift
from regard.score import PositionOnly

if TYPE_CHECKING:
    from regard.matrix import Attention


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
    name = f"convolution with {found.count} taps"
    if found.border:
        name += f", and {found.border} rows at borders"
    return name, bytes_beyond, 1


def memory(matrix: Attention, value: Tensor) -> int:
    """Bytes of a forward product beyond inputs and outputs, and what torch's convolution takes."""
    found, size = support.find(matrix), compute_dtype(matrix.dtype).itemsize
    lanes, (n, m), e = split.lanes(matrix, value), matrix.shape[-2:], value.shape[-1]
    if isinstance(found, Shift):  # a key, whether there is one, a weight; what is read, times it
        return matrix.shape[:-1].numel() * (9 + size) + 2 * lanes * n * e * size
    if isinstance(found, Long):  # values and weights, their transforms, twice as long as the grid
        return 8 * 8 * lanes * (m + 1) * (e + 1)
    assert isinstance(found, Support)
    single = min(found.edge, split.block_rows(matrix, found, value))
    block = single * split.row_bytes(matrix, found, value)
    # What the convolution reads, with zeros around it, and gives, in an order of its own.
    read = math.prod(high - low for low, high in Box(found, found.inner()).reads())
    return block + size * lanes * e * (max(read, m) + 2 * n)


def flops(matrix: Attention, out: int) -> int:
    """Of the forward product with values of width `out`."""
    found, lanes = support.find(matrix), matrix.shape[:-2].numel()
    if isinstance(found, Shift):  # what is read, times its weight
        return lanes * matrix.shape[-2] * out
    if isinstance(found, Long):
        return spectral.flops(found, lanes, out)
    assert isinstance(found, Support)
    divides = any(found.cut) and not matrix.normalizer.by_pair
    totals = Box(found, found.inner()).count * found.count if divides else 0
    return 2 * lanes * (found.pairs(out) * out + totals)


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
    output = Split.of(matrix, found, dtype).product(wide)
    return output.expand(*batch, -1, -1).to(value.dtype)


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
    output = Split.of(matrix, found, dtype).transposed(wide)
    return output.expand(*batch, -1, -1).to(x.dtype)


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
