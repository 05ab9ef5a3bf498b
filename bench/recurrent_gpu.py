"""The recurrence on a GPU, in training: `python -m bench.recurrent --device cuda`.

Causal linear attention of 32 heads of width 64 in float32: the form `recurrent` in Triton and in
PyTorch, plain chunked PyTorch, and torch's softmax attention, another function. A time is the
median of 10 rounds in which ways take turns, the device waited for; "added" is the peak of what
torch allocates, above inputs and gradients. Each way to the same numbers is compared first.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from bench.recurrent import QUADRATIC, WAYS, call, recurrent, seconds

HEADS, WIDTH, ROUNDS = 32, 64, 10


@contextmanager
def asked(triton: bool) -> Iterator[None]:
    """Triton's kernels, or PyTorch's products."""
    before = os.environ.get("REGARD_TRITON", "0")
    os.environ["REGARD_TRITON"] = str(int(triton))
    try:
        yield
    finally:
        os.environ["REGARD_TRITON"] = before


def in_triton(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """What is measured."""
    with asked(True):
        return recurrent(query, key, value)


def in_pytorch(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The same matrix, without Triton."""
    with asked(False):
        return recurrent(query, key, value)


OURS = {"regard, recurrent, Triton": in_triton, "regard, recurrent, PyTorch": in_pytorch}
OTHERS = {name: way for name, way in WAYS.items() if way is not recurrent}
SAME = OURS | {name: way for name, way in OTHERS.items() if "softmax" not in name}


def problem(n: int, device: str) -> list[Tensor]:
    """Query, key and value."""
    torch.manual_seed(0)
    return [torch.randn(HEADS, n, WIDTH, device=device).requires_grad_() for _ in range(3)]


def results(way: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """The output and the gradients."""
    output = way(*inputs)
    return [output, *torch.autograd.grad(output, inputs, torch.ones_like(output))]


def compare(device: str, tokens: int = 512) -> None:
    """Raise unless all ways to one matrix agree, gradients included."""
    inputs = problem(tokens, device)
    wanted = results(OTHERS["plain chunked PyTorch"], inputs)
    for way in SAME.values():
        for found, other in zip(results(way, inputs), wanted, strict=True):
            torch.testing.assert_close(found, other, rtol=1e-3, atol=1e-4)


def clock() -> float:
    """Seconds, when the device has done all that it was given."""
    torch.cuda.synchronize()
    return time.perf_counter()


def added(way: Callable[..., Tensor], inputs: list[Tensor]) -> float:
    """MiB above inputs, output and gradients, forward and backward."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call(way, inputs)
    kept = 4 * inputs[0].numel() * inputs[0].element_size()
    return max(torch.cuda.max_memory_allocated() - before - kept, 0) / 2**20


def training(most: int) -> None:
    """The table."""
    compare("cuda")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}\n")
    print("| tokens | way | forward, ms | forward + backward, ms | added, MiB |")
    print("|---:|---|---:|---:|---:|")
    for n in (n for n in (1024, 4096, 16384, 65536, 262144) if n <= most):
        inputs = problem(n, "cuda")
        fixed = [x.detach() for x in inputs]
        ways = OURS | {k: v for k, v in OTHERS.items() if "softmax" not in k or n <= QUADRATIC}
        forward = seconds({k: partial(call, v, fixed) for k, v in ways.items()}, ROUNDS, clock)
        both = seconds({k: partial(call, v, inputs) for k, v in ways.items()}, ROUNDS, clock)
        for name, way in ways.items():
            times = f"{forward[name] * 1e3:.3g} | {both[name] * 1e3:.3g}"
            print(f"| {n} | {name} | {times} | {added(way, inputs):.0f} |", flush=True)
