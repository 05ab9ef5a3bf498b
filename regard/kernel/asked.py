"""What can be asked about the weights of a matrix in one pass, and what comes of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype of a kernel's sums and statistics."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


class Asked(NamedTuple):
    """Questions, in the order of the schema of `regard::look`."""

    entropy: bool = False
    distance: bool = False
    received: bool = False
    mass: bool = False
    largest: bool = False
    k: int = 0
    side: int = 1
    offset: int = 0

    def homes(self, query: Tensor, m: int, batch: Sequence[int], chunks: int) -> Looks:
        """Memory for the answers, zeros where sums are gathered; received has a chunk axis."""
        dtype, rows = compute_dtype(query), (*batch, query.shape[-2])
        cells = (*batch, *(-(-length // self.side) for length in (rows[-1], m)))

        def empty(shape: tuple[int, ...], wanted: bool = True) -> Tensor:
            return query.new_empty(shape if wanted else 0, dtype=dtype)

        def zeros(shape: tuple[int, ...], wanted: bool) -> Tensor:
            return query.new_zeros(shape if wanted else (1, 0), dtype=dtype)

        return Looks(
            empty(rows),
            empty(rows),
            empty(rows, self.entropy),
            empty(rows, self.distance),
            empty((*rows, self.k)),
            query.new_empty((*rows, self.k), dtype=torch.int64),
            zeros((chunks, *batch, m), self.received),
            zeros(cells, self.mass),
            zeros(cells, self.largest),
        )


class Looks(NamedTuple):
    """Answers; what was not asked has no elements."""

    peak: Tensor  # what turns logits into weights, [*batch, n]
    total: Tensor
    entropy: Tensor  # [*batch, n]
    distance: Tensor
    values: Tensor  # the k largest weights of each row and their columns, [*batch, n, k]
    indices: Tensor
    received: Tensor  # sums of columns, [*batch, m]
    mass: Tensor  # sums and largest weights of cells, [*batch, n / side, m / side]
    largest: Tensor

    def gathered(self) -> Looks:
        """The same with what chunks of rows have received summed."""
        return self._replace(received=self.received.sum(0))
