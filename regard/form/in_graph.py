"""Products as one operator, which torch.compile and torch.export keep in their graphs.

    regard::product       A x or A^T x, and the rows of A
    regard::product_grad  its gradients; the rows are not computed again

A graph holds tensors, numbers and strings. A matrix goes in as the tensors and the numbers of its
parts, and words that say what they are. The operators put the parts together again and run what
runs without a graph, so all that depends on data stays inside: the runs of a mask, the tables of
tanh, the NaNs that a mask hides. Lengths may differ from call to call: no word depends on them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from regard import errors
from regard.form import first_order, fused
from regard.form.tiles import compute_dtype, output_batch
from regard.kernel import cpu
from regard.normalizer import Row
from regard.opaque import Factor
from regard.part import Part
from regard.transposed import Transposed

if TYPE_CHECKING:
    from regard.matrix import Attention


def _kinds(base: type[Part]) -> Iterator[type[Part]]:
    for kind in base.__subclasses__():
        yield kind
        yield from _kinds(kind)


def _kind(name: str) -> type[Part] | None:
    """A part of regard by name, asked when it is needed: some modules are imported later.

    A user's own parts have no names: in another process they might stand for something else.
    """
    known = {kind.__name__: kind for kind in _kinds(Part) if kind.__module__.startswith("regard.")}
    return known.get(name)


TENSOR, WHOLE, REAL, TUPLE = "tensor", "whole", "real", "tuple"


class Words(NamedTuple):
    """Parts as a graph holds them, filled by `add`; read by `read_parts`."""

    words: list[str]
    tensors: list[Tensor]
    whole: list[int]
    real: list[float]

    def add(self, item: Any) -> None:
        """Put a part, or a field of one, at the end."""
        if isinstance(item, Part):
            self.words.append(type(item).__name__)
            for field in fields(item):  # type: ignore[arg-type]
                self.add(getattr(item, field.name))
        elif isinstance(item, tuple):
            self.words.append(f"{TUPLE}:{len(item)}")
            for entry in item:
                self.add(entry)
        elif isinstance(item, Tensor):
            self.words.append(TENSOR)
            self.tensors.append(item)
        elif item is None or isinstance(item, (bool, str)):
            self.words.append(repr(item))
        elif isinstance(item, (float, torch.SymFloat)):
            self.words.append(REAL)
            self.real.append(item)  # type: ignore[arg-type]
        else:
            self.words.append(WHOLE)
            self.whole.append(item)


def instead(factor: Factor, form: str | None) -> Callable[..., Tensor] | None:
    """The product of a graph; None if form `fused` does not run, or has parts without words."""
    matrix: Any = factor.matrix if isinstance(factor, Transposed) else factor
    if form not in (None, "fused") or fused.KERNELS is None or fused.needs(matrix) is not None:
        return None
    if not all(map(_has_words, (matrix.rule, matrix.mask, matrix.dropout))):
        return None
    return product if matrix is factor else product_transposed


def _has_words(item: Any) -> bool:
    if isinstance(item, Part):
        known = _kind(type(item).__name__) is type(item)
        return known and all(_has_words(getattr(item, field.name)) for field in fields(item))  # type: ignore[arg-type]
    if isinstance(item, tuple):
        return all(map(_has_words, item))
    return item is None or isinstance(item, _FIELDS)


_FIELDS = (Tensor, bool, str, int, float, torch.SymInt, torch.SymFloat)


def product(matrix: Attention, value: Tensor, *, form: str | None = None) -> Tensor:
    """The matrix times value, as an operator."""
    errors.check_product("value", matrix.shape, value, matrix.query, errors.heads_of(matrix.key))
    return _operator(matrix, value, form, transposed=False)


def product_transposed(transposed: Transposed, x: Tensor, *, form: str | None = None) -> Tensor:
    """The transpose of the matrix times x, as an operator."""
    errors.check_product("x", transposed.shape, x, transposed.matrix.query, 1)
    return _operator(transposed.matrix, x, form, transposed=True)


def _operator(matrix: Attention, x: Tensor, form: str | None, *, transposed: bool) -> Tensor:
    parts = Words([], [], [], [])
    for item in (form, matrix.rule, matrix.mask, matrix.dropout, matrix.given_lanes):
        parts.add(item)
    output: Tensor = torch.ops.regard.product(
        matrix.query, matrix.key, x, parts.tensors, " ".join(parts.words), parts.whole, parts.real,
        transposed, fused.wants_gradient(matrix, x),
    )[0]  # fmt: skip
    return output


def _product(
    query: Tensor, key: Tensor, x: Tensor, tensors: Sequence[Tensor], *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    from regard import form as forms

    *description, transposed, trains = rest
    with torch.no_grad():
        matrix, form = _matrix(query, key, tensors, *description)
        # As without a graph: a product that is not trained shields itself.
        shields = (transposed or trains) and not forms.all_finite(matrix, x)
        if shields or forms.choose(matrix, form) != "fused":
            output = _whole(matrix, x, form, transposed)
            row = Row(*_rows(matrix.shape[:-1], query))  # of no use to `product_grad`
        else:
            output, row = fused.with_rows(matrix, x, transposed=transposed)
    rows = [numbers.reshape(matrix.shape[:-1]) for numbers in row]
    return output.contiguous(), rows[0], rows[1]


def _whole(matrix: Attention, x: Tensor, form: str | None, transposed: bool) -> Tensor:
    """The product without rows: where something is not finite, or another form is chosen."""
    from regard import form as forms

    if transposed:
        return forms.product_transposed(matrix, x, form)
    return forms.shielded_product(forms.FORMS[forms.choose(matrix, form)], matrix, x)


def _product_fake(
    query: Tensor, key: Tensor, x: Tensor, tensors: Sequence[Tensor], *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    transposed = rest[-2]
    batch = errors.broadcast_batch(query, key)
    length = (key if transposed else query).shape[-2]
    output = x.new_empty((*output_batch(batch, x), length, x.shape[-1]))
    return output, *_rows((*batch, query.shape[-2]), query)


def _rows(shape: Sequence[int], query: Tensor) -> tuple[Tensor, Tensor]:
    dtype = compute_dtype(query.dtype)
    return query.new_empty(shape, dtype=dtype), query.new_empty(shape, dtype=dtype)


def _product_grad(
    above: Tensor, peak: Tensor, total: Tensor, query: Tensor, key: Tensor, x: Tensor,
    tensors: Sequence[Tensor], *rest: Any,
) -> list[Tensor]:  # fmt: skip
    from regard import form as forms

    *description, transposed, _, wanted = rest
    given = (query, key, x, *tensors)
    if 0 in (query.shape[-2], key.shape[-2]):
        return [torch.zeros_like(t) for t, want in zip(given, wanted, strict=True) if want]
    with torch.enable_grad():
        leaves = [t.detach().requires_grad_(want) for t, want in zip(given, wanted, strict=True)]
        query, key, x, *tensors = leaves
        matrix, form = _matrix(query, key, tensors, *description)
        if forms.all_finite(matrix, x) and forms.choose(matrix, form) == "fused":
            known = Row(peak, total)
            output = fused.with_rows(matrix, x, transposed=transposed, known=known)[0]
        else:
            output = _whole(matrix, x, form, transposed)
    learned = [leaf for leaf in leaves if leaf.requires_grad]
    found = torch.autograd.grad(output, learned, above, materialize_grads=True)
    return [gradient.contiguous() for gradient in found]


def _product_grad_fake(
    above: Tensor, peak: Tensor, total: Tensor, query: Tensor, key: Tensor, x: Tensor,
    tensors: Sequence[Tensor], *rest: Any,
) -> list[Tensor]:  # fmt: skip
    given = zip((query, key, x, *tensors), rest[-1], strict=True)
    return [tensor.new_empty(tensor.shape) for tensor, want in given if want]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    query, key, x, tensors, *ctx.rest = inputs
    _, peak, total = output
    ctx.save_for_backward(peak, total, query, key, x, *tensors)
    ctx.mark_non_differentiable(peak, total)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, above: Tensor | None, *_: None) -> tuple[Any, ...]:
    peak, total, query, key, x, *tensors = ctx.saved_tensors
    # To torch, an empty list of numbers is a list of no tensors.
    of_rest: list[Any] = [
        [] if isinstance(item, Sequence) and not len(item) else None for item in ctx.rest
    ]
    if above is None:
        return None, None, None, [None] * len(tensors), *of_rest
    first_order.check_transforms((above,))
    *operand, of_tensors = ctx.needs_input_grad[:4]
    wanted = [*operand, *of_tensors]
    with torch.no_grad():
        found = torch.ops.regard.product_grad(
            above, peak, total, query, key, x, tensors, *ctx.rest, wanted
        )
    gradients = iter(first_order.once(found, above, query, key, x, *tensors))
    homes = [next(gradients) if want else None for want in wanted]
    return *homes[:3], homes[3:], *of_rest


def _matrix(
    query: Tensor, key: Tensor, tensors: Sequence[Tensor], words: str, *numbers: Sequence[float]
) -> tuple[Attention, str | None]:
    from regard.matrix import Attention

    form, rule, mask, dropout, lanes = (
        read_parts(tensors, words, *numbers)
        if tensors
        else _read_once(words, *map(tuple, numbers))  # the same parts, so the same runs of masks
    )
    return Attention(query, key, rule, mask, dropout, lanes), form


def read_parts(tensors: Sequence[Tensor], words: str, *numbers: Sequence[float]) -> list[Any]:
    """What has been put into words."""
    left = iter(words.split())
    sources: dict[str, Iterator[Any]] = {
        name: iter(source)
        for name, source in zip((TENSOR, WHOLE, REAL), (tensors, *numbers), strict=True)
    }

    def item(word: str) -> Any:
        if word in sources:
            return next(sources[word])
        if word.startswith(TUPLE):
            return tuple(item(next(left)) for _ in range(int(word.partition(":")[2])))
        if word in _CONSTANTS:
            return _CONSTANTS[word]
        if word.startswith("'"):
            return word.strip("'")
        kind = _kind(word)
        if kind is None:
            raise errors.FormError(
                f"this graph was made with a part {word}, which is not loaded; import the module "
                "of regard that has it, such as regard.hf, before the graph runs."
            )
        return kind(*[item(next(left)) for _ in fields(kind)])  # type: ignore[arg-type]

    return [item(word) for word in left]


_CONSTANTS = {"None": None, "True": True, "False": False}


@lru_cache(maxsize=64)
def _read_once(words: str, *numbers: Sequence[float]) -> list[Any]:
    return read_parts((), words, *numbers)


_MATRIX = "Tensor query, Tensor key, Tensor x, Tensor[] tensors, str words, SymInt[] whole, "
_REST = "float[] real, bool transposed, bool trains"
cpu.library.define(f"product({_MATRIX}{_REST}) -> (Tensor, Tensor, Tensor)")
cpu.library.define(
    f"product_grad(Tensor above, Tensor peak, Tensor total, {_MATRIX}{_REST}, bool[] wanted) "
    "-> Tensor[]"
)
cpu.library.impl("product", _product, "CPU")
cpu.library.impl("product_grad", _product_grad, "CPU")
torch.library.register_fake("regard::product", _product_fake, lib=cpu.library)
torch.library.register_fake("regard::product_grad", _product_grad_fake, lib=cpu.library)
torch.library.register_autograd("regard::product", _backward, setup_context=_setup, lib=cpu.library)
