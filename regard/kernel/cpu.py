"""Attention on CPU tensors by the compiled kernels, as operators of `torch.library`.

    regard::attend       output, peak, total   (csrc/attend.h)
    regard::attend_grad  gradients             (csrc/attend_grad.h)
    regard::look         what is asked about the weights   (csrc/looks.h)

The operators take tensors and numbers only. What a matrix is made of is translated to them in
`regard.form.operands`; which gradient belongs where is written in `regard.form.fused`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.kernel import extension
from regard.kernel.asked import Asked, compute_dtype

KINDS = {torch.float32: 1, torch.float64: 2, torch.bfloat16: 3, torch.float16: 4}
STRIP_BYTES = 2**23
"""What a thread keeps of a tile's weights, and of their gradients; beyond it, they are redone."""


class Inputs(NamedTuple):
    """What both operators read: tensors broadcast over [*batch, heads]."""

    query: Tensor  # [*batch, heads, n, d]
    key: Tensor  # [*batch, key heads, m, d]
    value: Tensor  # [*batch, value heads, m, e]
    weight: Tensor | None  # of an additive score, [*batch, heads, d]
    toeplitz: Tensor | None  # bias by i - j + m - 1, [*batch, heads, n + m - 1 + ROWS]
    bias: Tensor | None  # [*batch, heads, n or 1, m or 1]
    band: Tensor | None  # bias by clipped j - i, [*batch, heads, n, band's width]
    sink: Tensor | None  # [*batch, heads]
    offsets: Tensor | None  # runs of the mask, as regard.runs; None: one run for each row
    start: Tensor | None
    stop: Tensor | None
    lanes: Tensor | None  # what dropout depends on, [*batch, heads]


class Numbers(NamedTuple):
    """What both operators are told: in the order of the schema."""

    batch: Sequence[int]
    mask_batch: Sequence[int]
    score: int
    norm: int
    mean: bool
    seed: int
    threshold: int
    scale: float
    softcap: float
    slope: float
    norm_bias: float
    factor: float
    band_left: int  # entry of the band of row i's own position, i + band_offset
    band_offset: int


_TENSORS = (
    "Tensor query, Tensor key, Tensor value, Tensor? weight, Tensor? toeplitz, Tensor? bias, "
    "Tensor? band, Tensor? sink, Tensor? offsets, Tensor? start, Tensor? stop, Tensor? lanes"
)
_NUMBERS = (
    "int[] batch, int[] mask_batch, int score, int norm, bool mean, int seed, int threshold, "
    "float scale, float softcap, float slope, float norm_bias, float factor, "
    "int band_left, int band_offset"
)
TENSORS = len(Inputs._fields)
library = torch.library.Library("regard", "DEF")
library.define(f"attend({_TENSORS}, {_NUMBERS}) -> (Tensor, Tensor, Tensor)")
library.define(
    f"attend_grad(Tensor left, Tensor peak, Tensor total, Tensor? dtotal, {_TENSORS}, {_NUMBERS}, "
    "bool[] wanted) -> Tensor[]"
)
library.define(
    f"look({_TENSORS}, {_NUMBERS}, bool entropy, bool distance, bool received, bool mass, "
    "bool largest, int k, int side, int offset) -> Tensor[]"
)


def attend(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Output [*batch, heads, n, e], and peak and total of the rows; arguments as in the schema."""
    inputs, numbers = _in_lines(Inputs(*arguments[:TENSORS])), Numbers(*arguments[TENSORS:])
    output, peak, total = attend_fake(*arguments)
    problem = _problem(inputs, numbers, inputs.value.shape[-1])
    problem.operand("output", *_operand(output, 2))
    problem.rows(peak.data_ptr(), total.data_ptr(), 0, 0)
    _extension().attend(problem, torch.get_num_threads())
    return output, peak, total


def attend_plain(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """softmax(scale query key^T) value in one call, without what a small matrix need not pay for.

    All three have the same axes before the last two, the same dtype, and vectors that lie in one
    piece.
    """
    if value.shape == query.shape:  # a microsecond less
        output = torch.empty_like(query, memory_format=torch.contiguous_format)
    else:
        output = value.new_empty((*query.shape[:-1], value.shape[-1]))
    _extension().attend_plain(
        query.data_ptr(),
        key.data_ptr(),
        value.data_ptr(),
        output.data_ptr(),
        KINDS[query.dtype],
        (query.shape, key.shape, value.shape, output.shape),
        (query.stride(), key.stride(), value.stride(), output.stride()),
        scale,
        torch.get_num_threads(),
    )
    return output


def attend_fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Unfilled results of `attend`."""
    query, _, value, *_, batch = arguments[: TENSORS + 1]
    rows = (*batch, query.shape[-2])
    dtype = compute_dtype(query)
    return (
        value.new_empty((*rows, value.shape[-1])),
        query.new_empty(rows, dtype=dtype),
        query.new_empty(rows, dtype=dtype),
    )


class Gradients(NamedTuple):
    """What attend_grad returns, in order; what was not wanted has no elements."""

    query: Tensor
    key: Tensor
    value: Tensor
    weight: Tensor
    toeplitz: Tensor
    bias: Tensor
    band: Tensor
    delta: Tensor


def attend_grad(
    left: Tensor, peak: Tensor, total: Tensor, dtotal: Tensor | None, *arguments: Any
) -> list[Tensor]:
    """All of `Gradients`; `wanted`, the last argument, has one entry for each but delta."""
    inputs, numbers = _in_lines(Inputs(*arguments[:TENSORS])), Numbers(*arguments[TENSORS:-1])
    left = _in_line(left)
    dtotal = None if dtotal is None else dtotal.resolve_neg().contiguous()
    split = _split(inputs, numbers, arguments[-1])
    homes = _homes(inputs, numbers, arguments[-1], split, left)
    # Of values alone, nothing but weights is needed: the kernel takes no value as the sign.
    alone = not any((*arguments[-1][:2], *arguments[-1][3:]))
    problem = _problem(inputs, numbers, left.shape[-1], with_value=not alone)
    problem.operand("left", *_operand(left, 2))
    problem.rows(
        peak.data_ptr(),
        total.data_ptr(),
        homes.delta.data_ptr(),
        0 if dtotal is None else dtotal.data_ptr(),
    )
    problem.split(*split)
    for name in Gradients._fields[:-1]:
        home = getattr(homes, name)
        if home.numel():
            trailing = 1 if name in ("weight", "toeplitz") else 2
            problem.operand(f"d{name}", *_operand(home, trailing))
    _extension().attend_grad(problem, torch.get_num_threads())
    return _gathered(homes, inputs, split, left.shape[-1])


def attend_grad_fake(
    left: Tensor, peak: Tensor, total: Tensor, dtotal: Tensor | None, *arguments: Any
) -> list[Tensor]:
    """Unfilled results of `attend_grad`."""
    inputs, numbers = Inputs(*arguments[:TENSORS]), Numbers(*arguments[TENSORS:-1])
    split = _Split(1, 1, 1, False)
    homes = _homes(inputs, numbers, arguments[-1], split, left)
    return _gathered(homes, inputs, split, left.shape[-1])


def look(*arguments: Any) -> list[Tensor]:
    """All of `asked.Looks`; arguments as in the schema."""
    inputs, numbers, asked = _in_lines(Inputs(*arguments[:TENSORS])), *_looking(arguments)
    extension_, threads = _extension(), torch.get_num_threads()
    lanes, (n, m) = math.prod(numbers.batch), (inputs.query.shape[-2], inputs.key.shape[-2])
    # Where columns are summed, each chunk of rows has sums of its own: enough for all threads.
    chunks = -(-8 * threads // max(lanes, 1)) if asked.received else max(n, 1)
    homes = asked.homes(inputs.query, m, numbers.batch, chunks)
    block = extension_.ROWS * extension_.KEYS * homes.peak.itemsize
    problem = _problem(inputs, numbers, 0, with_value=False)
    problem.rows(homes.peak.data_ptr(), homes.total.data_ptr(), 0, 0)
    problem.split(chunks, 1, min(-(-m // extension_.KEYS), STRIP_BYTES // block), False)
    pointers = [home.data_ptr() if home.numel() else 0 for home in homes[2:]]
    problem.look(asked.k, asked.side, asked.offset, pointers)
    extension_.look(problem, threads)
    return list(homes.gathered())


def look_fake(*arguments: Any) -> list[Tensor]:
    """Unfilled results of `look`."""
    numbers, asked = _looking(arguments)
    homes = asked.homes(arguments[0], arguments[1].shape[-2], numbers.batch, 1)
    return list(homes.gathered())


def _looking(arguments: Sequence[Any]) -> tuple[Numbers, Asked]:
    end = TENSORS + len(Numbers._fields)
    return Numbers(*arguments[TENSORS:end]), Asked(*arguments[end:])


class _Split(NamedTuple):
    """How the backward pass is cut: see Problem in csrc/problem.h."""

    chunks: int
    group: int
    strip: int
    by_rows: bool


def _split(inputs: Inputs, numbers: Numbers, wanted: Sequence[bool]) -> _Split:
    extension_ = _extension()
    lanes, threads = math.prod(numbers.batch), torch.get_num_threads()
    heads = numbers.batch[-1] if numbers.batch else 1
    shares = [heads // max(_heads(x), 1) for x in (inputs.key, inputs.value)]
    group = math.gcd(*shares) if heads else 1
    groups = lanes // max(group, 1)
    bias = inputs.bias if wanted[5] and inputs.bias.shape[-2] > 1 else None  # type: ignore[union-attr]
    of_rows = bias, inputs.band if wanted[6] else None
    by_rows = any(x is not None and math.prod(x.shape[:-2]) < lanes for x in of_rows)
    tiles = max(-(-inputs.query.shape[-2] // extension_.ROWS), 1)
    uneven = groups % threads and groups < 4 * threads
    chunks = min(threads if by_rows or uneven else 1, tiles)
    size = 8 if inputs.query.dtype == torch.float64 else 4
    blocks = STRIP_BYTES // (2 * extension_.ROWS * extension_.KEYS * size)
    strip = min(-(-inputs.key.shape[-2] // extension_.KEYS) + 1, blocks)
    return _Split(chunks, group, strip, by_rows)


def _homes(
    inputs: Inputs, numbers: Numbers, wanted: Sequence[bool], split: _Split, left: Tensor
) -> Gradients:
    """Memory for the gradients as the kernel writes them."""
    query, bias, batch = inputs.query, inputs.bias, tuple(numbers.batch)
    n, m, d, e = query.shape[-2], inputs.key.shape[-2], query.shape[-1], left.shape[-1]
    dtype = compute_dtype(query)
    nothing = query.new_empty(0, dtype=dtype)
    chunked = (split.chunks, *batch)
    of_keys = (split.chunks, *batch[:-1], *((batch[-1] // split.group,) if batch else ()), m)
    zeros = query.new_zeros
    one_row = bias is None or bias.shape[-2] == 1
    bias_shape = (*chunked, m) if one_row or bias is None else tuple(bias.shape)
    toeplitz_width = 0 if inputs.toeplitz is None else inputs.toeplitz.shape[-1]
    return Gradients(
        query.new_empty((*batch, n, d)) if wanted[0] else nothing,
        zeros((*of_keys, _padded(d)), dtype=dtype) if wanted[1] else nothing,
        zeros((*of_keys, _padded(e)), dtype=dtype) if wanted[2] else nothing,
        zeros((*chunked, _padded(d)), dtype=dtype) if wanted[3] else nothing,
        zeros((*chunked, toeplitz_width), dtype=dtype) if wanted[4] else nothing,
        zeros(bias_shape, dtype=dtype) if wanted[5] else nothing,
        nothing if inputs.band is None or not wanted[6] else zeros(inputs.band.shape, dtype=dtype),
        query.new_empty((*batch, n), dtype=dtype),
    )


def _gathered(homes: Gradients, inputs: Inputs, split: _Split, width: int) -> list[Tensor]:
    """Sum over chunks, cut what was padded; broadcast axes are summed by the caller."""

    def whole(home: Tensor, width: int | None) -> Tensor:
        if home.dim() == 1:
            return home  # not wanted
        home = home[0] if split.chunks == 1 else home.sum(0)
        return home if width is None else home[..., :width]

    bias = inputs.bias
    d = inputs.query.shape[-1]
    dweight = whole(homes.weight, d)
    if inputs.weight is not None and dweight.dim() > 1:
        dweight = F.pad(dweight, (0, inputs.weight.shape[-1] - d))  # numbers that are not learned
    dbias = homes.bias
    if bias is not None and bias.shape[-2] == 1 and dbias.dim() > 1:
        dbias = whole(dbias, None)[..., None, :]
    return [
        homes.query,
        whole(homes.key, d),
        whole(homes.value, width),
        dweight,
        whole(homes.toeplitz, None),
        dbias,
        homes.band,
        homes.delta,
    ]


def _problem(inputs: Inputs, numbers: Numbers, width: int, *, with_value: bool = True) -> Any:
    query, key = inputs.query, inputs.key
    compute = KINDS[compute_dtype(query)]
    problem = _extension().Problem.of(
        tuple(numbers.batch), query.shape[-2], key.shape[-2], query.shape[-1], width, compute
    )
    problem.operand("query", *_operand(query, 2))
    problem.operand("key", *_operand(key, 2))
    if with_value:
        problem.operand("value", *_operand(inputs.value, 2))
    for name, trailing in (("weight", 1), ("toeplitz", 1), ("bias", 2), ("band", 2), ("sink", 0)):
        tensor = getattr(inputs, name)
        if tensor is not None:
            problem.operand(name, *_operand(tensor, trailing))
    if inputs.band is not None:
        problem.band(numbers.band_left, inputs.band.shape[-1], numbers.band_offset)
    if inputs.start is not None and inputs.stop is not None:
        offsets = 0 if inputs.offsets is None else inputs.offsets.data_ptr()
        starts = inputs.start.data_ptr(), inputs.stop.data_ptr()
        problem.mask(offsets, *starts, tuple(numbers.mask_batch))
    if inputs.lanes is not None:
        pointer = inputs.lanes.data_ptr()
        problem.dropout(pointer, numbers.seed, numbers.threshold, numbers.factor)
    problem.score(numbers.score, numbers.scale, numbers.softcap, numbers.slope)
    problem.norm(numbers.norm, numbers.norm_bias, numbers.mean)
    return problem


def _operand(tensor: Tensor, trailing: int) -> tuple[Any, ...]:
    return tensor.data_ptr(), KINDS[tensor.dtype], tensor.shape, tensor.stride(), trailing


def _in_lines(inputs: Inputs) -> Inputs:
    """The kernels read vectors along the last axis, one number after the other, as they lie."""
    query, key, value, weight, toeplitz = map(_in_line, inputs[:5])
    bias, sink = (None if x is None else x.resolve_neg() for x in (inputs.bias, inputs.sink))
    lines = query, key, value, weight, toeplitz, bias, _in_line(inputs.band), sink
    return Inputs(*lines, *inputs[len(lines) :])


def _in_line(tensor: Tensor | None) -> Any:
    if tensor is None:
        return None
    tensor = tensor.resolve_neg()  # an address does not say that a view is negative
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def rows_of_a_tile() -> int:
    """How many numbers beyond its own a vector of biases must have."""
    rows: int = _extension().ROWS
    return rows


def instruction_set() -> str:
    """What the kernels were built for that run here: avx512_bf16, avx512, avx2 or base."""
    name: str = _extension().isa()
    return name


def peak_flops(seconds: float = 0.2) -> float:
    """Float32 multiply-adds on registers alone, measured: the most there is, in flop/s."""
    found: float = _extension().peak_flops(torch.get_num_threads(), seconds)
    return found


def scratch_bytes(width: int, value_width: int, size: int) -> int:
    """Bytes that the threads of a forward product work in, for the widths of query and value."""
    rows, keys = rows_of_a_tile(), _extension().KEYS
    numbers = rows * (2 * width + 2 * value_width + keys) + keys * (width + value_width)
    return int(torch.get_num_threads() * numbers * size)


def _heads(tensor: Tensor) -> int:
    return tensor.shape[-3] if tensor.dim() > 2 else 1


def _padded(width: int) -> int:
    step: int = _extension().GRADIENT_STEP
    return -(-width // step) * step


def _extension() -> Any:
    return extension.load()


library.impl("attend", attend, "CPU")
library.impl("attend_grad", attend_grad, "CPU")
library.impl("look", look, "CPU")
torch.library.register_fake("regard::attend", attend_fake, lib=library)
torch.library.register_fake("regard::attend_grad", attend_grad_fake, lib=library)
torch.library.register_fake("regard::look", look_fake, lib=library)
