"""Position: the parts that tell attention where its tokens stand.

on the score     Alibi, T5, Kerple, Relative (Toeplitz: by i - j alone), Fire, Shaw,
TransformerXL, Cope, and an explicit Bias; on grids Shift, Gaussian, Field
on query and key Rotary, with the scalings that stretch it
on the input     `regard.nn.Sinusoidal`, `Learned`, `Continuous`; `sinusoid` is their formula
"""

from regard.position.base import Band, Bias, Position, Positions
from regard.position.content import Cope, Shaw, TransformerXL
from regard.position.fire import Fire
from regard.position.grid import Field, Gaussian, Shift
from regard.position.rotary import Rotary
from regard.position.scaling import (
    DynamicNtk,
    Interpolation,
    Llama3,
    LongRope,
    Ntk,
    Proportional,
    Scaling,
    Yarn,
)
from regard.position.sinusoid import sinusoid
from regard.position.toeplitz import T5, Alibi, Kerple, Relative, Toeplitz

__all__ = [
    "T5",
    "Alibi",
    "Band",
    "Bias",
    "Cope",
    "DynamicNtk",
    "Field",
    "Fire",
    "Gaussian",
    "Interpolation",
    "Kerple",
    "Llama3",
    "LongRope",
    "Ntk",
    "Position",
    "Positions",
    "Proportional",
    "Relative",
    "Rotary",
    "Scaling",
    "Shaw",
    "Shift",
    "Toeplitz",
    "TransformerXL",
    "Yarn",
    "sinusoid",
]
