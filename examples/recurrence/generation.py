"""Images generated pixel by pixel: how good, and how many in a second.

Two models, alike but for their attention (softmax, linear), learn to continue digits of 8 x 8
pixels, 64 tokens of 17 grey levels: two blocks of width 64, 4 heads, learned positions. How good
they are is said in bits per pixel of images they have not seen.

Speed is measured of one thread, in seconds of the processor: softmax that reads the whole image
again for each pixel (recompute), softmax with a KV cache, the recurrent state, and the same state
in cells (`to_recurrent`), which build no matrix; also for images of 1,024 pixels, of models that
were not trained, since their weights change no time.

After table 4 of Katharopoulos et al. 2020, arXiv:2006.16236, where n is 784 and 3,072.
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from examples import report
from examples.digits import LEVELS, PIXELS, Digits
from examples.model import Batch, Encoding, Size, Transformer, loss, train
from examples.recurrence import pictures
from examples.recurrence.mixers import MIXERS, RESULTS
from regard import Causal
from regard.convert import to_recurrent
from regard.nn import CellState, Learned, generate

START = LEVELS
COMPARED = ("softmax", "linear")
WAYS = ("recompute", "KV cache", "recurrent state", "recurrent cells")
LONG = 1024
SHOWN = 12


@dataclass(frozen=True)
class Job:
    """One model; the first seed also measures times."""

    mixer: str
    seed: int
    steps: int = 600
    batch: int = 32
    long: int = LONG
    many: int = 32
    quick: bool = False


def model_of(mixer: str, pixels: int) -> Transformer:
    """A model of images of so many pixels."""
    encoding = Encoding(on_input=lambda width: Learned(pixels, width))
    return Transformer(LEVELS + 1, encoding, Causal(), Size(), MIXERS[mixer])


def asked(pixels: Tensor) -> Batch:
    """A start and all pixels but the last, and what follows each."""
    start = torch.full_like(pixels[:, :1], START)
    return torch.cat([start, pixels[:, :-1]], -1), pixels


class Recomputed:
    """The model without a memory: each call reads all tokens so far."""

    def __init__(self, model: Transformer) -> None:
        self.model = model
        self.tokens: Tensor | None = None

    def __call__(self, tokens: Tensor, state: Any) -> Tensor:
        self.tokens = tokens if self.tokens is None else torch.cat([self.tokens, tokens], -1)
        return self.model(self.tokens)


class Celled:
    """The model as a recurrent network: one token in each call, and the cells' states."""

    def __init__(self, model: Transformer) -> None:
        self.model = model
        self.cells = [to_recurrent(block.attention) for block in model.blocks]
        self.states: list[CellState | None] = [None] * len(self.cells)
        self.length = 0

    def __call__(self, tokens: Tensor, state: Any) -> Tensor:
        model = self.model
        x = model.place(model.embed(tokens), offset=self.length)
        for k, (block, cell) in enumerate(zip(model.blocks, self.cells, strict=True)):
            mixed, self.states[k] = cell(block.norms[0](x)[:, 0], self.states[k])
            x = x + mixed[:, None]
            x = x + block.forward_part(block.norms[1](x))
        self.length += 1
        return model.out(model.norm(x))


def drawn(model: Transformer, count: int, pixels: int, way: str) -> Tensor:
    """Images [count, pixels] from a model, one pixel after the other."""

    def choose(logits: Tensor) -> Tensor:
        return torch.multinomial(logits[..., :LEVELS].softmax(-1), 1)[..., 0]

    start = torch.full((count, 1), START)
    if way in ("recompute", "recurrent cells"):
        kind = Recomputed if way == "recompute" else Celled
        return generate(kind(model), start, pixels, state=None, choose=choose)
    return generate(model, start, pixels, state=model.memory(), choose=choose)


def images_per_second(model: Transformer, count: int, pixels: int, way: str) -> float:
    """Of the processor's seconds, after a first image that is dropped."""
    drawn(model, count, min(pixels, 8), way)
    start = time.process_time()
    drawn(model, count, pixels, way)
    return count / (time.process_time() - start)


def result(job: Job) -> dict[str, list[float]]:
    """Bits per pixel of test images, images per second, and some images."""
    torch.manual_seed(job.seed)
    generator = torch.Generator().manual_seed(job.seed)
    digits = Digits.read(quick=job.quick)
    model = model_of(job.mixer, PIXELS)
    train(model, lambda: asked(digits.draw(job.batch, generator)[0]), job.steps, rate=3e-3)
    with torch.no_grad():
        nats = [float(loss(model, asked(part))) for part in digits.test_pixels.split(40)]
    found = {"bits": [sum(nats) / len(nats) / math.log(2)], "speed": [], "images": []}
    if job.seed == 0:
        untrained = model_of(job.mixer, job.long).eval()
        ways = WAYS[:2] if job.mixer == "softmax" else WAYS[2:]
        for way in ways:
            for one, count, pixels in (
                (model, 1, PIXELS),
                (model, job.many, PIXELS),
                (untrained, 1, job.long),
            ):
                found["speed"].append(images_per_second(one, count, pixels, way))
        found["images"] = drawn(model, SHOWN, PIXELS, ways[-1]).flatten().tolist()
    return found


def page(
    found: dict[str, list[dict[str, list[float]]]], job: Job, options: argparse.Namespace
) -> list[str]:
    """The results in words and tables."""
    quality = [
        (name, report.spread([one["bits"][0] for one in runs], 3)) for name, runs in found.items()
    ]
    speeds = found["softmax"][0]["speed"] + found["linear"][0]["speed"]
    rows = [(way, *(f"{x:.3g}" for x in speeds[3 * k : 3 * k + 3])) for k, way in enumerate(WAYS)]
    many = f"{PIXELS} pixels, {job.many} at once"
    return [
        "# Digits, generated pixel by pixel",
        f"`python -m examples.recurrence.generation --seeds {options.seeds}`: {options.conditions}",
        f"Each model: {job.steps} steps of {job.batch} images. Bits per pixel of 360 test images; "
        f"mean ± standard deviation of {options.seeds} seeds. Guessing costs {math.log2(17):.2f}.",
        report.table(("attention", "bits per pixel"), quality),
        "Images in a second of one thread's time, the first seed:",
        report.table(("way", f"{PIXELS} pixels", many, f"{job.long} pixels"), rows),
        "![Images that both models made](generation.png)",
    ]


def main(given: list[str] | None = None) -> None:
    """Train every model, and write the tables and the picture."""
    options = report.parse(report.arguments(__doc__), given, RESULTS)
    jobs = [Job(mixer, seed) for seed in range(options.seeds) for mixer in COMPARED]
    if options.quick:
        jobs = [replace(job, steps=2, batch=2, long=20, many=2, quick=True) for job in jobs]
    found: dict[str, list[dict[str, list[float]]]] = {name: [] for name in COMPARED}
    about = "Digits: 1,797 images of scikit-learn."
    for job, one in zip(jobs, report.run(result, jobs, "generation", options, about), strict=True):
        found[job.mixer].append(one)
    images = {name: torch.tensor(runs[0]["images"]) for name, runs in found.items()}
    pictures.digits(images, SHOWN, options.out)
    report.write(options.out, "generation", *page(found, jobs[0], options))


if __name__ == "__main__":
    main()
