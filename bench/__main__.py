"""Measure regard beside its peers: `python -m bench` from the repository root.

Nothing is reported where the laws are red: a fast wrong kernel is not fast. Peers are an extra
(`pip install pykeops`; FlexAttention and torch.compile need g++): one that is missing is named in
its row.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

from bench import footprint, machine, table
from bench.cases import CASES, Case
from bench.runner import Timing, WrongResultError, run

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "RESULTS.md"
ROUNDS = 7
QUIET = 0.5
"""Load average above which times, though hardly ratios, are too long."""


def laws_hold() -> bool:
    """Whether every form still gives the numbers of the definition."""
    command = [sys.executable, "-m", "pytest", "-q", "tests/test_laws.py", "-x"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    print(done.stdout[-3000:] if done.returncode else done.stdout[-80:], file=sys.stderr)
    return done.returncode == 0


def header(options: argparse.Namespace) -> str:
    """What was measured where, and with whom."""
    versions = ", ".join(f"{name} {version}" for name, version in machine.versions().items())
    laws = "tests/test_laws.py was skipped" if options.skip_laws else "tests/test_laws.py is green"
    return (
        f"`python -m bench`: {machine.described()}; {versions}; rounds: {options.rounds}; {laws}."
    )


def as_json(case: Case, timing: Timing, common: dict[str, object]) -> str:
    """One line: what was measured, by whom, where."""
    said: dict[str, object] = {
        "case": case.name,
        "contestant": timing.contestant.name,
        "detail": timing.detail,
        "note": timing.note,
        "ran": timing.ran if timing.contestant.ours else "",
        "seconds": timing.seconds,
    }
    if timing.seconds:
        said |= {
            "median": timing.median,
            "ratio": timing.ratio,
            "pairs": timing.pairs,
            "work": timing.rate / 1e9,
            "unit": case.work.unit,
        }
    return json.dumps(said | common)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__.splitlines()[0])
    parser.add_argument("--list", action="store_true", help="name the cases and stop")
    parser.add_argument("--only", default="", metavar="SUBSTRING", help="cases with it in the name")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"default {ROUNDS}")
    parser.add_argument("--skip-laws", action="store_true", help="the table then says so")
    parser.add_argument("--no-memory", action="store_true", help="without the memory of calls")
    parser.add_argument("--write", action="store_true", help="the tables go to bench/RESULTS.md")
    parser.add_argument("--json", type=Path, metavar="FILE", help="a line for each contestant")
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error("--rounds is at least 1")
    if not any(options.only in case.name for case in CASES):
        parser.error(f"no case has {options.only!r} in its name; --list names them")
    if options.write and options.only:
        parser.error("--write needs all cases, so that one table comes from one run: no --only")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Run the cases asked for."""
    faulthandler.enable()  # contestants are compiled code
    options = parse(arguments)
    cases = [case for case in CASES if options.only in case.name]
    if options.list:
        for case in cases:
            print(f"{case.name}: {'; '.join(c.name for c in case.contestants)}")
        return 0
    if not options.skip_laws and not laws_hold():
        print("the laws are red: no times are reported (--skip-laws to insist)", file=sys.stderr)
        return 1
    if os.getloadavg()[0] > QUIET:
        print(f"the machine is busy (load {os.getloadavg()[0]:.1f})", file=sys.stderr)
    warnings.filterwarnings("ignore", module="torch")  # what compilers of peers remark
    common = {
        "commit": commit(),
        "machine": machine.described(),
        "versions": machine.versions(),
        "laws": not options.skip_laws,
    }
    limits = machine.Limits()
    results: table.Results = []
    try:
        for case in cases:
            timings = run(case, options.rounds, limits)
            results.append((case, timings))
            if options.json:
                with options.json.open("a") as file:
                    file.writelines(as_json(case, timing, common) + "\n" for timing in timings)
    except WrongResultError as error:
        print(f"{case.name}\n{error}", file=sys.stderr)
        return 1
    footprints = [] if options.no_memory else measure_memory(cases)
    text = table.render(results, footprints, header(options), limits)
    if options.write:
        table.write(RESULTS, text)
    print(text)
    return 0


def measure_memory(cases: list[Case]) -> table.Footprints:
    """Each in a fresh process."""
    return [
        (case, contestant.name, footprint.of(case, contestant))
        for case in cases
        if case.footprint
        for contestant in case.contestants
        if not contestant.compiles
    ]


def commit() -> str:
    """The commit of the tree, with a plus where files differ from it."""
    command = ["git", "describe", "--always", "--dirty=+"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
