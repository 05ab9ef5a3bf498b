"""Spoken digits: one label for a recording, by attention that is truncated to what is near.

N vectors to one label where N is large: log spectra of 32 bands every 8 ms, 18 to 286 of them. Two
layers (width 64, 4 heads) in which each moment sees 8 before and 8 after it, mask `Window(8, 8)`:
the work grows with the length and not with its square. Then the mean and one linear layer. The
position is that of ALiBi. Free Spoken Digit Dataset, official split: takes 0 to 4 of each speaker
and digit are for the test. 12 times through the others at rate 0.003; recordings are made louder or
softer, and bands and moments are hidden (SpecAugment, Park et al. 2019, arXiv:1904.08779).

Truncated attention for speech: Povey et al. 2018, ICASSP, doi:10.1109/ICASSP.2018.8462497.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from examples.model import Batch
from examples.tasks.sequences import BATCH, Sequences
from examples.tasks.task import Job, Task
from regard import Alibi, Padding, Window
from regard.nn import Encoder, EncoderLayer, SelfAttention

RATE, HOP, FRAME, BANDS = 8000, 64, 256, 32
EPOCHS, WIDTH, HEADS, NEAR = 12, 64, 4, 8
WHERE = (
    "fsdd.npz: all recordings of github.com/Jakobovski/free-spoken-digit-dataset (CC BY-SA 4.0) \
one after the other as audio (int16), with offsets, label, speaker and take"
)
PUBLISHED = (
    ("ridge regression on a 24 x 32 log spectrogram", "92.0", "computed on this split"),
    (
        "ResNet18 on mel spectrograms, 160 epochs, validation",
        "95.3",
        "github.com/dilne/Free-Spoken-Digit-Dataset",
    ),
    ("CNN on MFCC, first release (3 speakers)", "97", "adhishthite.github.io/sound-mnist"),
)
FOUND = (
    "Above what is published, which was measured on other parts of the recordings. All speakers "
    "stand in both parts, so this says nothing about a new voice. Of 300 recordings one is 0.33."
)


def bands() -> Tensor:
    """Triangles over the frequencies of a spectrum, equally wide in mel, [FRAME / 2 + 1, BANDS]."""
    mel = torch.linspace(0, float(2595 * np.log10(1 + RATE / 2 / 700)), BANDS + 2)
    edges = 700 * (10 ** (mel / 2595) - 1)
    frequencies = torch.linspace(0, RATE / 2, FRAME // 2 + 1)[:, None]
    rise = (frequencies - edges[:-2]) / (edges[1:-1] - edges[:-2])
    fall = (edges[2:] - frequencies) / (edges[2:] - edges[1:-1])
    return torch.minimum(rise, fall).clamp(min=0)


def spectra(wave: Tensor) -> Tensor:
    """Log energies of a recording, [moments, BANDS], their mean over all moments taken away."""
    window = torch.hann_window(FRAME)
    found = torch.stft(wave, FRAME, HOP, window=window, return_complex=True).abs().square()
    log = (found.mT @ bands() + 1e-6).log()
    return (log - log.mean(0)) / 3


def read(path: Path | None) -> tuple[list[Tensor], Tensor, Tensor]:
    """Spectra, labels, and which are for the test; noise, of which nothing is learned, without."""
    if path is None:
        noise = torch.Generator().manual_seed(0)
        waves = [torch.randn(1200 + 64 * k, generator=noise) for k in range(20)]
        return [spectra(x) for x in waves], torch.arange(20) % 10, torch.arange(20) > 14
    with np.load(path) as held:
        waves = np.split(held["audio"], held["offsets"][1:-1])
        label, test = torch.from_numpy(held["label"]).long(), torch.from_numpy(held["take"] < 5)
    return [spectra(torch.from_numpy(wave).float() / 2**15) for wave in waves], label, test


class Listener(nn.Module):
    """Spectra [batch, n, BANDS] and their lengths [batch] to logits of the digits, [batch, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(BANDS, WIDTH)
        self.encoder = Encoder(
            (
                EncoderLayer(SelfAttention(WIDTH, HEADS, position=Alibi.of(HEADS)), norm_first=True)
                for _ in range(2)
            ),
            nn.LayerNorm(WIDTH),
        )
        self.out = nn.Linear(WIDTH, 10)

    def forward(self, heard: tuple[Tensor, Tensor]) -> Tensor:
        x, lengths = heard
        real = Padding.of_lengths(lengths, x.shape[1])
        x = self.encoder(self.enter(x), mask=Window(NEAR, NEAR) & real)
        return self.out((x * real.keep[..., None]).sum(1) / lengths[:, None])


def disturbed(batch: Batch, generator: torch.Generator) -> Batch:
    """Each recording louder or softer; up to 4 bands and a fifth of the moments hidden in all."""
    (x, lengths), said = batch
    x = x + 0.3 * torch.randn(len(x), 1, 1, generator=generator)
    for axis, most in ((2, 4), (1, x.shape[1] // 5)):
        count = int(torch.randint(most + 1, (), generator=generator))
        start = int(torch.randint(x.shape[axis] - count + 1, (), generator=generator))
        x.narrow(axis, start, count).zero_()
    return (x, lengths), said


def learn(job: Job) -> list[float]:
    """Train on takes 5 to 49; accuracy on takes 0 to 4 and on those learned from."""
    recordings, labels, is_test = read(job.data)
    train, test = (
        Sequences([recordings[k] for k in chosen], list(labels[chosen]))
        for chosen in (part.nonzero()[:, 0] for part in (~is_test, is_test))
    )
    torch.manual_seed(job.seed)
    generator = torch.Generator().manual_seed(job.seed)
    draw, model = train.batches(generator), Listener()
    steps = EPOCHS * len(train.words) // BATCH
    job.train(model, lambda: disturbed(draw(), generator), steps, rate=3e-3)
    job.save(model)
    return [part.accuracy(model) for part in (test, train)]


TASK = Task(
    "digits",
    __doc__,
    WHERE,
    "encoder of 2 layers, truncated attention in regard",
    learn,
    ("accuracy in %, takes 0 to 4", "accuracy in %, takes learned from"),
    PUBLISHED,
    FOUND,
    seeds=2,
)
main = TASK.main

if __name__ == "__main__":
    main(None)
