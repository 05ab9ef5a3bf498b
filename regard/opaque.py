"""Functions that torch.compile leaves alone: its graph breaks there, and they run as they are."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def opaque(function: Callable[P, R]) -> Callable[P, R]:
    """Keep torch.compile out of a function and of all that it calls.

    `torch.compiler.disable` does that, but applying it at import would load the compiler, which
    takes as long as loading torch; so it is applied on the first call that is being compiled.

    >>> opaque(abs)(-2)
    2
    """

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling():
            apart: Callable[P, R] = torch.compiler.disable(function)
            return apart(*args, **kwargs)
        return function(*args, **kwargs)

    return call
