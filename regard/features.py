"""Scores that factorise, and so the whole family of recurrent attention, as one part.

    score_ij = phi(q_i)^T M_i M_(i-1) ... M_(j+1) phi(k_j)

The M_t say what happens to the memory at each token: it decays, and what is written over is erased.
Without either it is linear attention; `regard.form.recurrent` computes all of it in time O(n).
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace
from types import FunctionType
from typing import ClassVar, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from regard import errors, grouped
from regard.feature_map import FeatureMap, elu_plus_one
from regard.part import per_head
from regard.score import Score

AXES = "[*batch, heads, tokens or 1, features or 1]"


class Erasing(NamedTuple):
    """The erasing of each token, [*batch, heads, tokens, features] each: see `Features`."""

    read: Tensor
    write: Tensor


@dataclass(frozen=True, eq=False, repr=False)
class Features(Score):
    """Linear attention: s_ij = scale phi(q_i) . phi(k_j), with decay and the delta rule if given.

    A causal product with such scores is a recurrence with a state of constant size,
        S_t = (I + write_t read_t^T) diag(e^log_decay_t) S_(t-1) + phi(k_t) v_t^T,
        output_t = scale S_t^T phi(q_t),
    and `RowSum()` divides by the same recurrence of v_t = 1. With decay or erasing, keys after the
    query have score 0, and rows are tokens: query i is token i + offset, among the keys.

    map: phi, a function [*, width] -> [*, features]: one of `regard.feature_map`, or your own
    key_map: phi of the keys, if it is another one
    scale: a number, or a tensor that broadcasts to [*batch, heads]
    log_decay: at most 0, a number or a tensor of [*batch, heads, tokens or 1, features or 1]:
        [heads, 1, 1] is RetNet, [*batch, heads, tokens, 1] Mamba-2 and simple GLA, and
        [*batch, heads, tokens, features] GLA. -inf forgets all that came before.
    beta: [*batch, heads, tokens or 1, 1], or a number: the delta rule. Writes beta_t k_t and erases
        with read_t = phi(k_t), write_t = -beta_t phi(k_t), so that with |phi(k_t)| = 1 and beta = 1
        the value bound to k_t is replaced. DeltaNet; with a decay Gated DeltaNet or KDA.
    erase: any other (read, write), [*batch, heads, tokens, features] each. RWKV-7, which reads the
        state before its decay, is read = -kappa e^-log_decay.
    offset: token of the first query, where queries continue a sequence of cached keys

    Cost, pair by pair: 2 f flops for f features, 2 more with a decay, 4 f with one for each
    channel, 7 f with erasing; see `regard.form.recurrent` for O(n).
    Katharopoulos et al. 2020, arXiv:2006.16236; Sun et al. 2023 (RetNet), arXiv:2307.08621; Dao, Gu
    2024 (Mamba-2), arXiv:2405.21060; Yang et al. 2024 (GLA, DeltaNet, Gated DeltaNet),
    arXiv:2312.06635, arXiv:2406.06484, arXiv:2412.06464; Kimi Team 2025 (KDA), arXiv:2510.26692.
    Raises ShapeError where widths, heads or tokens do not fit.

    >>> import regard
    >>> from regard import Causal, RowSum
    >>> query, key, value = torch.randn(3, 2, 8, 100, 16).unbind(0)
    >>> A = regard.attention(query, key, score=Features(), mask=Causal(), normalizer=RowSum())
    >>> (A @ value).shape, A.explain(value).form
    (torch.Size([2, 8, 100, 16]), 'recurrent')
    """

    map: FeatureMap = elu_plus_one
    key_map: FeatureMap | None = None
    scale: float | Tensor = 1.0
    log_decay: float | Tensor | None = None
    beta: float | Tensor | None = None
    erase: tuple[Tensor, Tensor] | None = None
    offset: int = 0

    trailing: ClassVar[dict[str, int]] = {"log_decay": 2, "beta": 2, "erase": 2}

    def __post_init__(self) -> None:
        errors.check_scale("Features' scale", self.scale)
        errors.check_number("Features' offset", self.offset, whole=True)
        for name, map in (("map", self.map), ("key_map", self.key_map)):
            if map is not None and not callable(map):
                raise errors.DtypeError(
                    f"Features' {name} must be a function [*, width] -> [*, features], such as "
                    f"regard.feature_map.elu_plus_one, not {map!r}."
                )
        for name, given in (("log_decay", self.log_decay), ("beta", self.beta)):
            if isinstance(given, Tensor):
                errors.check_tensor(f"Features' {name}", given, shape=AXES)
            elif given is not None:
                errors.check_number(f"Features' {name}", given)
        decay = self.log_decay
        if not isinstance(decay, Tensor) and decay is not None and not decay <= 0:
            raise ValueError(
                f"Features' log_decay is the natural logarithm of what is kept, at most 0, not "
                f"{decay!r}; to keep 0.9 of the state at each token give math.log(0.9)."
            )
        if self.erase is not None:
            if self.beta is not None:
                raise ValueError(
                    "Features takes beta or erase, not both: beta is erase=(k, -beta k), with "
                    "beta k written in place of k."
                )
            object.__setattr__(self, "erase", tuple(self.erase))
            for given in self.erase:
                errors.check_tensor("Features' erase", given, shape=AXES)

    @property
    def foreign(self) -> bool:  # type: ignore[override]
        """True for maps that may hold tensors: all but functions without closure and defaults."""
        return not (_is_plain(self.map) and (self.key_map is None or _is_plain(self.key_map)))

    @property
    def recurs(self) -> bool:
        """Whether the tokens between a key and a query matter to their score."""
        return self.log_decay is not None or self.erases

    @property
    def erases(self) -> bool:
        """Whether the state is erased by more than a decay."""
        return self.beta is not None or self.erase is not None

    @property
    def whole_rows(self) -> bool:  # type: ignore[override]
        """True where the score of a pair depends on the keys between."""
        return self.erases

    def prepare(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        return self.map(query), self.map(key) if self.key_map is None else self.key_map(key)

    def scaled(self, query: Tensor) -> Tensor:
        """Prepared queries times the scale: n f products instead of n m."""
        scale = self.scale
        if isinstance(scale, Tensor):
            return query * per_head(scale, query)
        return query if scale == 1 else query * scale

    def pair(self, query: Tensor, key: Tensor, i: Tensor, j: Tensor) -> Tensor:
        query = self.scaled(query)
        if self.erases:
            return self._rows(query, key, i + self.offset)
        decay = self.decay(key)
        if decay is None:
            return grouped.matmul(query, key.mT)
        kept = log_kept(decay, i + self.offset, j).exp().to(query.dtype)  # [*, h, r, c, f or 1]
        if kept.shape[-1] == 1:
            return grouped.matmul(query, key.mT) * kept[..., 0]
        key = grouped.match(key, errors.heads_of(query))
        return (query[..., :, None, :] * key[..., None, :, :] * kept).sum(-1)

    def _rows(self, query: Tensor, key: Tensor, i: Tensor) -> Tensor:
        """Scores of whole rows, from the last key to the first: w_i = (M_i ... M_(j+1))^T q_i."""
        key = grouped.match(key, errors.heads_of(query))
        read, write = self.erasing(key)
        written, decay = self.written(key), self.decay(key)
        kept = key.new_ones(1, 1) if decay is None else decay.exp().to(key.dtype)
        tokens = key.shape[-2]
        kept = kept.expand(*kept.shape[:-2], tokens, kept.shape[-1])
        w, scores = query, [query[..., :0].sum(-1)] * tokens
        for t in reversed(range(tokens)):
            seen = i >= t
            at = slice(t, t + 1)
            scores[t] = torch.where(seen, (w * written[..., at, :]).sum(-1), 0)
            erased = w + read[..., at, :] * (w * write[..., at, :]).sum(-1, keepdim=True)
            w = torch.where(seen[:, None], kept[..., at, :] * erased, w)
        return torch.stack(scores, -1) if tokens else grouped.matmul(query, key.mT)

    def decay(self, key: Tensor) -> Tensor | None:
        """log_decay as a tensor [*, tokens or 1, features or 1], in float32 at least."""
        if self.log_decay is None:
            return None
        dtype = torch.promote_types(key.dtype, torch.float32)
        decay = torch.as_tensor(self.log_decay, dtype=dtype, device=key.device)
        return decay if decay.dim() else decay[None, None]

    def erasing(self, key: Tensor) -> Erasing:
        """What prepared keys erase; only where `erases`."""
        if self.erase is not None:
            read, write = (side.to(key.dtype) for side in self.erase)
            return Erasing(read, write)
        return Erasing(key, -self.written(key))

    def written(self, key: Tensor) -> Tensor:
        """Prepared keys as they are written."""
        if self.beta is None:
            return key
        return key * (self.beta.to(key.dtype) if isinstance(self.beta, Tensor) else self.beta)

    def at(self, offset: int) -> Features:
        """The same score where the first query is token `offset`."""
        return replace(self, offset=offset)

    def check(self, query: Tensor, key: Tensor) -> None:
        if self.key_map is None:
            errors.check_width(query, key, self)
        else:
            one, other = _width(self.map, query), _width(self.key_map, key)
            if one != other:
                raise errors.ShapeError(
                    f"{self} maps queries to {one} features and keys to {other}; their dot product "
                    "needs as many of both."
                )
        if self.recurs:
            self._check_tokens(query, key)

    def _check_tokens(self, query: Tensor, key: Tensor) -> None:
        n, m = query.shape[-2], key.shape[-2]
        if self.offset < 0 or n + self.offset > m:
            raise errors.ShapeError(
                f"{self} has queries at tokens {self.offset} to {self.offset + n - 1}, but keys of "
                f"the tokens 0 to {m - 1}; with decay or erasing each query must be one of these "
                "tokens. Give score.at(keys - queries) for the last of them."
            )
        features = _width(self.map, query)
        told = [
            ("log_decay", self.log_decay, {1, m}, {1, features}),
            ("beta", self.beta, {1, m}, {1}),
        ]
        for name, side in zip(("read", "write"), self.erase or (), strict=False):
            told.append((f"erase's {name}", side, {m}, {features}))
        for name, given, tokens, wide in told:
            if isinstance(given, Tensor) and not (
                given.shape[-2] in tokens and given.shape[-1] in wide
            ):
                wanted = ", ".join(" or ".join(map(str, sorted(sizes))) for sizes in (tokens, wide))
                raise errors.ShapeError(
                    f"Features' {name} has shape {errors.show(given.shape)}, but there are {m} "
                    f"tokens and {features} features; it must be [*batch, heads, {wanted}]."
                )

    @property
    def by_channel(self) -> bool:
        """Whether each channel has a decay of its own."""
        return isinstance(self.log_decay, Tensor) and self.log_decay.shape[-1] > 1

    def numbers_per_pair(self, width: int) -> int:
        if isinstance(self.log_decay, Tensor) and self.by_channel:
            return 3 * self.log_decay.shape[-1]
        return 1 if self.log_decay is None else 3

    def compared(self, query: Tensor) -> int:
        return _width(self.map, query)

    def flops_per_pair(self, width: int) -> int:
        if self.erases:  # two dot products, a vector that is added and one that is multiplied
            return 7 * width
        if self.by_channel:  # two products, an exponential and a sum
            return 4 * width
        return 2 * width + (0 if self.log_decay is None else 2)


def _is_plain(map: FeatureMap) -> bool:
    if not isinstance(map, FunctionType):
        return False
    return not (map.__closure__ or map.__defaults__ or map.__kwdefaults__)


def _width(map: FeatureMap, x: Tensor) -> int:
    """How many features a vector has: the map is called once for each width."""
    known: dict[int, int] = {}
    if not torch.compiler.is_compiling():
        with suppress(TypeError):  # of what has no hash, or no weak references
            known = _WIDTHS.setdefault(map, known)
    if x.shape[-1] not in known:
        with torch.no_grad():
            known[x.shape[-1]] = map(x.new_zeros(*x.shape[:-2], 1, x.shape[-1])).shape[-1]
    return known[x.shape[-1]]


_WIDTHS: WeakKeyDictionary[FeatureMap, dict[int, int]] = WeakKeyDictionary()


def log_kept(log_decay: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """Sum of log_decay over tokens j + 1 to i: [*, tokens or 1, f] -> [*, r, c, f]; -inf if j > i.

    Each sum is added up by itself, from numbers of one sign: differences of running sums have no
    digits left after a strong decay, and are NaN after -inf.

    >>> log_kept(torch.tensor([[9.0], [-1.0], [-2.0]]), torch.tensor([1, 2]), torch.tensor([0, 1]))
    tensor([[[-1.],
             [ 0.]],
    <BLANKLINE>
            [[-3.],
             [-2.]]])
    """
    sees = (i[:, None] >= j)[..., None]
    steps = (i[:, None] - j)[..., None]
    if log_decay.shape[-2] == 1:
        total = torch.where(steps == 0, 0, log_decay[..., None, :] * steps)
    elif 0 in (i.numel(), j.numel()):
        total = log_decay[..., :1, None, :].expand(*log_decay.shape[:-2], *steps.shape[:2], -1)
    else:
        first, middle, last = int(j.min()), int(j.max()), int(i.max())
        if int(i.min()) >= middle:  # the tile is below the diagonal: two vectors of sums say all
            to_middle = after(log_decay[..., first + 1 : middle + 1, :])
            more = log_decay[..., middle + 1 : last + 1, :].cumsum(-2)
            more = torch.cat([torch.zeros_like(log_decay[..., :1, :]), more], -2)
            return more[..., i - middle, None, :] + to_middle[..., None, j - first, :]
        between = torch.arange(first + 1, max(last, first) + 1, device=i.device)
        passed = (between <= i[:, None])[..., None]
        rows = torch.where(passed, log_decay[..., None, between, :], 0)
        total = after(rows)[..., (j - first).clamp(max=between.numel()), :]
    return torch.where(sees, total, -torch.inf)


def after(x: Tensor) -> Tensor:
    """Sums over axis -2 of what comes after each place, from before the first to after the last."""
    return F.pad(x.flip(-2).cumsum(-2).flip(-2), (0, 0, 0, 1))
