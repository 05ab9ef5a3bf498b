"""Peak memory of one call, in a process of its own: `python -m bench.footprint CASE CONTESTANT`.

The process first solves the same problem for a few tokens, so that what libraries allocate once
is not counted; then inputs are made, the peak is set back, and the call runs once. The peak is
VmHWM of /proc/self/status and not getrusage's: that starts at the peak of the parent.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from bench.cases import CASES, Case
from bench.contestant import Contestant, once
from bench.problem import Problem

TOKENS = 256


def of(case: Case, contestant: Contestant) -> int | None:
    """Bytes that a call adds to the inputs: outputs, gradients, and whatever else it needs.

    None if that process failed: the times that were taken before are not lost for it.
    """
    command = [sys.executable, "-m", "bench.footprint", case.name, contestant.name]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        print(done.stderr[-1000:], file=sys.stderr)
        return None
    return int(done.stdout)


def _measure(case: Case, contestant: Contestant) -> int:
    problem = contestant.problem
    few = replace(problem, shape=problem.shape._replace(n=TOKENS))
    _solve(contestant, few)
    return _solve(contestant, problem)


def _solve(contestant: Contestant, problem: Problem) -> int:
    tensors = problem.tensors()
    prepared = contestant.prepare(problem, tensors)
    ctypes.CDLL(None).malloc_trim(0)  # what the preparation freed is not there for the call
    Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back to what is resident now
    before = _status("VmRSS")
    once(problem, tensors, prepared.call)
    return max(_status("VmHWM") - before, 0)


def _status(field: str) -> int:
    """A line of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def main() -> None:
    """Print the bytes of one contestant of one case."""
    case = next(case for case in CASES if case.name == sys.argv[1])
    print(_measure(case, next(c for c in case.contestants if c.name == sys.argv[2])))


if __name__ == "__main__":
    main()
