"""Conversions to attention of `regard` and back, tested against the original.

All are exact but `linearize`, which fits, and says what is lost.
"""

from regard.convert.conv import from_conv, to_conv
from regard.convert.layers import from_torch, swap
from regard.convert.linear import Lost, affine, hedgehog, linearize, lost
from regard.convert.recurrent import to_recurrent

__all__ = [
    "Lost",
    "affine",
    "from_conv",
    "from_torch",
    "hedgehog",
    "linearize",
    "lost",
    "swap",
    "to_conv",
    "to_recurrent",
]
