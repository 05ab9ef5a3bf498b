"""Self-attention as a layer that returns the output and the lazy matrix it came from."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard import errors
from regard.custom import PairFunction
from regard.dropout import Dropout
from regard.form.recurrent import needs_of
from regard.mask import Mask
from regard.matrix import Attention, attention
from regard.nn.cache import KVCache, Parts, RecurrentState, State
from regard.nn.learnable import Learnable
from regard.normalizer import Normalizer, Softmax
from regard.opaque import opaque_unless
from regard.part import Part
from regard.position import Bias, Position
from regard.rule import Rule
from regard.score import Dot, Score


def _followed(
    layer: Heads, *_: Any, state: State | None = None, score: Score | None = None, **__: Any
) -> Any:
    """What a graph can follow: every score but a function of a tile, without a state."""
    whole = isinstance(layer.score, Learnable) and state is None and score is None
    return Heads._attend.__wrapped__ if whole else None  # type: ignore[attr-defined]


class Heads(nn.Module):
    """What the layers share: the parts, the matrix of projected heads, the output projection."""

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
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Mask | Tensor | None,
        *,
        state: State | None = None,
        score: Score | None = None,
        bias: Bias | None = None,
    ) -> tuple[Tensor, Attention]:
        """Heads [*batch, heads, n, d] -> concatenated outputs [*batch, n, heads d], the matrix."""
        position = _built(self.position)
        dropout = Dropout(self.dropout) if self.training and self.dropout > 0 else None
        score = _built(self.score) if score is None else score
        if bias is not None:
            position = bias if position is None else position + bias
        normalizer = _built(self.normalizer)
        if state is not None:
            parts = Parts(score, position, normalizer, dropout)
            output, matrix = state.attend(parts, query, key, value)
        else:
            matrix = attention(
                query,
                key,
                score=score,
                position=position,
                mask=mask,
                normalizer=normalizer,
                dropout=dropout,
            )
            output = matrix.matmul(value)
        position = matrix.position
        more = None if position is None else position.on_output(matrix)
        if more is not None:
            if more.shape[-1] != output.shape[-1]:
                raise errors.ShapeError(
                    f"{position} adds vectors of width {more.shape[-1]} to what the heads put out, "
                    f"which has width {output.shape[-1]}; its values must be that wide."
                )
            output = output + more
        return output.transpose(-3, -2).flatten(-2), matrix

    def _make_output(
        self,
        bias: bool,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """The output projection, and torch's initial values: Xavier weights, zero biases."""
        # In torch's order, so that one seed gives the same layer.
        self.out_proj = nn.Linear(
            self.embed_dim, self.embed_dim, bias=bias, device=device, dtype=dtype
        )
        for name, parameter in self.named_parameters(recurse=False):
            if name.endswith("proj_weight"):
                nn.init.xavier_uniform_(parameter)
        if self.out_proj.bias is not None:
            nn.init.zeros_(self.out_proj.bias)

    def extra_repr(self) -> str:
        """What torch prints between the brackets."""
        return f"{self.embed_dim}, num_heads={self.num_heads}"


class SelfAttention(Heads):
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

    def forward(
        self, x: Tensor, *, mask: Mask | Tensor | None = None, state: State | None = None
    ) -> tuple[Tensor, Attention]:
        """Inputs [*batch, n, d_model] -> output of the same shape, matrix [*batch, heads, n, n].

        state: of the tokens before x, which x is added to; then attention is causal
        """
        check_input("x", x, self.embed_dim)
        if state is not None and mask is not None:
            raise ValueError(
                "give a mask or a state: with a state each token sees those before it, within the "
                "state's own window."
            )
        query, key, value = self.project(x)
        mixed, matrix = self._attend(query, key, value, mask, state=state, score=self._score(x))
        return self.out_proj(mixed), matrix

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value [*batch, heads, n, head_dim] of inputs [*batch, n, d_model]."""
        parts = F.linear(x, self.in_proj_weight, self.in_proj_bias).split(
            [heads * self.head_dim for heads in self._heads], dim=-1
        )
        query, key, value = (
            part.unflatten(-1, (heads, self.head_dim)).transpose(-3, -2)
            for part, heads in zip(parts, self._heads, strict=True)
        )
        return query, key, value

    def rule(self, x: Tensor) -> Rule:
        """The formula of the matrix of inputs x: score, position and normalizer as they are now."""
        score = self._score(x)
        score = _built(self.score) if score is None else score
        return Rule.of(score, _built(self.position), _built(self.normalizer))

    def _score(self, x: Tensor) -> Score | None:
        """The score where it depends on the inputs; None for the layer's own."""
        return None

    def state(self) -> State:
        """An empty state: a `RecurrentState` where scores factorise, a `KVCache` elsewhere.

        A bias for each pair, or dropout in training, needs all pairs and so a `KVCache`, too.
        """
        return KVCache() if self._needs_pairs() else RecurrentState()

    def _needs_pairs(self) -> str | None:
        """Why no recurrence computes this layer, or None."""
        score, position, normalizer = map(_built, (self.score, self.position, self.normalizer))
        drops = self.training and self.dropout > 0
        dropout = Dropout(self.dropout, seed=0) if drops else None  # draws no random number
        return needs_of(score, position, normalizer, dropout)

    def step(self, x: Tensor, state: State) -> Tensor:
        """The output [*batch, d_model] of one more token x [*batch, d_model]."""
        output, _ = self(x.unsqueeze(-2), state=state)
        one: Tensor = output.squeeze(-2)
        return one


def _held(part: Part | PairFunction | nn.Module | None) -> nn.Module | PairFunction | None:
    return Learnable(part) if isinstance(part, Part) else part


def _built(held: nn.Module | PairFunction | None) -> Any:
    return held() if isinstance(held, Learnable) else held


def check_input(
    name: str, x: Tensor, width: int, *, shape: str = "[*batch, n, d_model]", dims: int = 2
) -> None:
    """Raise unless an input of a layer has `width` channels."""
    errors.check_tensor(name, x, shape=shape, dims=dims)
    if x.shape[-1] != width:
        raise errors.ShapeError(
            f"{name} has shape {errors.show(x.shape)}, but this layer takes {width} channels on "
            "the last axis."
        )
