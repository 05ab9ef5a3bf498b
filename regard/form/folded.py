"""Few queries against many keys: the heads that share keys become rows of one head.

H / G heads that read one key head, with n queries each, are H / G n queries of that head; a cache
is then read once, and not once per head. What is a view stays a view.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor

from regard.mask import Compiled
from regard.normalizer import Softmax
from regard.runs import Runs
from regard.score import Bilinear, Cosine, Dot

if TYPE_CHECKING:
    from regard.matrix import Attention

MOST_ROWS = 32
"""Above it, tiles of one head are full enough by themselves."""


def fold(matrix: Attention, value: Tensor) -> Attention | None:
    """The folded matrix, or None where nothing is shared or parts differ by head."""
    if len(matrix.shape) < 3 or matrix.query.dim() < 3 or matrix.key.dim() < 3:
        return None
    heads, shared = matrix.query.shape[-3], matrix.key.shape[-3]
    size = heads // max(shared, 1)
    rows = size * matrix.shape[-2]
    if not 1 < size <= rows <= MOST_ROWS or value.dim() < 3 or value.shape[-3] != shared:
        return None
    if matrix.position is not None or matrix.dropout is not None or not _same_for_all(matrix):
        return None
    runs = matrix.runs
    if runs is not None and runs.batch and runs.batch[-1] != 1:
        return None
    query = matrix.query.unflatten(-3, (shared, size)).flatten(-3, -2)
    mask = None if runs is None else Compiled(_repeated(runs, size), repr(matrix.mask))
    return replace(matrix, query=query, mask=mask)


def unfold(output: Tensor, heads: int) -> Tensor:
    """[*batch, key heads, H / G n, e] -> [*batch, H, n, e]."""
    size = heads // output.shape[-3]
    unfolded: Tensor = output.unflatten(-2, (size, -1)).flatten(-4, -3)
    return unfolded


def _same_for_all(matrix: Attention) -> bool:
    score, normalizer = matrix.score, matrix.normalizer
    if type(score) not in (Dot, Bilinear, Cosine) or any(t.numel() > 1 for t in score.tensors()):
        return False
    return not isinstance(normalizer, Softmax) or not isinstance(normalizer.sink, Tensor)


def _repeated(runs: Runs, size: int) -> Runs:
    """The runs of all rows, `size` times one after the other."""
    apart = Runs((*runs.batch, 1), runs.rows, runs.columns, runs.offsets, runs.start, runs.stop)
    many = apart.expand((*runs.batch, size))
    return Runs(
        many.batch[:-1], size * runs.rows, runs.columns, many.offsets, many.start, many.stop
    )
