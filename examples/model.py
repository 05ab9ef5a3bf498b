"""A small transformer for the examples: regard's attention, and nothing unusual around it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard import Mask
from regard.nn import GatedAttention, Learnable, SelfAttention
from regard.nn.cache import State
from regard.position import Position

Batch = tuple[Tensor, Tensor]
"""Tokens [batch, n] and what to predict at each, [batch, n]; -100 where nothing is asked."""


@dataclass(frozen=True)
class Encoding:
    """Where position enters a model: a layer on its input, a part of its attention, or neither.

    on_input: width -> layer;  on_attention: heads, head width -> part, made anew for each block
    """

    on_input: Callable[[int], nn.Module] | None = None
    on_attention: Callable[[int, int], Position] | None = None


@dataclass(frozen=True)
class Size:
    """Of a model; the examples use one size, so that their numbers can be compared.

    spread: standard deviation of the vectors of symbols before training
    """

    width: int = 64
    heads: int = 4
    blocks: int = 2
    spread: float = 1.0

    @property
    def head_width(self) -> int:
        """Channels of one head."""
        return self.width // self.heads


Mixer = Callable[[Size], SelfAttention]
"""Another layer in the place of softmax attention."""


class Block(nn.Module):
    """x + attention(norm x), then x + feed-forward(norm x)."""

    def __init__(self, size: Size, position: Position | None, mixer: Mixer | None = None) -> None:
        super().__init__()
        self.attention = (
            SelfAttention(size.width, size.heads, position=position)
            if mixer is None
            else mixer(size)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(size.width) for _ in range(2))
        inner = 4 * size.width
        self.forward_part = nn.Sequential(
            nn.Linear(size.width, inner), nn.ReLU(), nn.Linear(inner, size.width)
        )

    def forward(self, x: Tensor, mask: Mask | None, state: State | None = None) -> Tensor:
        mask = mask if state is None else None  # a state says what came before
        x = x + self.attention(self.norms[0](x), mask=mask, state=state)[0]
        return x + self.forward_part(self.norms[1](x))


class Transformer(nn.Module):
    """Tokens [batch, n] -> logits [batch, n, symbols].

    With `memory`, a state for each block, tokens go on where those before ended.
    """

    def __init__(
        self,
        symbols: int,
        encoding: Encoding,
        mask: Mask | None,
        size: Size,
        mixer: Mixer | None = None,
    ) -> None:
        super().__init__()
        self.mask = mask
        self.embed = nn.Embedding(symbols, size.width)
        self.embed.weight.data *= size.spread
        on_input, on_attention = encoding.on_input, encoding.on_attention
        self.place = nn.Identity() if on_input is None else on_input(size.width)
        self.blocks = nn.ModuleList(
            Block(size, on_attention and on_attention(size.heads, size.head_width), mixer)
            for _ in range(size.blocks)
        )
        self.norm = nn.LayerNorm(size.width)
        self.out = nn.Linear(size.width, symbols)

    def forward(self, tokens: Tensor, memory: list[State] | None = None) -> Tensor:
        return self.out(self.norm(self.states(tokens, memory)[-1]))

    def states(self, tokens: Tensor, memory: list[State] | None = None) -> list[Tensor]:
        """The vectors [batch, n, width] before the first block and after each."""
        x = self.embed(tokens)
        states = [self.place(x, offset=memory[0].length) if memory else self.place(x)]
        for block, state in zip(self.blocks, memory or [None] * len(self.blocks), strict=True):
            states.append(block(states[-1], self.mask, state))
        return states

    def memory(self) -> list[State]:
        """An empty state for each block: what generation keeps."""
        return [block.attention.state() for block in self.blocks]


def loss(model: nn.Module, batch: Batch, smoothing: float = 0.0) -> Tensor:
    """Mean cross-entropy in nats of what is asked, of which a share is spread over all answers."""
    tokens, targets = batch
    logits = model(tokens).flatten(0, -2)
    return F.cross_entropy(logits, targets.flatten(), label_smoothing=smoothing)


@torch.no_grad()
def perplexity(model: nn.Module, batch: Batch) -> float:
    """e to the mean loss of all that is asked, a few sequences at a time."""
    total, asked = 0.0, 0
    for tokens, targets in zip(*(part.split(32) for part in batch), strict=True):
        count = int((targets >= 0).sum())
        total += count * float(loss(model, (tokens, targets)))
        asked += count
    return math.exp(total / asked)


@dataclass(frozen=True)
class Rates:
    """How fast parameters learn: those that say where heads look, and all others.

    places: of tensors of positions and of gates
    """

    weights: float
    places: float

    def groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Groups for an optimizer; places do not decay, since 0 is a place like others."""
        parts = [m for m in model.modules() if isinstance(m, Learnable)]
        gates = [m.gate for m in model.modules() if isinstance(m, GatedAttention)]
        places = {id(p) for p in (*gates, *(p for part in parts for p in part.parameters()))}
        parameters = list(model.parameters())
        return [
            {"params": [p for p in parameters if id(p) not in places], "lr": self.weights},
            {
                "params": [p for p in parameters if id(p) in places],
                "lr": self.places,
                "weight_decay": 0.0,
            },
        ]


def train(
    model: nn.Module,
    draw: Callable[[], Batch],
    steps: int,
    rate: float | Rates,
    after: Callable[[int], None] | None = None,
    *,
    smoothing: float = 0.0,
    decay: float = 0.01,
) -> None:
    """AdamW; the rate rises over a tenth of the steps and falls to 0 as a cosine.

    smoothing, decay: of the labels, and of weights
    after: called with the number of updates done, after each
    """
    if isinstance(rate, Rates):
        groups, rate = rate.groups(model), rate.weights
    else:
        groups = [{"params": list(model.parameters())}]
    optimizer = torch.optim.AdamW(
        groups, lr=rate, betas=(0.9, 0.99), weight_decay=decay, fused=True
    )
    rise = max(steps // 10, 1)

    def share(step: int) -> float:
        fall = 0.5 + 0.5 * math.cos(math.pi * step / steps)
        return min((step + 1) / rise, fall)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
    model.train()
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        loss(model, draw(), smoothing).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if after is not None:
            after(step)
    model.eval()
