"""The encodings that the experiments compare, each as it is used for text read left to right."""

from __future__ import annotations

from pathlib import Path

import torch

from examples.model import Encoding
from regard.nn import Sinusoidal
from regard.position import T5, Alibi, Kerple, Rotary

RESULTS = Path(__file__).parent / "results"


def t5(heads: int, farthest: int) -> T5:
    """T5's buckets for keys before the query; the last one begins before `farthest`."""
    return T5(
        torch.zeros(heads, 32, requires_grad=True), bidirectional=False, max_distance=farthest
    )


# What a bias does beyond the training length depends on which of its numbers were trained: T5's
# logarithms end at 32 here, so that 64 tokens train every bucket, as T5's 512 do for its 128; with
# 128 the last buckets stay at their first value, 0. FIRE is left out for its cost, three times
# that of the others: its network runs for every pair.
ENCODINGS = {
    "none": Encoding(),
    "sinusoidal": Encoding(on_input=Sinusoidal),
    "rotary": Encoding(on_attention=lambda heads, width: Rotary.of(width)),
    "T5": Encoding(on_attention=lambda heads, width: t5(heads, 32)),
    "T5, to 128": Encoding(on_attention=lambda heads, width: t5(heads, 128)),
    "Kerple": Encoding(on_attention=lambda heads, width: Kerple.of(heads)),
    "ALiBi": Encoding(on_attention=lambda heads, width: Alibi.of(heads)),
}
