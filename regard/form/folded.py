"""The same product with other axes: heads as rows, and several values as one.

Few queries against many keys: H / G heads that read one key head, with n queries each, are H / G n
queries of that head; a cache is then read once, and not once per head. What is a view stays a view.
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


def side_by_side(value: Tensor, batch: tuple[int, ...]) -> tuple[Tensor, list[int], list[int]]:
    """A value with axes that the matrix has not, as one wider value: A [v w] = [A v, A w].

    Returns it, the places of those axes, and the sizes that its width is made of.
    """
    if value.shape[:-2] == batch:
        return value, [], []
    axes = max(value.dim() - 2, len(batch))
    value = value[(None,) * (axes + 2 - value.dim())]
    own = (1,) * (axes - len(batch)) + batch
    extra = [a for a in range(axes) if value.shape[a] > 1 and own[a] == 1]
    kept = [a for a in range(axes) if a not in extra]
    sizes = [value.shape[a] for a in (*extra, -1)]
    if extra:
        value = value.permute(*kept, axes, *extra, axes + 1).flatten(-len(extra) - 1)
        for a in extra:
            value = value.unsqueeze(a)
    value = value[(0,) * (axes - len(batch))]
    return value, [a - axes for a in extra], sizes


def apart(output: Tensor, extra: list[int], sizes: list[int]) -> Tensor:
    """Undo `side_by_side` for the product."""
    if not extra:
        return output
    output = output.unflatten(-1, sizes)  # [*batch, n, *extra, e]
    axes = max(output.dim() - len(sizes) - 1, -min(extra))
    output = output[(None,) * (axes + len(sizes) + 1 - output.dim())]
    places = [axes + a for a in extra]
    kept = [a for a in range(axes) if a not in places]
    order = [len(kept) + 1 + places.index(a) if a in places else kept.index(a) for a in range(axes)]
    return output.squeeze(places).permute(*order, len(kept), -1)
