"""Tiles with a running normalizer: O(n) memory, any parts, exact.

output_i = sum_j weight_ij value_j, where the normalizer takes in one tile of keys after another.
The backward pass computes each tile again instead of keeping it.
reference  regard/form/dense.py::product
work       2 n m (d + e) flops forward; 2 n m (3 d + 2 e) backward, and 2 n m (d + e) more where a
           row has several tiles (see tiled_grad.py)
memory     inputs, outputs, gradients, one statistic per row, and a few tiles
after      Milakov & Gimelshein 2018, arXiv:1805.02867; Rabe & Staats 2021, arXiv:2112.05682
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from regard import errors
from regard.form import fused
from regard.form.first_order import FirstOrder, Gradient, each
from regard.form.tiled_grad import Backward
from regard.form.tiles import Tiles, compute_dtype
from regard.normalizer import Row, Softmax
from regard.opaque import opaque

if TYPE_CHECKING:
    from regard.matrix import Attention


def needs(matrix: Attention) -> str | None:
    """Nothing: every score, position, mask and normalizer has tiles."""
    return None


def kernel(matrix: Attention) -> tuple[str, int, int]:
    """What `explain` says: the code that runs, bytes beyond inputs and outputs, side of a tile."""
    tiles = Tiles.of(matrix)
    size = compute_dtype(matrix.dtype).itemsize
    lanes, (n, m) = matrix.shape[:-2].numel(), matrix.shape[-2:]
    sides = min(tiles.side, n), m if matrix.rule.whole_rows else min(tiles.side, m)
    numbers = matrix.rule.numbers_per_pair(matrix.query.shape[-1]) + 2
    rows = lanes * matrix.shape[-2] * size
    name = "generic tiles in PyTorch, running normalizer, backward recomputes"
    return name, lanes * math.prod(sides) * numbers * size + rows, tiles.side


def product(matrix: Attention, value: Tensor) -> Tensor:
    """The matrix times value, differentiable once."""
    return _apply(matrix, value, transposed=False)[0]


def product_transposed(matrix: Attention, x: Tensor) -> Tensor:
    """The transpose of the matrix times x, differentiable once."""
    return _apply(matrix, x, transposed=True)[0]


def rows(matrix: Attention) -> Row:
    """What turns the logits of each row into weights, [*batch, n], differentiable once."""
    nothing = matrix.key.new_zeros(matrix.key.shape[-2], 0)
    return _apply(matrix, nothing, transposed=False)[1]


def logsumexp(matrix: Attention) -> Tensor:
    """log sum_j exp(logit_ij) of each row, whatever the normalizer."""
    if not isinstance(matrix.rule.normalizer, Softmax):
        matrix = matrix.with_normalizer(Softmax())
    return logsumexp_of(fused.rows(matrix) if fused.needs(matrix) is None else rows(matrix))


def logsumexp_of(row: Row) -> Tensor:
    """The same of rows that are known, under softmax."""
    empty = row.total == 0
    return torch.where(empty, -torch.inf, torch.where(empty, 1, row.total).log() + row.peak)


def _apply(matrix: Attention, x: Tensor, *, transposed: bool) -> tuple[Tensor, Row]:
    errors.check_numbers(matrix.device)
    query, key = matrix.rule.operands(matrix.query, matrix.key)
    tiles = Tiles.of(matrix)
    run: Any = _Product.apply  # torch leaves its type out
    output, peak, total = run(tiles, transposed, query, key, x, *tiles.rule.tensors())
    return output, Row(peak, total)


class _Product(FirstOrder):
    """A x or A^T x with the rows of A, as one differentiable step.

    Both are linear in x, and both are the bilinear form sum_ij left_i weight_ij right_j seen from
    one side; so one backward pass serves both, with the roles of left and right exchanged.
    """

    @staticmethod
    def forward(
        tiles: Tiles, transposed: bool, query: Tensor, key: Tensor, x: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        tiles = tiles.with_rule_on(tensors)  # as torch.func gives them to this step
        with _plain(query):
            if transposed:
                row = tiles.rows(query, key)
                output = _gather(tiles, query, key, x, row)
            else:
                output, row = tiles.product(query, key, x)
        return output, row.peak, row.total

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.tiles, ctx.transposed, *tensors = inputs
        _, peak, total = output
        ctx.save_for_backward(peak, total, *tensors)
        # log(total) + peak does not depend on the peak, which may pass for a constant.
        ctx.mark_non_differentiable(peak)
        ctx.set_materialize_grads(False)

    @staticmethod
    @opaque
    def backward(ctx: Any, *from_above: Tensor | None) -> Sequence[Tensor | None]:
        return each(_backward, ctx, from_above)


def _backward(
    ctx: Any, saved: Sequence[Tensor], *from_above: Tensor | None
) -> tuple[Tensor | None, ...]:
    _, _, _, _, x, *_ = saved
    doutput, _, dtotal = from_above
    if doutput is None:
        length = ctx.tiles.shape[-1 if ctx.transposed else -2]
        doutput = x.new_zeros(*ctx.tiles.output_batch(x), length, x.shape[-1])
    wanted = tuple(ctx.needs_input_grad[2:])
    run: Any = _Gradient.apply
    found = iter(run(ctx.tiles, ctx.transposed, wanted, doutput, dtotal, *saved))
    return None, None, *(next(found) if wants else None for wants in wanted)


class _Gradient(Gradient):
    """The gradients of a product, of those inputs from which one is wanted."""

    @staticmethod
    def forward(
        tiles: Tiles,
        transposed: bool,
        wanted: tuple[bool, ...],
        doutput: Tensor,
        dtotal: Tensor | None,
        *saved: Tensor,
    ) -> tuple[Tensor, ...]:
        peak, total, query, key, x, *tensors = saved
        tiles = tiles.with_rule_on([tensor.detach() for tensor in tensors])
        left, right = (x, doutput) if transposed else (doutput, x)
        wants_query, wants_key, wants_x, *wants_own = wanted
        with torch.no_grad(), _plain(query):
            wants_right = wants_x and not transposed
            back = Backward(
                tiles, query, key, right, (wants_query, wants_key, wants_right, *wants_own)
            )
            back.run(left, Row(peak, total), dtotal)
            dx = back.right
            if transposed and wants_x:
                dx = tiles.product(query, key, doutput)[0].sum_to_size(x.shape)
        gradients = (back.query, back.key, dx, *back.home.tensors())
        return tuple(
            gradient.to(tensor.dtype)
            for gradient, tensor, wants in zip(
                gradients, (query, key, x, *tensors), wanted, strict=True
            )
            if wants
        )


def _gather(tiles: Tiles, query: Tensor, key: Tensor, x: Tensor, row: Row) -> Tensor:
    """A^T x, [*batch, m, e], summed over the rows of tiles."""
    dtype = compute_dtype(query.dtype)
    batch = tiles.output_batch(x)
    output = x.new_zeros(*batch, tiles.shape[-1], x.shape[-1], dtype=dtype)
    for tile in tiles.walk(query, key, row):
        output[..., tile.span.columns, :] += tile.weights.mT @ x[..., tile.rows, :].to(dtype)
    return output.to(x.dtype)


def _plain(tensor: Tensor) -> Any:
    """No autocast inside: sums keep the dtype that the form chose."""
    return torch.autocast(tensor.device.type, enabled=False)
