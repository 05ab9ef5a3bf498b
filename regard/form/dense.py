"""The definition: the formulas on whole matrices, n x m in memory.

Every other form is tested equal to this one, gradients included; so clear comes before fast.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from regard import grouped
from regard.part import Index, positions

if TYPE_CHECKING:
    from regard.matrix import Attention


def needs(matrix: Attention) -> str | None:
    """Nothing: the definition always applies."""
    return None


Operands = tuple[Tensor, Tensor]


def logits(
    matrix: Attention, rows: Index, columns: Index, operands: Operands | None = None
) -> Tensor:
    """logit_ij = score(query_i, key_j) + bias_ij where visible, else -inf: [*batch, r, c].

    operands: query and key as the rule prepares them, where the caller has them already
    """
    query, key = operands or matrix.rule.operands(matrix.query, matrix.key)
    i = positions(rows, query.shape[-2], query.device)
    j = positions(columns, key.shape[-2], query.device)
    if matrix.rule.whole_rows and (isinstance(columns, Tensor) or columns != slice(None)):
        return logits(matrix, rows, slice(None), operands)[..., j]
    keep = None if matrix.runs is None else matrix.runs.keep(rows, columns)
    rule = matrix.rule.cut(rows, columns)
    tile = rule.logits(query[..., rows, :], key[..., columns, :], i, j, keep)
    return tile.expand(*matrix.shape[:-2], i.numel(), j.numel())


def weights(
    matrix: Attention, rows: Index = slice(None), operands: Operands | None = None
) -> Tensor:
    """Weights of whole rows: the normalizer of a row of logits, then dropout. [*batch, r, m]."""
    result = matrix.rule.normalizer.whole(logits(matrix, rows, slice(None), operands))
    if matrix.dropout is not None:
        i = positions(rows, matrix.shape[-2], result.device)
        j = torch.arange(matrix.shape[-1], device=result.device)
        result = result * matrix.dropout.factors(matrix.lanes, i, j, result.dtype)
    return result


def product(matrix: Attention, value: Tensor) -> Tensor:
    """output_i = sum_j weight_ij value_j."""
    result = weights(matrix)
    return result @ grouped.match(value, result.shape[-3] if result.dim() > 2 else 1)


def product_transposed(matrix: Attention, x: Tensor) -> Tensor:
    """y_j = sum_i weight_ij x_i."""
    return weights(matrix).mT @ x
