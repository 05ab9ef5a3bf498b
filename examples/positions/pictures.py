"""The pictures of the examples on position; all colour maps are safe for colour-blind eyes."""

from __future__ import annotations

import statistics
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


def save(figure: Any, folder: Path, name: str) -> None:
    """Write a PNG without the name and version of what drew it."""
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / f"{name}.png", metadata={"Software": None})
    plt.close(figure)


def extrapolation(
    found: dict[str, list[list[float]]], lengths: tuple[int, ...], folder: Path
) -> None:
    """Perplexity by length, a line for each encoding, bars from the least to the greatest seed."""
    figure, axes = plt.subplots(figsize=(6.4, 4.2))
    for (name, runs), colour, marker in zip(found.items(), COLOURS, MARKERS, strict=True):
        columns = list(zip(*runs, strict=True))
        mean = [statistics.fmean(column) for column in columns]
        least, most = [min(column) for column in columns], [max(column) for column in columns]
        axes.plot(lengths, mean, color=colour, marker=marker, markersize=4, label=name)
        axes.fill_between(lengths, least, most, color=colour, alpha=0.15, linewidth=0)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.axvline(lengths[0], color="0.6", linestyle=":")
    axes.annotate(
        " trained up to here",
        (lengths[0], 1),
        xycoords=("data", "axes fraction"),
        va="top",
        color="0.4",
    )
    axes.set_xticks(lengths, [str(length) for length in lengths])
    axes.set_xlabel("characters in a piece")
    axes.set_ylabel("perplexity per character")
    axes.yaxis.set_minor_formatter(mpl.ticker.FormatStrFormatter("%g"))
    axes.yaxis.set_major_formatter(mpl.ticker.FormatStrFormatter("%g"))
    axes.legend(frameon=False)
    save(figure, folder, "extrapolation")
