"""The pictures of the examples on convolution."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import Tensor

from examples.pictures import COLOURS, save

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
