"""Conversions to attention of `regard` and back: exact, and tested against the original."""

from regard.convert.conv import from_conv, to_conv
from regard.convert.layers import from_torch, swap

__all__ = ["from_conv", "from_torch", "swap", "to_conv"]
