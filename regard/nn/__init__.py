"""Layers: where parameters live. They build parts as they run, and return the lazy matrix."""

from regard.nn.attention import SelfAttention
from regard.nn.block import DecoderLayer, EncoderLayer
from regard.nn.cache import KVCache, RecurrentState
from regard.nn.cell import CellState, RecurrentCell
from regard.nn.conv import ConvAttention
from regard.nn.cross import CrossAttention, Memory
from regard.nn.gated import GatedAttention
from regard.nn.learnable import Learnable
from regard.nn.multihead import MultiHeadAttention
from regard.nn.position import Continuous, Learned, Sinusoidal
from regard.nn.recurrent import RecurrentAttention, generate
from regard.nn.states import States
from regard.nn.transformer import Decoder, Encoder, EncoderDecoder

__all__ = [
    "CellState",
    "Continuous",
    "ConvAttention",
    "CrossAttention",
    "Decoder",
    "DecoderLayer",
    "Encoder",
    "EncoderDecoder",
    "EncoderLayer",
    "GatedAttention",
    "KVCache",
    "Learnable",
    "Learned",
    "Memory",
    "MultiHeadAttention",
    "RecurrentAttention",
    "RecurrentCell",
    "RecurrentState",
    "SelfAttention",
    "Sinusoidal",
    "States",
    "generate",
]
