"""Reading on beyond the training length: which encodings let a model do it.

Character models (2 blocks of width 64, 4 heads) learn pieces of 64 characters and are tested on the
held-out text cut into pieces of 64 to 512 that do not overlap: the same characters are predicted
at every length, each from what stands before it in its piece. All models of one seed see the same
pieces in the same order. Scores are scaled by width ** -0.5 for every encoding, T5's too, which has
a table in each block here.

After Press, Smith, Lewis 2022 (ALiBi), arXiv:2108.12409, table 2: word models on WikiText-103,
trained on 512 tokens.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from examples import report
from examples.model import Batch, Size, Transformer, perplexity, train
from examples.positions import pictures
from examples.positions.encodings import ENCODINGS, RESULTS
from examples.text import Text
from regard import Causal

LENGTH = 64
LENGTHS = (64, 96, 128, 256, 512)
TESTED = 110_592  # characters, a multiple of every length
# Perplexities of ALiBi's table 2, taken from a transcription of the paper.
PUBLISHED = {
    "lengths": (512, 712, 1012, 1512, 3512, 12512),
    "sinusoidal": (20.05, 24.86, 43.54, 76.23, 178.97, 373.17),
    "rotary": (20.07, 19.79, 21.37, 25.99, 35.54, 69.70),
    "T5": (19.65, 19.10, 18.79, 18.91, 22.91, 64.94),
    "ALiBi": (19.73, 19.14, 18.73, 18.52, 18.40, 18.31),
}


@dataclass(frozen=True)
class Job:
    """One model: an encoding and a seed."""

    encoding: str
    seed: int
    data: Path | None
    quick: bool
    steps: int = 1000
    batch: int = 16
    tested: int = TESTED


def perplexities(job: Job) -> list[float]:
    """Train a model; its perplexity at each length."""
    text = Text.read(job.data, quick=job.quick)
    torch.manual_seed(job.seed)
    generator = torch.Generator().manual_seed(job.seed)
    model = Transformer(len(text.symbols), ENCODINGS[job.encoding], Causal(), Size())

    def draw() -> Batch:
        pieces = text.pieces(job.batch, LENGTH + 1, generator)
        return pieces[:, :-1], pieces[:, 1:]

    train(model, draw, job.steps, rate=3e-3)
    held_out = text.held_out[: job.tested + 1]
    return [perplexity(model, text.cut(held_out, length)) for length in LENGTHS]


def expectations(found: dict[str, list[list[float]]]) -> str:
    """What was expected before anything was trained, and whether it came out."""
    mean = {
        name: [statistics.fmean(seeds) for seeds in zip(*runs, strict=True)]
        for name, runs in found.items()
    }
    at = LENGTHS.index(4 * LENGTH)
    order = ("sinusoidal", "rotary", "T5", "ALiBi")
    four = [mean[name][at] for name in order]
    drift = mean["ALiBi"][at] / mean["ALiBi"][0] - 1
    rows = [
        (
            f"at {4 * LENGTH}: sinusoidal > rotary > T5 >= ALiBi",
            " / ".join(f"{x:.2f}" for x in four),
            "holds" if four[0] > four[1] > four[2] >= four[3] else "does not hold",
        ),
        (
            f"ALiBi at {4 * LENGTH} within 3 % of itself at {LENGTH}",
            f"{100 * drift:+.1f} %",
            "holds" if abs(drift) <= 0.03 else "does not hold",
        ),
    ]
    return "Expected beforehand:\n\n" + report.table(("expectation", "found", "so it"), rows)


def main(given: list[str] | None = None) -> None:
    """Train every model, and write the table and the picture."""
    parser = report.arguments(__doc__)
    parser.add_argument("--data", type=Path, help="a text, plain or .gz (Tiny Shakespeare)")
    options = report.parse(parser, given, RESULTS)
    about = "" if options.redraw else Text.read(options.data, quick=options.quick).about
    jobs = [
        Job(name, seed, options.data, options.quick)
        for seed in range(options.seeds)
        for name in ENCODINGS
    ]
    if options.quick:
        jobs = [replace(job, steps=2, batch=2, tested=1024) for job in jobs]
    found: dict[str, list[list[float]]] = {name: [] for name in ENCODINGS}
    results = report.run(perplexities, jobs, "extrapolation", options, about)
    for job, result in zip(jobs, results, strict=True):
        found[job.encoding].append(result)
    pictures.extrapolation(found, LENGTHS, options.out)
    report.write(options.out, "extrapolation", *page(found, jobs[0], options))


def page(
    found: dict[str, list[list[float]]], job: Job, options: argparse.Namespace
) -> tuple[str, ...]:
    """The results in words and tables."""
    rows = [
        (name, *(report.spread(column) for column in zip(*runs, strict=True)))
        for name, runs in found.items()
    ]
    published = [(name, *numbers) for name, numbers in PUBLISHED.items() if name != "lengths"]
    return (
        "# Reading on beyond the training length",
        f"`python -m examples.positions.extrapolation --data input.txt --seeds {options.seeds}`: "
        f"{options.conditions}",
        f"Each model: {job.steps} steps of {job.batch} pieces of {LENGTH} "
        f"characters. Perplexity per character of {job.tested:,} held-out characters, mean ± "
        f"standard deviation of {options.seeds} seeds:",
        report.table(("encoding", *LENGTHS), rows),
        "![Perplexity by length](extrapolation.png)",
        expectations(found),
        "Published, of other models on another text: perplexity per word, WikiText-103 validation "
        "set, trained on 512 tokens (Press et al. 2022, table 2, from a transcription):",
        report.table(("encoding", *PUBLISHED["lengths"]), published),
    )


if __name__ == "__main__":
    main()
