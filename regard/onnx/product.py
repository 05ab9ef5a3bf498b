"""The product of a matrix as operators that ONNX has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from regard import errors, grouped
from regard.features import Features
from regard.form.tiles import output_batch
from regard.mask import Causal
from regard.normalizer import Softmax
from regard.onnx.visible import visible
from regard.part import per_head
from regard.position import Position
from regard.position.base import terms
from regard.position.content import TransformerXL
from regard.position.grid import OnGrid
from regard.position.toeplitz import Toeplitz
from regard.score import Bilinear, Cosine, Dot
from regard.transposed import Transposed

if TYPE_CHECKING:
    from regard.matrix import Attention

OPSET = 23
"""The first that has `Attention`."""


def needs(matrix: Attention) -> str | None:
    """None, or the sentence why no ONNX graph has this matrix."""
    score = matrix.score
    if matrix.dropout is not None:
        return "has no dropout, which is for training; call model.eval() before exporting"
    if isinstance(score, Features) and score.recurs:
        return (
            "has no decay and no delta rule: scores that depend on the tokens between would be one "
            "node for each token"
        )
    return None


def product(factor: Any, x: Tensor, *, form: str | None = None) -> Tensor:
    """`factor @ x`, for a matrix or its transpose, in operators that ONNX has.

    It is for graphs: outside of one, products of values wider than queries have no numbers.
    Raises FormError for what has none, see `needs`.

    >>> import regard
    >>> A = regard.attention(*torch.randn(2, 1, 2, 5, 4), mask=Causal())
    >>> value = torch.randn(1, 2, 5, 4)
    >>> torch.allclose(product(A, value), A @ value, atol=1e-6)
    True
    """
    transposed = isinstance(factor, Transposed)
    matrix: Attention = factor.matrix if transposed else factor
    if form not in (None, "dense"):
        raise errors.FormError(
            f"form {form!r} was asked for, but an ONNX graph holds the textbook; leave form= out."
        )
    reason = needs(matrix)
    if reason is not None:
        raise errors.FormError(f"an ONNX graph {reason}.\n  matrix: {matrix}")
    if transposed:
        errors.check_product("x", factor.shape, x, matrix.query, 1)
    else:
        errors.check_product("value", matrix.shape, x, matrix.query, errors.heads_of(matrix.key))
    wide = matrix.wide()
    result = (_transposed if transposed else _product)(wide, x.to(wide.dtype))
    return result.to(x.dtype)


def decompositions() -> dict[Any, Callable[..., Any]]:
    """What `program.run_decompositions(...)` takes to lower programs of `torch.export.export`.

    Such programs hold products as the operator `regard::product`; torch.onnx.export takes what
    comes out. Exporting the module itself with torch.onnx.export needs none of this.
    """
    return {torch.ops.regard.product.default: _of_operator}


def _of_operator(
    query: Tensor, key: Tensor, x: Tensor, tensors: Sequence[Tensor], words: str, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """`regard::product` and the rows it returns beside, which only gradients read."""
    from regard.form.in_graph import read_parts
    from regard.matrix import Attention

    whole, real, transposed, _ = rest
    parts = read_parts(tensors, words, whole, real)[1:]  # all but the form that was asked for
    matrix = Attention(query, key, *parts)
    output = product(Transposed(matrix) if transposed else matrix, x)
    rows = query.new_zeros(matrix.shape[:-1], dtype=torch.promote_types(x.dtype, torch.float32))
    return output, rows, rows


def _product(matrix: Attention, value: Tensor) -> Tensor:
    query, key = matrix.rule.operands(matrix.query, matrix.key)
    bias, keep = _bias(matrix, query, key), _keep(matrix)
    score, normalizer = matrix.score, matrix.normalizer
    bare = bias is None and keep is None
    if (
        type(score) in (Dot, Bilinear, Cosine)
        and type(normalizer) is Softmax
        and normalizer.sink is None
        and (bare or getattr(score, "softcap", None) is None)
    ):
        return _operator(matrix, query, key, value, bias, keep)
    weights = _weights(matrix, query, key, bias, keep)
    return weights @ grouped.match(value, errors.heads_of(weights))


def _transposed(matrix: Attention, x: Tensor) -> Tensor:
    query, key = matrix.rule.operands(matrix.query, matrix.key)
    return _weights(matrix, query, key, _bias(matrix, query, key), _keep(matrix)).mT @ x


def _weights(
    matrix: Attention, query: Tensor, key: Tensor, bias: Tensor | None, keep: Tensor | None
) -> Tensor:
    """The textbook: weights of all pairs, [*batch, heads, n, m]."""
    i, j = _places(matrix)
    logits = matrix.score.pair(query, key, i, j).expand(matrix.shape)
    logits = logits if bias is None else logits + bias
    logits = logits if keep is None else torch.where(keep, logits, -torch.inf)
    return matrix.normalizer.whole(logits)


def _places(matrix: Attention) -> tuple[Tensor, Tensor]:
    n, m = matrix.shape[-2:]
    return torch.arange(n, device=matrix.device), torch.arange(m, device=matrix.device)


def _bias(matrix: Attention, query: Tensor, key: Tensor) -> Tensor | None:
    """What positions add to the scores, or None."""
    i, j = _places(matrix)
    found = [_bias_of(part, query, key, i, j) for part in terms(matrix.position)]
    present = [bias.to(query.dtype) for bias in found if bias is not None]
    return sum(present[1:], present[0]) if present else None


def _bias_of(part: Position, query: Tensor, key: Tensor, i: Tensor, j: Tensor) -> Tensor | None:
    """`part.on_score` where that reads no number of a tensor: a graph knows no lengths."""
    if isinstance(part, (Toeplitz, OnGrid)):
        return part.of_pairs(i[:, None], j)
    if isinstance(part, TransformerXL):
        of_query, of_key = part.channels(query, key, i, j)
        return grouped.matmul(of_query, of_key.mT)
    return part.on_score(query, key, i, j)


def _keep(matrix: Attention) -> Tensor | None:
    if matrix.mask is None:
        return None
    i, j = _places(matrix)
    return visible(matrix.mask, i[:, None], j)


def _operator(
    matrix: Attention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    keep: Tensor | None,
) -> Tensor:
    """Softmax of a dot product as the operator `Attention`."""
    if not hasattr(torch.onnx, "ops"):
        raise errors.FormError(
            f"torch {torch.__version__} has no operators of ONNX; torch 2.8 or newer is needed: "
            "pip install --upgrade torch"
        )
    batch = output_batch(matrix.shape[:-2], value)
    scale = matrix.score.scale  # type: ignore[attr-defined]
    if scale is None:
        scale = max(query.shape[-1], 1) ** -0.5
    if isinstance(scale, Tensor) or not scale > 0:  # runtimes may take its root
        query = query * (per_head(scale, query) if isinstance(scale, Tensor) else scale)
        scale = 1.0
    heads = [errors.heads_of(x) for x in (key, value)]
    shared = max(heads) if len(set(heads)) > 1 else heads[0]
    operands = [_of_four(query, batch, batch[-1] if batch else 1)]
    operands += [_of_four(x, batch, shared) for x in (key, value)]
    causal = keep is not None and bias is None and _is_plain_causal(matrix)
    added = None if causal else _added(bias, keep)
    if added is not None:  # of all rows and keys: runtimes do not broadcast these two axes
        added = added.expand(*added.shape[:-2], *matrix.shape[-2:])
        operands.append(_of_four(added, batch))
    # Cosine and Bilinear have no softcap.
    softcap = float(getattr(matrix.score, "softcap", None) or 0.0)
    output = _attention(operands, causal=causal, scale=float(scale), softcap=softcap)
    output = output.reshape(*batch, output.shape[-2], output.shape[-1])
    if added is None:
        return output
    # Whatever a runtime makes of a row that sees no key.
    sees = (added if added.dtype == torch.bool else added > -torch.inf).any(-1, keepdim=True)
    return torch.where(sees, output, 0)


def _attention(operands: Sequence[Tensor], *, causal: bool, scale: float, softcap: float) -> Tensor:
    """The operator of [batch, heads, length, width] each: query, key, value and any mask."""
    query, _, value, *_ = operands
    if _are_equal(query.shape[-1], value.shape[-1]):
        output: Tensor = torch.onnx.ops.attention(
            *operands, is_causal=causal, scale=scale, softcap=softcap
        )[0]
        return output
    # `attention` says that its output is as wide as the query, and a graph believes it.
    return torch.onnx.ops.symbolic(
        "Attention",
        operands,
        {"is_causal": int(causal), "scale": scale, "softcap": softcap},
        dtype=query.dtype,
        shape=(*query.shape[:-1], value.shape[-1]),
        version=OPSET,
    )


def _is_plain_causal(matrix: Attention) -> bool:
    """Causal() of as many queries as keys: elsewhere runtimes differ in what is_causal means.

    onnx/onnx#8068, microsoft/onnxruntime#29020
    """
    mask = matrix.mask
    return type(mask) is Causal and mask.offset == 0 and _are_equal(*matrix.shape[-2:])


def _are_equal(one: int, other: int) -> bool:
    """Whether two lengths are equal whatever they are, without fixing one that is not known."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(one == other)


def _added(bias: Tensor | None, keep: Tensor | None) -> Tensor | None:
    """What is given as attn_mask: bool, or numbers with -inf for forbidden pairs."""
    if bias is None or keep is None:
        return keep if bias is None else bias
    return torch.where(keep, bias, -torch.inf)


def _of_four(x: Tensor, batch: Sequence[int], heads: int | None = None) -> Tensor:
    """[*batch, heads, ..] as [batch, heads, ..], with `heads` heads if told, expanded as needed."""
    while x.dim() < 4:
        x = x[None]
    if heads is not None and x.shape[-3] != heads:
        x = x.repeat_interleave(heads // x.shape[-3], dim=-3)
    lead = batch[:-1]
    if len(lead) == 1 and heads is None:
        return x  # a mask broadcasts
    x = x.expand(*(lead or (1,)), *x.shape[-3:])
    return x if x.dim() == 4 else x.flatten(0, -4)
