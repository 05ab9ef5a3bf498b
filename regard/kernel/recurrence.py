"""Recurrences on CPU tensors by the compiled kernels: csrc/chunk.h, csrc/delta.h, their gradients.

Which tensors may come here, and what their gradients are summed over, is written in
`regard.form.scan`.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from regard.errors import common_shape
from regard.kernel import extension
from regard.kernel.cpu import KINDS, rows_of_a_tile

PIECE_CHUNKS = 16
"""Chunks from which a piece of a lane is worth a thread of its own; two cores."""


WIDEST_PANEL = 32
"""Columns of values that one instruction set takes together, at most."""
OF_COLUMNS = ("value", "state")
"""What has columns of values, and so no gradients to be added up where these are cut."""


class Inputs(NamedTuple):
    """What a recurrence reads, [*lanes, ., .] in one dtype; lanes broadcast."""

    query: Tensor | None  # n x d; None where the state alone is wanted
    key: Tensor  # n x d
    value: Tensor  # n x e
    log_decay: Tensor | None  # n or 1 x 1 or d
    read: Tensor | None  # n x d, as the next: what is erased, see `regard.form.chunks`
    write: Tensor | None
    state: Tensor  # d x e, or d x (e + 1) with the sums of keys

    @property
    def sums_apart(self) -> bool:
        """Whether no sums divide and no features are made in the kernel: csrc/delta.h."""
        decay = self.log_decay
        return self.read is not None or (decay is not None and decay.shape[-1] > 1)

    def lanes(self) -> tuple[int, ...]:
        """Batch and head axes of the output."""
        return common_shape([x.shape[:-2] for x in self if x is not None])


class How(NamedTuple):
    """What is done with them.

    eps: outputs are divided by the sum of their weights and eps, and 0 where that is; None: by 1
    elu: query and key stand for their features elu(x) + 1
    """

    eps: float | None
    elu: bool = False


class Results(NamedTuple):
    """Outputs, the state after all tokens, and what the backward pass reads."""

    output: Tensor  # [*lanes, n, e]; without a query [0]
    after: Tensor  # of the state's shape
    total: Tensor  # what outputs are divided by, [*lanes, n]; [0] where by nothing
    kept: Tensor  # the state before each chunk, or [0]


def recur(inputs: Inputs, how: How, *, keep: bool) -> Results:
    """One recurrence from a state on; with `keep`, states are kept for `recur_grad`."""
    inputs = Inputs(*map(_in_line, inputs))
    value, lanes = inputs.value, inputs.lanes()
    n, nothing = value.shape[-2], value.new_empty(0)
    results = Results(
        nothing if inputs.query is None else value.new_empty((*lanes, n, value.shape[-1])),
        torch.empty_like(inputs.state, memory_format=torch.contiguous_format),
        nothing if inputs.query is None or how.eps is None else value.new_empty((*lanes, n)),
        nothing,
    )
    output = None if inputs.query is None else results.output
    work = _Work(inputs, how, (output, results.after))
    if keep:
        results = results._replace(kept=value.new_empty(work.kept_numbers))
    work.run(results.total, results.kept)
    return results


def recur_grad(
    inputs: Inputs,
    how: How,
    results: Results,
    above: tuple[Tensor | None, Tensor | None],
    wanted: tuple[bool, ...],
) -> list[Tensor | None]:
    """Gradients of `inputs`, [*lanes, ., .] each, from those of output and state after.

    wanted: which of the inputs have one
    """
    inputs, lanes = Inputs(*map(_in_line, inputs)), inputs.lanes()
    left, after = (_in_line(x) for x in above)
    n, width = inputs.value.shape[-2:]
    shapes = [None if x is None else x.shape[-2:] for x in inputs]
    if inputs.log_decay is not None:
        shapes[3] = torch.Size([n, inputs.log_decay.shape[-1]])
    pieces = _column_pieces(inputs)
    homes: list[Tensor | None] = [
        inputs.value.new_empty((*pieces * (name not in OF_COLUMNS), *lanes, *shape))
        if want and shape
        else None
        for name, shape, want in zip(Inputs._fields, shapes, wanted, strict=True)
    ]
    if inputs.query is None:
        inputs, output = inputs._replace(query=None), None
    else:
        output = results.output
        left = results.output.new_zeros(1, 1).expand(n, width) if left is None else left
    # An axis that repeats one gradient would look like one that shares a state.
    after = None if after is None else after.contiguous()
    tensors = (output, None, _in_line(left), after, *homes)
    _Work(inputs, how, tensors).run(results.total, results.kept)
    return [
        x if x is None or name in OF_COLUMNS or not pieces else x.sum(0)
        for name, x in zip(Inputs._fields, homes, strict=True)
    ]


def state_bytes(n: int, width: int, value_width: int, size: int, *, sums_apart: bool) -> int:
    """Bytes of the states of one lane that a forward pass keeps for the backward pass.

    value_width: with the sums that divide, if there are any
    """
    padded, other = (value_width, width) if sums_apart else (width, value_width)
    return -(-n // rows_of_a_tile()) * -(-padded // 16) * 16 * other * size


class _Work:
    """A recurrence as the kernels see it: the inputs, and what else they read and write."""

    def __init__(self, inputs: Inputs, how: How, others: tuple[Tensor | None, ...]):
        kernels: Any = extension.load()
        self.recur = kernels.recur
        self.threads, lanes = torch.get_num_threads(), inputs.lanes()
        n, d, e = *inputs.key.shape[-2:], inputs.value.shape[-1]
        chunks, count = -(-n // rows_of_a_tile()), math.prod(lanes)
        # Threads without a lane of their own pay where each has some chunks to do.
        pieces = 1
        if inputs.sums_apart:
            pieces = math.prod(_column_pieces(inputs))
        elif _uneven(count, self.threads) and chunks >= PIECE_CHUNKS * self.threads:
            pieces = self.threads
        tensors = tuple(map(_place, (*inputs, *others)))
        kind = KINDS[inputs.value.dtype]
        sizes = (n, d, e, pieces)
        self.problem = kernels.Recurrence.of(lanes, sizes, kind, *how, tensors)
        state_numbers = self.problem.state_numbers()
        self.kept_numbers = count * chunks * state_numbers
        sketched = pieces > 1 and not inputs.sums_apart
        room = 2 * count * pieces * (state_numbers + 64) if sketched else 0
        self.sketch = inputs.value.new_empty(room)

    def run(self, total: Tensor, kept: Tensor) -> None:
        """Fill what is written."""
        addresses = (x.data_ptr() if x.numel() else 0 for x in (total, kept, self.sketch))
        self.recur(self.problem, *addresses, self.threads)


def _uneven(lanes: int, threads: int) -> bool:
    """Whether threads would wait for others if each took whole lanes."""
    return lanes % threads > 0 and lanes < 4 * threads


def _column_pieces(inputs: Inputs) -> tuple[int, ...]:
    """How many pieces of its columns of values a lane is cut into: (pieces,), or () for one."""
    threads, (n, e) = torch.get_num_threads(), inputs.value.shape[-2:]
    most = min(threads, -(-e // WIDEST_PANEL))
    alone = not _uneven(math.prod(inputs.lanes()), threads) or n <= rows_of_a_tile()
    return () if most == 1 or alone or not inputs.sums_apart else (most,)


def _place(tensor: Tensor | None) -> tuple[Any, ...] | None:
    return None if tensor is None else (tensor.data_ptr(), tensor.shape, tensor.stride())


def _in_line(tensor: Tensor | None) -> Any:
    """Rows that lie in one piece; an address does not say that a view is negative."""
    if tensor is None:
        return None
    tensor = tensor.resolve_neg()
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()
