"""What would run, and what it would cost, before it runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from regard import errors, form

if TYPE_CHECKING:
    from regard.matrix import Attention


@dataclass(frozen=True)
class Explanation:
    """The answer of `A.explain(value)`; print it.

    form: what `A @ value` runs; kernel: the code behind it
    pairs: visible (query, key) pairs over all batch entries and heads
    flops: of the forward product; bytes: read and written at least; memory: extra bytes at the peak
    tile: largest side of a tile; not_chosen: for each other form, why it does not run
    """

    matrix: str
    form: str
    kernel: str
    pairs: int
    pairs_in_all: int
    flops: int
    bytes: int
    memory: int
    tile: int
    not_chosen: dict[str, str]

    def __str__(self) -> str:
        share = 100 * self.pairs / self.pairs_in_all if self.pairs_in_all else 0
        lines = [
            self.matrix,
            f"  form      {self.form}: {self.kernel}",
            f"  pairs     {self.pairs:,} visible of {self.pairs_in_all:,} ({share:.3g} %)",
            f"  work      {_scaled(self.flops, 1000, 'flop')}",
            f"  traffic   {_scaled(self.bytes, 1024, 'B')} of inputs and output",
            f"  memory    {_scaled(self.memory, 1024, 'B')} beyond them, tiles of side "
            f"{self.tile} at most",
        ]
        return "\n".join(lines + [f"  not {name}: {why}" for name, why in self.not_chosen.items()])

    __repr__ = __str__


def explain(matrix: Attention, value: Tensor | None) -> Explanation:
    """See `Attention.explain`."""
    if value is not None:
        errors.check_tensor("value", value)
        errors.check_factor("value", matrix.shape, value, errors.heads_of(matrix.key))
    name = form.choose(matrix)
    lanes = matrix.shape[:-2].numel()
    out = (matrix.key if value is None else value).shape[-1]
    n = matrix.shape[-2]
    pairs_in_all = matrix.shape.numel()
    if matrix.runs is None:
        pairs = pairs_in_all
    else:
        counts = matrix.runs.counts()
        pairs = int(counts.sum()) * lanes // max(counts[..., 0].numel(), 1) if n else 0
    size = matrix.query.element_size()
    inputs = matrix.query.numel() + matrix.key.numel()
    inputs += (matrix.key if value is None else value).numel()
    module = form.FORMS[name]
    kernel, memory, tile = module.kernel(matrix)
    if hasattr(module, "flops"):  # of other work than pair by pair
        flops = module.flops(matrix, out)
    else:
        width = matrix.score.compared(matrix.query)
        flops = pairs * (matrix.score.flops_per_pair(width) + 2 * out)
    return Explanation(
        matrix=repr(matrix),
        form=name,
        kernel=kernel,
        pairs=pairs,
        pairs_in_all=pairs_in_all,
        flops=flops,
        bytes=(inputs + lanes * n * out) * size,
        memory=_memory(matrix, name, value, memory),
        tile=tile,
        not_chosen={
            other: module.needs(matrix) or _dearer(matrix, other)
            for other, module in form.FORMS.items()
            if other != name
        },
    )


def _memory(matrix: Attention, name: str, value: Tensor | None, of_kernel: int) -> int:
    """Of this value, where the form knows; else what its kernel says."""
    module = form.FORMS[name]
    if not hasattr(module, "memory"):
        return of_kernel
    return int(module.memory(matrix, matrix.key if value is None else value))


def _dearer(matrix: Attention, name: str) -> str:
    stored = _scaled(matrix.shape.numel() * matrix.query.element_size(), 1024, "B")
    if name == "dense":
        return f"it applies, but would store {stored} of weights"
    return "it applies, but is slower" + (" or less exact" if name == "convolutional" else "")


def _scaled(number: int, base: int, unit: str) -> str:
    """A number with a prefix.

    >>> _scaled(3 * 2**20, 1024, "B"), _scaled(2_500_000, 1000, "flop")
    ('3.0 MiB', '2.5 Mflop')
    """
    amount, prefix = float(number), ""
    for bigger in ("k", "M", "G", "T", "P"):
        if amount < base:
            break
        amount, prefix = amount / base, bigger
    binary = "i" if prefix and base == 1024 else ""
    prefix = prefix.upper() if base == 1024 else prefix
    digits = 0 if not prefix else 1
    return f"{amount:.{digits}f} {prefix}{binary}{unit}"
