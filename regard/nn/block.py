"""One layer of a transformer: attention and a feed-forward part, each with a norm and a sum."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from regard import errors
from regard.mask import Mask, Padding
from regard.matrix import Attention
from regard.nn.attention import SelfAttention
from regard.nn.cache import State
from regard.nn.cross import CrossAttention
from regard.nn.states import States

Norm = Callable[[int], nn.Module]


class _Layer(nn.Module):
    """What both kinds share: the feed-forward part, and where the norms stand."""

    def __init__(
        self,
        self_attn: SelfAttention,
        dim_feedforward: int | None,
        dropout: float,
        activation: Callable[[Tensor], Tensor],
        norm: Norm,
        norm_first: bool,
    ) -> None:
        super().__init__()
        if not isinstance(self_attn, SelfAttention):
            raise TypeError(
                f"self_attn is a {type(self_attn).__name__}; it must be a layer of attention: "
                "regard.nn.SelfAttention(d_model, num_heads, ...) or RecurrentAttention."
            )
        width = self_attn.embed_dim
        inner = 4 * width if dim_feedforward is None else dim_feedforward
        errors.check_number("dim_feedforward", inner, whole=True, least=1)
        self.self_attn, self.norm_first = self_attn, norm_first
        self.linear1, self.linear2 = nn.Linear(width, inner), nn.Linear(inner, width)
        self.dropout, self.activation = nn.Dropout(dropout), activation
        self.norm1, self.norm2 = norm(width), norm(width)

    def _before(self, x: Tensor, norm: nn.Module) -> Tensor:
        normed: Tensor = norm(x) if self.norm_first else x
        return normed

    def _after(self, x: Tensor, part: Tensor, norm: nn.Module) -> Tensor:
        x = x + self.dropout(part)
        normed: Tensor = x if self.norm_first else norm(x)
        return normed

    def _feed(self, x: Tensor, norm: nn.Module) -> Tensor:
        inner = self.dropout(self.activation(self.linear1(self._before(x, norm))))
        return self._after(x, self.linear2(inner), norm)

    def extra_repr(self) -> str:
        """What torch prints between the brackets."""
        return f"norm_first={self.norm_first}"


class EncoderLayer(_Layer):
    """Self-attention and a feed-forward part, as in `torch.nn.TransformerEncoderLayer`.

    norm_first:  y = x + attention(norm1(x)),  output = y + feed(norm2(y))
    else:        y = norm1(x + attention(x)),  output = norm2(y + feed(y))
    feed(y) = W2 activation(W1 y + b1) + b2, with dropout before each sum and after the activation

    Weights are named as in torch's layer, so that a `state_dict` loads both ways, and results are
    the same; inputs are batch first, and masks regard's, True = may attend. With `Causal()` it is
    a layer of a decoder without a memory (GPT), and steps.
    Vaswani et al. 2017, arXiv:1706.03762, section 3.1; norms first: Xiong et al. 2020,
    arXiv:2002.04745.

    self_attn: `SelfAttention` with any score, position and normalizer, or `RecurrentAttention`
    dim_feedforward: channels between W1 and W2, default 4 d_model
    dropout: as in torch 0.1; that of the attention weights is the attention's own
    activation, norm: as `F.gelu`, `nn.RMSNorm`
    Raises TypeError where self_attn is no such layer.

    >>> import torch
    >>> from regard import Alibi, Causal
    >>> from regard.nn import SelfAttention
    >>> layer = EncoderLayer(SelfAttention(64, 8, position=Alibi.of(8)), norm_first=True)
    >>> x = torch.randn(2, 10, 64)
    >>> layer(x).shape
    torch.Size([2, 10, 64])
    >>> output, A = layer(x, mask=Causal(), need_weights=True)
    >>> A
    Attention(2, 8, 10, 10): Dot(), Alibi(tensor(8)), Causal(), Softmax(); float32, lazy
    """

    def __init__(
        self,
        self_attn: SelfAttention,
        dim_feedforward: int | None = None,
        *,
        dropout: float = 0.1,
        activation: Callable[[Tensor], Tensor] = F.relu,
        norm: Norm = nn.LayerNorm,
        norm_first: bool = False,
    ) -> None:
        super().__init__(self_attn, dim_feedforward, dropout, activation, norm, norm_first)

    def forward(
        self,
        x: Tensor,
        *,
        mask: Mask | Tensor | None = None,
        state: State | None = None,
        need_weights: bool = False,
    ) -> Tensor | tuple[Tensor, Attention]:
        """Inputs [*batch, n, d_model] -> the output, and the lazy matrix if `need_weights`.

        mask: as in `regard.attention`; state: of the tokens before x, as in `SelfAttention`
        """
        output, matrix = self.self_attn(self._before(x, self.norm1), mask=mask, state=state)
        x = self._feed(self._after(x, output, self.norm1), self.norm2)
        return (x, matrix) if need_weights else x

    def state(self) -> State:
        """An empty state for `forward` and `step`: the attention's own kind."""
        return self.self_attn.state()

    def step(self, x: Tensor, state: State) -> Tensor:
        """The output [*batch, d_model] of one more token x [*batch, d_model]."""
        output: Tensor = self(x.unsqueeze(-2), state=state).squeeze(-2)
        return output


class DecoderLayer(_Layer):
    """Self-attention, attention to a memory, and a feed-forward part.

    norm_first:  y = x + attention(norm1(x)),  z = y + cross(norm2(y), memory),
                 output = z + feed(norm3(z));
    else each norm is taken of the sum instead, as in `EncoderLayer`

    Weights and results are those of `torch.nn.TransformerDecoderLayer`; else as `EncoderLayer`.

    multihead_attn: the attention to the memory; it has torch's name, so that weights load
    Raises TypeError where an attention is of another kind, ShapeError where widths differ.

    >>> import torch
    >>> from regard import Causal
    >>> from regard.nn import CrossAttention, SelfAttention
    >>> layer = DecoderLayer(SelfAttention(64, 8), CrossAttention(64, 8)).eval()
    >>> x, memory = torch.randn(2, 6, 64), torch.randn(2, 9, 64)
    >>> output, (own, cross) = layer(x, memory, mask=Causal(), need_weights=True)
    >>> output.shape, own.shape, cross.shape
    (torch.Size([2, 6, 64]), torch.Size([2, 8, 6, 6]), torch.Size([2, 8, 6, 9]))
    >>> state = layer.state(memory)
    >>> steps = [layer.step(x[:, t], state) for t in range(6)]
    >>> torch.allclose(torch.stack(steps, 1), output, atol=1e-5)
    True
    """

    def __init__(
        self,
        self_attn: SelfAttention,
        multihead_attn: CrossAttention,
        dim_feedforward: int | None = None,
        *,
        dropout: float = 0.1,
        activation: Callable[[Tensor], Tensor] = F.relu,
        norm: Norm = nn.LayerNorm,
        norm_first: bool = False,
    ) -> None:
        super().__init__(self_attn, dim_feedforward, dropout, activation, norm, norm_first)
        if not isinstance(multihead_attn, CrossAttention):
            raise TypeError(
                f"multihead_attn is a {type(multihead_attn).__name__}; it must be a "
                "regard.nn.CrossAttention(d_model, num_heads, ...), which attends to a memory."
            )
        if multihead_attn.embed_dim != self_attn.embed_dim:
            raise errors.ShapeError(
                f"self_attn has {self_attn.embed_dim} channels and multihead_attn "
                f"{multihead_attn.embed_dim}; the layers of a block are of one width."
            )
        self.multihead_attn, self.norm3 = multihead_attn, norm(self_attn.embed_dim)

    def forward(
        self,
        x: Tensor,
        memory: Tensor | None = None,
        *,
        mask: Mask | Tensor | None = None,
        memory_mask: Mask | Tensor | None = None,
        state: States | None = None,
        need_weights: bool = False,
    ) -> Tensor | tuple[Tensor, tuple[Attention, Attention]]:
        """Inputs [*batch, n, d_model] -> the output, and both lazy matrices if `need_weights`.

        memory: [*batch, m, d_model]; state: `layer.state(memory)`, instead of memory and masks;
            then each token sees those before it
        mask, memory_mask: of tokens and of the memory, True = may attend; None for all, as in torch
        Raises ValueError unless one of memory and state is given.
        """
        check_memory(memory, memory_mask, state)
        tokens, kept = (None, memory) if state is None else state.parts
        output, own = self.self_attn(self._before(x, self.norm1), mask=mask, state=tokens)
        x = self._after(x, output, self.norm1)
        normed = self._before(x, self.norm2)
        output, cross = self.multihead_attn(normed, kept, mask=memory_mask)
        x = self._feed(self._after(x, output, self.norm2), self.norm3)
        return (x, (own, cross)) if need_weights else x

    def state(self, memory: Tensor, mask: Padding | None = None) -> States:
        """A state without tokens, and the keys and values of a memory [*batch, m, d_model].

        mask: `Padding` of the memory; FormError for others, which may differ between tokens
        """
        return States((self.self_attn.state(), self.multihead_attn.project(memory, mask)))

    def step(self, x: Tensor, state: States) -> Tensor:
        """The output [*batch, d_model] of one more token x [*batch, d_model]."""
        output: Tensor = self(x.unsqueeze(-2), state=state).squeeze(-2)
        return output


def check_memory(memory: Tensor | None, mask: object, state: States | None) -> None:
    """Raise unless a decoder got either a memory or a state, which holds its memory."""
    if (memory is None) == (state is None):
        raise ValueError(
            f"a decoder attends to a memory, or to the one in its state; "
            f"{'neither is' if memory is None else 'both are'} given."
        )
    if state is not None and mask is not None:
        raise ValueError("the state has a mask of the memory: give it to state(memory, mask).")
