"""Looking at a matrix, tile by tile: what is asked is kept, the tiles are not.

Each function makes one pass for the rows' statistics and one over the weights. No gradients, but
for `received`, which is a product with the transpose.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from regard import errors
from regard.form.tiles import Tile, Tiles, compute_dtype

if TYPE_CHECKING:
    from regard.matrix import Attention


class TopK(NamedTuple):
    """The largest weights of each row, in descending order, and their keys."""

    values: Tensor
    indices: Tensor


def topk(matrix: Attention, k: int) -> TopK:
    """The k largest weights of each row, [*batch, n, k]; index -1, weight 0 where it sees fewer."""
    if k < 1:
        raise errors.ShapeError(f"topk needs k >= 1, not {k}.")
    tiles, each = _tiles(matrix)
    shape, dtype = (*matrix.shape[:-1], k), compute_dtype(matrix.dtype)
    values = torch.full(shape, -torch.inf, dtype=dtype, device=matrix.device)
    indices = torch.full(shape, -1, device=matrix.device)
    for tile in each:
        weights = tile.weights
        keep = tiles.keep(tile.rows, tile.span)
        if keep is not None:
            weights = weights.masked_fill(~keep, -torch.inf)
        best, at = weights.topk(min(k, weights.shape[-1]), dim=-1)
        both = torch.cat([values[..., tile.rows, :], best], -1)
        places = torch.cat([indices[..., tile.rows, :], at + tile.span.columns.start], -1)
        values[..., tile.rows, :], order = both.topk(k, dim=-1)
        indices[..., tile.rows, :] = places.gather(-1, order)
    hidden = values == -torch.inf
    return TopK(values.masked_fill(hidden, 0), indices.masked_fill(hidden, -1))


def entropy(matrix: Attention) -> Tensor:
    """- sum_j p_ij log p_ij in nats, p_ij = |weight_ij| / sum_j |weight_ij|; [*batch, n]."""
    size, spread = _row_sums(matrix, lambda size, tile: torch.xlogy(size, size))
    some = size > 0
    safe = torch.where(some, size, 1)
    return torch.where(some, (safe.log() - spread / safe).clamp(min=0), size)


def distance(matrix: Attention, offset: int) -> Tensor:
    """sum_j p_ij |i + offset - j|, p as in `entropy`; [*batch, n]."""
    tiles = Tiles.of(matrix)

    def spread(size: Tensor, tile: Tile) -> Tensor:
        i, j = tiles.at(tile.rows, tile.span.columns)
        return size * (i[:, None] + offset - j).abs()

    size, total = _row_sums(matrix, spread)
    return torch.where(size > 0, total / torch.where(size > 0, size, 1), size)


def pool(matrix: Attention, size: int, reduce: str) -> Tensor:
    """Mean or largest weight of each cell of size x size pairs, [*batch, n / size, m / size].

    Cells at the end may be smaller; their mean is over the pairs they have.
    """
    if size < 1:
        raise errors.ShapeError(f"pool needs a cell of at least 1 pair, not {size}.")
    if reduce not in ("mean", "max"):
        raise ValueError(f"pool reduces with 'mean' or 'max', not {reduce!r}.")
    *batch, n, m = matrix.shape
    _, each = _tiles(matrix)
    cells = [-(-length // size) for length in (n, m)]
    # A pair that is not visible has weight 0, and so has a cell that no tile reaches.
    pooled = torch.zeros(*batch, *cells, dtype=compute_dtype(matrix.dtype), device=matrix.device)
    for tile in each:
        part = tile.weights
        for axis, along in ((-2, tile.rows), (-1, tile.span.columns)):
            part = _shrink(part, axis, along.start, size, reduce)
        first = tile.rows.start // size, tile.span.columns.start // size
        place = pooled[
            ..., first[0] : first[0] + part.shape[-2], first[1] : first[1] + part.shape[-1]
        ]
        place.copy_(place + part if reduce == "mean" else torch.maximum(place, part))
    if reduce == "max" or not pooled.numel():
        return pooled
    counts = [
        (length - torch.arange(0, length, size, device=matrix.device)).clamp(max=size)
        for length in (n, m)
    ]
    return pooled / (counts[0][:, None] * counts[1])


def _shrink(part: Tensor, axis: int, start: int, size: int, reduce: str) -> Tensor:
    """Sum or largest entry of each cell along one axis whose first entry is number `start`."""
    before = start % size
    after = -(before + part.shape[axis]) % size
    empty = 0.0 if reduce == "mean" else -torch.inf
    sides = (before, after) if axis == -1 else (0, 0, before, after)
    cells: Tensor = F.pad(part, sides, value=empty).unflatten(axis, (-1, size))
    return cells.sum(axis) if reduce == "mean" else cells.amax(axis)


def _row_sums(matrix: Attention, spread: Callable[[Tensor, Tile], Tensor]) -> tuple[Tensor, Tensor]:
    """Sums over each row of |weight| and of spread(|weight|, tile), [*batch, n]."""
    _, each = _tiles(matrix)
    shape, dtype = matrix.shape[:-1], compute_dtype(matrix.dtype)
    size, total = (torch.zeros(shape, dtype=dtype, device=matrix.device) for _ in range(2))
    for tile in each:
        weights = tile.weights.abs()
        size[..., tile.rows] += weights.sum(-1)
        total[..., tile.rows] += spread(weights, tile).sum(-1)
    return size, total


def _tiles(matrix: Attention) -> tuple[Tiles, Iterator[Tile]]:
    tiles = Tiles.of(matrix)
    query, key = matrix.rule.operands(matrix.query, matrix.key)
    return tiles, tiles.walk(query, key, tiles.rows(query, key))
