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
from regard.form import fused
from regard.form.tiles import Tile, Tiles, compute_dtype
from regard.kernel.cpu import Look
from regard.normalizer import Softmax

if TYPE_CHECKING:
    from regard.matrix import Attention


class TopK(NamedTuple):
    """The largest weights of each row, in descending order, and their keys."""

    values: Tensor
    indices: Tensor


def topk(matrix: Attention, k: int) -> TopK:
    """The k largest weights of each row, [*batch, n, k]; index -1, weight 0 where it sees fewer."""
    errors.check_number("topk's k", k, whole=True, least=1)
    if fused.needs(matrix) is None:
        return TopK(*fused.look(matrix, Look.TOPK, k))
    _, each = _tiles(matrix)
    shape, dtype = (*matrix.shape[:-1], k), compute_dtype(matrix.dtype)
    values = torch.full(shape, -torch.inf, dtype=dtype, device=matrix.device)
    indices = torch.full(shape, -1, device=matrix.device)
    for tile in each:
        weights = tile.weights.masked_fill(tile.logits == -torch.inf, -torch.inf)
        best, at = weights.topk(min(k, weights.shape[-1]), dim=-1)
        both = torch.cat([values[..., tile.rows, :], best], -1)
        places = torch.cat([indices[..., tile.rows, :], at + tile.span.columns.start], -1)
        values[..., tile.rows, :], order = both.topk(k, dim=-1)
        indices[..., tile.rows, :] = places.gather(-1, order)
    hidden = values == -torch.inf
    return TopK(values.masked_fill(hidden, 0), indices.masked_fill(hidden, -1))


def entropy(matrix: Attention) -> Tensor:
    """- sum_j p_ij log p_ij in nats, p_ij = |weight_ij| / sum_j |weight_ij|; [*batch, n]."""
    if _has_logarithms(matrix):
        size, spread = fused.look(matrix, Look.ENTROPY)
    else:
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

    if fused.needs(matrix) is None:
        size, total = fused.look(matrix, Look.DISTANCE, offset=offset)
    else:
        size, total = _row_sums(matrix, spread)
    return torch.where(size > 0, total / torch.where(size > 0, size, 1), size)


def pool(matrix: Attention, size: int, reduce: str) -> Tensor:
    """Mean or largest weight of each cell of size x size pairs, [*batch, n / size, m / size].

    Cells at the end may be smaller; their mean is over the pairs they have.
    """
    errors.check_number("pool's size", size, whole=True, least=1)
    if reduce not in ("mean", "max"):
        raise ValueError(f"pool reduces with 'mean' or 'max', not {reduce!r}.")
    *batch, n, m = matrix.shape
    size = min(size, max(n, m, 1))
    counts = [
        (length - torch.arange(0, length, size, device=matrix.device)).clamp(max=size)
        for length in (n, m)
    ]
    pairs = counts[0][:, None] * counts[1]
    if fused.needs(matrix) is None:
        what = Look.POOL_MEAN if reduce == "mean" else Look.POOL_MAX
        pooled, reached = fused.look(matrix, what, size)
        return pooled / pairs if reduce == "mean" else _with_hidden(pooled, reached < pairs)
    _, each = _tiles(matrix)
    cells = [-(-length // size) for length in (n, m)]
    start = 0.0 if reduce == "mean" else -torch.inf
    pooled = matrix.query.new_full((*batch, *cells), start, dtype=compute_dtype(matrix.dtype))
    reached = torch.zeros(cells, device=matrix.device)
    for tile in each:
        # The same steps on ones count the pairs of each cell that tiles have reached.
        parts = [tile.weights, torch.ones(tile.weights.shape[-2:], device=matrix.device)]
        for axis, along in ((-2, tile.rows), (-1, tile.span.columns)):
            parts = [
                _shrink(part, axis, along.start, size, how)
                for part, how in zip(parts, (reduce, "mean"), strict=True)
            ]
        rows, columns = (
            slice(along.start // size, along.start // size + count)
            for along, count in zip((tile.rows, tile.span.columns), parts[1].shape, strict=True)
        )
        reached[rows, columns] += parts[1]
        place = pooled[..., rows, columns]
        place.copy_(place + parts[0] if reduce == "mean" else torch.maximum(place, parts[0]))
    if reduce == "mean":
        return pooled / pairs
    return _with_hidden(pooled, reached < pairs)


def _with_hidden(largest: Tensor, some: Tensor) -> Tensor:
    """A pair that no tile reaches is not visible and has weight 0."""
    return torch.where(some, largest.clamp(min=0), largest)


def _shrink(part: Tensor, axis: int, start: int, size: int, reduce: str) -> Tensor:
    """Sum or largest entry of each cell along one axis whose first entry is number `start`."""
    length, before = part.shape[axis], start % size
    if before + length <= 2 * size:  # few cells: no need to fill them up
        edges = [size - before] if before + length > size else []
        pieces = part.tensor_split(edges, dim=axis)
        shrunk = [p.sum(axis, True) if reduce == "mean" else p.amax(axis, True) for p in pieces]
        return torch.cat(shrunk, axis)
    after = -(before + length) % size
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


def _has_logarithms(matrix: Attention) -> bool:
    """Whether log weight is logit - logsumexp, so that a kernel needs no logarithm."""
    plain = isinstance(matrix.normalizer, Softmax) and matrix.dropout is None
    return plain and fused.needs(matrix) is None


def _tiles(matrix: Attention) -> tuple[Tiles, Iterator[Tile]]:
    tiles = Tiles.of(matrix)
    query, key = matrix.rule.operands(matrix.query, matrix.key)
    return tiles, tiles.walk(query, key, tiles.rows(query, key))
