"""How the size of a tile decides speed: where the constants of regard/form/tiles.py come from.

python bench/tiles.py
"""

from __future__ import annotations

import platform
import statistics
import time

import torch

import regard
from regard import Attention, Causal, Window
from regard.form import tiles

ROUNDS = 5
SHAPES = [(1, 1, 8192, 64), (1, 8, 2048, 64), (8, 12, 512, 64), (8, 12, 128, 32)]
NUMBERS = [2**power for power in (17, 19, 20, 21, 22)]
SIDES = [64, 128, 256, 512, 1024]


def milliseconds(matrix: Attention, value: torch.Tensor) -> float:
    """Forward and backward, median of some rounds."""
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        (matrix @ value).sum().backward()
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times)


def main() -> None:
    """Print both tables."""
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}")
    print("\nForward and backward, milliseconds, by TILE_NUMBERS (side in brackets)\n")
    print("| shape | " + " | ".join(f"2^{n.bit_length() - 1}" for n in NUMBERS) + " |")
    print("|---" * (len(NUMBERS) + 1) + "|")
    for shape in SHAPES:
        query, key, value = (torch.randn(shape).requires_grad_() for _ in range(3))
        cells = []
        for tiles.TILE_NUMBERS in NUMBERS:
            time_taken = milliseconds(regard.attention(query, key), value)
            cells.append(f"{time_taken:.0f} ({tiles.side(shape[0] * shape[1], 1)})")
        print(f"| {shape} | " + " | ".join(cells) + " |", flush=True)
    tiles.TILE_NUMBERS = 2**21
    print("\nThe same for a causal window of 257 keys, n = 16384, one head, by side\n")
    print("| " + " | ".join(map(str, SIDES)) + " |\n" + "|---" * len(SIDES) + "|")
    query, key, value = (torch.randn(1, 16384, 64).requires_grad_() for _ in range(3))
    cells = []
    for tiles.LARGEST_SIDE in SIDES:
        tiles.NARROW_SIDE = tiles.LARGEST_SIDE
        matrix = regard.attention(query, key, mask=Causal() & Window(256, 0))
        cells.append(f"{milliseconds(matrix, value):.0f}")
    print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
