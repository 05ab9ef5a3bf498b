"""What an attention module was given, what made query, key and value of it, and what came after."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from regard.look.record import Captured, Mixing, kept
from regard.look.rotation import given_angles, turned

_ROWS = 8  # tokens in which a layer's output is compared
_ROTARY = ("rope_parameters", "rope_scaling", "rotary_dim", "rotary_pct")  # Hugging Face's words


@dataclass(frozen=True, eq=False)
class Open:
    """A module that is running: its name, itself, its arguments, and what its leaves have made.

    sources: names of the modules whose outputs are still there
    """

    name: str
    module: nn.Module
    given: list[Any]
    sources: Mapping[Tensor, str]
    made: list[tuple[str, Tensor]] = field(default_factory=list)

    def completed(self, call: Captured) -> Captured:
        """The call with the vectors it was made of, the layers that made it, and its rotation."""
        batch, _, n = call.query.shape[:3]
        m = call.key.shape[2]
        tensors = self._tensors()
        inputs = next((x for x in tensors if x.shape[:2] == (batch, n)), None)
        if inputs is None:
            return call
        others = [x for x in tensors if x is not inputs and x.shape[:2] == (batch, m)]
        own = [inputs] if n == m else []
        asks, _ = self._maker(call.query, [inputs])
        answers, of_key = self._maker(call.key, [*own, *others])
        gives, of_value = self._maker(call.value, [*own, *others])
        memory = of_key if of_key is not None else of_value
        if memory is None and n != m and len(others) == 1:
            memory = others[0]
        if memory is inputs:
            memory = None
        found, unseen = call.turned, ""
        if not (asks or answers or found):
            given = given_angles([*self.given, *(made for _, made in self.made)])
            found = turned(self._inside(), call.query, call.key, given)
            unseen = self._unseen(bool(given)) if found is None else ""
        call = replace(
            call,
            inputs=kept(inputs),
            made_by=(asks, answers, gives),
            memory=None if memory is None else kept(memory),
            memory_of="" if memory is None else self.sources.get(memory, ""),
            turned=found,
            unturned=unseen,
        )
        if isinstance(self.module, nn.MultiheadAttention):  # which never calls its last layer
            last = self.module.out_proj
            name = f"{self.name}.out_proj".lstrip(".")
            call = replace(call, mixing=Mixing(name, last.weight.detach(), last.bias))
        return call

    def _inside(self) -> list[tuple[str, Tensor]]:
        """What the leaves have made, by their names within the module."""
        return [(name.removeprefix(f"{self.name}."), made) for name, made in self.made]

    def _unseen(self, given: bool) -> str:
        """What speaks for a rotation that was not found."""
        if given:
            return "it was given cosines and sines of positions"
        config = getattr(self.module, "config", None)
        for owner in (self.module, config):
            for word in _ROTARY:
                if getattr(owner, word, None):
                    return f"“{word}” is set in the model"
        if getattr(config, "position_embedding_type", "") == "rotary":
            return "the model’s position_embedding_type is rotary"
        return ""

    def _tensors(self) -> list[Tensor]:
        """Sequences of vectors among the arguments, [batch, length, width]."""
        found = [
            x
            for x in self.given
            if isinstance(x, Tensor) and x.is_floating_point() and x.dim() == 3
        ]
        if isinstance(self.module, nn.MultiheadAttention) and not self.module.batch_first:
            return [x.transpose(0, 1) for x in found]
        return found

    def _maker(self, tensor: Tensor | None, candidates: list[Tensor]) -> tuple[str, Tensor | None]:
        """The linear layer and the vectors whose product a tensor is, up to rounding.

        ("", None) if none is: rotated or normalized queries and keys are no layer's output.
        """
        if tensor is None:
            return "", None
        flat = tensor.transpose(1, 2).flatten(2)
        for given in candidates:
            if flat.shape[1] != given.shape[1]:
                continue
            for name, weight, bias in _layers(self.module, flat.shape[-1]):
                if weight.shape[-1] != given.shape[-1] or weight.dtype != given.dtype:
                    continue
                if _is_product(flat[:1, :_ROWS], given[:1, :_ROWS], weight, bias):
                    return name, given
        return "", None


def _is_product(made: Tensor, given: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether a tensor is what a linear layer makes of another, to rounding.

    The result is rounded to its dtype; its sums are rounded in float32 at least, each in
    proportion to the sum of the absolute products.
    """
    # The function, not the module: whose hooks would take this for a call of the model.
    again = nn.functional.linear(given, weight, bias)
    sizes = nn.functional.linear(given.abs(), weight.abs())
    own = torch.finfo(given.dtype).eps
    allowed = 2 * own * again.abs() + 8 * min(own, torch.finfo(torch.float32).eps) * sizes
    return bool(((again - made).abs() <= allowed).all())


class Running(list[Open]):
    """The modules that run now, outermost first, of a model whose calls are recorded."""

    def __init__(self, calls: list[Captured]) -> None:
        super().__init__()
        self._calls = calls
        self._sources: Any = WeakIdKeyDictionary()

    def enter(self, module: nn.Module, name: str, given: list[Any]) -> None:
        """A module begins; it may be the one that mixes the heads of the last call."""
        call = self._calls[-1] if self._calls else None
        if call is not None and call.mixing is None and call.output is not None and given:
            width = call.output.shape[1] * call.output.shape[3]
            held = _held(module)
            if held is not None and held[0].shape[1] == width and isinstance(given[0], Tensor):
                heads = call.output.transpose(1, 2).flatten(2)
                alike = heads.numel() == given[0].numel() and heads.dtype == given[0].dtype
                if alike and torch.equal(heads.reshape(given[0].shape), given[0]):
                    self._calls[-1] = replace(call, mixing=Mixing(name, *held))
        self.append(Open(name, module, given, self._sources))

    def leave(self, module: nn.Module, output: Any) -> None:
        """A module ends: its tensors have a name, until one around it hands them on."""
        name = self.pop().name
        for tensor in _outputs(output):
            self._sources[tensor] = name
            if self and not any(True for _ in module.children()):
                self[-1].made.append((name, tensor))


def _outputs(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Mapping):
        output = tuple(output.values())
    for one in output if isinstance(output, tuple | list) else (output,):
        if isinstance(one, Tensor):
            yield one


def _held(module: nn.Module) -> tuple[Tensor, Tensor | None] | None:
    """Weight [out, in] and bias of a linear layer; GPT-2's keeps its weight transposed."""
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2 or isinstance(module, nn.Embedding):
        return None
    bias = bias.detach() if isinstance(bias, Tensor) else None
    transposed = type(module).__name__ == "Conv1D"
    return (weight.detach().mT if transposed else weight.detach()), bias


def _layers(module: nn.Module, width: int) -> Iterator[tuple[str, Tensor, Tensor | None]]:
    """Linear layers with so many outputs; of one that makes several, the parts: "qkv[0:64]"."""
    for name, layer in module.named_modules():
        held = _held(layer)
        if isinstance(layer, nn.MultiheadAttention) and layer.in_proj_weight is not None:
            name, held = "in_proj", (layer.in_proj_weight.detach(), layer.in_proj_bias)
        if held is None:
            continue
        weight, bias = held
        outputs = weight.shape[0]
        if outputs == width:
            yield name, weight, bias
            continue
        # Queries come first, values last, keys before them (GPT-2, Phi-3, torch).
        for start in {0, outputs - 2 * width, outputs - width}:
            if 0 <= start < outputs - width + 1 and outputs > width:
                part = slice(start, start + width)
                yield (
                    f"{name}[{start}:{start + width}]",
                    weight[part],
                    (None if bias is None else bias[part]),
                )
