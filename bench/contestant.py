"""A contestant: one way to solve a problem, prepared once and then called in turn with others.

What the preparation costs (compiling, a mask tensor, choosing the best of several chunk sizes) is
in nobody's time: peers are shown at their best.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from bench.problem import Problem, Tensors

Call = Callable[[], Tensor | tuple[Tensor, ...]]


class Prepared(NamedTuple):
    """What is timed, and what the preparation chose."""

    call: Call
    detail: str = ""


class MissingPeerError(Exception):
    """A peer that is not installed; the message says how to get it."""


@dataclass(frozen=True)
class Contestant:
    """One way to solve a problem.

    ours: it is regard; its failure stops the run, that of a peer is a remark in the table
    compiles: it brings a compiler into the process, so that its memory says nothing
    """

    name: str
    problem: Problem
    prepare: Callable[[Problem, Tensors], Prepared]
    ours: bool = False
    compiles: bool = False


def once(problem: Problem, tensors: Tensors, call: Call) -> Tensors:
    """One call, with its backward pass if the problem has one; its results by name."""
    with torch.set_grad_enabled(problem.train):
        return problem.answer(call(), tensors)


def timed(problem: Problem, tensors: Tensors, call: Call, repeat: int = 1) -> float:
    """Seconds of one call: the mean of `repeat` calls in a row."""
    with torch.set_grad_enabled(problem.train):
        start = time.perf_counter()
        if problem.train:
            for _ in range(repeat):
                problem.answer(call(), tensors)
        else:  # nothing around the call: the smallest take a few microseconds
            for _ in range(repeat):
                call()
        return (time.perf_counter() - start) / repeat


def fastest(problem: Problem, tensors: Tensors, options: dict[str, Call]) -> Prepared:
    """The fastest of a few ways: after a first call, the better time of two counts."""
    seconds = {}
    for name, call in options.items():
        once(problem, tensors, call)  # compiles, where there is something to compile
        seconds[name] = min(timed(problem, tensors, call) for _ in range(2))
    name = min(options, key=seconds.__getitem__)
    return Prepared(options[name], name)
