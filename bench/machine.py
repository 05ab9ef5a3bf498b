"""The machine: what it is in words, and how fast it multiplies and reads, measured here and now."""

from __future__ import annotations

import importlib.metadata
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress

import torch

SIDE = 2048
READ_NUMBERS = 2**27  # 512 MiB: many times any cache


def described() -> str:
    """Model, instruction sets, threads and versions; nothing that tells whose machine it is."""
    said = subprocess.run(["lscpu"], capture_output=True, text=True, check=False).stdout
    fields = dict(line.split(":", 1) for line in said.splitlines() if ":" in line)
    model = fields.get("Model name", "unknown CPU").strip()
    flags = set(fields.get("Flags", "").split())
    sets = {"avx2": "AVX2", "avx512f": "AVX-512", "avx512_bf16": "AVX-512 BF16", "amx_bf16": "AMX"}
    found = [name for flag, name in sets.items() if flag in flags] or ["no AVX2"]
    return f"{model} ({', '.join(found)}), {torch.get_num_threads()} threads"


def versions() -> dict[str, str]:
    """Versions of torch, which brings most peers, and of the others that are installed."""
    peers: dict[str, str] = {"torch": torch.__version__}
    with suppress(importlib.metadata.PackageNotFoundError):
        peers["pykeops"] = importlib.metadata.version("pykeops")
    try:
        command = ["g++", "-dumpfullversion"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        peers["g++"] = said.strip()
    except OSError:
        peers["g++"] = "missing"
    return peers


class Limits:
    """The best rates seen so far: a busy neighbour can only make them smaller.

    flops: multiplications and additions in float32 per second, all threads
    bytes: read from memory per second
    """

    def __init__(self) -> None:
        self.rates = {"flops": 0.0, "bytes": 0.0}
        self.peak = _own_peak()

    @property
    def source(self) -> str:
        """Where the peak of arithmetic comes from."""
        own = "regard.kernel.cpu.peak_flops()"
        return own if self.peak else f"the best of torch's own {SIDE}^3 float32 matrix products"

    def measure(self, limit: str) -> None:
        """Look again how fast the machine is."""
        if limit == "bytes":
            numbers = torch.ones(READ_NUMBERS)
            rate = 4 * READ_NUMBERS / _least_seconds(numbers.sum)
        elif self.peak is not None:
            rate = self.peak()
        else:
            one = torch.randn(SIDE, SIDE)
            rate = 2 * SIDE**3 / _least_seconds(lambda: one @ one)
        self.rates[limit] = max(self.rates[limit], rate)


def _own_peak() -> Callable[[], float] | None:
    """The kernel's own loop of FMAs, where regard has one: flops per second."""
    try:
        from regard.kernel import cpu
    except ImportError:
        return None
    return getattr(cpu, "peak_flops", None)


def _least_seconds(call: Callable[[], object]) -> float:
    call()
    times = []
    for _ in range(3):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)
