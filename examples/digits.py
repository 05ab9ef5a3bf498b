"""Handwritten digits of 8 x 8 pixels with 17 grey levels, as sequences of 64 numbers.

They come with scikit-learn: 1,797 images of the UCI "Optical Recognition of Handwritten Digits".
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

SIDE, LEVELS = 8, 17
PIXELS = SIDE * SIDE
TESTED = 360


@dataclass(frozen=True)
class Digits:
    """Pixels [n, 64] from 0 to 16 and classes [n]: to learn from, and to be tested on."""

    pixels: Tensor
    classes: Tensor
    test_pixels: Tensor
    test_classes: Tensor

    @staticmethod
    @cache
    def read(*, quick: bool) -> Digits:
        """The last 360 images are for tests: other writers wrote them. Noise if `quick`."""
        if quick:
            noise = torch.Generator().manual_seed(0)
            pixels = torch.randint(LEVELS, (40, PIXELS), generator=noise)
            classes, tested = torch.randint(10, (40,), generator=noise), 8
        else:
            from sklearn.datasets import load_digits

            found = load_digits()
            pixels = torch.from_numpy(found.data).long()
            classes, tested = torch.from_numpy(found.target).long(), TESTED
        return Digits(pixels[:-tested], classes[:-tested], pixels[-tested:], classes[-tested:])

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Random images of the training part, and their classes."""
        chosen = torch.randint(len(self.pixels), (count,), generator=generator)
        return self.pixels[chosen], self.classes[chosen]
