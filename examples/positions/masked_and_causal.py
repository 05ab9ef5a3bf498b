"""Where order comes from without positions: the causal mask, and not attention itself.

Character models (2 blocks of width 64, 4 heads) on pieces of 32 characters. Causal: predict the
next character from those before it. Masked: 15 % of the characters are hidden, each model sees all
the others on both sides and predicts the hidden ones; it learns from those 15 % alone, and so gets
more steps. Pieces are the same for all encodings.

After Haviv, Ram, Press, Izsak, Levy 2022, arXiv:2203.16634, tables 1 (causal) and 4 (masked).
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from examples import report
from examples.model import Batch, Encoding, Size, Transformer, perplexity, train
from examples.positions import pictures
from examples.positions.encodings import ENCODINGS, RESULTS
from examples.positions.pictures import Map
from examples.text import Text
from regard import Causal
from regard.nn import Learned

LENGTH = 32
HIDDEN = 0.15
COMPARED = {
    "none": Encoding(),
    "learned": Encoding(on_input=lambda width: Learned(LENGTH, width)),
    "sinusoidal": ENCODINGS["sinusoidal"],
    "ALiBi": ENCODINGS["ALiBi"],
}
STEPS = {"causal": 600, "masked": 1500}
# Perplexities of Haviv et al., WikiText-103 and the Pile, from transcriptions of the paper.
PUBLISHED = {
    "none": (20.97, 13.10, 147.18),
    "learned": (20.42, 13.05, 4.06),
    "sinusoidal": (20.16, 12.93, 4.07),
    "ALiBi": (19.71, 12.51, 4.00),
}


@dataclass(frozen=True)
class Job:
    """One model: what it is asked, its encoding, its seed."""

    kind: str
    encoding: str
    seed: int
    data: Path | None
    quick: bool
    steps: int
    batch: int = 32
    tested: int = 3400


def hide(pieces: Tensor, symbol: int, generator: torch.Generator) -> Batch:
    """Put `symbol` in the place of some characters, and ask for those alone."""
    hidden = torch.rand(pieces.shape, generator=generator) < HIDDEN
    hidden[:, 0] |= ~hidden.any(-1)  # something is asked of every piece
    return pieces.masked_fill(hidden, symbol), pieces.masked_fill(~hidden, -100)


def result(job: Job) -> tuple[float, list[list[float]]]:
    """Train a model; its perplexity, and for the first seed the cosines of learned positions."""
    text = Text.read(job.data, quick=job.quick)
    symbols = len(text.symbols)
    generator = torch.Generator().manual_seed(job.seed)
    torch.manual_seed(job.seed)
    causal = job.kind == "causal"
    mask = Causal() if causal else None
    model = Transformer(symbols + 1, COMPARED[job.encoding], mask, Size(spread=0.3))

    def draw() -> Batch:
        pieces = text.pieces(job.batch, LENGTH + 1, generator)
        return (
            (pieces[:, :-1], pieces[:, 1:]) if causal else hide(pieces[:, 1:], symbols, generator)
        )

    train(model, draw, job.steps, rate=8e-3)
    now, after = (part[: job.tested] for part in text.cut(text.held_out, LENGTH))
    asked = (now, after) if causal else hide(after, symbols, torch.Generator().manual_seed(0))
    found = perplexity(model, asked)
    if job.seed or not isinstance(model.place, Learned):
        return found, []
    unit = torch.nn.functional.normalize(model.place.weight.detach(), dim=-1)
    return found, [[round(x, 3) for x in row] for row in (unit @ unit.mT).tolist()]


def expectations(mean: dict[tuple[str, str], float]) -> str:
    """What was expected before anything was trained, and whether it came out."""
    masked = mean["masked", "none"] / mean["masked", "sinusoidal"]
    causal = mean["causal", "none"] / mean["causal", "sinusoidal"]
    rows = [
        (
            "masked: none at least 3 times sinusoidal",
            f"{masked:.2f} times",
            "holds" if masked >= 3 else "does not hold",
        ),
        (
            "causal: none within 10 % of sinusoidal",
            f"{100 * (causal - 1):+.1f} %",
            "holds" if abs(causal - 1) <= 0.1 else "does not hold",
        ),
    ]
    return "Expected beforehand:\n\n" + report.table(("expectation", "found", "so it"), rows)


def page(
    found: dict[tuple[str, str], list[float]], job: Job, options: argparse.Namespace
) -> tuple[str, ...]:
    """The results in words and tables."""
    rows = [
        (name, *(report.spread(found[kind, name]) for kind in STEPS), *PUBLISHED[name])
        for name in COMPARED
    ]
    published = ("published: causal, WikiText-103", "causal, the Pile", "masked")
    return (
        "# Where order comes from without positions",
        "`python -m examples.positions.masked_and_causal --data input.txt --seeds "
        f"{options.seeds}`: {options.conditions}",
        f"Each model: {STEPS['causal']} steps causal, or {STEPS['masked']} masked with "
        f"{HIDDEN:.0%} of the characters hidden, of {job.batch} pieces of {LENGTH} characters. "
        f"Perplexity per character on {job.tested:,} held-out pieces, mean ± standard deviation "
        f"of {options.seeds} seeds. "
        "The last three columns are published, of other models on other texts, per token: Haviv "
        "et al. 2022, tables 1 and 4, from transcriptions.",
        report.table(("encoding", *STEPS, *published), rows),
        expectations({key: statistics.fmean(seeds) for key, seeds in found.items()}),
        "![Cosines of learned positions](learned.png)",
        "Cosines of the learned vectors of two positions, first seed, after training.",
    )


def main(given: list[str] | None = None) -> None:
    """Train every model, and write the table and the picture."""
    parser = report.arguments(__doc__)
    parser.add_argument("--data", type=Path, help="a text, plain or .gz (Tiny Shakespeare)")
    options = report.parse(parser, given, RESULTS)
    about = "" if options.redraw else Text.read(options.data, quick=options.quick).about
    jobs = [
        Job(kind, name, seed, options.data, options.quick, STEPS[kind])
        for seed in range(options.seeds)
        for kind in STEPS
        for name in COMPARED
    ]
    if options.quick:
        jobs = [replace(job, steps=2, batch=2, tested=8) for job in jobs]
    found: dict[tuple[str, str], list[float]] = {}
    maps = []
    results = report.run(result, jobs, "masked_and_causal", options, about)
    for job, (number, cosines) in zip(jobs, results, strict=True):
        found.setdefault((job.kind, job.encoding), []).append(number)
        if cosines:
            title = f"learned, {job.kind}"
            unit = "cosine of $e_i$, $e_j$"
            maps.append(Map(title, torch.tensor(cosines), unit, "position j", "position i"))
    pictures.maps([maps], options.out, "learned")
    report.write(options.out, "masked_and_causal", *page(found, jobs[0], options))


if __name__ == "__main__":
    main()
