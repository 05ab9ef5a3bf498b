"""What every example does around its question: arguments, runs side by side, tables, pictures."""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import statistics
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from tqdm import tqdm

from bench import machine

Job = TypeVar("Job")
Result = TypeVar("Result")


def arguments(document: str, seeds: int = 3) -> argparse.ArgumentParser:
    """The arguments that the examples share."""
    parser = argparse.ArgumentParser(description=document.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=seeds, help=f"default {seeds}")
    parser.add_argument("--quick", action="store_true", help="only see that it runs, in seconds")
    parser.add_argument("--redraw", action="store_true", help="from numbers kept, train nothing")
    parser.add_argument("--resume", action="store_true", help="go on after numbers kept")
    parser.add_argument("--out", type=Path, help="folder for tables and pictures")
    parser.add_argument("--jobs", type=int, default=2, help="models trained at once, a thread each")
    return parser


def parse(
    parser: argparse.ArgumentParser, given: list[str] | None, out: Path
) -> argparse.Namespace:
    """Results go to `out`; those of --quick, which mean nothing, to a temporary folder."""
    options = parser.parse_args(given)
    if options.quick:
        options.seeds = options.jobs = 1
    if options.out is None:
        options.out = Path(tempfile.mkdtemp()) if options.quick else out
    return options


def run(
    work: Callable[[Job], Result],
    jobs: Sequence[Job],
    name: str,
    options: argparse.Namespace,
    about: str = "",
) -> list[Result]:
    """The result of each job, in order, which is lists of numbers; also kept as `name`.json.

    Each job is seeded by itself, so that --jobs changes no result; all jobs of one seed stand
    before those of the next, so that fewer seeds are a beginning of the list, and --resume goes on
    where a run was stopped. Sets
    `options.conditions`: the machine in words, torch's version, `about` what was learned from.
    """
    kept = options.out / f"{name}.json"
    if options.redraw:
        options.conditions, results = json.loads(kept.read_text())
        return results[: len(jobs)]
    options.conditions = (
        f"{machine.described()}, {options.jobs} at a time, a thread each; "
        f"torch {torch.__version__}. {about}"
    ).strip()
    options.out.mkdir(parents=True, exist_ok=True)
    results: list[Result] = []
    if options.resume and kept.exists():
        results = json.loads(kept.read_text())[1][: len(jobs)]
    jobs = jobs[len(results) :]
    with contextlib.ExitStack() as stack:
        found: Iterable[Result] = map(work, jobs)
        if options.jobs < 2:
            torch.set_num_threads(1)
        else:
            # A forked copy of torch's thread pool would hang: each process begins afresh.
            context = multiprocessing.get_context("spawn")
            pool = stack.enter_context(context.Pool(options.jobs, torch.set_num_threads, (1,)))
            found = pool.imap(work, jobs)
        for result in tqdm(found, total=len(jobs), unit="model"):
            results.append(result)
            lines = ",\n".join(map(json.dumps, results))
            kept.write_text(f"[{json.dumps(options.conditions)}, [\n{lines}\n]]\n")
    return results


def spread(numbers: Sequence[float], digits: int = 2) -> str:
    """Mean and standard deviation over seeds."""
    mean = f"{statistics.fmean(numbers):.{digits}f}"
    return mean if len(numbers) < 2 else f"{mean} ± {statistics.stdev(numbers):.{digits}f}"


def table(head: Iterable[object], rows: Iterable[Iterable[object]]) -> str:
    """A Markdown table; numbers after the first column stand on the right."""
    names = [str(name) for name in head]
    lines = [names, ["---"] + ["---:"] * (len(names) - 1), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def write(folder: Path, name: str, *parts: str) -> None:
    """Print a page of results and keep it as Markdown."""
    text = "\n\n".join(parts) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.md").write_text(text)
    print(text)
