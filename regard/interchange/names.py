"""What a file may name: classes and functions of regard, and what their fields may be."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, is_dataclass
from functools import lru_cache
from typing import Any, Union, get_args, get_origin, get_type_hints

import torch
import torch.nn.functional as F

from regard import errors, feature_map, graph, neighborhood  # noqa: F401, for their masks
from regard.custom import Custom
from regard.feature_map import FeatureMap
from regard.grid import Grid
from regard.part import Part
from regard.runs import Runs


class FileError(errors.RegardError, ValueError):
    """What a file cannot hold, or a file that holds no matrix or part of regard."""


@lru_cache(maxsize=1)
def functions() -> dict[str, FeatureMap]:
    """The functions that a file can name: maps of `Features` that hold no tensors.

    >>> functions()["regard.feature_map.unit"](torch.tensor([3.0, 4.0]))
    tensor([0.6000, 0.8000])
    """
    own: dict[str, FeatureMap] = {
        f"regard.feature_map.{name}": item
        for name, item in vars(feature_map).items()
        if isinstance(item, types.FunctionType)
        and item.__module__ == feature_map.__name__
        and not name.startswith("_")
    }
    of_torch = (torch.exp, torch.relu, torch.tanh, torch.sigmoid, torch.square, torch.abs)
    own |= {f"torch.{item.__name__}": item for item in of_torch}
    of_nn = (F.elu, F.gelu, F.relu, F.silu, F.softplus)
    return own | {f"torch.nn.functional.{item.__name__}": item for item in of_nn}


def kinds() -> dict[str, type]:
    """The classes that a file can name: regard's parts, and the values they are made of.

    A part of your own has no name here: in another process it might stand for something else.
    """
    found: dict[str, type] = {"Grid": Grid, "Runs": Runs}
    for kind in _below(Part):
        own = kind.__module__.startswith("regard.") and not kind.__module__.startswith("regard.hf")
        if own and "__dataclass_fields__" in vars(kind) and kind is not Custom:
            found[kind.__name__] = kind
    return found


def _below(base: type[Any]) -> Iterator[type[Any]]:
    for kind in base.__subclasses__():
        yield kind
        yield from _below(kind)


def is_known(item: Any) -> bool:
    """Whether a mask and all that it holds have names."""
    if is_dataclass(item):
        named = kinds().get(type(item).__name__) is type(item)
        return named and all(is_known(getattr(item, f.name)) for f in fields(item))
    return not isinstance(item, Part) and not callable(item)


def hints(kind: type) -> dict[str, Any]:
    """What the fields of a class may be, as its annotations say."""
    told = get_type_hints(kind)
    return {f.name: told[f.name] for f in fields(kind) if f.init}


def is_of(item: object, hint: Any) -> bool:
    """Whether a value is what an annotation says, as far as those of parts go.

    >>> is_of((1, 2), tuple[int, ...]), is_of(None, float | None), is_of("a", int)
    (True, True, False)
    """
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        fits = any(is_of(item, each) for each in inner)
    elif origin is tuple and inner[-1] is not ...:
        fits = isinstance(item, tuple) and len(item) == len(inner)
        fits = fits and all(map(is_of, item, inner))  # type: ignore[call-overload]
    elif origin in (tuple, Sequence):
        fits = isinstance(item, tuple) and all(is_of(entry, inner[0]) for entry in item)
    elif origin is Callable:
        fits = callable(item)
    elif hint is float:
        fits = isinstance(item, (int, float)) and not isinstance(item, bool)
    else:
        fits = isinstance(item, hint) and (hint is bool or not isinstance(item, bool))
    return fits
