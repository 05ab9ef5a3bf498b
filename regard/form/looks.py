"""Looking at a matrix, tile by tile: what is asked is kept, the tiles are not.

All that is asked at once comes from one pass, in compiled kernels (csrc/looks.h) or in the tiles of
PyTorch, which need a pass for the rows' statistics before. No gradients, but for `received`, which
is a product with the transpose.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from regard import errors
from regard.form import fused, tiled
from regard.form.tiles import Tile, Tiles
from regard.kernel.asked import Asked, Looks
from regard.normalizer import Relu, Row, Sigmoid, Softmax

if TYPE_CHECKING:
    from regard.matrix import Attention


class TopK(NamedTuple):
    """The largest weights of each row, in descending order, and their keys."""

    values: Tensor
    indices: Tensor


class Pool(NamedTuple):
    """Mean and largest weight of each cell of a map."""

    mean: Tensor
    max: Tensor


class Statistics(NamedTuple):
    """What `A.statistics()` found; None for what was not asked."""

    logsumexp: Tensor
    entropy: Tensor
    distance: Tensor
    received: Tensor
    topk: TopK | None
    pool: Pool | None


def statistics(matrix: Attention, topk: int | None, size: int | None, offset: int) -> Statistics:
    """Everything at once: each is what the function of its name gives."""
    pooled, side = size is not None, 1 if size is None else _side(matrix, size)
    k = 0 if topk is None else _k(topk)
    asked = Asked(True, True, True, pooled, pooled, k, side, _offset(offset))
    found = _look(matrix, asked)
    if isinstance(matrix.rule.normalizer, Softmax):
        logsumexp = tiled.logsumexp_of(Row(found.peak, found.total))
    else:
        logsumexp = tiled.logsumexp(matrix)  # it plays no part in the weights
    return Statistics(
        logsumexp,
        found.entropy,
        found.distance,
        found.received,
        None if topk is None else TopK(found.values, found.indices),
        Pool(_mean(matrix, found.mass, side), found.largest) if pooled else None,
    )


def topk(matrix: Attention, k: int) -> TopK:
    """The k largest weights of each row, [*batch, n, k]; index -1, weight 0 where it sees fewer."""
    found = _look(matrix, Asked(k=_k(k)))
    return TopK(found.values, found.indices)


def entropy(matrix: Attention) -> Tensor:
    """- sum_j p_ij log p_ij in nats, p_ij = |weight_ij| / sum_j |weight_ij|; [*batch, n]."""
    return _look(matrix, Asked(entropy=True)).entropy


def distance(matrix: Attention, offset: int) -> Tensor:
    """sum_j p_ij |i + offset - j|, p as in `entropy`; [*batch, n]."""
    return _look(matrix, Asked(distance=True, offset=_offset(offset))).distance


def received(matrix: Attention) -> Tensor:
    """sum_i weight_ij, [*batch, m]; as a product where there may be gradients or a graph."""
    ones = matrix.query.new_ones(matrix.shape[-2], 1)
    graph = torch.compiler.is_compiling()
    if graph or not _in_kernels(matrix) or fused.wants_gradient(matrix, ones):
        return (matrix.mT @ ones)[..., 0]
    with torch.no_grad():
        return _look(matrix, Asked(received=True)).received.to(matrix.dtype)


def pool(matrix: Attention, size: int, reduce: str) -> Tensor:
    """Mean or largest weight of each cell of size x size pairs, [*batch, n / size, m / size].

    Cells at the end may be smaller; their mean is over the pairs they have.
    """
    if reduce not in ("mean", "max"):
        raise ValueError(f"pool reduces with 'mean' or 'max', not {reduce!r}.")
    side = _side(matrix, size)
    if reduce == "max":
        return _look(matrix, Asked(largest=True, side=side)).largest
    return _mean(matrix, _look(matrix, Asked(mass=True, side=side)).mass, side)


def _k(k: int) -> int:
    errors.check_number("topk's k", k, whole=True, least=1)
    return int(k)


def _offset(offset: int) -> int:
    errors.check_number("distance's offset", offset, whole=True)
    return int(offset)


def _side(matrix: Attention, size: int) -> int:
    errors.check_number("pool's size", size, whole=True, least=1)
    return int(min(size, max(*matrix.shape[-2:], 1)))


def _mean(matrix: Attention, mass: Tensor, side: int) -> Tensor:
    return mass / _pairs(matrix.shape, side, matrix.device)


def _pairs(shape: Sequence[int], side: int, device: torch.device) -> Tensor:
    """How many pairs each cell has."""
    down, across = (
        (length - torch.arange(0, length, side, device=device)).clamp(max=side)
        for length in shape[-2:]
    )
    return down[:, None] * across


def _in_kernels(matrix: Attention) -> bool:
    """Whether csrc/looks.h answers: its weights are not negative, and grow with their logits."""
    grows = isinstance(matrix.rule.normalizer, (Softmax, Sigmoid, Relu))
    return grows and fused.needs(matrix) is None


def _look(matrix: Attention, asked: Asked) -> Looks:
    found = _found(matrix, asked)
    if (asked.k or asked.largest) and not _comparable(matrix, found):
        _mark(matrix, asked, found)
    return found


def _comparable(matrix: Attention, found: Looks) -> bool:
    """Whether no weight can be NaN, neither more nor less than another; -inf biases hide."""
    vectors = (matrix.query, matrix.key)
    sums = [x.detach().sum(dtype=torch.promote_types(x.dtype, torch.float32)) for x in vectors]
    biases = [x.detach().sum() for x in matrix.rule.tensors() if x.is_floating_point()]
    overflowed = isinstance(matrix.rule.normalizer, Softmax) and bool(found.total.isnan().any())
    return (
        not overflowed
        and all(math.isfinite(x) for x in sums)
        and not any(math.isnan(x) or x == math.inf for x in biases)
    )


def _mark(matrix: Attention, asked: Asked, found: Looks) -> None:
    """NaN, and index -1, where largest weights were asked of rows or cells with a NaN."""
    known = _found(matrix, Asked(entropy=True, mass=asked.largest, side=asked.side))
    if asked.k:
        rows = known.entropy.isnan()[..., None]
        found.values.masked_fill_(rows, torch.nan)
        found.indices.masked_fill_(rows, -1)
    if asked.largest:
        found.largest.masked_fill_(known.mass.isnan(), torch.nan)


def _found(matrix: Attention, asked: Asked) -> Looks:
    if _in_kernels(matrix):
        return fused.look(matrix, asked)
    tiles = Tiles.of(matrix)
    query, key = matrix.rule.operands(matrix.query, matrix.key)
    row = tiles.rows(query, key)
    homes = asked.homes(query, tiles.shape[-1], tiles.batch, 1).gathered()
    answers = _Answers(tiles, asked, homes._replace(peak=row.peak, total=row.total))
    spoiled = bool(row.total.isnan().any())
    for tile in tiles.walk(query, key, row):
        if spoiled:  # a row that is not a number has none of them where pairs are hidden
            hidden = tile.logits == -torch.inf
            tile = replace(tile, weights=tile.weights.masked_fill(hidden, 0))
        answers.take(tile)
    return answers.finish()


class _Answers:
    """What was asked, tile after tile."""

    def __init__(self, tiles: Tiles, asked: Asked, homes: Looks) -> None:
        self.tiles, self.asked, self.homes = tiles, asked, homes
        self.size = torch.zeros_like(homes.total)  # sums over rows of |weight|
        self.reached = homes.total.new_zeros(homes.largest.shape[-2:])
        for home, start in (
            (homes.entropy, 0),
            (homes.distance, 0),
            (homes.values, -torch.inf),
            (homes.indices, -1),
            (homes.largest, -torch.inf),
        ):
            home.fill_(start)

    def take(self, tile: Tile) -> None:
        """Take in a tile."""
        asked, homes = self.asked, self.homes
        if asked.entropy or asked.distance:
            size = tile.weights.abs()
            total = size.sum(-1)
            if asked.entropy:
                self._merge_entropy(tile, size, total)
            self.size[..., tile.rows] += total
        if asked.distance:
            i, j = self.tiles.at(tile.rows, tile.span.columns)
            far = (i[:, None] + asked.offset - j).abs()
            homes.distance[..., tile.rows] += (size * far).sum(-1)
        if asked.received:
            homes.received[..., tile.span.columns] += tile.weights.sum(-2)
        if asked.k:
            self._take_largest(tile)
        if asked.mass:
            homes.mass[_cells(tile, asked.side)] += _pooled(tile.weights, tile, asked.side)
        if asked.largest:
            self._take_cells(tile)

    def _merge_entropy(self, tile: Tile, size: Tensor, total: Tensor) -> None:
        """H = p H_before + q H_tile - p log p - q log q, with the shares p + q = 1 of each.

        All terms are at least 0, so that rows keep their digits whose weights are all tiny, as
        beside a sink; the difference log Z - sum w log w / Z would lose those of log Z.
        """
        inside = size / torch.where(total > 0, total, 1)[..., None]
        entropy, before = self.homes.entropy[..., tile.rows], self.size[..., tile.rows]
        whole = before + total
        p, q = (part / torch.where(whole > 0, whole, 1) for part in (before, total))
        between = -torch.xlogy(p, p) - torch.xlogy(q, q)
        entropy.copy_(p * entropy - q * torch.xlogy(inside, inside).sum(-1) + between)

    def _take_largest(self, tile: Tile) -> None:
        values, indices = (x[..., tile.rows, :] for x in (self.homes.values, self.homes.indices))
        weights = tile.weights.masked_fill(tile.logits == -torch.inf, -torch.inf)
        best, at = weights.topk(min(self.asked.k, weights.shape[-1]), dim=-1)
        places = torch.cat([indices, at + tile.span.columns.start], -1)
        best, order = torch.cat([values, best], -1).topk(self.asked.k, dim=-1)
        values.copy_(best)
        indices.copy_(places.gather(-1, order))

    def _take_cells(self, tile: Tile) -> None:
        side, cells = self.asked.side, self.homes.largest[_cells(tile, self.asked.side)]
        cells.copy_(torch.maximum(cells, _pooled(tile.weights, tile, side, "max")))
        # The same steps on ones count the pairs of each cell that tiles have reached.
        ones = torch.ones(tile.weights.shape[-2:], device=cells.device)
        self.reached[_cells(tile, side)] += _pooled(ones, tile, side)

    def finish(self) -> Looks:
        """All answers, after the last tile."""
        asked, homes, some = self.asked, self.homes, self.size > 0
        size = torch.where(some, self.size, 1)
        if asked.entropy:
            homes = homes._replace(entropy=torch.where(some, homes.entropy, self.size))
        if asked.distance:
            homes = homes._replace(distance=torch.where(some, homes.distance / size, self.size))
        if asked.k:
            hidden = homes.values == -torch.inf
            homes.values.masked_fill_(hidden, 0)
            homes.indices.masked_fill_(hidden, -1)
        if asked.largest:
            # A pair that no tile reaches is not visible and has weight 0.
            short = self.reached < _pairs(self.tiles.shape, asked.side, size.device)
            homes = homes._replace(
                largest=torch.where(short, homes.largest.clamp(min=0), homes.largest)
            )
        return homes


def _cells(tile: Tile, side: int) -> tuple[Any, ...]:
    """Where the cells of a tile are among all."""
    rows, columns = (
        slice(along.start // side, -(-along.stop // side))
        for along in (tile.rows, tile.span.columns)
    )
    return ..., rows, columns


def _pooled(part: Tensor, tile: Tile, side: int, reduce: str = "sum") -> Tensor:
    """Sum or largest entry of each cell of a tile."""
    for axis, along in ((-2, tile.rows), (-1, tile.span.columns)):
        part = _shrink(part, axis, along.start, side, reduce)
    return part


def _shrink(part: Tensor, axis: int, start: int, size: int, reduce: str) -> Tensor:
    """Sum or largest entry of each cell along one axis whose first entry is number `start`."""
    length, before = part.shape[axis], start % size
    if before + length <= 2 * size:  # few cells: no need to fill them up
        edges = [size - before] if before + length > size else []
        pieces = part.tensor_split(edges, dim=axis)
        shrunk = [p.sum(axis, True) if reduce == "sum" else p.amax(axis, True) for p in pieces]
        return torch.cat(shrunk, axis)
    after = -(before + length) % size
    empty = 0.0 if reduce == "sum" else -torch.inf
    sides = (before, after) if axis == -1 else (0, 0, before, after)
    cells: Tensor = F.pad(part, sides, value=empty).unflatten(axis, (-1, size))
    return cells.sum(axis) if reduce == "sum" else cells.amax(axis)
