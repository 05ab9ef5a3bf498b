"""A matrix as the compiled kernels know it: kinds by number, biases by offset or by pair, runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.form import separable
from regard.kernel import cpu
from regard.normalizer import Normalizer, Relu, Sigmoid, Softmax
from regard.part import per_head
from regard.position.base import Bias, Position, terms
from regard.position.toeplitz import Toeplitz
from regard.runs import Runs
from regard.score import Additive, Bilinear, Cosine, Distance, Dot, PositionOnly, Score

if TYPE_CHECKING:
    from regard.matrix import Attention

# As in csrc/problem.h.
DOT, DISTANCE, LEAKY, RECIPROCAL, TANH = range(5)
NORMALIZERS: dict[type[Normalizer], int] = {Softmax: 0, Sigmoid: 1, Relu: 2}
SCORES: tuple[type[Score], ...] = (Dot, Bilinear, Cosine, Distance, PositionOnly, Additive)
ACTIVATIONS = ("tanh", "sigmoid", "leaky_relu", "relu")


def needs(matrix: Attention) -> str | None:
    """The sentence why the kernels do not know one of the parts, or None."""
    score, normalizer = matrix.score, matrix.normalizer
    if type(score) not in SCORES:
        return f"has no kernel for the score {score}."
    if isinstance(score, Additive) and score.activation not in ACTIVATIONS:
        return f"has no kernel for the activation {score.activation!r}."
    if type(normalizer) not in NORMALIZERS:
        return f"has no kernel for the normalizer {normalizer}."
    biases = [part for part in terms(matrix.position) if _is_bias(part)]
    if any(not isinstance(part, (Bias, Toeplitz)) for part in biases):
        return f"has no kernel for the position {matrix.position}."
    if sum(type(part) is Bias for part in biases) > 1:
        return "adds one Bias at most; add their tensors up first: Bias(one + other)."
    return None


class Tensors(NamedTuple):
    """Tensors with gradients, as the kernels want them but for value, which comes third."""

    query: Tensor
    key: Tensor
    weight: Tensor | None
    toeplitz: Tensor | None
    bias: Tensor | None
    sink: Tensor | None


def tensors(matrix: Attention) -> tuple[int, Tensors]:
    """The kind of score, and what it compares."""
    query, key = matrix.rule.operands(matrix.query, matrix.key)
    score, wide = matrix.score, torch.promote_types(query.dtype, torch.float32)
    kind, weight, constant = DOT, None, None
    if isinstance(score, Additive):
        kind, query, key, weight, constant = _additive(score, query, key, wide)
    elif isinstance(score, Distance):
        scale = torch.as_tensor(score.scale, dtype=wide)
        kind, weight = DISTANCE, -scale[..., None].expand(*scale.shape, query.shape[-1])
    elif isinstance(score, PositionOnly):
        query, key = query[..., :0], key[..., :0]
    elif isinstance(scale := score.scale, Tensor):  # type: ignore[attr-defined]
        query = query.to(wide)
        query = query * per_head(scale, query)
    biases = [part for part in terms(matrix.position) if _is_bias(part)]
    explicit = next((part.bias for part in biases if isinstance(part, Bias)), None)
    sink = matrix.normalizer.sink if isinstance(matrix.normalizer, Softmax) else None
    return kind, Tensors(
        query,
        key,
        weight,
        _by_offset(matrix, [part for part in biases if isinstance(part, Toeplitz)], constant, wide),
        None if explicit is None else torch.atleast_2d(explicit),
        None if sink is None else torch.as_tensor(sink, dtype=wide),
    )


def _additive(
    score: Additive, query: Tensor, key: Tensor, wide: torch.dtype
) -> tuple[int, Tensor, Tensor, Tensor, Tensor | None]:
    """Kind, query, key, weight, and what is added to every score."""
    weight, constant = score.weight, None
    if score.activation not in ("tanh", "sigmoid"):
        return LEAKY, query, key, weight, None
    if score.activation == "sigmoid":  # sigmoid(x) = 1/2 + tanh(x / 2) / 2
        query, key, weight = query.to(wide) / 2, key.to(wide) / 2, weight.to(wide) / 2
        constant = weight.sum(-1)
    apart = None if wide == torch.float64 else separable.tables(query, key, weight)
    if apart is None:
        return TANH, query, key, weight, constant
    return RECIPROCAL, *apart, constant


def _by_offset(
    matrix: Attention, parts: list[Toeplitz], constant: Tensor | None, wide: torch.dtype
) -> Tensor | None:
    """The sum of Toeplitz biases as one vector, [*batch, heads, n + m - 1 + some room]."""
    n, m = matrix.shape[-2:]
    if (not parts and constant is None) or 0 in (n, m):
        return None
    total = torch.zeros(n + m - 1, dtype=wide)
    if constant is not None:
        total = total + constant[..., None]
    for part in parts:
        total = total + part.vector(n, m, matrix.device).to(wide)
    return F.pad(total, (0, cpu.rows_of_a_tile()))


def mask(matrix: Attention) -> tuple[Tensor | None, ...]:
    """Offsets, starts and stops of the runs, and the lanes that dropout depends on."""
    runs: Runs | None = matrix.runs
    lanes = None if matrix.dropout is None else matrix.lanes.contiguous()
    if runs is None:
        return None, None, None, lanes
    return runs.offsets, runs.start.int(), runs.stop.int(), lanes


def numbers(matrix: Attention, kind: int) -> cpu.Numbers:
    """What is not a tensor; kind: of the score, as `tensors` says."""
    score, normalizer, dropout = matrix.score, matrix.normalizer, matrix.dropout
    scale, softcap, slope = 1.0, 0.0, 0.0
    if isinstance(score, Additive):
        slope = score.slope if score.activation == "leaky_relu" else 0.0
    elif isinstance(score, (Dot, Bilinear, Cosine)) and not isinstance(score.scale, Tensor):
        given = score.scale
        scale = max(matrix.query.shape[-1], 1) ** -0.5 if given is None else float(given)
    if isinstance(score, Dot) and score.softcap is not None:
        softcap = float(score.softcap)
    runs = matrix.runs
    return cpu.Numbers(
        batch=tuple(matrix.shape[:-2]),
        mask_batch=() if runs is None else runs.batch,
        score=kind,
        norm=NORMALIZERS[type(normalizer)],
        mean=isinstance(normalizer, Relu) and normalizer.mean,
        seed=0 if dropout is None else int(dropout.seed),
        threshold=0 if dropout is None else dropout.threshold,
        scale=scale,
        softcap=softcap,
        slope=slope,
        norm_bias=float(normalizer.bias) if isinstance(normalizer, Sigmoid) else 0.0,
        factor=1.0 if dropout is None else 1 / (1 - dropout.probability),
    )


def _is_bias(part: Position) -> bool:
    return type(part).on_score is not Position.on_score
