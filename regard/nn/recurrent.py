"""Layers whose decay and erasing depend on their inputs, and generation from any layer's state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard import errors
from regard.feature_map import FeatureMap, identity, unit
from regard.features import Features
from regard.mask import Causal, Mask
from regard.matrix import Attention
from regard.nn.attention import SelfAttention
from regard.nn.cache import RecurrentState, State
from regard.normalizer import Identity, Normalizer
from regard.position import Position

DECAYS = ("none", "head", "token", "channel")
UNNORMALIZED = Identity()
SLOWEST = 16
"""Roots of the sigmoid that a decay is: tokens are remembered for longer (GLA, section 4.4)."""


class RecurrentAttention(SelfAttention):
    """Causal linear attention that decides for each token what to forget and what to replace.

    output = concat_h(A_h V_h) W^o,  A_h = attention(x W^q, x W^k) with the score
    Features(map, log_decay = log sigmoid(x W^decay + b) / 16, beta = sigmoid(x W^beta))

    decay: "none"; "head", the constants 1 - 2^(-5 - h) of RetNet; "token", one number for each head
        and token (as in Mamba-2 and Gated DeltaNet); "channel", one for each channel (GLA, KDA)
    delta: whether the value that was bound to a key is replaced by beta (DeltaNet and after it)
    map: phi; default x / |x| with the delta rule, else x itself
    normalizer: `Identity()`, or `RowSum()` where phi is positive

    >>> layer, x = RecurrentAttention(16, 4, decay="token", delta=True), torch.randn(2, 10, 16)
    >>> output, A = layer(x)
    >>> state = layer.state()
    >>> steps = [layer.step(x[:, t], state) for t in range(10)]
    >>> torch.allclose(torch.stack(steps, 1), output, atol=1e-5), state.bytes
    (True, 512)
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        *,
        decay: str = "none",
        delta: bool = False,
        map: FeatureMap | None = None,
        position: Position | None = None,
        normalizer: Normalizer = UNNORMALIZED,
    ) -> None:
        if decay not in DECAYS:
            raise ValueError(f"decay is one of {', '.join(DECAYS)}; not {decay!r}.")
        map = (unit if delta else identity) if map is None else map
        score = Features(map, scale=(d_model // max(num_heads, 1)) ** -0.5)
        super().__init__(d_model, num_heads, score=score, position=position, normalizer=normalizer)
        self.decay = decay
        wide = {"token": num_heads, "channel": d_model}.get(decay, 0)
        self.decay_proj = nn.Linear(d_model, wide) if wide else None
        self.beta_proj = nn.Linear(d_model, num_heads) if delta else None
        if decay == "head":
            constants = (1 - 2.0 ** (-5 - torch.arange(num_heads, dtype=torch.float64))).log()
            self.register_buffer("log_decay", constants.float()[:, None, None])

    def forward(
        self, x: Tensor, *, mask: Mask | Tensor | None = None, state: State | None = None
    ) -> tuple[Tensor, Attention]:
        """Inputs [*batch, n, d_model] -> output of the same shape, matrix [*batch, heads, n, n].

        mask: such as `Documents`, beside the causal one; state: as in `SelfAttention`
        """
        if state is None:
            mask = Causal() if mask is None else Causal() & mask  # type: ignore[operator]
        return super().forward(x, mask=mask, state=state)

    def state(self) -> State:
        """An empty `RecurrentState`; FormError if a position or normalizer has no recurrence."""
        reason = self._needs_pairs()
        if reason is not None:
            raise errors.FormError(
                f"this layer has no state: its form 'recurrent' {reason}\n  layer: {self}"
            )
        return RecurrentState()

    def _score(self, x: Tensor) -> Features:
        held: Any = self.score
        own: Features = held()
        log_decay = getattr(self, "log_decay", None)
        if self.decay_proj is not None:
            log_decay = F.logsigmoid(self._of_heads(self.decay_proj(x))) / SLOWEST
        beta = None
        if self.beta_proj is not None:
            beta = self._of_heads(self.beta_proj(x)).sigmoid()
        return Features(own.map, own.key_map, own.scale, log_decay, beta)

    def _of_heads(self, x: Tensor) -> Tensor:
        """[*batch, n, heads w] -> [*batch, heads, n, w]."""
        parted: Tensor = x.unflatten(-1, (self.num_heads, -1)).transpose(-3, -2)
        return parted


@torch.no_grad()
def generate(
    model: Callable[..., Tensor],
    tokens: Tensor,
    count: int,
    *,
    state: Any,
    choose: Callable[[Tensor], Tensor] = lambda logits: logits.argmax(-1),
) -> Tensor:
    """Continue sequences: the prompt in one call, then one call for each token, [*batch, count].

    model: model(tokens [*batch, n], state) -> logits [*batch, n, vocabulary], which adds the tokens
        to `state`: a layer's state, or whatever the model keeps several in
    choose: from logits [*batch, vocabulary] to tokens; default the likeliest

    >>> def successor(tokens, state):
    ...     return F.one_hot((tokens + 1) % 10, 10)
    >>> generate(successor, torch.tensor([[3, 4]]), 3, state=None)
    tensor([[5, 6, 7]])
    """
    found: list[Tensor] = []
    while len(found) < count:
        tokens = choose(model(tokens, state)[..., -1, :])[..., None]
        found.append(tokens)
    return torch.cat(found, -1) if found else tokens[..., :0]
