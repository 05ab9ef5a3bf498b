"""Layers: where parameters live. They build parts as they run, and return the lazy matrix."""

from regard.nn.attention import SelfAttention
from regard.nn.cache import KVCache, RecurrentState
from regard.nn.cell import CellState, RecurrentCell
from regard.nn.conv import ConvAttention
from regard.nn.gated import GatedAttention
from regard.nn.learnable import Learnable
from regard.nn.multihead import MultiHeadAttention
from regard.nn.position import Continuous, Learned, Sinusoidal
from regard.nn.recurrent import RecurrentAttention, generate

__all__ = [
    "CellState",
    "Continuous",
    "ConvAttention",
    "GatedAttention",
    "KVCache",
    "Learnable",
    "Learned",
    "MultiHeadAttention",
    "RecurrentAttention",
    "RecurrentCell",
    "RecurrentState",
    "SelfAttention",
    "Sinusoidal",
    "generate",
]
