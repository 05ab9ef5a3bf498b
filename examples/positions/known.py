"""Every encoding of regard once, with random numbers where it learns them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from regard.nn import Continuous, Learned, Sinusoidal
from regard.position import (
    T5,
    Alibi,
    Cope,
    Fire,
    Kerple,
    Position,
    Relative,
    Rotary,
    Shaw,
    TransformerXL,
)

HEADS, WIDTH = 2, 8


class Known(NamedTuple):
    """An encoding: its name, what it acts on, how to make it."""

    name: str
    where: str
    make: Callable[[], Position | nn.Module | None]


def random(*shape: int) -> Tensor:
    """Numbers in the place of learned ones."""
    return torch.randn(shape, dtype=torch.float64)


def field(d_model: int) -> Continuous:
    """A path along a random field, dp/dt = W tanh(p) - p, which neither ends nor grows."""
    weight = 3 * d_model**-0.5 * torch.randn(d_model, d_model)

    def velocity(time: Tensor, place: Tensor) -> Tensor:
        return weight.to(place.dtype) @ place.tanh() - place

    return Continuous(d_model, velocity, start=torch.randn(d_model))


KNOWN = (
    Known("none", "nothing", lambda: None),
    Known("sinusoidal", "input", lambda: Sinusoidal(WIDTH)),
    Known("learned", "input", lambda: Learned(64, WIDTH)),
    Known("continuous (FLOATER)", "input", lambda: field(WIDTH)),
    Known("rotary", "query and key", lambda: Rotary.of(WIDTH)),
    Known("ALiBi", "score", lambda: Alibi.of(HEADS)),
    Known("T5", "score", lambda: T5(random(HEADS, 32))),
    Known("Kerple", "score", lambda: Kerple(random(HEADS).abs(), random(HEADS).abs())),
    Known("Relative (Swin)", "score", lambda: Relative(random(HEADS, 33), 16)),
    Known("FIRE", "score", lambda: Fire.of(HEADS, threshold=8.0)),
    Known("Shaw", "score", lambda: Shaw(random(17, WIDTH), 8)),
    Known(
        "Transformer-XL",
        "score",
        lambda: TransformerXL(random(HEADS, WIDTH, 16), random(HEADS, WIDTH), random(HEADS, WIDTH)),
    ),
    Known("CoPE", "score", lambda: Cope(random(16, WIDTH))),
)


def placed(known: Known, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor, Position | None]:
    """Query and key after a layer on the input, and the position part of the attention."""
    torch.manual_seed(0)
    made = known.make()
    if isinstance(made, nn.Module):
        with torch.no_grad():
            return made(query), made(key), None
    return query, key, made
