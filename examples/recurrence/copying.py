"""What dynamics that depend on the input are good for: selective copying.

Four data symbols stand among noise; at the end the model is asked to write them in their order,
with the same request at every place. With *regular* spacing they are the first four tokens, so
that each lies equally far from the place where it must be written: a shift in time. With *random*
spacing the model must tell data from noise. Two blocks of width 64, one head; positions enter as
rotations of query and key, with learned frequencies.

fixed            constant query and key: whatever the token, the same is done (a linear
                 time-invariant system of 32 learned oscillations, as S4 is one)
decay of heads   query and key depend on the token, the decay does not (RetNet)
decay of tokens  the decay does, too (Mamba-2)
attention        softmax

After Gu and Dao 2023 (Mamba), arXiv:2312.00752, section 4.1.1 and table 1.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from examples import report
from examples.model import Batch, Encoding, Size, Transformer, train
from examples.recurrence import pictures
from examples.recurrence.mixers import RESULTS
from regard import Causal, Rotary
from regard.nn import RecurrentAttention, SelfAttention

SYMBOLS, DATA, LENGTH = 8, 4, 36
NOISE, REQUEST = SYMBOLS, SYMBOLS + 1
SPACINGS = ("regular", "random")
SIZE = Size(heads=1)


class ValuesAlone(nn.Module):
    """Weights of queries and keys are 0, so that their biases are all there is."""

    def forward(self, weight: Tensor) -> Tensor:
        value = weight[2 * SIZE.width :]
        return torch.cat([weight.new_zeros(2 * SIZE.width, SIZE.width), value])


def oscillations() -> Rotary:
    """Frequencies from 0 to the fastest that tokens can show, as in S4D-Lin; learned from there."""
    count = SIZE.head_width // 2
    frequencies = math.pi * (torch.arange(count) + 0.5) / count
    return Rotary(frequencies.requires_grad_())


def fixed(size: Size) -> SelfAttention:
    """One convolution with a long kernel for all channels, whatever the tokens are."""
    layer = of_heads(size)
    nn.init.normal_(layer.in_proj_bias[: 2 * size.width])
    parametrize.register_parametrization(layer, "in_proj_weight", ValuesAlone())
    return layer


def of_heads(size: Size) -> SelfAttention:
    """RetNet's decay."""
    return RecurrentAttention(size.width, size.heads, decay="head", position=oscillations())


def of_tokens(size: Size) -> SelfAttention:
    """Mamba-2's decay."""
    return RecurrentAttention(size.width, size.heads, decay="token", position=oscillations())


def attention(size: Size) -> SelfAttention:
    """Softmax attention."""
    return SelfAttention(size.width, size.heads, position=oscillations())


DYNAMICS: dict[str, Callable[[Size], SelfAttention]] = {
    "fixed": fixed,
    "decay of heads": of_heads,
    "decay of tokens": of_tokens,
    "attention": attention,
}


@dataclass(frozen=True)
class Job:
    """One model, trained and tested with one kind of spacing."""

    dynamics: str
    spacing: str
    seed: int
    steps: int = 600
    batch: int = 16
    tested: int = 512


def draw(count: int, spacing: str, generator: torch.Generator) -> Batch:
    """Data among noise, then as many requests; the data are asked for at these."""
    data = torch.randint(SYMBOLS, (count, DATA), generator=generator)
    noise = torch.full((count, LENGTH - DATA), NOISE)
    if spacing == "random":
        order = torch.rand(noise.shape, generator=generator).argsort(-1)
        places = order[:, :DATA].sort(-1).values
    else:
        places = torch.arange(DATA).expand(count, -1)
    shown = noise.scatter(-1, places, data)
    tokens = torch.cat([shown, torch.full_like(data, REQUEST)], -1)
    return tokens, torch.cat([torch.full_like(noise, -100), data], -1)


def result(job: Job) -> list[float]:
    """Train a model; its right symbols, in %."""
    torch.manual_seed(job.seed)
    generator = torch.Generator().manual_seed(job.seed)
    mask = Causal() if job.dynamics == "attention" else None
    model = Transformer(SYMBOLS + 2, Encoding(), mask, SIZE, DYNAMICS[job.dynamics])
    train(model, lambda: draw(job.batch, job.spacing, generator), job.steps, rate=3e-3)
    tokens, targets = draw(job.tested, job.spacing, generator)
    with torch.no_grad():
        agree = (model(tokens).argmax(-1) == targets)[targets >= 0]
    return [100 * float(agree.double().mean())]


def page(
    found: dict[str, dict[str, list[float]]], job: Job, options: argparse.Namespace
) -> list[str]:
    """The results in words and a table."""
    rows = [
        (name, *(report.spread(numbers[spacing], 1) for spacing in SPACINGS))
        for name, numbers in found.items()
    ]
    return [
        "# Copying, at regular and at random places",
        f"`python -m examples.recurrence.copying --seeds {options.seeds}`: {options.conditions}",
        f"Each model: {job.steps} steps of {job.batch} sequences of {LENGTH} tokens, {DATA} data "
        f"symbols of {SYMBOLS} kinds. Right symbols in %, of {job.tested} sequences; mean ± "
        f"standard deviation of {options.seeds} seeds. Guessing gives {100 / SYMBOLS}.",
        report.table(("dynamics", *SPACINGS), rows),
        "![Right symbols by dynamics and spacing](copying.png)",
    ]


def main(given: list[str] | None = None) -> None:
    """Train every model, and write the table and the picture."""
    options = report.parse(report.arguments(__doc__, seeds=3), given, RESULTS)
    jobs = [
        Job(dynamics, spacing, seed)
        for seed in range(options.seeds)
        for spacing in SPACINGS
        for dynamics in DYNAMICS
    ]
    if options.quick:
        jobs = [replace(job, steps=2, batch=2, tested=4) for job in jobs]
    found: dict[str, dict[str, list[float]]] = {
        name: {spacing: [] for spacing in SPACINGS} for name in DYNAMICS
    }
    for job, numbers in zip(jobs, report.run(result, jobs, "copying", options), strict=True):
        found[job.dynamics][job.spacing] += numbers
    pictures.copying(found, options.out)
    report.write(options.out, "copying", *page(found, jobs[0], options))


if __name__ == "__main__":
    main()
