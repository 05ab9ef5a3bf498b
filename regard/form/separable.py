"""Additive relevance with tanh by one division for four channels: e^(2q + 2k) = e^(2q) e^(2k).

    w . tanh(q + k) = sum_d |w_d| - 2 w_max sum_d 1 / a_d,
    a_d = c_d + Q_d K_d,  c_d = w_max / |w_d|,
    Q_d = c_d e^(2 s_d (q_d - o_d)),  K_d = e^(2 s_d (k_d + o_d))

with s_d the sign of w_d (tanh is odd) and o_d an offset that tanh(q + k) does not see. The tables Q
and K cost one exponential per token and channel, taken in float64; per pair and channel there is a
quarter of a division. The kernel adds up 1 / a_d (csrc/parts.h) and, backward, derivatives
(csrc/attend_grad.h).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from regard.form.first_order import each

# Where both q and k of a channel reach farther than this from their middles, no offset keeps the
# tables in float32's range: e^(2 * 21) = 2^60.6. tanh is then computed pair by pair.
HALF_RANGE = 21.0
LARGEST_EXPONENT = 62.0  # e^62 = 2^89.4
LARGEST_SUMMAND = 2.0**31
FOURS = 4


class Tables(NamedTuple):
    """What stands in place of query, key and weight."""

    query: Tensor  # [*batch, heads, n, d padded to fours]
    key: Tensor  # [*batch, heads, m, the same]
    weight: Tensor  # [*batch, heads, the same + 2]: c, sum |w|, -2 w_max


def tables(query: Tensor, key: Tensor, weight: Tensor) -> Tables | None:
    """Make the tables, with gradients; None where the range of both vectors is too large."""
    if 0 in (query.numel(), key.numel()):
        return None
    offset = _offset(query.detach(), key.detach())
    if offset is None:
        return None
    run: Any = _Tables.apply
    return Tables(*run(query, key, weight, offset))


def _offset(query: Tensor, key: Tensor) -> Tensor | None:
    """Middle of query's or of -key's range, whichever is smaller, [*batch, heads or 1, 1, d]."""
    sides = []
    for vectors in (query, key):
        low, high = vectors.aminmax(dim=-2, keepdim=True)
        if vectors.dim() > 2:  # heads may share keys: one offset for all
            low, high = low.amin(-3, keepdim=True), high.amax(-3, keepdim=True)
        sides.append(((high.double() + low) / 2, (high.double() - low) / 2))
    (middle_q, half_q), (middle_k, half_k) = sides
    if bool((torch.minimum(half_q, half_k) > HALF_RANGE).any()):
        return None
    return torch.where(half_q <= half_k, middle_q, -middle_k)


class _Tables(torch.autograd.Function):
    """The tables; what comes back for them are the kernel's sums, not derivatives of tables."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, weight: Tensor, offset: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(weight)
        ctx.shapes = query.shape, key.shape
        wide = weight.double()
        size = wide.abs()
        largest = size.amax(-1, keepdim=True)
        largest = torch.where(largest == 0, 1, largest)
        c = (largest / size).clamp(max=LARGEST_SUMMAND)
        sign = torch.where(wide < 0, -2.0, 2.0)[..., None, :]
        if weight.dim() > 1 and weight.shape[-2] > 1 and query.dim() > 2:  # signs differ by head
            key = key.repeat_interleave(max(query.shape[-3] // key.shape[-3], 1), -3)
        of_query = _exp(sign * (query.double() - offset)) * c[..., None, :]
        of_key = _exp(sign * (key.double() + offset))
        pad = -query.shape[-1] % FOURS
        row = torch.cat(
            [
                torch.nn.functional.pad(c, (0, pad), value=LARGEST_SUMMAND),
                size.sum(-1, keepdim=True),
                -2 * largest,
            ],
            -1,
        )
        padded = (torch.nn.functional.pad(x, (0, pad)) for x in (of_query, of_key))
        of_query, of_key = (x.float() for x in padded)
        return of_query, of_key, row.float()

    @staticmethod
    def backward(ctx: Any, *sums: Tensor | None) -> Sequence[Tensor | None]:
        return each(_backward, ctx, sums)


def _backward(ctx: Any, saved: Sequence[Tensor], *sums: Tensor | None) -> tuple[Tensor | None, ...]:
    (weight,) = saved
    width = weight.shape[-1]
    found: list[Tensor | None] = []
    for sum_, shape in zip(sums[:2], ctx.shapes, strict=True):
        if sum_ is None:
            found.append(None)
            continue
        gradient = sum_[..., :width] * (4 * weight.float()[..., None, :])
        if len(shape) > 2 and 1 < shape[-3] < gradient.shape[-3]:
            gradient = gradient.unflatten(-3, (shape[-3], -1)).sum(-3)
        found.append(gradient.sum_to_size(shape))
    of_weight = sums[2]
    if of_weight is not None:
        of_weight = of_weight[..., :width] * torch.where(weight < 0, -1, 1)
        of_weight = of_weight.sum_to_size(weight.shape).to(weight.dtype)
    return found[0], found[1], of_weight, None


def _exp(exponent: Tensor) -> Tensor:
    return exponent.clamp(-LARGEST_EXPONENT, LARGEST_EXPONENT).exp()
