"""Rotary encoding, found by its numbers: the angles between a vector before and after.

Channels are taken in pairs, as complex numbers z, and each pair becomes z' = f e^{i angle} z: the
angle grows with the token's position (Su et al. 2021, arXiv:2104.09864, equation 15), the factor f
is 1, or that of scaled frequencies (YaRN, Peng et al. 2023, arXiv:2309.00071, equation 22), or a
scale that the model gives its queries early. All heads of one token are turned alike. Angles and
factor are those of the cosines and sines that the layer was given, where they lead from one to the
other; else they are measured: |sum_h z'_h conj(z_h)| = f sum_h |z_h|^2, and the angle is that of
the sum. Either way they count only where z' is the captured number, to rounding.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

LAYOUTS = ("halves", "interleaved")
_LEAST = 1e-3  # radians; nothing turned by less
_CHECKED = 64  # tokens, evenly spread, in which both sides are compared
# x cos - y sin with cosine, sine, products and sum rounded to half an eps each is off by at most
# (1.5 |x| + 1.5 |y|) eps, a pair by 3 eps |z|; angles measured from it by as much again.
_ROUNDINGS = 8


class Turn(NamedTuple):
    """How vectors were turned: angles [batch, n, pairs], and `gap`, the largest difference."""

    layout: str
    angles: Tensor
    factor: float
    gap: float
    own: bool


@dataclass(frozen=True, eq=False)
class Turned:
    """By which angles queries and keys were turned, in radians between -pi and pi.

    query: [batch, n, pairs];  key: [batch, m, pairs], or None if unknown (keys of a cache)
    layout: "halves" pairs channel c with c + pairs, "interleaved" 2 c with 2 c + 1; channels
        behind the last pair are left alone
    factors: by which the pairs of query and key were multiplied besides; 1 of most models
    gap: the largest difference, over up to 64 tokens, between what a layer made, turned, and the
        query and key that were multiplied
    made_by: the layers that made what was turned to query and key, "" where unknown
    own: whether the angles are those of cosines and sines that the layer was given
    """

    query: Tensor
    key: Tensor | None
    layout: str
    factors: tuple[float, float] = (1.0, 1.0)
    gap: float = 0.0
    made_by: tuple[str, str] = ("", "")
    own: bool = False

    def item(self, index: int) -> Turned:
        """The angles of one sequence of the batch, on the CPU."""

        def pick(tensor: Tensor) -> Tensor:
            at = index if tensor.shape[0] > 1 else 0
            return tensor[at : at + 1].float().cpu()

        key = None if self.key is None else pick(self.key)
        known = (self.factors, self.gap, self.made_by, self.own)
        return Turned(pick(self.query), key, self.layout, *known)


Given = Sequence[tuple[Tensor, float]]  # angles [1 or batch, n, pairs] and a factor


def turned(
    made: Sequence[tuple[str, Tensor]], query: Tensor, key: Tensor, given: Given = ()
) -> Turned | None:
    """The rotation that leads from outputs of a module's layers to its query and key, if any.

    made: names and tensors: [batch, n, heads * d], [batch, n, heads, d] or [batch, heads, n, d], or
        queries, keys and values of one layer, one kind after the other or head by head; and others
    query: [batch, heads, n, d];  key: [batch, kv_heads, m, d]
    given: what `given_angles` found
    """
    others = (query.shape[1], key.shape[1])
    asked = _first(made, query, others, given)
    if asked is None:
        return None
    name, found = asked
    answered = _first(made, key, others, given)
    if answered is None or answered[1].layout != found.layout:
        return Turned(
            found.angles, None, found.layout, (found.factor, 1.0), found.gap, (name, ""), found.own
        )
    other, keys = answered
    return Turned(
        found.angles,
        keys.angles,
        found.layout,
        (found.factor, keys.factor),
        max(found.gap, keys.gap),
        (name, other),
        found.own and keys.own,
    )


def given_angles(arguments: Iterable[Any]) -> list[tuple[Tensor, float]]:
    """Angles, one for each pair, and the factor of cosines and sines among a layer's arguments.

    Such are two tensors of one shape, [.., n, pairs] or twice as many, as Hugging Face's rotary
    modules give them (`position_embeddings`), or one of complex numbers, whose squares add up to
    the same f^2 everywhere.

    >>> cosine, sine = torch.tensor([[1.0, 1.0], [0.0, 0.0]]), torch.tensor([[0.0, 0], [2, 1]])
    >>> given_angles([(cosine, sine)]), given_angles([(cosine, sine.clamp(max=1.0))])
    ([], [(tensor([[[0.0000],
             [1.5708]]]), 1.0)])
    """
    found: list[tuple[Tensor, float]] = []
    alone = [x for x in arguments if isinstance(x, Tensor)]
    tuples = [x for x in arguments if isinstance(x, tuple | list) and len(x) == 2]
    for cosine, sine in [*tuples, *pairwise(alone)]:
        if isinstance(cosine, Tensor) and isinstance(sine, Tensor):
            found.extend(_angles_of(cosine, sine))
    for one in alone:
        if one.is_complex():
            found.extend(_angles_of(one.real, one.imag))
    return found


def _angles_of(cosine: Tensor, sine: Tensor) -> Iterator[tuple[Tensor, float]]:
    if cosine.shape != sine.shape or cosine.dim() < 2 or not cosine.numel():
        return
    if not (cosine.is_floating_point() and sine.is_floating_point()):
        return
    if cosine.shape[:-2].numel() not in {1, cosine.shape[0]}:
        return
    near = torch.finfo(cosine.dtype).eps * 4
    cosine, sine = (x.detach().reshape(-1, *x.shape[-2:]).double() for x in (cosine, sine))
    squares = cosine.square() + sine.square()
    factor = float(squares.mean().sqrt())
    if not factor or not bool(((squares - factor**2).abs() <= near * factor**2).all()):
        return
    angles = torch.atan2(sine, cosine).float()
    factor = 1.0 if abs(factor - 1) <= near else factor
    first, second = angles.chunk(2, -1) if angles.shape[-1] % 2 == 0 else (angles, None)
    if second is not None and torch.equal(first, second):
        yield first, factor
    elif second is not None and torch.equal(angles[..., ::2], angles[..., 1::2]):
        yield angles[..., ::2], factor
    else:
        yield angles, factor


def _first(
    made: Sequence[tuple[str, Tensor]], after: Tensor, heads: tuple[int, int], given: Given
) -> tuple[str, Turn] | None:
    for name, before in made:
        for shaped in _shaped(before, after, heads):
            found = turn(shaped, after, given)
            if found is not None:
                return name, found
    return None


def _shaped(before: Tensor, after: Tensor, counts: tuple[int, int]) -> Iterator[Tensor]:
    """A tensor, or its parts, with the axes of another; counts: heads of queries and of keys."""
    batch, heads, n, d = after.shape
    if before.shape == after.shape:
        yield before
    if before.shape == (batch, n, heads, d):
        yield before.transpose(1, 2)
    if before.dim() != 3 or before.shape[:2] != (batch, n):
        return
    width, outputs = heads * d, before.shape[2]
    for start in sorted({0, outputs - 2 * width, outputs - width}):
        if 0 <= start <= outputs - width:
            part = before[..., start : start + width]
            yield part.unflatten(-1, (heads, d)).transpose(1, 2)
    if outputs < width and outputs % d == 0 and heads % (outputs // d) == 0:  # keys, repeated
        groups = outputs // d
        keys = before.unflatten(-1, (groups, d)).transpose(1, 2)
        yield keys.repeat_interleave(heads // groups, 1)
    yield from _side_by_side(before, after, counts[0])


def _side_by_side(before: Tensor, after: Tensor, queries: int) -> Iterator[Tensor]:
    """Of a layer that makes query, key and value of each group of heads (GPT-NeoX, Falcon)."""
    heads, d = after.shape[1], after.shape[3]
    for groups in (x for x in range(1, queries + 1) if queries % x == 0):
        many = queries // groups
        if before.shape[2] != (many + 2) * groups * d or heads % groups:
            continue
        each = before.unflatten(-1, (groups, many + 2, d))  # [batch, n, groups, parts, d]
        for start, parts in ((0, many), (many, 1), (many + 1, 1)):
            if heads % (groups * parts) == 0:
                some = each[:, :, :, start : start + parts].flatten(2, 3).transpose(1, 2)
                yield some.repeat_interleave(heads // (groups * parts), 1)


def turn(before: Tensor, after: Tensor, given: Given = ()) -> Turn | None:
    """How one tensor became the other by being turned; None if it did not.

    before, after: [batch, heads, n, d]. Channels behind the last pair may be left alone.

    >>> from regard.position import Rotary
    >>> x = torch.randn(1, 2, 5, 8)
    >>> found = turn(x, Rotary.of(8).on_query(x, torch.arange(5)))
    >>> found.layout, [round(float(a), 3) for a in found.angles[0, 3]], round(found.factor, 5)
    ('halves', [3.0, 0.3, 0.03, 0.003], 1.0)
    """
    if not before.numel() or before.dtype != after.dtype or before.shape != after.shape:
        return None
    n, d = before.shape[-2:]
    some = torch.linspace(0, n - 1, min(n, _CHECKED), device=before.device).long()
    one, other = (x.detach()[:, :, some].double() for x in (before, after))
    changed = (one != other).flatten(0, -2).any(0).nonzero()
    if not len(changed):
        return None
    near = torch.finfo(after.dtype).eps * _ROUNDINGS
    for angles, factor in given:
        if angles.shape[0] not in (1, one.shape[0]) or angles.shape[1] != n:
            continue
        for layout in LAYOUTS:
            here = angles[:, some.to(angles.device)].to(one)
            gap = _gap((one, other), layout, here, factor, near)
            if gap is not None:
                whole = angles.to(before.device).expand(before.shape[0], -1, -1)
                return Turn(layout, whole, factor, gap, own=True)
    width = int(changed[-1]) + 1
    for channels in dict.fromkeys((width + width % 2, d)):
        for layout in LAYOUTS:
            if channels % 2 or channels > d:
                continue
            z, changed_z = _pairs(one, channels, layout), _pairs(other, channels, layout)
            factor = float((changed_z.abs().square().sum() / z.abs().square().sum()).sqrt())
            factor = 1.0 if abs(factor - 1) <= near else factor
            angles = (changed_z * z.conj()).sum(1).angle()  # over the heads
            gap = _gap((one, other), layout, angles, factor, near)
            if gap is not None and float(angles.abs().max()) > _LEAST:
                z = _pairs(before.detach().float(), channels, layout)
                whole = _pairs(after.detach().float(), channels, layout) * z.conj()
                return Turn(layout, whole.sum(1).angle(), factor, gap, own=False)
    return None


def _gap(
    tensors: tuple[Tensor, Tensor], layout: str, angles: Tensor, factor: float, near: float
) -> float | None:
    """The largest difference between one tensor, turned, and the other; None if not rounding's."""
    one, other = tensors
    channels = 2 * angles.shape[-1]
    if channels > one.shape[-1] or not torch.equal(one[..., channels:], other[..., channels:]):
        return None
    z, wanted = _pairs(one, channels, layout), _pairs(other, channels, layout)
    apart = (factor * z * torch.polar(torch.ones_like(angles), angles)[:, None] - wanted).abs()
    if not bool((apart <= near * factor * z.abs()).all()):
        return None
    return float(apart.max())


def _pairs(x: Tensor, channels: int, layout: str) -> Tensor:
    """The first channels as complex numbers, [..., channels / 2]."""
    if layout == "halves":
        real, imaginary = x[..., :channels].chunk(2, -1)
    else:
        real, imaginary = x[..., :channels].unflatten(-1, (-1, 2)).unbind(-1)
    return torch.complex(real, imaginary)
