"""Stacks of layers: encoder, decoder, and both together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from regard import errors
from regard.mask import Causal, Mask, Padding
from regard.matrix import Attention
from regard.nn.block import DecoderLayer, EncoderLayer, check_memory
from regard.nn.states import States

CAUSAL = Causal()


class _Stack(nn.Module):
    """Layers of one kind and width, one after the other."""

    def __init__(self, layers: Iterable[nn.Module], norm: nn.Module | None, kind: type) -> None:
        super().__init__()
        found: list[Any] = list(layers)
        if not found:
            raise ValueError(f"layers is empty; give at least one regard.nn.{kind.__name__}.")
        for layer in found:
            if not isinstance(layer, kind):
                raise TypeError(
                    f"one of the layers is a {type(layer).__name__}; all must be "
                    f"regard.nn.{kind.__name__}."
                )
        self.d_model: int = found[0].self_attn.embed_dim
        widths = [layer.self_attn.embed_dim for layer in found]
        if set(widths) != {self.d_model}:
            raise errors.ShapeError(f"layers have {widths} channels; they must have the same.")
        self.layers: Any = nn.ModuleList(found)
        self.norm = norm

    def _states(self, state: States | None) -> Sequence[Any]:
        if state is None:
            return [None] * len(self.layers)
        if not isinstance(state, States) or len(state.parts) != len(self.layers):
            given = f"{len(state.parts)}" if isinstance(state, States) else type(state).__name__
            raise errors.ShapeError(
                f"this {type(self).__name__} has {len(self.layers)} layers and needs a state of "
                f"each, but was given {given}; its state() makes one."
            )
        return state.parts

    def _normed(self, x: Tensor) -> Tensor:
        normed: Tensor = x if self.norm is None else self.norm(x)
        return normed

    def step(self, x: Tensor, state: States) -> Tensor:
        """The output [*batch, d_model] of one more token x [*batch, d_model]."""
        output: Tensor = self(x.unsqueeze(-2), state=state).squeeze(-2)
        return output


class Encoder(_Stack):
    """A stack of `EncoderLayer`: n vectors in, n vectors out, as `torch.nn.TransformerEncoder`.

    One linear layer behind it gives a label for each vector (N to N), or for the whole sequence
    from a mean or a first token (N to 1); under `Causal()` it generates (N to N').

    norm: of the output, which layers with `norm_first` leave without one
    Raises ValueError, TypeError, ShapeError where layers are missing, of another kind or width.

    >>> import torch
    >>> from regard import Padding
    >>> from regard.nn import SelfAttention
    >>> model = Encoder(EncoderLayer(SelfAttention(64, 8)) for _ in range(2))
    >>> mask = Padding.of_lengths(torch.tensor([10, 7]), 10)
    >>> output, matrices = model(torch.randn(2, 10, 64), mask=mask, need_weights=True)
    >>> output.shape, [A.shape for A in matrices]
    (torch.Size([2, 10, 64]), [torch.Size([2, 8, 10, 10]), torch.Size([2, 8, 10, 10])])
    """

    def __init__(self, layers: Iterable[EncoderLayer], norm: nn.Module | None = None) -> None:
        super().__init__(layers, norm, EncoderLayer)

    def forward(
        self,
        x: Tensor,
        *,
        mask: Mask | Tensor | None = None,
        state: States | None = None,
        need_weights: bool = False,
    ) -> Tensor | tuple[Tensor, list[Attention]]:
        """Inputs [*batch, n, d_model] -> the output, and each layer's matrix if `need_weights`."""
        matrices: list[Attention] = []
        for layer, one in zip(self.layers, self._states(state), strict=True):
            x, matrix = layer(x, mask=mask, state=one, need_weights=True)
            matrices += [matrix] if need_weights else []
        return (self._normed(x), matrices) if need_weights else self._normed(x)

    def state(self) -> States:
        """An empty state of each layer, for `forward` and `step` under a causal mask."""
        return States([layer.state() for layer in self.layers])


class Decoder(_Stack):
    """A stack of `DecoderLayer`: tokens that see a memory, as `torch.nn.TransformerDecoder`.

    norm, and what is raised: as in `Encoder`

    >>> import torch
    >>> from regard import Causal
    >>> from regard.nn import CrossAttention, SelfAttention
    >>> model = Decoder([DecoderLayer(SelfAttention(64, 8), CrossAttention(64, 8))])
    >>> x, memory = torch.randn(2, 6, 64), torch.randn(2, 9, 64)
    >>> output, [(own, cross)] = model(x, memory, mask=Causal(), need_weights=True)
    >>> cross
    Attention(2, 8, 6, 9): Dot(), Softmax(); float32, lazy
    """

    def __init__(self, layers: Iterable[DecoderLayer], norm: nn.Module | None = None) -> None:
        super().__init__(layers, norm, DecoderLayer)

    def forward(
        self,
        x: Tensor,
        memory: Tensor | None = None,
        *,
        mask: Mask | Tensor | None = None,
        memory_mask: Mask | Tensor | None = None,
        state: States | None = None,
        need_weights: bool = False,
    ) -> Tensor | tuple[Tensor, list[tuple[Attention, Attention]]]:
        """Inputs [*batch, n, d_model] -> the output, and each layer's matrices if `need_weights`.

        Arguments are those of `DecoderLayer`.
        """
        check_memory(memory, memory_mask, state)
        matrices: list[tuple[Attention, Attention]] = []
        masks = {"mask": mask, "memory_mask": memory_mask}
        for layer, one in zip(self.layers, self._states(state), strict=True):
            x, both = layer(x, memory, state=one, need_weights=True, **masks)
            matrices += [both] if need_weights else []
        return (self._normed(x), matrices) if need_weights else self._normed(x)

    def state(self, memory: Tensor, mask: Padding | None = None) -> States:
        """States of all layers, without tokens, that hold the memory [*batch, m, d_model]."""
        return States([layer.state(memory, mask) for layer in self.layers])


class EncoderDecoder(nn.Module):
    """A sequence to another one, whose length the model decides: as `torch.nn.Transformer`.

    output = decoder(target, encoder(source)), target tokens seeing those before them

    Raises ShapeError where the widths of encoder and decoder differ.
    Vaswani et al. 2017, arXiv:1706.03762, figure 1.

    >>> import torch
    >>> from regard.nn import CrossAttention, SelfAttention
    >>> encoder = Encoder([EncoderLayer(SelfAttention(64, 8))])
    >>> decoder = Decoder([DecoderLayer(SelfAttention(64, 8), CrossAttention(64, 8))])
    >>> model = EncoderDecoder(encoder, decoder).eval()
    >>> source, target = torch.randn(2, 9, 64), torch.randn(2, 6, 64)
    >>> output = model(source, target)
    >>> state = model.state(source)
    >>> first = model.step(target[:, 0], state)  # choose the next token, and go on
    >>> torch.allclose(first, output[:, 0], atol=1e-5), state.length
    (True, 1)
    """

    def __init__(self, encoder: Encoder, decoder: Decoder) -> None:
        super().__init__()
        if encoder.d_model != decoder.d_model:
            raise errors.ShapeError(
                f"the encoder has {encoder.d_model} channels and the decoder {decoder.d_model}; "
                "they must have the same."
            )
        self.encoder, self.decoder = encoder, decoder

    def forward(
        self,
        source: Tensor,
        target: Tensor,
        *,
        source_mask: Mask | Tensor | None = None,
        target_mask: Mask | Tensor | None = CAUSAL,
        memory_mask: Mask | Tensor | None = None,
        need_weights: bool = False,
    ) -> Any:
        """Source [*batch, m, d_model], target [*batch, n, d_model] -> [*batch, n, d_model].

        source_mask, target_mask, memory_mask: True = may attend; of the encoder, of the target's
            tokens to each other, and of the target to the source
        need_weights: also a pair of the encoder's list of matrices and the decoder's
        """
        memory, own = self.encoder(source, mask=source_mask, need_weights=True)
        output, both = self.decoder(
            target, memory, mask=target_mask, memory_mask=memory_mask, need_weights=True
        )
        return (output, (own, both)) if need_weights else output

    def state(
        self,
        source: Tensor,
        *,
        source_mask: Mask | Tensor | None = None,
        memory_mask: Padding | None = None,
    ) -> States:
        """Encode the source once, for `step`."""
        return self.decoder.state(self.encoder(source, mask=source_mask), memory_mask)

    def step(self, x: Tensor, state: States) -> Tensor:
        """The output [*batch, d_model] of one more target token x [*batch, d_model]."""
        return self.decoder.step(x, state)
