"""Tiles with a running normalizer: O(n) memory, any parts, exact.

output_i = sum_j weight_ij value_j, where the normalizer takes in one tile of keys after another.
The backward pass computes each tile again instead of keeping it.
reference  regard/form/dense.py::product
work       2 n m (d + e) flops forward, 2 n m (3 d + 2 e) + 2 n m d (logits again) backward
memory     inputs, outputs, gradients, one statistic per row, and a few tiles
after      Milakov & Gimelshein 2018, arXiv:1805.02867; Rabe & Staats 2021, arXiv:2112.05682;
           Dao et al. 2022, arXiv:2205.14135, appendix B (backward)
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from regard import errors, grouped
from regard.form.tiles import Tiles, compute_dtype
from regard.normalizer import Softmax
from regard.runs import Span

if TYPE_CHECKING:
    from regard.matrix import Attention


def needs(matrix: Attention) -> str | None:
    """Nothing: every score, position, mask and normalizer has tiles."""
    return None


def product(matrix: Attention, value: Tensor) -> Tensor:
    """The matrix times value, differentiable once."""
    return _apply(matrix, value, transposed=False)[0]


def product_transposed(matrix: Attention, x: Tensor) -> Tensor:
    """The transpose of the matrix times x, differentiable once."""
    return _apply(matrix, x, transposed=True)[0]


def statistics(matrix: Attention) -> Tensor:
    """Each row's statistic, [*batch, n], differentiable once."""
    nothing = matrix.key.new_zeros(matrix.key.shape[-2], 0)
    return _apply(matrix, nothing, transposed=False)[1]


def logsumexp(matrix: Attention) -> Tensor:
    """log sum_j exp(logit_ij) of each row, whatever the normalizer."""
    if isinstance(matrix.rule.normalizer, Softmax):
        return statistics(matrix)
    return statistics(matrix.with_normalizer(Softmax()))


def _apply(matrix: Attention, x: Tensor, *, transposed: bool) -> tuple[Tensor, Tensor]:
    query, key = matrix.rule.operands(matrix.query, matrix.key)
    tiles = Tiles.of(matrix)
    result = _Product.apply(tiles, transposed, query, key, x, *tiles.rule.tensors())  # type: ignore[no-untyped-call]
    output, statistic = result
    return output, statistic


class _Product(torch.autograd.Function):
    """A x or A^T x with its rows' statistic, as one differentiable step.

    Both are linear in x, and both are the bilinear form sum_ij left_i weight_ij right_j seen from
    one side; so one backward pass serves both, with the roles of left and right exchanged.
    """

    @staticmethod
    def forward(
        ctx: Any, tiles: Tiles, transposed: bool, query: Tensor, key: Tensor, x: Tensor,
        *tensors: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        with _plain(query):
            if transposed:
                statistic = tiles.statistics(query, key)
                output = _gather(tiles, query, key, x, statistic)
            else:
                output, statistic = tiles.product(query, key, x)
        ctx.tiles, ctx.transposed = tiles, transposed
        ctx.save_for_backward(query, key, x, output, statistic, *tensors)
        ctx.set_materialize_grads(False)
        return output, statistic

    @staticmethod
    def backward(ctx: Any, *from_above: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise errors.FormError(
                "form 'tiled' has first derivatives only, and create_graph=True asks for more; "
                "multiply with A.matmul(value, form='dense') to differentiate twice."
            )
        query, key, x, output, statistic, *tensors = ctx.saved_tensors
        doutput, dstatistic = from_above
        if doutput is None:
            doutput = torch.zeros_like(output)
        rule = ctx.tiles.rule.with_tensors([tensor.detach() for tensor in tensors])
        tiles = replace(ctx.tiles, rule=rule)
        with _plain(query):
            if ctx.transposed:
                left, right = x, doutput
                along = dx = tiles.product(query, key, doutput)[0]
            else:
                left, right, along, dx = doutput, x, output, None
            dtype = statistic.dtype
            delta = (left.to(dtype) * along.to(dtype)).sum(-1)
            delta = delta.sum_to_size(statistic.shape)
            row_gradient = rule.normalizer.row_gradient(statistic, delta, dstatistic)
            back = _Backward(tiles, query, key, right, wants_right=dx is None)
            back.run(left, statistic, row_gradient)
        dx = back.right if dx is None else dx.sum_to_size(x.shape)
        gradients = (back.query, back.key, dx, *back.home.tensors())
        return (
            None,
            None,
            *(
                gradient.to(tensor.dtype) if needed else None
                for gradient, tensor, needed in zip(
                    gradients, (query, key, x, *tensors), ctx.needs_input_grad[2:], strict=True
                )
            ),
        )


class _Backward:
    """One pass over the tiles that collects every gradient of sum_ij left_i weight_ij right_j."""

    def __init__(
        self, tiles: Tiles, query: Tensor, key: Tensor, right: Tensor, *, wants_right: bool
    ) -> None:
        self.tiles = tiles
        self.dtype = compute_dtype(query.dtype)
        self.operands = query, key, right
        self.wants_right = wants_right
        self.query, self.key, self.right = (
            torch.zeros_like(x, dtype=self.dtype) for x in self.operands
        )
        # Gradients of the parts' tensors have a home that is cut to a tile like the parts are.
        self.home = tiles.rule.with_tensors(
            [torch.zeros_like(x, dtype=compute_dtype(x.dtype)) for x in tiles.rule.tensors()]
        )

    def run(self, left: Tensor, statistic: Tensor, row_gradient: Tensor) -> None:
        """Go through all tiles."""
        normalizer = self.tiles.rule.normalizer
        for rows in self.tiles.row_blocks():
            of_left = left[..., rows, :].to(self.dtype)
            for span in self.tiles.spans(rows):
                logits, leaves = self._again(rows, span)
                plain, row = logits.detach(), statistic[..., rows]
                weights = normalizer.weights(plain, row)
                drop = self.tiles.drop(rows, span.columns, self.dtype)
                of_right = self.operands[2][..., span.columns, :].to(self.dtype)
                dweights = grouped.matmul(of_left, of_right.mT)
                used = weights if drop is None else weights * drop
                if self.wants_right:
                    home = self.right[..., span.columns, :]
                    home += grouped.matmul_transposed(used, of_left, home)
                if logits.requires_grad:
                    dweights = dweights if drop is None else dweights * drop
                    dweights = dweights.sum_to_size(weights.shape)
                    dlogits = normalizer.pullback(
                        plain, weights, dweights, row, row_gradient[..., rows]
                    )
                    self._collect(logits, leaves, dlogits, rows, span.columns)
        own = normalizer.own_gradients(statistic, row_gradient)
        for home, gradient in zip(self.home.normalizer.tensors(), own, strict=True):
            home += gradient.sum(-1).sum_to_size(home.shape)

    def _again(self, rows: slice, span: Span) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The logits of a tile, computed again with a graph, and the tensors it starts from."""
        rule = self.tiles.rule.cut(rows, span.columns)
        leaves = tuple(
            tensor.detach().requires_grad_()
            for tensor in (
                self.operands[0][..., rows, :].to(self.dtype),
                self.operands[1][..., span.columns, :].to(self.dtype),
                *rule.tensors(),
            )
        )
        query, key, *tensors = leaves
        with torch.enable_grad():
            return self.tiles.logits(query, key, rows, span, rule.with_tensors(tensors)), leaves

    def _collect(
        self,
        logits: Tensor,
        leaves: tuple[Tensor, ...],
        dlogits: Tensor,
        rows: slice,
        columns: slice,
    ) -> None:
        """Add a tile's gradients where they belong."""
        homes = (
            self.query[..., rows, :],
            self.key[..., columns, :],
            *self.home.cut(rows, columns).tensors(),
        )
        gradients = torch.autograd.grad(logits, leaves, dlogits, allow_unused=True)
        for home, gradient in zip(homes, gradients, strict=True):
            if gradient is not None:
                home += gradient


def _gather(tiles: Tiles, query: Tensor, key: Tensor, x: Tensor, statistic: Tensor) -> Tensor:
    """A^T x, [*batch, m, e], summed over the rows of tiles."""
    dtype = compute_dtype(query.dtype)
    batch = tiles.output_batch(x)
    output = x.new_zeros(*batch, tiles.shape[-1], x.shape[-1], dtype=dtype)
    for tile in tiles.walk(query, key, statistic):
        output[..., tile.span.columns, :] += tile.weights.mT @ x[..., tile.rows, :].to(dtype)
    return output.to(x.dtype)


def _plain(tensor: Tensor) -> Any:
    """No autocast inside: sums keep the dtype that the form chose."""
    return torch.autocast(tensor.device.type, enabled=False)
