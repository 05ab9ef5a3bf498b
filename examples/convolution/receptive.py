"""A receptive field that learns: Gaussian heads look for the taps of a convolution they never saw.

The teacher is a random 3 x 3 convolution with dilation 2, so its taps are 2 pixels apart; the
images are 12 x 12 white noise, in which no pixel says anything about its neighbours. The student is
attention by position alone with 9 or 16 `Gaussian` heads. They begin at random places, wide, and
learn where to look (centres), how sharply, and what to make of it (values), from the teacher's
outputs alone.

A tap is found if a head's centre is within 0.1 pixels of it; a seed succeeds if every tap is found.
Two heads may settle on one tap and leave another without any: that is counted, and not hidden.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples import report
from examples.convolution import pictures
from examples.convolution.pictures import RESULTS
from regard.grid import Grid, box
from regard.nn import ConvAttention
from regard.nn.conv import Geometry
from regard.position import Gaussian

SIDE, SIZE, DILATION = 12, 3, 2
CHANNELS, OUTPUTS = 2, 8
NEAR = 0.1
HEADS = (9, 16)
TAPS = DILATION * box((SIZE, SIZE), torch.device("cpu")).float()


@dataclass(frozen=True)
class Job:
    """One student of one teacher."""

    heads: int
    seed: int
    steps: int = 500
    batch: int = 8
    kept: int = 20


def student(heads: int) -> ConvAttention:
    """Heads at random places of the field that the teacher reads."""
    geometry = Geometry(*(2 * (n,) for n in (SIZE, 1)), 2 * ((0, 0),), 2 * (DILATION,))
    start = torch.rand(heads, 2) * DILATION * (SIZE - 1)
    weight = 0.1 * torch.randn(OUTPUTS, CHANNELS, heads)
    return ConvAttention(weight, None, Gaussian.of(start, Grid((SIDE, SIDE)), alpha=0.5), geometry)


def outputs(layer: ConvAttention, images: Tensor) -> Tensor:
    """layer(images) in the dense form: the matrix is small, and all images share it."""
    mixed = layer.matrix(SIDE).matmul(layer.tokens(images), form="dense")
    return layer.project(mixed, (SIDE, SIDE))


def missed(centres: Tensor) -> Tensor:
    """The distance of each tap from the nearest head, [taps]."""
    return torch.cdist(TAPS, centres).amin(1)


def result(job: Job) -> dict[str, list[float]]:
    """Train a student; its error, its sharpness, and where its heads were along the way."""
    torch.manual_seed(job.seed)
    teacher = nn.Conv2d(CHANNELS, OUTPUTS, SIZE, dilation=DILATION, bias=False)
    teacher.requires_grad_(False)
    layer = student(job.heads)
    values = [layer.weight]
    places = list(layer.position.parameters())
    optimizer = torch.optim.Adam([{"params": values, "lr": 0.01}, {"params": places, "lr": 0.03}])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, job.steps)
    path, error = [], 1.0
    for step in range(job.steps + 1):
        images = torch.randn(job.batch, CHANNELS, SIDE, SIDE)
        wanted = teacher(images)
        optimizer.zero_grad()
        loss = F.mse_loss(outputs(layer, images), wanted) / wanted.square().mean()
        loss.backward()
        error = float(loss.detach())
        if step * job.kept % job.steps == 0:
            path += layer.position().centre.detach().flatten().tolist()
        optimizer.step()
        schedule.step()
    part = layer.position()
    return {
        "error": [error],
        "missed": missed(part.centre.detach()).tolist(),
        "alpha": part.sharpness.detach().square().tolist(),
        "path": [round(x, 2) for x in path],
    }


def found_all(one: dict[str, list[float]]) -> bool:
    """Whether every tap has a head."""
    return max(one["missed"]) <= NEAR


def page(
    found: dict[int, list[dict[str, list[float]]]], job: Job, options: argparse.Namespace
) -> tuple[str, ...]:
    """The results in words and a table."""
    rows = []
    for heads, runs in found.items():
        counts = [sum(away <= NEAR for away in one["missed"]) for one in runs]
        errors = {
            success: [one["error"][0] for one in runs if found_all(one) is success]
            for success in (True, False)
        }
        rows.append(
            (
                f"{heads} heads",
                f"{sum(map(found_all, runs))} of {len(runs)}",
                f"{report.spread(counts, 1)} of {SIZE**2}",
                *(
                    f"{min(some):.4f} to {max(some):.4f}" if some else "-"
                    for some in errors.values()
                ),
            )
        )
    return (
        "# Heads that find a convolution's taps",
        f"`python -m examples.convolution.receptive --seeds {options.seeds}`: {options.conditions}",
        f"Each student: {job.steps} steps of {job.batch} images of noise, {SIDE} x {SIDE}, "
        f"{CHANNELS} channels to {OUTPUTS}. Error: mean squared, divided by the outputs' mean "
        "square, last batch.",
        report.table(
            (
                "student",
                "every tap found",
                "taps found",
                "error where found",
                "error where one is missed",
            ),
            rows,
        ),
        "![Centres of heads on their way to the taps](receptive.png)",
        "Paths of the heads' centres; crosses are the teacher's taps, a dot is where a head ends, "
        "hollow where it looks at nothing in particular (alpha below 0.5). The first seed of each "
        "kind.",
    )


def main(given: list[str] | None = None) -> None:
    """Train every student, and write the table and the picture."""
    options = report.parse(report.arguments(__doc__, seeds=10), given, RESULTS)
    jobs = [Job(heads, seed) for seed in range(options.seeds) for heads in HEADS]
    if options.quick:
        jobs = [replace(job, steps=4, batch=2, kept=2) for job in jobs]
    found: dict[int, list[dict[str, list[float]]]] = {heads: [] for heads in HEADS}
    for job, one in zip(jobs, report.run(result, jobs, "receptive", options), strict=True):
        found[job.heads].append(one)
    panels = []
    for heads, runs in found.items():
        for success in (True, False):
            seeds = [seed for seed, one in enumerate(runs) if found_all(one) is success]
            if seeds:
                what = "every tap found" if success else "a tap is missed"
                one = runs[seeds[0]]
                path = torch.tensor(one["path"]).reshape(-1, heads, 2)
                panels.append((f"{heads} heads, seed {seeds[0]}:\n{what}", path, one["alpha"]))
    pictures.paths(panels, TAPS, options.out)
    report.write(options.out, "receptive", *page(found, jobs[0], options))


if __name__ == "__main__":
    main()
