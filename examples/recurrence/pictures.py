"""The pictures of the examples on recurrences."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import Tensor

from examples.pictures import COLOURS, MARKERS, bands, save

Runs = Mapping[str, Sequence[Sequence[float]]]
"""For each layer, the numbers of each seed."""


def recall(panels: Mapping[str, tuple[Sequence[int], Runs]], folder: Path) -> None:
    """Right answers by how many keys there are, a panel for each width or task."""
    figure, grid = plt.subplots(1, len(panels), figsize=(3.1 * len(panels), 3.3), sharey=True)
    for axes, (title, (counts, found)) in zip(grid, panels.items(), strict=True):
        axes.set_xscale("log", base=2)
        bands(found, axes, counts)
        axes.set_xticks(counts, [str(count) for count in counts])
        axes.set_title(title)
        axes.set_xlabel("keys")
    grid[0].set_ylim(-3, 103)
    grid[0].set_ylabel("right answers, %")
    grid[0].legend(frameon=False, fontsize=8)
    save(figure, folder, "recall")


def copying(found: Mapping[str, Mapping[str, Sequence[float]]], folder: Path) -> None:
    """Right symbols for each kind of dynamics, a bar for each spacing and a dot for each seed."""
    figure, axes = plt.subplots(figsize=(6.4, 3.2))
    for place, numbers in enumerate(found.values()):
        for shift, (spacing, runs) in enumerate(numbers.items()):
            at = place + 0.36 * (shift - 0.5)
            label = f"{spacing} places" if place == 0 else None
            colour = COLOURS[5 + shift]
            axes.bar(at, statistics.fmean(runs), 0.34, color=colour, alpha=0.6, label=label)
            axes.plot([at] * len(runs), runs, "o", color="black", markersize=3)
    axes.set_xticks(range(len(found)), list(found))
    axes.set_ylabel("right symbols, %")
    axes.set_ylim(0, 105)
    axes.axhline(12.5, color="0.6", linestyle=":")
    axes.legend(frameon=False, fontsize=8, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    save(figure, folder, "copying")


def losses(found: Runs, steps: Sequence[int], folder: Path) -> None:
    """Loss by training steps."""
    figure, axes = plt.subplots(figsize=(5.2, 3.2))
    bands(found, axes, steps)
    axes.set_yscale("log")
    axes.set_xlabel("training steps")
    axes.set_ylabel("loss of the copy, nats per symbol")
    axes.legend(frameon=False)
    save(figure, folder, "copy_task")


def digits(found: Mapping[str, Tensor], count: int, folder: Path) -> None:
    """Generated images in a row for each model."""
    figure, grid = plt.subplots(len(found), 1, figsize=(7.2, 0.9 * len(found)))
    for axes, (name, pixels) in zip(grid, found.items(), strict=True):
        images = pixels.reshape(count, 8, 8)
        row = torch.nn.functional.pad(images, (1, 1)).permute(1, 0, 2).flatten(1)
        axes.imshow(row.numpy(), cmap="gray_r", vmin=0, vmax=16, interpolation="nearest")
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_visible(False)
        axes.set_ylabel(name, rotation=0, ha="right", va="center")
    save(figure, folder, "generation")


def rows(names: Sequence[str], weights: Tensor, folder: Path) -> None:
    """The weights of one query, for each kind of attention."""
    figure, axes = plt.subplots(figsize=(7.2, 2.8))
    weights = weights.reshape(len(names), -1)
    seen = int(weights.any(0).nonzero().max()) + 1  # the rest is hidden by the mask
    for name, each, colour in zip(names, weights[:, :seen], COLOURS, strict=False):
        width = 2.5 if name == names[0] else 1.2
        axes.plot(each, color=colour, linewidth=width, label=name, drawstyle="steps-mid")
    axes.set_xlabel("key (a pixel; the query is the last of them)")
    axes.set_ylabel("weight")
    axes.legend(frameon=False)
    save(figure, folder, "mimicry")


def decoding(found: Mapping[str, Sequence[tuple[float, float, float]]], folder: Path) -> None:
    """Time of one token, and what is kept, by how many came before."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.4, 3.3))
    for (way, numbers), colour, marker in zip(found.items(), COLOURS[1:], MARKERS, strict=False):
        after, time, kept = zip(*numbers, strict=True)
        left.loglog(after, time, color=colour, marker=marker, markersize=4, label=way)
        if max(kept) > 0:
            right.loglog(after, kept, color=colour, marker=marker, markersize=4, label=way)
    left.set_ylabel("one more token, ms")
    right.set_ylabel("kept between tokens, KiB")
    for axes in (left, right):
        axes.set_xlabel("tokens so far")
        axes.legend(frameon=False, fontsize=8)
    save(figure, folder, "decode")
