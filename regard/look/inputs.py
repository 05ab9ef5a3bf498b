"""What an attention module was given, and which of its linear layers made query, key and value."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from regard.look.record import Captured, kept


@dataclass(frozen=True, eq=False)
class Open:
    """A module that is running: its name, itself, and its arguments."""

    name: str
    module: nn.Module
    given: list[Any]

    def completed(self, call: Captured) -> Captured:
        """The call with the vectors its queries came from, and the layers that made them."""
        batch, _, n = call.query.shape[:3]
        for given in self.given:
            if not isinstance(given, Tensor) or not given.is_floating_point():
                continue
            if given.dim() == 3 and given.shape[:2] == (batch, n):
                return replace(call, inputs=kept(given), made_by=self._makers(call, given))
        return call

    def _makers(self, call: Captured, given: Tensor) -> tuple[str, str, str]:
        """For query, key and value the linear layer whose output it is, "" if none gives it.

        A layer is found by its numbers: its output, split into heads, equals what was recorded up
        to rounding. Rotated or normalized queries and keys are no layer's output.
        """
        names = []
        for tensor in (call.query, call.key, call.value):
            names.append("")
            if tensor is None or tensor.shape[2] != given.shape[1]:
                continue
            flat = tensor.transpose(1, 2).flatten(2)
            for name, layer in self.module.named_modules():
                if not isinstance(layer, nn.Linear) or layer.in_features != given.shape[-1]:
                    continue
                if layer.out_features != flat.shape[-1] or layer.weight.dtype != given.dtype:
                    continue
                # The function, not the module: whose hooks would take this for a call of the model.
                made = nn.functional.linear(given[:1, :8], layer.weight, layer.bias)
                near = torch.finfo(given.dtype).eps * 64
                if torch.allclose(made, flat[:1, :8], rtol=near, atol=near):
                    names[-1] = name
                    break
        return names[0], names[1], names[2]
