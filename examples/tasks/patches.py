"""Clothes from patches: one label for an image that is a set of vectors.

N vectors to one label: 28 x 28 pixels are 16 patches of 7 x 7, each a vector, as in a vision
transformer; learned positions, two layers (width 64, 4 heads), the mean, one linear layer.
Fashion-MNIST, 60,000 images to learn from, half of them mirrored, anew each time; 2 times through
them at rate 0.002, no choice by the test part.

Dosovitskiy et al. 2021, arXiv:2010.11929.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from examples import fashion
from examples.model import Batch
from examples.tasks.task import Job, Task
from regard.nn import Encoder, EncoderLayer, Learned, SelfAttention

SIDE, PATCH, WIDTH, HEADS, BATCH, EPOCHS = 28, 7, 64, 4, 64, 2
WHERE = f"the folder of Fashion-MNIST's four files ({fashion.WHERE}, MIT)"
PAGE = "README of github.com/zalandoresearch/fashion-mnist, as submitted there"
PUBLISHED = (
    ("people without training in fashion", "83.5", PAGE),
    ("2 convolutions + pooling", "87.6 to 91.6", PAGE),
    ("MLP 256-128-100", "88.33", PAGE),
    ("GRU + SVM, with dropout", "89.7", PAGE),
    ("XGBoost", "89.8", PAGE),
    ("2 convolutions, < 100 K parameters", "92.5", PAGE),
    ("ResNet18, augmentation", "94.9", PAGE),
    ("WRN40-4, 8.9 M parameters, augmentation", "96.7", PAGE),
)
FOUND = (
    "A miss: 4 below a plain network of three layers, and 1 above people. Twice through the images "
    "is less than a minute of one core; more was not tried. One seed, so no spread."
)


def read(folder: Path | None, part: str) -> Batch:
    """Images [n, 1, 28, 28] of a part and their classes; noise without a folder."""
    if folder is None:
        noise = torch.Generator().manual_seed(0)
        return torch.randn(70, 1, SIDE, SIDE, generator=noise), torch.arange(70) % 10
    return fashion.part(folder, part, 60_000, SIDE)


class Viewer(nn.Module):
    """Images [batch, 1, 28, 28] to logits of the classes, [batch, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.cut = nn.Conv2d(1, WIDTH, PATCH, stride=PATCH)  # one linear layer of each patch
        self.place = Learned((SIDE // PATCH) ** 2, WIDTH)
        layers = (EncoderLayer(SelfAttention(WIDTH, HEADS), norm_first=True) for _ in range(2))
        self.encoder = Encoder(layers, nn.LayerNorm(WIDTH))
        self.out = nn.Linear(WIDTH, fashion.CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.place(self.cut(images).flatten(-2).mT)
        return self.out(self.encoder(patches).mean(-2))


def learn(job: Job) -> list[float]:
    """Train a viewer; accuracy on the test part."""
    (images, classes), test = (read(job.data, part) for part in ("train", "t10k"))
    torch.manual_seed(job.seed)
    generator = torch.Generator().manual_seed(job.seed)
    model, order = Viewer(), []

    def draw() -> Batch:
        if not order:
            order.extend(torch.randperm(len(images), generator=generator).split(BATCH))
        chosen = order.pop()
        some = images[chosen]
        mirrored = torch.rand(len(some), 1, 1, 1, generator=generator) < 0.5
        return torch.where(mirrored, some.flip(-1), some), classes[chosen]

    job.train(model, draw, EPOCHS * len(images) // BATCH, rate=2e-3)
    job.save(model)
    return [fashion.accuracy(model, test)]


TASK = Task(
    "patches",
    __doc__,
    WHERE,
    "2 layers over 16 patches in regard",
    learn,
    ("accuracy in %, test part",),
    PUBLISHED,
    FOUND,
    seeds=1,
)
main = TASK.main

if __name__ == "__main__":
    main(None)
