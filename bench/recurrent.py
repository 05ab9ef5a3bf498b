"""Recurrences beside attention, in training and in decoding: `python -m bench.recurrent`.

Training: causal linear attention in the form `recurrent`, in plain chunked PyTorch (all chunks at
once, autograd keeps what it likes), and torch's softmax attention, one head of width 64.
`--rows`: the rows of the family with a decay for each channel or with erasing, see
`bench.recurrent_rows`.
Decoding: time of one more token after t, and what is kept: softmax that computes the sequence
again, softmax with a KV cache, and a recurrent state.
A time is the median of the rounds, 5 up to 4096 tokens and 3 above: of the wall clock in training,
where ways take turns, and of the processor in decoding, which has one thread. Softmax attention is
left out above 16384 tokens, recomputing above 4096. "added" is the peak of a fresh process above
its inputs and gradients.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

import regard
from bench.memory import peak, resident
from regard import Causal, Features, RowSum
from regard.nn import SelfAttention

WIDTH, CHUNK = 64, 64
QUADRATIC = 16384  # tokens above which what grows with their square is left out
RECOMPUTED = 4096  # and what does so for each token
RECOMPUTED = 4096  # and what does so for each token
Way = Callable[..., Tensor]


def recurrent(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """What is measured."""
    parts = {"score": Features(), "mask": Causal(), "normalizer": RowSum(eps=1e-6)}
    return regard.attention(query, key, **parts).matmul(value, form="recurrent")


def chunked(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The same in the ten lines of PyTorch that one writes oneself."""
    query, key = F.elu(query) + 1, F.elu(key) + 1
    value = F.pad(value, (0, 1), value=1.0)
    q, k, v = (x.unflatten(-2, (-1, CHUNK)) for x in (query, key, value))
    states = (k.mT @ v).cumsum(-3)
    before = F.pad(states, (0, 0, 0, 0, 1, 0))[..., :-1, :, :]
    output = ((q @ k.mT).tril() @ v + q @ before).flatten(-3, -2)
    return output[..., :-1] / (output[..., -1:] + 1e-6)


def softmax(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Another function: what attention itself costs."""
    return F.scaled_dot_product_attention(query[None], key[None], value[None], is_causal=True)[0]


WAYS: dict[str, Way] = {
    "regard, recurrent": recurrent,
    "plain chunked PyTorch": chunked,
    "torch softmax attention": softmax,
}


def problem(n: int, heads: int = 1, *, train: bool) -> list[Tensor]:
    """Query, key and value."""
    torch.manual_seed(0)
    return [torch.randn(heads, n, WIDTH).requires_grad_(train) for _ in range(3)]


def call(way: Way, inputs: list[Tensor]) -> None:
    """Forward, and backward where gradients are wanted."""
    output = way(*inputs)
    if output.requires_grad:
        torch.autograd.grad(output, inputs, torch.ones_like(output))


def seconds(
    calls: dict[str, Callable[[], object]],
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """The median of each, in turns, after a round that is dropped."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, run in calls.items():
            start = clock()
            run()
            times[name].append(clock() - start)
    return {name: median(each[1:]) for name, each in times.items()}


def added(name: str, n: int, heads: int) -> float:
    """MiB beyond inputs and gradients, forward and backward, in a fresh process."""
    sizes = ["--tokens", str(n), "--heads", str(heads)]
    command = [sys.executable, "-m", "bench.recurrent", "--measure", name, *sizes]
    done = subprocess.run(
        command, cwd=Path(__file__).parent.parent, capture_output=True, check=True
    )
    return int(done.stdout) / 2**20


def measure(name: str, n: int, heads: int) -> None:
    """The same, in this process."""
    call(WAYS[name], problem(2 * CHUNK, train=True))
    inputs = problem(n, heads, train=True)
    before = settled([*inputs, inputs[0]])  # gradients and the output
    call(WAYS[name], inputs)
    print(above(before))


def settled(like: list[Tensor]) -> int:
    """Bytes that the process holds with room for tensors like these."""
    room = [torch.ones_like(x) for x in like]
    before = resident()
    del room
    return before


def above(before: int) -> int:
    """Bytes by which the peak has been higher."""
    return max(peak() - before, 0)


def training(most: int, heads: int) -> None:
    """The first table."""
    reference, ours = (way(*problem(512, train=False)) for way in (chunked, recurrent))
    torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-5)
    print("| tokens | way | forward, ms | forward + backward, ms | added, MiB |")
    print("|---|---|---|---|---|")
    n = 1024
    while n <= most:
        rounds, found = 5 if n <= 4096 else 3, []
        ways = {
            name: way for name, way in WAYS.items() if way is not softmax or n * heads <= QUADRATIC
        }
        for train in (False, True):
            inputs = problem(n, heads, train=train)
            found.append(
                seconds({name: partial(call, way, inputs) for name, way in ways.items()}, rounds)
            )
        for name in ways:
            one, both = (each[name] * 1e3 for each in found)
            print(
                f"| {n} | {name} | {one:.1f} | {both:.1f} | {added(name, n, heads):.0f} |",
                flush=True,
            )
        n *= 4


AFTER = (1, 16, 256, 1024, 4096, 16384, 100_000)
"""Tokens before the one that is timed."""


def decoding(most: int) -> None:
    """The second table: layers of 8 heads of width 64."""
    torch.manual_seed(0)
    torch.set_num_threads(1)  # so little work that a second thread only waits
    linear = SelfAttention(8 * WIDTH, 8, score=Features(), normalizer=RowSum(eps=1e-6))
    plain = SelfAttention(8 * WIDTH, 8)
    found: dict[str, dict[int, float]] = {}
    print("| after t tokens | way | one token, ms | kept, KiB |\n|---|---|---|---|")
    for t in (t for t in AFTER if t <= most):
        x = torch.randn(1, t, 8 * WIDTH)
        calls, kept = {}, {}
        if t <= RECOMPUTED:
            calls["recompute"], kept["recompute"] = lambda x=x: plain(x, mask=Causal()), 0
        for name, layer in (("KV cache", plain), ("recurrent state", linear)):
            if layer is linear or t <= QUADRATIC:
                state = layer.state()
                layer(x, state=state)
                kept[name] = state.bytes
                calls[name] = partial(layer.step, x[:, -1], state)
        for name, run in calls.items():  # not in turns: recomputing empties the caches
            rounds = 3 if name == "recompute" else 30
            each = seconds({name: run}, rounds, time.process_time)[name]
            found.setdefault(name, {})[t] = each
            print(f"| {t} | {name} | {each * 1e3:.2f} | {kept[name] / 1024:.0f} |", flush=True)
    print(f"\n{crossover(found['KV cache'], found['recurrent state'])}")


def crossover(cache: dict[int, float], state: dict[int, float]) -> str:
    """Between which lengths the state becomes the faster one for good."""
    slower = [t for t in cache if cache[t] <= state[t]]
    later = [t for t in cache if t > max(slower, default=0)]
    if not later:
        return f"A cache is as fast as the state up to {max(cache)} tokens."
    if not slower:
        return "The state is faster than a cache at every length."
    return (
        f"A cache is as fast up to {max(slower)} tokens, and the state faster from {later[0]} on."
    )


def main() -> None:
    """Print both tables."""
    from bench import recurrent_rows

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=65536, help="longest sequence in training")
    parser.add_argument(
        "--decode", type=int, default=AFTER[-1], help="longest in decoding; 0: none"
    )
    parser.add_argument("--heads", type=int, default=1, help="in training")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: training")
    parser.add_argument(
        "--rows",
        nargs="*",
        choices=recurrent_rows.SCORES,
        help="instead: these rows, or all, in C++ and in PyTorch",
    )
    known = [*WAYS, *recurrent_rows.names()]
    parser.add_argument("--measure", choices=known, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure in recurrent_rows.names():
        recurrent_rows.measure(options.measure, options.tokens, options.heads)
        return
    if options.measure:
        measure(options.measure, options.tokens, options.heads)
        return
    if options.device == "cuda":
        if not torch.cuda.is_available():
            parser.error("torch has no CUDA device here")
        from bench import recurrent_gpu

        recurrent_gpu.training(options.tokens)
        return
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads\n")
    if options.rows is not None:
        rows = options.rows or list(recurrent_rows.SCORES)
        recurrent_rows.table(options.tokens, options.heads, rows)
        return
    training(options.tokens, options.heads)
    print()
    if options.decode:
        with torch.inference_mode():
            decoding(options.decode)


if __name__ == "__main__":
    main()
