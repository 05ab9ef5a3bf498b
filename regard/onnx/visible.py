"""Masks as formulas of positions, for graphs whose lengths are not known.

Elsewhere a mask is runs, which depend on data; here each rule is one comparison of i and j.
"""

from __future__ import annotations

from functools import singledispatch

import torch
from torch import Tensor

from regard import errors
from regard.graph import Graph
from regard.mask import And, Causal, Dense, Documents, Mask, Not, Or, Padding, Prefix, Window
from regard.neighborhood import Neighborhood


@singledispatch
def visible(mask: Mask, i: Tensor, j: Tensor) -> Tensor:
    """Whether row i [n, 1] sees key j [m]: bool, broadcasts to [*batch, heads, n, m].

    >>> visible(~Causal(), torch.arange(2)[:, None], torch.arange(2))
    tensor([[False,  True],
            [False, False]])
    """
    raise errors.FormError(
        f"the mask {mask!r} has no formula for an ONNX graph; masks that have one are Causal, "
        "Window, Prefix, Padding, Documents, Dense, Neighborhood, Graph, and what &, | and ~ make "
        "of them."
    )


@visible.register
def _(mask: Causal, i: Tensor, j: Tensor) -> Tensor:
    return j <= i + mask.offset


@visible.register
def _(mask: Window, i: Tensor, j: Tensor) -> Tensor:
    away = j - (i + mask.offset)
    keep = torch.ones_like(away, dtype=torch.bool)
    keep = keep if mask.left is None else keep & (away >= -mask.left)
    return keep if mask.right is None else keep & (away <= mask.right)


@visible.register
def _(mask: Prefix, i: Tensor, j: Tensor) -> Tensor:
    length = mask.length
    if isinstance(length, Tensor) and length.dim():
        length = length[..., None, None, None]
    return (j < length).expand(*i.shape[:-1], -1) if not isinstance(length, Tensor) else j < length


@visible.register
def _(mask: Padding, i: Tensor, j: Tensor) -> Tensor:
    return mask.keep[..., None, None, :] if mask.keep.dim() > 1 else mask.keep[None, :]


@visible.register
def _(mask: Documents, i: Tensor, j: Tensor) -> Tensor:
    keys = mask.ids if mask.key_ids is None else mask.key_ids
    same = mask.ids[..., :, None] == keys[..., None, :]
    return same.unsqueeze(-3) if same.dim() > 2 else same


@visible.register
def _(mask: Dense, i: Tensor, j: Tensor) -> Tensor:
    return mask.keep


@visible.register
def _(mask: And, i: Tensor, j: Tensor) -> Tensor:
    return visible(mask.one, i, j) & visible(mask.other, i, j)


@visible.register
def _(mask: Or, i: Tensor, j: Tensor) -> Tensor:
    return visible(mask.one, i, j) | visible(mask.other, i, j)


@visible.register
def _(mask: Not, i: Tensor, j: Tensor) -> Tensor:
    return ~visible(mask.mask, i, j)


@visible.register
def _(mask: Neighborhood, i: Tensor, j: Tensor) -> Tensor:
    first, count = mask.boxes(i[:, 0])  # [n, axes] each
    grid = mask.grid
    step = grid.tensor(mask.dilation, first)
    from_first = grid.keys(j) - first[:, None, :]
    taps = from_first.div(step, rounding_mode="floor")
    inside = (taps >= 0) & (taps < count[:, None, :]) & (taps * step == from_first)
    return inside.all(-1)


@visible.register
def _(mask: Graph, i: Tensor, j: Tensor) -> Tensor:
    source, target = mask.edges
    none = torch.zeros(i.shape[0], j.shape[0], dtype=torch.bool, device=i.device)
    edges = none.index_put((target, source), torch.ones((), dtype=torch.bool, device=i.device))
    return edges | (i == j) if mask.loops else edges
