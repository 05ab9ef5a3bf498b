"""A linear-attention layer as the cell of a recurrent network: one token and its state."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from regard import errors
from regard.features import Features
from regard.form import recurrent
from regard.mask import Causal
from regard.nn.attention import SelfAttention, check_input
from regard.nn.cache import RecurrentState, placed
from regard.nn.recurrent import RecurrentAttention
from regard.rule import Rule

LAYERS = (SelfAttention, RecurrentAttention)


class CellState(NamedTuple):
    """All that a cell knows of the tokens before: of constant size.

    memory: S, [*batch, heads, features, width], as `regard.recur` returns it
    length: how many tokens it holds, which rotations need
    """

    memory: Tensor
    length: int

    @staticmethod
    def of(state: RecurrentState) -> CellState:
        """Of what a layer took in at once, such as a prompt."""
        if state.state is None:
            raise errors.ShapeError(
                "this RecurrentState has taken in no tokens; a cell begins with state None."
            )
        return CellState(state.state, state.length)


class RecurrentCell(nn.Module):
    """The layer as an RNN: output_t, state_t = cell(x_t, state_(t-1)), as `torch.nn.LSTMCell`.

    S_t = (I + write_t read_t^T) diag(e^log_decay_t) S_(t-1) + phi(k_t) v_t^T
    output_t = (scale S_t^T phi(q_t)) W^o, under RowSum divided by the same of v = 1

    layer: causal self-attention whose matrix is a recurrence; see `regard.convert.to_recurrent`.
        Its parameters are the cell's: what trains one trains the other.
    The outputs of a sequence are those of `layer(x, mask=Causal())` up to rounding, and so are
    gradients, which flow through states. Cost: 4 h f (e + 1) flops for h heads with f features and
    values of width e, beside the projections, however many tokens came before.
    Katharopoulos et al. 2020, arXiv:2006.16236, eqs. 16 to 20. Raises FormError where the layer is
    no recurrence.

    >>> from regard import Features, RowSum
    >>> layer = SelfAttention(16, 4, score=Features(), normalizer=RowSum())
    >>> cell, x, state, outputs = RecurrentCell(layer), torch.randn(2, 10, 16), None, []
    >>> for t in range(10):
    ...     output, state = cell(x[:, t], state)
    ...     outputs.append(output)
    >>> torch.allclose(torch.stack(outputs, 1), layer(x, mask=Causal())[0], atol=1e-5)
    True
    >>> state.memory.shape
    torch.Size([2, 4, 4, 5])
    """

    def __init__(self, layer: SelfAttention) -> None:
        super().__init__()
        reason = needs(layer)
        if reason is not None:
            raise errors.FormError(f"this layer is no recurrent cell: {reason}\n  layer: {layer}")
        self.layer = layer

    def forward(self, x: Tensor, state: CellState | None = None) -> tuple[Tensor, CellState]:
        """One token [*batch, d_model] and what came before -> its output, and the state after it.

        state: None at the beginning of a sequence
        """
        layer = self.layer
        check_input("x", x, layer.embed_dim, shape="[*batch, d_model]", dims=1)
        if self.training and layer.dropout > 0:
            raise errors.FormError(
                f"{layer} drops weights in training, pair by pair, and a cell has no pairs; train "
                "the layer, or set its dropout to 0."
            )
        memory, length = (None, 0) if state is None else state
        one = x.unsqueeze(-2)
        query, key, value = layer.project(one)
        rule = layer.rule(one)
        if rule.position is not None:
            tokens = torch.arange(length, length + 1, device=x.device)
            position = placed(rule.position, tokens, 0, exact=True)
            rule = Rule.of(rule.score, position, rule.normalizer)
        mixed, memory = recurrent.step(rule, query, key, value, memory)
        output: Tensor = layer.out_proj(mixed.flatten(-3))
        return output, CellState(memory, length + 1)


def needs(layer: Any) -> str | None:
    """The sentence why a layer is no cell, or None."""
    if type(layer) not in LAYERS:
        return (
            f"it is a {type(layer).__name__}; {' and '.join(kind.__name__ for kind in LAYERS)} "
            "are the layers that are known to become one."
        )
    score = layer.rule(layer.in_proj_weight.new_zeros(1, layer.embed_dim)).score
    if isinstance(score, Features):
        for name in ("log_decay", "beta"):
            given = getattr(score, name)
            if isinstance(given, Tensor) and given.shape[-2] > 1:
                return (
                    f"{score} holds {name} of the {given.shape[-2]} tokens of one sequence; a "
                    "RecurrentAttention computes it from any token."
                )
        if score.erase is not None:
            return (
                f"{score} holds what the tokens of one sequence erase; "
                "RecurrentAttention(delta=True) computes it from any token."
            )
    with torch.no_grad():
        nothing = layer.in_proj_weight.new_zeros(1, 1, layer.embed_dim)
        _, matrix = layer(nothing, mask=Causal())
    reason = recurrent.needs(matrix)
    return reason and f"form 'recurrent' {reason}"
