"""The small picture of a matrix in a notebook: a few heads, pooled, as an image in the page."""

from __future__ import annotations

import base64
import html as escape
import struct
import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from regard.matrix import Attention

CELLS = 64
HEADS = 8
# About a second on two cores: a notebook shows the last line of a cell whether asked to or not.
PAIRS = 2**26

# Light to dark blue, lightness falling steadily (so that it reads in grey, too).
RAMP = ((247, 251, 255), (198, 219, 239), (107, 174, 214), (33, 113, 181), (8, 48, 107))


def html(matrix: Attention) -> str:
    """The repr, and up to 8 heads as pictures, for `_repr_html_`."""
    title = f"<code>{escape.escape(repr(matrix))}</code>"
    n, m = matrix.shape[-2:]
    if not matrix.shape.numel():
        return f"<div>{title}<br><small>empty</small></div>"
    if n * m * min(matrix.shape[:-2].numel(), HEADS) > PAIRS:
        return (
            f"<div>{title}<br><small>too large to draw unasked; A.pool({-(-max(n, m) // CELLS)}) "
            "computes the map in cells.</small></div>"
        )
    some = _first_heads(matrix)
    size = -(-max(n, m) // CELLS)
    # Lift: weight relative to an even spread over all keys; its logarithm shows both ends.
    lift = some.pool(size).double().reshape(-1, -(-n // size), -(-m // size)) * m
    shade = ((lift.clamp(min=2.0**-4).log2() + 4) / 12).clamp(0, 1)
    pictures = "".join(
        f'<img alt="head {number}" title="head {number}" style="image-rendering:pixelated;'
        f'width:96px;margin:2px;border:1px solid #8884" src="data:image/png;base64,{png(head)}">'
        for number, head in enumerate(shade)
    )
    heads = matrix.shape[:-2].numel()
    note = f"{len(shade)} of {heads} heads, " if heads > 1 else ""
    return (
        f"<div>{title}<br>{pictures}<br><small>{note}mean of {size} x {size} pairs; white: at most "
        "1/16 of an even spread, darkest: 256 times it</small></div>"
    )


def png(shade: Tensor, ramp: Sequence[Sequence[int]] = RAMP) -> str:
    """A [rows, columns] tensor in [0, 1] as a base64 PNG on a ramp of colours; NaN is clear."""
    clear = shade.cpu().isnan()
    place = shade.cpu().float().nan_to_num() * (len(ramp) - 1)
    low = place.floor().clamp(max=len(ramp) - 2).long()
    stops = torch.tensor(ramp, dtype=torch.float32)
    colours = torch.lerp(stops[low], stops[low + 1], (place - low)[..., None]).round().byte()
    if clear.any():
        colours = torch.cat([colours, 255 * (~clear[..., None]).byte()], -1)
    return png_of(colours)


def png_of(colours: Tensor) -> str:
    """A uint8 tensor [rows, columns, 3 or 4] of red, green, blue, opacity as a base64 PNG."""
    rows, columns, channels = colours.shape
    kind = {3: 2, 4: 6}[channels]  # the numbers of PNG's colour types
    lines = b"".join(b"\0" + bytes(line.flatten().tolist()) for line in colours)
    header = struct.pack(">IIBBBBB", columns, rows, 8, kind, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(lines)), (b"IEND", b""))
    data = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in chunks
    )
    return base64.b64encode(data).decode()


def _first_heads(matrix: Attention) -> Attention:
    """The first entry of every batch axis, and the first heads; all of them for a user's score."""
    from regard.custom import Custom

    batch = matrix.shape[:-2]
    if not batch or isinstance(matrix.score, Custom):
        return matrix
    return matrix.narrow((*(0 for _ in batch[:-1]), slice(0, HEADS)))
