"""The tables of RESULTS.md, and where they stand in it."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from bench.cases import Case
from bench.machine import Limits
from bench.runner import Timing

BEGIN = "<!-- python -m bench: begin -->"
END = "<!-- python -m bench: end -->"

Results = list[tuple[Case, list[Timing]]]
Footprints = list[tuple[Case, str, int | None]]

HOW_TO_READ = """\
Contestants take turns: each round runs each of them once, after a round that is dropped, and after
their results were found equal to float64's (first and last head) and to each other's. Time is the
median of the rounds, range their least and most; ratio is how many times regard's time of the same
round it took (median of the rounds): above 1, regard is faster. Work is what the formula needs (2
products forward, 5 more backward, of visible pairs), whoever computes more; additive scores count
triples of query, key and channel, looking counts each logit once, decoding the bytes of key and
value. Shapes are (batch, heads, queries, width)."""


def render(results: Results, footprints: Footprints, header: str, limits: Limits) -> str:
    """Everything between the two marks."""
    blocks = [header, HOW_TO_READ + _of_the_peak(limits)]
    blocks.append(_ran(results))
    speed = [(case, timings) for case, timings in results if not case.price]
    if speed:
        head = ["case", "shape", "contestant", "time", "range", "ratio", "work", "of the peak"]
        rows = [row for case, timings in speed for row in _speed_rows(case, timings, limits)]
        blocks.append(_table(head, rows))
    for case, timings in results:
        if case.price:
            blocks.append(_price(case, timings))
    if footprints:
        head = ["case", "contestant", "added, MiB"]
        rows = [[case.name, name, _mebibytes(number)] for case, name, number in footprints]
        about = (
            "### Memory of a call\n\nWhat one call adds to its inputs: outputs, gradients, scratch."
        )
        blocks += [about, _table(head, rows)]
    return "\n\n".join(block for block in blocks if block) + "\n"


def write(path: Path, text: str) -> None:
    """Put the text between the marks, and leave the rest of the file as it is."""
    before, mark, rest = path.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (mark and end):
        raise SystemExit(f"{path} has no lines {BEGIN} and {END} between which to write.")
    path.write_text(f"{before}{BEGIN}\n{text}{END}{after}")


def _of_the_peak(limits: Limits) -> str:
    """What the last column is a share of."""
    flops, read = limits.rates["flops"], limits.rates["bytes"]
    said = [f"{flops / 1e9:.0f} GF/s in float32 ({limits.source})"] if flops else []
    said += [f"{read / 1e9:.0f} GB/s read from memory"] if read else []
    if not said:
        return ""
    twice = " Pairs of bfloat16 numbers (AVX-512 BF16) may be multiplied at twice float32's rate."
    return f"\nOf the peak: of the best rate seen in the same run, {' and '.join(said)}.{twice}"


def _ran(results: Results) -> str:
    """What `A.explain(value)` says: one line for each kernel, with its cases."""
    cases = defaultdict(list)
    for case, timings in results:
        for timing in timings:
            if timing.contestant.ours and timing.seconds:
                priced = f" ({timing.contestant.name})" if case.price else ""
                cases[timing.ran].append(f"{case.name}{priced}")
    if len(cases) == 1:
        return f"`A.explain(value)` says of every case: {next(iter(cases))}."
    usual = max(cases, key=lambda kernel: len(cases[kernel]), default="")
    said = {kernel: "; ".join(names) for kernel, names in cases.items()} | {usual: "all others"}
    lines = [f"- {kernel}: {said[kernel]}" for kernel in cases]
    return "\n".join(["What `A.explain(value)` says ran:\n", *lines])


def _speed_rows(case: Case, timings: list[Timing], limits: Limits) -> list[list[str]]:
    rows = []
    for timing in timings:
        name = timing.contestant.name + (f" ({timing.detail})" if timing.detail else "")
        row = [case.kind, str(case.problem.shape), name]
        if timing.note:
            rows.append([*row, timing.note, "", "", "", ""])
            continue
        limit = case.work.limit
        work = f"{timing.rate / 1e9:.3g} {case.work.unit}" if case.work.unit else ""
        share = f"{100 * timing.rate / limits.rates[limit]:.0f} %" if limit else ""
        rows.append([*row, *_times(timing), f"{timing.ratio:.3g}", work, share])
    return rows


def _price(case: Case, timings: list[Timing]) -> str:
    """What each part costs beside the plain product."""
    head = ["part", "time", "range", "visible pairs", "per pair, times the plain one"]
    rows = [[t.contestant.name, *_times(t), f"{t.pairs:,}", f"{t.ratio:.3g}"] for t in timings]
    title = f"### Price of parts, {case.passes}"
    about = (
        f"Causal, {case.problem.shape}, beside regard's own plain product, per visible pair (per "
        "useful flop, where the value has another width)."
    )
    return "\n\n".join([title, about, _table(head, rows)])


def _times(timing: Timing) -> list[str]:
    """Median and range, in the unit that suits the median."""
    scale, unit = next(
        (scale, unit)
        for least, scale, unit in ((10, 1, "s"), (1e-3, 1e3, "ms"), (0, 1e6, "µs"))
        if timing.median >= least
    )
    middle, least, most = (
        _digits(scale * seconds)
        for seconds in (timing.median, min(timing.seconds), max(timing.seconds))
    )
    return [f"{middle} {unit}", f"{least} to {most}"]


def _mebibytes(number: int | None) -> str:
    return "failed" if number is None else f"{number / 2**20:.0f}"


def _digits(number: float) -> str:
    """Three digits, and all those before the point.

    >>> _digits(1234.5), _digits(12.345)
    ('1234', '12.3')
    """
    return f"{number:.0f}" if number >= 100 else f"{number:.3g}"


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
