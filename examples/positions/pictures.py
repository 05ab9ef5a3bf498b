"""The pictures of the examples on position; all colour maps are safe for colour-blind eyes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
from torch import Tensor

from examples.pictures import COLOURS, MARKERS, bands, save


class Map(NamedTuple):
    """A heat map: values [rows, columns], NaN where there is none, and what they are."""

    title: str
    values: Tensor
    unit: str
    across: str
    down: str


class Lines(NamedTuple):
    """Lines by name, of values at first, first + 1, ...; logarithmic: "x", "y" or "both"."""

    title: str
    values: dict[str, list[float]]
    across: str
    up: str
    logarithmic: str = ""
    first: int = 0
    limits: tuple[float, float] | None = None


def maps(rows: list[list[Map]], folder: Path, name: str) -> None:
    """Heat maps in rows, each with its own colour bar."""
    size = (3.5 * len(rows[0]), 2.7 * len(rows))
    figure, grid = plt.subplots(len(rows), len(rows[0]), figsize=size, squeeze=False)
    for axes, drawn in zip(grid.flat, (each for row in rows for each in row), strict=True):
        heat_map(figure, axes, drawn)
    save(figure, folder, name)


def heat_map(figure: Any, axes: Any, drawn: Map) -> None:
    """One map: of two colours with white at 0 where values have both signs, else of one."""
    values = drawn.values.double()
    shown = values[~values.isnan()]
    low, high = float(shown.min()), float(shown.max())
    both = low < -1e-9 and high > 1e-9
    if both:
        low, high = -max(-low, high), max(-low, high)
    colours = "RdBu_r" if both else "cividis"
    axes.set_facecolor("0.93")
    image = axes.imshow(values.numpy(), cmap=colours, vmin=low, vmax=high, interpolation="nearest")
    axes.set_title(drawn.title)
    axes.set_xlabel(drawn.across)
    axes.set_ylabel(drawn.down)
    figure.colorbar(image, ax=axes, label=drawn.unit, shrink=0.85)


def lines(rows: list[list[Lines]], folder: Path, name: str) -> None:
    """Panels of lines in rows."""
    size = (3.9 * len(rows[0]), 2.9 * len(rows))
    figure, grid = plt.subplots(len(rows), len(rows[0]), figsize=size, squeeze=False)
    for axes, panel in zip(grid.flat, (each for row in rows for each in row), strict=True):
        for k, (label, values) in enumerate(panel.values.items()):
            at = range(panel.first, panel.first + len(values))
            few = MARKERS[k] if len(values) < 10 else ""
            style = ("-", "--", "-.", ":")[k % 4]
            axes.plot(at, values, style, color=COLOURS[k], marker=few, markersize=4, label=label)
        if panel.logarithmic in ("x", "both"):
            axes.set_xscale("log")
        if panel.logarithmic in ("y", "both"):
            axes.set_yscale("log")
        if len(values) < 10:
            axes.set_xticks(at)
        axes.set_ylim(panel.limits)
        axes.set_title(panel.title)
        axes.set_xlabel(panel.across)
        axes.set_ylabel(panel.up)
        if len(panel.values) > 1:
            axes.legend(frameon=False, fontsize=8)
    save(figure, folder, name)


def by_length(
    found: dict[str, list[list[float]]], axes: Any, lengths: Sequence[int], trained: int
) -> None:
    """Bands for each encoding, and a line where training ended."""
    bands(found, axes, lengths)
    axes.axvline(trained, color="0.6", linestyle=":")
    axes.set_xticks(lengths, [str(length) for length in lengths])


def extrapolation(
    found: dict[str, list[list[float]]], lengths: Sequence[int], folder: Path
) -> None:
    """Perplexity by length."""
    figure, axes = plt.subplots(figsize=(7.2, 4.0))
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    by_length(found, axes, lengths, lengths[0])
    axes.set_xlabel("characters in a piece (trained at the dotted line)")
    axes.set_ylabel("perplexity per character")
    axes.minorticks_off()
    least, most = axes.get_ylim()
    ticks = [tick for tick in (5, 6, 7, 8, 10, 12, 15, 20, 30, 50, 100) if least < tick < most]
    axes.set_yticks(ticks, [str(tick) for tick in ticks])
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    save(figure, folder, "extrapolation")


def tasks(
    found: dict[str, dict[str, list[list[float]]]],
    lengths: Sequence[int],
    trained: int,
    folder: Path,
) -> None:
    """Right answers by length, a panel for each task."""
    figure, grid = plt.subplots(1, len(found), figsize=(3.6 * len(found), 3.2), sharey=True)
    for axes, (task, runs) in zip(grid, found.items(), strict=True):
        by_length(runs, axes, lengths, trained)
        axes.set_title(task)
        axes.set_xlabel("length n (trained up to the dotted line)")
    grid[0].set_ylim(-3, 103)
    grid[0].set_ylabel("wholly right answers, %")
    grid[-1].legend(frameon=False, fontsize=8)
    save(figure, folder, "length")
