"""Attention as a recurrent network: exactly where scores factorise, fitted where they do not."""

from __future__ import annotations

from typing import Any

from regard import errors
from regard.nn import MultiHeadAttention, RecurrentCell, SelfAttention
from regard.nn.learnable import Learnable
from regard.normalizer import Softmax


def to_recurrent(layer: SelfAttention) -> RecurrentCell:
    """The RNN that a causal linear-attention layer is: `output, state = cell(x_t, state)`.

    layer: `SelfAttention` with the score `Features` (constant decays, beta) under `RowSum` or
        `Identity`, or of position alone with `Alibi`; `RecurrentAttention`. Rotations are fine.
    The cell shares the layer's parameters, and gives its outputs and gradients to rounding; its
    state has a constant size. A cell has no mask: the layer it equals is the causal one.
    Raises FormError where scores do not factorise, as under Softmax: `linearize` fits a layer whose
    scores do, and says what is lost. TypeError for what is no layer of regard's.

    >>> import torch
    >>> from regard.nn import RecurrentAttention
    >>> layer, x = RecurrentAttention(16, 4, decay="token", delta=True), torch.randn(2, 10, 16)
    >>> cell, state, outputs = to_recurrent(layer), None, []
    >>> for t in range(10):
    ...     output, state = cell(x[:, t], state)
    ...     outputs.append(output)
    >>> torch.allclose(torch.stack(outputs, 1), layer(x)[0], atol=1e-5)
    True
    """
    check_layer(layer, "to_recurrent")
    held: Any = layer.normalizer
    if isinstance(held, Learnable) and isinstance(held(), Softmax):
        try:
            return RecurrentCell(layer)
        except errors.FormError as error:
            raise errors.FormError(
                f"{error}\nTo fit feature maps to its attention and see what that loses: "
                "regard.convert.linearize(layer, inputs)."
            ) from None
    return RecurrentCell(layer)


def check_layer(layer: object, name: str) -> None:
    """Raise TypeError unless this is a layer of one sequence attending to itself."""
    if isinstance(layer, MultiHeadAttention):
        raise TypeError(
            f"{name} takes a SelfAttention, and this is a {type(layer).__name__}, whose query, key "
            "and value may come from three inputs. Where they are one, its state_dict fits: "
            "layer = SelfAttention(d_model, heads); layer.load_state_dict(theirs.state_dict())."
        )
    if not isinstance(layer, SelfAttention):
        raise TypeError(
            f"{name} takes a regard.nn.SelfAttention or RecurrentAttention, not "
            f"{type(layer).__name__}; convert the layers of a model one by one."
        )
