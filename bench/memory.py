"""Peak memory of products and of looking.

    python bench/memory.py

Each case runs in a fresh process. "before" is the process's resident memory with inputs, outputs
and gradients allocated and touched; "added" is how far its peak lies above that: what the library
adds. The weights themselves would take n * m * 4 bytes.
"""

from __future__ import annotations

import argparse
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

import regard
from regard import Additive, Alibi, Attention, Causal, Window

WIDTH = 64


def resident() -> int:
    """Bytes that the process holds now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def peak() -> int:
    """Bytes that the process held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def train(make: Callable[..., Attention], n: int) -> Callable[[], None]:
    """Forward and backward, with room for output and gradients taken before."""
    query, key, value = (torch.randn(1, n, WIDTH).requires_grad_() for _ in range(3))
    for tensor in (query, key, value):
        tensor.grad = torch.ones_like(tensor)
    upstream, room = torch.randn(1, n, WIDTH), torch.ones(1, n, WIDTH)

    def run() -> None:
        nonlocal room
        del room
        (make(query, key) @ value).backward(upstream)

    return run


def look(what: str, n: int) -> Callable[[], object]:
    """One way of looking at a causal matrix."""
    query, key = torch.randn(2, 1, n, WIDTH).unbind(0)
    matrix = regard.attention(query, key, mask=Causal())
    ways: dict[str, Callable[[], object]] = {
        "topk": lambda: matrix.topk(8),
        "entropy": matrix.entropy,
        "received": matrix.received,
        "pool": lambda: matrix.pool(256),
        "pool max": lambda: matrix.pool(256, "max"),
        "row": lambda: matrix[..., n // 2, :],
        "column": lambda: matrix[..., :, n // 2],
    }
    return ways[what]


def masked(n: int) -> Callable[[], object]:
    """Compile a causal window, which shows 257 of a million keys to each row."""
    query = key = torch.randn(n, 4)
    matrix = regard.attention(query, key, mask=Causal() & Window(256, 0))
    return lambda: matrix.runs


CASES: dict[str, Callable[[], Callable[[], object]]] = {
    "A @ v, forward and backward, n = 65536": lambda: train(regard.attention, 65536),
    "the same, causal with ALiBi": lambda: train(
        lambda q, k: regard.attention(q, k, mask=Causal(), position=Alibi.of(1)), 65536
    ),
    "the same, causal window of 257": lambda: train(
        lambda q, k: regard.attention(q, k, mask=Causal() & Window(256, 0)), 65536
    ),
    "additive tanh, forward and backward, n = 8192": lambda: train(
        lambda q, k: regard.attention(q, k, score=Additive(torch.ones(WIDTH))), 8192
    ),
    **{
        f"{what}, causal, n = 32768": lambda what=what: look(what, 32768)
        for what in ("topk", "entropy", "received", "pool", "pool max", "row", "column")
    },
    "mask Causal() & Window(256, 0), n = 1000000": lambda: masked(1_000_000),
}


def measure(name: str) -> None:
    """Run one case in this process and print its line of the table."""
    torch.manual_seed(0)
    warm = torch.randn(64, WIDTH)  # what libraries allocate once is not counted
    (regard.attention(warm.clone().requires_grad_(), warm, mask=Causal()) @ warm).sum().backward()
    run = CASES[name]()
    before, start = resident(), time.perf_counter()
    run()
    seconds = time.perf_counter() - start
    added = max(peak() - before, 0)
    print(f"| {name} | {before / 2**20:.0f} | {added / 2**20:.0f} | {seconds:.1f} |", flush=True)


def main() -> None:
    """Print the table, one fresh process a case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", choices=CASES, help="only this one, in this process")
    chosen = parser.parse_args().case
    if chosen:
        measure(chosen)
        return
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}\n")
    print("| case | before, MiB | added, MiB | seconds |\n|---|---|---|---|", flush=True)
    for name in CASES:
        subprocess.run([sys.executable, __file__, "--case", name], check=True)


if __name__ == "__main__":
    main()
