"""What figures are drawn with: text as text, cells as a picture, a colour bar with its unit."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from torch import Tensor

from regard import picture
from regard.errors import MissingPackageError, RegardError
from regard.look.scene import Scene
from regard.look.statistics import csv_of

FIGURES = (".svg", ".png", ".csv")

# The light ramp of the page (paint.js): lightness changes in one direction only.
# fmt: off
HEX = ("fbfbf8", "dde8f0", "b3d0e4", "7fb0d3", "4a8abd", "24649f", "12437a", "0a2347")
# fmt: on
RAMP = tuple(tuple(bytes.fromhex(colour)) for colour in HEX)
SIGNED = ((179, 86, 11), (244, 243, 239), (31, 95, 158))
INK, QUIET, LINE, FILL = "#1c2026", "#5c6470", "#d9d6cd", "#4a8abd"
MARGIN = 16
MIDDLE = 'dominant-baseline="central"'
FONT = "system-ui, 'Segoe UI', Roboto, 'Liberation Sans', sans-serif"
_LETTER = (
    '<svg xmlns="http://www.w3.org/2000/svg" width="20" height="20">'
    f'<text y="15" font-family="{FONT}">{{}}</text></svg>'
)
HATCH = (
    '<pattern id="hatch" width="5" height="5" patternUnits="userSpaceOnUse" '
    'patternTransform="rotate(45)"><rect width="5" height="5" fill="#f0ede6"/>'
    '<rect width="1" height="5" fill="#cbc4b6"/></pattern>'
)


class FigureError(RegardError):
    """A figure that cannot be drawn: what was asked and what would work."""


@dataclass(frozen=True)
class Figure:
    """A drawn panel. Shows itself in a notebook; `save` writes it as SVG, PNG or CSV.

    svg: the drawing;  columns, rows: its numbers
    """

    svg: str
    columns: tuple[str, ...]
    rows: tuple[tuple[object, ...], ...]

    def csv(self) -> str:
        """The numbers as comma-separated values; empty where a cell is masked."""
        return csv_of(self.columns, self.rows)

    def png(self) -> bytes:
        """The drawing in pixels, twice its size, in the fonts of this machine.

        Raises MissingPackageError without resvg-py, FigureError where there is no font: a drawing
        without its words would say nothing.
        """
        try:
            import resvg_py
        except ImportError as error:
            raise MissingPackageError("resvg-py", extra="look") from error
        one, other = (resvg_py.svg_to_bytes(svg_string=_LETTER.format(x)) for x in ("M", ""))
        if one == other:
            raise FigureError(
                "this machine has no fonts to draw words with (Debian has them in the package "
                "fonts-dejavu-core); .svg leaves them to whoever opens it."
            )
        return bytes(resvg_py.svg_to_bytes(svg_string=self.svg, zoom=2))

    def save(self, path: str | Path) -> Path:
        """Write .svg, .png or .csv, by the path's ending, and return where it is.

        Raises FigureError for another ending, OSError if the file cannot be written, and what `png`
        raises.
        """
        target = Path(path)
        if target.suffix not in FIGURES:
            raise FigureError(
                f"{target.name} ends in {target.suffix or 'nothing'}; figures are written as "
                f"{', '.join(FIGURES)}."
            )
        if target.suffix == ".png":
            target.write_bytes(self.png())
        else:
            target.write_text(self.svg if target.suffix == ".svg" else self.csv(), encoding="utf-8")
        return target

    def _repr_html_(self) -> str:
        return self.svg


def highest_lift(longest: int) -> int:
    """log2 of the largest lift that has a colour of its own, as on the page."""
    return min(8, max(3, math.ceil(math.log2(longest))))


def cell_picture(
    shade: Tensor,
    x: float,
    y: float,
    width: float,
    height: float,
    ramp: Sequence[Sequence[int]] = RAMP,
) -> str:
    """Cells as one picture of a pixel each, over the hatching of masked ones."""
    place = f'x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"'
    return (
        f'<rect {place} fill="url(#hatch)"/><image {place} preserveAspectRatio="none" '
        f'style="image-rendering:pixelated" href="data:image/png;base64,'
        f'{picture.png(shade, ramp)}"/><rect {place} fill="none" stroke="{LINE}"/>'
    )


def signed_picture(shade: Tensor, x: float, y: float, width: float, height: float) -> str:
    """Cells whose shades are 0.5 where a number is 0."""
    return cell_picture(shade, x, y, width, height, SIGNED)


def words_at(
    words: str,
    x: float,
    y: float,
    *,
    size: float,
    fill: str = INK,
    bold: bool = False,
    more: str = "",
) -> str:
    """A text that starts at x, unless `more` says otherwise."""
    # XML has no place for control characters, which a token may hold.
    words = re.sub("[\x00-\x1f\ufffe\uffff]", "\ufffd", words)
    weight = ' font-weight="600"' if bold else ""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size:g}" fill="{fill}"{weight} {more}>'
        f"{escape(words)}</text>"
    )


def lift_bar(x: float, y: float, scale: str, longest: int) -> list[str]:
    """The colour bar of lift or weight."""
    if scale == "weight":
        return colour_bar(x, y, ("ramp", HEX), ((0, "0"), (0.5, "0.5"), (1, "1")), "weight")
    high = highest_lift(longest)
    ticks = ((0, "≤ 1/16"), (4 / (high + 4), "1"), (1, f"≥ {2**high}"))
    unit = "weight, times the even weight of all visible keys, log scale"
    return colour_bar(x, y, ("ramp", HEX), ticks, unit)


def signed_bar(x: float, y: float, largest: float) -> list[str]:
    """The colour bar of a difference of weights, which reaches to the largest one."""
    colours = tuple(bytes(colour).hex() for colour in SIGNED)
    ticks = ((0, f"−{largest:.3g}"), (0.5, "0"), (1, f"{largest:.3g}"))
    return colour_bar(x, y, ("signed", colours), ticks, "difference of weights")


def colour_bar(
    x: float,
    y: float,
    ramp: tuple[str, Sequence[str]],
    ticks: Sequence[tuple[float, str]],
    unit: str,
) -> list[str]:
    """A ramp (its name and colours) with ticks and a unit."""
    name, colours = ramp
    stops = "".join(
        f'<stop offset="{at / (len(colours) - 1):.4f}" stop-color="#{colour}"/>'
        for at, colour in enumerate(colours)
    )
    return [
        f'<linearGradient id="{name}">{stops}</linearGradient>',
        f'<rect x="{x}" y="{y}" width="220" height="10" fill="url(#{name})" stroke="{LINE}"/>',
        *(
            words_at(words, x + 220 * at, y + 23, size=11, more='text-anchor="middle"')
            for at, words in ticks
        ),
        words_at(unit, x, y + 38, size=11, fill=QUIET),
    ]


def document(
    lines: Sequence[str],
    body: Sequence[str],
    extent: tuple[float, float],
    scale: str | None,
    scene: Scene,
) -> str:
    """Title lines, the body below them, and the colour bar if there is a scale."""
    top = MARGIN + 28 + 16 * (len(lines) - 1)
    width = math.ceil(max(extent[0], 560) + 2 * MARGIN)
    bar: list[str] = []
    height = math.ceil(top + extent[1] + 2 * MARGIN)
    if scale is not None:
        longest = max(call.key.shape[2] for call in scene.captured)
        bar = lift_bar(MARGIN + 20, top + extent[1] + MARGIN, scale, longest)
        height += 52
    titles = [words_at(lines[0], MARGIN, MARGIN + 14, size=15, bold=True)] + [
        words_at(line, MARGIN, MARGIN + 32 + 16 * at, size=12, fill=QUIET)
        for at, line in enumerate(lines[1:])
    ]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
            f'viewBox="0 0 {width} {height}" font-family="{FONT}">',
            f"<defs>{HATCH}</defs>",
            '<rect width="100%" height="100%" fill="#ffffff"/>',
            *titles,
            f'<g transform="translate({MARGIN} {top})">',
            *body,
            "</g>",
            *bar,
            "</svg>\n",
        ]
    )
