"""Which keys each query of a captured call may see, in the forms that a page and a table need."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.look.record import Captured


def spans_or_bits(call: Captured) -> tuple[Tensor | None, Tensor | None]:
    """(spans, bits): [n, 2] first and last + 1 visible key per row, or packed bits, or neither."""
    n, m = call.query.shape[2], call.key.shape[2]
    if call.mask is None:
        if not call.causal:
            return None, None
        stop = torch.arange(1, n + 1, dtype=torch.int32).clamp(max=m)
        return torch.stack([torch.zeros_like(stop), stop], dim=-1), None
    seen = keep(call)
    if seen.shape[0] == 1 or bool((seen == seen[:1]).all()):
        only = seen[0].to(torch.uint8)
        count = only.sum(-1, dtype=torch.int32)
        first = only.argmax(-1).to(torch.int32)
        stop = m - only.flip(-1).argmax(-1).to(torch.int32)
        if bool(((stop - first == count) | (count == 0)).all()):
            stop = torch.where(count == 0, first, stop)
            return torch.stack([first, stop], dim=-1), None
        seen = seen[:1]
    padded = F.pad(seen.to(torch.uint8), (0, -m % 8))
    powers = 2 ** torch.arange(8, dtype=torch.uint8)
    return None, (padded.reshape(*padded.shape[:-1], -1, 8) * powers).sum(-1, dtype=torch.uint8)


def keep(call: Captured) -> Tensor:
    """Mask and causal triangle together, boolean [1 or heads, n, m]; the call has a mask."""
    assert call.mask is not None
    n, m = call.query.shape[2], call.key.shape[2]
    seen = call.mask[0].expand(call.mask.shape[1], n, m)
    return seen & (torch.arange(m) <= torch.arange(n)[:, None]) if call.causal else seen


def counts(call: Captured) -> Tensor:
    """How many keys each query may see, [1 or heads, n]."""
    n, m = call.query.shape[2], call.key.shape[2]
    if call.mask is not None:
        return keep(call).sum(-1)
    return torch.arange(1, n + 1).clamp(max=m)[None] if call.causal else torch.full((1, n), m)


def at(call: Captured, i: Tensor, j: Tensor) -> Tensor:
    """Whether query i may see key j, for pairs of positions: [1 or heads, pairs]."""
    n, m = call.query.shape[2], call.key.shape[2]
    seen = (j <= i)[None] if call.causal else torch.ones(1, len(i), dtype=torch.bool)
    if call.mask is None:
        return seen
    return seen & call.mask[0].expand(call.mask.shape[1], n, m)[:, i, j]


def share(call: Captured, size: int) -> Tensor:
    """The share of each block's cells that may be seen, [1 or heads, rows, columns] of blocks."""
    n, m = call.query.shape[2], call.key.shape[2]
    starts = torch.arange(0, m, size)
    stops: Tensor = (starts + size).clamp(max=m)
    spans, bits = spans_or_bits(call)
    if bits is not None:
        sums = F.pad(keep(call).int().cumsum(-1), (1, 0))
        seen = sums[..., stops] - sums[..., starts]  # [1 or heads, n, columns]
    elif spans is None:
        return torch.ones(1, math.ceil(n / size), len(starts))
    else:
        first, stop = spans[:, :1], spans[:, 1:]
        seen = (torch.minimum(stop, stops) - torch.maximum(first, starts)).clamp(min=0)[None]
    rows = F.pad(seen.float(), (0, 0, 0, -n % size))
    total = rows.reshape(rows.shape[0], -1, size, rows.shape[-1]).sum(2)
    heights = torch.full((total.shape[1], 1), float(size))
    heights[-1] = n - size * (total.shape[1] - 1)
    return total / (heights * (stops - starts))
