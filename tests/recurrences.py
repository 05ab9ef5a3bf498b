"""Recurrences to compare: random tokens, and what comes of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from regard.form import scan
from regard.form.chunks import Tokens
from regard.kernel.recurrence import How

EPS = torch.finfo(torch.float64).eps
INF = torch.inf
WEIGHTS = How(None)


@dataclass(frozen=True)
class Case:
    """A recurrence of random tokens; lanes of queries, of keys, and of decays."""

    n: int
    d: int = 4
    e: int = 3
    decay: str = "none"
    how: How = WEIGHTS
    lanes: tuple[tuple[int, ...], ...] = ((2,), (2,), (2,))
    erases: str = "nothing"

    @property
    def names(self) -> tuple[str, ...]:
        """What is drawn: what a recurrence reads, in its order, and the state."""
        erased = () if self.erases == "nothing" else ("read", "write")
        return ("query", "key", "value", "log_decay", *erased, "state")

    def draw(self) -> list[torch.Tensor | None]:
        """One tensor or None for each name, in float64."""
        draw = torch.Generator().manual_seed(self.n + self.d)
        queries, keys, decays = self.lanes

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=draw, dtype=torch.float64)

        # Positive features, so that sums that divide are far from 0: a query of one channel cancels
        # in its row, and terms of 1 / query in its gradient.
        query, key = (normal(*lanes, self.n, self.d).abs() + 0.1 for lanes in (queries, keys))
        wide = self.d if self.decay.startswith("channel") else 1
        value, each = normal(*keys, self.n, self.e), -normal(*decays, self.n, wide).abs()
        begins = each[..., :1] < -1.5  # with -inf for all channels of a token: a document
        decay = {
            "none": None,
            "head": each[..., :1, :] / 9,
            "token": each / 9,
            "strong": torch.where(each < -1, -1e4, each / 9),
            "forgets": torch.where(each < -1.5, -INF, torch.where(each > -0.5, 0.0, each)),
            "channel": each / 9,
            "channel of all tokens": each[..., :1, :] / 9,
            "channel, strong": torch.where(each < -1, -1e4, each / 9),
            "channel, forgets": torch.where(begins | (each < -2), -INF, each / 9),
        }[self.decay]
        batch = keys if decay is None else torch.broadcast_shapes(keys, decays)
        state = normal(*batch, self.d, self.e + (self.how.eps is not None)).abs()
        if self.erases == "nothing":
            return [query, key, value, decay, state]
        read = normal(*keys, self.n, self.d)
        read = read / read.norm(dim=-1, keepdim=True)
        write = -read * normal(*keys, self.n, 1).sigmoid()
        if self.erases == "other":  # than what it reads; so little that products of many stay small
            write = normal(*keys, self.n, self.d) / (9 * self.d**0.5)
        return [query, key, value, decay, read, write, state]


def results(case: Case, function, given=None) -> dict[str, torch.Tensor]:
    """Output, state and all gradients of a sum that weighs each number of both."""
    given = case.draw() if given is None else given
    leaves = [x if x is None else x.detach().clone().requires_grad_() for x in given]
    *tokens, state = leaves
    output, after = function(Tokens(*tokens), state, case.how)
    draw = torch.Generator().manual_seed(0)
    above = [torch.randn(x.shape, generator=draw, dtype=x.dtype) for x in (output, after)]
    learned = {name: x for name, x in zip(case.names, leaves, strict=True) if x is not None}
    found = torch.autograd.grad((output, after), list(learned.values()), above)
    return {"output": output, "after": after, **dict(zip(learned, found, strict=True))}


def assert_same(case: Case, given=None) -> None:
    """To rounding: sums of n tokens and d channels, relative to the largest number of a tensor."""
    got, wanted = (results(case, f, given) for f in (scan.scan, scan.in_pytorch))
    for name, reference in wanted.items():
        assert got[name].shape == reference.shape
        assert torch.isfinite(got[name]).all(), name
        bound = (
            4 * (case.n + case.d + case.e) * EPS * max(1.0, float(reference.detach().abs().max()))
        )
        assert float((got[name] - reference).detach().abs().max()) <= bound, name


HOWS = {"weights": WEIGHTS, "sums": How(0.0), "elu, eps": How(1e-6, elu=True)}


LAYOUTS = {
    "heads inside": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "columns": lambda x: x.mT.contiguous().mT,
    "every second": lambda x: torch.stack([x, x], -1)[..., 0],
    "every second row": lambda x: torch.stack([x, x], -2)[..., 0, :],
    "odd address": lambda x: torch.cat([x.new_ones(1), x.flatten()])[1:].view(x.shape),
    "one lane": lambda x: x[:1].expand(x.shape),
    "one row": lambda x: x[..., :1, :].expand(x.shape),
    "negative": lambda x: torch.complex(x, -x).conj().imag,
}
