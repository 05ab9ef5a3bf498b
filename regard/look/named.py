"""Layers by name, or by the part of a name that belongs to one alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

from regard.errors import ShapeError
from regard.look.record import Captured


def call_named(calls: Sequence[Captured], name: str) -> Captured:
    """The call of a module, by its name or whole parts of it: "layer.3", "encoder.layer.3".

    Of a module that was called several times, the last call.
    Raises ShapeError naming the layers there are, or those that the part leaves open.
    """
    found = [call for call in calls if call.name == name]
    if not found:
        found = [call for call in calls if f".{name}." in f".{call.name}."]
    if not found:
        _unknown(calls, name)
    if len({call.name for call in found}) > 1:
        fitting = ", ".join(dict.fromkeys(repr(call.name) for call in found))
        raise ShapeError(f"{name!r} is part of several names: {fitting}; give more of one")
    return found[-1]


def call_numbered(calls: Sequence[Captured], number: int) -> Captured:
    """The call with this number; raises ShapeError naming the layers there are."""
    for call in calls:
        if call.number == number:
            return call
    return _unknown(calls, number)


def _unknown(calls: Sequence[Captured], layer: int | str) -> NoReturn:
    """Raise the ShapeError that names the layers there are."""
    known = ", ".join(f"{call.number} {call.name!r}" for call in calls) or "none: nothing has run"
    raise ShapeError(f"there is no layer {layer!r} here; there are {known}")
