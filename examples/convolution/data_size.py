"""The lecture's figure: a convolution is better with little data, attention with much.

Handwritten digits of 8 x 8 pixels, four mixers of one network (`mixers`), 50 to 1,200 training
images, as many updates for each (`curves`). Dosovitskiy et al. 2021, arXiv:2010.11929, figure 4,
draw it from 9 to 300 million images; d'Ascoli et al. 2021 (ConViT), arXiv:2103.10697, table 2, keep
the number of images seen the same, as here.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from functools import cache

import torch
from sklearn.datasets import load_digits

from examples import report
from examples.convolution import pictures
from examples.convolution.curves import (
    Data,
    Found,
    Job,
    Study,
    arguments,
    chance,
    crossover,
    gap,
    slopes,
    table,
)
from examples.convolution.mixers import ARMS, Size
from examples.convolution.pictures import RESULTS
from examples.model import Batch

CONV, GATED, LEARNED, _ = ARMS
WHEN = ("before", "after")
COUNTS = (50, 100, 400, 1200)
UPDATES = 600
SIDE, CLASSES = 8, 10


@dataclass(frozen=True)
class Digits:
    """The 1,797 images of scikit-learn's digits; the last are tested on, those before stop."""

    kept: int = 237
    tested: int = 360

    @property
    def size(self) -> Size:
        """Of the network."""
        return Size(SIDE, CLASSES, 2)

    def data(self, count: int, seed: int) -> Data:
        """The first images of a seed's order."""
        images, classes = digits()
        # One order for all: which images are tested on is not a matter of the seed.
        fixed = torch.randperm(len(classes), generator=torch.Generator().manual_seed(-1))
        pool = fixed[: -self.kept - self.tested]
        own = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))[:count]
        parts = pool[own], fixed[len(pool) : -self.tested], fixed[-self.tested :]
        return Data(*((images[some], classes[some]) for some in parts))


@cache
def digits() -> Batch:
    """Images [n, 1, 8, 8], from -1 to 1, and their classes [n].

    Alpaydin, Kaynak 1998, doi:10.24432/C50P49, the test set, as scikit-learn brings it.
    """
    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32)
    return images[:, None] / 8 - 1, torch.tensor(found.target)


def claims(found: Found) -> str:
    """What the lecture's figure says of differences, with the chance of each."""
    curves, counts = found.curves(), found.study.counts

    def line(text: str, numbers: list[float]) -> str:
        if not numbers:
            return f"- {text}: not yet"
        return f"- {text}: {report.spread(numbers, 1)}, p = {chance(numbers):.3f}"

    few = [(at, counts[at]) for at in range(2)]
    return "\n".join(
        [
            *(
                line(f"{CONV} minus {LEARNED}, n = {count:,}", gap(curves, CONV, LEARNED, at))
                for at, count in (few[0], (len(counts) - 1, counts[-1]))
            ),
            line(
                "how that gap changes where n grows tenfold (slope of a line, all n)",
                slopes(curves, CONV, LEARNED, counts),
            ),
            *(
                line(f"{GATED} minus {LEARNED}, n = {count:,}", gap(curves, GATED, LEARNED, at))
                for at, count in few
            ),
            *(
                f"- crossover of {CONV} and {other}: {crossover(curves, CONV, other, counts)}"
                for other in (LEARNED, GATED)
            ),
        ]
    )


def measures(found: Found) -> str:
    """What heads see, mean and deviation over heads and seeds, with the fewest and most images."""
    rows = []
    for arm in (GATED, LEARNED):
        for block in range(found.study.task.size.blocks):
            for count in (found.study.counts[0], found.study.counts[-1]):
                cells = []
                for column in (2, 3, 4):
                    for name in ("before", "after"):
                        seen = [
                            float(number)
                            for one in found.of(arm, count, name)
                            for number in one[block, :, column]
                        ]
                        has = seen and (arm == GATED or column < 4)
                        cells.append(report.spread(seen, 2) if has else "-")
                rows.append((f"{arm}, block {block + 1}, n = {count:,}", *cells))
    kinds = (f"{what} {when}" for what in ("radius", "non-locality", "gate") for when in WHEN)
    return report.table(("heads of", *kinds), rows)


def page(found: Found, options: argparse.Namespace) -> tuple[str, ...]:
    """The results in words and tables."""
    study, task, size = found.study, found.study.task, found.study.task.size
    rates = "; ".join(f"{arm} {rate:g}" for arm, rate in found.rates.items())
    return (
        "# Accuracy over the number of training images",
        f"`python -m examples.convolution.data_size --seeds {options.seeds}`: {options.conditions}",
        f"Digits of {SIDE} x {SIDE} pixels, {size.grid.rows} tokens, {size.blocks} blocks, "
        f"{study.updates} updates of {Job.batch} images for every n. Accuracy on {task.tested:,} "
        f"test images in %, mean ± standard deviation of {found.seeds()}:",
        table(found.curves(), study.counts, "mixer"),
        "Differences with the same images in points, mean ± standard deviation over seeds. p: how "
        "often random signs of the seeds' differences have a mean as far from 0, exact, two-sided.",
        claims(found),
        "![Accuracy over the number of images](data_size.png)",
        "Bars: standard error over seeds.",
        "What heads see, in tokens: the radius around their centre, the mean distance from the "
        "query, the gate (1: position alone); over heads and seeds, first 100 test images:",
        measures(found),
        "![Receptive fields before and after](fields.png)",
        f"Heads of `{GATED}`, first seed. Circles: centre and radius, hollow before training; the "
        "query is at 0. Below, non-locality over gate: from hollow to full.",
        f"Parameters: {found.parameters()}. "
        f"Rates: {rates}. Seconds of one core for one network: {found.seconds()}, with those that "
        "choose rates.",
    )


def main(given: list[str] | None = None) -> None:
    """Train every network, and write the tables and the pictures."""
    options = report.parse(arguments(__doc__, seeds=8), given, RESULTS)
    study = Study(Digits(), "data_size", COUNTS, tuple(ARMS), UPDATES)
    if options.quick:
        study = replace(study, task=Digits(8, 8), counts=(8, 16), updates=2, rates=(1e-3,))
    found = study.run(options)
    pictures.curves(found.curves(), study.counts, options.out, "data_size")
    some = {}
    for count in (study.counts[0], study.counts[-1]):
        before, after = (found.of(GATED, count, name) for name in WHEN)
        if before:
            some[count] = before[0], after[0]
    if some:
        pictures.fields(some, options.out)
    report.write(options.out, "data_size", *page(found, options), so_far=options.so_far)


if __name__ == "__main__":
    main()
