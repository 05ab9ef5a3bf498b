"""Hugging Face's rules about who sees whom, as regard's masks: structure, never n x n.

A model describes its mask as a function of indices, `visible(batch, head, query, key)`, built by
the factories of `transformers.masking_utils`. Each factory that is known here has a mask of regard
that says the same; it is recognised by its code, and its arguments are read from its closure. Any
other function is called, block by block of rows, and its answers are kept as runs.

Whether a factory still means what it meant is asked of the installed version, on a few pairs,
before it counts as known (`learn`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial, reduce
from typing import Any, ClassVar, NamedTuple, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import masking_utils

from regard import errors
from regard.mask import Causal, Documents, Mask, Padding, Window
from regard.opaque import opaque
from regard.runs import Runs, compile_mask

if "q_offset" not in inspect.signature(masking_utils.sdpa_mask).parameters:
    raise ImportError("this version of transformers describes masks in another way")

BLOCK_PAIRS = 2**22
"""How many pairs an unknown function is asked about at once: 4 MiB of answers."""

Visible = Callable[..., Any]


class Grid(NamedTuple):
    """The pairs of a mask: query i stands at first_row + i, key j at first_column + j."""

    batch: int
    rows: int
    columns: int
    first_row: int
    first_column: int
    device: torch.device

    @property
    def offset(self) -> int:
        """Row i stands at the position of column i + offset."""
        return self.first_row - self.first_column

    @property
    def queries(self) -> Tensor:
        """The positions of the queries, [rows]."""
        return torch.arange(self.rows, device=self.device) + self.first_row

    @property
    def keys(self) -> Tensor:
        """The positions of the keys, [columns]."""
        return torch.arange(self.columns, device=self.device) + self.first_column


@dataclass(frozen=True, repr=False, eq=False)
class Structure(Mask):
    """What travels through a model in the place of an n x n mask.

    rule: the mask, or None where every query sees every key
    shape: (batch, 1, n, m), what Hugging Face expects of a mask; nothing has that size
    Its runs are found once and serve all layers (`regard.runs.compile_mask`).
    """

    rule: Mask | None
    shape: tuple[int, ...]

    ndim: ClassVar[int] = 4

    def axes(self) -> tuple[int, ...]:
        return () if self.rule is None else self.rule.axes()

    def check(self, rows: int, columns: int) -> None:
        if (rows, columns) != self.shape[-2:]:
            raise errors.ShapeError(
                f"the model made a mask for {self.shape[-2]} queries and {self.shape[-1]} keys, "
                f"but its layer attends from {rows} queries to {columns} keys."
            )
        if self.rule is not None:
            self.rule.check(rows, columns)

    def runs(self, rows: int, columns: int, device: torch.device) -> Runs:
        rule = Window(None, None) if self.rule is None else self.rule
        return compile_mask(rule, rows, columns, device)

    def __getattr__(self, name: str) -> NoReturn:
        # Only names that are not there come here: those of the tensor that a model expects.
        if name.startswith("__"):  # asked by Python itself, of objects still being made
            raise AttributeError(name)
        raise AttributeError(
            f"the mask of attn_implementation='regard' is a rule, {self!r}, not a tensor, and has "
            f"no '{name}'; a model that computes with its masks needs attn_implementation='eager'"
        )

    def __getitem__(self, index: object) -> NoReturn:
        self.__getattr__(f"[{index!r}]")

    def __repr__(self) -> str:
        return "every key" if self.rule is None else repr(self.rule)


@dataclass(frozen=True, repr=False, eq=False)
class Called(Mask):
    """The pairs for which a function of Hugging Face's kind says True, found by calling it.

    Cost: all n m pairs are asked about once, a block of rows at a time; what is kept are runs.
    """

    function: Visible
    grid: Grid
    use_vmap: bool = False

    def axes(self) -> tuple[int, ...]:
        return (self.grid.batch, 1)

    def runs(self, rows: int, columns: int, device: torch.device) -> Runs:
        grid, counts, pieces = self.grid, [], []
        step = max(1, BLOCK_PAIRS // max(grid.batch * columns, 1))
        for first in range(0, rows, step):
            block = grid._replace(
                rows=min(step, rows - first), first_row=grid.first_row + first, device=device
            )
            found = Runs.dense(answers(self.function, block, self.use_vmap))
            counts.append(found.offsets.diff().reshape(grid.batch, block.rows))
            sizes = counts[-1].sum(-1).tolist()
            pieces.append(torch.stack([found.start, found.stop]).split(sizes, -1))
        if not pieces:
            return Runs.dense(torch.zeros(*self.axes(), rows, columns, dtype=torch.bool))
        # Runs lie in the order of batch entries, then rows; blocks hold some rows of all entries.
        ordered = [piece for entry in zip(*pieces, strict=True) for piece in entry]
        start, stop = torch.cat(ordered, -1).unbind(0)
        offsets = F.pad(torch.cat(counts, -1).flatten().cumsum(0), (1, 0))
        return Runs(self.axes(), rows, columns, offsets, start, stop)

    def __repr__(self) -> str:
        name = getattr(self.function, "__qualname__", type(self.function).__name__)
        return f"Called({name.split('.<locals>')[0]})"


def answers(function: Visible, grid: Grid, use_vmap: bool = False) -> Tensor:
    """What a function says about all pairs of a grid, [batch, 1, rows, columns], by transformers.

    use_vmap: the function takes one pair at a time, and is no formula of index tensors
    """
    keep: Tensor = masking_utils.sdpa_mask(
        batch_size=grid.batch,
        q_length=grid.rows,
        kv_length=grid.columns,
        q_offset=grid.first_row,
        kv_offset=grid.first_column,
        mask_function=function,
        allow_is_causal_skip=False,
        use_vmap=use_vmap,
        device=grid.device,
    )
    return keep.expand(grid.batch, 1, grid.rows, grid.columns)


# The parameters are those that create_causal_mask and its kind name (masking_utils.py).
@opaque
def structure(
    *,
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Visible = masking_utils.causal_mask_function,
    attention_mask: Tensor | Structure | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **others: Any,
) -> Structure:
    """Make the mask of `AttentionMaskInterface`: visible where the function and the padding allow.

    attention_mask: bool [batch, tokens so far], True = a real token; later keys are none
    others: hints for other implementations, which change no number

    >>> structure(batch_size=1, q_length=2, kv_length=5, q_offset=3)
    Causal(offset=3)
    """
    if unknown := others.keys() - _HINTS:
        raise errors.RegardError(
            f"the model describes its mask by {', '.join(sorted(unknown))}, which regard does not "
            "know; attn_implementation='eager' may"
        )
    if isinstance(attention_mask, Structure):  # `generate` made it already, for a static cache
        return attention_mask
    grid = Grid(
        batch_size, q_length, kv_length, int(q_offset), int(kv_offset), torch.device(device)
    )
    with torch.inference_mode(False):  # of inference tensors no runs are kept
        rule = _both(Translator(grid, use_vmap).mask(mask_function), _padding(attention_mask, grid))
    return Structure(rule, (batch_size, 1, *grid[1:3]))


_HINTS = {"allow_is_causal_skip", "allow_is_bidirectional_skip", "config", "dtype", "local_size"}


def _padding(real: Tensor | None, grid: Grid) -> Mask | None:
    """The keys that are tokens; None if all are."""
    if real is None:
        return None
    end = grid.first_column + grid.columns
    keep = F.pad(real.bool(), (0, max(end - real.shape[-1], 0)))[:, grid.first_column : end]
    return None if bool(keep.all()) else Padding(keep)


@dataclass(frozen=True)
class Translator:
    """Finds the mask that a function describes on a grid; None: everything is visible.

    packed: numbers of the documents, [batch, n], outside of which nothing is visible anyway
    """

    grid: Grid
    use_vmap: bool = False
    packed: Tensor | None = None

    def mask(self, function: Visible) -> Mask | None:
        """Translate a function, by its meaning if it has a known one."""
        name = KNOWN.get(getattr(function, "__code__", None))
        if name is None:
            return Called(function, self.grid, self.use_vmap)
        translate: Callable[..., Mask | None] = getattr(self, f"_{name}")
        return translate(**_closure(function))

    def _causal_mask_function(self) -> Mask | None:
        offset = self.grid.offset
        return None if offset >= self.grid.columns - 1 else Causal(offset)

    def _bidirectional_mask_function(self) -> None:
        return None

    def _sliding_window_overlay(self, sliding_window: int) -> Mask | None:
        """key > query - sliding_window."""
        last = self.grid.offset + self.grid.rows - 1  # of the queries, counted in columns
        if last < sliding_window:
            return None
        return Window(sliding_window - 1, None, self.grid.offset)

    def _sliding_window_bidirectional_overlay(self, sliding_window: int) -> Mask | None:
        """|query - key| <= sliding_window."""
        return Window(sliding_window, sliding_window, self.grid.offset)

    def _chunked_overlay(self, chunk_size: int, left_padding: Tensor) -> Mask | None:
        """Query and key, counted from the first real token, are in one chunk."""
        start = left_padding.to(self.grid.device)[:, None]
        return Documents(
            (self.grid.queries - start) // chunk_size, (self.grid.keys - start) // chunk_size
        )

    def _blockwise_overlay(self, block_sequence_ids: Tensor) -> Mask | None:
        """Both are in one block; -1 is no block."""
        of_query, of_key = self._per_token(block_sequence_ids)
        return Documents(
            torch.where(of_query >= 0, of_query, -1), torch.where(of_key >= 0, of_key, -2)
        )

    def _padding_mask_function(self, padding_mask: Tensor) -> Mask | None:
        return Padding(self._at(padding_mask, self.grid.keys).bool())

    def _packed_sequence_mask_function(self, packed_sequence_mask: Tensor) -> Mask | None:
        return Documents(*self._per_token(packed_sequence_mask))

    def _remap_positions_for_packed_sequence(
        self, mask_function: Visible, position_ids: Tensor
    ) -> Mask | None:
        """The rule at positions that start again in each document.

        Inside a document positions are indices less a constant, which a rule about distances does
        not notice; outside, `packed` forbids every pair.
        """
        packed = self.packed
        if packed is not None and _is_about_distances(mask_function):
            step, change = position_ids.diff(), packed.diff()
            if bool(((change > 0) | ((change == 0) & (step == 1))).all()):
                return self.mask(mask_function)
        remap = masking_utils.remap_positions_for_packed_sequence
        return Called(remap(mask_function, position_ids), self.grid, self.use_vmap)

    def _and_masks(self, mask_functions: tuple[Visible, ...]) -> Mask | None:
        packed = [
            _closure(function)["packed_sequence_mask"]
            for function in mask_functions
            if _name(function) == "packed_sequence_mask_function"
        ]
        inside = replace(self, packed=packed[0]) if packed else self
        return reduce(_both, map(inside.mask, mask_functions))

    def _or_masks(self, mask_functions: tuple[Visible, ...]) -> Mask | None:
        return reduce(_either, map(self.mask, mask_functions))

    def _per_token(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """Of the queries [batch, rows] and of the keys [batch, columns]."""
        return self._at(numbers, self.grid.queries), self._at(numbers, self.grid.keys)

    def _at(self, numbers: Tensor, positions: Tensor) -> Tensor:
        """Those of some positions, [batch, positions]."""
        return numbers.to(self.grid.device).expand(self.grid.batch, -1)[:, positions]


def _both(one: Mask | None, other: Mask | None) -> Mask | None:
    """`one & other`, where None forbids nothing."""
    return other if one is None else one if other is None else one & other


def _either(one: Mask | None, other: Mask | None) -> Mask | None:
    return None if one is None or other is None else one | other


def _closure(function: Any) -> dict[str, Any]:
    """The outer variables that a function reads, by name."""
    cells = function.__closure__ or ()
    names = function.__code__.co_freevars
    return {name: cell.cell_contents for name, cell in zip(names, cells, strict=True)}


def _name(function: Visible) -> str | None:
    return KNOWN.get(getattr(function, "__code__", None))


DISTANCES = {
    "causal_mask_function",
    "bidirectional_mask_function",
    "sliding_window_overlay",
    "sliding_window_bidirectional_overlay",
}


def _is_about_distances(function: Visible) -> bool:
    """Whether only query - key matters."""
    if _name(function) in ("and_masks", "or_masks"):
        return all(map(_is_about_distances, _closure(function)["mask_functions"]))
    return _name(function) in DISTANCES


def samples() -> Iterator[tuple[str, Visible, Visible]]:
    """(factory, what it makes, a mask in which that occurs), for positions below 9.

    Of the factories that the installed version has. Padding is about keys, of which there are 8.
    """
    t = masking_utils
    causal = t.causal_mask_function
    document = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 2, 2], [0] * 9])
    position = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1], [*range(9)]])
    arguments: dict[str, tuple[Any, ...]] = {
        "sliding_window_overlay": (2,),
        "sliding_window_bidirectional_overlay": (1,),
        "chunked_overlay": (3, torch.tensor([0, 2])),
        "blockwise_overlay": (document - 1,),
        "padding_mask_function": (document[:, :8] != 1,),
        "packed_sequence_mask_function": (document,),
        "and_masks": (causal, t.sliding_window_overlay(2)),
        "or_masks": (causal, t.padding_mask_function(document == 1)),
    }
    yield "causal_mask_function", causal, causal
    yield "bidirectional_mask_function", *[t.bidirectional_mask_function] * 2
    for name in filter(partial(hasattr, t), arguments):
        made = getattr(t, name)(*arguments[name])
        yield name, made, made
    if hasattr(t, "remap_positions_for_packed_sequence"):
        made = t.remap_positions_for_packed_sequence(causal, position)
        packed = t.and_masks(made, t.packed_sequence_mask_function(document))
        yield "remap_positions_for_packed_sequence", made, packed


KNOWN: dict[Any, str] = {}
"""The code of a function that a factory makes -> the factory's name."""


def learn() -> None:
    """Fill KNOWN with the factories that mean here what they mean in the installed version."""
    KNOWN.clear()
    grids = [Grid(*sizes, torch.device("cpu")) for sizes in ((2, 5, 7, 3, 1), (2, 7, 4, 2, 0))]
    for name, made, function in samples():
        KNOWN[made.__code__] = name
        if not all(_is_well_translated(function, grid) for grid in grids):
            del KNOWN[made.__code__]


def _is_well_translated(function: Visible, grid: Grid) -> bool:
    try:
        rule = Translator(grid).mask(function)
    except (KeyError, TypeError):  # its closure has other names
        return False
    runs = Structure(rule, (grid.batch, 1, *grid[1:3])).runs(*grid[1:3], grid.device)
    return bool((runs.keep(slice(None), slice(None)) == answers(function, grid)).all())


learn()
