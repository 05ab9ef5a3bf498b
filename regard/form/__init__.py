"""Forms: ways to compute the same numbers.

`dense` is the definition; every other form is a faster way to it. A form module has
`needs(matrix)`, None or the sentence why it does not apply, and `product(matrix, value)` and
`product_transposed(matrix, x)`.
Choice, `explain` and the error message all come from `needs`.
"""

from __future__ import annotations

import math
from dataclasses import replace
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from regard import errors, grouped
from regard.form import convolutional, dense, fused, recurrent, tiled

if TYPE_CHECKING:
    from regard.matrix import Attention

is_plain, product_plain = fused.is_plain, fused.product_plain

FORMS: dict[str, ModuleType] = {
    "convolutional": convolutional,
    "recurrent": recurrent,
    "fused": fused,
    "tiled": tiled,
    "dense": dense,
}
"""All forms, the cheapest first."""


def choose(matrix: Attention, name: str | None = None) -> str:
    """The form that runs: the one asked for, or the cheapest that applies; FormError otherwise."""
    if name is None:
        return next(
            form
            for form, module in FORMS.items()
            if module.needs(matrix) is None and pays(form, matrix)
        )
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


def pays(name: str, matrix: Attention) -> bool:
    """Whether a form that applies is worth choosing; most always are, in the order of FORMS."""
    module = FORMS[name]
    return not hasattr(module, "pays") or bool(module.pays(matrix))


def applying(matrix: Attention) -> list[str]:
    """The names of the forms that can compute this matrix exactly."""
    return [name for name, module in FORMS.items() if module.needs(matrix) is None]


def product(matrix: Attention, value: Tensor, name: str | None) -> Tensor:
    """The matrix times value, in the form named or chosen."""
    module = FORMS[choose(matrix, name)]
    output: Tensor
    if matrix.runs is None or shields_itself(module, matrix, value):
        output = module.product(matrix, value)
        return output
    return shielded_product(module, matrix, value)


def shielded_product(module: ModuleType, matrix: Attention, value: Tensor) -> Tensor:
    """The matrix times value, where NaN and infinity reach the rows that see them and no others."""
    if all_finite(matrix, value):
        output: Tensor = module.product(matrix, value)
        return output
    bad = _bad(value)
    matrix, poisoned = shield(matrix, bad)
    if poisoned is None:
        output = module.product(matrix, value)
        return output
    output = module.product(matrix, value.masked_fill(bad[..., None], 0))
    return torch.where(poisoned[..., None], torch.nan, output)


def product_transposed(matrix: Attention, x: Tensor, name: str | None) -> Tensor:
    """The transpose of the matrix times x, in the form named or chosen."""
    module = FORMS[choose(matrix, name)]
    runs = matrix.runs
    if runs is not None and not all_finite(matrix, x):
        matrix, poisoned = shield(matrix, torch.zeros((), dtype=torch.bool, device=x.device))
        bad = _bad(x) if poisoned is None else _bad(x) | poisoned
        if errors.is_mapped(bad) or bool(bad.any()):
            clean = torch.where(bad[..., None], 0, x)
            output: Tensor = module.product_transposed(matrix, clean)
            return torch.where(runs.reached(bad)[..., None], torch.nan, output)
    output = module.product_transposed(matrix, x)
    return output


def shield(matrix: Attention, bad_value: Tensor) -> tuple[Attention, Tensor | None]:
    """Keep NaN and infinity away from the rows that may not see them.

    0 * NaN is NaN, so in a matrix product a forbidden key would still spoil every row. Queries and
    keys that are not finite are set to 0, and the rows that see one are marked, [*batch, n]: their
    output is NaN. None if there are none, or without a mask, under which every row sees all keys.
    bad_value: which values are not finite, [*batch, m]
    """
    if matrix.runs is None:
        return matrix, None
    bad_query, bad_key = _bad(matrix.query), _bad(matrix.key)
    found = bad_query.any() | bad_key.any() | bad_value.any()
    if not errors.is_mapped(found) and not bool(found):
        return matrix, None
    poisoned = bad_query & (matrix.runs.counts() > 0)
    for bad in (bad_key, bad_value.expand(*bad_value.shape[:-1], matrix.shape[-1])):
        heads = grouped.match(bad[..., None], matrix.shape[-3] if len(matrix.shape) > 2 else 1)
        poisoned = poisoned | matrix.runs.meets(heads[..., 0])
    clean = replace(
        matrix,
        query=matrix.query.masked_fill(bad_query[..., None], 0),
        key=matrix.key.masked_fill(bad_key[..., None], 0),
    )
    return clean, poisoned


def shields_itself(module: ModuleType, matrix: Attention, value: Tensor) -> bool:
    """The compiled forward pass looks at values as it reads them; its backward pass does not."""
    return module is fused and not fused.wants_gradient(matrix, value)


def all_finite(matrix: Attention, x: Tensor) -> bool:
    """Whether there is nothing to shield: no mask, or no NaN and no infinity.

    Sums of finite numbers may overflow and say False, as torch.vmap does, which tells no numbers.
    """
    if matrix.runs is None:
        return True
    vectors = (matrix.query, matrix.key, x)
    if any(map(errors.is_mapped, vectors)):
        return False
    return all(math.isfinite(tensor.detach().sum(dtype=_wide(tensor))) for tensor in vectors)


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _bad(vectors: Tensor) -> Tensor:
    return ~vectors.isfinite().all(-1)
