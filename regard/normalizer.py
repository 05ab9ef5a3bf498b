"""Normalizers: how one row of logits becomes one row of weights.

Each is written twice. `whole` is the textbook formula on whole rows; the dense form uses it. The
monoid (`neutral`, `absorb`, `merge`, `finish`) reaches the same weights when a row arrives in
pieces, from tiles, threads or machines; `weights` and `pullback` redo one tile for looking and for
the backward pass. After KeOps' reductions (Charlier et al. 2021, arXiv:2004.11127).

A logit of -inf is a pair that is not there: its weight is 0, and a row without pairs is all 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from regard import errors, grouped
from regard.part import Part


class State(NamedTuple):
    """What is known of some rows after some of their keys.

    peak [*, r] largest logit so far; total [*, r] sum of unnormalised weights relative to it;
    output [*, r, e] the same sum of weights times values.
    """

    peak: Tensor
    total: Tensor
    output: Tensor


class Row(NamedTuple):
    """What is known of finished rows, [*, r] each: weight_ij = u(logit_ij - peak_i) / total_i.

    Two numbers and not their one logsumexp: near the peak, logit - peak is exact, while logit -
    logsumexp carries the rounding of the logsumexp into every weight of the row.
    """

    peak: Tensor
    total: Tensor


class Normalizer(Part):
    """Base of all normalizers: weight_ij = u(logit_ij) / Z_i."""

    sums_to_one: ClassVar[bool] = False
    """Whether the weights of a row with visible keys sum to 1."""
    by_pair: ClassVar[bool] = False
    """Whether each weight depends on its own logit alone, so that nothing is kept of a row."""
    couples: ClassVar[bool] = False
    """Whether the gradient of a logit depends on the gradients of its row's other weights."""

    def whole(self, logits: Tensor) -> Tensor:
        """Weights of whole rows of logits [*, r, m]: the definition."""
        raise NotImplementedError

    def neutral(self, shape: tuple[int, ...], output: Tensor, dtype: torch.dtype) -> State:
        """Return the state before any key: `shape` [*, r], zeros `output` [*, r, e].

        Sums have the dtype of `output`, the peak `dtype`, that of the logits.
        """
        peak = output.new_full(shape, float("-inf"), dtype=dtype)
        return State(peak, output.new_zeros(shape), output)

    def absorb(self, state: State, logits: Tensor, value: Tensor, drop: Tensor | None) -> State:
        """Take in a tile: logits [*, r, c], value [*, c, e], dropout factors [*, r, c] or None."""
        weights = self._unnormalised(logits)
        return State(
            state.peak,
            state.total + self._total(logits, weights),
            state.output + grouped.matmul(weights if drop is None else weights * drop, value),
        )

    def merge(self, one: State, other: State) -> State:
        """Return the state after the keys of both: associative and commutative."""
        return State(one.peak, one.total + other.total, one.output + other.output)

    def finish(self, state: State) -> tuple[Tensor, Row]:
        """Return output [*, r, e], and what weights can be redone from."""
        return state.output, Row(state.peak, state.total)

    def weights(self, logits: Tensor, row: Row) -> Tensor:
        """Weights of a tile [*, r, c] from its logits and its rows."""
        return self._unnormalised(logits)

    def row_gradient(self, row: Row, delta: Tensor, dtotal: Tensor | None) -> Tensor:
        """What `pullback` needs of whole rows, [*, r].

        delta_i = sum_j weight_ij dweight_ij; dtotal: gradient of row.total from above
        """
        return torch.zeros_like(delta)

    def pullback(
        self, logits: Tensor, weights: Tensor, dweights: Tensor, row: Row, drow: Tensor
    ) -> Tensor:
        """Gradient of a tile's logits from that of its weights; drow from `row_gradient`."""
        raise NotImplementedError

    def own_gradients(self, row: Row, drow: Tensor) -> tuple[Tensor, ...]:
        """Gradients of the normalizer's own tensors, before sums over broadcast axes."""
        return ()

    def _unnormalised(self, logits: Tensor) -> Tensor:
        raise NotImplementedError

    def _total(self, logits: Tensor, weights: Tensor) -> Tensor:
        """What a tile adds to Z_i: nothing, where pairs are weighed each for itself."""
        return logits.new_zeros(())


@dataclass(frozen=True, eq=False, repr=False)
class Softmax(Normalizer):
    """weight_ij = exp(logit_ij) / (sum_j exp(logit_ij) + exp(sink)); without a sink, no last term.

    sink: a logit per head that takes weight and gives no value, a number or a tensor that
        broadcasts to [*batch, heads]; sink=0.0 is "softmax plus one"
    The sum may run over tiles: state (m, s) stands for e^m s (Milakov, Gimelshein 2018,
    arXiv:1805.02867, algorithm 3). Sinks: Miller 2023, "Attention is off by one"; Xiao et al.
    2023, arXiv:2309.17453.

    >>> Softmax().whole(torch.tensor([0.0, 0.0, -torch.inf]))
    tensor([0.5000, 0.5000, 0.0000])
    >>> Softmax(sink=0.0).whole(torch.tensor([0.0, 0.0, -torch.inf]))
    tensor([0.3333, 0.3333, 0.0000])
    """

    sink: float | Tensor | None = None

    couples: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.sink is not None:
            errors.check_scale("Softmax's sink", self.sink)

    @property
    def sums_to_one(self) -> bool:  # type: ignore[override]
        """True without a sink."""
        return self.sink is None

    def whole(self, logits: Tensor) -> Tensor:
        if logits.shape[-1] == 0:
            return logits
        peak = logits.detach().amax(-1, keepdim=True)
        if self.sink is not None:
            sink = self._sink(peak[..., 0])[..., None]
            peak = torch.maximum(peak, sink.detach())
        peak = torch.where(peak == -torch.inf, 0, peak)
        exponentials = (logits - peak).exp()
        total = exponentials.sum(-1, keepdim=True)
        if self.sink is not None:
            total = total + (sink - peak).exp()
        return exponentials / torch.where(total == 0, 1, total)

    def absorb(self, state: State, logits: Tensor, value: Tensor, drop: Tensor | None) -> State:
        peak = torch.maximum(state.peak, logits.amax(-1)) if logits.shape[-1] else state.peak
        base = _finite(peak)
        weights = (logits - base[..., None]).exp_()
        decay = (state.peak - base).exp_()
        total = state.total * decay + weights.sum(-1)
        if drop is not None:
            weights = weights * drop
        output = state.output * decay[..., None] + grouped.matmul(weights, value)
        return State(peak, total, output)

    def merge(self, one: State, other: State) -> State:
        peak = torch.maximum(one.peak, other.peak)
        base = _finite(peak)
        a, b = (one.peak - base).exp(), (other.peak - base).exp()
        output = one.output * a[..., None] + other.output * b[..., None]
        return State(peak, one.total * a + other.total * b, output)

    def finish(self, state: State) -> tuple[Tensor, Row]:
        if self.sink is not None:
            sink = self._sink(state.peak).expand_as(state.peak)
            weightless = State(sink, torch.ones_like(sink), torch.zeros_like(state.output))
            state = self.merge(state, weightless)
        return state.output * _inverse(state.total)[..., None], Row(state.peak, state.total)

    def weights(self, logits: Tensor, row: Row) -> Tensor:
        return (logits - _finite(row.peak)[..., None]).exp() * _inverse(row.total)[..., None]

    def row_gradient(self, row: Row, delta: Tensor, dtotal: Tensor | None) -> Tensor:
        return -delta if dtotal is None else dtotal * row.total - delta

    def pullback(
        self, logits: Tensor, weights: Tensor, dweights: Tensor, row: Row, drow: Tensor
    ) -> Tensor:
        return weights * (dweights + drow[..., None])

    def own_gradients(self, row: Row, drow: Tensor) -> tuple[Tensor, ...]:
        if not isinstance(self.sink, Tensor):
            return ()
        weight = (self._sink(row.peak) - _finite(row.peak)).exp() * _inverse(row.total)
        return (weight * drow,)

    def _sink(self, like: Tensor) -> Tensor:
        """Return the sink as [*batch, heads, 1] next to rows [*batch, heads, r]."""
        if isinstance(self.sink, Tensor):
            return self.sink.to(like.dtype)[..., None]
        return like.new_full((), float("-inf") if self.sink is None else self.sink)


@dataclass(frozen=True, eq=False, repr=False)
class Sigmoid(Normalizer):
    """weight_ij = 1 / (1 + exp(-(logit_ij + bias))): each pair for itself.

    bias: -log(m) starts a layer near softmax's scale
    Ramapuram et al. 2024, arXiv:2409.04431, eq. 2.

    >>> Sigmoid().whole(torch.tensor([0.0, -torch.inf]))
    tensor([0.5000, 0.0000])
    """

    bias: float = 0.0

    by_pair: ClassVar[bool] = True

    def __post_init__(self) -> None:
        errors.check_number("Sigmoid's bias", self.bias)

    def whole(self, logits: Tensor) -> Tensor:
        return torch.sigmoid(logits + self.bias)

    def pullback(
        self, logits: Tensor, weights: Tensor, dweights: Tensor, row: Row, drow: Tensor
    ) -> Tensor:
        return dweights * weights * (1 - weights)

    def _unnormalised(self, logits: Tensor) -> Tensor:
        return torch.sigmoid(logits + self.bias)


@dataclass(frozen=True, eq=False, repr=False)
class Relu(Normalizer):
    """weight_ij = max(logit_ij, 0), divided by the number of visible keys if `mean`.

    Wortsman et al. 2023, arXiv:2309.08586, section 3 (mean=True: their L^-1 relu).

    >>> Relu(mean=True).whole(torch.tensor([3.0, -1.0, -torch.inf]))
    tensor([1.5000, 0.0000, 0.0000])
    """

    mean: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.mean, bool):
            raise errors.DtypeError(f"Relu's mean must be True or False, not {self.mean!r}.")

    @property
    def by_pair(self) -> bool:  # type: ignore[override]
        """True without the mean."""
        return not self.mean

    def whole(self, logits: Tensor) -> Tensor:
        count = (logits != -torch.inf).sum(-1, keepdim=True).clamp(min=1) if self.mean else 1
        return torch.relu(logits) / count

    def finish(self, state: State) -> tuple[Tensor, Row]:
        output, row = super().finish(state)
        return output * _inverse(row.total)[..., None] if self.mean else output, row

    def weights(self, logits: Tensor, row: Row) -> Tensor:
        weights = torch.relu(logits)
        return weights * _inverse(row.total)[..., None] if self.mean else weights

    def pullback(
        self, logits: Tensor, weights: Tensor, dweights: Tensor, row: Row, drow: Tensor
    ) -> Tensor:
        if self.mean:
            dweights = dweights * _inverse(row.total)[..., None]
        return torch.where(logits > 0, dweights, 0)

    def _unnormalised(self, logits: Tensor) -> Tensor:
        return torch.relu(logits)

    def _total(self, logits: Tensor, weights: Tensor) -> Tensor:
        return (logits != -torch.inf).sum(-1).to(logits.dtype)


@dataclass(frozen=True, eq=False, repr=False)
class RowSum(Normalizer):
    """weight_ij = logit_ij / (sum_j logit_ij + eps); all 0 where that sum is 0.

    The normalizer of linear attention, whose scores are positive; eps=1e-6 is the convention of
    Katharopoulos et al. 2020 (arXiv:2006.16236) in their code, 0 that of their eq. 4.

    >>> RowSum().whole(torch.tensor([1.0, 3.0]))
    tensor([0.2500, 0.7500])
    """

    eps: float = 0.0

    couples: ClassVar[bool] = True

    def __post_init__(self) -> None:
        errors.check_number("RowSum's eps", self.eps, least=0)

    @property
    def sums_to_one(self) -> bool:  # type: ignore[override]
        """True without eps."""
        return self.eps == 0

    def whole(self, logits: Tensor) -> Tensor:
        present = _present(logits)
        total = present.sum(-1, keepdim=True) + self.eps
        return torch.where(total == 0, 0, present / torch.where(total == 0, 1, total))

    def finish(self, state: State) -> tuple[Tensor, Row]:
        total = state.total + self.eps
        return state.output * _inverse(total)[..., None], Row(state.peak, total)

    def weights(self, logits: Tensor, row: Row) -> Tensor:
        return _present(logits) * _inverse(row.total)[..., None]

    def row_gradient(self, row: Row, delta: Tensor, dtotal: Tensor | None) -> Tensor:
        own = -delta * _inverse(row.total)
        return own if dtotal is None else own + dtotal

    def pullback(
        self, logits: Tensor, weights: Tensor, dweights: Tensor, row: Row, drow: Tensor
    ) -> Tensor:
        dlogits = dweights * _inverse(row.total)[..., None] + drow[..., None]
        return torch.where(logits == -torch.inf, 0, dlogits)

    def _unnormalised(self, logits: Tensor) -> Tensor:
        return _present(logits)

    def _total(self, logits: Tensor, weights: Tensor) -> Tensor:
        return weights.sum(-1)


@dataclass(frozen=True, eq=False, repr=False)
class Identity(Normalizer):
    """weight_ij = logit_ij: the scores themselves, unnormalised.

    >>> Identity().whole(torch.tensor([1.0, -3.0]))
    tensor([ 1., -3.])
    """

    by_pair: ClassVar[bool] = True

    def whole(self, logits: Tensor) -> Tensor:
        return _present(logits)

    def pullback(
        self, logits: Tensor, weights: Tensor, dweights: Tensor, row: Row, drow: Tensor
    ) -> Tensor:
        return torch.where(logits == -torch.inf, 0, dweights)

    def _unnormalised(self, logits: Tensor) -> Tensor:
        return _present(logits)


def _present(logits: Tensor) -> Tensor:
    """Logits that are weights themselves: 0 for a pair that is not there."""
    return torch.where(logits == -torch.inf, 0, logits)


def _finite(peak: Tensor) -> Tensor:
    """Subtract 0 instead of -inf from a row without pairs: its exponentials are then 0, not NaN."""
    return torch.where(peak == -torch.inf, 0, peak)


def _inverse(total: Tensor) -> Tensor:
    """1 / total, and 0 for a row whose total is 0: its weights are all 0."""
    return torch.where(total == 0, 0, 1 / torch.where(total == 0, 1, total))
