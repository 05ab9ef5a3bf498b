"""What attention knows of order without any encoding: nothing, or what a causal mask gives away."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from examples.model import Encoding, Size, Transformer
from regard import Causal, Mask, attention
from regard.position import Position

Vectors = tuple[Tensor, Tensor, Tensor]


def vectors(heads: int, n: int, width: int, seed: int = 0) -> Vectors:
    """Random queries, keys and values in float64, [heads, n, width] each."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, heads, n, width, generator=generator, dtype=torch.float64).unbind(0)


def order_gap(
    given: Vectors, place: Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Position | None]]
) -> float:
    """How far the output of permuted tokens is from the permuted output.

    place: tells query and key where they stand: their new vectors, and a part of the attention
    """
    order = torch.randperm(given[0].shape[-2], generator=torch.Generator().manual_seed(1))
    outputs = []
    for query, key, value in (given, [x[..., order, :] for x in given]):
        query, key, part = place(query, key)
        outputs.append(attention(query, key, position=part) @ value)
    return float((outputs[1] - outputs[0][..., order, :]).detach().abs().max())


def counted(n: int) -> Tensor:
    """A causal head without positions whose output at token t is 1 / t, [n].

    Equal keys give each of the t visible tokens the weight 1 / t, and only the first has value 1.
    Kazemnejad et al. 2023, arXiv:2305.19466, theorem 1.
    """
    equal, first = torch.ones(n, 1, dtype=torch.float64), torch.zeros(n, 1, dtype=torch.float64)
    first[0] = 1
    return (attention(equal, equal, mask=Causal()) @ first)[:, 0]


def prefix_gaps(depth: int, seeds: int, n: int = 32, width: int = 16) -> list[list[float]]:
    """What shuffling all tokens but the last does to the last output, [depth 1.., seeds]."""
    gaps: list[list[float]] = [[] for _ in range(depth)]
    for seed in range(seeds):
        x = vectors(1, n, width, seed)[0]
        order = torch.randperm(n - 1, generator=torch.Generator().manual_seed(seed)).tolist()
        moved = x[..., [*order, n - 1], :]
        for found in gaps:
            x, moved = (y + attention(y, y, mask=Causal()) @ y for y in (x, moved))
            found.append(float((moved - x)[..., -1, :].abs().max()))
    return gaps


def states(
    mask: Mask | None, depth: int, seed: int, shape: tuple[int, int], marked: bool
) -> list[Tensor]:
    """The vectors of an untrained transformer without positions, [sequences, n, width] by depth.

    marked: the first token of each sequence is one that stands nowhere else
    """
    torch.manual_seed(seed)
    model = Transformer(65, Encoding(), mask, Size(blocks=depth))
    tokens = torch.randint(64, shape)
    if marked:
        tokens[:, 0] = 64
    with torch.no_grad():
        return [state.double() for state in model.states(tokens)]


def probe(found: Tensor, squares: bool) -> float:
    """R^2 of a linear map from vectors to positions, on sequences that it was not fitted to.

    The first position is left out. squares: also of the squares of the centred channels
    """
    found = found[:, 1:] - found[:, 1:].mean((0, 1))
    if squares:
        found = torch.cat([found, found.square()], -1)
    found = torch.cat([found, torch.ones_like(found[..., :1])], -1)
    place = torch.arange(1.0, 1 + found.shape[1], dtype=found.dtype)
    fitted, tested = found.chunk(2)
    # A small ridge: 64 different tokens span less than their vectors and squares have channels.
    rows, ridge = fitted.flatten(0, 1), 1e-6 * torch.eye(found.shape[-1], dtype=found.dtype)
    targets = place.repeat(len(fitted))
    weights = torch.linalg.solve(rows.mT @ rows + ridge, rows.mT @ targets)
    wrong = tested @ weights - place
    return 1 - float(wrong.square().mean() / place.var(correction=0))
