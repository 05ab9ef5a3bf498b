"""What a state can hold of a mask: real keys up to the row's own token, in its own document."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.mask import And, Causal, Mask
from regard.runs import Runs

if TYPE_CHECKING:
    from regard.matrix import Attention


class Past(NamedTuple):
    """Row i sees the kept keys j <= i + offset since the last token that begins anew.

    offset: None where every row sees all kept keys
    begins: bool [*batch, n], the rows whose token begins anew; None if none does
    keep: bool [*batch, m], the keys that any row sees; None if all are
    """

    offset: int | None
    begins: Tensor | None = None
    keep: Tensor | None = None


def past(matrix: Attention, offset: int | None, *, implied: bool) -> Past | None:
    """The past of a matrix, or None where its mask is of another kind.

    offset: token of the first query, if the score says it
    implied: whether the score itself hides the keys after that token
    """
    mask, (n, m) = matrix.mask, matrix.shape[-2:]
    if mask is None:
        return Past(offset if implied else None)
    if type(mask) is Causal and offset in (None, mask.offset):
        return Past(mask.offset)
    runs = matrix.runs
    assert runs is not None
    if offset is not None and implied:
        runs = runs & Causal(offset).runs(n, m, runs.start.device)
    tried = [_causal_offset(mask), 0, m - n] if offset is None else [offset]
    for each in dict.fromkeys(tried):
        found = None if each is None else _since(runs, each)
        if found is not None:
            return found
    keep = _seen(runs)
    alike = bool((runs.counts() == keep.sum(-1, keepdim=True)).all())
    return Past(None, None, _unless_all(keep)) if alike else None


def _causal_offset(mask: Mask) -> int | None:
    if isinstance(mask, Causal):
        return mask.offset
    if isinstance(mask, And):
        one = _causal_offset(mask.one)
        return _causal_offset(mask.other) if one is None else one
    return None


def _since(runs: Runs, offset: int) -> Past | None:
    """The rows' documents, if each row sees all kept keys of its document up to its token."""
    counts, keep = runs.counts(), _seen(runs)
    some = (counts > 0).flatten()
    ends = torch.arange(runs.rows, device=counts.device) + offset + 1
    # A row that sees nothing begins anew after its token.
    first = ends.clamp(min=0).expand(counts.shape).flatten().clone()
    stop = torch.zeros_like(first)
    first[some] = runs.start[runs.offsets[:-1][some]].long()
    stop[some] = runs.stop[runs.offsets[1:][some] - 1].long()
    first, stop = first.reshape(counts.shape), stop.reshape(counts.shape)
    sums = F.pad(keep.long().cumsum(-1), (1, 0))
    upto = ends.clamp(0, runs.columns).expand(counts.shape)
    inside = sums.gather(-1, upto) - sums.gather(-1, first.clamp(max=runs.columns))
    begins = first[..., 1:] > first[..., :-1]
    fits = (inside == counts) & (stop <= ends.clamp(min=0))
    apart = ~begins | (first[..., 1:] >= ends[1:] - 1)
    ordered = first[..., 1:] >= first[..., :-1]
    if not bool(fits.all() & apart.all() & ordered.all()):
        return None
    begins = F.pad(begins, (1, 0))[..., : runs.rows]
    return Past(offset, begins if bool(begins.any()) else None, _unless_all(keep))


def _seen(runs: Runs) -> Tensor:
    return runs.reached(torch.ones(runs.rows, dtype=torch.bool, device=runs.start.device))


def _unless_all(keep: Tensor) -> Tensor | None:
    return None if bool(keep.all()) else keep
