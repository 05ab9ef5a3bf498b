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
from regard.position import T5, Cope, Fire, Kerple, Position, Shaw, TransformerXL

WIDTH = 64
LENGTHS = (16384, 65536)

POSITIONS: dict[str, Callable[[], Position]] = {
    "Alibi": lambda: Alibi.of(1),
    "T5": lambda: T5.of(1, bidirectional=False),
    "Kerple": lambda: Kerple.of(1),
    "Fire": lambda: Fire.of(1),
    "Shaw": lambda: Shaw.of(WIDTH, 64, 0),
    "TransformerXL": lambda: TransformerXL.of(1, WIDTH, WIDTH),
    "Cope": lambda: Cope.of(WIDTH, 64),
}


def resident() -> int:
    """Bytes that the process holds now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def peak() -> int:
    """Bytes that the process held at most; getrusage would begin with those of its parent."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024


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


def placed(name: str, n: int) -> Callable[[], None]:
    """Forward and backward with an encoding on the score.

    A full walk over n x n pairs in PyTorch would take long, so rows see a window of keys: what a
    call holds at its peak is what each token needs and a few tiles, however many tiles there are.
    CoPE's tiles are whole rows, whatever the mask: it computes the last 64 rows, forward alone.
    """
    window, part = Causal() & Window(256, 0), POSITIONS[name]()
    if name != "Cope":
        return train(lambda q, k: regard.attention(q, k, mask=window, position=part), n)
    query, key, value = torch.randn(3, 1, n, WIDTH).unbind(0)
    first = n - 64

    def run() -> None:
        with torch.no_grad():
            rows = query[:, first:]
            mask, last = Causal(offset=first), part.at(first)
            regard.attention(rows, key, mask=mask, position=last) @ value

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
    **{
        f"position {name}, n = {n}": lambda name=name, n=n: placed(name, n)
        for name in POSITIONS
        for n in LENGTHS
    },
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
    parser.add_argument("--only", default="", metavar="SUBSTRING", help="cases with it in the name")
    options = parser.parse_args()
    if options.case:
        measure(options.case)
        return
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}\n")
    print("| case | before, MiB | added, MiB | seconds |\n|---|---|---|---|", flush=True)
    for name in (name for name in CASES if options.only in name):
        subprocess.run([sys.executable, __file__, "--case", name], check=True)


if __name__ == "__main__":
    main()
