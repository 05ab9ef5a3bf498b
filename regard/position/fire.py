"""FIRE: a small network of the relative distance, measured against the query's own position."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from regard import errors
from regard.position.base import Position
from regard.position.toeplitz import wide


@dataclass(frozen=True, eq=False, repr=False)
class Fire(Position):
    """Functional interpolation for relative position: bias_ij = f(x_ij), learned.

    x_ij = psi(|p - j|) / (psi(max(p, |threshold|)) + eps),  p = i + offset
    psi(x) = log(|c| x + 1)
    f(x) = output relu(hidden x + hidden_bias) + output_bias

    x lies in 0..1 for keys before the query, whatever the length: distances are interpolated. The
    query's own position enters, so the bias is not Toeplitz.

    hidden, hidden_bias: [k]; output: [heads, k]; output_bias: [heads] (the network 1 - k - heads)
    c, threshold: tensors without axes
    Cost: about 2 k flops per pair and head; a tile holds k numbers per pair, the matrix never does.
    Li et al. 2024, arXiv:2310.04418.
    Raises ShapeError where the network's tensors do not fit together, or not the heads.

    >>> Fire.of(8)
    Fire(tensor(32), tensor(32), tensor(8, 32), tensor(8), tensor(), tensor())
    """

    hidden: Tensor
    hidden_bias: Tensor
    output: Tensor
    output_bias: Tensor
    c: Tensor
    threshold: Tensor
    eps: float = 1e-6
    offset: int = 0

    trailing: ClassVar[dict[str, int]] = {"hidden": 1, "hidden_bias": 1, "output": 1}

    def __post_init__(self) -> None:
        for name, dims in (
            ("hidden", 1), ("hidden_bias", 1), ("output", 2), ("output_bias", 1), ("c", 0),
            ("threshold", 0),
        ):  # fmt: skip
            tensor = getattr(self, name)
            shape = ("one number", "[k]", "[heads, k]")[dims]
            errors.check_tensor(f"Fire's {name}", tensor, shape=shape, dims=dims)
            if tensor.dim() != dims:
                raise errors.ShapeError(
                    f"Fire's {name} has shape {errors.show(tensor.shape)}; it must be {shape}."
                )
        sizes = {t.shape[-1] for t in (self.hidden, self.hidden_bias, self.output)}
        if len(sizes) > 1:
            raise errors.ShapeError(
                f"Fire's hidden, hidden_bias and output are networks of {sorted(sizes)} hidden "
                "numbers; all three must end in one axis [k]."
            )
        heads, biases = self.output.shape[-2], self.output_bias.shape[-1]
        if heads != biases:
            raise errors.ShapeError(
                f"Fire's output is for {heads} heads and its output_bias for {biases}; give both "
                "one row for each head."
            )
        errors.check_number("Fire's eps", self.eps, least=0)
        errors.check_number("Fire's offset", self.offset, whole=True)

    @staticmethod
    def of(num_heads: int, hidden: int = 32, *, c: float = 0.1, threshold: float = 512.0) -> Fire:
        """Make a random network that requires gradients, initialised as torch.nn.Linear does."""
        errors.check_number("Fire.of's num_heads", num_heads, whole=True, least=1)
        first, second = torch.nn.Linear(1, hidden), torch.nn.Linear(hidden, num_heads)
        tensors = first.weight[:, 0], first.bias, second.weight, second.bias
        w1, b1, w2, b2 = (tensor.detach().clone().requires_grad_() for tensor in tensors)
        scale, least = (torch.tensor(float(x), requires_grad=True) for x in (c, threshold))
        return Fire(w1, b1, w2, b2, scale, least)

    def on_score(self, query: Tensor, key: Tensor, i: Tensor, j: Tensor) -> Tensor:
        dtype = wide(self.output)
        here = (i + self.offset)[:, None]
        distance = (here - j).abs().to(dtype)
        far = torch.maximum(here.to(dtype), self.threshold.abs().to(dtype))
        c = self.c.abs().to(dtype)
        x = torch.log1p(c * distance) / (torch.log1p(c * far) + self.eps)
        active = (x[..., None] * self.hidden.to(dtype) + self.hidden_bias.to(dtype)).relu()
        biases = active @ self.output.to(dtype).mT  # [r, c, heads]
        return biases.movedim(-1, 0) + self.output_bias.to(dtype)[:, None, None]

    def numbers_per_pair(self) -> int:
        return 2 * self.hidden.shape[-1]
