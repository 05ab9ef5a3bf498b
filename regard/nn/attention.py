"""Multi-head attention layers that return the output and the lazy matrix it came from."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard import errors
from regard.custom import PairFunction
from regard.dropout import Dropout
from regard.mask import Mask
from regard.matrix import Attention, attention
from regard.nn.learnable import Learnable
from regard.normalizer import Normalizer, Softmax
from regard.opaque import opaque_unless
from regard.part import Part
from regard.position import Position
from regard.score import Dot, Score


def _followed(layer: _Heads, *_: Any) -> Any:
    """What a graph can follow: every score but a function of a tile."""
    return _Heads._attend.__wrapped__ if isinstance(layer.score, Learnable) else None  # type: ignore[attr-defined]


class _Heads(nn.Module):
    """What both layers share: the parts, the matrix of projected heads, the output projection."""

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float,
        score: Score | PairFunction,
        position: Position | None,
        normalizer: Normalizer,
    ) -> None:
        super().__init__()
        if num_heads < 1 or embed_dim % num_heads:
            raise errors.ShapeError(
                f"{embed_dim} channels cannot be split into {num_heads} heads of one width; "
                "the number of channels must be a multiple of num_heads."
            )
        self.embed_dim, self.num_heads, self.head_dim = embed_dim, num_heads, embed_dim // num_heads
        Dropout(dropout, seed=0)  # raises for what is no probability
        self.dropout = dropout
        self.score = _held(score)
        self.position = _held(position)
        self.normalizer = _held(normalizer)

    @opaque_unless(_followed)
    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Mask | Tensor | None
    ) -> tuple[Tensor, Attention]:
        """Heads [*batch, heads, n, d] -> concatenated outputs [*batch, n, heads d], the matrix."""
        dropout = Dropout(self.dropout) if self.training and self.dropout > 0 else None
        matrix = attention(
            query,
            key,
            score=_built(self.score),
            position=_built(self.position),
            mask=mask,
            normalizer=_built(self.normalizer),
            dropout=dropout,
        )
        output, position = matrix @ value, matrix.position
        more = None if position is None else position.on_output(matrix)
        if more is not None:
            if more.shape[-1] != output.shape[-1]:
                raise errors.ShapeError(
                    f"{position} adds vectors of width {more.shape[-1]} to what the heads put out, "
                    f"which has width {output.shape[-1]}; its values must be that wide."
                )
            output = output + more
        return output.transpose(-3, -2).flatten(-2), matrix

    def _make_output(self, bias: bool) -> None:
        """The output projection, and torch's initial values: Xavier weights, zero biases."""
        # In torch's order, so that one seed gives the same layer.
        self.out_proj = nn.Linear(self.embed_dim, self.embed_dim, bias=bias)
        for name, parameter in self.named_parameters(recurse=False):
            if name.endswith("proj_weight"):
                nn.init.xavier_uniform_(parameter)
        if self.out_proj.bias is not None:
            nn.init.zeros_(self.out_proj.bias)

    def extra_repr(self) -> str:
        """What torch prints between the brackets."""
        return f"{self.embed_dim}, num_heads={self.num_heads}"


class MultiHeadAttention(_Heads):
    """Multi-head attention between two sequences, with any score, position and normalizer.

    head_h = A_h V_h,  A_h = attention(query W^q_h, key W^k_h);  output = concat(head_1..h) W^o

    Weights have the names, shapes and initial values of `torch.nn.MultiheadAttention`, so a
    `state_dict` goes both ways, and with the default parts the results are the same.
    Vaswani et al. 2017, arXiv:1706.03762, section 3.2.2.

    embed_dim: channels of the query and the output; kdim, vdim: of key and value, default the same
    dropout: probability, on the weights, in training
    batch_first: inputs are [batch, length, channels]; otherwise [length, batch, channels], which is
        torch's default and so the default here
    score, position, normalizer: parts of `regard.attention`; their tensors that require gradients
        become parameters of the layer

    >>> layer = MultiHeadAttention(64, 8, batch_first=True)
    >>> x = torch.randn(2, 10, 64)
    >>> output, A = layer(x, x, x)
    >>> output.shape, A
    (torch.Size([2, 10, 64]), Attention(2, 8, 10, 10): Dot(), Softmax(); float32, lazy)
    """

    # More than seven parameters: the first ones are torch's constructor, which this class repeats.
    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        *,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        score: Score | PairFunction = Dot(),
        position: Position | None = None,
        normalizer: Normalizer = Softmax(),
    ) -> None:
        super().__init__(embed_dim, num_heads, dropout, score, position, normalizer)
        self.kdim, self.vdim = kdim or embed_dim, vdim or embed_dim
        self.batch_first = batch_first
        packed = self.kdim == self.vdim == embed_dim
        self.in_proj_weight = _parameter(packed, 3 * embed_dim, embed_dim)
        self.q_proj_weight = _parameter(not packed, embed_dim, embed_dim)
        self.k_proj_weight = _parameter(not packed, embed_dim, self.kdim)
        self.v_proj_weight = _parameter(not packed, embed_dim, self.vdim)
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * embed_dim)) if bias else None
        self._make_output(bias)

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        *,
        mask: Mask | Tensor | None = None,
    ) -> tuple[Tensor, Attention]:
        """Return the output and the lazy matrix [batch, heads, n, m].

        query [batch, n, embed_dim] (or as `batch_first` says; [n, embed_dim] without a batch);
        key default query, value default key; mask: True = may attend, as in `regard.attention`
        """
        key = query if key is None else key
        value = key if value is None else value
        widths = (self.embed_dim, self.kdim, self.vdim)
        inputs = []
        for name, x, width in zip(
            ("query", "key", "value"), (query, key, value), widths, strict=True
        ):
            _check_input(name, x, width)
            if not self.batch_first and x.dim() > 3:
                raise errors.ShapeError(
                    f"{name} has shape {errors.show(x.shape)}; with batch_first=False it must be "
                    "[length, batch, channels] or [length, channels]. batch_first=True takes any "
                    "number of batch axes."
                )
            inputs.append(x.transpose(0, 1) if x.dim() == 3 and not self.batch_first else x)
        packed, bias = self.in_proj_weight, self.in_proj_bias
        apart = self.q_proj_weight, self.k_proj_weight, self.v_proj_weight
        weights: tuple[Any, ...] = apart if packed is None else packed.chunk(3)
        biases: tuple[Any, ...] = (None,) * 3 if bias is None else bias.chunk(3)
        heads = [
            F.linear(x, weight, bias).unflatten(-1, (self.num_heads, -1)).transpose(-3, -2)
            for x, weight, bias in zip(inputs, weights, biases, strict=True)
        ]
        mixed, matrix = self._attend(heads[0], heads[1], heads[2], mask)
        output = self.out_proj(mixed)
        return (output if self.batch_first or query.dim() < 3 else output.transpose(0, 1)), matrix


class SelfAttention(_Heads):
    """Self-attention of a sequence: batch first, grouped-query heads if asked.

    output = concat_h(A_h V_h) W^o,  A_h = attention(x W^q_h, x W^k_g),  g = the key head of head h

    The weights are named as in `torch.nn.MultiheadAttention`: in_proj_weight stacks W^q, W^k, W^v.

    num_kv_heads: key and value heads, default num_heads; a divisor of num_heads
    score, position, normalizer, dropout: as in `MultiHeadAttention`

    >>> from regard import Additive, Alibi, Causal
    >>> layer = SelfAttention(64, 8, score=Additive.of(8, 8), position=Alibi.of(8))
    >>> output, A = layer(torch.randn(2, 10, 64), mask=Causal())
    >>> output.shape, A.shape
    (torch.Size([2, 10, 64]), torch.Size([2, 8, 10, 10]))
    """

    # Eight parameters: three of them are the parts, which say what is computed.
    def __init__(
        self,
        d_model: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        bias: bool = True,
        dropout: float = 0.0,
        score: Score | PairFunction = Dot(),
        position: Position | None = None,
        normalizer: Normalizer = Softmax(),
    ) -> None:
        super().__init__(d_model, num_heads, dropout, score, position, normalizer)
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if not errors.groups(num_heads, self.num_kv_heads):
            raise errors.ShapeError(
                f"{num_heads} heads cannot share {num_kv_heads} key and value heads in equal "
                "groups; num_heads must be a multiple of num_kv_heads."
            )
        self._heads = (num_heads, self.num_kv_heads, self.num_kv_heads)
        rows = sum(self._heads) * self.head_dim
        self.in_proj_weight = nn.Parameter(torch.empty(rows, d_model))
        self.in_proj_bias = nn.Parameter(torch.zeros(rows)) if bias else None
        self._make_output(bias)

    def forward(self, x: Tensor, *, mask: Mask | Tensor | None = None) -> tuple[Tensor, Attention]:
        """Inputs [*batch, n, d_model] -> output of the same shape, matrix [*batch, heads, n, n]."""
        _check_input("x", x, self.embed_dim)
        parts = F.linear(x, self.in_proj_weight, self.in_proj_bias).split(
            [heads * self.head_dim for heads in self._heads], dim=-1
        )
        query, key, value = (
            part.unflatten(-1, (heads, self.head_dim)).transpose(-3, -2)
            for part, heads in zip(parts, self._heads, strict=True)
        )
        mixed, matrix = self._attend(query, key, value, mask)
        return self.out_proj(mixed), matrix


def _parameter(present: bool, *shape: int) -> nn.Parameter | None:
    return nn.Parameter(torch.empty(shape)) if present else None


def _held(part: Part | PairFunction | nn.Module | None) -> nn.Module | PairFunction | None:
    return Learnable(part) if isinstance(part, Part) else part


def _built(held: nn.Module | PairFunction | None) -> Any:
    return held() if isinstance(held, Learnable) else held


def _check_input(name: str, x: Tensor, width: int) -> None:
    errors.check_tensor(name, x)
    if x.shape[-1] != width:
        raise errors.ShapeError(
            f"{name} has shape {errors.show(x.shape)}, but this layer takes {width} channels on "
            "the last axis."
        )
