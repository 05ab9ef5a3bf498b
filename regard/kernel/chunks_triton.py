"""One recurrence in chunks, on a GPU: a decay for each token of a lane, and nothing erased.

    S_t = e^g_t S_(t-1) + k_t v_t^T,  o_t = S_t^T q_t
reference  regard/form/chunks.py::scan, whose formulas these are
backward   the same two kernels, `_carry` and `_read`, each way in time, and `_decays`
work       forward 2 n (C (d + e) + 2 d e) flops, backward about four times that; C = 32
bytes      forward reads q once and k, v twice, and writes and reads n d e / C numbers of states
scratch    a state for each chunk, two in backward; on chip, tiles of 32 x 32
precision  sums in the inputs' dtype, float32 or float64, and products exact unless
           torch.set_float32_matmul_precision allows TF32; every exponent is a sum of numbers of
           one sign, added up by itself: nothing overflows, and -inf forgets
after      Dao, Gu 2024, arXiv:2405.21060, section 6 (states first, then all chunks at once); Yang
           et al. 2023, arXiv:2312.06635, section 4 (backward as a recurrence of gradients)

With D_ts = e^(sum of g over s + 1 to t), e_t = e^(sum of g from the chunk's first token to t),
f_s = e^(sum of g after s) inside a chunk, S before it and dS the gradient of what is after it:
    O  = (Q K^T * D) V + e Q S            dV = (K Q^T * D^T) dO + f K dS
    dQ = (dO V^T * D) K + e dO S^T        dK = (V dO^T * D^T) Q + f V dS^T
    S' = e_C S + (f K)^T V                dS before = e_C dS + (e Q)^T dO
so that lines of one kind are one kernel, with operands exchanged and, on the right, time reversed.
Several lanes of queries, `readers`, may share one of keys, values and states.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Compiled for sm_80 with exact float32 products, `_carry` and `_read` spill nothing at 32,
# `_decays` 40 bytes a thread, and each of them 2 to 8 KB a thread at 64. No size was timed.
CHUNK = 32
"""Tokens of a chunk."""
SIDE = 32
"""Largest side of a tile of channels."""
LEAST = 16
"""Least side of a factor of `tl.dot`."""


@triton.jit
def _tile(start, rows, columns, length, width):
    """[rows, columns] of [length, width] numbers, 0 beyond them."""
    inside = (rows < length)[:, None] & (columns < width)[None, :]
    return tl.load(start + rows[:, None] * width + columns[None, :], mask=inside, other=0.0)


@triton.jit
def _turned(start, rows, columns, length, width):
    """[rows, columns] of the transpose of [width, length] numbers, 0 beyond them."""
    inside = (rows < length)[:, None] & (columns < width)[None, :]
    return tl.load(start + columns[None, :] * length + rows[:, None], mask=inside, other=0.0)


@triton.jit
def _plus(total, x, y, PRECISION: tl.constexpr):
    """What was summed, and x y; out_dtype, since Triton 3.7 takes it for float32."""
    return tl.dot(x, y, total, input_precision=PRECISION, out_dtype=total.dtype)


@triton.jit
def _entered(decay, tokens, n, C: tl.constexpr, REVERSE: tl.constexpr):
    """e [C], or with REVERSE f."""
    if REVERSE:
        after = (tl.arange(0, C) < C - 1) & (tokens + 1 < n)
        sums = tl.cumsum(tl.load(decay + tokens + 1, mask=after, other=0.0), 0, reverse=True)
    else:
        sums = tl.cumsum(tl.load(decay + tokens, mask=tokens < n, other=0.0), 0)
    return tl.exp(sums)


@triton.jit
def _kept(decay, tokens, n, C: tl.constexpr, REVERSE: tl.constexpr):
    """D [C, C], or with REVERSE its transpose; 0 where a key is later than its query.

    Differences of running sums would have no digits left after a strong decay, and be NaN after
    -inf: each sum is added up by itself.
    """
    row, column = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    g = tl.load(decay + tokens, mask=tokens < n, other=0.0)
    if REVERSE:
        seen = row <= column
        sums = tl.cumsum(tl.where(row < column, g[None, :], 0.0), 1)
    else:
        seen = row >= column
        sums = tl.cumsum(tl.where(row > column, g[:, None], 0.0), 0)
    return tl.where(seen, tl.exp(sums), 0.0)


@triton.jit
def _products(
    x, y, tokens, n, d,
    C: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """x y^T [C, C] of a chunk."""
    total = tl.zeros((C, C), x.dtype.element_ty)
    for first in range(0, d, D):
        channels = first + tl.arange(0, D)
        one, other = _tile(x, tokens, channels, n, d), _tile(y, tokens, channels, n, d)
        total = _plus(total, one, tl.trans(other), PRECISION)
    return total


@triton.jit
def _carry(
    x,  # [lanes * SHARE, n, d]
    y,  # [lanes * SHARE, n, e]
    decay,  # [lanes, n] or None
    begun,  # [lanes, d, e]
    states,  # [lanes, chunks, d, e]: written, what each chunk meets
    ended,  # [lanes, d, e]: written
    n, d, e,
    SHARE: tl.constexpr, REVERSE: tl.constexpr,
    C: tl.constexpr, D: tl.constexpr, E: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """S' = e_C S + (f x)^T y, chunk after chunk; with REVERSE from the last on, e in place of f.

    One program has a tile [D, E] of the state of one lane.
    """
    lane = tl.program_id(0).to(tl.int64)
    rows = tl.program_id(1) * D + tl.arange(0, D)
    columns = tl.program_id(2) * E + tl.arange(0, E)
    place = rows[:, None] * e + columns[None, :]
    inside = (rows < d)[:, None] & (columns < e)[None, :]
    state = tl.load(begun + lane * d * e + place, mask=inside, other=0.0)
    chunks = tl.cdiv(n, C)
    for turn in range(chunks):
        chunk = turn
        if REVERSE:
            chunk = chunks - 1 - turn
        tokens = chunk * C + tl.arange(0, C).to(tl.int64)
        tl.store(states + (lane * chunks + chunk) * d * e + place, state, mask=inside)
        if decay is not None:
            own = decay + lane * n
            leaves = _entered(own, tokens, n, C, not REVERSE)
            state *= tl.exp(tl.sum(tl.load(own + tokens, mask=tokens < n, other=0.0), 0))
        for one in range(SHARE):
            at = (lane * SHARE + one) * n
            part = _tile(x + at * d, tokens, rows, n, d)
            if decay is not None:
                part *= leaves[:, None]
            other = _tile(y + at * e, tokens, columns, n, e)
            state = _plus(state, tl.trans(part), other, PRECISION)
    tl.store(ended + lane * d * e + place, state, mask=inside)


@triton.jit
def _read(
    x,  # [lanes * READERS, n, d]
    y,  # [lanes * SHARE, n, d]
    z,  # [lanes * SHARE, n, e]
    decay,  # [lanes, n] or None
    states,  # [lanes, chunks, d, e], or with TURNED [lanes, chunks, e, d]
    found,  # [lanes * READERS, n, e]: written
    n, d, e,
    READERS: tl.constexpr, SHARE: tl.constexpr, REVERSE: tl.constexpr, TURNED: tl.constexpr,
    C: tl.constexpr, D: tl.constexpr, E: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(x y^T * D) z + e x S; with REVERSE D^T in place of D, and f of e.

    One program has one chunk, and E columns of the result.
    """
    chunks = tl.cdiv(n, C)
    reader, chunk = (tl.program_id(0) // chunks).to(tl.int64), tl.program_id(0) % chunks
    lane = reader // READERS
    columns = tl.program_id(1) * E + tl.arange(0, E)
    tokens = chunk * C + tl.arange(0, C).to(tl.int64)
    total = tl.zeros((C, E), x.dtype.element_ty)
    own, before = x + reader * n * d, states + (lane * chunks + chunk) * d * e
    for first in range(0, d, D):
        channels = first + tl.arange(0, D)
        if TURNED:
            state = _turned(before, channels, columns, d, e)
        else:
            state = _tile(before, channels, columns, d, e)
        part = _tile(own, tokens, channels, n, d)
        total = _plus(total, part, state, PRECISION)
    if decay is None:
        row, column = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
        seen = row <= column if REVERSE else row >= column
    else:
        total *= _entered(decay + lane * n, tokens, n, C, REVERSE)[:, None]
        kept = _kept(decay + lane * n, tokens, n, C, REVERSE)
    for one in range(SHARE):
        at = (lane * SHARE + one) * n
        scores = _products(own, y + at * d, tokens, n, d, C, D, PRECISION)
        scores = tl.where(seen, scores, 0.0) if decay is None else scores * kept
        other = _tile(z + at * e, tokens, columns, n, e)
        total = _plus(total, scores, other, PRECISION)
    place = reader * n * e + tokens[:, None] * e + columns[None, :]
    tl.store(found + place, total, mask=(tokens < n)[:, None] & (columns < e)[None, :])


@triton.jit
def _met(
    x, z, state, tokens, n, d, e,
    C: tl.constexpr, D: tl.constexpr, E: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """z_t . S^T x_t of each token of a chunk, [C]."""
    met = tl.zeros((C,), x.dtype.element_ty)
    for start in range(0, e, E):
        columns = start + tl.arange(0, E)
        total = tl.zeros((C, E), x.dtype.element_ty)
        for first in range(0, d, D):
            channels = first + tl.arange(0, D)
            part, tile = _tile(x, tokens, channels, n, d), _tile(state, channels, columns, d, e)
            total = _plus(total, part, tile, PRECISION)
        met += tl.sum(total * _tile(z, tokens, columns, n, e), 1)
    return met


@triton.jit
def _decays(
    query,  # [lanes * READERS, n, d]
    key,  # [lanes, n, d]
    value,  # [lanes, n, e]
    gradient,  # [lanes * READERS, n, e], of the outputs
    decay,  # [lanes, n]
    states,  # [lanes, chunks, d, e], before each chunk
    changes,  # [lanes, chunks, d, e], gradients of those after each
    found,  # [lanes, n]: written
    n, d, e,
    READERS: tl.constexpr,
    C: tl.constexpr, D: tl.constexpr, E: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of g: sums of what each exponent that g_j is part of adds to the loss.

    g_j is part of D_ts for s < j <= t, of e_t for t >= j, of f_s for s < j, and of e_C.
    """
    chunks = tl.cdiv(n, C)
    lane, chunk = (tl.program_id(0) // chunks).to(tl.int64), tl.program_id(0) % chunks
    tokens = chunk * C + tl.arange(0, C).to(tl.int64)
    states += (lane * chunks + chunk) * d * e
    changes += (lane * chunks + chunk) * d * e
    query += lane * READERS * n * d
    gradient += lane * READERS * n * e
    key += lane * n * d
    value += lane * n * e
    decay += lane * n
    pairs = tl.zeros((C, C), query.dtype.element_ty)
    enters = tl.zeros((C,), query.dtype.element_ty)
    for one in range(READERS):
        scores = _products(query + one * n * d, key, tokens, n, d, C, D, PRECISION)
        pairs += scores * _products(gradient + one * n * e, value, tokens, n, e, C, E, PRECISION)
        enters += _met(query + one * n * d, gradient + one * n * e, states, tokens, n, d, e,
                       C, D, E, PRECISION)  # fmt: skip
    pairs *= _kept(decay, tokens, n, C, False)
    enters *= _entered(decay, tokens, n, C, False)
    leaves = _met(key, value, changes, tokens, n, d, e, C, D, E, PRECISION)
    leaves *= _entered(decay, tokens, n, C, True)
    across = tl.zeros((D, E), query.dtype.element_ty)
    for first in range(0, d, D):
        for start in range(0, e, E):
            rows, columns = first + tl.arange(0, D), start + tl.arange(0, E)
            across += _tile(states, rows, columns, d, e) * _tile(changes, rows, columns, d, e)
    whole = tl.exp(tl.sum(tl.load(decay + tokens, mask=tokens < n, other=0.0), 0))
    whole *= tl.sum(tl.sum(across, 1), 0)
    earlier = tl.arange(0, C)[None, :] < tl.arange(0, C)[:, None]  # [j, s]
    since = tl.cumsum(pairs, 0, reverse=True) + leaves[None, :]
    total = tl.sum(tl.where(earlier, since, 0.0), 1) + tl.cumsum(enters, 0, reverse=True) + whole
    tl.store(found + lane * n + tokens, total, mask=tokens < n)


def _side(width: int) -> int:
    return int(min(max(triton.next_power_of_2(width), LEAST), SIDE))


def _sides(n: int, d: int, e: int) -> dict[str, Any]:
    """Sides of tiles, and how factors are rounded."""
    exact = torch.get_float32_matmul_precision() == "highest"
    chunk = min(max(triton.next_power_of_2(n), LEAST), CHUNK)
    precision = "ieee" if exact else "tf32"
    return {"C": chunk, "D": _side(d), "E": _side(e), "PRECISION": precision}


def carry(
    x: Tensor, y: Tensor, decay: Tensor | None, begun: Tensor, *, reverse: bool = False
) -> tuple[Tensor, Tensor]:
    """The state that each chunk meets, [lanes, chunks, d, e], and the one after all.

    x: [lanes * share, n, d]; y: [lanes * share, n, e]; decay: [lanes, n]; begun: [lanes, d, e]; all
    contiguous. With reverse, of gradients: x are queries, y gradients of outputs.
    """
    (lanes, d, e), n = begun.shape, x.shape[-2]
    sides = _sides(n, d, e)
    states = begun.new_empty(lanes, triton.cdiv(n, sides["C"]), d, e)
    ended = torch.empty_like(begun)
    grid = (lanes, triton.cdiv(d, sides["D"]), triton.cdiv(e, sides["E"]))
    share = x.shape[0] // lanes
    _carry[grid](x, y, decay, begun, states, ended, n, d, e, SHARE=share, REVERSE=reverse, **sides)
    return states, ended


def read(
    x: Tensor,
    y: Tensor,
    z: Tensor,
    decay: Tensor | None,
    states: Tensor,
    *,
    reverse: bool = False,
    turned: bool = False,
) -> Tensor:
    """(x y^T * D) z + e x S of all chunks, [lanes * readers, n, e]: see `_read`.

    x: [lanes * readers, n, d]; y, z: [lanes * share, n, .]; states: [lanes, chunks, d, e], or with
    turned [lanes, chunks, e, d]
    """
    n, d, e, lanes = *x.shape[-2:], z.shape[-1], states.shape[0]
    sides = _sides(n, d, e)
    found = x.new_empty(*x.shape[:-1], e)
    readers, share = x.shape[0] // lanes, y.shape[0] // lanes
    _read[x.shape[0] * states.shape[1], triton.cdiv(e, sides["E"])](
        x, y, z, decay, states, found, n, d, e,
        READERS=readers, SHARE=share, REVERSE=reverse, TURNED=turned, **sides,
    )  # fmt: skip
    return found


def forward(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Outputs [lanes * readers, n, e], and the state after all tokens, [lanes, d, e].

    query: [lanes * readers, n, d]; key: [lanes, n, d]; value: [lanes, n, e]; decay: [lanes, n];
    state: [lanes, d, e]; contiguous, of one dtype, none of them empty
    """
    states, after = carry(key, value, decay, state)
    return read(query, key, value, decay, states), after


def backward(
    inputs: tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor], gradient: Tensor, change: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """Gradients of what `forward` was given, from those of what it gave."""
    query, key, value, decay, state = inputs
    states, _ = carry(key, value, decay, state)
    changes, begun = carry(query, gradient, decay, change, reverse=True)
    for_query = read(gradient, value, key, decay, states, turned=True)
    for_key = read(value, gradient, query, decay, changes, reverse=True, turned=True)
    for_value = read(key, query, gradient, decay, changes, reverse=True)
    if decay is None:
        return for_query, for_key, for_value, None, begun
    n, d, e, lanes = *key.shape[-2:], value.shape[-1], key.shape[0]
    for_decay = torch.empty_like(decay)
    _decays[(lanes * states.shape[1],)](
        query, key, value, gradient, decay, states, changes, for_decay, n, d, e,
        READERS=query.shape[0] // lanes, **_sides(n, d, e),
    )  # fmt: skip
    return for_query, for_key, for_value, for_decay, begun
