"""The picture that a vision model was given, and where each token's patch lies on it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from regard import picture

_LONGEST = 384  # pixels of the picture's longer side in a page


@dataclass(frozen=True, eq=False)
class Image:
    """A picture and its patches.

    pixels: [3, height, width] between 0 and 1, as the model saw them, stretched to their range
    rows, columns: of the grid of patches, in the order of the tokens
    prefix: how many tokens come before the patches ([CLS], a distillation token, registers)
    """

    pixels: Tensor
    rows: int
    columns: int
    prefix: int

    @property
    def length(self) -> int:
        """How many tokens there are."""
        return self.prefix + self.rows * self.columns

    def labels(self) -> tuple[str, ...]:
        """Names of the tokens: where each patch lies, row and column from 0."""
        first = ["[CLS]", *(f"[{at}]" for at in range(1, self.prefix))]
        patches = [f"{r},{c}" for r in range(self.rows) for c in range(self.columns)]
        return (*first[: self.prefix], *patches)

    def png(self) -> str:
        """The picture as a base64 PNG, made smaller if need be."""
        longest = max(self.pixels.shape[-2:])
        pixels = self.pixels
        if longest > _LONGEST:
            scale = _LONGEST / longest
            pixels = nn.functional.interpolate(
                pixels[None], scale_factor=scale, mode="area", recompute_scale_factor=True
            )[0]
        colours = (255 * pixels.movedim(0, -1)).round().clamp(0, 255).byte()
        return picture.png_of(colours)


def of_inputs(model: nn.Module, inputs: Any, length: int) -> Image | None:
    """The picture among a model's inputs, if its patches explain the number of tokens.

    Read are `pixel_values` [batch, channels, height, width] (or such a tensor alone) and the
    patch size in the model's configuration. The grid comes from the real height and width; what
    is left of `length` comes before the patches.
    """
    pixels = inputs.get("pixel_values") if isinstance(inputs, Mapping) else inputs
    patch = getattr(getattr(model, "config", None), "patch_size", None)
    if not isinstance(pixels, Tensor) or pixels.dim() != 4 or patch is None:
        return None
    high, wide = (patch, patch) if isinstance(patch, int) else tuple(patch)
    rows, columns = pixels.shape[-2] // high, pixels.shape[-1] // wide
    prefix = length - rows * columns
    if not rows * columns or not 0 <= prefix <= 16:  # registers are 4 or 8
        return None
    shown = pixels[0].detach().float().cpu()
    shown = shown.expand(3, *shown.shape[1:]) if shown.shape[0] == 1 else shown[:3]
    if shown.shape[0] != 3:
        return None
    low, high_ = shown.amin(), shown.amax()
    shown = (shown - low) / (high_ - low).clamp(min=1e-12)
    return Image(shown, rows, columns, prefix)
