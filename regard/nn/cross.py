"""Attention of one sequence to another, and what is kept of the other one while the first grows."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard import errors
from regard.custom import PairFunction
from regard.mask import Mask, Padding
from regard.matrix import Attention
from regard.nn.attention import Heads, check_input
from regard.normalizer import Normalizer, Softmax
from regard.score import Dot, Score


class Memory:
    """Keys and values of a sequence that others attend to: projected once, then only read.

    `CrossAttention.project` makes it. key, value: [*batch, heads, m, d]; mask: which keys are real
    """

    def __init__(self, key: Tensor, value: Tensor, mask: Padding | None = None) -> None:
        if mask is not None and not isinstance(mask, Padding):
            raise errors.FormError(
                f"what is kept of a sequence hides the same keys from every token, by Padding; "
                f"{mask!r} may differ from token to token. Give the sequence itself, and all "
                "tokens at once, with any mask."
            )
        self.key, self.value, self.mask = key, value, mask

    @property
    def length(self) -> int:
        """How many tokens can be attended to, real or not."""
        return self.key.shape[-2]

    def tensors(self) -> tuple[Tensor, ...]:
        """What is kept."""
        return (self.key, self.value)

    @property
    def bytes(self) -> int:
        """The size of what is kept."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors())

    def reorder(self, index: Tensor) -> None:
        """Go on with other batch entries, as a beam search does: entry b becomes index[b]."""
        self.key, self.value = self.key[index], self.value[index]
        if self.mask is not None and self.mask.keep.dim() > 1:
            self.mask = Padding(self.mask.keep[index])


class CrossAttention(Heads):
    """Attention of a sequence to another one, the memory.

    output = concat_h(A_h V_h) W^o,  A_h = attention(x W^q_h, memory W^k_h),  V_h = memory W^v_h

    The weights are named as in `torch.nn.MultiheadAttention`: in_proj_weight stacks W^q, W^k, W^v.
    Vaswani et al. 2017, arXiv:1706.03762, section 3.2.3.

    score, normalizer, dropout: as in `MultiHeadAttention`

    >>> layer, x, memory = CrossAttention(64, 8), torch.randn(2, 5, 64), torch.randn(2, 9, 64)
    >>> output, A = layer(x, memory)
    >>> output.shape, A.shape
    (torch.Size([2, 5, 64]), torch.Size([2, 8, 5, 9]))
    >>> kept = layer.project(memory)  # for many calls on one memory
    >>> torch.equal(layer(x, kept)[0], output), kept.bytes
    (True, 9216)
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        *,
        bias: bool = True,
        dropout: float = 0.0,
        score: Score | PairFunction = Dot(),
        normalizer: Normalizer = Softmax(),
    ) -> None:
        super().__init__(d_model, num_heads, dropout, score, None, normalizer)
        self.in_proj_weight = nn.Parameter(torch.empty(3 * d_model, d_model))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * d_model)) if bias else None
        self._make_output(bias)

    def forward(
        self, x: Tensor, memory: Tensor | Memory, *, mask: Mask | Tensor | None = None
    ) -> tuple[Tensor, Attention]:
        """Inputs [*batch, n, d_model] -> output of the same shape, matrix [*batch, heads, n, m].

        memory: [*batch, m, d_model], or what `project` made of it, with the mask that it got there
        mask: as in `regard.attention`, True = may attend
        Raises ShapeError where widths do not fit, ValueError for a second mask.
        """
        check_input("x", x, self.embed_dim)
        if isinstance(memory, Memory):
            if mask is not None:
                raise ValueError("a Memory has its own mask: give it to project(memory, mask).")
            kept, mask = memory, memory.mask
        else:
            kept = self.project(memory)
        (query,) = self._projected(x, slice(0, 1))
        mixed, matrix = self._attend(query, kept.key, kept.value, mask)
        return self.out_proj(mixed), matrix

    def project(self, memory: Tensor, mask: Padding | None = None) -> Memory:
        """Keys and values of a memory [*batch, m, d_model].

        mask: `Padding` of the memory; FormError for others, which may differ between tokens
        """
        check_input("memory", memory, self.embed_dim)
        key, value = self._projected(memory, slice(1, 3))
        return Memory(key, value, mask)

    def _projected(self, x: Tensor, which: slice) -> list[Tensor]:
        """Those of query, key and value, [*batch, heads, length, head_dim] each."""
        rows = slice(which.start * self.embed_dim, which.stop * self.embed_dim)
        bias: Any = None if self.in_proj_bias is None else self.in_proj_bias[rows]
        parts = F.linear(x, self.in_proj_weight[rows], bias).chunk(which.stop - which.start, -1)
        return [part.unflatten(-1, (self.num_heads, -1)).transpose(-3, -2) for part in parts]
