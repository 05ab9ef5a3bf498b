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
from torch.nn.utils import parametrize

from regard import errors
from regard.form.tiles import compute_dtype
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
            theorem in `regard.convert.conv`); tokens are the padded input. The heads are those of
            "kernel" where they would be no fewer than taps, and where rounded scores and weights,
            and sums over heads, could miss the kernel W by more than (eps + taps eps') |W| in
            Frobenius norm: eps of its dtype, eps' of the dtype of sums, float32 at least. A half
            precision has so few digits that this is a matter of luck but for filters of one sign.
        "gaussian": a `Gaussian` for each tap, whose centre and sharpness learn; tokens are the
            padded input. With e = 2 axes e^-alpha, of which terms of order e^2 are left out, the
            error is at most 2 e max|x| sum|W_tau|.
    alpha: sharpness^2 of "gaussian"; at 46 float64 has no digits for the rest
    share: use the convolution's own parameters instead of copies, so that both train together;
        copies require gradients where the originals do, and heads learn where the weight does
    conv: Conv1d, Conv2d or Conv3d with any kernel size, stride, padding (numbers, "same", "valid"),
        dilation, groups, padding mode, bias, dtype and device; no subclass, which may compute
        something else, but for parametrizations of its weight
    Raises ShapeError, DtypeError (a TypeError) or ValueError for what is none of these.

    >>> conv = nn.Conv2d(3, 8, 3, stride=2, padding=1, padding_mode="reflect").double()
    >>> layer, x = from_conv(conv), torch.randn(2, 3, 7, 7).double()
    >>> (layer(x) - conv(x)).abs().max() < 1e-12, layer.matrix((7, 7))[4, 5].nonzero()
    (tensor(True), tensor([[16]]))
    """
    given: Any = _checked(conv, heads)
    with torch.enable_grad():  # under which a parametrized weight says whether it learns
        weight, bias = given.weight, given.bias
    learns = weight.requires_grad
    if share:
        _check_shared(weight, bias)
    else:
        weight, bias = _copy(weight), _copy(bias)
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
    elif heads == "min" and (few := _few_enough(given.weight.detach())) is not None:
        if share:
            raise ValueError(
                "heads='min' mixes the kernel's taps anew, so its weights cannot be those of "
                "the convolution; use share=False, or heads='kernel'."
            )
        logits, mix = few
        table = logits.reshape(-1, *kernel_size).requires_grad_()
        position = Field(table, grid, first=0, dilation=geometry.dilation)
        weight = nn.Parameter(mix, requires_grad=learns)
    layer = ConvAttention(weight, bias, position, geometry, groups=given.groups)
    layer.position.requires_grad_(learns)
    return layer


def to_conv(layer: ConvAttention) -> nn.Module:
    """The convolution that a `ConvAttention` is, with parameters of its own.

    W_tau = sum_h P[tau, h] W_h, with P one-hot (`Shift`) or the softmax of a `Field`

    Raises FormError where the layer is none: Gaussian heads reach over the whole input, heads that
    look beside the taps are no kernel, and torch pads both sides alike, or for "same".

    >>> conv = nn.Conv1d(2, 3, 3, padding=1)
    >>> torch.equal(to_conv(from_conv(conv)).weight, conv.weight)
    True
    """
    errors.check_kind("layer", layer, ConvAttention)
    position, geometry = layer.position(), layer.geometry
    reason = _elsewhere(position, geometry, layer.num_heads)
    padding = _torch_padding(geometry)
    if padding is None:
        reason = (
            f"padding {geometry.padding} differs from side to side, and not as 'same' does; pad "
            "the input with torch.nn.functional.pad, and give the layer what is even."
        )
    if reason is not None:
        raise errors.FormError(
            f"this layer is no convolution with a kernel of size {geometry.kernel_size}: {reason}"
        )
    weight = layer.weight.detach().flatten(2)  # [out, in / groups, heads]
    if isinstance(position, Field):
        table = position.table.detach().expand(layer.num_heads, *position.taps)
        mixed = weight.to(torch.float64) @ table.flatten(1).to(torch.float64).softmax(-1)
        weight = mixed.to(weight.dtype)
    make: Any = CONVS[len(geometry.stride) - 1]
    conv: Any = make(
        weight.shape[1] * layer.groups,
        weight.shape[0],
        geometry.kernel_size,
        geometry.stride,
        padding,
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


def _elsewhere(position: Any, geometry: Geometry, heads: int) -> str | None:
    """The sentence why heads do not look at a kernel's taps, or None."""
    taps = box(geometry.kernel_size, position.tensors()[0].device)
    if isinstance(position, Field):
        first = (0,) * len(geometry.kernel_size)  # tokens are the padded input
        found = position.taps, position.first, position.dilation
        if found != (geometry.kernel_size, first, geometry.dilation):
            return (
                f"its Field has taps {found[0]} from {found[1]} on with dilation {found[2]}, and "
                f"those of the kernel are from {first} on with dilation {geometry.dilation}."
            )
        return None
    wanted = taps * Grid(geometry.kernel_size).tensor(geometry.dilation, taps)
    if not isinstance(position, Shift) or not torch.equal(
        position.offsets.expand(heads, -1), wanted
    ):
        return (
            f"the heads of {position} look elsewhere; a layer with Shift on the taps, or with a "
            "Field, is one."
        )
    if position.padding_mode != geometry.padding_mode:
        return (
            f"its Shift reads {position.padding_mode!r} beyond the border, and its geometry says "
            f"{geometry.padding_mode!r}; give both one padding_mode."
        )
    return None


def _torch_padding(geometry: Geometry) -> str | list[int] | None:
    """The padding of a torch convolution, or None where it has none like it."""
    if all(left == right for left, right in geometry.padding):
        return [left for left, _ in geometry.padding]
    same = _halves(geometry.kernel_size, geometry.dilation)
    return "same" if geometry.padding == same and set(geometry.stride) == {1} else None


def _few_enough(weight: Tensor) -> tuple[Tensor, Tensor] | None:
    """`few_heads`, if they are fewer than taps and give the kernel to `_digits`."""
    if not bool(weight.isfinite().all()):
        return None
    scores, mix = few_heads(weight)
    wanted = weight.flatten(2).to(torch.float64)
    if len(scores) >= wanted.shape[-1]:
        return None
    mix_64, columns = mix.to(torch.float64), scores.to(torch.float64).softmax(-1)
    # Terms of both signs that cancel have roundings of their size, not of the kernel's.
    rounding = (mix_64.abs() @ columns).norm() * _eps_of_sums(weight) / 2
    missed = (mix_64 @ columns - wanted).norm() + rounding
    return (scores, mix) if bool(missed <= _digits(weight) * wanted.norm()) else None


def _digits(weight: Tensor) -> float:
    """What the kernel of a convolution means: its own rounding, and that of a sum over taps."""
    return torch.finfo(weight.dtype).eps + weight[0, 0].numel() * _eps_of_sums(weight)


def _eps_of_sums(weight: Tensor) -> float:
    return float(torch.finfo(compute_dtype(weight.dtype)).eps)


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
    basis = basis[:, sizes > _digits(weight) * sizes[:1]]
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
    scores = (columns / columns.sum(0)).mT.log().to(weight.dtype).contiguous()
    columns = scores.to(torch.float64).softmax(-1).mT  # P of the rounded scores
    mix = torch.linalg.lstsq(columns, wanted).solution  # X [heads, out in]
    mix = mix + torch.linalg.lstsq(columns, wanted - columns @ mix).solution  # 2 to 6 times nearer
    mix = mix.mT.reshape(*weight.shape[:2], -1)
    return scores, mix.to(weight.dtype).contiguous()


def _padding(conv: Any) -> tuple[tuple[int, int], ...]:
    """(left, right) for each axis; what "same" cannot halve goes to the right, as in torch."""
    if conv.padding == "valid":
        return ((0, 0),) * len(conv.kernel_size)
    if conv.padding == "same":
        return _halves(conv.kernel_size, conv.dilation)
    return tuple((p, p) for p in axes_of("padding", conv.padding, len(conv.kernel_size)))


def _halves(kernel_size: tuple[int, ...], dilation: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    totals = [d * (k - 1) for d, k in zip(dilation, kernel_size, strict=True)]
    return tuple((total // 2, total - total // 2) for total in totals)


def _copy(tensor: Tensor | None) -> nn.Parameter | None:
    if tensor is None:
        return None
    return nn.Parameter(tensor.detach().clone(), requires_grad=tensor.requires_grad)


def _check_shared(*tensors: Tensor | None) -> None:
    for tensor in tensors:
        if tensor is not None and not isinstance(tensor, nn.Parameter):
            raise errors.DtypeError(
                "the convolution's weight or bias is computed anew on each call (weight_norm and "
                "other parametrizations do that), so it cannot be shared; use share=False, or "
                "remove the parametrization first."
            )


def _checked(conv: Any, heads: str) -> Any:
    if heads not in HEADS:
        raise ValueError(f"heads is one of {', '.join(map(repr, HEADS))}, not {heads!r}.")
    if isinstance(conv, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
        raise errors.DtypeError(
            f"from_conv takes a convolution, and {type(conv).__name__} is the transpose of one: "
            "its output is sum_h A_h^T x W_h, where columns, not rows, are one-hot. Convert the "
            "convolution that it transposes; with A = layer.matrix(size), A.mT @ x is the product."
        )
    weight = getattr(conv, "weight", None)
    if isinstance(conv, CONVS) and isinstance(weight, nn.parameter.UninitializedParameter):
        raise errors.ShapeError(
            f"{type(conv).__name__} has no weights yet; run it on an input first."
        )
    kind = parametrize.type_before_parametrizations(conv)
    if kind not in CONVS:
        what = (
            f"{kind.__name__}, a subclass, whose forward may compute something else; copy its "
            "parameters into a convolution that does the same"
            if issubclass(kind, CONVS)
            else f"{kind.__name__}; replace the convolutions of a model one by one"
        )
        raise errors.DtypeError(f"from_conv takes torch.nn.Conv1d, Conv2d or Conv3d, not {what}.")
    errors.check_tensor("the convolution's weight", conv.weight)
    return conv
