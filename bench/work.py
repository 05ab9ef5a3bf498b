"""The useful work of a case, from which its rate and its share of the machine's limit come."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from bench.problem import Problem


@dataclass(frozen=True)
class Work:
    """What is counted, and which limit of the machine bounds it.

    amount: from the problem and its visible pairs to a number of `unit`
    limit: "flops" or "bytes" per second, or None where no single limit says much
    """

    unit: str
    amount: Callable[[Problem, int], float]
    limit: str | None


def _products(problem: Problem, pairs: int) -> float:
    # 2 products forward; backward 5 more, one of which makes the logits again.
    factor = 3.5 if problem.train else 1
    return factor * pairs * 2 * (problem.shape.width + problem.shape.out)


def _logits(problem: Problem, pairs: int) -> float:
    return pairs * 2 * problem.shape.width


def _taps(problem: Problem, pairs: int) -> float:
    # A product forward; backward one for value and one for the weights.
    return (3 if problem.train else 1) * pairs * 2 * problem.shape.out


def _triples(problem: Problem, pairs: int) -> float:
    return pairs * problem.shape.width


def _cache(problem: Problem, pairs: int) -> float:
    shape = problem.shape
    rows = shape.batch * shape.heads // shape.group * shape.m
    return rows * (shape.width + shape.out) * problem.dtype.itemsize


PRODUCTS = Work("GF/s", _products, "flops")
LOGITS = Work("GF/s", _logits, "flops")
"""Looking needs every logit once."""
TAPS = Work("GF/s", _taps, "flops")
"""Position alone: no logit is a product."""
TRIPLES = Work("G(i,j,d)/s", _triples, None)
"""Additive scores: an activation per query, key and channel, which is not an FMA."""
CACHE = Work("GB/s", _cache, "bytes")
"""One query per head: key and value are read once, and little is computed."""
CALL = Work("", lambda problem, pairs: 0.0, None)
"""So small that only the overhead of a call is seen."""
