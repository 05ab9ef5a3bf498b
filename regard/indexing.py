"""`A[...]`: from an index, as of a tensor of that shape, to weights or to a smaller lazy matrix."""

from __future__ import annotations

from dataclasses import replace
from numbers import Integral
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from regard import errors, grouped
from regard.custom import Custom
from regard.form import dense, tiled
from regard.form.tiles import TILE_NUMBERS
from regard.part import Index, narrow, positions

if TYPE_CHECKING:
    from regard.matrix import Attention

EVERY = slice(None)


def take(matrix: Attention, index: Any) -> Tensor | Attention:
    """Weights where rows or columns are picked; a lazy matrix where only batch axes are."""
    picks = index if isinstance(index, tuple) else (index,)
    if picks and picks[0] is None:
        found = take(matrix, picks[1:])
        return found[None] if isinstance(found, Tensor) else _with_axis(found)
    *batch_picks, row_pick, column_pick = _complete(index, matrix)
    if any(pick != EVERY for pick in batch_picks):
        sizes = matrix.shape[:-2]
        matrix = matrix.narrow(
            tuple(
                _batch_pick(p, s, a)
                for a, (p, s) in enumerate(zip(batch_picks, sizes, strict=True))
            )
        )
    if _is_every(row_pick) and _is_every(column_pick):
        return matrix
    if not isinstance(row_pick, (int, slice)) and not isinstance(column_pick, (int, slice)):
        raise errors.ShapeError(
            "two lists of positions pair up in a tensor's index; for the block of all their pairs "
            "index twice, A[..., rows, :][..., columns], and for pairs index A[..., rows, :] so."
        )
    n, m = matrix.shape[-2:]
    rows = as_index(row_pick, n, "row", matrix.device)
    columns = as_index(column_pick, m, "column", matrix.device)
    every_row = _is_every(row_pick)
    weights = _columns(matrix, columns) if every_row else _rows(matrix, rows, columns)
    if isinstance(row_pick, int):
        weights = weights.squeeze(-2)
    return weights.squeeze(-1) if isinstance(column_pick, int) else weights


def _with_axis(matrix: Attention) -> Attention:
    """The matrix behind one more batch axis, of size 1."""
    if isinstance(matrix.score, Custom):
        raise errors.ShapeError(
            f"A[None] adds an axis, for which {matrix.score} may not be written; add it to query "
            "and key."
        )
    lanes = matrix.given_lanes
    return replace(
        matrix,
        query=matrix.query[None],
        key=matrix.key[None],
        given_lanes=None if lanes is None else lanes[None],
    )


def as_index(pick: Any, length: int, name: str, device: torch.device) -> Index:
    """A slice of step 1, or a tensor of positions; an integer is a tensor of one.

    >>> as_index(slice(-2, None), 5, "row", torch.device("cpu"))
    slice(3, 5, None)
    >>> as_index([0, -1], 5, "row", torch.device("cpu"))
    tensor([0, 4])
    """
    if isinstance(pick, slice):
        start, stop, step = pick.indices(length)
        if step == 1:
            return slice(start, max(start, stop))
        return torch.arange(start, stop, step, device=device)
    if not isinstance(pick, (int, list, tuple, range, Tensor)) or isinstance(pick, bool):
        raise errors.ShapeError(
            f"a {name} index is a number, a slice, or a list or tensor of positions, not {pick!r}."
        )
    if isinstance(pick, range):
        pick = list(pick)
    given = torch.as_tensor(pick, device=device)
    if given.dtype == torch.bool and given.shape == (length,):
        return given.nonzero()[:, 0]
    if given.dim() > 1 or given.is_floating_point() or given.dtype == torch.bool:
        raise errors.ShapeError(
            f"a {name} index must be integers [count], or bool [{length}], not {given.dtype} "
            f"{errors.show(given.shape)}."
        )
    at = given.reshape(-1).long()
    if at.numel() and not bool(((at >= -length) & (at < length)).all()):
        raise IndexError(f"{name} index {pick!r} is out of range: the matrix has {length} {name}s.")
    return torch.where(at < 0, at + length, at)


def operand(tensor: Tensor, batch: tuple[int, ...], index: tuple[Any, ...]) -> Tensor:
    """Query or key of the batch entries and heads picked; a head takes its group's key head."""
    if tensor.dim() > 2 and batch and 1 < tensor.shape[-3] < batch[-1]:
        size = batch[-1] // tensor.shape[-3]
        if isinstance(index[-1], int):
            index = (*index[:-1], index[-1] // size)
            batch = (*batch[:-1], tensor.shape[-3])
        elif index[-1] == EVERY:
            batch = (*batch[:-1], tensor.shape[-3])
        else:
            tensor = grouped.match(tensor, batch[-1])
    return narrow(tensor, 2, batch, index)


def _rows(matrix: Attention, rows: Index, columns: Index) -> Tensor:
    """Whole rows by the definition, some at a time, of which the columns are kept."""
    wide = matrix.wide()
    operands = wide.rule.operands(wide.query, wide.key)
    at = positions(rows, matrix.shape[-2], matrix.device)
    line = max(matrix.shape[:-2].numel() * matrix.shape[-1], 1)
    pieces = [
        dense.weights(wide, piece, operands)[..., columns].to(matrix.dtype)
        for piece in at.split(max(TILE_NUMBERS // line, 1))
    ]
    return torch.cat(pieces, -2)


def _columns(matrix: Attention, columns: Index) -> Tensor:
    """Some columns of all rows: one pass over the tiles for the rows' statistics, then a block."""
    wide = matrix.wide()
    weights = wide.normalizer.weights(dense.logits(wide, EVERY, columns), tiled.rows(wide))
    if matrix.dropout is not None:
        n, m = matrix.shape[-2:]
        at = positions(EVERY, n, matrix.device), positions(columns, m, matrix.device)
        weights = weights * matrix.dropout.factors(matrix.lanes, *at, weights.dtype)
    return weights.to(matrix.dtype)


def _complete(index: Any, matrix: Attention) -> list[Any]:
    """One pick for each axis."""
    picks = list(index) if isinstance(index, tuple) else [index]
    axes = len(matrix.shape)
    dots = [place for place, pick in enumerate(picks) if pick is Ellipsis]
    if len(dots) > 1 or len(picks) - len(dots) > axes:
        raise IndexError(
            f"{len(picks)} indices for a matrix with {axes} axes {errors.show(matrix.shape)}."
        )
    missing = [EVERY] * (axes - len(picks) + len(dots))
    if dots:
        picks[dots[0] : dots[0] + 1] = missing
    else:
        picks += missing
    if any(pick is None for pick in picks):
        raise errors.ShapeError(
            "None adds an axis in front of a lazy matrix alone, A[None]; index the result."
        )
    return [_plain(pick) for pick in picks]


def _plain(pick: Any) -> Any:
    """Whole numbers of other kinds, such as numpy's or a tensor without axes, as Python's."""
    if isinstance(pick, Tensor):
        whole = pick.dim() == 0 and not (pick.is_floating_point() or pick.dtype == torch.bool)
    else:
        whole = isinstance(pick, Integral) and not isinstance(pick, bool)
    return int(pick) if whole else pick


def _batch_pick(pick: Any, size: int, axis: int) -> Any:
    if isinstance(pick, slice):
        return pick
    if isinstance(pick, int) and not isinstance(pick, bool):
        if not -size <= pick < size:
            raise IndexError(f"index {pick} is out of range: axis {axis} has size {size}.")
        return pick % size
    raise errors.ShapeError(
        f"batch entries and heads are picked by numbers and slices, not {pick!r}; index rows or "
        "columns first, then the tensor that comes back."
    )


def _is_every(pick: Any) -> bool:
    return isinstance(pick, slice) and pick == EVERY
