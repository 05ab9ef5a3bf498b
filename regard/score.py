"""Relevance: how a query and a key are turned into one number, before bias and mask.

A score has two halves: `prepare` is done once per token, `pair` once per tile of queries and
keys. Every form calls these two, so a score is written once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from regard import errors, grouped
from regard.part import Part, per_head


class Score(Part):
    """Base of all scores: s_ij = f(query_i, key_j)."""

    whole_rows: ClassVar[bool] = False
    """Whether the score of one pair depends on other keys, so that a tile must be whole rows."""

    foreign: ClassVar[bool] = False
    """Whether it holds a function of the caller's, which may hold anything: it is not kept."""

    def prepare(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Do the work of single tokens: [*, h, n, d], [*, g, m, d] -> the same axes."""
        return query, key

    def pair(self, query: Tensor, key: Tensor, i: Tensor, j: Tensor) -> Tensor:
        """Compare prepared queries [*, h, r, d] with keys [*, g, c, d]: [*, h, r, c].

        `i` [r] and `j` [c] are the positions of the rows and columns in the whole matrix.
        """
        raise NotImplementedError

    def check(self, query: Tensor, key: Tensor) -> None:
        """Raise ShapeError where the widths do not fit."""
        errors.check_width(query, key, self)

    def numbers_per_pair(self, width: int) -> int:
        """How many numbers a tile holds for each pair: what decides the tile's size."""
        return 1

    def compared(self, query: Tensor) -> int:
        """The width of what a pair compares: of prepared queries."""
        return query.shape[-1]

    def flops_per_pair(self, width: int) -> int:
        """Floating point operations for one pair of vectors of the width that is `compared`."""
        return 2 * width


@dataclass(frozen=True, eq=False, repr=False)
class Dot(Score):
    """Scaled dot product: s_ij = scale q_i . k_j, then softcap tanh(s_ij / softcap) if given.

    scale: a number, or a tensor that broadcasts to [*batch, heads]; default width ** -0.5
    softcap: positive; bounds every score by it (Gemma 2, arXiv:2408.00118, section 2)
    Cost: 2 d flops per pair.  Vaswani et al. 2017, arXiv:1706.03762, eq. 1.
    Raises ShapeError where query and key differ in width.

    >>> query = torch.tensor([[1.0, 0.0]]); key = torch.tensor([[4.0, 0.0], [0.0, 4.0]])
    >>> Dot(scale=0.5).pair(query, key, torch.arange(1), torch.arange(2))
    tensor([[2., 0.]])
    """

    scale: float | Tensor | None = None
    softcap: float | None = None

    def __post_init__(self) -> None:
        if self.scale is not None:
            errors.check_scale("Dot's scale", self.scale)
        if self.softcap is not None:
            errors.check_number("Dot's softcap", self.softcap)
            if not self.softcap > 0:
                raise ValueError(f"softcap must be positive, not {self.softcap}; or None.")

    def pair(self, query: Tensor, key: Tensor, i: Tensor, j: Tensor) -> Tensor:
        scale = max(query.shape[-1], 1) ** -0.5 if self.scale is None else self.scale
        if isinstance(scale, Tensor):
            scale = per_head(scale, query)
        # Scaling the queries costs r d products instead of r c.
        scores = grouped.matmul(query * scale, key.mT)
        return scores if self.softcap is None else torch.tanh(scores / self.softcap) * self.softcap


@dataclass(frozen=True, eq=False, repr=False)
class Bilinear(Score):
    """General product: s_ij = scale q_i^T W k_j; queries and keys may have different widths.

    weight: [d_query, d_key], or [*batch, heads, d_query, d_key]
    Cost: 2 n d_query d_key flops per head, then 2 d_key per pair.
    Luong, Pham, Manning 2015, arXiv:1508.04025, section 3.1 ("general").
    Raises ShapeError where the widths are not those of the weight.

    >>> score = Bilinear(torch.tensor([[0.0, 2.0]]))
    >>> query, key = score.prepare(torch.ones(1, 1), torch.tensor([[5.0, 7.0]]))
    >>> score.pair(query, key, torch.arange(1), torch.arange(1))
    tensor([[14.]])
    """

    weight: Tensor
    scale: float | Tensor = 1.0

    trailing: ClassVar[dict[str, int]] = {"weight": 2}

    def __post_init__(self) -> None:
        errors.check_tensor("Bilinear's weight", self.weight, shape="[d_query, d_key]")
        errors.check_scale("Bilinear's scale", self.scale)

    def prepare(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        return query @ self.weight.to(query.dtype), key

    def pair(self, query: Tensor, key: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return Dot(self.scale).pair(query, key, i, j)

    def compared(self, query: Tensor) -> int:
        return self.weight.shape[-1]

    def check(self, query: Tensor, key: Tensor) -> None:
        given, wanted = (query.shape[-1], key.shape[-1]), tuple(self.weight.shape[-2:])
        if given != wanted:
            raise errors.ShapeError(
                f"{self} compares queries of width {wanted[0]} with keys of width {wanted[1]}, but "
                f"query has width {given[0]} and key {given[1]}; its weight must be "
                f"[{given[0]}, {given[1]}]."
            )


@dataclass(frozen=True, eq=False, repr=False)
class Cosine(Score):
    """Cosine similarity: s_ij = scale q_i . k_j / (|q_i| |k_j|); 0 where a vector is zero.

    scale: a number, or a tensor that broadcasts to [*batch, heads] (1 / temperature)
    Cost: 2 d flops per pair.  Liu et al. 2022 (Swin V2), arXiv:2111.09883, eq. 2.

    >>> score = Cosine(scale=10.0)
    >>> query, key = score.prepare(torch.tensor([[3.0, 0.0]]), torch.tensor([[0.5, 0.0]]))
    >>> score.pair(query, key, torch.arange(1), torch.arange(1))
    tensor([[10.]])
    """

    scale: float | Tensor = 1.0

    def __post_init__(self) -> None:
        errors.check_scale("Cosine's scale", self.scale)

    def prepare(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        return _unit(query), _unit(key)

    def pair(self, query: Tensor, key: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return Dot(self.scale).pair(query, key, i, j)


def _unit(vectors: Tensor) -> Tensor:
    # Dividing by the largest entry first keeps the squares of huge or tiny vectors in range.
    if vectors.shape[-1] == 0:
        return vectors
    peak = vectors.detach().abs().amax(-1, keepdim=True)
    scaled = vectors / torch.where(peak > 0, peak, 1)
    norm = scaled.square().sum(-1, keepdim=True)
    return scaled * torch.where(norm > 0, norm, 1).rsqrt()


@dataclass(frozen=True, eq=False, repr=False)
class Distance(Score):
    """Negative squared distance: s_ij = -scale |q_i - k_j|^2.

    With softmax these are the weights of a Gaussian kernel (Nadaraya-Watson).
    scale: a number, or a tensor that broadcasts to [*batch, heads]
    Cost: 3 d flops per pair, each difference taken for itself: |q|^2 - 2 q.k + |k|^2 is a matrix
    product but loses all digits where the vectors are far from 0 and near to each other.
    Tsai et al. 2019, arXiv:1908.11775, section 3 (attention as kernel smoothing).

    >>> query, key = torch.tensor([[3.0]]), torch.tensor([[1.0]])
    >>> Distance().pair(query, key, torch.arange(1), torch.arange(1))
    tensor([[-4.]])
    """

    scale: float | Tensor = 1.0

    def __post_init__(self) -> None:
        errors.check_scale("Distance's scale", self.scale)

    def pair(self, query: Tensor, key: Tensor, i: Tensor, j: Tensor) -> Tensor:
        key = grouped.match(key, errors.heads_of(query))
        difference = query[..., :, None, :] - key[..., None, :, :]  # [*, h, r, c, d]
        squared = difference.square().sum(-1)
        scale = per_head(self.scale, squared) if isinstance(self.scale, Tensor) else self.scale
        return -scale * squared

    def numbers_per_pair(self, width: int) -> int:
        return 2 * width

    def flops_per_pair(self, width: int) -> int:
        return 3 * width


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "relu": torch.relu,
    "gelu": F.gelu,
    "sigmoid": torch.sigmoid,
}


@dataclass(frozen=True, eq=False, repr=False)
class Additive(Score):
    """Additive relevance: s_ij = w . act(q_i + k_j).

    `tanh` is Bahdanau's score, `leaky_relu` that of GATv2. The projections W^q, W^k are those that
    made query and key.

    weight: w, [width] or [*batch, heads, width]
    activation: "tanh", "leaky_relu", "relu", "gelu" or "sigmoid"
    slope: of leaky_relu below zero
    Cost: about 4 d flops per pair; a tile holds its d numbers per pair, the matrix never does.
    Bahdanau, Cho, Bengio 2015, arXiv:1409.0473, appendix A.1.2; Brody, Alon, Yahav 2022 (GATv2),
    arXiv:2105.14491, eq. 7.

    >>> score = Additive(torch.tensor([1.0, 2.0]), activation="relu")
    >>> score.pair(torch.tensor([[1.0, -9.0]]), torch.tensor([[2.0, 10.0]]),
    ...            torch.arange(1), torch.arange(1))
    tensor([[5.]])
    """

    weight: Tensor
    activation: str = "tanh"
    slope: float = 0.2

    trailing: ClassVar[dict[str, int]] = {"weight": 1}

    def __post_init__(self) -> None:
        errors.check_tensor("Additive's weight", self.weight, shape="[width]", dims=1)
        errors.check_number("Additive's slope", self.slope)
        if self.activation not in ACTIVATIONS and self.activation != "leaky_relu":
            names = ", ".join(sorted([*ACTIVATIONS, "leaky_relu"]))
            raise ValueError(f"activation must be one of {names}; not {self.activation!r}.")

    @staticmethod
    def of(num_heads: int, head_dim: int, activation: str = "tanh") -> Additive:
        """Random weights that require gradients, uniform in +-1/sqrt(head_dim) for each head.

        >>> Additive.of(8, 64)
        Additive(tensor(8, 64))
        """
        bound = 1 / math.sqrt(head_dim)
        weight = torch.empty(num_heads, head_dim).uniform_(-bound, bound)
        return Additive(weight.requires_grad_(), activation)

    def pair(self, query: Tensor, key: Tensor, i: Tensor, j: Tensor) -> Tensor:
        key = grouped.match(key, errors.heads_of(query))
        total = query[..., :, None, :] + key[..., None, :, :]  # [*, h, r, c, d]
        if self.activation == "leaky_relu":
            active = F.leaky_relu(total, self.slope)
        else:
            active = ACTIVATIONS[self.activation](total)
        weight = self.weight.to(active.dtype)
        return (active @ weight[..., None, :, None]).squeeze(-1)

    def check(self, query: Tensor, key: Tensor) -> None:
        super().check(query, key)
        if self.weight.shape[-1] != query.shape[-1]:
            raise errors.ShapeError(
                f"{self} has a weight of width {self.weight.shape[-1]}, but query and key have "
                f"width {query.shape[-1]}; w needs one entry per channel."
            )

    def numbers_per_pair(self, width: int) -> int:
        return 2 * width

    def flops_per_pair(self, width: int) -> int:
        return 4 * width


@dataclass(frozen=True, eq=False, repr=False)
class PositionOnly(Score):
    """No relevance at all: s_ij = 0, so that position and mask alone decide.

    A head of this kind is a fixed convolution (Cordonnier, Loukas, Jaggi 2020, arXiv:1911.03584).

    >>> PositionOnly().pair(torch.ones(2, 4), torch.ones(3, 4), torch.arange(2), torch.arange(3))
    tensor([[0., 0., 0.],
            [0., 0., 0.]])
    """

    def pair(self, query: Tensor, key: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return query.new_zeros(i.numel(), j.numel())

    def check(self, query: Tensor, key: Tensor) -> None:
        """Any widths fit: the vectors are not read."""

    def flops_per_pair(self, width: int) -> int:
        return 0
