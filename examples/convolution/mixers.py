"""One small network for images, and what may mix its tokens: a convolution, or attention.

All have the same skeleton: patches of 2 x 2 pixels, blocks of x + mixer(norm x) and
x + MLP(norm x), the mean over tokens of their last norms, a linear layer. A mixer first makes the
vectors narrow, y = x W, and then has nine heads with a matrix W_h for each,
output = bias + sum_h A_h y W_h, as a 3 x 3 convolution has one for each tap. The mixers differ in
A_h alone: where it looks is fixed, or learned from a convolution's places on, or learned from
nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from examples.model import Batch, Rates, train
from regard import Attention, attention
from regard.convert import from_conv
from regard.grid import Grid, to_patches
from regard.nn import GatedAttention, Learned
from regard.receptive import receptive_field

PATCH, TAPS = 2, 3
HEADS = TAPS**2
ALPHA, GATE = 3.0, 3.0
"""Of heads that begin as a convolution's: soft enough to move, and nearly by position alone."""


@dataclass(frozen=True)
class Size:
    """Of a network; side: of its images in pixels; narrow: the channels that heads read."""

    side: int
    classes: int
    blocks: int
    width: int = 32
    narrow: int = 12
    head_dim: int = 4

    @property
    def grid(self) -> Grid:
        """Where the tokens stand."""
        return Grid(2 * (self.side // PATCH,))


class Free(nn.Module):
    """Attention by content alone: A_h = softmax_j(q_ih . k_jh / head_dim^0.5).

    As `GatedAttention` without its half by position: x [batch, narrow, *size] -> [batch, width, *].
    """

    def __init__(self, size: Size) -> None:
        super().__init__()
        shape, spread = (HEADS, size.narrow, size.head_dim), size.narrow**-0.5
        self.query, self.key = (nn.Parameter(spread * torch.randn(shape)) for _ in range(2))
        # W_h are drawn as a convolution's taps are.
        drawn = nn.Conv2d(size.narrow, size.width, TAPS)
        self.weight, self.bias = drawn.weight, drawn.bias

    def matrix(self, x: Tensor) -> Attention:
        """The lazy matrix [batch, heads, tokens, tokens]."""
        tokens = self.tokens(x)
        return attention(tokens @ self.query, tokens @ self.key)

    def tokens(self, x: Tensor) -> Tensor:
        """[batch, 1, tokens, narrow]."""
        return x.flatten(-2).mT.unsqueeze(-3)

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.matrix(x) @ self.tokens(x)
        channels = mixed.movedim(-3, -1).flatten(-2)  # [batch, tokens, narrow heads]
        output = channels @ self.weight.flatten(1).mT + self.bias
        return output.mT.unflatten(-1, x.shape[-2:])


def convolution(size: Size) -> nn.Conv2d:
    """3 x 3, of the size that it reads."""
    return nn.Conv2d(size.narrow, size.width, TAPS, padding=TAPS // 2)


def gated(size: Size) -> GatedAttention:
    """Attention that begins as such a convolution."""
    local = from_conv(convolution(size), heads="gaussian", alpha=ALPHA)
    return GatedAttention(local, size.head_dim, gate=GATE)


@dataclass(frozen=True)
class Arm:
    """What mixes tokens, and whether they are told where they stand."""

    mixer: Callable[[Size], nn.Module]
    learned: bool = False


ARMS = {
    "convolution": Arm(convolution),
    "attention from a convolution": Arm(gated),
    "attention, learned positions": Arm(Free, learned=True),
    "attention, no positions": Arm(Free),
}


class Block(nn.Module):
    """x + mixer(norm x), then x + MLP(norm x)."""

    def __init__(self, size: Size, arm: Arm) -> None:
        super().__init__()
        self.grid = size.grid
        self.before, self.norm = (nn.LayerNorm(size.width) for _ in range(2))
        self.narrow, self.mixer = nn.Linear(size.width, size.narrow), arm.mixer(size)
        inner = 6 * size.width
        self.mlp = nn.Sequential(
            nn.Linear(size.width, inner), nn.ReLU(), nn.Linear(inner, size.width)
        )

    def read(self, x: Tensor) -> Tensor:
        """What the mixer reads of x [batch, tokens, width]: [batch, narrow, *size]."""
        image: Tensor = self.narrow(self.before(x)).mT.unflatten(-1, self.grid.size)
        return image

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixer(self.read(x)).flatten(-2).mT
        return x + self.mlp(self.norm(x))


class Network(nn.Module):
    """Images [batch, 1, side, side] -> logits [batch, classes]."""

    def __init__(self, size: Size, arm: Arm) -> None:
        super().__init__()
        self.embed = nn.Linear(PATCH**2, size.width)
        self.place = Learned(size.grid.rows, size.width) if arm.learned else nn.Identity()
        self.blocks = nn.ModuleList(Block(size, arm) for _ in range(size.blocks))
        self.norm, self.out = nn.LayerNorm(size.width), nn.Linear(size.width, size.classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.place(self.embed(to_patches(images, (PATCH, PATCH))[0]))
        for block in self.blocks:
            x = block(x)
        # Nothing after the mean but a linear layer, so that a logit is a sum over tokens.
        return self.out(self.norm(x).mean(-2))


@torch.no_grad()
def fields(model: Network, images: Tensor) -> list[list[list[float]]]:
    """What each head of each block sees: centre down and across, radius, non-locality, gate.

    Means over images; the gate of a head without one is 0. Nothing for a convolution.
    """
    found = []
    x = model.place(model.embed(to_patches(images, (PATCH, PATCH))[0]))
    for block in model.blocks:
        mixer, read = block.mixer, block.read(x)
        if isinstance(mixer, nn.Conv2d):
            return []
        gates, grid = torch.zeros(HEADS), block.grid
        if isinstance(mixer, GatedAttention):
            # Keys are the padded image; a query stands on the token in the middle of its taps.
            grid = replace(mixer.local.grid(read.shape[-2:]), start=TAPS // 2)
            gates = mixer.gate.sigmoid()
        seen = receptive_field(mixer.matrix(read), grid)
        columns = (*seen.centre.mean(0).mT, seen.radius.mean(0), seen.non_locality.mean(0), gates)
        found.append([[round(float(x), 3) for x in row] for row in zip(*columns, strict=True)])
        x = block(x)
    return found


@torch.no_grad()
def logits(model: nn.Module, images: Tensor) -> Tensor:
    """Of all images, some at a time."""
    return torch.cat([model(some) for some in images.split(250)])


@dataclass
class Best:
    """The parameters that were right most often on images kept from training: early stopping."""

    model: nn.Module
    validation: Batch
    every: int
    right: float = -1.0
    step: int = 0

    def look(self, step: int) -> None:
        """Measure after every so many updates, and keep the better ones."""
        if step % self.every:
            return
        images, classes = self.validation
        right = 100 * float((logits(self.model, images).argmax(-1) == classes).double().mean())
        if right > self.right:
            self.right, self.step = right, step
            self.kept = {name: x.clone() for name, x in self.model.state_dict().items()}


def fit(
    model: Network, draw: Callable[[], Batch], validation: Batch, steps: int, rates: Rates
) -> Best:
    """Train; the model is left with the best of ten looks at the validation images."""
    best = Best(model, validation, max(steps // 10, 1))
    train(model, draw, steps, rates, best.look)
    model.load_state_dict(best.kept)
    return best
