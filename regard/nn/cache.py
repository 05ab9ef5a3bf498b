"""What a layer keeps of the tokens so far, so that the next ones cost no second pass over them.

`layer.state()` makes an empty one of the right kind, `layer(x, state=state)` takes in any number of
tokens and `layer.step(x, state)` one: the outputs are those of the whole sequence at once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from regard import errors
from regard.dropout import Dropout
from regard.features import Features
from regard.form.recurrent import recur
from regard.mask import Causal, Mask, Prefix, Window
from regard.matrix import Attention, attention
from regard.normalizer import Normalizer
from regard.position import Position, Positions, Rotary
from regard.position.base import terms
from regard.score import Score


@dataclass(frozen=True)
class Parts:
    """What a layer computes with."""

    score: Score | Any
    position: Position | None
    normalizer: Normalizer
    dropout: Dropout | None


class State:
    """Base of both kinds: `length` tokens were taken in so far."""

    def __init__(self) -> None:
        self.length = 0

    def attend(
        self, parts: Parts, query: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Attention]:
        """Take in n tokens, [*batch, heads, n, d] each: their outputs, and their matrix."""
        raise NotImplementedError

    def tensors(self) -> tuple[Tensor, ...]:
        """What is kept."""
        raise NotImplementedError

    @property
    def bytes(self) -> int:
        """The size of what is kept."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors())

    def reorder(self, index: Tensor) -> None:
        """Go on with other batch entries, as a beam search does: entry b becomes index[b]."""
        raise NotImplementedError

    def _check_batch(self, key: Tensor) -> None:
        """Raise ShapeError unless new keys are of the sequences that are kept."""
        for kept in self.tensors():
            if kept.shape[:-3] != key.shape[:-3]:
                raise errors.ShapeError(
                    f"this {type(self).__name__} has taken in {self.length} tokens of sequences "
                    f"{errors.show(kept.shape[:-3])}, but the next tokens are of sequences "
                    f"{errors.show(key.shape[:-3])} (all axes before [heads, tokens, width]); "
                    "begin other sequences with a new state, or pick and repeat its own with "
                    "state.reorder(index)."
                )


class KVCache(State):
    """Keys and values of the tokens so far; it grows with them, unless there is a window.

    Keys are kept as they were before any rotation, in as many heads as keys have.

    left: how many tokens before its own a token sees, as in `Window(left, 0)`; None for all
    sinks: how many of the first tokens stay visible (Xiao et al. 2023, arXiv:2309.17453)
    Positions stay those of the text. Where keys are dropped this needs parts that know relative
    positions alone; beside sinks, `Rotary`.

    >>> from regard.nn import SelfAttention
    >>> layer, x = SelfAttention(16, 4, num_kv_heads=2), torch.randn(1, 10, 16)
    >>> cache = layer.state()
    >>> first, _ = layer(x[:, :9], state=cache)
    >>> last = layer.step(x[:, 9], cache)
    >>> torch.allclose(last, layer(x, mask=Causal())[0][:, 9], atol=1e-5)
    True
    """

    def __init__(self, left: int | None = None, sinks: int = 0) -> None:
        super().__init__()
        if left is not None:
            errors.check_number("KVCache's left", left, whole=True, least=0)
        errors.check_number("KVCache's sinks", sinks, whole=True, least=0)
        if sinks and left is None:
            raise ValueError("KVCache keeps all tokens without a window; sinks need left.")
        self.left, self.sinks = left, sinks
        self._first = _Rows()  # the sinks
        self._last = _Rows()

    def tensors(self) -> tuple[Tensor, ...]:
        return (*self._first.buffers, *self._last.buffers)

    def reorder(self, index: Tensor) -> None:
        for rows in (self._first, self._last):
            rows.buffers = tuple(buffer[index] for buffer in rows.buffers)

    def attend(
        self, parts: Parts, query: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Attention]:
        n = key.shape[-2]
        self._check(parts)
        self._check_batch(key)
        early = max(min(self.sinks - self.length, n), 0)
        sinks = self._first.extended(key[..., :early, :], value[..., :early, :], None)
        kept, values = self._last.extended(key[..., early:, :], value[..., early:, :], self.left)
        self.length += n
        tokens = torch.arange(self.length - kept.shape[-2], self.length, device=key.device)
        if self.sinks:
            kept, values = (torch.cat(x, -2) for x in zip(sinks, (kept, values), strict=True))
            first = torch.arange(sinks[0].shape[-2], device=key.device)
            tokens = torch.cat([first, tokens])
        before = kept.shape[-2] - n
        score = parts.score
        matrix = attention(
            query,
            kept,
            score=score.at(before) if isinstance(score, Features) else score,
            position=placed(parts.position, tokens, before, exact=self.left is not None),
            mask=self._mask(before),
            normalizer=parts.normalizer,
            dropout=parts.dropout,
        )
        return matrix.matmul(values), matrix

    def _mask(self, before: int) -> Mask:
        if self.left is None:
            return Causal(before)
        near: Mask = Window(self.left, 0, before)
        return near | (Prefix(self.sinks) & Causal(before)) if self.sinks else near

    def _check(self, parts: Parts) -> None:
        if self.left is None:
            return
        for part in terms(parts.position):
            fits = isinstance(part, Rotary) or (not self.sinks and part.shift_invariant)
            if not fits:
                raise errors.FormError(
                    f"KVCache(left={self.left}, sinks={self.sinks}) drops keys, and {part} must "
                    "know where all of them stood; without sinks, parts of relative positions "
                    "work (Rotary, Alibi, T5, ...), beside sinks Rotary, and with left=None all."
                )
        if isinstance(parts.score, Features) and parts.score.recurs:
            raise errors.FormError(
                f"KVCache(left={self.left}) drops keys, and {parts.score} depends on all tokens "
                "between; RecurrentState() keeps it in constant memory."
            )


class RecurrentState(State):
    """The state of a recurrence, [*batch, heads, d, e]: of constant size, however many tokens.

    For layers whose scores are `Features` under `RowSum` or `Identity`.

    >>> from regard import Features, RowSum
    >>> from regard.nn import SelfAttention
    >>> layer = SelfAttention(16, 4, score=Features(), normalizer=RowSum())
    >>> state = layer.state()
    >>> output, _ = layer(torch.randn(1, 10, 16), state=state)
    >>> state.length, state.bytes  # 4 heads of 4 x (4 + 1) numbers
    (10, 320)
    """

    def __init__(self) -> None:
        super().__init__()
        self.state: Tensor | None = None

    def tensors(self) -> tuple[Tensor, ...]:
        return () if self.state is None else (self.state,)

    def reorder(self, index: Tensor) -> None:
        self.state = None if self.state is None else self.state[index]

    def attend(
        self, parts: Parts, query: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Attention]:
        self._check_batch(key)
        tokens = torch.arange(self.length, self.length + key.shape[-2], device=key.device)
        matrix = attention(
            query,
            key,
            score=parts.score,
            position=placed(parts.position, tokens, 0, exact=True),
            mask=Causal(),
            normalizer=parts.normalizer,
            dropout=parts.dropout,
        )
        output, self.state = recur(matrix, value, self.state)
        self.length += key.shape[-2]
        return output, matrix


def placed(
    position: Position | None, tokens: Tensor, offset: int, *, exact: bool
) -> Position | None:
    """The position part where key j is token tokens[j] and query i stands at key i + offset.

    exact: rotations by the tokens' own numbers, which keys that were dropped do not change
    """
    if position is None:
        return None
    if not exact:
        return position.at(offset)
    parts: list[Position] = []
    for part in terms(position):
        if isinstance(part, Rotary):
            known = part.positions
            axis = -part.trailing["positions"]
            where = tokens if known is None else known.index_select(axis, tokens)
            parts.append(replace(part, positions=where, offset=offset))
        else:
            parts.append(part.at(offset))
    return parts[0] if len(parts) == 1 else Positions(tuple(parts))


class _Rows:
    """Rows that are added at the end and dropped at the beginning, without a copy for each."""

    def __init__(self) -> None:
        self.buffers: tuple[Tensor, ...] = ()
        self.start = self.stop = 0

    def extended(self, key: Tensor, value: Tensor, left: int | None) -> tuple[Tensor, Tensor]:
        """All rows, of the old ones at most `left`, and then the new ones."""
        new, n = (key, value), key.shape[-2]
        if left is not None:
            self.start = max(self.start, self.stop - left)
        if not self.buffers:
            self.buffers = tuple(x[..., :0, :] for x in new)
        if torch.is_grad_enabled():  # a graph may hold the old rows, which stay as they are
            held = [buffer[..., self.start : self.stop, :] for buffer in self.buffers]
            self.buffers = tuple(torch.cat(x, -2) for x in zip(held, new, strict=True))
            self.start, self.stop = 0, self.buffers[0].shape[-2]
            return self.buffers[0], self.buffers[1]
        kept = self.stop - self.start
        fixed = self.buffers[0].is_inference() and not torch.is_inference_mode_enabled()
        if fixed or self.stop + n > self.buffers[0].shape[-2]:
            room = kept + n if left is None else min(left, kept + n) + n
            self.buffers = tuple(self._moved(x, kept + n + room) for x in self.buffers)
            self.start, self.stop = 0, kept
        for buffer, x in zip(self.buffers, new, strict=True):
            buffer[..., self.stop : self.stop + n, :] = x
        self.stop += n
        held = [buffer[..., self.start : self.stop, :] for buffer in self.buffers]
        return held[0], held[1]

    def _moved(self, buffer: Tensor, capacity: int) -> Tensor:
        held = buffer[..., self.start : self.stop, :]
        room = held.new_zeros(*held.shape[:-2], capacity - held.shape[-2], held.shape[-1])
        return torch.cat([held, room], -2)
