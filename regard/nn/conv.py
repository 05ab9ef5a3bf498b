"""A convolution written as attention: heads that look by position alone, on a grid."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard import errors
from regard.grid import Grid, Numbers, axes_of
from regard.matrix import Attention, attention
from regard.nn.learnable import Learnable
from regard.opaque import opaque
from regard.position.grid import OnGrid, Shift
from regard.score import PositionOnly


@dataclass(frozen=True)
class Geometry:
    """Which input an output of a convolution reads: stride q + dilation tau - left.

    padding: (left, right) for each axis, in torch's padding_mode
    """

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    padding_mode: str = "zeros"

    def grid(self, size: tuple[int, ...], *, padded: bool) -> Grid:
        """Outputs among the inputs; padded: the keys are the padded input."""
        wide = [n + left + right for n, (left, right) in zip(size, self.padding, strict=True)]
        reach = [d * (k - 1) + 1 for d, k in zip(self.dilation, self.kernel_size, strict=True)]
        if any(w < r for w, r in zip(wide, reach, strict=True)):
            raise errors.ShapeError(
                f"the input has size {size}, with padding {tuple(wide)}, but the kernel reaches "
                f"over {tuple(reach)}; it must fit into the padded input at least once."
            )
        out = [(w - r) // s + 1 for w, r, s in zip(wide, reach, self.stride, strict=True)]
        if padded:
            return Grid(wide, out, self.stride)
        return Grid(size, out, self.stride, [-left for left, _ in self.padding])

    def pad(self, x: Tensor) -> Tensor:
        """The input with its virtual pixels, [*batch, channels, *size]."""
        pads = [side for sides in reversed(self.padding) for side in sides]
        if not any(pads):
            return x
        mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
        axes = len(self.padding)
        flat = x.reshape(-1, 1, *x.shape[-axes:])  # torch pads behind two leading axes
        padded: Tensor = F.pad(flat, pads, mode)
        return padded.reshape(*x.shape[:-axes], *padded.shape[-axes:])


class ConvAttention(nn.Module):
    """Multi-head attention by position alone on a grid; what `regard.convert.from_conv` returns.

    output = bias + sum_h A_h x W_h,  A_h = attention(score=PositionOnly(), position=the part's)

    It takes a convolution's place: x [*batch, in_channels, *size] -> [*batch, out_channels, *out].
    `layer.matrix(size)` is the lazy matrix [heads, outputs, inputs] of that size of input.

    weight: [out_channels, in_channels / groups, *taps], the W_h of all heads; taps in all = heads
    bias: [out_channels] or None
    position: `Shift`, `Gaussian` or `Field`, with one entry per head, on any grid: every input
        brings its own. Its tensors that require gradients become parameters.
    geometry: where outputs stand. Under `Shift` the border is the part's; other parts, whose rows
        sum to 1, see the padded input, where a virtual pixel is a token like others.
    Cost: with `Shift`, the convolution's flops, and heads times the input in memory, as im2col.
    Raises ShapeError where weight, position, groups and input do not fit, DtypeError for an input
    of another dtype.

    >>> import torch
    >>> from regard.convert import from_conv
    >>> layer = from_conv(nn.Conv2d(3, 8, 3, padding=1))
    >>> layer(torch.randn(2, 3, 5, 5)).shape, layer.matrix((5, 5)).shape
    (torch.Size([2, 8, 5, 5]), torch.Size([9, 25, 25]))
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        position: OnGrid,
        geometry: Geometry,
        *,
        groups: int = 1,
    ) -> None:
        super().__init__()
        errors.check_kind("position", position, OnGrid)
        heads = weight[0, 0].numel()
        position.check_heads((heads,))
        if weight.shape[0] % groups:
            raise errors.ShapeError(
                f"{weight.shape[0]} output channels cannot be split into {groups} groups."
            )
        self.weight = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight)
        if bias is not None and not isinstance(bias, nn.Parameter):
            bias = nn.Parameter(bias)
        self.bias = bias
        self.position = Learnable(position)
        self.geometry, self.groups, self.num_heads = geometry, groups, heads
        # Soft heads can move, and see the padded input.
        self.movable = not isinstance(position, Shift)

    def matrix(self, size: Numbers, like: Tensor | None = None) -> Attention:
        """The lazy matrix [heads, outputs, inputs] for inputs of a size.

        like: a tensor whose dtype it has; default the weight
        """
        grid = self.grid(axes_of("size", size, len(self.geometry.stride), least=0))
        like = self.weight if like is None else like
        # Position alone decides: queries and keys have no channels.
        return attention(
            like.new_zeros(self.num_heads, grid.rows, 0),
            like.new_zeros(1, grid.columns, 0),
            score=PositionOnly(),
            position=replace(self.position(), grid=grid),
        )

    @opaque
    def forward(self, x: Tensor) -> Tensor:
        """Inputs [*batch, in_channels, *size] -> outputs [*batch, out_channels, *out]."""
        size = self.size_of(x)
        return self.project(self.matrix(size, x).matmul(self.tokens(x)), size)

    def size_of(self, x: Tensor) -> tuple[int, ...]:
        """The size of an input [*batch, in_channels, *size]; an error if it is none."""
        axes, channels = len(self.geometry.stride), self.weight.shape[1] * self.groups
        errors.check_tensor("x", x)
        # autocast makes one dtype of all but float64.
        left_alone = x.dtype in (self.weight.dtype, torch.float64)
        if left_alone or not torch.is_autocast_enabled(x.device.type):
            errors.check_pair("x", x, "layer.weight", self.weight)
        if x.dim() <= axes or x.shape[-axes - 1] != channels:
            raise errors.ShapeError(
                f"x has shape {errors.show(x.shape)}, but this layer takes [*batch, {channels}, "
                f"*size] with {axes} axes of size."
            )
        return tuple(x.shape[-axes:])

    def tokens(self, x: Tensor) -> Tensor:
        """What the heads see of x, [*batch, 1, m, in_channels]: pixels, virtual ones among them."""
        padded = self.geometry.pad(x) if self.movable else x
        return padded.flatten(-len(self.geometry.stride)).mT[..., None, :, :]

    def project(self, mixed: Tensor, size: tuple[int, ...]) -> Tensor:
        """Mix what the heads saw, [*batch, heads, n, in_channels], to [*batch, out, *out size]."""
        # One product for each group, over its channels and all heads.
        mixed = mixed.unflatten(-1, (self.groups, -1)).movedim(-4, -1).movedim(-3, -4)
        weight = self.weight.unflatten(0, (self.groups, -1)).flatten(2)  # [g, out / g, c h]
        output = (mixed.flatten(-2) @ weight.mT).mT.flatten(-3, -2)  # [*batch, out, n]
        if self.bias is not None:
            # autocast multiplies in a dtype of its own, which a wider bias must not undo.
            output = output + self.bias.to(output.dtype)[:, None]
        image: Tensor = output.unflatten(-1, self.grid(size).queries)
        return image

    def grid(self, size: tuple[int, ...]) -> Grid:
        """The outputs among the tokens of an input of this size."""
        return self.geometry.grid(size, padded=self.movable)

    def extra_repr(self) -> str:
        """What torch prints between the brackets."""
        out, channels = self.weight.shape[:2]
        return f"{channels * self.groups}, {out}, num_heads={self.num_heads}, groups={self.groups}"
