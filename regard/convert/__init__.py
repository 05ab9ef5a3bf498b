"""Layers and models that exist, as attention of `regard`."""

from regard.convert.layers import from_torch, swap

__all__ = ["from_torch", "swap"]
