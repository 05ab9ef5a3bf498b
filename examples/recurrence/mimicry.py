"""A trained softmax model becomes linear: what feature maps fitted to its attention keep.

The model reads digits of 8 x 8 pixels, 64 tokens of 17 grey levels, from left to right and says
after the last which digit it was: two blocks of width 64, 4 heads, learned positions. Then
`regard.convert.linearize` replaces its attention, block by block, on images of the training part.
Three maps: elu(x) + 1, of which nothing is fitted; relu(x W + b) (T2R, Kasai et al. 2021); and
[e^(x W), e^(-x W)] (Hedgehog, Zhang et al. 2024). At last the linear models learn on as a whole.
"""

from __future__ import annotations

import argparse
import copy
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from examples import report
from examples.digits import LEVELS, PIXELS, Digits
from examples.model import Batch, Encoding, Size, Transformer, train
from examples.recurrence import pictures
from examples.recurrence.mixers import RESULTS
from regard import Causal
from regard.convert import affine, hedgehog, linearize, lost
from regard.convert.linear import MapOf
from regard.feature_map import FeatureMap, elu_plus_one
from regard.nn import Learned


def fixed(heads: int, width: int) -> FeatureMap:
    """elu(x) + 1."""
    return elu_plus_one


MAPS: dict[str, MapOf] = {"elu + 1": fixed, "T2R": affine, "Hedgehog": hedgehog}
SHOWN = (0, 1)
"""The block and head that the picture shows."""


@dataclass(frozen=True)
class Job:
    """One model and all maps."""

    seed: int
    steps: int = 500
    fitted: int = 120
    more: int = 80
    batch: int = 32
    read: int = 256
    quick: bool = False


def asked(pixels: Tensor, classes: Tensor) -> Batch:
    """Pixels, and the class after the last."""
    targets = torch.full_like(pixels, -100)
    targets[:, -1] = classes
    return pixels, targets


@torch.no_grad()
def right(model: Transformer, digits: Digits) -> float:
    """Test images whose class is the likeliest, in %."""
    parts = zip(digits.test_pixels.split(60), digits.test_classes.split(60), strict=True)
    agree = [model(pixels)[:, -1, :10].argmax(-1) == classes for pixels, classes in parts]
    return 100 * float(torch.cat(agree).double().mean())


def result(job: Job) -> dict[str, list[float]]:
    """Accuracies in %, and for each map the divergence of every head, on test images."""
    torch.manual_seed(job.seed)
    generator = torch.Generator().manual_seed(job.seed)
    digits = Digits.read(quick=job.quick)
    encoding = Encoding(on_input=lambda width: Learned(PIXELS, width))
    model = Transformer(LEVELS, encoding, Causal(), Size())

    def some() -> Batch:
        return asked(*digits.draw(job.batch, generator))

    train(model, some, job.steps, rate=3e-3)
    found = {"before": [right(model, digits)], "entropy": [], "rows": []}
    known, tested = digits.pixels[: job.read], digits.test_pixels[:40]
    with torch.no_grad():
        states = [model.states(pixels) for pixels in (known, tested)]
    block, head = SHOWN
    for name, map in MAPS.items():
        twin, kl, output = copy.deepcopy(model), [], []
        for k, (old, new) in enumerate(zip(model.blocks, twin.blocks, strict=True)):
            inputs, others = (old.norms[0](each[k]).detach() for each in states)
            new.attention, _ = linearize(
                old.attention, inputs, map=map, steps=job.fitted, batch=job.batch
            )
            missed = lost(old.attention, new.attention, others)
            kl += missed.kl
            output.append(missed.output)
            if name == "elu + 1":
                found["entropy"] += missed.entropy
                shown = old.attention
            else:
                shown = new.attention
            if k == block:
                A = shown(others[:1], mask=Causal())[1]
                found["rows"] += A[0, head, PIXELS // 2].detach().tolist()
        found[name] = [right(twin, digits), *output, *kl]
        train(twin, some, job.more, rate=1e-3)
        found[f"{name}, on"] = [right(twin, digits)]
    return found


def page(found: list[dict[str, list[float]]], job: Job, options: argparse.Namespace) -> list[str]:
    """The results in words and a table."""
    rows = []
    for name in MAPS:
        numbers = [one[name] for one in found]
        kl = [sum(each[3:]) / len(each[3:]) for each in numbers]
        rows.append(
            (
                name,
                report.spread(kl, 3),
                *(report.spread([100 * each[k] for each in numbers], 1) for k in (1, 2)),
                report.spread([each[0] for each in numbers], 1),
                report.spread([one[f"{name}, on"][0] for one in found], 1),
            )
        )
    before = report.spread([one["before"][0] for one in found], 1)
    entropy = report.spread([sum(one["entropy"]) / len(one["entropy"]) for one in found], 2)
    head = (
        "map",
        "KL of rows, nats",
        "output off, block 1, %",
        "output off, block 2, %",
        "accuracy, %",
        f"after {job.more} more steps, %",
    )
    return [
        "# A softmax model made linear",
        f"`python -m examples.recurrence.mimicry --seeds {options.seeds}`: {options.conditions}",
        f"The softmax models ({job.steps} steps of {job.batch} images) are right on {before} % of "
        f"360 test images; their rows have an entropy of {entropy} nats. Maps: {job.fitted} steps "
        f"on {job.read} images. KL and outputs on 40 test images, mean of 8 heads; mean ± standard "
        f"deviation of {options.seeds} seeds.",
        report.table(head, rows),
        "![One row of attention, and what the maps make of it](mimicry.png)",
    ]


def main(given: list[str] | None = None) -> None:
    """Train and convert every model, and write the table and the picture."""
    options = report.parse(report.arguments(__doc__), given, RESULTS)
    jobs = [Job(seed) for seed in range(options.seeds)]
    if options.quick:
        jobs = [
            replace(job, steps=2, fitted=2, more=2, batch=2, read=4, quick=True) for job in jobs
        ]
    about = "Digits: 1,797 images of scikit-learn."
    found = report.run(result, jobs, "mimicry", options, about)
    pictures.rows(["softmax", "T2R", "Hedgehog"], torch.tensor(found[0]["rows"]), options.out)
    report.write(options.out, "mimicry", *page(found, jobs[0], options))


if __name__ == "__main__":
    main()
