"""The rulers of a map in a figure: words where there is room for them, else positions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from regard.look.drawing import MIDDLE, words_at
from regard.look.record import Captured
from regard.look.scene import Scene
from regard.look.shades import token_names, token_place

WORDS = 48  # tokens at most whose words are written beside the cells


@dataclass(frozen=True)
class Ruled:
    """Where the blocks of a map stand.

    lengths: queries and keys;  size: cells per side of a block;  room: pixels of the longer side
    """

    scene: Scene
    lengths: tuple[int, int]
    size: int
    room: float

    @classmethod
    def of(cls, scene: Scene, call: Captured, size: int, room: float) -> Ruled:
        """The rulers of a call."""
        return cls(scene, (call.query.shape[2], call.key.shape[2]), size, room)

    @property
    def counts(self) -> tuple[int, int]:
        """Rows and columns of blocks."""
        n, m = (-(-length // self.size) for length in self.lengths)
        return n, m

    @property
    def _has_words(self) -> bool:
        return self.size == 1 and max(self.counts) <= WORDS

    @property
    def cell(self) -> float:
        """Pixels of a block."""
        if self._has_words:
            return min(28.0, 1.23 * self.room / max(self.counts))
        return max(1.0, self.room / max(self.counts))

    @property
    def ruler(self) -> float:
        """Pixels left of and above the blocks."""
        if not self._has_words:
            return 40.0
        return 8 + 6.5 * max(len(x) for n in self.lengths for x in token_names(self.scene, n))

    @property
    def extent(self) -> tuple[float, float]:
        """Width and height with the rulers."""
        down, across = self.counts
        return self.ruler + across * self.cell, self.ruler + down * self.cell

    def places(self, axis: int) -> tuple[str, ...]:
        """What rows (axis 0) or columns (axis 1) are called in a table."""
        length = self.lengths[axis]
        return tuple(
            token_place(self.scene, at * self.size, length) for at in range(self.counts[axis])
        )

    def drawn(self, picture: Callable[..., str], shade: Tensor, x: float) -> list[str]:
        """The blocks with their rulers, from x on; picture draws shades into a rectangle."""
        down, across = self.counts
        left, top, cell = x + self.ruler, self.ruler, self.cell
        body = [picture(shade, left, top, across * cell, down * cell)]
        step = 1 if self._has_words else _nice(max(down, across) * self.size * 44 / self.room)
        for axis, length in enumerate(self.lengths):
            names: Sequence[str] = token_names(self.scene, length)
            for at in range(0, self.counts[axis] * self.size, step):
                label = names[at] if self._has_words else str(at)
                middle = (at / self.size + 0.5) * cell
                if axis:
                    across_at = left + middle
                    turn = f'transform="rotate(-90 {across_at:.1f} {top - 5:.1f})"'
                    body.append(
                        words_at(label, across_at, top - 5, size=12, more=f"{MIDDLE} {turn}")
                    )
                else:
                    end = f'{MIDDLE} text-anchor="end"'
                    body.append(words_at(label, left - 5, top + middle, size=12, more=end))
        return body


def _nice(rough: float) -> int:
    ten = 10 ** math.floor(math.log10(max(rough, 1)))
    return next(int(x * ten) for x in (1, 2, 5, 10) if x * ten >= rough)
