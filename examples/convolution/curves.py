"""Accuracy over the number of training images, for each mixer: how the curves are measured.

For every number of images: as many updates, the same skeleton (`mixers`), no augmentation. The rate
of each mixer is the one of two that is best on validation images, with a seed of its own, at two
numbers of images. All stop early: of ten looks at the validation images the best one counts. A seed
draws the training images, which are the first n of its order, so that the sets are nested, and the
first parameters.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from examples import report
from examples.convolution.mixers import ARMS, Network, Size, fields, fit, logits
from examples.model import Batch, Rates

PLACES = 0.03
TUNING = 1000
"""The seed that rates are chosen with; no result has it."""
Result = dict[str, list[float]]
Curves = dict[str, list[dict[int, float]]]
"""Of each mixer, and each number of images, a number by seed."""


@dataclass(frozen=True)
class Data:
    """Images to learn from, to stop by, and to be tested on.

    groups: names of kinds of test images, and which they are
    """

    training: Batch
    validation: Batch
    test: Batch
    groups: dict[str, Tensor] = field(default_factory=dict)


class Task(Protocol):
    """Where images come from: a frozen dataclass, which is made again in each process."""

    @property
    def size(self) -> Size:
        """Of the network."""

    def data(self, count: int, seed: int) -> Data:
        """`count` images to learn from, of a seed."""


@dataclass(frozen=True)
class Job:
    """One network."""

    task: Task
    arm: str
    count: int
    seed: int
    rate: float
    updates: int
    batch: int = 32


def percent(right: Tensor) -> float:
    """Of booleans."""
    return 100 * float(right.double().mean())


def result(job: Job) -> Result:
    """Train it; accuracies in %, seconds of the processor, what heads see before and after."""
    data = job.task.data(job.count, job.seed)
    began = time.process_time()
    torch.manual_seed(job.seed)
    model = Network(job.task.size, ARMS[job.arm])
    generator = torch.Generator().manual_seed(job.seed + 1)
    images, classes = data.training

    def draw() -> Batch:
        chosen = torch.randint(len(classes), (job.batch,), generator=generator)
        return images[chosen], classes[chosen]

    seen = data.test[0][:100]
    before = fields(model, seen)
    best = fit(model, draw, data.validation, job.updates, Rates(job.rate, PLACES))
    found = {"validation": [best.right], "stopped": [best.step]}
    if job.seed < TUNING:
        right = logits(model, data.test[0]).argmax(-1) == data.test[1]
        found["test"] = [percent(right)]
        found |= {name: [percent(right[some])] for name, some in data.groups.items()}
        flat = itertools.chain.from_iterable
        for name, numbers in (("before", before), ("after", fields(model, seen))):
            found[name] = [*flat(flat(numbers))]
    return found | {"seconds": [time.process_time() - began]}


@dataclass(frozen=True)
class Study:
    """All networks of one picture: of each mixer, number of images and seed."""

    task: Task
    name: str
    counts: tuple[int, ...]
    arms: tuple[str, ...]
    updates: int
    rates: tuple[float, ...] = (1e-3, 3e-3)

    def run(self, options: argparse.Namespace) -> Found:
        """Choose the rates, then train all, but for what was kept before an interruption."""
        seeds = range(options.seeds)
        middle = (self.counts[1], self.counts[-2])
        one = Job(self.task, self.arms[0], 0, TUNING, 0.0, self.updates)
        tuning = [
            replace(one, arm=arm, count=count, rate=rate)
            for arm in self.arms for rate in self.rates for count in middle
        ]  # fmt: skip
        tuned = report.run(result, tuning, self.name, options, so_far=options.so_far)
        scores: dict[tuple[str, float], list[float]] = {}
        for job, found in zip(tuning, tuned, strict=True):
            right = 0.0 if found is None else found["validation"][0]
            scores.setdefault((job.arm, job.rate), []).append(right)
        rates = {
            arm: max(self.rates, key=lambda rate: statistics.fmean(scores[arm, rate]))
            for arm in self.arms
        }
        jobs = [
            replace(one, arm=arm, count=count, seed=seed, rate=rates[arm])
            for seed in seeds for count in self.counts for arm in self.arms
        ]  # fmt: skip
        both = tuning + jobs
        results = report.run(result, both, self.name, options, so_far=options.so_far)
        pairs = [(job, one) for job, one in zip(both, results, strict=True) if one is not None]
        return Found(self, rates, pairs)


@dataclass(frozen=True)
class Found:
    """What came out: a result of each job that was done, of those that chose the rates as well."""

    study: Study
    rates: dict[str, float]
    pairs: Sequence[tuple[Job, Result]]

    def curves(self, name: str = "test") -> Curves:
        """A kind of number of all networks."""
        found: Curves = {arm: [{} for _ in self.study.counts] for arm in self.study.arms}
        for job, one in self.pairs:
            if job.seed < TUNING:
                found[job.arm][self.study.counts.index(job.count)][job.seed] = one[name][0]
        return found

    def of(self, arm: str, count: int, name: str) -> list[Tensor]:
        """What heads of one mixer see, for each seed: [blocks, heads, 5]."""
        return [
            torch.tensor(one[name]).reshape(self.study.task.size.blocks, -1, 5)
            for job, one in self.pairs
            if (job.arm, job.count) == (arm, count) and job.seed < TUNING
        ]

    def seeds(self) -> str:
        """How many seeds of each mixer are done, in words."""
        numbers = {arm: min(map(len, row)) for arm, row in self.curves().items()}
        if len({*numbers.values()}) == 1:
            number = numbers[self.study.arms[0]]
            return "1 seed" if number == 1 else f"{number} seeds"
        return "seeds: " + "; ".join(f"{arm} {number}" for arm, number in numbers.items())

    def parameters(self) -> str:
        """How many each network has, and by how much they differ, in words."""
        size = self.study.task.size
        numbers = {
            arm: sum(p.numel() for p in Network(size, ARMS[arm]).parameters())
            for arm in self.study.arms
        }
        each = "; ".join(f"{arm} {number:,}" for arm, number in numbers.items())
        more = 100 * (max(numbers.values()) / min(numbers.values()) - 1)
        return f"{each}; the largest network has {more:.0f} % more than the smallest"

    def seconds(self) -> str:
        """Of one core, for one network of each mixer, and of all."""
        spent = {
            arm: [one["seconds"][0] for job, one in self.pairs if job.arm == arm]
            for arm in self.study.arms
        }
        each = "; ".join(
            f"{arm} {statistics.fmean(some):.1f}" for arm, some in spent.items() if some
        )
        return f"{each}; {sum(map(sum, spent.values())) / 60:.0f} minutes for all"


def chance(differences: Sequence[float]) -> float:
    """How often signs drawn at random put the mean of pairs' differences as far from 0, or farther.

    The exact test of Fisher (1935) over all 2^n signs: two-sided, and at least 2^(1 - n).

    >>> chance([1.0, 2.0, 1.5, 0.5])
    0.125
    """
    numbers = torch.tensor(differences, dtype=torch.float64)
    signs = torch.cartesian_prod(*len(numbers) * [torch.tensor([-1.0, 1.0], dtype=torch.float64)])
    sums = (signs.reshape(-1, len(numbers)) @ numbers).abs()
    # Sums that are equal on paper differ by rounding.
    return float((sums >= numbers.sum().abs() * (1 - 1e-12)).double().mean())


def gap(curves: Curves, one: str, other: str, at: int) -> list[float]:
    """By how much one mixer is better than the other with the same images, for each seed."""
    mine, its = curves[one][at], curves[other][at]
    return [mine[seed] - its[seed] for seed in sorted(mine.keys() & its.keys())]


def slopes(curves: Curves, one: str, other: str, counts: Sequence[int]) -> list[float]:
    """Of the gap over log10 of the number of images, by least squares, for each seed."""
    rows = [*curves[one], *curves[other]]
    seeds = sorted(set.intersection(*(set(row) for row in rows)))
    x = torch.tensor(counts, dtype=torch.float64).log10()
    x = x - x.mean()
    gaps = [[a[s] - b[s] for s in seeds] for a, b in zip(curves[one], curves[other], strict=True)]
    y = torch.tensor(gaps, dtype=torch.float64)  # [counts, seeds]
    found: list[float] = ((x @ y) / (x @ x)).tolist()
    return found


def crossover(curves: Curves, better: str, other: str, counts: Sequence[int]) -> str:
    """The first number of images at which `other` is as good on average, in words."""
    for at, count in enumerate(counts):
        gaps = gap(curves, better, other, at)
        if gaps and statistics.fmean(gaps) <= 0:
            return f"at n = {count:,}" if at else f"already at n = {count:,}, the smallest"
    return f"none up to n = {counts[-1]:,}"


def table(curves: Curves, counts: Sequence[int], first: str) -> str:
    """Mean and standard deviation over seeds; a row for each mixer."""
    return report.table(
        (first, *(f"n = {count:,}" for count in counts)),
        [
            (arm, *(report.spread([*one.values()], 1) if one else "-" for one in row))
            for arm, row in curves.items()
        ],
    )


def arguments(document: str, seeds: int) -> argparse.ArgumentParser:
    """Those of all examples, and what to do with a run that is not complete."""
    parser = report.arguments(document, seeds)
    parser.add_argument(
        "--so-far", action="store_true", help="a page of what is done so far, train nothing"
    )
    return parser
