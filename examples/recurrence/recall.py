"""How many pairs of a key and a value one layer remembers.

A sequence shows pairs, one in a token, then asks for each key in a random order; the answer is the
value that was bound to it. One layer, one head of width d, no feed-forward part, no positions: what
is remembered is in the layer's state, d x d numbers (softmax: all keys). In the second task every
key is bound twice, and the later value is the answer.

The task is "stacked" multi-query associative recall (Arora et al. 2023, Zoology,
arXiv:2312.04927, and its code), where key and value share a token, so that one layer without a
convolution can do it.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from examples import report
from examples.model import Batch, Size, train
from examples.recurrence import pictures
from examples.recurrence.mixers import MIXERS, RESULTS
from regard import Causal
from regard.nn import RecurrentAttention

KEYS = VALUES = 128
PAIRS = (4, 8, 16, 32, 64)
WIDTHS = (16, 32, 64)
REBOUND_WIDTH = 32
REBOUND = (4, 8, 16, 32)
NOTHING = VALUES
"""The value of a token that asks."""


@dataclass(frozen=True)
class Job:
    """One model of one width on one task."""

    mixer: str
    width: int
    twice: bool
    seed: int
    steps: int = 700
    batch: int = 32
    tested: int = 256

    @property
    def counts(self) -> tuple[int, ...]:
        """How many keys a sequence may have."""
        return REBOUND if self.twice else PAIRS


class Recall(nn.Module):
    """Tokens [batch, n, 2] of a key and a value -> logits of values [batch, n, values]."""

    def __init__(self, mixer: str, width: int) -> None:
        super().__init__()
        self.keys = nn.Embedding(KEYS, width)
        self.values = nn.Embedding(VALUES + 1, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.attention = MIXERS[mixer](Size(width, heads=1, blocks=1))
        self.out = nn.Linear(width, VALUES)

    def forward(self, tokens: Tensor) -> Tensor:
        key, value = tokens.unbind(-1)
        x = self.norms[0](self.keys(key) + self.values(value))
        causal = None if isinstance(self.attention, RecurrentAttention) else Causal()
        return self.out(self.norms[1](self.attention(x, mask=causal)[0]))


def draw(count: int, pairs: int, twice: bool, generator: torch.Generator) -> Batch:
    """Sequences with so many keys, and the values that are asked for."""

    def shuffled(size: int) -> Tensor:
        return torch.rand(count, size, generator=generator).argsort(-1)

    keys = shuffled(KEYS)[:, :pairs]
    rounds = 1 + twice
    values = torch.randint(VALUES, (count, rounds * pairs), generator=generator)
    # All keys once and then all again in another order: the last value of each is in the last part.
    order = torch.cat([shuffled(pairs) for _ in range(rounds)], -1)
    shown = torch.stack([keys.gather(-1, order), values], -1)
    last = torch.empty_like(keys).scatter_(-1, order[:, -pairs:], values[:, -pairs:])
    asked = shuffled(pairs)
    asks = torch.stack([keys.gather(-1, asked), torch.full_like(asked, NOTHING)], -1)
    targets = torch.cat([torch.full_like(values, -100), last.gather(-1, asked)], -1)
    return torch.cat([shown, asks], -2), targets


def result(job: Job) -> list[float]:
    """Train a model on all counts of keys; right answers, in %, at each."""
    torch.manual_seed(job.seed)
    generator = torch.Generator().manual_seed(job.seed)
    model = Recall(job.mixer, job.width)

    def some() -> Batch:
        which = int(torch.randint(len(job.counts), (), generator=generator))
        return draw(job.batch, job.counts[which], job.twice, generator)

    train(model, some, job.steps, rate=1e-2)
    return [right(model, draw(job.tested, n, job.twice, generator)) for n in job.counts]


@torch.no_grad()
def right(model: Recall, batch: Batch) -> float:
    """Answers whose value is the likeliest one, in %."""
    tokens, targets = batch
    asked = targets >= 0
    return 100 * float((model(tokens).argmax(-1) == targets)[asked].double().mean())


def page(
    plain: dict[int, dict[str, list[list[float]]]],
    twice: dict[str, list[list[float]]],
    job: Job,
    options: argparse.Namespace,
) -> list[str]:
    """The results in words and tables."""
    parts = [
        "# Recall from a state",
        f"`python -m examples.recurrence.recall --seeds {options.seeds}`: {options.conditions}",
        f"Each model: {job.steps} steps of {job.batch} sequences with as many keys as one of the "
        f"columns; {KEYS} keys and {VALUES} values in all. Right answers in %, of {job.tested} "
        f"sequences of each kind; mean ± standard deviation of {options.seeds} seeds. Guessing "
        f"among all values gives {100 / VALUES:.1f}, and among those shown to 64 keys 1.6.",
    ]
    for width, found in plain.items():
        head = (f"width {width}", *(f"{n} keys" for n in PAIRS))
        parts.append(report.table(head, _rows(found)))
    parts.append(f"Every key bound twice, width {REBOUND_WIDTH}; the later value is right:")
    parts.append(report.table(("bound twice", *(f"{n} keys" for n in REBOUND)), _rows(twice)))
    return [*parts, "![Right answers by how many keys there are](recall.png)"]


def _rows(found: dict[str, list[list[float]]]) -> list[tuple[str, ...]]:
    return [
        (name, *(report.spread(at, 0) for at in zip(*runs, strict=True)))
        for name, runs in found.items()
    ]


def main(given: list[str] | None = None) -> None:
    """Train every model, and write the tables and the picture."""
    options = report.parse(report.arguments(__doc__), given, RESULTS)
    jobs = [
        Job(mixer, width, twice, seed)
        for seed in range(options.seeds)
        for width, twice in (*((width, False) for width in WIDTHS), (REBOUND_WIDTH, True))
        for mixer in MIXERS
    ]
    if options.quick:
        jobs = [replace(job, steps=2, batch=2, tested=2) for job in jobs]
    plain: dict[int, dict[str, list[list[float]]]] = {
        width: {name: [] for name in MIXERS} for width in WIDTHS
    }
    twice: dict[str, list[list[float]]] = {name: [] for name in MIXERS}
    for job, numbers in zip(jobs, report.run(result, jobs, "recall", options), strict=True):
        (twice if job.twice else plain[job.width])[job.mixer].append(numbers)
    panels = {f"width {width}": (PAIRS, found) for width, found in plain.items()}
    panels[f"width {REBOUND_WIDTH}, keys bound twice"] = (REBOUND, twice)
    pictures.recall(panels, options.out)
    report.write(options.out, "recall", *page(plain, twice, jobs[0], options))


if __name__ == "__main__":
    main()
