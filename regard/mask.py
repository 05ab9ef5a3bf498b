"""Masks: which keys a query may attend to. True = may attend.

A mask is a value that states a rule; `&`, `|` and `~` combine masks. It becomes numbers only when
a matrix asks for its runs (`regard.runs`), for given lengths and on one device.

Row i of the matrix stands at position i + offset: queries that continue a sequence of cached keys
give the number of keys before them, which is never guessed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from regard import errors
from regard.part import Part
from regard.runs import Runs, compile_mask


class Mask(Part):
    """Base of all masks."""

    def runs(self, rows: int, columns: int, device: torch.device) -> Runs:
        """Each row's visible keys, for `rows` queries and `columns` keys."""
        raise NotImplementedError

    def axes(self) -> tuple[int, ...]:
        """The mask's own batch and head axes, which broadcast to the matrix's."""
        return ()

    def check(self, rows: int, columns: int) -> None:
        """Raise ShapeError where the mask does not fit the matrix's rows and columns."""

    def __bool__(self) -> bool:
        raise errors.DtypeError(
            f"{self!r} is a rule for many pairs, neither true nor false; combine masks with "
            "&, | and ~ instead of `and`, `or` and `not`, and compare with `is not None`."
        )

    def __and__(self, other: Mask) -> Mask:
        return And(self, _mask(other))

    def __or__(self, other: Mask) -> Mask:
        return Or(self, _mask(other))

    def __invert__(self) -> Mask:
        return Not(self)


@dataclass(frozen=True, repr=False)
class Causal(Mask):
    """Key j is visible to row i iff j <= i + offset.

    >>> Causal().runs(3, 3, torch.device("cpu")).keep(slice(0, 3), slice(0, 3)).int()
    tensor([[1, 0, 0],
            [1, 1, 0],
            [1, 1, 1]], dtype=torch.int32)
    """

    offset: int = 0

    def __post_init__(self) -> None:
        errors.check_number("Causal's offset", self.offset, whole=True)

    def runs(self, rows: int, columns: int, device: torch.device) -> Runs:
        stop = torch.arange(rows, device=device) + (self.offset + 1)
        return Runs.intervals(torch.zeros_like(stop), stop, columns)


@dataclass(frozen=True, repr=False)
class Window(Mask):
    """Key j is visible to row i iff -left <= j - (i + offset) <= right: the token and neighbours.

    left, right: counts of neighbours, the token itself always included; None for no limit.
    `Causal() & Window(256, 0)` is a causal window of 257 keys.
    Beltagy, Peters, Cohan 2020, arXiv:2004.05150, section 3.1.

    >>> Window(1, 0).runs(3, 3, torch.device("cpu")).keep(slice(0, 3), slice(0, 3)).int()
    tensor([[1, 0, 0],
            [1, 1, 0],
            [0, 1, 1]], dtype=torch.int32)
    """

    left: int | None
    right: int | None
    offset: int = 0

    def __post_init__(self) -> None:
        errors.check_number("Window's offset", self.offset, whole=True)
        for name, side in (("left", self.left), ("right", self.right)):
            if side is not None:  # it counts neighbours; `offset` moves the window
                errors.check_number(f"Window's {name}", side, whole=True, least=0)

    def runs(self, rows: int, columns: int, device: torch.device) -> Runs:
        at = torch.arange(rows, device=device) + self.offset
        start = torch.zeros_like(at) if self.left is None else at - self.left
        stop = torch.full_like(at, columns) if self.right is None else at + self.right + 1
        return Runs.intervals(start, stop, columns)


@dataclass(frozen=True, repr=False, eq=False)
class Prefix(Mask):
    """The first `length` keys are visible to every row. `Causal() | Prefix(n)` is a prefix LM.

    length: a number, or integers [*batch]
    Raffel et al. 2020 (T5), arXiv:1910.10683, section 3.2.1.

    >>> mask = Causal() | Prefix(2)
    >>> mask.runs(3, 3, torch.device("cpu")).keep(slice(0, 3), slice(0, 3)).int()
    tensor([[1, 1, 0],
            [1, 1, 0],
            [1, 1, 1]], dtype=torch.int32)
    """

    length: int | Tensor

    def __post_init__(self) -> None:
        if isinstance(self.length, Tensor):
            errors.check_integers("Prefix's length", self.length)
        else:
            errors.check_number("Prefix's length", self.length, whole=True, least=0)

    def axes(self) -> tuple[int, ...]:
        return tuple(_add_heads(torch.as_tensor(self.length)).shape)

    def runs(self, rows: int, columns: int, device: torch.device) -> Runs:
        length = _add_heads(torch.as_tensor(self.length, device=device))
        stop = length[..., None].expand(*length.shape, rows)
        return Runs.intervals(torch.zeros_like(stop), stop, columns)


@dataclass(frozen=True, repr=False, eq=False)
class Padding(Mask):
    """Keys that are real; the others are visible to no row.

    Real keys in several pieces are exact, too, but each piece is a run of every row.

    keep: bool [*batch, m], True = a real token (the head axis is added)
    Raises DtypeError unless bool, ShapeError where m is not the key length.

    >>> Padding(torch.tensor([True, True, False]))
    Padding(tensor(3))
    """

    keep: Tensor

    def __post_init__(self) -> None:
        errors.check_bool("Padding", self.keep)

    @staticmethod
    def of_lengths(lengths: Tensor, columns: int) -> Padding:
        """Sequences of the given lengths [*batch], padded at the end to `columns` keys.

        >>> Padding.of_lengths(torch.tensor([1, 3]), 3).keep.int()
        tensor([[1, 0, 0],
                [1, 1, 1]], dtype=torch.int32)
        """
        errors.check_integers("lengths", lengths)
        errors.check_number("Padding.of_lengths' columns", columns, whole=True, least=0)
        if torch.compiler.is_compiling():  # a graph checks where it runs
            fits = ((lengths >= 0) & (lengths <= columns)).all()
            torch._assert_async(fits, f"sequences padded to {columns} keys have 0 to {columns}.")
        elif lengths.numel() and not 0 <= int(lengths.min()) <= int(lengths.max()) <= columns:
            raise errors.ShapeError(
                f"lengths are between {int(lengths.min())} and {int(lengths.max())}, but sequences "
                f"padded to {columns} keys have 0 to {columns} real ones."
            )
        return Padding(torch.arange(columns, device=lengths.device) < lengths[..., None])

    def axes(self) -> tuple[int, ...]:
        return tuple(_add_heads(self.keep, 1).shape[:-1])

    def check(self, rows: int, columns: int) -> None:
        errors.check_length("Padding", self.keep, columns, "keys")

    def runs(self, rows: int, columns: int, device: torch.device) -> Runs:
        return Runs.dense(_add_heads(self.keep, 1)[..., None, :]).repeat(rows)


@dataclass(frozen=True, repr=False, eq=False)
class Documents(Mask):
    """Row i sees key j iff both belong to one document: sequences packed into one.

    Documents that are not in one piece are exact, too, but cost a run per row and piece: tokens
    that alternate between two documents make n/2 runs for each of n rows. Sort them first.

    ids: integers [*batch, n], one document number per token (the head axis is added)
    key_ids: the same for keys [*batch, m]; default: the keys are the tokens of the rows

    >>> Documents(torch.tensor([0, 0, 1])).runs(3, 3, torch.device("cpu")).counts()
    tensor([2, 2, 1])
    """

    ids: Tensor
    key_ids: Tensor | None = None

    def __post_init__(self) -> None:
        errors.check_integers("Documents", self.ids)
        if self.key_ids is not None:
            errors.check_integers("Documents' key_ids", self.key_ids)

    def axes(self) -> tuple[int, ...]:
        batch = self._batch()
        return (*batch, 1) if batch else ()

    def check(self, rows: int, columns: int) -> None:
        errors.check_length("Documents", self.ids, rows, "rows")
        if self.key_ids is None and rows != columns:
            raise errors.ShapeError(
                f"Documents(ids) of shape {errors.show(self.ids.shape)} numbers the {rows} rows, "
                f"but the matrix has {columns} keys; give theirs, too: Documents(ids, key_ids)."
            )
        errors.check_length("Documents' key_ids", self._keys(), columns, "keys")

    def _keys(self) -> Tensor:
        return self.ids if self.key_ids is None else self.key_ids

    def _batch(self) -> tuple[int, ...]:
        return tuple(torch.broadcast_shapes(self.ids.shape[:-1], self._keys().shape[:-1]))

    def runs(self, rows: int, columns: int, device: torch.device) -> Runs:
        keys, batch, shape = self._keys(), self._batch(), self.axes()
        of_row, of_key = _in_lanes(*(x.expand(*batch, -1) for x in (self.ids, keys)))
        # Segments of equal neighbours among the keys; segments of one document become neighbours.
        fresh = torch.ones_like(of_key, dtype=torch.bool)
        fresh[:, 1:] = of_key[:, 1:] != of_key[:, :-1]
        lane, start = fresh.nonzero().unbind(-1)
        stop = torch.full_like(start, columns)
        stop[:-1] = torch.where(lane[1:] == lane[:-1], start[1:], columns)
        label, order = of_key[lane, start].sort(stable=True)
        start, stop = start[order], stop[order]
        wanted = of_row.flatten().contiguous()
        first = torch.searchsorted(label, wanted)
        count = torch.searchsorted(label, wanted, right=True) - first
        shift = torch.repeat_interleave(first - (count.cumsum(0) - count), count)
        picked = torch.arange(shift.numel(), device=shift.device) + shift
        offsets = torch.cat([count.new_zeros(1), count.cumsum(0)])
        return Runs(shape, rows, columns, offsets, start[picked].int(), stop[picked].int())


@dataclass(frozen=True, repr=False, eq=False)
class Dense(Mask):
    """Any mask at all, as a bool tensor [*batch, heads, n, m] (or what broadcasts to it).

    It is stored as runs; the tensor itself is as large as the matrix, so prefer a rule.

    >>> Dense(torch.eye(3, dtype=torch.bool)).runs(3, 3, torch.device("cpu")).counts()
    tensor([1, 1, 1])
    """

    keep: Tensor

    def __post_init__(self) -> None:
        errors.check_bool("Dense", self.keep)
        if self.keep.dim() < 2:
            raise errors.ShapeError(
                f"Dense has shape {errors.show(self.keep.shape)}; it must be [*batch, heads, n, m]."
                " A mask of keys alone is Padding(keep)."
            )

    def axes(self) -> tuple[int, ...]:
        return tuple(self.keep.shape[:-2])

    def check(self, rows: int, columns: int) -> None:
        if not errors.fits(self.keep.shape[-2:], (rows, columns)):
            raise errors.ShapeError(
                f"Dense mask has shape {errors.show(self.keep.shape)}, but the matrix has {rows} "
                f"rows and {columns} columns; its last two axes must be these, or 1."
            )

    def runs(self, rows: int, columns: int, device: torch.device) -> Runs:
        keep = self.keep.expand(*self.keep.shape[:-1], columns)
        return Runs.dense(keep).repeat(rows) if keep.shape[-2] == 1 else Runs.dense(keep)


@dataclass(frozen=True, repr=False)
class _Pair(Mask):
    """Two masks as one."""

    one: Mask
    other: Mask

    def axes(self) -> tuple[int, ...]:
        one, other = self.one.axes(), self.other.axes()
        try:
            return tuple(torch.broadcast_shapes(one, other))
        except RuntimeError:
            raise errors.ShapeError(
                f"{self.one!r} has batch and head axes {errors.show(one)} and {self.other!r} has "
                f"{errors.show(other)}; they do not broadcast."
            ) from None

    def check(self, rows: int, columns: int) -> None:
        self.one.check(rows, columns)
        self.other.check(rows, columns)

    def _both(self, rows: int, columns: int, device: torch.device) -> tuple[Runs, Runs]:
        one, other = (compile_mask(x, rows, columns, device) for x in (self.one, self.other))
        return one, other


@dataclass(frozen=True, repr=False)
class And(_Pair):
    """Visible where both masks say so; written `one & other`."""

    def runs(self, rows: int, columns: int, device: torch.device) -> Runs:
        one, other = self._both(rows, columns, device)
        return one & other

    def __repr__(self) -> str:
        return f"{_bracketed(self.one, Or)} & {_bracketed(self.other, Or)}"


@dataclass(frozen=True, repr=False)
class Or(_Pair):
    """Visible where either mask says so; written `one | other`."""

    def runs(self, rows: int, columns: int, device: torch.device) -> Runs:
        one, other = self._both(rows, columns, device)
        return one | other

    def __repr__(self) -> str:
        return f"{self.one!r} | {self.other!r}"


@dataclass(frozen=True, repr=False)
class Not(Mask):
    """Visible where the mask says not; written `~mask`."""

    mask: Mask

    def axes(self) -> tuple[int, ...]:
        return self.mask.axes()

    def check(self, rows: int, columns: int) -> None:
        self.mask.check(rows, columns)

    def runs(self, rows: int, columns: int, device: torch.device) -> Runs:
        return ~compile_mask(self.mask, rows, columns, device)

    def __repr__(self) -> str:
        return f"~{_bracketed(self.mask, (And, Or))}"


@dataclass(frozen=True, repr=False, eq=False)
class Compiled(Mask):
    """A mask that already is runs: what is left of a mask after `A[batch, head]`."""

    compiled: Runs
    name: str

    def axes(self) -> tuple[int, ...]:
        return self.compiled.batch

    def runs(self, rows: int, columns: int, device: torch.device) -> Runs:
        return self.compiled

    def __repr__(self) -> str:
        return self.name


def _mask(other: object) -> Mask:
    if not isinstance(other, Mask):
        raise errors.DtypeError(
            f"masks combine with masks, not with {type(other).__name__}; a bool tensor "
            "[*batch, heads, n, m] is Dense(tensor), one of keys alone Padding(tensor)."
        )
    return other


def _bracketed(mask: Mask, kinds: type[Mask] | tuple[type[Mask], ...]) -> str:
    return f"({mask!r})" if isinstance(mask, kinds) else repr(mask)


def _add_heads(tensor: Tensor, trailing: int = 0) -> Tensor:
    """[*batch, *trailing] -> [*batch, 1, *trailing]; without batch axes there is nothing to add."""
    return tensor.unsqueeze(-1 - trailing) if tensor.dim() > trailing else tensor


def _in_lanes(rows: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Document numbers as [lanes, length] each, that differ between batch entries as well."""
    lanes, length = rows.shape[:-1].numel(), rows.shape[-1] + keys.shape[-1]
    both = torch.cat([rows, keys], -1).reshape(lanes, length)
    if both.numel():
        both = both.unique(return_inverse=True)[1]
        both = both + torch.arange(len(both), device=both.device)[:, None] * (both.max() + 1)
    of_row, of_key = both.split([rows.shape[-1], keys.shape[-1]], -1)
    return of_row, of_key
