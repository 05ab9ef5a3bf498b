"""The states of the parts of a model, as one."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from regard.nn.cache import State
from regard.nn.cross import Memory


class States:
    """States of layers, or of a layer's parts, in order: of the same tokens and sequences.

    `length` tokens were taken in so far, which the first part counts.

    >>> from regard.nn import Encoder, EncoderLayer, SelfAttention
    >>> state = Encoder([EncoderLayer(SelfAttention(16, 4)) for _ in range(2)]).state()
    >>> state.length, len(state.parts)
    (0, 2)
    """

    def __init__(self, parts: Sequence[State | States | Memory]) -> None:
        self.parts = tuple(parts)

    @property
    def length(self) -> int:
        """How many tokens were taken in."""
        return self.parts[0].length

    @property
    def bytes(self) -> int:
        """The size of what is kept."""
        return sum(part.bytes for part in self.parts)

    def reorder(self, index: Tensor) -> None:
        """Go on with other batch entries, as a beam search does: entry b becomes index[b]."""
        for part in self.parts:
            part.reorder(index)
