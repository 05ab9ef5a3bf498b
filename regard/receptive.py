"""The receptive field of a head as numbers: where it looks, how widely, and how far."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from regard import errors
from regard.grid import Grid
from regard.part import widest

if TYPE_CHECKING:
    from regard.matrix import Attention
    from regard.nn.gated import Mixture

PAIRS = 2**20
"""Pairs of a block of rows, for each head: what is held at once."""


class ReceptiveField(NamedTuple):
    """What each head sees, as displacements key - query, under its weights over all rows.

    centre [*batch, heads, axes]: the mean; radius [*batch, heads]: the root of the mean squared
    distance from it; non_locality [*batch, heads]: the mean distance from the query
    """

    centre: Tensor
    radius: Tensor
    non_locality: Tensor


@torch.no_grad()
def receptive_field(matrix: Attention | Mixture, grid: Grid) -> ReceptiveField:
    """Measure where the heads of a matrix look, on the grid that its tokens stand on.

    With p_ij = |weight_ij| / sum_ij |weight_ij| and d_ij = y_j - x_i:
    centre = sum p d,  radius = (sum p |d - centre|^2)^0.5,  non_locality = sum p |d|

    Where rows sum to 1 the last is D of d'Ascoli et al. 2021 (ConViT), arXiv:2103.10697, eq. 8.
    Cost: one pass over the weights, some rows at a time; O(n) memory.
    Raises ShapeError where the grid is not that of the matrix.

    >>> import regard
    >>> from regard.position import Shift
    >>> grid, tokens = Grid((6, 6)), torch.zeros(1, 36, 0)
    >>> shift = Shift(torch.tensor([[3, -4]]), grid)
    >>> A = regard.attention(tokens, tokens, score=regard.PositionOnly(), position=shift)
    >>> field = receptive_field(A, grid)
    >>> field.centre.tolist(), field.radius.item(), field.non_locality.item()
    ([[3.0, -4.0]], 0.0, 5.0)
    """
    errors.check_kind("grid", grid, Grid)
    *batch, n, m = matrix.shape
    grid.check("receptive_field's grid", n, m)
    device = matrix.content.device if hasattr(matrix, "content") else matrix.device
    dtype = widest(device)
    keys = grid.keys(torch.arange(m, device=device))
    total, far = (torch.zeros(batch, dtype=dtype, device=device) for _ in range(2))
    first = torch.zeros(*batch, grid.axes, dtype=dtype, device=device)
    second = torch.zeros(batch, dtype=dtype, device=device)
    step = max(PAIRS // max(m, 1), 1)
    for start in range(0, n, step):
        block = slice(start, min(start + step, n))
        rows = torch.arange(block.start, block.stop, device=device)
        weights = matrix[..., block, :].abs().to(dtype)  # type: ignore[union-attr]
        away = (keys - grid.places(rows)[:, None]).to(dtype)  # [r, m, axes]
        squares = away.square().sum(-1)
        total += weights.sum((-2, -1))
        first += torch.einsum("...rm,rma->...a", weights, away)
        second += (weights * squares).sum((-2, -1))
        far += (weights * squares.sqrt()).sum((-2, -1))
    some = torch.where(total == 0, 1, total)
    centre = first / some[..., None]
    spread = (second / some - centre.square().sum(-1)).clamp(min=0)
    return ReceptiveField(centre, spread.sqrt(), far / some)
