"""A convolution is attention whose heads look by position alone; here one becomes the other.

Let M be the kernel as a matrix [taps, out in / groups], one row for each tap.

Theorem. Softmax heads with finite scores, the same at every query that sees all its taps, give the
convolution exactly iff M = P X with P [taps, heads] of positive columns that sum to 1. Let R be the
rank of M. No fewer than R heads do; R + 1 always do; and R do iff the columns of M span a vector
whose entries are all positive.
Proof. Head h sums sum_tau P[tau, h] x_tau W_h, so that P X = M with X[h] = W_h is what has to hold
for all x. (At least R) rank(P X) <= heads. (R iff) With R heads, P has rank R and the columns of
P and of M span the same space, so that this space holds P's positive columns. Conversely let p be
positive in it, and p, a_2 .. a_R a basis: for large t_r the vectors p and a_r + t_r p are positive
and span the same. (R + 1) Let 1 be the uniform vector and a_1 .. a_R a basis: 1 and a_r + t_r 1 are
positive, and M is in their span. A positive vector divided by its sum is softmax of its logarithms.

So a filter of one sign is one head, and any other single filter (Sobel, Laplacian) two. Cordonnier,
Loukas, Jaggi 2020, arXiv:1911.03584, theorem 1, has one head per tap, in the limit of infinite
scores; `Shift` is that limit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from regard import errors
from regard.grid import Grid, axes_of, box
from regard.nn.conv import ConvAttention, Geometry
from regard.position.grid import Field, Gaussian, OnGrid, Shift

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
HEADS = ("kernel", "min", "gaussian")
ALPHA = 46.0
"""Where a Gaussian head is one-hot to the last bit of float64: 1 + 4 e^-46 rounds to 1."""


def from_conv(
    conv: nn.Module, *, heads: str = "kernel", alpha: float = ALPHA, share: bool = False
) -> ConvAttention:
    """Write a convolution as multi-head attention with the same outputs and gradients.

    output_q = bias + sum_tau W_tau x[pi(q, tau)],  pi(q, tau) = stride q + dilation tau - padding

    heads: which attention
        "kernel": a one-hot `Shift` for each tap, exact to rounding. The border is in pi: "zeros"
            leave a row without keys, whose output is 0; the other modes clamp, mirror or wrap it.
        "min": rank + 1 softmax heads with finite scores, or rank where that is enough (see the
            theorem in `regard.convert.conv`); tokens are the padded input. Where they would be no
            fewer than taps, the heads are those of "kernel".
        "gaussian": a `Gaussian` for each tap, whose centre and sharpness learn; tokens are the
            padded input. With e = 2 axes e^-alpha, of which terms of order e^2 are left out, the
            error is at most 2 e max|x| sum|W_tau|.
    alpha: sharpness^2 of "gaussian"; at 46 float64 has no digits for the rest
    share: use the convolution's own parameters instead of copies, so that both train together
    conv: Conv1d, Conv2d or Conv3d with any kernel size, stride, padding (numbers, "same", "valid"),
        dilation, groups, padding mode, bias, dtype and device
    Raises ShapeError, DtypeError or ValueError for what is none of these.

    >>> conv = nn.Conv2d(3, 8, 3, stride=2, padding=1, padding_mode="reflect").double()
    >>> layer, x = from_conv(conv), torch.randn(2, 3, 7, 7).double()
    >>> (layer(x) - conv(x)).abs().max() < 1e-12, layer.matrix((7, 7))[4, 5].nonzero()
    (tensor(True), tensor([[16]]))
    """
    given: Any = _checked(conv, heads)
    weight, bias = given.weight, given.bias
    if not share:
        weight, bias = (p if p is None else p.detach().clone() for p in (weight, bias))
    kernel_size = tuple(given.kernel_size)
    geometry = Geometry(
        kernel_size, tuple(given.stride), _padding(given), tuple(given.dilation), given.padding_mode
    )
    grid = Grid(kernel_size)  # of no input yet: every input brings its own
    taps = box(kernel_size, given.weight.device)
    offsets = taps * grid.tensor(geometry.dilation, taps)
    position: OnGrid = Shift(offsets, grid, given.padding_mode)
    if heads == "gaussian":
        position = Gaussian.of(offsets.to(given.weight.dtype), grid, alpha=alpha)
    elif heads == "min":
        logits, mix = few_heads(given.weight.detach())
        if len(logits) < len(taps):
            if share:
                raise ValueError(
                    "heads='min' mixes the kernel's taps anew, so its weights cannot be those of "
                    "the convolution; use share=False, or heads='kernel'."
                )
            table = logits.reshape(-1, *kernel_size).requires_grad_()
            position = Field(table, grid, first=0, dilation=geometry.dilation)
            weight = mix
    return ConvAttention(weight, bias, position, geometry, groups=given.groups)


def to_conv(layer: ConvAttention) -> nn.Module:
    """The convolution that a `ConvAttention` is, with parameters of its own.

    W_tau = sum_h P[tau, h] W_h, with P one-hot (`Shift`) or the softmax of a `Field`

    Raises FormError where the layer is none: Gaussian heads reach over the whole input, and shifts
    that have been moved off the taps are no kernel.

    >>> conv = nn.Conv1d(2, 3, 3, padding=1)
    >>> torch.equal(to_conv(from_conv(conv)).weight, conv.weight)
    True
    """
    errors.check_kind("layer", layer, ConvAttention)
    position, geometry = layer.position(), layer.geometry
    taps = box(geometry.kernel_size, layer.weight.device)
    weight = layer.weight.detach().flatten(2)  # [out, in / groups, heads]
    if isinstance(position, Field):
        weight = weight @ position.table.detach().flatten(1).softmax(-1)
    elif not isinstance(position, Shift) or not torch.equal(
        position.offsets, taps * Grid(geometry.kernel_size).tensor(geometry.dilation, taps)
    ):
        raise errors.FormError(
            f"{position} is no convolution with a kernel of size {geometry.kernel_size}: its "
            "heads look elsewhere. A layer with Shift on the taps, or with a Field, is one."
        )
    # Only "same" pads two sides differently.
    uneven = any(left != right for left, right in geometry.padding)
    make: Any = CONVS[len(geometry.stride) - 1]
    conv: Any = make(
        weight.shape[1] * layer.groups,
        weight.shape[0],
        geometry.kernel_size,
        geometry.stride,
        "same" if uneven else [left for left, _ in geometry.padding],
        geometry.dilation,
        layer.groups,
        layer.bias is not None,
        geometry.padding_mode,
        device=weight.device,
        dtype=weight.dtype,
    )
    with torch.no_grad():
        conv.weight.copy_(weight.reshape(conv.weight.shape))
        if layer.bias is not None:
            conv.bias.copy_(layer.bias)
    found: nn.Module = conv
    return found


def few_heads(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Scores [heads, taps] and mixing weights [out, in, heads] of the theorem above.

    weight: [out, in, *taps]. The positive vector is the uniform one or, where that is positive, its
    projection on the span of the columns, which then needs no head of its own.

    >>> sobel = torch.tensor([[1.0, 0, -1], [2, 0, -2], [1, 0, -1]])[None, None]
    >>> box_filter = torch.ones(1, 1, 3, 3)
    >>> len(few_heads(sobel)[0]), len(few_heads(box_filter)[0])
    (2, 1)
    """
    wanted = weight.flatten(2).flatten(0, 1).mT.to(torch.float64)  # M [taps, out in]
    basis, sizes, _ = torch.linalg.svd(wanted, full_matrices=False)
    digits = torch.finfo(weight.dtype).eps * max(wanted.shape)
    basis = basis[:, sizes > digits * sizes[:1]]
    one = wanted.new_ones(len(wanted))
    inside = basis.mT @ one
    projected = basis @ inside
    if inside.numel() and projected.min() > 0.01 * projected.max():
        # The other directions of the span are those orthogonal to the projection.
        turned = torch.linalg.qr(torch.cat([inside[:, None], torch.eye(len(inside)).to(one)], 1))[0]
        positive, others = projected, basis @ turned[:, 1:]
    else:
        positive, others = one, basis
    ratios = others / positive[:, None]
    # The least entry of a shifted column is a tenth of the range that it has.
    spread = ratios.amax(0) - ratios.amin(0)
    shifted = others + positive[:, None] * (0.1 * spread - ratios.amin(0))
    columns = torch.cat([positive[:, None], shifted], 1)
    columns = columns / columns.sum(0)
    mix = torch.linalg.lstsq(columns, wanted).solution  # X [heads, out in]
    mix = mix.mT.reshape(*weight.shape[:2], -1)
    return columns.mT.log().to(weight.dtype).contiguous(), mix.to(weight.dtype).contiguous()


def _padding(conv: Any) -> tuple[tuple[int, int], ...]:
    """(left, right) for each axis; what "same" cannot halve goes to the right, as in torch."""
    if conv.padding == "valid":
        return ((0, 0),) * len(conv.kernel_size)
    if conv.padding == "same":
        totals = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        return tuple((total // 2, total - total // 2) for total in totals)
    return tuple((p, p) for p in axes_of("padding", conv.padding, len(conv.kernel_size)))


def _checked(conv: Any, heads: str) -> nn.Module:
    if heads not in HEADS:
        raise ValueError(f"heads is one of {', '.join(map(repr, HEADS))}, not {heads!r}.")
    if isinstance(conv, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
        raise errors.DtypeError(
            f"from_conv takes a convolution, and {type(conv).__name__} is the transpose of one: "
            "its output is sum_h A_h^T x W_h, where columns, not rows, are one-hot. Convert the "
            "convolution that it transposes; with A = layer.matrix(size), A.mT @ x is the product."
        )
    if not isinstance(conv, CONVS):
        raise errors.DtypeError(
            f"from_conv takes torch.nn.Conv1d, Conv2d or Conv3d, not {type(conv).__name__}; "
            "replace the convolutions of a model one by one."
        )
    if isinstance(conv.weight, nn.parameter.UninitializedParameter):
        raise errors.ShapeError(
            f"{type(conv).__name__} has no weights yet; run it on an input first."
        )
    errors.check_tensor("the convolution's weight", conv.weight)
    return conv
