"""`regard bench`: a few products on this machine, beside torch's own way to the same numbers.

The repository's `python -m bench` measures more, against more; this is what an installed package
can say about the machine it is on in a few minutes.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from regard import errors
from regard.commands.explain import clock, duration, positive
from regard.kernel import extension
from regard.mask import Causal, Window
from regard.matrix import Attention, attention
from regard.position import Alibi
from regard.score import Additive

EXAMPLES = """examples:
  regard bench
  regard bench --quick
  regard bench --only decode --rounds 21
"""
Operands = tuple[Tensor, Tensor, Tensor]
LONGEST = 20.0
"""Seconds after which a case stops, after three rounds at least."""


@dataclass(frozen=True)
class Case:
    """One product: what is computed, and how torch does it.

    sizes: batch, heads, key heads, rows, keys, width; quick: the same, smaller
    """

    name: str
    sizes: tuple[int, int, int, int, int, int]
    quick: tuple[int, int, int, int, int, int]
    ours: Callable[[Operands], Attention]
    theirs: Callable[[Operands], Tensor]
    way: str
    train: bool = False


def _causal_sdpa(operands: Operands) -> Tensor:
    return F.scaled_dot_product_attention(*operands, is_causal=True)


def _windowed_sdpa(operands: Operands) -> Tensor:
    i = torch.arange(operands[0].shape[-2])
    away = i[:, None] - i
    return F.scaled_dot_product_attention(*operands, attn_mask=(away >= 0) & (away <= WINDOW))


def _alibi_sdpa(operands: Operands) -> Tensor:
    i = torch.arange(operands[0].shape[-2])
    away = i[:, None] - i
    slopes = Alibi.of(operands[0].shape[-3]).slopes[:, None, None]
    bias = torch.where(away >= 0, -slopes * away, -torch.inf)
    return F.scaled_dot_product_attention(*operands, attn_mask=bias)


def _grouped_sdpa(operands: Operands) -> Tensor:
    return F.scaled_dot_product_attention(*operands, enable_gqa=True)


def _additive(operands: Operands) -> Tensor:
    query, key, value = operands
    weight = _weight(query)
    scores = torch.tanh(query[..., :, None, :] + key[..., None, :, :]) @ weight[..., None, :, None]
    return torch.softmax(scores[..., 0], -1) @ value


def _weight(query: Tensor) -> Tensor:
    heads, width = query.shape[-3], query.shape[-1]
    return torch.linspace(-1, 1, heads * width).reshape(heads, width)


WINDOW = 256
LONG, SHORT = (1, 8, 8, 4096, 4096, 64), (1, 4, 4, 512, 512, 32)
CASES = (
    Case(
        "causal", LONG, SHORT, lambda x: attention(x[0], x[1], mask=Causal()),
        _causal_sdpa, "scaled_dot_product_attention, is_causal",
    ),
    Case(
        "causal, trained", (1, 8, 8, 2048, 2048, 64), SHORT,
        lambda x: attention(x[0], x[1], mask=Causal()),
        _causal_sdpa, "the same, with backward", train=True,
    ),
    Case(
        "window of 256", LONG, SHORT,
        lambda x: attention(x[0], x[1], mask=Causal() & Window(WINDOW, 0)),
        _windowed_sdpa, "the same, with a bool mask",
    ),
    Case(
        "alibi, causal", LONG, SHORT,
        lambda x: attention(x[0], x[1], position=Alibi.of(x[0].shape[-3]), mask=Causal()),
        _alibi_sdpa, "the same, with a float mask",
    ),
    Case(
        "decode, grouped", (1, 32, 8, 1, 16384, 128), (1, 8, 2, 1, 2048, 32),
        lambda x: attention(x[0], x[1]), _grouped_sdpa, "the same, with enable_gqa",
    ),
    Case(
        "additive tanh", (1, 4, 4, 512, 512, 64), (1, 2, 2, 128, 128, 32),
        lambda x: attention(x[0], x[1], score=Additive(_weight(x[0]))),
        _additive, "the formula",
    ),
)  # fmt: skip


class BenchError(errors.RegardError):
    """A measurement that is not asked for well, or of numbers that differ."""


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to those of `regard`."""
    command = commands.add_parser(
        "bench",
        help="time a few products on this machine, beside torch",
        description="Time a few products on this machine, beside torch's way to the same numbers, "
        "which are compared first. A few minutes; seconds with --quick.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("--quick", action="store_true", help="small sizes, a few seconds")
    command.add_argument("--only", default="", metavar="WORD", help="cases with it in their names")
    command.add_argument("--rounds", type=positive, default=9, help="default: 9, in turns")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Measure the cases and print a table, row by row."""
    cases = [case for case in CASES if options.only in case.name]
    if not cases:
        names = "; ".join(case.name for case in CASES)
        raise BenchError(f"no case has {options.only!r} in its name. There are: {names}.")
    kernel = "compiled kernels" if extension.load() is not None else extension.missing()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, float32; {kernel}")
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if load > 0.5:
        print(f"the machine is busy (load {load:.1f}): times are too long, ratios less so")
    print(f"{'case':<16} {'sizes':<24} {'regard':>9} {'torch':>9} {'ratio':>18}  torch's way")
    for case in cases:
        print(row(case, options.rounds, quick=options.quick), flush=True)
    print("ratio: torch's time by regard's, the median over rounds and its range; above 1, regard "
          "is faster")  # fmt: skip
    return 0


def row(case: Case, rounds: int, *, quick: bool) -> str:
    """One line of the table; BenchError where the numbers differ."""
    sizes = case.quick if quick else case.sizes
    operands = draw(sizes, train=case.train)
    value = operands[2]
    calls: list[Callable[[], list[Tensor]]] = [
        lambda: results(case.ours(operands) @ value, operands, train=case.train),
        lambda: results(case.theirs(operands), operands, train=case.train),
    ]
    compare(case, [call() for call in calls])
    times: list[list[float]] = []
    with torch.set_grad_enabled(case.train):
        while len(times) < rounds and (len(times) < 3 or total(times) < LONGEST):
            times.append([clock(call) for call in calls])  # in turns: both meet the same neighbours
    ours, theirs = (statistics.median(side) for side in zip(*times, strict=True))
    ratios = sorted(other / own for own, other in times)
    spread = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f})"
    shape = "x".join(map(str, sizes))
    return (
        f"{case.name:<16} {shape:<24} {duration(ours):>9} {duration(theirs):>9} {spread:>18}  "
        f"{case.way}"
    )


def total(times: list[list[float]]) -> float:
    """All seconds so far."""
    return math.fsum(map(math.fsum, times))


def draw(sizes: tuple[int, ...], *, train: bool) -> Operands:
    """Query, key and value, always the same."""
    batch, heads, kv_heads, rows, keys, width = sizes
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch, heads, rows, width)] + 2 * [(batch, kv_heads, keys, width)]
    query, key, value = (torch.randn(shape, generator=generator) for shape in shapes)
    return tuple(x.requires_grad_(train) for x in (query, key, value))  # type: ignore[return-value]


def results(output: Tensor, operands: Operands, *, train: bool) -> list[Tensor]:
    """The output, and with training the gradients of its sum of squares."""
    if not train:
        return [output]
    return [output, *torch.autograd.grad(output.square().sum(), operands)]


def compare(case: Case, both: list[list[Tensor]]) -> None:
    """Raise unless both ways give the same numbers, as far as float32 can tell.

    A sum of m products of rounded numbers differs by about sqrt(m) roundings of its terms; both
    ways have theirs, so 1e-4 of the largest number is generous below m = 10^5.
    """
    for one, other in zip(*both, strict=True):
        off = float((one - other).detach().abs().max() / other.detach().abs().max())
        if not off < 1e-4:
            raise BenchError(
                f"{case.name}: regard and torch differ by {off:.1e} of the largest number, so no "
                "time is reported; this is a bug, please report it."
            )
