"""A matrix as the compiled kernels know it: kinds by number, biases, runs."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from regard import errors
from regard.form import separable
from regard.kernel import cpu
from regard.normalizer import Identity, Normalizer, Relu, RowSum, Sigmoid, Softmax
from regard.part import per_head
from regard.position.base import Band, Bias, Position, terms
from regard.position.toeplitz import Toeplitz
from regard.runs import Runs
from regard.score import Additive, Bilinear, Cosine, Distance, Dot, PositionOnly, Score

if TYPE_CHECKING:
    from regard.matrix import Attention

# As in csrc/problem.h.
DOT, DISTANCE, LEAKY, RECIPROCAL, TANH = range(5)
KNOWN: tuple[type[Normalizer], ...] = (Softmax, Sigmoid, Relu, RowSum, Identity)
NORMALIZERS = {kind: number for number, kind in enumerate(KNOWN)}
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
    return None if matrix.position is None else _needs_biases(matrix)


def _is_simple(part: Position) -> bool:
    """Whether a part adds nothing to scores, or what the kernels read as it is."""
    return type(part).on_score is Position.on_score or isinstance(part, Toeplitz)


def _needs_biases(matrix: Attention) -> str | None:
    if all(map(_is_simple, terms(matrix.position))):
        return None
    biases = Biases.of(matrix, *_no_rows(matrix))
    if biases.others:
        return f"has no kernel for the position {biases.others[0]}."
    if len(biases.explicit) > 1:
        return "adds one Bias at most; add their tensors up first: Bias(one + other)."
    if len(biases.bands) > 1:
        return f"adds one band of relative positions at most; {matrix.position} are several."
    if biases.channels and not _is_product(matrix.score):
        return f"has no kernel for the position {matrix.position} with the score {matrix.score}."
    return None


def _no_rows(matrix: Attention) -> tuple[Tensor, Tensor]:
    return matrix.rule.operands(matrix.query[..., :0, :], matrix.key[..., :0, :])


def bytes_made(matrix: Attention) -> int:
    """Of the tensors that a position's band and further channels are written to."""
    if matrix.position is None:
        return 0
    query, key = _no_rows(matrix)
    biases = Biases.of(matrix, query, key)
    made = [(band.table, matrix.shape[-2]) for band in biases.bands]
    if biases.channels:
        of_query, of_key = zip(*biases.channels, strict=True)
        made += [(_side_by_side(query, of_query), matrix.shape[-2])]
        made += [(_side_by_side(key, of_key), matrix.shape[-1])]
    return sum(
        each.element_size() * length * math.prod((*each.shape[:-2], each.shape[-1]))
        for each, length in made
    )


def _is_product(score: Score) -> bool:
    """Whether a score is a dot product, to which further channels add what they multiply to."""
    if isinstance(score, Dot):
        return score.softcap is None
    return isinstance(score, (Bilinear, Cosine, PositionOnly))


class Biases(NamedTuple):
    """What is added to scores, by the way in which the kernels add it."""

    toeplitz: list[Toeplitz]
    explicit: list[Tensor]
    bands: list[Band]
    channels: list[tuple[Tensor, Tensor]]
    others: list[Position]

    @staticmethod
    def of(matrix: Attention, query: Tensor, key: Tensor) -> Biases:
        """Sort the position's terms; query and key as the rule prepares them."""
        biases = Biases([], [], [], [], [])
        i, j = (torch.arange(x.shape[-2], device=x.device) for x in (query, key))
        for part in terms(matrix.position):
            if type(part).on_score is Position.on_score:
                continue
            if type(part) is Bias:
                biases.explicit.append(torch.atleast_2d(part.bias))
            elif isinstance(part, Toeplitz):
                biases.toeplitz.append(part)
            elif (band := part.band(_wide(query), i)) is not None:
                biases.bands.append(_checked(part, band, i.numel(), matrix.shape[:-2]))
            elif (channels := part.channels(_wide(query), _wide(key), i, j)) is not None:
                biases.channels.append(channels)
            else:
                biases.others.append(part)
        return biases


def _checked(part: Position, band: Band, rows: int, batch: tuple[int, ...]) -> Band:
    given = band.table.shape
    fits = len(given) > 1 and given[-2] == rows and errors.fits(given[:-2], batch)
    if not fits or given[-1] < 1:
        raise errors.ShapeError(
            f"{part} has a band of shape {errors.show(given)}; for these queries it must be "
            f"{errors.show((*batch, rows))} and the band's width, 1 or more, or what broadcasts to "
            "the axes before the rows."
        )
    return band


class Tensors(NamedTuple):
    """Tensors with gradients, as the kernels want them but for value, which comes third."""

    query: Tensor
    key: Tensor
    weight: Tensor | None
    toeplitz: Tensor | None
    bias: Tensor | None
    band: Tensor | None
    sink: Tensor | None


class Kind(NamedTuple):
    """What `numbers` needs to know of the tensors."""

    score: int
    scale: float  # 1 where the query is scaled already
    band_left: int
    band_offset: int


def tensors(matrix: Attention) -> tuple[Kind, Tensors]:
    """What the score compares, and what is added to it."""
    query, key = matrix.rule.operands(matrix.query, matrix.key)
    score, wide = matrix.score, torch.promote_types(query.dtype, torch.float32)
    biases = Biases.of(matrix, query, key)
    kind, scale, weight, constant = DOT, 1.0, None, None
    if isinstance(score, Additive):
        kind, query, key, weight, constant = _additive(score, query, key, wide)
    elif isinstance(score, Distance):
        factor = torch.as_tensor(score.scale, dtype=wide)
        kind, weight = DISTANCE, -factor[..., None].expand(*factor.shape, query.shape[-1])
    elif isinstance(score, PositionOnly):
        query, key = query[..., :0], key[..., :0]
    else:
        query, scale = _scaled(matrix, query, bool(biases.channels))
    if biases.channels:
        of_query, of_key = zip(*biases.channels, strict=True)
        query, key = _side_by_side(query, of_query), _side_by_side(key, of_key)
    sink = matrix.normalizer.sink if isinstance(matrix.normalizer, Softmax) else None
    left, offset, band = biases.bands[0] if biases.bands else (0, 0, None)
    return Kind(kind, scale, left, offset), Tensors(
        query,
        key,
        weight,
        _by_offset(matrix, biases.toeplitz, constant, wide),
        biases.explicit[0] if biases.explicit else None,
        band,
        None if sink is None else torch.as_tensor(sink, dtype=wide),
    )


def _scaled(matrix: Attention, query: Tensor, at_once: bool) -> tuple[Tensor, float]:
    """The query of a dot product, and what the kernel has yet to multiply it by."""
    scale = matrix.score.scale  # type: ignore[attr-defined]
    scale = max(matrix.query.shape[-1], 1) ** -0.5 if scale is None else scale
    if not isinstance(scale, Tensor) and not at_once:
        return query, float(scale)
    query = _wide(query)
    return query * (per_head(scale, query) if isinstance(scale, Tensor) else scale), 1.0


def _side_by_side(vectors: Tensor, channels: tuple[Tensor, ...]) -> Tensor:
    """Vectors with further channels; their batch and head axes broadcast."""
    vectors = _wide(vectors)
    parts = [vectors, *(channel.to(vectors.dtype) for channel in channels)]
    batch = torch.broadcast_shapes(*(part.shape[:-2] for part in parts))
    return torch.cat([part.expand(*batch, -1, -1) for part in parts], -1)


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


def numbers(matrix: Attention, kind: Kind) -> cpu.Numbers:
    """What is not a tensor; kind: of the score, as `tensors` says."""
    score, normalizer, dropout = matrix.score, matrix.normalizer, matrix.dropout
    softcap, slope = 0.0, 0.0
    if isinstance(score, Additive):
        slope = score.slope if score.activation == "leaky_relu" else 0.0
    if isinstance(score, Dot) and score.softcap is not None:
        softcap = float(score.softcap)
    runs = matrix.runs
    return cpu.Numbers(
        batch=tuple(matrix.shape[:-2]),
        mask_batch=() if runs is None else runs.batch,
        score=kind.score,
        norm=NORMALIZERS[type(normalizer)],
        mean=isinstance(normalizer, Relu) and normalizer.mean,
        seed=0 if dropout is None else int(dropout.seed),
        threshold=0 if dropout is None else dropout.threshold,
        scale=kind.scale,
        softcap=softcap,
        slope=slope,
        norm_bias=_norm_bias(normalizer),
        factor=1.0 if dropout is None else 1 / (1 - dropout.probability),
        band_left=kind.band_left,
        band_offset=kind.band_offset,
    )


def _norm_bias(normalizer: Normalizer) -> float:
    if isinstance(normalizer, RowSum):
        return float(normalizer.eps)
    return float(normalizer.bias) if isinstance(normalizer, Sigmoid) else 0.0


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
