"""Fashion-MNIST: grey images of clothes in ten classes, at 12 x 12."""

from __future__ import annotations

import argparse
import gzip
import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.model import Batch

WHERE = "https://github.com/zalandoresearch/fashion-mnist"
CLASSES = 10
SIDE = 12


@dataclass(frozen=True)
class Images:
    """Images [n, 1, 12, 12] and their classes [n], to learn from and to be tested on."""

    training: Batch
    test: Batch

    @staticmethod
    @cache
    def read(folder: Path | None, count: int, tested: int) -> Images:
        """The first images of both files; noise, of which nothing is learned, without a folder."""
        if folder is None:
            noise = torch.Generator().manual_seed(0)
            found = [
                (
                    torch.randn(n, 1, SIDE, SIDE, generator=noise),
                    torch.randint(CLASSES, (n,), generator=noise),
                )
                for n in (count, tested)
            ]
            return Images(*found)
        return Images(part(folder, "train", count), part(folder, "t10k", tested))

    def draw(self, count: int, among: Tensor, generator: torch.Generator) -> Batch:
        """Random images among those of the training part with these numbers [n]."""
        chosen = among[torch.randint(len(among), (count,), generator=generator)]
        images, classes = self.training
        return images[chosen], classes[chosen]


def folder_of(options: argparse.Namespace) -> Path | None:
    """Where the files lie: what --data says, nowhere for --quick and --redraw."""
    if options.quick or options.redraw:
        return None
    if options.data is None or not options.data.is_dir():
        raise SystemExit(
            f"--data is {options.data}; it must be the folder of Fashion-MNIST's four files, "
            f"train-images-idx3-ubyte.gz and so on, from {WHERE}. --quick needs none, and says "
            "nothing."
        )
    return Path(options.data)


@torch.no_grad()
def accuracy(model: nn.Module, batch: Batch) -> float:
    """Images whose class is the likeliest one, in %."""
    right = [
        model(images).argmax(-1) == classes
        for images, classes in zip(*(part.split(250) for part in batch), strict=True)
    ]
    return 100 * float(torch.cat(right).double().mean())


def part(folder: Path, name: str, count: int, side: int = SIDE) -> Batch:
    """The first images of a file, [n, 1, side, side], and their classes."""
    images = _numbers(folder / f"{name}-images-idx3-ubyte.gz", count).float() / 255
    # The mean and spread of the training pixels, of the data's own page.
    images = F.adaptive_avg_pool2d((images - 0.2860) / 0.3530, side)[:, None]
    return images, _numbers(folder / f"{name}-labels-idx1-ubyte.gz", count).long()


def _numbers(path: Path, count: int) -> Tensor:
    """The first entries of a file of bytes: how many axes it has, their sizes, the bytes."""
    with gzip.open(path) as file:
        axes = file.read(4)[3]
        sizes = [int.from_bytes(file.read(4), "big") for _ in range(axes)]
        sizes[0] = min(count, sizes[0])
        raw = bytearray(file.read(math.prod(sizes)))
    return torch.frombuffer(raw, dtype=torch.uint8).reshape(sizes)
