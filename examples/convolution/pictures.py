"""The pictures of the examples on convolution."""

from __future__ import annotations

import statistics
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.patches import Circle
from torch import Tensor

from examples.pictures import COLOURS, MARKERS, save

RESULTS = Path(__file__).parent / "results"


def moved(found: dict[str, list[float]], folder: Path) -> None:
    """Centres of nine heads after learning, beside the taps that they began at."""
    figure, grid = plt.subplots(1, len(found), figsize=(3.2 * len(found), 3.3), sharey=True)
    taps = torch.cartesian_prod(*2 * [torch.arange(3)])
    for axes, (name, numbers) in zip(grid, found.items(), strict=True):
        centres = torch.tensor(numbers).reshape(-1, 2)
        axes.plot(*taps.mT.flip(0), "+", color="0.5", markersize=10)
        for tap, centre in zip(taps.tolist(), centres.tolist(), strict=True):
            axes.plot((tap[1], centre[1]), (tap[0], centre[0]), color=COLOURS[5], linewidth=1)
        axes.plot(*centres.mT.flip(0), "o", color=COLOURS[6], markersize=5)
        axes.set_aspect("equal")
        axes.set_title(name)
        axes.set_xlabel("pixels across")
    grid[0].set_ylabel("pixels down")
    grid[0].invert_yaxis()
    save(figure, folder, "convert")


def paths(panels: list[tuple[str, Tensor, list[float]]], taps: Tensor, folder: Path) -> None:
    """Centres [times, heads, 2] on their way to the taps, and each head's alpha at the end."""
    size = (3.4 * len(panels), 4.3)
    figure, grid = plt.subplots(1, len(panels), figsize=size, squeeze=False, sharey=True)
    for axes, (title, path, alphas) in zip(grid[0], panels, strict=True):
        axes.plot(*taps.mT.flip(0), "+", color="0.4", markersize=16)
        for head, alpha in enumerate(alphas):
            colour = COLOURS[head % len(COLOURS)]
            down, across = path[:, head].mT
            axes.plot(across, down, color=colour, linewidth=1)
            full = colour if alpha >= 0.5 else "none"
            axes.plot(across[-1], down[-1], "o", color=colour, markerfacecolor=full, markersize=6)
        axes.set_aspect("equal")
        axes.set_xlim(-0.6, 4.6)
        axes.set_xticks(range(5))
        axes.set_title(title)
        axes.set_xlabel("pixels across")
    grid[0][0].set_ylim(4.6, -0.6)
    grid[0][0].set_ylabel("pixels down")
    save(figure, folder, "receptive")


def curves(
    found: dict[str, list[dict[int, float]]],
    counts: tuple[int, ...],
    folder: Path,
    name: str,
) -> None:
    """Accuracy over the number of images, mean and standard error over seeds, for each mixer."""
    figure, axes = plt.subplots(figsize=(5.2, 3.8))
    for arm, colour, marker in zip(found, (COLOURS[6], *COLOURS[5::-2]), MARKERS, strict=False):
        done = [(n, [*by.values()]) for n, by in zip(counts, found[arm], strict=True) if by]
        numbers = [(n, statistics.fmean(some), _error(some)) for n, some in done]
        if not numbers:
            continue
        axes.errorbar(
            *zip(*numbers, strict=True),
            color=colour,
            marker=marker,
            markersize=5,
            capsize=2,
            linewidth=1.3,
            label=arm,
        )
    axes.set_xscale("log")
    axes.set_xticks(counts, [f"{count:,}" for count in counts])
    axes.minorticks_off()
    axes.set_xlabel("training images")
    axes.set_ylabel("test accuracy in %")
    axes.legend(frameon=False)
    save(figure, folder, name)


def _error(numbers: list[float]) -> float:
    """Of the mean; none is known of a single number."""
    return statistics.stdev(numbers) / len(numbers) ** 0.5 if len(numbers) > 1 else 0.0


def fields(found: dict[int, tuple[Tensor, Tensor]], folder: Path) -> None:
    """What heads see before and after, [blocks, heads, (down, across, radius, far, gate)] each.

    found: by the number of images
    """
    panels = [
        (f"block {block + 1}, n = {count:,}", before[block], after[block])
        for block in range(len(next(iter(found.values()))[0]))
        for count, (before, after) in found.items()
    ]
    figure, grid = plt.subplots(
        2, len(panels), figsize=(2.9 * len(panels), 5.6), sharex="row", sharey="row"
    )
    for (title, before, after), place, below in zip(panels, *grid, strict=True):
        for head, (old, new) in enumerate(zip(before.tolist(), after.tolist(), strict=True)):
            colour = COLOURS[head % len(COLOURS)]
            for (down, across, radius, far, gate), full in ((old, False), (new, True)):
                line = "-" if full else ":"
                place.add_patch(
                    Circle((across, down), radius, fill=False, color=colour, linestyle=line)
                )
                fill = colour if full else "none"
                place.plot(across, down, "o", color=colour, markerfacecolor=fill, markersize=4)
                below.plot(gate, far, "o", color=colour, markerfacecolor=fill, markersize=5)
            below.plot((old[4], new[4]), (old[3], new[3]), color=colour, linewidth=0.8)
        place.plot(0, 0, "+", color="0.4", markersize=10)
        place.set_aspect("equal")
        place.set_title(title)
        place.set_xlabel("tokens across")
        below.set_xlabel("gate")
    grid[0][0].set_xlim(-4, 4)
    grid[0][0].set_ylim(4, -4)
    grid[0][0].set_ylabel("tokens down")
    grid[1][0].set_ylabel("non-locality in tokens")
    save(figure, folder, "fields")
