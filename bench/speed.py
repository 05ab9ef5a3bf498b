"""Speed of the forms beside torch's own attention.

    python bench/speed.py

Every round runs each contestant once, in turn, so that a busy neighbour slows all of them; the
table gives the median in milliseconds, the range, and the ratio of medians to torch's fused kernel.
A contestant whose result is not the first one's to 1e-4 stops the run.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import regard
from regard import Additive, Alibi, Causal, Window

ROUNDS = 7
SHAPES = [(1, 8, 2048, 64), (8, 12, 512, 64), (8, 12, 128, 32), (1, 1, 8192, 64)]

Contestant = Callable[[Tensor, Tensor, Tensor], Tensor]


def eager(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Softmax attention as everybody writes it, n x m in memory."""
    return torch.softmax(query @ key.mT * query.shape[-1] ** -0.5, -1) @ value


def eager_additive(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Additive attention as everybody writes it, n x m x d in memory."""
    total = torch.tanh(query[..., :, None, :] + key[..., None, :, :]).sum(-1)
    return torch.softmax(total, -1) @ value


def windowed(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """A causal window of 257 keys through torch's kernel, which needs the mask as a tensor."""
    at = torch.arange(query.shape[-2])
    mask = (at <= at[:, None]) & (at >= at[:, None] - 256)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


def form(name: str, **parts: object) -> Contestant:
    """One of our forms."""
    return lambda q, k, v: regard.attention(q, k, **parts).matmul(v, form=name)  # type: ignore[arg-type]


def additive(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Our additive score."""
    return regard.attention(query, key, score=Additive(torch.ones(query.shape[-1]))) @ value


PLAIN: dict[str, Contestant] = {
    "torch sdpa": F.scaled_dot_product_attention,
    "torch eager": eager,
    "regard dense": form("dense"),
    "regard tiled": form("tiled"),
}
CAUSAL: dict[str, Contestant] = {
    "torch sdpa": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
    "regard tiled": form("tiled", mask=Causal()),
    "regard tiled, ALiBi": form("tiled", mask=Causal(), position=Alibi.of(8)),
}
WINDOW: dict[str, Contestant] = {
    "torch sdpa, mask tensor": windowed,
    "regard tiled": form("tiled", mask=Causal() & Window(256, 0)),
}
ADDITIVE: dict[str, Contestant] = {"torch eager": eager_additive, "regard tiled": additive}


def once(contestant: Contestant, inputs: list[Tensor], *, train: bool) -> float:
    """Milliseconds of one product, with its backward pass if `train`."""
    start = time.perf_counter()
    if train:
        contestant(*inputs).sum().backward()
    else:
        with torch.no_grad():
            contestant(*inputs)
    return 1000 * (time.perf_counter() - start)


def compare(title: str, contestants: dict[str, Contestant], shape: tuple[int, ...]) -> None:
    """Print the rows of one case."""
    inputs = [torch.randn(shape).requires_grad_() for _ in range(3)]
    wanted = next(iter(contestants.values()))(*inputs)
    for name, contestant in contestants.items():
        if "ALiBi" not in name:  # it computes something else
            assert torch.allclose(contestant(*inputs), wanted, atol=1e-4), name
    for train in (False, True):
        times: dict[str, list[float]] = {name: [] for name in contestants}
        for _ in range(ROUNDS):
            for name, contestant in contestants.items():
                times[name].append(once(contestant, inputs, train=train))
        first = statistics.median(next(iter(times.values())))
        for name, found in times.items():
            middle = statistics.median(found)
            print(
                f"| {title} {shape} | {'forward + backward' if train else 'forward'} | {name} | "
                f"{middle:.1f} | {min(found):.1f} to {max(found):.1f} | {middle / first:.2f} |",
                flush=True,
            )


def main() -> None:
    """Print the table."""
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}")
    print("\n| case | pass | contestant | median, ms | range | ratio to the first |")
    print("|---|---|---|---|---|---|")
    for shape in SHAPES:
        compare("softmax", PLAIN, shape)
    compare("causal", CAUSAL, (1, 8, 2048, 64))
    compare("causal window 257", WINDOW, (1, 8, 8192, 64))
    compare("additive tanh", ADDITIVE, (1, 4, 512, 64))


if __name__ == "__main__":
    main()
