"""Take turns, after everybody's results have been found equal."""

from __future__ import annotations

import gc
import statistics
import sys
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bench.cases import Case
from bench.contestant import Contestant, MissingPeerError, Prepared, once, timed
from bench.machine import Limits
from bench.problem import Expected, Problem, Tensors

TURN = 0.02
"""Seconds of a turn at least: shorter calls are repeated, up to `MOST` times."""
MOST = 5000
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
"""Largest error over largest number: far above rounding, far below any other question's answer."""


class WrongResultError(Exception):
    """A contestant that answers something else: its time would mean nothing."""


@dataclass
class Timing:
    """What became of one contestant.

    seconds: of each round; ratios: its seconds over the first contestant's in the same round, per
    useful flop where the case is about prices; amount: useful work; note: why there are no times
    """

    contestant: Contestant
    detail: str = ""
    note: str = ""
    ran: str = ""
    pairs: int = 0
    amount: float = 0.0
    seconds: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """Seconds."""
        return statistics.median(self.seconds)

    @property
    def ratio(self) -> float:
        """How many times the first one's time; of rounds, so that a slow minute cancels."""
        return statistics.median(self.ratios)

    @property
    def rate(self) -> float:
        """Useful work per second."""
        return self.amount / self.median


def run(case: Case, rounds: int, limits: Limits) -> list[Timing]:
    """Prepare, compare and time the contestants of a case."""
    print(f"\n{case.name}", file=sys.stderr, flush=True)
    torch.compiler.reset()  # its limit on recompilation is per function, not per case
    if case.work.limit:
        limits.measure(case.work.limit)
    timings = [Timing(contestant) for contestant in case.contestants]
    problems = dict.fromkeys(contestant.problem for contestant in case.contestants)
    inputs = {problem: problem.tensors() for problem in problems}
    ready = _prepare(timings, inputs)
    for timing, _ in ready:
        problem = timing.contestant.problem
        explained = problem.explain(inputs[problem])
        timing.pairs, timing.ran = explained.pairs, f"{explained.form}: {explained.kernel}"
        timing.amount = case.work.amount(problem, explained.pairs)
    _take_turns(ready, inputs, rounds)
    first = timings[0]
    for timing, _ in ready:
        share = timing.amount / first.amount if case.price else 1
        pairs = zip(timing.seconds, first.seconds, strict=True)
        timing.ratios = [own / other / share for own, other in pairs]
        print(
            f"  {timing.contestant.name}: {1000 * timing.median:.4g} ms, {timing.ratio:.3g} x",
            file=sys.stderr,
            flush=True,
        )
    return timings


Ready = list[tuple[Timing, Prepared]]


def _prepare(timings: list[Timing], inputs: dict[Problem, Tensors]) -> Ready:
    """Those that are here and right; the others are noted, or stop the run if they are wrong."""
    ready: Ready = []
    expected: dict[Problem, list[Expected]] = {}
    answers: dict[Problem, Tensors] = {}
    for timing in timings:
        contestant = timing.contestant
        problem, tensors = contestant.problem, inputs[contestant.problem]
        try:
            prepared = contestant.prepare(problem, tensors)
            result = once(problem, tensors, prepared.call)
        except MissingPeerError as error:
            timing.note = str(error)
        except Exception as error:  # whatever a peer raises is what its row says
            if contestant.ours:
                raise
            lines = str(error).strip().splitlines() or [""]
            timing.note = f"failed: {type(error).__name__}: {lines[0]:.100}"
        if timing.note:
            print(f"  {contestant.name}: {timing.note}", file=sys.stderr, flush=True)
            continue
        if problem not in expected:
            expected[problem] = list(problem.expected(tensors))
        for name, at, value in expected[problem]:
            _compare(contestant, f"{name} (head {at[:2]})", result[name][at], value)
        for name, value in answers.setdefault(problem, result).items():
            _compare(contestant, name, result[name], value)
        timing.detail = prepared.detail
        ready.append((timing, prepared))
    return ready


def _compare(contestant: Contestant, name: str, got: Tensor, wanted: Tensor) -> None:
    """Stop the run where numbers differ, or are not numbers."""
    allowed = TOLERANCE[contestant.problem.dtype] * max(float(wanted.abs().max()), 1e-30)
    if got.shape != wanted.shape:
        raise WrongResultError(
            f"{contestant.name}: {name} has shape {tuple(got.shape)}, not {tuple(wanted.shape)}."
        )
    error = float((got.detach().to(wanted.dtype) - wanted).abs().max())
    if not error <= allowed:
        raise WrongResultError(
            f"{contestant.name}: {name} is off by {error:.3g}, allowed is {allowed:.3g}; a wrong "
            "contestant is not timed."
        )


def _take_turns(ready: Ready, inputs: dict[Problem, Tensors], rounds: int) -> None:
    """Each contestant once a round, in turn: a busy neighbour slows all of them."""
    repeats = []
    for timing, prepared in ready:  # a round that is dropped, and says how often to repeat
        problem = timing.contestant.problem
        seconds = timed(problem, inputs[problem], prepared.call)
        repeats.append(max(1, min(MOST, round(TURN / seconds))))
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for (timing, prepared), repeat in zip(ready, repeats, strict=True):
                problem = timing.contestant.problem
                timing.seconds.append(timed(problem, inputs[problem], prepared.call, repeat))
    finally:
        gc.enable()
