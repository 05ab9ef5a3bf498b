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
from typing import Any, TypeVar

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
    *,
    so_far: bool = False,
) -> list[Any]:
    """The result of each job, in order, which is lists of numbers; also kept as `name`.json.

    Each job is seeded by itself, so that --jobs changes no result; all jobs of one seed stand
    before those of the next, so that fewer seeds are a beginning of the list. Each result is also
    a line of `name`.partial.jsonl as soon as it is there, until `write` has written the page: what
    was interrupted goes on where it was, and with --resume more seeds are added to those of
    `name`.json. Sets `options.conditions`: the machine in words, torch's version, `about` what was
    learned from.
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
    partial = _partial(options.out, name)
    lines = partial.read_text().splitlines(keepends=True) if partial.exists() else []
    done = dict(json.loads(line) for line in lines if line.endswith("\n"))
    if options.resume and kept.exists():
        _, earlier = json.loads(kept.read_text())
        done = {repr(job): result for job, result in zip(jobs, earlier, strict=False)} | done
    left = [] if so_far else [job for job in jobs if repr(job) not in done]
    if done:
        kept_jobs = sum(repr(job) in done for job in jobs)
        print(f"{kept_jobs} of {len(jobs)} results are those of {partial}")
    with contextlib.ExitStack() as stack:
        found: Iterable[Result] = map(work, left)
        if options.jobs < 2:
            torch.set_num_threads(1)
        else:
            # A forked copy of torch's thread pool would hang: each process begins afresh.
            context = multiprocessing.get_context("spawn")
            pool = stack.enter_context(context.Pool(options.jobs, torch.set_num_threads, (1,)))
            found = pool.imap(work, left)
        file = stack.enter_context(partial.open("w"))
        file.writelines(json.dumps(line) + "\n" for line in done.items())
        file.flush()  # what is killed before its first result keeps the earlier ones
        for job, result in zip(left, tqdm(found, total=len(left), unit="model"), strict=True):
            done[repr(job)] = result
            file.write(json.dumps([repr(job), result]) + "\n")
            file.flush()
    results = [done.get(repr(job)) for job in jobs]
    text = ",\n".join(map(json.dumps, results))
    kept.write_text(f"[{json.dumps(options.conditions)}, [\n{text}\n]]\n")
    return results


def _partial(folder: Path, name: str) -> Path:
    return folder / f"{name}.partial.jsonl"


def spread(numbers: Sequence[float], digits: int = 2) -> str:
    """Mean and standard deviation over seeds."""
    mean = f"{statistics.fmean(numbers):.{digits}f}"
    return mean if len(numbers) < 2 else f"{mean} ± {statistics.stdev(numbers):.{digits}f}"


def table(head: Iterable[object], rows: Iterable[Iterable[object]]) -> str:
    """A Markdown table; numbers after the first column stand on the right."""
    names = [str(name) for name in head]
    lines = [names, ["---"] + ["---:"] * (len(names) - 1), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def write(folder: Path, name: str, *parts: str, so_far: bool = False) -> None:
    """Print a page of results and keep it as Markdown; unless so_far, they are complete."""
    text = "\n\n".join(parts) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.md").write_text(text)
    if not so_far:
        _partial(folder, name).unlink(missing_ok=True)
    print(text)
