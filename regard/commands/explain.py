"""`regard explain`: what would run for some lengths and parts, what it costs, and what it took."""

from __future__ import annotations

import argparse
import ctypes
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regard import errors
from regard.dropout import Dropout
from regard.explain import Explanation
from regard.kernel import extension
from regard.literal import example, part
from regard.mask import Mask
from regard.matrix import Attention, attention
from regard.normalizer import Normalizer, Softmax
from regard.position import Position
from regard.score import Dot, Score

EXAMPLES = """examples:
  regard explain --shape 1,8,4096,64 --mask 'Causal()'
  regard explain --shape 1,8,4096,64 --position 'Alibi.of(8)' --mask 'Causal() & Window(256, 0)'
  regard explain --shape 1,32,1,128 --keys 32768 --kv-heads 8 --measure
  regard explain --shape 2,8,1024,64 --score 'Additive.of(8, 64)' --train --measure
  regard explain --shape 1,8,8192,64 --score 'Features()' --normalizer 'RowSum()' --mask 'Causal()'

Parts are written as in Python: names of regard, literals, [lists] as tensors, and + & | ~.
"""
KINDS: dict[str, type[Any]] = {
    "score": Score,
    "position": Position,
    "mask": Mask,
    "normalizer": Normalizer,
    "dropout": Dropout,
}
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16,
          "float16": torch.float16}  # fmt: skip


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to those of `regard`."""
    command = commands.add_parser(
        "explain",
        help="which form and kernel run for given lengths and parts, and what they cost",
        description="Say which form and kernel of regard run for a matrix, and what it costs in "
        "time and memory; with --measure, what it took here.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument(
        "--shape",
        type=shape,
        required=True,
        metavar="BATCH,HEADS,LENGTH,WIDTH",
        help="of the query",
    )
    command.add_argument("--keys", type=positive, metavar="M", help="keys (default: the length)")
    command.add_argument("--kv-heads", type=positive, metavar="G", help="heads of key and value")
    command.add_argument("--value-width", type=positive, metavar="E", help="default: the width")
    command.add_argument("--dtype", choices=DTYPES, default="float32", help="default: float32")
    for name, kind in KINDS.items():
        command.add_argument(f"--{name}", metavar="PART", help=f"such as {example(kind)}")
    command.add_argument("--form", help="run this form instead of the one that is chosen")
    command.add_argument("--measure", action="store_true", help="run it, a few seconds")
    command.add_argument("--train", action="store_true", help="measure with the backward pass")
    command.set_defaults(run=run)


def shape(text: str) -> tuple[int, ...]:
    """Four positive numbers with commas between them."""
    entries = text.split(",")
    if len(entries) != 4 or not all(e.strip().isdecimal() and int(e) for e in entries):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no shape; it must be batch,heads,length,width, such as 1,8,4096,64"
        )
    return tuple(map(int, entries))


def positive(text: str) -> int:
    """A positive whole number."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text} is not a positive whole number")
    return int(text)


def run(options: argparse.Namespace) -> int:
    """Explain, and measure if asked."""
    if options.train and not options.measure:
        raise errors.FormError("--train says how to measure; add --measure.")
    matrix, value = build(options)
    explanation = matrix.explain(value)
    if options.form is not None:
        from regard import form

        form.choose(matrix, options.form)  # raises where it does not apply
    print(explanation)
    print(estimate(explanation))
    if extension.load() is None:
        print(f"  note      {extension.missing()}")
    if options.measure:
        print(measured(matrix, value, options.form, train=options.train))
    return 0


def build(options: argparse.Namespace) -> tuple[Attention, Tensor]:
    """Random numbers of the shapes that were asked for, always the same, and the matrix."""
    batch, heads, length, width = options.shape
    keys, kv_heads = options.keys or length, options.kv_heads or heads
    generator = torch.Generator().manual_seed(0)

    def draw(*sizes: int) -> Tensor:
        try:
            numbers = torch.randn(sizes, generator=generator).to(DTYPES[options.dtype])
        except RuntimeError as error:  # of torch's allocator
            raise errors.ShapeError(f"{sizes} numbers do not fit into memory: {error}") from error
        return numbers.requires_grad_(options.train)

    given = {
        name: part(text, kind)
        for name, kind in KINDS.items()
        if (text := getattr(options, name)) is not None
    }
    matrix = attention(
        draw(batch, heads, length, width),
        draw(batch, kv_heads, keys, width),
        score=given.get("score", Dot()),
        position=given.get("position"),
        mask=given.get("mask"),
        normalizer=given.get("normalizer", Softmax()),
        dropout=given.get("dropout"),
    )
    return matrix, draw(batch, kv_heads, keys, options.value_width or width)


def estimate(explanation: Explanation) -> str:
    """The least time that this machine needs for that work and traffic, at rates measured now."""
    flops, read = rates()
    seconds = max(explanation.flops / flops, explanation.bytes / read)
    return (
        f"  estimate  {duration(seconds)} at least, at this machine's {flops / 1e9:,.0f} Gflop/s "
        f"of float32 matrix products and {read / 2**30:,.0f} GiB/s of reading"
    )


def rates() -> tuple[float, float]:
    """Floating point operations and bytes read in a second, the best of a few short runs."""
    square, line = torch.randn(1024, 1024), torch.ones(2**24)
    product = min(clock(lambda: square @ square) for _ in range(5))
    total = min(clock(line.sum) for _ in range(5))
    return 2 * 1024**3 / product, line.nbytes / total


def clock(call: Callable[[], object]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measured(matrix: Attention, value: Tensor, form: str | None, *, train: bool) -> str:
    """The median time of a second or two of calls, and the memory that one more adds."""

    def call() -> None:
        with torch.set_grad_enabled(train):
            output = matrix.matmul(value, form=form)
            if train:
                tensors = [t for t in (matrix.query, matrix.key, value) if t.requires_grad]
                torch.autograd.grad(output.sum(), [*tensors, *_learned(matrix)], allow_unused=True)

    first = clock(call)  # reads the runs of the mask, and wakes the threads
    times = [first]
    if first < 10:
        count = max(3, min(100, int(2 / max(first, 1e-5))))
        times = [clock(call) for _ in range(count)]
    peak = added_memory(call)
    memory = (
        "memory is measured on Linux only"
        if peak is None
        else f"{peak / 2**20:,.1f} MiB with results"
    )
    what = "forward and backward" if train else "forward"
    what += "" if form is None else f" in form {form}"
    return (
        f"  measured  {duration(statistics.median(times))} {what} (median of {len(times)}, from "
        f"{duration(min(times))}), {memory}, {torch.get_num_threads()} threads"
    )


def _learned(matrix: Attention) -> list[Tensor]:
    return [tensor for tensor in matrix.rule.tensors() if tensor.requires_grad]


def added_memory(call: Callable[[], object]) -> int | None:
    """Bytes at the peak of a call beyond those before it; None where the system does not say.

    Linux resets the peak of a process where one writes 5 to clear_refs (man proc); before that the
    C library gives back what earlier calls freed, which would be taken again without a trace.
    """
    reset, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    with suppress(AttributeError, OSError):  # only glibc has it
        ctypes.CDLL(None).malloc_trim(0)
    try:
        reset.write_text("5", encoding="ascii")
        before = _peak(status)
        call()
        return max(_peak(status) - before, 0)
    except (OSError, StopIteration):
        return None


def _peak(status: Path) -> int:
    lines = status.read_text(encoding="utf-8").splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


def duration(seconds: float) -> str:
    """A time as people say it.

    >>> duration(0.00123), duration(2.5)
    ('1.23 ms', '2.50 s')
    """
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return (
                f"{seconds / size:.3g} {unit}"
                if seconds >= 10 * size
                else f"{seconds / size:.2f} {unit}"
            )
    return f"{seconds * 1e6:.3g} us"
