"""The steps of one generation as one call: row t of the matrix is from the step that made token t.

With a cache, each step compares the queries of its new tokens with all keys so far. Those keys are
never changed, so the keys of the last step are all there ever were, and the queries of all steps
against them, each row with the mask of its own step, are the matrix of the whole sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from regard.look.record import Captured
from regard.look.rotation import Turned


def joined(calls: Sequence[Captured]) -> list[Captured]:
    """The calls with every run of steps of one layer as one call, where its first step stood.

    Calls of a layer belong together if each has the keys of the one before it, bit by bit, as far
    as any query saw them, and then as many more as it has queries (a growing cache), or as many
    keys and one query (a cache of fixed size; the other sequence of an encoder-decoder).
    Others, such as those of beams that change places or of a cache that forgets, stay as they are.
    """
    runs: dict[str, list[list[Captured]]] = {}
    order: list[list[Captured]] = []
    for call in calls:
        known = runs.setdefault(call.name, [])
        if known and _continues(known[-1], call):
            known[-1].append(call)
            continue
        known.append([call])
        order.append(known[-1])
    return [run[0] if len(run) == 1 else _one(run) for run in order]


def _continues(run: Sequence[Captured], call: Captured) -> bool:
    last = run[-1]
    if call.given is not None or last.given is not None:
        return False
    before, after = last.key, call.key
    same = (before.shape[0], before.shape[1], before.shape[3], last.query.shape[1])
    if same != (after.shape[0], after.shape[1], after.shape[3], call.query.shape[1]):
        return False
    if (last.scale, last.softcap, last.formula) != (call.scale, call.softcap, call.formula):
        return False
    n, m, more = call.query.shape[2], before.shape[2], after.shape[2]
    if not (more == m + n or (more == m and n == 1)):
        return False
    seen = _visible(last).any(2).any(1)  # [1 or batch, m]: keys that some query saw
    equal = (before == after[:, :, :m]).all(3).all(1)  # [batch, m]
    return bool((equal | ~seen).all())


def _visible(call: Captured) -> Tensor:
    """Which pairs are visible, [1 or batch, 1 or heads, n, m]."""
    n, m = call.query.shape[2], call.key.shape[2]
    device = call.query.device
    seen = torch.ones(1, 1, n, m, dtype=torch.bool, device=device)
    if call.causal:
        seen = seen.tril()
    return seen if call.mask is None else seen & call.mask


def _one(run: Sequence[Captured]) -> Captured:
    last = run[-1]
    m = last.key.shape[2]
    shown = [torch.nn.functional.pad(_visible(call), (0, m - call.key.shape[2])) for call in run]
    axes = torch.broadcast_shapes(*(x.shape[:2] for x in shown))
    mask = torch.cat([x.expand(*axes, *x.shape[2:]) for x in shown], 2)
    n = mask.shape[2]
    is_triangle = n == m and bool((mask == torch.ones_like(mask).tril()).all())
    return replace(
        last,
        query=torch.cat([call.query for call in run], 2),
        mask=None if is_triangle or bool(mask.all()) else mask,
        causal=is_triangle,
        bias=_bias(run),
        output=_cat([call.output for call in run], 2),
        inputs=_cat([call.inputs for call in run], 1),
        made_by=run[0].made_by,
        number=run[0].number,
        turned=_turned(run),
        steps=tuple(call.query.shape[2] for call in run),
    )


def _bias(run: Sequence[Captured]) -> Tensor | None:
    """The biases of all rows, 0 where a key was not there yet."""
    if all(call.bias is None for call in run):
        return None
    rows = []
    m = run[-1].key.shape[2]
    for call in run:
        shape = (call.query.shape[2], call.key.shape[2])
        bias = call.query.new_zeros(1, 1, 1, 1) if call.bias is None else call.bias
        bias = bias.expand(*bias.shape[:2], *shape)
        rows.append(torch.nn.functional.pad(bias, (0, m - shape[1])))
    axes = torch.broadcast_shapes(*(x.shape[:2] for x in rows))
    return torch.cat([x.expand(*axes, *x.shape[2:]) for x in rows], 2)


class Beginnings:
    """Keys and values of steps, each kept once: T steps would else keep T copies of a cache."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, str], tuple[Tensor, int]] = {}

    def shared(self, call: Captured) -> Captured:
        """The call with the same keys and values, which begin in the memory of earlier ones."""
        key = self._placed((call.name, "key"), call.key)
        value = call.value
        if value is not None:
            value = self._placed((call.name, "value"), value)
        return replace(call, key=key, value=value)

    def _placed(self, name: tuple[str, str], tensor: Tensor) -> Tensor:
        m = tensor.shape[2]
        buffer, filled = self._buffers.get(name, (tensor, 0))
        part = buffer[:, :, :filled]
        if not 0 < filled <= m or part.dtype != tensor.dtype or part.device != tensor.device:
            self._buffers[name] = (tensor, m)
            return tensor
        if not torch.equal(part, tensor[:, :, :filled]):
            self._buffers[name] = (tensor, m)
            return tensor
        if m > buffer.shape[2]:  # twice the room, so that all copies together are O(T)
            buffer = tensor.new_empty(*tensor.shape[:2], 2 * m, tensor.shape[3])
            buffer[:, :, :filled] = part
        buffer[:, :, filled:m] = tensor[:, :, filled:]
        self._buffers[name] = (buffer, m)
        return buffer[:, :, :m]


def _cat(tensors: Sequence[Tensor | None], axis: int) -> Tensor | None:
    there = [x for x in tensors if x is not None]
    return torch.cat(there, axis) if len(there) == len(tensors) else None


def _turned(run: Sequence[Captured]) -> Turned | None:
    """The angles of all queries; they are those of the keys, where both are one sequence."""
    found = [call.turned for call in run if call.turned is not None]
    if len(found) < len(run) or any(a.layout != b.layout for a, b in pairwise(found)):
        return None
    if any(abs(a.factors[0] - b.factors[0]) > 1e-5 for a, b in pairwise(found)):
        return None
    angles = torch.cat([one.query for one in found], 1)
    own = angles if angles.shape[1] == run[-1].key.shape[2] else None
    return replace(
        found[0],
        query=angles,
        key=own,
        gap=max(one.gap for one in found),
        own=all(one.own for one in found),
    )
