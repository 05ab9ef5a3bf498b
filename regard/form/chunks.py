"""One recurrence in chunks: memory of constant size, and matrix products inside a chunk.

    S_t = (I + b_t a_t^T) diag(e^g_t) S_(t-1) + k_t v_t^T,   o_t = S_t^T q_t

With G_ts the sum of g over tokens s + 1 to t of a chunk of C tokens, and S the state before it:
    A(x, y)_ts = sum_c x_tc y_sc e^G_tsc,  s <= t          e_t = e^(sum of g up to t)
    U = (I - A(a, b))^-1 ((a e) S + A(a, k) V),            strictly s < t in A(a, .)
    O = (q e) S + A(q, k) V + A(q, b) U                    f_s = e^(sum of g after s)
    S' = diag(e_C) S + (f k)^T V + (f b)^T U
C = 1 is the RNN, C = n is attention, and all chunks of a piece are done at once but for S.
reference  regard/features.py::Features.pair
work       2 n (C (d + e) + 2 d e) flops; with erasing
           2 n (C (7 d + 5 e) / 2 + 2 d e + d^2 + d^2 e / C) more
memory     inputs, outputs, a state for each piece, and the work of one, which backward does again
precision  every exponent is a sum of numbers of one sign, at most 0: nothing overflows, and -inf
           forgets; no differences of running sums
after      Sun et al. 2023 (RetNet), arXiv:2307.08621, eq. 7; Yang et al. 2024, arXiv:2406.06484 (WY
           form in chunks), arXiv:2312.06635, section 4 (a decay for each channel); Dao, Gu 2024,
           arXiv:2405.21060, section 6
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.errors import common_shape
from regard.features import after
from regard.form import chunks_gpu

# Of 32, 64 and 128 the fastest forward and backward, n = 4096 and width 64 on one core with AVX2,
# without a decay, with one number for each head, and with one for each token.
CHUNK = 64
PIECE_NUMBERS = 2**21
"""Numbers of size tokens x C that one piece holds over all lanes."""


class Tokens(NamedTuple):
    """What a recurrence reads, [*lanes, n, .] each; lanes broadcast.

    query, key, read (a), write (b): width d; value: width e; log_decay (g): d or 1 wide, and 1 long
    if all tokens have the same. None where there is nothing; without a query only the state counts.
    """

    query: Tensor | None
    key: Tensor
    value: Tensor
    log_decay: Tensor | None = None
    read: Tensor | None = None
    write: Tensor | None = None

    def lanes(self) -> tuple[int, ...]:
        """The lanes of the state."""
        given = (self.key, self.value, self.log_decay, self.read, self.write)
        return common_shape([x.shape[:-2] for x in given if x is not None])

    def start(self, sums: bool = False) -> Tensor:
        """The state before any token, [*lanes, d, e + sums]."""
        return self.value.new_zeros(*self.lanes(), self.key.shape[-1], self.value.shape[-1] + sums)

    def part(self, which: slice) -> Tokens:
        """Some tokens; what all share stays."""
        whole = self.key.shape[-2]
        return self._each(lambda x: x[..., which, :] if x.shape[-2] == whole else x)

    def lengthened(self, tokens: int) -> Tokens:
        """The first tokens, or all and more of zeros; what all share stays."""
        keys = self.key.shape[-2]
        if tokens == keys:  # padding by nothing copies
            return self
        pads = (0, 0, 0, tokens - keys)
        return self._each(lambda x: F.pad(x, pads) if x.shape[-2] == keys else x)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Tokens:
        return Tokens(*(x if x is None else change(x) for x in self))  # type: ignore[arg-type]


def scan(tokens: Tokens, state: Tensor) -> tuple[Tensor | None, Tensor]:
    """Outputs [*lanes, n, e] of all tokens, and the state after them."""
    if tokens.key.shape[-2] == 1:
        return step(tokens, state)
    if chunks_gpu.runs(tokens):
        return chunks_gpu.scan(tokens, state, in_pytorch)
    return in_pytorch(tokens, state)


def in_pytorch(tokens: Tokens, state: Tensor) -> tuple[Tensor | None, Tensor]:
    """`scan`, as products of PyTorch's."""
    n, outputs = tokens.key.shape[-2], []
    for piece, size in _pieces(tokens, min(CHUNK, max(n, 1))):
        output, state = _again(piece, state, size)
        outputs.append(output)
    if tokens.query is None:
        return None, state
    nothing = tokens.value[..., :0, :].expand(*state.shape[:-2], 0, state.shape[-1])
    whole = [output for output in outputs if output is not None]
    return torch.cat(whole, -2) if whole else nothing, state


def step(tokens: Tokens, state: Tensor) -> tuple[Tensor | None, Tensor]:
    """One token: the recurrence as it is written."""
    query, key, value, decay, read, write = tokens
    if decay is not None:
        state = state * decay.exp().mT.to(state.dtype)
    if read is not None and write is not None:
        state = state + write.mT * (read @ state)
    state = state + key.mT * value
    return None if query is None else query @ state, state


def _pieces(tokens: Tokens, chunk: int) -> Iterator[tuple[Tokens, int]]:
    """Pieces of whole chunks, and what is left as a smaller chunk."""
    n = tokens.key.shape[-2]
    of_query = () if tokens.query is None else tokens.query.shape[:-2]
    lanes = math.prod(common_shape([tokens.lanes(), of_query]))
    wide = tokens.log_decay is not None and tokens.log_decay.shape[-1] > 1
    numbers = chunk + (tokens.key.shape[-1] if wide else 0)
    length = max(PIECE_NUMBERS // max(lanes * numbers, 1) // chunk, 1) * chunk
    whole = n // chunk * chunk
    sizes = [length] * (whole // length)
    sizes += [size for size in (whole % length, n - whole) if size]
    columns = [
        [x] * len(sizes) if x is None or x.shape[-2] != n else x.split(sizes, -2) for x in tokens
    ]
    for size, piece in zip(sizes, zip(*columns, strict=True), strict=True):
        yield Tokens(*piece), chunk if size >= chunk else size


def _again(piece: Tokens, state: Tensor, chunk: int) -> tuple[Tensor | None, Tensor]:
    """`_chunks`, of which the backward pass keeps the inputs alone and does the rest again."""
    learns = torch.is_grad_enabled() and any(_learns(x) for x in (*piece, state))
    if not learns or torch._C._are_functorch_transforms_active():  # which know no checkpoints
        return _chunks(piece, state, chunk)
    from torch.utils.checkpoint import checkpoint

    found: Any = checkpoint(
        _chunks, piece, state, chunk, use_reentrant=False, preserve_rng_state=False
    )
    output, state = found
    return output, state


def _learns(x: Tensor | None) -> bool:
    return x is not None and x.requires_grad


def _chunks(tokens: Tokens, state: Tensor, chunk: int) -> tuple[Tensor | None, Tensor]:
    """A piece of whole chunks, [*, N, C, .] inside."""
    query, key, value, decay, read, write = (_cut(x, chunk) for x in tokens)
    assert key is not None
    assert value is not None
    pairs, enter, leave, across = _decays(decay, chunk)
    kept = key if leave is None else key * leave
    added = kept.mT @ value
    change, solved = None, None
    if read is not None and write is not None:
        entered = read if enter is None else read * enter
        alone = torch.eye(chunk, dtype=read.dtype, device=read.device)
        within = alone - pairs(read, write).tril(-1)
        known = _side_by_side(entered, pairs(read, key).tril(-1) @ value)
        # [*, N, C, d + e]: what U is made of, a part for S and a part of its own.
        solved = torch.linalg.solve_triangular(within, known, upper=False, unitriangular=True)
        of_state, own = solved.split([key.shape[-1], value.shape[-1]], -1)
        faded = write if leave is None else write * leave
        change = faded.mT @ of_state
        added = added + faded.mT @ own
    states, state = _carry(state, added, across, change)
    if query is None:
        return None, state
    output = pairs(query, key) @ value + (query if enter is None else query * enter) @ states
    if solved is not None and write is not None:
        output = output + pairs(query, write) @ (of_state @ states + own)
    return output.flatten(-3, -2), state


def _cut(x: Tensor | None, chunk: int) -> Tensor | None:
    """[*, n, .] -> [*, n / C, C, .]; what all tokens share becomes one chunk."""
    if x is None:
        return None
    if x.shape[-2] == 1 != chunk:
        x = x.expand(*x.shape[:-2], chunk, x.shape[-1])
    chunks: Tensor = x.unflatten(-2, (x.shape[-2] // chunk, chunk))
    return chunks


def _side_by_side(one: Tensor, other: Tensor) -> Tensor:
    shape = common_shape([one.shape[:-1], other.shape[:-1]])
    return torch.cat([x.expand(*shape, x.shape[-1]) for x in (one, other)], -1)


def _carry(
    state: Tensor, added: Tensor, across: Tensor | None, change: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The states before each chunk, [*, N, d, e], and after the last.

    S' = across S + change S + added
    across: e_C, [*, N or 1, d or 1, 1]; change: [*, N, d, d]
    """
    count = added.shape[-3]
    each = [None] * count if across is None else _unbound(across, count)
    changes = [None] * count if change is None else change.unbind(-3)
    states = []
    for more, fade, turn in zip(added.unbind(-3), each, changes, strict=True):
        states.append(state)
        before = state
        state = more + (before if fade is None else fade * before)
        if turn is not None:
            state = state + turn @ before
    return torch.stack(states, -3), state


def _unbound(across: Tensor, count: int) -> Any:
    return across.expand(*across.shape[:-3], count, *across.shape[-2:]).unbind(-3)


def _decays(decay: Tensor | None, chunk: int) -> tuple[Any, ...]:
    """A(x, y), e_t [*, N, C, .], f_s [*, N, C, .] and e_C [*, N, d or 1, 1] of chunks of decays."""
    if decay is None:
        return (lambda x, y: (x @ y.mT).tril()), None, None, None
    enter = decay.cumsum(-2)
    leave = after(decay[..., 1:, :])
    factors = enter.exp(), leave.exp(), enter[..., -1:, :].exp().mT
    if decay.shape[-1] > 1:
        return (lambda x, y: _by_channel(_in_lanes(x, y, decay), y, decay)), *factors
    kept = _log_kept(decay[..., 0]).exp()
    return (lambda x, y: (x @ y.mT) * kept), *factors


def _in_lanes(x: Tensor, *others: Tensor) -> Tensor:
    """x, expanded so that its own axes hold every lane: halves are then alike in all of them."""
    return x.expand(*common_shape([each.shape[:-2] for each in (x, *others)]), *x.shape[-2:])


def _log_kept(decay: Tensor) -> Tensor:
    """G_ts of decays [*, C]: [*, C, C], -inf where s > t; masked before it meets exp."""
    size = decay.shape[-1]
    later = torch.ones(size, size, dtype=torch.bool, device=decay.device)
    # [*, s, t]: running sums along t that begin after s.
    sums = torch.where(later.triu(1), decay[..., None, :], 0).cumsum(-1)
    return torch.where(later.triu(), sums, -torch.inf).mT


def _by_channel(x: Tensor, y: Tensor, decay: Tensor) -> Tensor:
    """A(x, y) with a decay for each channel, [*, C, d] each: halves, and halves of halves.

    A pair in different halves is split at the middle: x e^(sum from the middle) and y e^(sum to the
    middle) are both bounded by x and y, whatever the decay, and one matrix product does them all.
    """
    size = x.shape[-2]
    if size == 1:  # pair by pair from 8 tokens on took twice as long
        return (x * y).sum(-1, keepdim=True)
    half = size // 2
    (x0, x1), (y0, y1), (g0, g1) = (z.split([half, size - half], -2) for z in (x, y, decay))
    to_middle = after(g0[..., 1:, :])
    below = (x1 * g1.cumsum(-2).exp()) @ (y0 * to_middle.exp()).mT
    above = below.new_zeros(()).expand(*below.shape[:-2], half, size - half)
    if size % 2 == 0:
        both = _by_channel(*(z.unflatten(-2, (2, half)) for z in (x, y, decay)))
        first, second = both.unbind(-3)
    else:
        first, second = _by_channel(x0, y0, g0), _by_channel(x1, y1, g1)
    top, bottom = torch.cat([first, above], -1), torch.cat([below, second], -1)
    return torch.cat([top, bottom], -2)
