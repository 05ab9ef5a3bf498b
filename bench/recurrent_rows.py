"""The rows of the recurrent family in C++ and in PyTorch: `python -m bench.recurrent --rows`.

The same matrix times the same values in the form `recurrent`, by the compiled kernels and, without
them, by the library's own chunks of PyTorch, which recompute in their backward pass. Width 64, keys
of length 1, decays between 0.9 and 1, erasing between 0 and 1; medians of 3 rounds in turns.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from unittest.mock import patch

import torch
from torch import Tensor

import regard
from bench import recurrent
from regard import Causal, Features, Identity
from regard.feature_map import identity
from regard.form import scan

ROUNDS = 3
SCORES: dict[str, Callable[..., Features]] = {
    "GLA": lambda decay: Features(identity, log_decay=decay),
    "DeltaNet": lambda beta: Features(identity, beta=beta),
    "Gated DeltaNet": lambda decay, beta: Features(identity, log_decay=decay, beta=beta),
    "KDA": lambda decay, beta: Features(identity, log_decay=decay, beta=beta),
}
IN = {"C++": scan.KERNELS, "PyTorch": None}


def problem(row: str, n: int, heads: int, *, train: bool) -> list[Tensor]:
    """Query, key, value, and what the row's score is made of."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(heads, n, recurrent.WIDTH) for _ in range(3))
    channels = {"GLA": recurrent.WIDTH, "KDA": recurrent.WIDTH, "Gated DeltaNet": 1}.get(row, 0)
    drawn = [query / 8, key / key.norm(dim=-1, keepdim=True), value]
    if channels:
        drawn.append(torch.rand(heads, n, channels) * -0.1)
    if row != "GLA":
        drawn.append(torch.rand(heads, n, 1))
    return [x.requires_grad_(train) for x in drawn]


def product(row: str, query: Tensor, key: Tensor, value: Tensor, *own: Tensor) -> Tensor:
    """What is measured."""
    parts = {"score": SCORES[row](*own), "mask": Causal(), "normalizer": Identity()}
    return regard.attention(query, key, **parts).matmul(value, form="recurrent")


def call(row: str, where: str, inputs: list[Tensor]) -> None:
    """The product, and its gradients where they are wanted, in C++ or in PyTorch."""
    with patch.object(scan, "KERNELS", IN[where]):
        recurrent.call(partial(product, row), inputs)


def measure(name: str, n: int, heads: int) -> None:
    """MiB beyond inputs, output and gradients, of "row, where", in this process."""
    row, where = name.split(", ")
    call(row, where, problem(row, 128, 1, train=True))
    inputs = problem(row, n, heads, train=True)
    before = recurrent.settled([*inputs, inputs[0]])
    call(row, where, inputs)
    print(recurrent.above(before))


def names() -> list[str]:
    """What `measure` knows."""
    return [f"{row}, {where}" for row in SCORES for where in IN]


def line(row: str, n: int, heads: int) -> str:
    """One line of the table."""
    cells = []
    for train in (False, True):
        inputs = problem(row, n, heads, train=train)
        calls = {where: partial(call, row, where, inputs) for where in IN}
        found = recurrent.seconds(calls, ROUNDS)
        cells += [f"{found[where] * 1e3:.1f}" for where in IN]
    cells += [f"{recurrent.added(f'{row}, {where}', n, heads):.0f}" for where in IN]
    return f"| {row} | {n} | {' | '.join(cells)} |"


def table(most: int, heads: int, rows: list[str]) -> None:
    """Of each row, up to `most` tokens."""
    for row in rows:  # the same numbers, before any time is taken
        inputs = problem(row, 300, 1, train=False)
        found = []
        for kernels in IN.values():
            with patch.object(scan, "KERNELS", kernels):
                found.append(product(row, *inputs))
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
    names = ("row", "tokens", "C++, ms", "PyTorch", "C++, with backward", "PyTorch", "C++, MiB")
    print(f"| {' | '.join(names)} | PyTorch |")
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        n = 1024
        while n <= most:
            print(line(row, n, heads), flush=True)
            n *= 4
