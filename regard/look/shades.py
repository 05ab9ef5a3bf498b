"""Weights in blocks, where they lie on the colour scale, and what their axes are called."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from regard.look import visible
from regard.look.drawing import highest_lift
from regard.look.record import Captured
from regard.look.scene import Scene


def token_names(scene: Scene, length: int) -> Sequence[str]:
    """The words of an axis of this length, or its positions where no tokens are known."""
    labels = scene.tokens.labels
    return labels if len(labels) == length else [f"#{at}" for at in range(length)]


def token_place(scene: Scene, at: int, length: int) -> str:
    """A token with its position."""
    labels = scene.tokens.labels
    return f"{labels[at]} ({at})" if len(labels) == length else f"#{at}"


def block_size(call: Captured, most: int) -> int:
    """The side of the blocks, so that there are at most so many."""
    return -(-max(call.query.shape[2], call.key.shape[2]) // most)


def pooled(call: Captured, heads: slice, size: int) -> Tensor:
    """Mean weights of blocks over their visible cells, [heads, rows, columns]; NaN: masked."""
    share = visible.share(call, size)
    share = share[heads] if share.shape[0] > 1 else share
    mean = (
        call.matrix.pool(size)
        if heads == slice(None)
        else call.matrix.narrow((slice(None), heads)).pool(size)
    )
    return torch.where(share > 0, mean[0] / share, torch.nan)


def shades(call: Captured, heads: slice, size: int, scale: str) -> Tensor:
    """Where cells lie on the colour scale, 0 to 1."""
    weight = pooled(call, heads, size)
    if scale == "weight":
        return weight.clamp(0, 1)
    counts = visible.counts(call)
    counts = (counts[heads] if counts.shape[0] > 1 else counts).float()
    n = counts.shape[-1]
    sums = torch.nn.functional.pad(counts, (0, -n % size)).reshape(counts.shape[0], -1, size)
    rows = torch.full((sums.shape[1],), float(size))
    rows[-1] = n - size * (sums.shape[1] - 1)
    high = highest_lift(call.key.shape[2])
    lift = weight * (sums.sum(-1) / rows)[..., None]
    return ((lift.log2() + 4) / (high + 4)).clamp(0, 1)
