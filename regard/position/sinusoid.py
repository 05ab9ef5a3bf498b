"""The sinusoidal encoding: one formula, and the three orders of channels that are in use."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from regard import errors
from regard.part import widest

LAYOUTS = ("interleaved", "halves", "fairseq")


def sinusoid(
    positions: Tensor, width: int, *, layout: str = "interleaved", base: float = 10000.0
) -> Tensor:
    """The sinusoidal encoding of positions [*x]: [*x, width], float32 (float64 of float64).

    angle_c = position / base^(2 c / width), c = 0, 1, ...

    layout "interleaved": sin of angle c in channel 2 c, cos in channel 2 c + 1 (Vaswani et al.)
    layout "halves": all sines, then all cosines (tensor2tensor's order, and Marian's)
    layout "fairseq": as halves, but angle_c = position / base^(c / (width / 2 - 1)), which differs
        slightly; an odd width ends in a channel of zeros
    positions: whole numbers or fractions
    Cost: one sine or cosine per number; angles are taken in float64.
    Vaswani et al. 2017, arXiv:1706.03762, section 3.5.

    >>> sinusoid(torch.arange(2), 4)
    tensor([[0.0000, 1.0000, 0.0000, 1.0000],
            [0.8415, 0.5403, 0.0100, 0.9999]])
    """
    errors.check_number("sinusoid's width", width, whole=True, least=1)
    if layout not in LAYOUTS:
        raise ValueError(f"sinusoid's layout must be one of {', '.join(LAYOUTS)}; not {layout!r}.")
    exact = widest(positions.device)
    pairs = width // 2 if layout == "fairseq" else (width + 1) // 2
    step = torch.arange(pairs, device=positions.device, dtype=exact)
    exponent = step / max(width // 2 - 1, 1) if layout == "fairseq" else 2 * step / width
    angle = positions.to(exact)[..., None] * base**-exponent
    sines, cosines = angle.sin(), angle.cos()
    if layout == "interleaved":
        encoding = torch.stack([sines, cosines], -1).flatten(-2)[..., :width]
    elif layout == "halves":
        encoding = torch.cat([sines, cosines[..., : width // 2]], -1)
    else:
        encoding = F.pad(torch.cat([sines, cosines], -1), (0, width % 2))
    return encoding if positions.dtype == torch.float64 else encoding.float()
