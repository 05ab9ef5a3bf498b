"""Panels of the page as SVG, drawn without a browser: text as text, a colour bar, a unit."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import torch
from torch import Tensor

from regard import picture
from regard.errors import RegardError, ShapeError
from regard.look import visible
from regard.look.named import call_named, call_numbered
from regard.look.record import Captured
from regard.look.scene import Scene
from regard.look.statistics import csv_of, of_call

PANELS = ("heads", "map", "sent", "received")
FIGURES = (".svg", ".csv")
CELLS = 512  # a map has at most so many blocks per side
_THUMB = 64
_LISTED = 40  # of a long row or column, the largest weights

# The light ramp of the page (paint.js): lightness changes in one direction only.
# fmt: off
_HEX = ("fbfbf8", "dde8f0", "b3d0e4", "7fb0d3", "4a8abd", "24649f", "12437a", "0a2347")
# fmt: on
_RAMP = tuple(tuple(bytes.fromhex(colour)) for colour in _HEX)
_INK, _QUIET, _LINE, _FILL = "#1c2026", "#5c6470", "#d9d6cd", "#4a8abd"
_MARGIN = 16
_FONT = "system-ui, 'Segoe UI', Roboto, 'Liberation Sans', sans-serif"
_HATCH = (
    '<pattern id="hatch" width="5" height="5" patternUnits="userSpaceOnUse" '
    'patternTransform="rotate(45)"><rect width="5" height="5" fill="#f0ede6"/>'
    '<rect width="1" height="5" fill="#cbc4b6"/></pattern>'
)


class FigureError(RegardError):
    """A figure that cannot be drawn: what was asked and what would work."""


@dataclass(frozen=True)
class Figure:
    """A drawn panel. Shows itself in a notebook; `save` writes it as SVG or CSV.

    svg: the drawing;  columns, rows: its numbers
    """

    svg: str
    columns: tuple[str, ...]
    rows: tuple[tuple[object, ...], ...]

    def csv(self) -> str:
        """The numbers as comma-separated values; empty where a cell is masked."""
        return csv_of(self.columns, self.rows)

    def save(self, path: str | Path) -> Path:
        """Write .svg or .csv, by the path's ending, and return where it is.

        Raises FigureError for another ending, OSError if the file cannot be written.
        """
        target = Path(path)
        if target.suffix not in FIGURES:
            raise FigureError(
                f"{target.name} ends in {target.suffix or 'nothing'}; figures are written as .svg "
                "or .csv. PNG at twice the size comes from the buttons of the page."
            )
        target.write_text(self.svg if target.suffix == ".svg" else self.csv(), encoding="utf-8")
        return target

    def _repr_html_(self) -> str:
        return self.svg


@dataclass(frozen=True)
class Spot:
    """What a figure shows: a call, a head, a query and a key."""

    call: Captured
    head: int
    query: int
    key: int


def figure_of(scene: Scene, panel: str, spot: Spot, scale: str) -> Figure:
    """One panel; see `Look.figure`."""
    if panel not in PANELS:
        raise FigureError(f"there is no panel {panel!r}; there are {', '.join(PANELS)}")
    if scale not in ("lift", "weight"):
        raise FigureError(f"there is no scale {scale!r}; there are lift and weight")
    draw = {"heads": _heads, "map": _map, "sent": _side, "received": _side}[panel]
    return draw(scene, panel, spot, scale)


def spot_of(scene: Scene, layer: int | str, head: int, query: int, key: int) -> Spot:
    """The call with a number or a name; raises ShapeError naming what there is."""
    if isinstance(layer, str):
        call = call_named(scene.captured, layer)
    else:
        call = call_numbered(scene.captured, layer)
    heads, n = call.query.shape[1:3]
    bounds = {"head": (head, heads), "query": (query, n), "key": (key, call.key.shape[2])}
    for name, (given, count) in bounds.items():
        if not 0 <= given < count:
            raise ShapeError(f"{name} is {given}; layer {layer!r} has 0 to {count - 1}")
    return Spot(call, head, query, key)


def _heads(scene: Scene, panel: str, spot: Spot, scale: str) -> Figure:
    cell, step = 72, 84
    body: list[str] = []
    rows: list[tuple[object, ...]] = []
    widest = 0
    top = 0
    for call in scene.captured:
        found = of_call(call, scene.tokens)
        shade = _shade(call, slice(None), _block(call, _THUMB), scale)
        for head, kind in enumerate(found.kinds):
            x = head * step
            body.append(_cells(shade[head], x, top, cell, cell))
            body.append(_text(f"L{call.number} H{head}", x, top + cell + 12, size=10, bold=True))
            body.append(_text(kind, x, top + cell + 24, size=10))
            numbers = (float(found.keys[head]), float(found.distance[head]))
            rows.append((call.number, head, call.name, *numbers, kind))
        widest = max(widest, len(found.kinds) * step)
        top += cell + 36
    lines = (f"Every head: {scene.title}", "Each thumbnail is the mean over blocks of cells.")
    columns = ("layer", "head", "name", "effective_keys", "distance", "kind")
    return Figure(_svg(lines, body, (widest, top), scale, scene), columns, tuple(rows))


def _map(scene: Scene, panel: str, spot: Spot, scale: str) -> Figure:
    call, n, m = spot.call, spot.call.query.shape[2], spot.call.key.shape[2]
    size = _block(call, CELLS)
    weights = _pooled(call, slice(spot.head, spot.head + 1), size)[0]
    shade = _shade(call, slice(spot.head, spot.head + 1), size, scale)[0]
    down, across = shade.shape
    words = size == 1 and max(down, across) <= 48
    cell = min(28.0, 640 / max(down, across)) if words else max(1.0, 520 / max(down, across))
    names = [_names(scene, length) for length in (n, m)]
    ruler = 8 + 6.5 * max(len(x) for x in names[0]) if words else 40.0
    body = [_cells(shade, ruler, ruler, across * cell, down * cell)]
    step = 1 if words else _nice(max(down, across) * size / 11)
    for axis, count in enumerate((down, across)):
        for at in range(0, count * size, step):
            label = names[axis][at] if words else str(at)
            middle = ruler + (at / size + 0.5) * cell
            if axis:
                turn = f'transform="rotate(-90 {middle:.1f} {ruler - 5:.1f})"'
                body.append(_text(label, middle, ruler - 5, size=12, more=f"{_MIDDLE} {turn}"))
            else:
                end = f'{_MIDDLE} text-anchor="end"'
                body.append(_text(label, ruler - 5, middle, size=12, more=end))
    pooled = f"; mean of {size} x {size} cells" if size > 1 else ""
    lines = _titles(scene, spot, "Attention", f"Rows are queries, columns are keys{pooled}.")
    extent = (ruler + across * cell, ruler + down * cell)
    columns = ("query \\ key", *(_place(scene, j * size, m) for j in range(across)))
    rows = tuple(
        (_place(scene, i * size, n), *(None if math.isnan(x) else x for x in row))
        for i, row in enumerate(weights.tolist())
    )
    return Figure(_svg(lines, body, extent, scale, scene), columns, rows)


def _side(scene: Scene, panel: str, spot: Spot, scale: str) -> Figure:
    call, sent = spot.call, panel == "sent"
    matrix = call.matrix.narrow((0, spot.head))
    line = matrix[spot.query] if sent else matrix[:, spot.key]
    assert isinstance(line, Tensor)
    counts = visible.counts(call)
    counts = counts[min(spot.head, counts.shape[0] - 1)]
    lift = line * (counts[spot.query] if sent else counts)
    length = line.shape[0]
    names = _names(scene, length)
    listed: Sequence[int] = range(length)
    if length > _LISTED:
        listed = sorted(line.topk(_LISTED).indices.tolist(), key=lambda at: -float(line[at]))
    most = max(float(line.max()), 1e-30)
    body = []
    for row, at in enumerate(listed):
        y = 20 * row + 12
        body.append(_text(names[at][:24], 0, y, size=12))
        body.append(_text(str(at), 190, y, size=12, fill=_QUIET, more='text-anchor="end"'))
        width = 320 * float(line[at]) / most
        body.append(f'<rect x="200" y="{y - 9}" width="{width:.2f}" height="10" fill="{_FILL}"/>')
        body.append(_text(f"{float(line[at]):.4f}", 580, y, size=12, more='text-anchor="end"'))
    there = _place(scene, spot.query, call.query.shape[2])
    if not sent:
        there = _place(scene, spot.key, call.key.shape[2])
    said = f"query {there} attends to" if sent else f"key {there} is attended to by"
    rest = f"{said}; the {len(listed)} largest of {length} weights" if length > _LISTED else said
    lines = _titles(scene, spot, "One row" if sent else "One column", rest)
    rows = tuple(zip(range(length), names, line.tolist(), lift.tolist(), strict=True))
    extent = (590, 20 * len(listed))
    columns = ("key" if sent else "query", "token", "weight", "lift")
    return Figure(_svg(lines, body, extent, None, scene), columns, rows)


_MIDDLE = 'dominant-baseline="central"'


def _titles(scene: Scene, spot: Spot, what: str, rest: str) -> tuple[str, ...]:
    call, found = spot.call, of_call(spot.call, scene.tokens)
    sinks = found.first if found.special is None else found.special
    where = "the first token" if found.special is None else "the tokenizer's own tokens"
    share = f"{100 * float(sinks[spot.head]):.0f}% of this head's weight lies on {where}."
    return (
        f"{what}: layer {call.number}, head {spot.head}",
        f"{scene.title} · {call.name} · kind {found.kinds[spot.head]}",
        share,
        rest[0].upper() + rest[1:],
    )


def _names(scene: Scene, length: int) -> Sequence[str]:
    labels = scene.tokens.labels
    return labels if len(labels) == length else [f"#{at}" for at in range(length)]


def _place(scene: Scene, at: int, length: int) -> str:
    labels = scene.tokens.labels
    return f"{labels[at]} ({at})" if len(labels) == length else f"#{at}"


def _block(call: Captured, most: int) -> int:
    return -(-max(call.query.shape[2], call.key.shape[2]) // most)


def _pooled(call: Captured, heads: slice, size: int) -> Tensor:
    """Mean weights of blocks over their visible cells, [heads, rows, columns]; NaN: masked."""
    share = visible.share(call, size)
    share = share[heads] if share.shape[0] > 1 else share
    mean = (
        call.matrix.pool(size)
        if heads == slice(None)
        else call.matrix.narrow((slice(None), heads)).pool(size)
    )
    return torch.where(share > 0, mean[0] / share, torch.nan)


def _shade(call: Captured, heads: slice, size: int, scale: str) -> Tensor:
    """Where cells lie on the colour scale, 0 to 1."""
    weight = _pooled(call, heads, size)
    if scale == "weight":
        return weight.clamp(0, 1)
    counts = visible.counts(call)
    counts = (counts[heads] if counts.shape[0] > 1 else counts).float()
    n = counts.shape[-1]
    sums = torch.nn.functional.pad(counts, (0, -n % size)).reshape(counts.shape[0], -1, size)
    rows = torch.full((sums.shape[1],), float(size))
    rows[-1] = n - size * (sums.shape[1] - 1)
    high = _high(call.key.shape[2])
    lift = weight * (sums.sum(-1) / rows)[..., None]
    return ((lift.log2() + 4) / (high + 4)).clamp(0, 1)


def _high(longest: int) -> int:
    """log2 of the largest lift that has a colour of its own, as on the page."""
    return min(8, max(3, math.ceil(math.log2(longest))))


def _nice(rough: float) -> int:
    ten = 10 ** math.floor(math.log10(max(rough, 1)))
    return next(int(x * ten) for x in (1, 2, 5, 10) if x * ten >= rough)


def _cells(shade: Tensor, x: float, y: float, width: float, height: float) -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"'
    return (
        f'<rect {place} fill="url(#hatch)"/><image {place} preserveAspectRatio="none" '
        f'style="image-rendering:pixelated" href="data:image/png;base64,'
        f'{picture.png(shade, _RAMP)}"/><rect {place} fill="none" stroke="{_LINE}"/>'
    )


def _text(
    words: str,
    x: float,
    y: float,
    *,
    size: float,
    fill: str = _INK,
    bold: bool = False,
    more: str = "",
) -> str:
    # XML has no place for control characters, which a token may hold.
    words = re.sub("[\x00-\x1f\ufffe\uffff]", "\ufffd", words)
    weight = ' font-weight="600"' if bold else ""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size:g}" fill="{fill}"{weight} {more}>'
        f"{escape(words)}</text>"
    )


def _bar(x: float, y: float, scale: str, longest: int) -> Iterator[str]:
    """The colour bar, with its ticks and its unit."""
    high = _high(longest)
    ticks = ((0, "0"), (0.5, "0.5"), (1, "1"))
    unit = "weight"
    if scale == "lift":
        ticks = ((0, "≤ 1/16"), (4 / (high + 4), "1"), (1, f"≥ {2**high}"))
        unit = "weight, times the even weight of all visible keys, log scale"
    stops = "".join(
        f'<stop offset="{at / (len(_HEX) - 1):.4f}" stop-color="#{colour}"/>'
        for at, colour in enumerate(_HEX)
    )
    yield f'<linearGradient id="ramp">{stops}</linearGradient>'
    yield (f'<rect x="{x}" y="{y}" width="220" height="10" fill="url(#ramp)" stroke="{_LINE}"/>')
    for at, words in ticks:
        yield _text(words, x + 220 * at, y + 23, size=11, more='text-anchor="middle"')
    yield _text(unit, x, y + 38, size=11, fill=_QUIET)


def _svg(
    lines: Sequence[str],
    body: Sequence[str],
    extent: tuple[float, float],
    scale: str | None,
    scene: Scene,
) -> str:
    """Title lines, the body below them, and the colour bar if there is a scale."""
    top = _MARGIN + 28 + 16 * (len(lines) - 1)
    width = math.ceil(max(extent[0], 560) + 2 * _MARGIN)
    bar: list[str] = []
    height = math.ceil(top + extent[1] + 2 * _MARGIN)
    if scale is not None:
        longest = max(call.key.shape[2] for call in scene.captured)
        bar = list(_bar(_MARGIN + 20, top + extent[1] + _MARGIN, scale, longest))
        height += 52
    titles = [_text(lines[0], _MARGIN, _MARGIN + 14, size=15, bold=True)] + [
        _text(line, _MARGIN, _MARGIN + 32 + 16 * at, size=12, fill=_QUIET)
        for at, line in enumerate(lines[1:])
    ]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
            f'viewBox="0 0 {width} {height}" font-family="{_FONT}">',
            f"<defs>{_HATCH}</defs>",
            '<rect width="100%" height="100%" fill="#ffffff"/>',
            *titles,
            f'<g transform="translate({_MARGIN} {top})">',
            *body,
            "</g>",
            *bar,
            "</svg>\n",
        ]
    )
