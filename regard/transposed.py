"""The transpose of an attention matrix, as lazy as the matrix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from regard import errors
from regard.opaque import Factor, opaque_unless, product_in_graph

if TYPE_CHECKING:
    from regard.matrix import Attention


@dataclass(frozen=True, eq=False, repr=False)
class Transposed(Factor):
    """The transpose of an attention matrix: rows are keys, columns are queries."""

    matrix: Attention

    @property
    def shape(self) -> torch.Size:
        """(*batch, heads, m, n)."""
        *batch, n, m = self.matrix.shape
        return torch.Size((*batch, m, n))

    @property
    def mT(self) -> Attention:
        """The matrix itself."""
        return self.matrix

    def __matmul__(self, x: Tensor) -> Tensor:
        """y_j = sum_i weight_ij x_i, differentiable."""
        return self.matmul(x)

    @opaque_unless(product_in_graph)
    def matmul(self, x: Tensor, *, form: str | None = None) -> Tensor:
        """y_j = sum_i weight_ij x_i: [*batch, heads, n, e] -> [*batch, heads, m, e].

        Raises as `Attention.matmul` does.

        >>> import regard
        >>> regard.attention(torch.zeros(3, 1), torch.zeros(2, 1)).mT.matmul(torch.ones(3, 1))
        tensor([[1.5000],
                [1.5000]])
        """
        from regard import form as forms

        errors.check_product("x", self.shape, x, self.matrix.query, 1)
        return forms.product_transposed(self.matrix, x, form)

    def dense(self, *, limit: int | None = None) -> Tensor:
        """All weights, transposed; see `Attention.dense`."""
        return (self.matrix.dense() if limit is None else self.matrix.dense(limit=limit)).mT

    def __repr__(self) -> str:
        return f"{self.matrix!r}, transposed"
