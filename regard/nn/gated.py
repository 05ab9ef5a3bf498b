"""Attention that begins as a convolution and learns where, and at what, to look."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from regard import errors
from regard.matrix import Attention, attention
from regard.nn.conv import ConvAttention
from regard.opaque import opaque


@dataclass(frozen=True, eq=False, repr=False)
class Mixture:
    """Two lazy matrices mixed head by head: (1 - gate) content + gate position.

    content: [*batch, heads, n, m]; position: [heads, n, m]; gate: [heads], between 0 and 1
    """

    content: Attention
    position: Attention
    gate: Tensor

    @property
    def shape(self) -> torch.Size:
        """(*batch, heads, n, m)."""
        return self.content.shape

    def __matmul__(self, value: Tensor) -> Tensor:
        """Both products, mixed."""
        return self._mix(self.content.matmul(value), self.position.matmul(value))

    def __getitem__(self, index: Any) -> Tensor:
        """Weights of rows, `M[..., rows, :]`: [*batch, heads, r, m]."""
        if not isinstance(index, tuple) or index[0] is not Ellipsis or len(index) != 3:
            raise errors.ShapeError(
                f"a mixture is looked at by rows, M[..., rows, :], not by {index!r}; its two "
                "matrices, M.content and M.position, take any index."
            )
        content: Any = self.content[index]
        position: Any = self.position[index]
        return self._mix(content, position)

    def dense(self) -> Tensor:
        """All weights, [*batch, heads, n, m]."""
        return self._mix(self.content.dense(), self.position.dense())

    def _mix(self, content: Tensor, position: Tensor) -> Tensor:
        gate = self.gate.to(content.dtype)[:, None, None]
        return (1 - gate) * content + gate * position

    def __repr__(self) -> str:
        return f"(1 - gate) {self.content!r} + gate {self.position!r}"


class GatedAttention(nn.Module):
    """Gated positional self-attention: a convolution's heads, each free to look at content.

    A_h = (1 - s(gate_h)) softmax_j(q_ih . k_jh / head_dim^0.5) + s(gate_h) softmax_j(bias_hij)
    output = bias + sum_h A_h x W_h,   q_i = W^q_h x_i, k_j = W^k_h x_j,   s the logistic function

    Under large gates it is the convolution that `local` is; centres and sharpness of its Gaussian
    heads, gates, W^q and W^k then learn. `layer.matrix(x)` is the lazy mixture.
    A query is the token in the middle of what its output reads.
    d'Ascoli et al. 2021 (ConViT), arXiv:2103.10697, section 3; with weights of a trained
    convolution as in d'Ascoli et al. 2021, arXiv:2106.05795.

    local: a `ConvAttention` with `Gaussian` or `Field` heads: `from_conv(conv, heads="gaussian")`
    head_dim: width of queries and keys
    gate: its first value in every head; the paper's is 1, s(1) = 0.73. The convolution that it
        begins as is missed by a factor 1 - s(gate) of each head: 3e-4 at 8.
    Cost: the content's, 2 n m (head_dim + channels) flops per head.
    Raises ShapeError where x does not fit, DtypeError for one-hot `Shift` heads, which cannot move.

    >>> from regard.convert import from_conv
    >>> conv = nn.Conv2d(3, 8, 3, padding=1)
    >>> layer, x = GatedAttention(from_conv(conv, heads="gaussian"), 16), torch.randn(2, 3, 5, 5)
    >>> layer(x).shape, layer.matrix(x).shape
    (torch.Size([2, 8, 5, 5]), torch.Size([2, 9, 25, 49]))
    """

    def __init__(self, local: ConvAttention, head_dim: int, *, gate: float = 1.0) -> None:
        super().__init__()
        errors.check_kind("local", local, ConvAttention)
        if not local.movable:
            raise errors.DtypeError(
                "GatedAttention mixes softmax heads, and Shift heads see one key or none; use "
                "from_conv(conv, heads='gaussian'), whose centres also learn."
            )
        errors.check_number("GatedAttention's head_dim", head_dim, whole=True, least=1)
        errors.check_number("GatedAttention's gate", gate)
        self.local, self.head_dim = local, head_dim
        channels = local.weight.shape[1] * local.groups
        like = local.weight.detach()
        self.query = nn.Parameter(like.new_empty(local.num_heads, channels, head_dim))
        self.key = nn.Parameter(like.new_empty(local.num_heads, channels, head_dim))
        for weight in (self.query, self.key):
            nn.init.normal_(weight, std=channels**-0.5)
        self.gate = nn.Parameter(like.new_full((local.num_heads,), float(gate)))

    def matrix(self, x: Tensor) -> Mixture:
        """The lazy mixture [*batch, heads, outputs, tokens] of an input [*batch, channels, *size].

        Tokens are the pixels of the padded input, as in `ConvAttention`.
        """
        size = self.local.size_of(x)
        tokens, grid, geometry = self.local.tokens(x), self.local.grid(size), self.local.geometry
        middle = [
            d * (k // 2) for d, k in zip(geometry.dilation, geometry.kernel_size, strict=True)
        ]
        places = grid.places(torch.arange(grid.rows, device=x.device))
        centres = grid.index(places + grid.tensor(middle, places))
        query, key = tokens[..., centres, :] @ self.query, tokens @ self.key
        # autocast projects in a dtype of its own; both matrices multiply the same tokens.
        content = attention(query.to(x.dtype), key.to(x.dtype))
        return Mixture(content, self.local.matrix(size, x), torch.sigmoid(self.gate))

    @opaque
    def forward(self, x: Tensor) -> Tensor:
        """Inputs [*batch, in_channels, *size] -> outputs [*batch, out_channels, *out]."""
        size = self.local.size_of(x)
        return self.local.project(self.matrix(x) @ self.local.tokens(x), size)

    def extra_repr(self) -> str:
        """What torch prints between the brackets."""
        return f"head_dim={self.head_dim}"
