"""Copying a sequence, learned by softmax attention and by linear attention.

A sequence of 31 tokens: a mark, 15 symbols of 10 kinds, the mark again, and the symbols again. Two
blocks of width 64, 4 heads, sinusoidal positions; the loss counts the second half. Katharopoulos et
al. 2020, arXiv:2006.16236, section 4.1 and figure 2, where lengths go up to 128.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace

import torch

from examples import report
from examples.model import Batch, Encoding, Size, Transformer, loss, train
from examples.recurrence import pictures
from examples.recurrence.mixers import MIXERS, RESULTS
from regard import Causal
from regard.nn import Sinusoidal

SYMBOLS, COUNT = 10, 15
MARK = SYMBOLS
COMPARED = ("softmax", "linear")
KEPT = 20


@dataclass(frozen=True)
class Job:
    """One model."""

    mixer: str
    seed: int
    steps: int = 800
    batch: int = 32
    tested: int = 256


def draw(count: int, generator: torch.Generator) -> Batch:
    """Symbols twice, with a mark before each time; only the second time is asked for."""
    symbols = torch.randint(SYMBOLS, (count, COUNT), generator=generator)
    mark = torch.full((count, 1), MARK)
    whole = torch.cat([mark, symbols, mark, symbols], -1)
    targets = whole[:, 1:].clone()
    targets[:, : COUNT + 1] = -100
    return whole[:, :-1], targets


def result(job: Job) -> list[float]:
    """Train a model; its loss in nats on the way, and at the end, and right symbols in %."""
    torch.manual_seed(job.seed)
    generator = torch.Generator().manual_seed(job.seed)
    # Positions as large as symbols: with learned ones that begin at 0.02 linear attention, not
    # softmax, is far from done after as many steps.
    encoding = Encoding(on_input=Sinusoidal)
    model = Transformer(SYMBOLS + 1, encoding, Causal(), Size(), MIXERS[job.mixer])
    tokens, targets = test = draw(job.tested, generator)
    every = max(job.steps // KEPT, 1)
    curve: list[float] = []
    drawn = 0

    def some() -> Batch:
        nonlocal drawn
        if drawn % every == 0:
            with torch.no_grad():
                curve.append(float(loss(model, test)))
        drawn += 1
        return draw(job.batch, generator)

    train(model, some, job.steps, rate=2e-3)
    with torch.no_grad():
        agree = (model(tokens).argmax(-1) == targets)[targets >= 0]
        curve.append(float(loss(model, test)))
    return [*curve, 100 * float(agree.double().mean())]


def page(found: dict[str, list[list[float]]], job: Job, options: argparse.Namespace) -> list[str]:
    """The results in words and a table."""
    rows = [
        (
            name,
            report.spread([run[KEPT // 4] for run in runs], 4),
            report.spread([run[-2] for run in runs], 4),
            report.spread([run[-1] for run in runs], 1),
        )
        for name, runs in found.items()
    ]
    return [
        "# Copying a sequence",
        f"`python -m examples.recurrence.copy_task --seeds {options.seeds}`: {options.conditions}",
        f"Each model: {job.steps} steps of {job.batch} sequences. Loss in nats for each symbol of "
        f"the copy, of {job.tested} sequences; mean ± standard deviation of {options.seeds} seeds. "
        "Guessing costs 2.303.",
        report.table(
            ("attention", "loss after a quarter", "loss at the end", "right symbols, %"), rows
        ),
        "![Loss by training steps](copy_task.png)",
    ]


def main(given: list[str] | None = None) -> None:
    """Train every model, and write the table and the picture."""
    options = report.parse(report.arguments(__doc__), given, RESULTS)
    jobs = [Job(mixer, seed) for seed in range(options.seeds) for mixer in COMPARED]
    if options.quick:
        jobs = [replace(job, steps=KEPT, batch=2, tested=4) for job in jobs]
    found: dict[str, list[list[float]]] = {name: [] for name in COMPARED}
    for job, numbers in zip(jobs, report.run(result, jobs, "copy_task", options), strict=True):
        found[job.mixer].append(numbers)
    curves = {name: [run[:-1] for run in runs] for name, runs in found.items()}
    steps = [k * jobs[0].steps // KEPT for k in range(KEPT + 1)]
    pictures.losses(curves, steps, options.out)
    report.write(options.out, "copy_task", *page(found, jobs[0], options))


if __name__ == "__main__":
    main()
