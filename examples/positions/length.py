"""Tasks with one right answer, on longer inputs than were trained: copy, reverse, parity.

A causal model (2 blocks of width 64, 4 heads) reads n symbols and an equals sign, then writes the
answer: the symbols again, the symbols backwards (10 symbols each), or whether the number of ones is
odd (2 symbols, one answer). It is trained on n from 1 to 16 and tested up to 32. An answer counts
if every symbol of it is right; a model that reads the right answer so far and one that reads its
own agree on that, since both end at the first wrong symbol.

After Kazemnejad et al. 2023, arXiv:2305.19466; nothing is asserted beforehand about who wins.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from examples import report
from examples.model import Batch, Size, Transformer, train
from examples.positions import pictures
from examples.positions.encodings import ENCODINGS, RESULTS
from regard import Causal

LONGEST = 16
LENGTHS = (8, 16, 20, 24, 28, 32)
COMPARED = ("none", "sinusoidal", "rotary", "T5", "ALiBi")
SYMBOLS = 10
EQUALS = SYMBOLS


@dataclass(frozen=True)
class Task:
    """Symbols in use, and the answer [batch, .] to inputs [batch, n]."""

    symbols: int
    answer: Callable[[Tensor], Tensor]


TASKS = {
    "copy": Task(SYMBOLS, lambda given: given),
    "reverse": Task(SYMBOLS, lambda given: given.flip(-1)),
    "parity": Task(2, lambda given: given.sum(-1, keepdim=True) % 2),
}


@dataclass(frozen=True)
class Job:
    """One model: a task, an encoding, a seed."""

    task: str
    encoding: str
    seed: int
    steps: int = 800
    batch: int = 32
    tested: int = 256


def draw(task: Task, count: int, n: int, generator: torch.Generator) -> Batch:
    """Inputs of n symbols and what follows them; only the answer is asked for."""
    given = torch.randint(task.symbols, (count, n), generator=generator)
    answer = task.answer(given)
    equals = torch.full((count, 1), EQUALS)
    tokens = torch.cat([given, equals, answer[:, :-1]], -1)
    return tokens, torch.cat([torch.full_like(given, -100), answer], -1)


def result(job: Job) -> list[float]:
    """Train a model; the share of wholly right answers, in %, at each length."""
    task = TASKS[job.task]
    torch.manual_seed(job.seed)
    generator = torch.Generator().manual_seed(job.seed)
    model = Transformer(SYMBOLS + 1, ENCODINGS[job.encoding], Causal(), Size())

    def some() -> Batch:
        n = int(torch.randint(1, LONGEST + 1, (), generator=generator))
        return draw(task, job.batch, n, generator)

    train(model, some, job.steps, rate=5e-3)
    return [right(model, draw(task, job.tested, n, generator)) for n in LENGTHS]


@torch.no_grad()
def right(model: Transformer, batch: Batch) -> float:
    """Answers of which every symbol is the likeliest one, in %."""
    tokens, targets = batch
    agree = (model(tokens).argmax(-1) == targets) | (targets < 0)
    return 100 * float(agree.all(-1).double().mean())


def page(
    found: dict[str, dict[str, list[list[float]]]], job: Job, options: argparse.Namespace
) -> list[str]:
    """The results in words and tables."""
    parts = [
        "# Longer than trained: tasks with one right answer",
        f"`python -m examples.positions.length --seeds {options.seeds}`: {options.conditions}",
        f"Each model: {job.steps} steps of {job.batch} inputs of one length from 1 to {LONGEST}. "
        f"Wholly right answers in %, of {job.tested} inputs of n symbols; mean ± standard "
        f"deviation of {options.seeds} seeds. Guessing gives 50 for parity, and 0 for the others.",
    ]
    for task in TASKS:
        rows = [
            (name, *(report.spread(at, 0) for at in zip(*runs, strict=True)))
            for name, runs in found[task].items()
        ]
        head = (task, *(f"n = {n}" for n in LENGTHS))
        parts.append(report.table(head, rows))
    return [*parts, "![Right answers by length](length.png)"]


def main(given: list[str] | None = None) -> None:
    """Train every model, and write the tables and the picture."""
    options = report.parse(report.arguments(__doc__), given, RESULTS)
    jobs = [
        Job(task, name, seed)
        for seed in range(options.seeds)
        for task in TASKS
        for name in COMPARED
    ]
    if options.quick:
        jobs = [replace(job, steps=2, batch=2, tested=8) for job in jobs]
    found: dict[str, dict[str, list[list[float]]]] = {
        task: {name: [] for name in COMPARED} for task in TASKS
    }
    for job, numbers in zip(jobs, report.run(result, jobs, "length", options), strict=True):
        found[job.task][job.encoding].append(numbers)
    pictures.tasks(found, LENGTHS, LONGEST, options.out)
    report.write(options.out, "length", *page(found, jobs[0], options))


if __name__ == "__main__":
    main()
