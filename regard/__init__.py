"""Compose any attention, run it in O(n) memory, and look at it.

The attention matrix is a value: `A = regard.attention(query, key, ...)` is a lazy linear operator
made of a score, a position part, a mask and a normalizer. `A @ value` is the output; `A[i]`,
`A.topk(8)`, `A.entropy()`, `A.pool(256)` look at it. Nothing of size n x n is ever stored.
"""

from regard import convert, nn, onnx  # noqa: F401, `regard.nn` needs no import of its own
from regard.dropout import Dropout
from regard.errors import (
    DeviceError as DeviceError,  # caught by hardly anyone: not among the names to learn
)
from regard.errors import (
    DtypeError,
    FormError,
    MissingPackageError,
    RegardError,
    ShapeError,
)
from regard.features import Features
from regard.form.recurrent import recur
from regard.interchange import load
from regard.look import look
from regard.mask import Causal, Dense, Documents, Mask, Padding, Prefix, Window
from regard.matrix import Attention, attention
from regard.normalizer import Identity, Normalizer, Relu, RowSum, Sigmoid, Softmax
from regard.position import T5, Alibi, Bias, Position, Rotary
from regard.score import Additive, Bilinear, Cosine, Distance, Dot, PositionOnly, Score
from regard.sdpa import scaled_dot_product_attention, sdpa_kernel

__all__ = [
    "T5",
    "Additive",
    "Alibi",
    "Attention",
    "Bias",
    "Bilinear",
    "Causal",
    "Cosine",
    "Dense",
    "Distance",
    "Documents",
    "Dot",
    "Dropout",
    "DtypeError",
    "Features",
    "FormError",
    "Identity",
    "Mask",
    "MissingPackageError",
    "Normalizer",
    "Padding",
    "Position",
    "PositionOnly",
    "Prefix",
    "RegardError",
    "Relu",
    "Rotary",
    "RowSum",
    "Score",
    "ShapeError",
    "Sigmoid",
    "Softmax",
    "Window",
    "attention",
    "load",
    "look",
    "recur",
    "scaled_dot_product_attention",
    "sdpa_kernel",
]

__version__ = "0.2.0"
