"""The one representation of every mask: each row's visible keys as sorted [start, stop) runs.

Stored in CSR form: the runs of row r are start[offsets[r]:offsets[r + 1]] and stop[the same]. A
causal or windowed mask has one run per row, so a million rows cost megabytes. From the runs come
the tiles to skip, the tiles that need no test, and the bool tile for the rest.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from regard.part import Index, Part, narrow, positions

if TYPE_CHECKING:
    from regard.mask import Mask


class Span(NamedTuple):
    """A block of columns that some row of a block sees; `full`: every row sees all of it."""

    columns: slice
    full: bool


@dataclass(frozen=True, eq=False)
class Runs:
    """Visible keys of [*batch, rows] over `columns` keys; row (b, i) is stored at b * rows + i.

    batch: the mask's own batch axes, which broadcast against the matrix's
    offsets [batch * rows + 1] int64; start, stop [runs] int32 or int64
    Runs of a row are sorted, not empty, and do not touch.
    """

    batch: tuple[int, ...]
    rows: int
    columns: int
    offsets: Tensor
    start: Tensor
    stop: Tensor

    @staticmethod
    def intervals(start: Tensor, stop: Tensor, columns: int) -> Runs:
        """One run per row, [*batch, rows] each, clipped to the columns; empty where start >= stop.

        >>> runs = Runs.intervals(torch.tensor([0, 0, 2]), torch.tensor([1, 0, 9]), 4)
        >>> runs.keep(slice(0, 3), slice(0, 4)).int()
        tensor([[1, 0, 0, 0],
                [0, 0, 0, 0],
                [0, 0, 1, 1]], dtype=torch.int32)
        """
        batch, rows = tuple(start.shape[:-1]), start.shape[-1]
        start, stop = start.clamp(0, columns).flatten(), stop.clamp(0, columns).flatten()
        some = start < stop
        return Runs(batch, rows, columns, _offsets(some), *_small(start[some], stop[some]))

    @staticmethod
    def dense(keep: Tensor) -> Runs:
        """Runs of a bool tensor [*batch, rows, columns].

        >>> runs = Runs.dense(torch.tensor([[True, False, True, True]]))
        >>> runs.start, runs.stop
        (tensor([0, 2], dtype=torch.int32), tensor([1, 4], dtype=torch.int32))
        """
        rows, columns = keep.shape[-2:]
        edge = keep.new_zeros(*keep.shape[:-1], 1)
        start = keep & ~torch.cat([edge, keep[..., :-1]], -1)
        stop = keep & ~torch.cat([keep[..., 1:], edge], -1)
        first, last = start.nonzero()[:, -1], stop.nonzero()[:, -1] + 1
        batch = tuple(keep.shape[:-2])
        return Runs(batch, rows, columns, _offsets(start.sum(-1)), *_small(first, last))

    @cached_property
    def simple(self) -> bool:
        """Whether no row has more than one run."""
        return self.start.numel() == 0 or int(self.offsets.diff().max()) <= 1

    def counts(self) -> Tensor:
        """How many keys each row sees, [*batch, rows]."""
        return self._row_sums(self.stop.long() - self.start).reshape(*self.batch, self.rows)

    def meets(self, marked: Tensor) -> Tensor:
        """Which rows see a marked key: bool [*batch', columns] -> bool [*broadcast batch, rows]."""
        batch = torch.broadcast_shapes(self.batch, marked.shape[:-1])
        runs = self.expand(tuple(batch))
        sums = torch.nn.functional.pad(marked.expand(*batch, -1).cumsum(-1), (1, 0))
        first = (runs._owner() // max(self.rows, 1)) * (self.columns + 1)
        inside = sums.flatten()[first + runs.stop] - sums.flatten()[first + runs.start]
        return (runs._row_sums(inside) > 0).reshape(*batch, self.rows)

    def reached(self, marked: Tensor) -> Tensor:
        """Which keys a marked row sees: bool [*batch', rows] -> [*broadcast batch, columns]."""
        batch = tuple(torch.broadcast_shapes(self.batch, marked.shape[:-1]))
        runs = self.expand(batch)
        owner = runs._owner()
        lane = owner // max(self.rows, 1)
        step = marked.expand(*batch, -1).flatten()[owner].long()
        steps = step.new_zeros(math.prod(batch), self.columns + 1)
        steps.index_put_((lane, runs.start.long()), step, accumulate=True)
        steps.index_put_((lane, runs.stop.long()), -step, accumulate=True)
        return (steps.cumsum(-1)[:, :-1] > 0).reshape(*batch, self.columns)

    def repeat(self, rows: int) -> Runs:
        """The same keys for `rows` rows, of a mask with one row."""
        lines = Runs((*self.batch, 1), 1, self.columns, self.offsets, self.start, self.stop)
        wide = lines.expand((*self.batch, rows))
        return Runs(self.batch, rows, self.columns, wide.offsets, wide.start, wide.stop)

    @cached_property
    def reach(self) -> int:
        """How many keys a row sees on average."""
        seen = int((self.stop.long() - self.start).sum())
        return seen // max(self._count, 1)

    def keep(self, rows: Index, columns: Index) -> Tensor:
        """Whether each pair of a tile is visible: bool [*batch, r, c]."""
        at = self._lines(rows)  # [lanes, r] rows of the CSR form
        j = positions(columns, self.columns, at.device)
        if self.simple:
            first, some = self.offsets[at], self.offsets[at + 1] > self.offsets[at]
            if self.start.numel() == 0:
                keep = some[..., None].expand(*at.shape, j.numel())
            else:
                first = first.clamp(max=self.start.numel() - 1)
                stop = torch.where(some, self.stop[first], 0)[..., None]
                keep = (j >= self.start[first][..., None]) & (j < stop)
        else:
            keep = self._step(at, j)
        return keep.reshape(*self.batch, at.shape[-1], j.numel())

    def _step(self, at: Tensor, j: Tensor) -> Tensor:
        """Sum +1 at each start and -1 at each stop along a line, from first column to last."""
        if j.numel() == 0:
            return at.new_zeros(*at.shape, 0, dtype=torch.bool)
        low, width = int(j.min()), int(j.max()) + 1 - int(j.min())
        begin, count = (
            self.offsets[at].flatten(),
            (self.offsets[at + 1] - self.offsets[at]).flatten(),
        )
        line = torch.repeat_interleave(torch.arange(at.numel(), device=at.device), count)
        skipped = count.cumsum(0) - count
        runs = torch.arange(line.numel(), device=at.device) + (begin - skipped)[line]
        steps = torch.zeros(at.numel(), width + 1, dtype=torch.int32, device=at.device)
        one = torch.ones(1, dtype=torch.int32, device=at.device).expand(line.numel())
        for edge, sign in ((self.start, one), (self.stop, -one)):
            steps.index_put_(
                (line, (edge[runs].long() - low).clamp(0, width)), sign, accumulate=True
            )
        return (steps.cumsum(-1)[:, j - low] > 0).reshape(*at.shape, j.numel())

    def spans(self, rows: slice, width: int) -> list[Span]:
        """The blocks of `width` columns that the block of rows sees, in order; empty ones left out.

        Costs the block's runs plus the range of columns that they reach.
        """
        pieces = self._pieces(rows) or [slice(0, 0)]
        start = torch.cat([self.start[piece] for piece in pieces]).long()
        stop = torch.cat([self.stop[piece] for piece in pieces]).long()
        if start.numel() == 0:
            return []
        low = int(start.min()) // width * width
        blocks = -(-(int(stop.max()) - low) // width)
        reach = blocks * width + 1
        steps = torch.bincount(start - low, minlength=reach) - torch.bincount(
            stop - low, minlength=reach
        )
        visible = steps.cumsum(0)[:-1].view(blocks, width).sum(-1).tolist()
        lines = (rows.stop - rows.start) * math.prod(self.batch)
        spans = []
        for block, pairs in enumerate(visible):
            first = low + block * width
            columns = slice(first, min(first + width, self.columns))
            if pairs:
                spans.append(Span(columns, pairs == lines * (columns.stop - columns.start)))
        return spans

    def __and__(self, other: Runs) -> Runs:
        if self.simple and other.simple:  # no sorting: a tenth of the time and of the memory
            one, two = self._interval(), other._interval()
            start, stop = torch.maximum(one[0], two[0]), torch.minimum(one[1], two[1])
            return Runs.intervals(start, stop, self.columns)
        return _combine(self, other, 2)

    def __or__(self, other: Runs) -> Runs:
        return _combine(self, other, 1)

    def __invert__(self) -> Runs:
        start, stop = self._edges()
        first = torch.arange(self._count, device=start.device) * (self.columns + 1)
        opens = torch.cat([first, stop]).sort().values
        closes = torch.cat([start, first + self.columns]).sort().values
        return self._from_edges(opens, closes)

    def expand(self, batch: tuple[int, ...]) -> Runs:
        """The same runs for larger batch axes, repeated."""
        if batch == self.batch:
            return self
        lanes = torch.arange(math.prod(self.batch), device=self.start.device)
        return self._take(lanes.reshape(self.batch).expand(batch))

    def narrow(self, batch: tuple[int, ...], index: tuple[Any, ...]) -> Runs:
        """The runs of the batch entries and heads that `index` picks of the matrix's `batch`."""
        lanes = torch.arange(math.prod(self.batch), device=self.start.device)
        return self._take(narrow(lanes.reshape(self.batch), 0, batch, index))

    def _take(self, lanes: Tensor) -> Runs:
        at = lanes.reshape(-1, 1) * self.rows + torch.arange(self.rows, device=lanes.device)
        begin, count = (
            self.offsets[at].flatten(),
            (self.offsets[at + 1] - self.offsets[at]).flatten(),
        )
        skipped = count.cumsum(0) - count
        shift = torch.repeat_interleave(begin - skipped, count)
        runs = torch.arange(shift.numel(), device=lanes.device) + shift
        return Runs(
            tuple(lanes.shape), self.rows, self.columns, _offsets(count), self.start[runs],
            self.stop[runs],
        )  # fmt: skip

    @property
    def _count(self) -> int:
        return math.prod(self.batch) * self.rows

    def _interval(self) -> tuple[Tensor, Tensor]:
        """Start and stop of each row's only run, [*batch, rows] each; 0 and 0 without one."""
        some = self.offsets.diff() > 0
        edges = []
        for edge in (self.start, self.stop):
            whole = edge.new_zeros(self._count)
            whole[some] = edge
            edges.append(whole.reshape(*self.batch, self.rows))
        return edges[0], edges[1]

    def _lines(self, rows: Index) -> Tensor:
        i = positions(rows, self.rows, self.start.device)
        lanes = torch.arange(math.prod(self.batch), device=i.device)
        return lanes[:, None] * self.rows + i

    def _pieces(self, rows: slice) -> list[slice]:
        lanes = torch.arange(math.prod(self.batch), device=self.start.device) * self.rows
        begin = self.offsets[lanes + rows.start].tolist()
        end = self.offsets[lanes + rows.stop].tolist()
        return [slice(b, e) for b, e in zip(begin, end, strict=True)]

    def _owner(self) -> Tensor:
        """The row of each run, [runs]."""
        lines = torch.arange(self._count, device=self.start.device)
        return torch.repeat_interleave(lines, self.offsets.diff())

    def _row_sums(self, numbers: Tensor) -> Tensor:
        """Sums of one number per run over the runs of each row, [batch * rows]."""
        sums = torch.nn.functional.pad(numbers.long().cumsum(0), (1, 0))
        return sums[self.offsets[1:]] - sums[self.offsets[:-1]]

    def _edges(self) -> tuple[Tensor, Tensor]:
        """Starts and stops on one line; row r begins at r * (columns + 1), so rows never touch."""
        base = self._owner() * (self.columns + 1)
        return base + self.start, base + self.stop

    def _from_edges(self, start: Tensor, stop: Tensor) -> Runs:
        some = start < stop
        start, stop = start[some], stop[some]
        row = start // (self.columns + 1)
        base = row * (self.columns + 1)
        counts = torch.bincount(row, minlength=self._count)
        return Runs(
            self.batch,
            self.rows,
            self.columns,
            _offsets(counts),
            *_small(start - base, stop - base),
        )


def compile_mask(mask: Mask, rows: int, columns: int, device: torch.device) -> Runs:
    """The runs of a mask, which are kept: of rules that compare by value, and of masks that live.

    Those of tensors are made again where torch counts that one was written to, which it does not
    for inference tensors, nor for writes through NumPy or `.data`. What is kept is no inference
    tensor, so that a matrix may be differentiated whose mask was first used in inference mode.
    """
    tensors = mask.tensors()
    if not tensors and _is_value(mask):
        return _of_rule(mask, rows, columns, device)
    if any(tensor.is_inference() for tensor in tensors):
        return mask.runs(rows, columns, device)
    found = rows, columns, device, tuple(tensor._version for tensor in tensors)
    known = _of_living.get(mask)
    if known is None or known[0] != found:
        with torch.inference_mode(False):
            known = _of_living[mask] = found, mask.runs(rows, columns, device)
    return known[1]


_of_living: WeakKeyDictionary[Mask, tuple[Any, Runs]] = WeakKeyDictionary()


def _is_value(part: Part) -> bool:
    """Whether another part may equal this one, down to its leaves: then it is worth keeping."""
    held = (getattr(part, field.name) for field in fields(part))  # type: ignore[arg-type]
    by_value = type(part).__eq__ is not object.__eq__
    return by_value and all(_is_value(item) for item in held if isinstance(item, Part))


@lru_cache(maxsize=32)
def _of_rule(mask: Mask, rows: int, columns: int, device: torch.device) -> Runs:
    with torch.inference_mode(False):
        return mask.runs(rows, columns, device)


def _combine(one: Runs, other: Runs, need: int) -> Runs:
    """Keep what at least `need` of the two masks keep, by sweeping over their sorted edges."""
    batch = tuple(torch.broadcast_shapes(one.batch, other.batch))
    one, other = one.expand(batch), other.expand(batch)
    starts, stops = zip(one._edges(), other._edges(), strict=True)
    edges = torch.cat([*starts, *stops])
    opens = torch.arange(edges.numel(), device=edges.device) < sum(s.numel() for s in starts)
    # At one place starts come before stops: touching runs then join, and what is left between a
    # stop and a start of an intersection is an empty run, which _from_edges drops.
    order = (edges * 2 + ~opens).argsort()
    edges, opens = edges[order], opens[order]
    cover = torch.where(opens, 1, -1).cumsum(0)
    return one._from_edges(edges[opens & (cover == need)], edges[~opens & (cover == need - 1)])


def _offsets(counts: Tensor) -> Tensor:
    offsets = torch.zeros(counts.numel() + 1, dtype=torch.long, device=counts.device)
    offsets[1:] = counts.flatten().cumsum(0)
    return offsets


def _small(start: Tensor, stop: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.int64 if stop.numel() and int(stop.max()) >= 2**31 else torch.int32
    return start.to(dtype), stop.to(dtype)
