"""A trained CNN becomes attention: the same answers, and then heads that may move.

A CNN of two convolutions learns Fashion-MNIST at 12 x 12 pixels. `from_conv` writes both as
attention, in float64, and the logits of the test images are compared. Then four models begin where
the CNN stands and learn on, each for as many updates, at the same rate, from the same images:

- the CNN itself, the control
- Gaussian heads of alpha 46, which are the convolution to the last digit
- Gaussian heads of a small alpha, which are soft
- the same, gated: each head may also look at content (`GatedAttention`)

After d'Ascoli, Sagun, Biroli, Morcos 2021, arXiv:2106.05795 (converted networks, fine-tuned), at a
thousandth of the size.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from examples import report
from examples.convolution import pictures
from examples.convolution.pictures import RESULTS
from examples.fashion import CLASSES, SIDE, Images, accuracy, folder_of
from examples.model import Rates, loss, train
from regard.convert import from_conv
from regard.nn import ConvAttention, GatedAttention

HEADS = ("kernel", "min", "gaussian")
ALPHA = 3.0
GATE = 3.0
Convert = Callable[[nn.Conv2d], nn.Module]
ARMS: dict[str, Convert] = {
    "CNN": copy.deepcopy,
    "alpha 46": lambda conv: from_conv(conv, heads="gaussian"),
    f"alpha {ALPHA:g}": lambda conv: from_conv(conv, heads="gaussian", alpha=ALPHA),
    f"alpha {ALPHA:g}, gated": lambda conv: GatedAttention(
        from_conv(conv, heads="gaussian", alpha=ALPHA), 4, gate=GATE
    ),
}
Result = dict[str, dict[str, list[float]]]


@dataclass(frozen=True)
class Job:
    """One seed: a CNN, its conversions, what became of them."""

    seed: int
    data: Path | None
    images: int = 4000
    tested: int = 2000
    steps: int = 400
    further: int = 300
    batch: int = 32
    rate: float = 3e-3
    places: float = 0.03


def network() -> nn.Sequential:
    """Two convolutions, the first of stride 2, and a linear layer."""
    side = SIDE // 2
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * side * side, CLASSES),
    )


def converted(model: nn.Sequential, convert: Convert) -> nn.Sequential:
    """A copy of the model in which every convolution is what `convert` makes of it."""
    return nn.Sequential(
        *(convert(layer) if isinstance(layer, nn.Conv2d) else copy.deepcopy(layer)
          for layer in model)
    )  # fmt: skip


def attentions(model: nn.Sequential) -> list[ConvAttention]:
    """What the convolutions of a model became."""
    return [layer for layer in model.modules() if isinstance(layer, ConvAttention)]


@torch.no_grad()
def gaps(model: nn.Sequential, images: Tensor) -> dict[str, list[float]]:
    """The largest difference of a logit in float64, the largest logit, and heads of each layer."""
    model, images = copy.deepcopy(model).double(), images.double()
    wanted = model(images)
    largest = float(wanted.abs().max())
    found = {}
    for heads in HEADS:
        ours = converted(model, lambda conv, heads=heads: from_conv(conv, heads=heads))
        gap = float((ours(images) - wanted).abs().max())
        found[heads] = [gap, largest, *(layer.num_heads for layer in attentions(ours))]
    return found


def centres(model: nn.Sequential) -> list[Tensor]:
    """Where the Gaussian heads of each layer look, [heads, 2]; none for a CNN."""
    return [layer.position().centre.detach().clone() for layer in attentions(model)]


def result(job: Job) -> Result:
    """Train a CNN, convert it, train on."""
    data = Images.read(job.data, job.images, job.tested)
    everything = torch.arange(len(data.training[1]))
    torch.manual_seed(job.seed)

    def learn(model: nn.Module, steps: int, rate: float) -> None:
        generator = torch.Generator().manual_seed(job.seed + steps)
        rates = Rates(rate, job.places)
        train(model, lambda: data.draw(job.batch, everything, generator), steps, rates)

    model = network()
    learn(model, job.steps, job.rate)
    found: Result = {"gaps": gaps(model, data.test[0][:500]), "accuracy": {}, "moved": {}}
    for name, convert in ARMS.items():
        ours = converted(model, convert)
        before, at = accuracy(ours, data.test), centres(ours)
        learn(ours, job.further, job.rate / 3)
        with torch.no_grad():
            lost = float(loss(ours, data.test))
        found["accuracy"][name] = [before, accuracy(ours, data.test), lost]
        now = centres(ours)
        away = [float((b - a).norm(dim=-1).mean()) for a, b in zip(at, now, strict=True)]
        found["moved"][name] = away
        found[name] = {
            "centres": [round(x, 3) for x in now[0].flatten().tolist()] if now else [],
            "gates": [
                float(layer.gate.detach().sigmoid().mean())
                for layer in ours
                if isinstance(layer, GatedAttention)
            ],
        }
    return found


def page(found: list[Result], job: Job, options: argparse.Namespace) -> tuple[str, ...]:
    """The results in words and tables."""
    equal = [
        (
            heads,
            f"{max(one['gaps'][heads][0] for one in found):.1e}",
            f"{max(one['gaps'][heads][1] for one in found):.1f}",
            " and ".join(str(int(count)) for count in found[0]["gaps"][heads][2:]),
        )
        for heads in HEADS
    ]
    rows = []
    for name in ARMS:
        before, after, lost = zip(*(one["accuracy"][name] for one in found), strict=True)
        moved = list(zip(*(one["moved"][name] for one in found), strict=True))
        rows.append(
            (
                name,
                report.spread(before, 1),
                report.spread(after, 1),
                report.spread([b - a for a, b in zip(before, after, strict=True)], 1),
                report.spread(lost, 3),
                *([report.spread(layer, 2) for layer in moved] or ["-", "-"]),
            )
        )
    gated = list(ARMS)[-1]
    gates = [
        report.spread(layer, 3)
        for layer in zip(*(one[gated]["gates"] for one in found), strict=True)
    ]
    return (
        "# A trained CNN becomes attention, and learns on",
        f"`python -m examples.convolution.convert --data fashion_mnist --seeds {options.seeds}`: "
        f"{options.conditions}",
        f"Two convolutions learn {job.images:,} images of Fashion-MNIST at {SIDE} x {SIDE} for "
        f"{job.steps} updates of {job.batch} images. The largest difference of a logit between the "
        f"CNN and attention, float64, 500 test images, the worst of {options.seeds} seeds:",
        report.table(
            ("heads", "largest difference", "largest logit", "heads of the layers"), equal
        ),
        'A kernel matrix of full rank needs as many heads as taps: "min" saves none here.',
        f"Then {job.further} more updates each, of all weights, at a third of the rate, and "
        f"{job.places} for the heads' centres, sharpness and gates. Accuracy "
        f"on {job.tested:,} test images in %, mean ± standard deviation of {options.seeds} seeds; "
        "how far the heads' centres moved on average, in pixels of each layer's input:",
        report.table(
            (
                "model",
                "accuracy before",
                "after",
                "gain",
                "loss after",
                "moved, layer 1",
                "moved, layer 2",
            ),
            rows,
        ),
        f"Gates of `{gated}` begin at {torch.tensor(GATE).sigmoid():.3f} and end at "
        f"{gates[0]} in layer 1 and {gates[1]} in layer 2 (1: position alone).",
        "![Centres of the heads before and after](convert.png)",
        "Where the nine heads of the first layer look, first seed: crosses are the taps of the "
        "kernel, dots the centres after learning on.",
    )


def main(given: list[str] | None = None) -> None:
    """Train and convert every seed, and write the tables and the picture."""
    parser = report.arguments(__doc__)
    parser.add_argument("--data", type=Path, help="the folder of Fashion-MNIST")
    options = report.parse(parser, given, RESULTS)
    folder = folder_of(options)
    jobs = [Job(seed, folder) for seed in range(options.seeds)]
    if options.quick:
        small = {"images": 16, "tested": 8, "steps": 2, "further": 2, "batch": 2}
        jobs = [replace(job, **small) for job in jobs]
    found = report.run(result, jobs, "convert", options)
    moved = {name: found[0][name]["centres"] for name in ARMS if found[0][name]["centres"]}
    pictures.moved(moved, options.out)
    report.write(options.out, "convert", *page(found, jobs[0], options))


if __name__ == "__main__":
    main()
