"""What is looked at: a call, a head, a query and a key, checked."""

from __future__ import annotations

from dataclasses import dataclass

from regard.errors import ShapeError
from regard.look.named import call_named, call_numbered
from regard.look.record import Captured
from regard.look.scene import Scene


@dataclass(frozen=True)
class Spot:
    """What a figure shows: a call, a head, a query and a key."""

    call: Captured
    head: int
    query: int
    key: int


def spot_of(scene: Scene, layer: int | str, head: int, query: int, key: int) -> Spot:
    """The call with a number or a name; raises ShapeError naming what there is."""
    if isinstance(layer, str):
        call = call_named(scene.captured, layer)
    else:
        call = call_numbered(scene.captured, layer)
    heads, n = call.query.shape[1:3]
    bounds = {"head": (head, heads), "query": (query, n), "key": (key, call.key.shape[2])}
    for name, (given, count) in bounds.items():
        if not 0 <= given < count:
            raise ShapeError(f"{name} is {given}; layer {layer!r} has 0 to {count - 1}")
    return Spot(call, head, query, key)
