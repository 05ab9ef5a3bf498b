"""The layers that the experiments compare: softmax attention, and members of the recurrent family.

All are causal, have the same projections, and none has an encoding of positions of its own.
"""

from __future__ import annotations

from pathlib import Path

from examples.model import Size
from regard import Features, RowSum
from regard.nn import RecurrentAttention, SelfAttention

RESULTS = Path(__file__).parent / "results"


def softmax(size: Size) -> SelfAttention:
    """Attention: it keeps every key."""
    return SelfAttention(size.width, size.heads)


def linear(size: Size) -> SelfAttention:
    """Linear attention, phi(x) = elu(x) + 1, divided by its sums (Katharopoulos et al. 2020)."""
    # Their code's eps: a row that meets nothing is then small, and not 0 / 0.
    return SelfAttention(size.width, size.heads, score=Features(), normalizer=RowSum(eps=1e-6))


def decay(size: Size) -> SelfAttention:
    """Each token says how much of the state is kept (as in Mamba-2)."""
    return RecurrentAttention(size.width, size.heads, decay="token")


def delta(size: Size) -> SelfAttention:
    """Each token replaces the value that its key had (DeltaNet)."""
    return RecurrentAttention(size.width, size.heads, delta=True)


def gated_delta(size: Size) -> SelfAttention:
    """Both (Gated DeltaNet)."""
    return RecurrentAttention(size.width, size.heads, decay="token", delta=True)


MIXERS = {
    "softmax": softmax,
    "linear": linear,
    "decay": decay,
    "delta": delta,
    "gated delta": gated_delta,
}
