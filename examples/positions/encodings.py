"""The encodings that the experiments compare, each as it is used for text read left to right."""

from __future__ import annotations

from pathlib import Path

import torch

from examples.model import Encoding
from regard.nn import Sinusoidal
from regard.position import T5, Alibi, Fire, Kerple, Rotary

RESULTS = Path(__file__).parent / "results"


def t5(heads: int, farthest: int) -> T5:
    """T5's buckets for keys before the query; the last one begins before `farthest`."""
    return T5(
        torch.zeros(heads, 32, requires_grad=True), bidirectional=False, max_distance=farthest
    )


# Published models saw 512 tokens and more in training, these 64. What a bias does beyond the
# training length depends on which of its numbers were trained, so sizes shrink with the length:
# T5's logarithms end at 32 (every bucket is trained), and FIRE's threshold is 512 / 2048 of 64.
ENCODINGS = {
    "none": Encoding(),
    "sinusoidal": Encoding(on_input=Sinusoidal),
    "rotary": Encoding(on_attention=lambda heads, width: Rotary.of(width)),
    "T5": Encoding(on_attention=lambda heads, width: t5(heads, 32)),
    "T5, to 128": Encoding(on_attention=lambda heads, width: t5(heads, 128)),
    "Kerple": Encoding(on_attention=lambda heads, width: Kerple.of(heads)),
    "FIRE": Encoding(on_attention=lambda heads, width: Fire.of(heads, threshold=16.0)),
    "ALiBi": Encoding(on_attention=lambda heads, width: Alibi.of(heads)),
}
