"""Rotary encoding, found by its numbers: the angles between a vector before and after.

Channels are taken in pairs, as complex numbers z. A rotation keeps |z| and turns all heads of one
token by the same angle, so that |sum_h z'_h conj(z_h)| = sum_h |z_h|^2, and the angle is that of
the sum (Su et al. 2021, arXiv:2104.09864, equation 15).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

LAYOUTS = ("halves", "interleaved")
_LEAST = 1e-3  # radians; nothing turned by less
_CHECKED = 64  # tokens, evenly spread, in which lengths and angles are compared


@dataclass(frozen=True, eq=False)
class Turned:
    """By which angles queries and keys were turned, in radians between -pi and pi.

    query: [batch, n, pairs];  key: [batch, m, pairs], or None if unknown (keys of a cache)
    layout: "halves" pairs channel c with c + pairs, "interleaved" 2 c with 2 c + 1
    """

    query: Tensor
    key: Tensor | None
    layout: str

    def item(self, index: int) -> Turned:
        """The angles of one sequence of the batch, on the CPU."""

        def pick(tensor: Tensor) -> Tensor:
            at = index if tensor.shape[0] > 1 else 0
            return tensor[at : at + 1].cpu()

        return Turned(pick(self.query), None if self.key is None else pick(self.key), self.layout)


def turned(made: list[Tensor], query: Tensor, key: Tensor) -> Turned | None:
    """The rotation that leads from outputs of a module's layers to its query and key, if any.

    made: [batch, n, heads * d], [batch, n, heads, d] or [batch, heads, n, d], and others
    query: [batch, heads, n, d];  key: [batch, kv_heads, m, d]
    """
    found = _first(made, query)
    if found is None:
        return None
    layout, angles = found
    answers = _first(made, key)
    return Turned(angles, None if answers is None else answers[1], layout)


def _first(made: list[Tensor], after: Tensor) -> tuple[str, Tensor] | None:
    for before in made:
        for shaped in _shaped(before, after):
            found = angles(shaped, after)
            if found is not None:
                return found
    return None


def _shaped(before: Tensor, after: Tensor) -> Iterator[Tensor]:
    """A tensor, or its parts, with the axes of another."""
    batch, heads, n, d = after.shape
    if before.shape == after.shape:
        yield before
    if before.shape == (batch, n, heads, d):
        yield before.transpose(1, 2)
    if before.dim() == 3 and before.shape[:2] == (batch, n):
        width, outputs = heads * d, before.shape[2]
        for start in sorted({0, outputs - 2 * width, outputs - width}):
            if 0 <= start <= outputs - width:
                part = before[..., start : start + width]
                yield part.unflatten(-1, (heads, d)).transpose(1, 2)


def angles(before: Tensor, after: Tensor) -> tuple[str, Tensor] | None:
    """(layout, angles [batch, n, pairs]) if one tensor is the other, turned; else None.

    before, after: [batch, heads, n, d]. Channels behind the last pair may be left alone.

    >>> from regard.position import Rotary
    >>> x = torch.randn(1, 2, 5, 8)
    >>> layout, found = angles(x, Rotary.of(8).on_query(x, torch.arange(5)))
    >>> layout, [round(float(a), 3) for a in found[0, 3]]
    ('halves', [3.0, 0.3, 0.03, 0.003])
    """
    if not before.numel() or before.dtype != after.dtype:
        return None
    near = torch.finfo(after.dtype).eps * 64
    n = before.shape[-2]
    some = torch.linspace(0, n - 1, min(n, _CHECKED), device=before.device).long()
    one, other = (x.detach()[:, :, some].double() for x in (before, after))
    changed = (one != other).flatten(0, -2).any(0).nonzero()
    if not len(changed):
        return None
    width = int(changed[-1]) + 1
    for channels in {width + width % 2, before.shape[-1]}:
        for layout in LAYOUTS:
            if channels % 2 or channels > before.shape[-1]:
                continue
            z, turned = _pairs(one, channels, layout), _pairs(other, channels, layout)
            sums, sizes = (turned * z.conj()).sum(1), z.abs().square().sum(1)  # over the heads
            largest = float(z.abs().max())
            kept = torch.allclose(turned.abs(), z.abs(), rtol=near, atol=near * largest)
            alike = torch.allclose(sums.abs(), sizes, rtol=near, atol=near * float(sizes.max()))
            if kept and alike and float(sums.angle().abs().max()) > _LEAST:
                z = _pairs(before.detach().float(), channels, layout)
                whole = _pairs(after.detach().float(), channels, layout) * z.conj()
                return layout, whole.sum(1).angle()
    return None


def _pairs(x: Tensor, channels: int, layout: str) -> Tensor:
    """The first channels as complex numbers, [..., channels / 2]."""
    if layout == "halves":
        real, imaginary = x[..., :channels].chunk(2, -1)
    else:
        real, imaginary = x[..., :channels].unflatten(-1, (-1, 2)).unbind(-1)
    return torch.complex(real, imaginary)
