"""Two runs side by side: the map of a head in both, and the difference of their weights."""

from __future__ import annotations

import math

import torch

from regard.look.drawing import (
    QUIET,
    Figure,
    FigureError,
    cell_picture,
    document,
    signed_bar,
    signed_picture,
    words_at,
)
from regard.look.record import Captured
from regard.look.ruled import Ruled
from regard.look.scene import Scene
from regard.look.shades import block_size, pooled, shades
from regard.look.titles import names_of, of_both

CELLS = 256  # blocks per side, at most
_ROOM, _GAP = 300, 28  # pixels of a map, and between two


def difference(scene: Scene, call: Captured, head: int, scale: str) -> Figure:
    """Mean weights of this run, of the one beside it, and this minus that.

    Raises FigureError where there is one run.
    """
    if scene.beside is None:
        raise FigureError(
            "the panel 'difference' is of two runs: look(..., beside=another) or "
            "record.figure('difference', beside=another)"
        )
    # Not by number, which is the other model's own: the shapes were compared in this order.
    other = scene.beside.captured[scene.captured.index(call)]
    size, heads = block_size(call, CELLS), slice(head, head + 1)
    here, there = (pooled(run, heads, size)[0] for run in (call, other))
    apart = here - there
    largest = float(apart.nan_to_num().abs().max())
    signed = 0.5 + apart / (2 * largest) if largest else torch.where(apart.isnan(), apart, 0.5)
    names = names_of(scene)
    maps = (
        (scene, names[0], cell_picture, shades(call, heads, size, scale)[0]),
        (scene.beside, names[1], cell_picture, shades(other, heads, size, scale)[0]),
        (scene, "the first − the second", signed_picture, signed),
    )
    body, left, deep = [], 0.0, 0.0
    for run, words, picture, shade in maps:
        ruled = Ruled.of(run, call, size, _ROOM)
        width, height = ruled.extent
        body.append(words_at(words[:44], left + ruled.ruler, 12, size=12, fill=QUIET))
        body.append('<g transform="translate(0 20)">')
        body += [*ruled.drawn(picture, shade, left), "</g>"]
        left, deep = left + width + _GAP, max(deep, height + 20)
    body += signed_bar(left - _GAP - 240, deep + 16, largest)
    blocks = f"; mean of {size} x {size} cells" if size > 1 else ""
    lines = (
        f"Two runs: layer {call.number}, head {head}",
        f"{of_both(scene)} · {call.name}",
        f"Rows are queries, columns are keys{blocks}. Tokens are compared by position.",
    )
    own = Ruled.of(scene, call, size, _ROOM)
    rows = tuple(
        (row, column, *(None if math.isnan(x) else x for x in numbers))
        for row, *line in zip(
            own.places(0), here.tolist(), there.tolist(), apart.tolist(), strict=True
        )
        for column, *numbers in zip(own.places(1), *line, strict=True)
    )
    columns = ("query", "key", "weight", "weight_beside", "difference")
    return Figure(document(lines, body, (left - _GAP, deep), scale, scene), columns, rows)
