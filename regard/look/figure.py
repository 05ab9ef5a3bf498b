"""Panels of the page as SVG, drawn without a browser: text as text, a colour bar, a unit."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from regard.look import visible
from regard.look.difference import difference
from regard.look.drawing import (
    FILL,
    QUIET,
    Figure,
    FigureError,
    cell_picture,
    document,
    words_at,
)
from regard.look.ruled import Ruled
from regard.look.scene import Scene
from regard.look.shades import block_size, pooled, shades, token_names, token_place
from regard.look.spot import Spot
from regard.look.statistics import of_call

PANELS = ("heads", "map", "sent", "received", "difference")
CELLS = 512  # a map has at most so many blocks per side
_THUMB = 64
_LISTED = 40  # of a long row or column, the largest weights


def figure_of(scene: Scene, panel: str, spot: Spot, scale: str) -> Figure:
    """One panel; see `Look.figure`."""
    if panel not in PANELS:
        raise FigureError(f"there is no panel {panel!r}; there are {', '.join(PANELS)}")
    if scale not in ("lift", "weight"):
        raise FigureError(f"there is no scale {scale!r}; there are lift and weight")
    if panel == "difference":
        return difference(scene, spot.call, spot.head, scale)
    draw = {"heads": _heads, "map": _map, "sent": _side, "received": _side}[panel]
    return draw(scene, panel, spot, scale)


def _heads(scene: Scene, panel: str, spot: Spot, scale: str) -> Figure:
    cell, step = 72, 84
    body: list[str] = []
    rows: list[tuple[object, ...]] = []
    widest = 0
    top = 0
    for call in scene.captured:
        found = of_call(call, scene.tokens)
        shade = shades(call, slice(None), block_size(call, _THUMB), scale)
        for head, kind in enumerate(found.kinds):
            x = head * step
            body.append(cell_picture(shade[head], x, top, cell, cell))
            body.append(words_at(f"L{call.number} H{head}", x, top + cell + 12, size=10, bold=True))
            body.append(words_at(kind, x, top + cell + 24, size=10))
            numbers = (float(found.keys[head]), float(found.distance[head]))
            rows.append((call.number, head, call.name, *numbers, kind))
        widest = max(widest, len(found.kinds) * step)
        top += cell + 36
    lines = (f"Every head: {scene.title}", "Each thumbnail is the mean over blocks of cells.")
    columns = ("layer", "head", "name", "effective_keys", "distance", "kind")
    return Figure(document(lines, body, (widest, top), scale, scene), columns, tuple(rows))


def _map(scene: Scene, panel: str, spot: Spot, scale: str) -> Figure:
    call, heads = spot.call, slice(spot.head, spot.head + 1)
    size = block_size(call, CELLS)
    weights = pooled(call, heads, size)[0]
    ruled = Ruled.of(scene, call, size, 520)
    body = ruled.drawn(cell_picture, shades(call, heads, size, scale)[0], 0)
    blocks = f"; mean of {size} x {size} cells" if size > 1 else ""
    lines = _titles(scene, spot, "Attention", f"Rows are queries, columns are keys{blocks}.")
    columns = ("query \\ key", *ruled.places(1))
    rows = tuple(
        (name, *(None if math.isnan(x) else x for x in row))
        for name, row in zip(ruled.places(0), weights.tolist(), strict=True)
    )
    return Figure(document(lines, body, ruled.extent, scale, scene), columns, rows)


def _side(scene: Scene, panel: str, spot: Spot, scale: str) -> Figure:
    call, sent = spot.call, panel == "sent"
    matrix = call.matrix.narrow((0, spot.head))
    line = matrix[spot.query] if sent else matrix[:, spot.key]
    assert isinstance(line, Tensor)
    counts = visible.counts(call)
    counts = counts[min(spot.head, counts.shape[0] - 1)]
    lift = line * (counts[spot.query] if sent else counts)
    length = line.shape[0]
    names = token_names(scene, length)
    listed: Sequence[int] = range(length)
    if length > _LISTED:
        listed = sorted(line.topk(_LISTED).indices.tolist(), key=lambda at: -float(line[at]))
    most = max(float(line.max()), 1e-30)
    body = []
    for row, at in enumerate(listed):
        y = 20 * row + 12
        body.append(words_at(names[at][:24], 0, y, size=12))
        body.append(words_at(str(at), 190, y, size=12, fill=QUIET, more='text-anchor="end"'))
        width = 320 * float(line[at]) / most
        body.append(f'<rect x="200" y="{y - 9}" width="{width:.2f}" height="10" fill="{FILL}"/>')
        body.append(words_at(f"{float(line[at]):.4f}", 580, y, size=12, more='text-anchor="end"'))
    there = token_place(scene, spot.query, call.query.shape[2])
    if not sent:
        there = token_place(scene, spot.key, call.key.shape[2])
    said = f"query {there} attends to" if sent else f"key {there} is attended to by"
    rest = f"{said}; the {len(listed)} largest of {length} weights" if length > _LISTED else said
    lines = _titles(scene, spot, "One row" if sent else "One column", rest)
    rows = tuple(zip(range(length), names, line.tolist(), lift.tolist(), strict=True))
    extent = (590, 20 * len(listed))
    columns = ("key" if sent else "query", "token", "weight", "lift")
    return Figure(document(lines, body, extent, None, scene), columns, rows)


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
