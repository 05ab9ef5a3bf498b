"""Dropout on the weights that every form, tile size and backward pass reproduces."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from regard import errors
from regard.part import Part


def _draw_seed() -> int | Tensor:
    seed = torch.randint(2**62, ())
    return seed if torch.compiler.is_compiling() else int(seed.item())


@dataclass(frozen=True, repr=False)
class Dropout(Part):
    """Set each weight to 0 with the given probability, and divide the others by 1 - probability.

    Whether weight (lane, i, j) falls is a hash of the seed and of lane, i, j, so nothing is stored
    and any part of the matrix can be redone. A lane is one batch entry and head.
    seed: default drawn from torch's generator, so that torch.manual_seed fixes it
    Srivastava et al. 2014, JMLR 15; rows are hashed by the finaliser of splitmix64 (Steele, Lea,
    Flood 2014, OOPSLA, doi:10.1145/2660193.2660195), columns by two rounds of 32-bit products
    (multipliers of Wellons' lowbias32).

    >>> drop = Dropout(0.5, seed=1)
    >>> lanes, at = torch.arange(2), torch.arange(3)
    >>> whole, last = (drop.factors(lanes, rows, at, torch.float32) for rows in (at, at[2:]))
    >>> torch.equal(whole[:, 2:], last)
    True
    """

    probability: float
    seed: int | Tensor = field(default_factory=_draw_seed)

    def __post_init__(self) -> None:
        errors.check_number("a dropout probability", self.probability)
        if not 0 <= self.probability < 1:
            raise ValueError(f"a dropout probability is in [0, 1), not {self.probability}.")
        if isinstance(self.seed, Tensor):  # drawn where a graph is made, and read where it runs
            return
        errors.check_number("a dropout seed", self.seed, whole=True)
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"a seed is an integer in [0, 2**63), not {self.seed}.")

    @property
    def threshold(self) -> int:
        """A weight falls where its 24 random bits are below this."""
        return round(self.probability * 2**24)

    def factors(self, lanes: Tensor, i: Tensor, j: Tensor, dtype: torch.dtype) -> Tensor:
        """0 or 1 / (1 - probability) per pair: lanes [*batch], i [r], j [c] -> [*batch, r, c]."""
        rows = _mix(_mix(lanes + self.seed)[..., None] + i)[..., None]
        # Two 32-bit keys of the row, mixed with the column: 32 bits are twice as fast as 64.
        x = (rows & _LOW) ^ j
        x = ((x ^ (x >> 16)) * 0x7FEB352D) & _LOW
        x = x ^ (x >> 15)
        x = (((x + ((rows >> 32) & _LOW)) & _LOW) * 0x846CA68B) & _LOW
        # 24 random bits: as fine as a float32 fraction, and the same on every device.
        keep = ((x ^ (x >> 16)) >> 8) >= self.threshold
        return keep.to(dtype) / (1 - self.probability)


def _mix(x: Tensor) -> Tensor:
    """splitmix64's finaliser; int64 products wrap, and `>>` is made logical by a mask."""
    x = x + _GOLDEN
    x = (x ^ ((x >> 30) & (2**34 - 1))) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ ((x >> 27) & (2**37 - 1))) * _signed(0x94D049BB133111EB)
    return x ^ ((x >> 31) & (2**33 - 1))


def _signed(constant: int) -> int:
    return constant - 2**64 if constant >= 2**63 else constant


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_LOW = 0xFFFFFFFF
