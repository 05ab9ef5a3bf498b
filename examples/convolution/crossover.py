"""A task where a convolution cannot keep up: a label that no small receptive field can see.

This task is constructed to contain the effect. Two glyphs lie at random places of a 12 x 12 canvas,
on tokens of their own; the label is whether they are the same. One block of each network sees them:
a 3 x 3 convolution sees both only if they are at most two tokens apart. Farther apart, its logit is
a sum of what it makes of one glyph and of the other (`mixers.Network`), and no such sum is right
about more than `ceiling`. Attention compares any two tokens. Images are drawn, as many as are
asked for. That the convolution has a ceiling is by construction; whether it gets there, and where
the curves cross, if they do, is measured.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from examples import report
from examples.convolution import pictures
from examples.convolution.curves import Data, Found, Job, Study, arguments, crossover, table
from examples.convolution.mixers import ARMS, PATCH, TAPS, Size
from examples.convolution.pictures import RESULTS
from regard.grid import Grid, from_patches

CONV, _, LEARNED, _ = ARMS
COUNTS = (250, 1000, 4000, 32000)
UPDATES = 2000
SIDE = 12
GLYPHS = torch.tensor(
    [[1.0, 0.0, 0.0, 1.0], [0.0, 1.0, 1.0, 0.0], [1.0, 1.0, 0.0, 0.0], [1.0, 0.0, 1.0, 0.0]]
)
"""Of 2 x 2 pixels, as many of them white in each."""
NOISE = 0.1
NEAR, FAR = "near", "far"


CEILING = 75.0
"""The most, in %, that a network can be right about far pairs whose logit is a sum x_a + y_b.

a and b are the glyphs at two places, K kinds; half of the pairs are the same, and each pair of a
kind is as likely. Let h kinds a be called the same with themselves, x_a + y_a > t. For two of them
x_a + y_b + x_b + y_a > 2 t, so that one of the different pairs (a, b) and (b, a) is called the
same, too: h (h - 1) / 2 of K (K - 1) at least. The share that is right is at most
h / 2 K + (1 - h (h - 1) / 2 K (K - 1)) / 2, which is 3 / 4 for h = K and h = K - 1, and less below.
Noise changes nothing: it is the same for all glyphs.
"""


@dataclass(frozen=True)
class Glyphs:
    """Images of two glyphs, in any number."""

    drawn: int = COUNTS[-1]
    kept: int = 500
    tested: int = 4000

    @property
    def size(self) -> Size:
        """Of the network: one block."""
        return Size(SIDE, 2, 1)

    def data(self, count: int, seed: int) -> Data:
        """The first images of a seed; those to stop by and to be tested on are always the same."""
        training, validation, test = (
            _images(self.size.grid, number, seed)
            for number, seed in ((self.drawn, seed), (self.kept, -1), (self.tested, -2))
        )
        images, same, _ = training
        far = test[2]
        return Data(
            (images[:count], same[:count]), validation[:2], test[:2], {NEAR: ~far, FAR: far}
        )


def _images(grid: Grid, count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Images [count, 1, side, side], whether their glyphs are the same, and too far apart."""
    generator = torch.Generator().manual_seed(seed)

    def integers(high: int) -> Tensor:
        return torch.randint(high, (count,), generator=generator)

    same, kind, at = integers(2).bool(), integers(len(GLYPHS)), integers(grid.rows)
    other = (at + 1 + integers(grid.rows - 1)) % grid.rows
    kinds = kind, torch.where(same, kind, (kind + 1 + integers(len(GLYPHS) - 1)) % len(GLYPHS))
    tokens = torch.zeros(count, grid.rows, PATCH**2)
    for place, which in zip((at, other), kinds, strict=True):
        tokens[torch.arange(count), place] = GLYPHS[which]
    images = from_patches(tokens, grid, (PATCH, PATCH))
    images = images + NOISE * torch.randn(images.shape, generator=generator)
    # A token sees both if each is within TAPS // 2 of it.
    far = (grid.keys(at) - grid.keys(other)).abs().amax(-1) > 2 * (TAPS // 2)
    return images, same.long(), far


def page(found: Found, options: argparse.Namespace) -> tuple[str, ...]:
    """The results in words and tables."""
    study, task, curves = found.study, found.study.task, found.curves()
    rates = "; ".join(f"{arm} {rate:g}" for arm, rate in found.rates.items())
    highest = max(right for by_seed in found.curves(FAR)[CONV] for right in by_seed.values())
    return (
        "# A label that no small receptive field can see",
        f"`python -m examples.convolution.crossover --seeds {options.seeds}`: {options.conditions}",
        "Constructed to contain the effect: the label, whether two glyphs at random places are the "
        f"same, is none of a small receptive field. {task.size.grid.rows} tokens, "
        f"{task.size.blocks} block, {study.updates} updates of {Job.batch} images for every n. "
        f"Accuracy on {task.tested:,} test images in %, mean ± standard deviation of "
        f"{found.seeds()}:",
        table(curves, study.counts, "mixer"),
        "Of these, glyphs within one 3 x 3 field:",
        table(found.curves(NEAR), study.counts, "mixer, near"),
        f"And glyphs farther apart, about which the convolution cannot be right in more than "
        f"{CEILING:g} % (but for the chance of {task.tested:,} drawn images):",
        table(found.curves(FAR), study.counts, "mixer, far"),
        f"Crossover: {crossover(curves, CONV, LEARNED, study.counts)}. The convolution's best "
        f"about far glyphs, of all seeds and n: {highest:.1f}.",
        "![Accuracy over the number of images](crossover.png)",
        "All test images; bars: standard error over seeds.",
        f"Parameters: {found.parameters()}. Rates: {rates}. Seconds of one core for one network: "
        f"{found.seconds()}, with those that choose rates.",
    )


def main(given: list[str] | None = None) -> None:
    """Train every network, and write the tables and the picture."""
    options = report.parse(arguments(__doc__, seeds=2), given, RESULTS)
    study = Study(Glyphs(), "crossover", COUNTS, (CONV, LEARNED), UPDATES)
    if options.quick:
        study = replace(study, task=Glyphs(16, 8, 64), counts=(8, 16), updates=2, rates=(1e-3,))
    found = study.run(options)
    pictures.curves(found.curves(), study.counts, options.out, "crossover")
    report.write(options.out, "crossover", *page(found, options), so_far=options.so_far)


if __name__ == "__main__":
    main()
