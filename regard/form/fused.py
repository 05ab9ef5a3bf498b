"""Tiles in compiled kernels: the same numbers as `tiled`, at the machine's speed, on a CPU.

A matrix is translated to what the kernels know: a score by name, biases by i - j, by (i, j) or by a
band of each row, runs of visible keys. What is done once per token (projections, rotations, norms,
a learned scale, further channels for a bias that is a product) stays in PyTorch, and autograd takes
gradients from there on.
reference  regard/form/dense.py::product        kernels  csrc/attend.h, csrc/attend_grad.h
memory     inputs, outputs, gradients, two numbers per row, bands or further channels where a
           position has them, and tiles (see the kernels' headers)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from regard.form import folded, operands
from regard.form.first_order import FirstOrder, check_transforms, each, once
from regard.form.tiles import compute_dtype
from regard.kernel import cpu, extension
from regard.kernel.asked import Asked, Looks
from regard.normalizer import Row, Softmax
from regard.opaque import opaque

if TYPE_CHECKING:
    from regard.matrix import Attention

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
BATCH_AXES = 6
KERNELS = extension.load()  # here and not on each call: torch.compile cannot follow an import


def needs(matrix: Attention) -> str | None:
    """CPU tensors, the compiled extension, and parts that the kernels know."""
    return operands.needs(matrix) or _needs_tensors(matrix)


def _needs_tensors(matrix: Attention) -> str | None:
    if matrix.device.type != "cpu":
        return f"needs CPU tensors; these are on {matrix.device}."
    if matrix.dtype not in DTYPES:
        return f"has no kernels for {matrix.dtype}."
    if len(matrix.shape) - 2 > BATCH_AXES:
        return f"has at most {BATCH_AXES} batch and head axes; these are {len(matrix.shape) - 2}."
    if torch._C._are_functorch_transforms_active():
        return "does not run inside torch.func transforms."
    if forward_ad._current_level >= 0:
        return "has no forward-mode derivatives."
    return f"does not run: {extension.missing()}" if KERNELS is None else None


def kernel(matrix: Attention) -> tuple[str, int, int]:
    """What `explain` says: the code that runs, bytes beyond inputs and outputs, side of a tile."""
    size = compute_dtype(matrix.dtype).itemsize
    scratch = cpu.scratch_bytes(matrix.query.shape[-1], matrix.key.shape[-1], size)
    rows = 2 * matrix.shape[:-1].numel() * size
    name = f"compiled kernels for {cpu.instruction_set()}, running normalizer, backward recomputes"
    memory = scratch + rows + operands.bytes_made(matrix)
    return name, memory, cpu.rows_of_a_tile()


def product(matrix: Attention, value: Tensor) -> Tensor:
    """The matrix times value, differentiable once."""
    return with_rows(matrix, value)[0]


def is_plain(matrix: Attention, value: object) -> bool:
    """Whether this is softmax(scale query key^T) value and nothing else, without a gradient.

    Then one call does it, and no check can fail: of small matrices the checks cost more than the
    product.
    """
    if not matrix.rule.plain or matrix.mask is not None or matrix.dropout is not None:
        return False
    query, key = matrix.query, matrix.key
    return (
        type(value) is Tensor
        and (value.shape == key.shape or value.shape[:-1] == key.shape[:-1])
        and (key.shape == query.shape or key.shape[:-2] == query.shape[:-2])
        and value.dtype == query.dtype
        and query.stride(-1) == key.stride(-1) == value.stride(-1) == 1
        and query.is_cpu
        and value.is_cpu
        and query.dtype in cpu.KINDS
        and not (query.is_neg() or key.is_neg() or value.is_neg())
        and not wants_gradient(matrix, value)
        and query.dim() - 2 <= BATCH_AXES
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
        and KERNELS is not None
    )


def product_plain(matrix: Attention, value: Tensor) -> Tensor:
    """The product where `is_plain`."""
    query, scale = matrix.query, matrix.rule.score.scale  # type: ignore[attr-defined]
    scale = max(query.shape[-1], 1) ** -0.5 if scale is None else float(scale)
    return cpu.attend_plain(query, matrix.key, value, scale)


def product_transposed(matrix: Attention, x: Tensor) -> Tensor:
    """The transpose of the matrix times x, differentiable once."""
    return with_rows(matrix, x, transposed=True)[0]


def with_rows(
    matrix: Attention, x: Tensor, *, transposed: bool = False, known: Row | None = None
) -> tuple[Tensor, Row]:
    """A x or A^T x, and the rows of A, [*batch, n], which may have the axes of a folded matrix.

    known: those rows, if the product is needed for its gradients only and not for its numbers
    """
    few = None if transposed else folded.fold(matrix, x)
    if few is not None:
        known = known and Row(*(numbers.reshape(few.shape[:-1]) for numbers in known))
        output, row = with_rows(few, x, known=known)
        return folded.unfold(output, matrix.shape[-3]), row
    flat, extra, sizes = folded.side_by_side(x, tuple(matrix.shape[:-2]))
    output, row = _apply(matrix, flat, transposed=transposed, known=known)
    return folded.apart(output, extra, sizes), row


def rows(matrix: Attention) -> Row:
    """What turns the logits of each row into weights, [*batch, n], differentiable once."""
    return _apply(matrix, matrix.key.new_zeros(matrix.key.shape[-2], 0))[1]


def wants_gradient(matrix: Attention, value: Tensor) -> bool:
    """Whether a product will be differentiated."""
    if not torch.is_grad_enabled():
        return False
    tensors = (matrix.query, matrix.key, value, *matrix.rule.tensors())
    return any(tensor.requires_grad for tensor in tensors)


def look(matrix: Attention, asked: Asked) -> Looks:
    """All that is asked about the weights, in one pass over the scores."""
    kind, tensors = operands.tensors(matrix)
    nothing = matrix.key.new_empty(matrix.key.shape[-2], 0)
    arguments = (
        *tensors[:2],
        nothing,
        *tensors[2:],
        *operands.mask(matrix),
        *operands.numbers(matrix, kind),
    )
    return Looks(*cpu.look(*arguments, *asked))


def _apply(
    matrix: Attention, x: Tensor, *, transposed: bool = False, known: Row | None = None
) -> tuple[Tensor, Row]:
    kind, tensors = operands.tensors(matrix)
    arguments = (
        *tensors[:2],
        x,
        *tensors[2:],
        *operands.mask(matrix),
        *operands.numbers(matrix, kind),
    )
    learned = (*tensors, x)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in learned):
        run: Any = _Product.apply  # torch leaves its type out
        output, peak, total = run(known, transposed, *arguments)
    else:
        output, peak, total = _forward(transposed, *arguments)
    return output, Row(peak, total)


def _forward(transposed: bool, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    query, key, x, *rest = arguments
    if not transposed:
        return cpu.attend(query, key, x, *rest)
    heads = arguments[cpu.TENSORS][-1:]  # each head has its own sums over rows
    nothing = key.new_empty(*heads, key.shape[-2], 0)
    _, peak, total = cpu.attend(query, key, nothing, *rest)
    gradients = cpu.attend_grad(x, peak, total, None, query, key, nothing, *rest, _ONLY_VALUE)
    return gradients[2].to(x.dtype), peak, total


class _Product(FirstOrder):
    """A x or A^T x with the rows of A, as one differentiable step.

    Both are the bilinear form sum_ij left_i weight_ij right_j seen from one side, as in `tiled`.
    """

    @staticmethod
    def forward(
        known: Row | None, transposed: bool, *arguments: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        if known is None:
            return _forward(transposed, *arguments)
        query, key, x, batch = *arguments[:3], arguments[cpu.TENSORS]
        length = (key if transposed else query).shape[-2]
        output = x.new_empty((*batch, length, x.shape[-1]))  # nobody reads it
        return output, known.peak.detach(), known.total.detach()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _, ctx.transposed, *arguments = inputs
        _, peak, total = output
        ctx.save_for_backward(peak, total, *arguments[: cpu.TENSORS])
        ctx.numbers = arguments[cpu.TENSORS :]
        # log(total) + peak does not depend on the peak, which may pass for a constant.
        ctx.mark_non_differentiable(peak)
        ctx.set_materialize_grads(False)

    @staticmethod
    @opaque
    def backward(ctx: Any, *from_above: Tensor | None) -> Sequence[Tensor | None]:
        return each(_backward, ctx, from_above)


def _backward(
    ctx: Any, given: Sequence[Tensor], *from_above: Tensor | None
) -> tuple[Tensor | None, ...]:
    peak, total, *saved = given
    inputs, (query, key, x, *tensors) = saved[:LEARNED], saved
    doutput, _, dtotal = from_above
    check_transforms((doutput, dtotal))
    batch = tuple(ctx.numbers[0])
    if doutput is None:
        length = key.shape[-2] if ctx.transposed else query.shape[-2]
        doutput = x.new_zeros(*batch, length, x.shape[-1])
    left, right = (x, doutput) if ctx.transposed else (doutput, x)
    needed = ctx.needs_input_grad[2 : 2 + LEARNED]
    wants_x, wants_sink = needed[2], needed[-1]
    wanted = [*needed[:2], wants_x and not ctx.transposed, *needed[3:-1]]
    with torch.no_grad():
        arguments = (query, key, right, *tensors, *ctx.numbers)
        if any(wanted) or wants_sink:
            gradients = cpu.attend_grad(
                left, peak, total, dtotal, *arguments, _at_least_query(wanted)
            )
        else:
            gradients = [query.new_empty(0)] * LEARNED
        *found, delta = gradients
        if ctx.transposed and wants_x:
            found[2] = cpu.attend(*arguments)[0]
        sink = None
        if wants_sink:
            above = 0 if dtotal is None else dtotal * total
            (of_rows,) = Softmax(inputs[-1]).own_gradients(Row(peak, total), above - delta)
            sink = of_rows.sum(-1)
        homes = [
            _shaped(gradient, tensor, len(batch)) if wants and gradient is not None else None
            for gradient, tensor, wants in zip((*found, sink), inputs, needed, strict=True)
        ]
    depends_on = [t for t in (doutput, *inputs) if t is not None]
    return None, None, *once(homes, *depends_on), *[None] * (4 + len(ctx.numbers))


LEARNED = len(operands.Tensors._fields) + 1  # and x: what may have a gradient
_ONLY_VALUE = [name == "value" for name in cpu.Gradients._fields[:-1]]


def _at_least_query(wanted: list[bool]) -> list[bool]:
    """Delta, which a sink's gradient needs, comes with every gradient but that of value alone."""
    return [True, *wanted[1:]] if not any((*wanted[:2], *wanted[3:])) else wanted


def _shaped(gradient: Tensor, tensor: Tensor, axes: int) -> Tensor:
    """Sum a gradient over heads of a group and broadcast axes, to a tensor's shape and dtype."""
    if axes and gradient.dim() == axes + 2 and tensor.dim() > 2:
        heads, own = gradient.shape[-3], tensor.shape[-3]
        if 1 < own < heads:
            gradient = gradient.unflatten(-3, (own, heads // own)).sum(-3)
    return gradient.sum_to_size(tensor.shape).to(tensor.dtype)
