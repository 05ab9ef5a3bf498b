"""Feature maps: how queries and keys become the vectors whose dot product is the score.

Any function of a tensor [*, width] -> [*, features] is a map, such as `torch.relu` or a module.
The ones that hold tensors are parts, so that a layer can train, move and save them.
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
from regard.part import Part

FeatureMap = Callable[[Tensor], Tensor]


def identity(x: Tensor) -> Tensor:
    """x itself: RetNet, Mamba-2, GLA, the delta rule.

    >>> identity(torch.tensor([-1.0, 2.0]))
    tensor([-1.,  2.])
    """
    return x


def unit(x: Tensor) -> Tensor:
    """x / |x|, with which the delta rule is stable for beta in [0, 2].

    >>> unit(torch.tensor([3.0, 4.0]))
    tensor([0.6000, 0.8000])
    """
    return F.normalize(x, dim=-1)


def elu_plus_one(x: Tensor) -> Tensor:
    """elu(x) + 1: x + 1 above zero and e^x below, always positive.

    Not as a sum, which below -37 in float64 and -17 in float32 is 0, and has few digits before.
    Katharopoulos et al. 2020, arXiv:2006.16236, eq. 7.

    >>> elu_plus_one(torch.tensor([-1.0, 0.0, 2.0]))
    tensor([0.3679, 1.0000, 3.0000])
    """
    return torch.where(x > 0, x + 1, x.clamp(max=0).exp())


def relu(x: Tensor) -> Tensor:
    """max(x, 0).

    >>> relu(torch.tensor([-1.0, 2.0]))
    tensor([0., 2.])
    """
    return torch.relu(x)


def exp(x: Tensor) -> Tensor:
    """e^x for each channel.

    >>> exp(torch.zeros(2))
    tensor([1., 1.])
    """
    return x.exp()


def softmax(x: Tensor) -> Tensor:
    """Softmax over the channels of each vector, whose features then sum to 1.

    >>> softmax(torch.zeros(2))
    tensor([0.5000, 0.5000])
    """
    return torch.softmax(x, -1)


@dataclass(frozen=True, eq=False, repr=False)
class Affine(Part):
    """phi(x) = relu(x W + b), learned (T2R).

    weight: [width, features], or [*batch, heads, width, features]
    bias: [features], or [*batch, heads, features]
    Kasai et al. 2021, arXiv:2103.13076, section 2.2.

    >>> Affine(torch.eye(2), torch.tensor([0.0, 5.0]))(torch.tensor([[-1.0, 2.0]]))
    tensor([[0., 7.]])
    """

    weight: Tensor
    bias: Tensor

    trailing: ClassVar[dict[str, int]] = {"weight": 2, "bias": 1}

    def __post_init__(self) -> None:
        errors.check_tensor("Affine's weight", self.weight, shape="[width, features]")
        errors.check_tensor("Affine's bias", self.bias, shape="[features]", dims=1)

    def __call__(self, x: Tensor) -> Tensor:
        """Map vectors [*batch, heads, n, width] to features."""
        bias = self.bias.to(x.dtype)[..., None, :]
        return torch.relu(grouped.match(_times(x, self.weight), errors.heads_of(bias)) + bias)


@dataclass(frozen=True, eq=False, repr=False)
class Hedgehog(Part):
    """phi(x) = [e^(x W), e^(-x W)], learned so that phi(q) . phi(k) mimics softmax weights.

    weight: [width, features / 2], or [*batch, heads, width, features / 2]; the identity to begin
    normalized: softmax over all features instead of e^x, which cannot overflow
    Zhang et al. 2024, arXiv:2402.04347.

    >>> Hedgehog(torch.eye(1))(torch.tensor([[0.0]]))
    tensor([[0.5000, 0.5000]])
    """

    weight: Tensor
    normalized: bool = True

    trailing: ClassVar[dict[str, int]] = {"weight": 2}

    def __post_init__(self) -> None:
        errors.check_tensor("Hedgehog's weight", self.weight, shape="[width, features / 2]")

    def __call__(self, x: Tensor) -> Tensor:
        """Map vectors [*batch, heads, n, width] to features."""
        half = _times(x, self.weight)
        both = torch.cat([half, -half], -1)
        return torch.softmax(both, -1) if self.normalized else both.exp()


@dataclass(frozen=True, eq=False, repr=False)
class RandomFeatures(Part):
    """Positive random features (FAVOR+), whose mean over projections is the softmax kernel.

    phi(x)_r = exp(w_r . x' - |x'|^2 / 2) / sqrt(R),  x' = sqrt(scale) x,  w_r ~ N(0, I)
    E[phi(q) . phi(k)] = exp(scale q . k)

    projection: w, [R, width], or [*batch, heads, R, width]
    scale: default width ** -0.5
    No feature exceeds exp(|w_r|^2 / 2), so that no maximum needs to be subtracted.
    Choromanski et al. 2021, arXiv:2009.14794, lemma 1.

    >>> phi, x = RandomFeatures.of(4, 4096, seed=0), torch.full((1, 4), 0.25)
    >>> estimate, exact = (phi(x) * phi(x)).sum(), torch.tensor(0.125).exp()
    >>> bool((estimate - exact).abs() < 0.05)
    True
    """

    projection: Tensor
    scale: float | None = None

    trailing: ClassVar[dict[str, int]] = {"projection": 2}

    def __post_init__(self) -> None:
        errors.check_tensor("RandomFeatures' projection", self.projection, shape="[R, width]")
        if self.scale is not None:
            errors.check_number("RandomFeatures' scale", self.scale, least=0)

    @staticmethod
    def of(head_dim: int, features: int, *, seed: int) -> RandomFeatures:
        """Rows that are orthogonal in blocks of head_dim, with the lengths of normal vectors.

        >>> RandomFeatures.of(8, 20, seed=0)
        RandomFeatures(tensor(20, 8))
        """
        errors.check_number("RandomFeatures.of's head_dim", head_dim, whole=True, least=1)
        errors.check_number("RandomFeatures.of's features", features, whole=True, least=1)
        generator = torch.Generator().manual_seed(seed)
        blocks = -(-features // head_dim)
        normal = torch.randn(blocks, head_dim, head_dim, generator=generator)
        turn, triangle = torch.linalg.qr(normal)
        # Uniform over rotations only with these signs: Mezzadri 2007, arXiv:math-ph/0609050.
        turn = turn * triangle.diagonal(dim1=-2, dim2=-1).sign()[:, None, :]
        directions = turn.flatten(0, 1)[:features]
        lengths = torch.randn(features, head_dim, generator=generator).norm(dim=-1, keepdim=True)
        return RandomFeatures(directions * lengths)

    def __call__(self, x: Tensor) -> Tensor:
        """Map vectors [*batch, heads, n, width] to features."""
        scale = max(x.shape[-1], 1) ** -0.5 if self.scale is None else self.scale
        x = x * math.sqrt(scale)
        exponent = _times(x, self.projection.mT)
        square = x.square().sum(-1, keepdim=True)
        if exponent.dim() > square.dim() or exponent.shape[:-1] != square.shape[:-1]:
            square = grouped.match(square, errors.heads_of(exponent))
        return (exponent - square / 2).exp() / math.sqrt(self.projection.shape[-2])


def _times(x: Tensor, weight: Tensor) -> Tensor:
    """x W, where heads that share keys may have weights of their own."""
    if weight.dim() > 2:
        x = grouped.match(x, errors.heads_of(weight))
    return x @ weight.to(x.dtype)
