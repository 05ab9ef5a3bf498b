"""From tensors with names and words back to matrices and parts, trusting neither."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from regard import errors
from regard.interchange.names import FileError, functions, hints, is_of, kinds
from regard.matrix import Attention, attention
from regard.runs import Runs

NUMBERS = ("inf", "-inf", "nan")


@dataclass(frozen=True)
class Reading:
    """From words back to what was saved."""

    tensors: Mapping[str, Tensor]
    leaves: dict[str, Tensor] = field(default_factory=dict)
    whole: dict[tuple[Any, ...], Tensor] = field(default_factory=dict)

    def item(self, words: Any) -> Any:
        """What some words stand for."""
        found: Any
        match words:
            case list():
                found = tuple(self.item(word) for word in words)
            case {"number": text} if text in NUMBERS:
                found = float(text)
            case {"function": str(name)} if name in functions():
                found = functions()[name]
            case {"tensor": str(name)} if name in self.tensors:
                found = self.tensor(name, words.get("shape"), words.get("trains") is True)
            case {"part": "Attention", "fields": dict(given)}:
                found = self.matrix(given)
            case {"part": str(name), "fields": dict(given)}:
                found = self.part(name, given)
            case dict():
                raise FileError(
                    f"{json.dumps(words)[:80]} is no tensor of the file, function or part that it "
                    "may name."
                )
            case _:
                found = words
        return found

    def tensor(self, name: str, shape: Any, trains: bool) -> Tensor:
        """One tensor for all places that name it alike."""
        key = (name, trains, tuple(shape or ()))
        if key not in self.whole:
            tensor = self.tensors[name]
            if trains:
                tensor = self.leaves.setdefault(name, tensor.detach().requires_grad_())
            self.whole[key] = tensor if shape is None else tensor.expand(_sizes(name, shape))
        return self.whole[key]

    def part(self, name: str, given: Mapping[str, Any]) -> Any:
        """A part, made by its constructor of fields that are what their annotations say."""
        kind = kinds().get(name)
        if kind is None:
            raise FileError(
                f"it names a part {name}, which this regard does not have; a newer one may: "
                "pip install --upgrade regard"
            )
        told = hints(kind)
        held = {}
        for entry, words in given.items():
            if entry not in told:
                raise FileError(f"its {name} has a field {entry}, which this regard's has not.")
            held[entry] = self.item(words)
            if not is_of(held[entry], told[entry]):
                raise FileError(f"its {name} has {held[entry]!r} as {entry}; not {told[entry]}.")
        made = kind(**held)
        if isinstance(made, Runs):
            check_runs(made)
        return made

    def matrix(self, given: Mapping[str, Any]) -> Attention:
        """A matrix, made as `regard.attention` makes it."""
        held = {name: self.item(words) for name, words in given.items()}
        lanes = held.pop("lanes", None)
        matrix = attention(**held)
        if lanes is None:
            return matrix
        if (
            not is_of(lanes, Tensor)
            or lanes.shape != matrix.shape[:-2]
            or lanes.is_floating_point()
        ):
            raise FileError(
                f"its lanes must be whole numbers of shape {errors.show(matrix.shape[:-2])}."
            )
        return replace(matrix, given_lanes=lanes)


def _sizes(name: str, shape: Any) -> list[int]:
    if not is_of(shape, list) or not all(is_of(size, int) and size >= 0 for size in shape):
        raise FileError(f"its tensor {name} is to have the shape {shape!r}, which is none.")
    return list(shape)


def check_runs(runs: Runs) -> None:
    """Raise unless runs are what compiled kernels rely on: sorted, apart, within the columns."""
    rows = math.prod(runs.batch) * runs.rows
    offsets, start, stop = runs.offsets, runs.start, runs.stop
    whole = all(t.dtype in (torch.int32, torch.int64) and t.dim() == 1 for t in (start, stop))
    count = start.numel()
    good = (
        whole
        and min(runs.rows, runs.columns, *runs.batch, 0) == 0
        and offsets.dtype == torch.int64
        and tuple(offsets.shape) == (rows + 1,)
        and start.shape == stop.shape
        and start.dtype == stop.dtype
        and int(offsets[0]) == 0
        and int(offsets[-1]) == count
        and bool((offsets.diff() >= 0).all())
        and bool(((start >= 0) & (start < stop) & (stop <= runs.columns)).all())
    )
    if good and count > 1:
        first = torch.zeros(count, dtype=torch.bool, device=start.device)
        first[offsets[:-1][offsets.diff() > 0]] = True  # of its row
        good = bool((first[1:] | (stop[:-1] < start[1:])).all())
    if not good:
        raise FileError("its runs of visible keys are not sorted, apart, and within the keys.")
