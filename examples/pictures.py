"""What all pictures of the examples share; the colours are safe for colour-blind eyes."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt

# Okabe and Ito's colours, which colour-blind eyes can tell apart, and a marker for each.
COLOURS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#882255", "#0072B2", "#D55E00", "#CC79A7")
MARKERS = "osD^vP<>"

mpl.use("Agg")
mpl.rcParams.update(
    {
        "figure.constrained_layout.use": True,
        "figure.dpi": 110,
        "font.size": 9,
        "axes.titlesize": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
)


def bands(found: Mapping[str, Sequence[Sequence[float]]], axes: Any, at: Sequence[float]) -> None:
    """A line for each name: the mean of its seeds, in a band from the least to the greatest."""
    for (name, runs), colour, marker in zip(found.items(), COLOURS, MARKERS, strict=False):
        columns = list(zip(*runs, strict=True))
        mean = [statistics.fmean(column) for column in columns]
        least, most = [min(column) for column in columns], [max(column) for column in columns]
        axes.plot(at, mean, color=colour, marker=marker, markersize=4, label=name)
        axes.fill_between(at, least, most, color=colour, alpha=0.15, linewidth=0)


def save(figure: Any, folder: Path, name: str) -> None:
    """Write a PNG without the name and version of what drew it."""
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / f"{name}.png", metadata={"Software": None})
    plt.close(figure)
