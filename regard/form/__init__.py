"""Forms: ways to compute the same numbers.

`dense` is the definition; every other form is a faster way to it. A form module has
`needs(matrix)`, None or the sentence why it does not apply, and `product(matrix, value)` and
`product_transposed(matrix, x)`.
Choice, `explain` and the error message all come from `needs`.
"""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from regard import errors, grouped
from regard.form import dense, tiled

if TYPE_CHECKING:
    from regard.matrix import Attention

FORMS: dict[str, ModuleType] = {"tiled": tiled, "dense": dense}
"""All forms, the cheapest first."""


def choose(matrix: Attention, name: str | None = None) -> str:
    """The form that runs: the one asked for, or the cheapest that applies; FormError otherwise."""
    if name is None:
        return next(form for form, module in FORMS.items() if module.needs(matrix) is None)
    if name not in FORMS:
        raise errors.FormError(
            f"there is no form {name!r}.\n  matrix: {matrix}\n"
            f"  forms that apply: {', '.join(applying(matrix))}"
        )
    reason = FORMS[name].needs(matrix)
    if reason is not None:
        raise errors.FormError(
            f"form {name!r} {reason}\n  matrix: {matrix}\n"
            f"  forms that apply: {', '.join(applying(matrix))}"
        )
    return name


def applying(matrix: Attention) -> list[str]:
    """The names of the forms that can compute this matrix exactly."""
    return [name for name, module in FORMS.items() if module.needs(matrix) is None]


def product(matrix: Attention, value: Tensor, name: str | None) -> Tensor:
    """The matrix times value, in the form named or chosen."""
    module = FORMS[choose(matrix, name)]
    matrix, value, poisoned = shield(matrix, value)
    output: Tensor = module.product(matrix, value)
    return output if poisoned is None else torch.where(poisoned[..., None], torch.nan, output)


def product_transposed(matrix: Attention, x: Tensor, name: str | None) -> Tensor:
    """The transpose of the matrix times x, in the form named or chosen."""
    output: Tensor = FORMS[choose(matrix, name)].product_transposed(matrix, x)
    return output


def shield(matrix: Attention, value: Tensor) -> tuple[Attention, Tensor, Tensor | None]:
    """Keep NaN and infinity away from the rows that may not see them.

    0 * NaN is NaN, so in a matrix product a forbidden key would still spoil every row. Numbers
    that are not finite are set to 0, and the rows that see one are marked: their output is NaN.
    """
    if matrix.runs is None:
        return matrix, value, None
    bad_query = ~matrix.query.isfinite().all(-1)
    bad_key = ~matrix.key.isfinite().all(-1)
    bad_value = ~value.isfinite().all(-1)
    if not bool(bad_query.any() | bad_key.any() | bad_value.any()):
        return matrix, value, None
    poisoned = bad_query
    for bad in (bad_key, bad_value):
        heads = grouped.match(bad[..., None], matrix.shape[-3] if len(matrix.shape) > 2 else 1)
        poisoned = poisoned | matrix.runs.meets(heads[..., 0])
    clean = replace(
        matrix,
        query=matrix.query.masked_fill(bad_query[..., None], 0),
        key=matrix.key.masked_fill(bad_key[..., None], 0),
    )
    return clean, value.masked_fill(bad_value[..., None], 0), poisoned
