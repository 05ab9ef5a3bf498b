"""torch.nn.functional.scaled_dot_product_attention as regard computes it, and in its place."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import FunctionType
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from regard import errors
from regard.dropout import Dropout
from regard.mask import Causal, Dense
from regard.matrix import attention
from regard.position import Bias
from regard.score import Dot


# Eight parameters: they are torch's.
def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """softmax(scale query key^T + mask) value, with the arguments and the meaning of torch's.

    query: [*batch, heads, n, d]; key: [*batch, heads, m, d]; value: [*batch, heads, m, e]
    attn_mask: broadcasts to [*batch, heads, n, m]; bool, True = may attend, or float, added
    dropout_p: probability, applied to the weights whenever it is above 0
    is_causal: query i attends to keys j <= i, counted from the first, also where n is not m
    scale: default d ** -0.5
    enable_gqa: key and value may have fewer heads, each shared by a group of queries' heads
    Rows that may attend to nothing are 0. Costs O(n d) memory, also where torch's form stores
    n x m numbers: with a mask that needs a gradient, with dropout, with e other than d.
    Raises ShapeError, DtypeError, ValueError where these do not fit together.

    >>> import torch
    >>> query, key, value = torch.randn(3, 2, 4, 6, 8).unbind(0)
    >>> output = scaled_dot_product_attention(query, key, value, is_causal=True)
    >>> wanted = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    >>> torch.allclose(output, wanted, atol=1e-6)
    True
    """
    mask: Causal | Dense | None = Causal() if is_causal else None
    position = None
    if attn_mask is not None:
        if is_causal:
            raise ValueError(
                "attn_mask and is_causal=True were both given; torch takes one of them. "
                "regard.attention takes both: mask=Causal() & Dense(...)."
            )
        if not isinstance(attn_mask, Tensor):
            raise errors.DtypeError(
                f"attn_mask is a tensor, not {type(attn_mask).__name__}; parts of regard.mask are "
                "given to regard.attention(..., mask=...)."
            )
        if attn_mask.is_floating_point():
            position = Bias(attn_mask)
        else:
            mask = Dense(attn_mask)
    dropout = Dropout(dropout_p) if dropout_p else None
    score = Dot(scale=scale)
    matrix = attention(query, key, score=score, position=position, mask=mask, dropout=dropout)
    heads, key_heads = errors.heads_of(query), errors.heads_of(key)
    if heads != key_heads and 1 not in (heads, key_heads) and not enable_gqa:
        raise errors.ShapeError(
            f"query has {heads} heads and key {key_heads}; with enable_gqa=True each key head is "
            "shared by a group of query heads."
        )
    return matrix.matmul(value)


class sdpa_kernel(TorchFunctionMode):  # in lower case, as in torch.nn.attention
    """Inside the block, torch's `scaled_dot_product_attention` is regard's.

    As `torch.nn.attention.sdpa_kernel` chooses among torch's own. It reaches every caller in
    Python, in other libraries too, but not torch's own kernel of a whole encoder layer, which
    nn.TransformerEncoderLayer and nn.MultiheadAttention take in evaluation: `regard.convert.swap`
    replaces these. Only the thread that enters is affected.

    >>> import torch
    >>> query = torch.randn(1, 2, 5, 4)
    >>> with sdpa_kernel():
    ...     output = F.scaled_dot_product_attention(query, query, query)
    >>> torch.equal(output, scaled_dot_product_attention(query, query, query))
    True
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Send the one function elsewhere, and let all others pass."""
        if func is F.scaled_dot_product_attention:
            func = scaled_dot_product_attention
        elif func is F.multi_head_attention_forward:
            func = _multi_head_attention_forward
        return func(*args, **(kwargs or {}))


# Torch's function as it is, but for the name it calls: inside of it no mode is active.
_theirs = F.multi_head_attention_forward
_multi_head_attention_forward = FunctionType(
    _theirs.__code__,
    {**vars(F), "scaled_dot_product_attention": scaled_dot_product_attention},
    argdefs=_theirs.__defaults__,
)
