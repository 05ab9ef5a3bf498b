"""One attention call, as numbers: what a tap writes down and what a page reads."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from regard.errors import RegardError, ShapeError
from regard.look.rotation import Turned
from regard.mask import Causal, Dense, Mask
from regard.matrix import Attention, attention
from regard.normalizer import Softmax
from regard.position.base import Bias
from regard.score import Dot

# Keywords that reach a Hugging Face attention function and do not change what the `eager` and
# `sdpa` implementations compute (transformers/utils/generic.py, TransformersKwargs, and the
# call sites of models/*/modeling_*.py). `sliding_window` is in the mask already. The
# documents of `cu_seq_lens_*`, which "regard" reads, are recorded from its matrix.
# fmt: off
HARMLESS = frozenset({
    "cache", "cache_position", "config", "cu_seq_lens_k", "cu_seq_lens_q",
    "deterministic", "logits_to_keep", "max_length_k", "max_length_q", "num_items_in_batch",
    "output_attentions", "output_hidden_states", "output_router_logits", "past_key_values",
    "position_ids", "return_dict", "seq_idx", "token_type_ids", "use_cache",
})
READ = frozenset({
    "dropout", "is_causal", "position_bias", "s_aux", "scaling", "sliding_window", "softcap",
})
# fmt: on


class CaptureError(RegardError):
    """A model's attention could not be read: what was met, and what would work."""


@dataclass(frozen=True, eq=False)
class Mixing:
    """The layer that mixes the heads' outputs, o = W^o [b_1, ..., b_heads] + bias.

    name: of the layer;  weight: [width, heads * e];  bias: [width] or None; the model's own
        parameters, not copies
    """

    name: str
    weight: Tensor
    bias: Tensor | None


@dataclass(frozen=True, eq=False)
class Captured:
    """One attention call as the model made it.

    name: the module's name inside the model
    number: its place among all attention calls of the model, counted from 0
    route: "interface", "sdpa", "regard" or "arrays"; how it was read
    query: [batch, heads, n, d];  key: [batch, kv_heads, m, d], head h reads key head
        h // (heads // kv_heads);  value: [batch, kv_heads, m, e] or None
    mask: boolean, broadcasts to [batch, heads, n, m], True = may attend; None = all visible
    causal: key j is visible to query i only if j <= i, besides what the mask says
    scale, softcap: logits = softcap * tanh(scale * q.k / softcap), or scale * q.k
    bias: added after scale and softcap, broadcasts to [batch, heads, n, m], or None
    sinks: [heads], one logit per head that has no key and no value, or None
    output: [batch, heads, n, e], what the model itself computed, before its output projection;
        None where the model never held it as one tensor
    formula: of a matrix of regard's: the score whose logits are in `bias`, if it is no scaled dot
        product, or the normalizer, if it is not softmax
    inputs: [batch, n, d_model], the vectors that the module was given, or None if unknown
    made_by: for query, key and value the linear layer of the module that made it of the inputs,
        "" where none did
    memory: [batch, m, width], the vectors that keys and values were made of, where these are not
        `inputs`; memory_of: the module whose output they are, "" if unknown
    turned: the angles by which rotary encoding turned query and key, if it did and that was seen
    unturned: what speaks for a rotation, where none was found; "" if nothing does
    mixing: the layer that was given the heads' outputs, or None if none was seen
    steps: of a generation that was joined into one call: how many queries each step had
    given: of a matrix of regard's under another normalizer than softmax: itself
    """

    name: str
    route: str
    query: Tensor
    key: Tensor
    value: Tensor | None
    mask: Tensor | None
    scale: float
    causal: bool = False
    bias: Tensor | None = None
    sinks: Tensor | None = None
    softcap: float | None = None
    output: Tensor | None = None
    number: int = 0
    formula: str = ""
    inputs: Tensor | None = None
    made_by: tuple[str, str, str] = ("", "", "")
    memory: Tensor | None = None
    memory_of: str = ""
    turned: Turned | None = None
    unturned: str = ""
    mixing: Mixing | None = None
    steps: tuple[int, ...] = ()
    given: Attention | None = None

    @property
    def matrix(self) -> Attention:
        """The attention matrix of this call, lazily: shape [batch, heads, n, m]."""
        if self.given is not None:
            return self.given
        mask: Mask | None = Causal(0) if self.causal else None
        if self.mask is not None:
            mask = Dense(self.mask) if mask is None else mask & Dense(self.mask)
        return attention(
            self.query,
            self.key,
            score=Dot(scale=self.scale, softcap=self.softcap),
            position=None if self.bias is None else Bias(self.bias),
            mask=mask,
            normalizer=Softmax() if self.sinks is None else Softmax(sink=self.sinks),
        )

    def item(self, index: int) -> Captured:
        """One sequence of the batch, in float32 on the CPU; the batch axis stays, with length 1."""

        def pick(tensor: Tensor | None) -> Tensor | None:
            if tensor is None:
                return None
            at = index if tensor.shape[0] > 1 else 0
            one = tensor[at : at + 1].cpu()
            return one if one.dtype == torch.bool else one.float()

        query, key = pick(self.query), pick(self.key)
        assert query is not None
        assert key is not None
        return replace(
            self,
            query=query,
            key=key,
            value=pick(self.value),
            mask=pick(self.mask),
            bias=pick(self.bias),
            sinks=None if self.sinks is None else self.sinks.float().cpu(),
            output=pick(self.output),
            inputs=pick(self.inputs),
            memory=pick(self.memory),
            turned=None if self.turned is None else self.turned.item(index),
            given=None,  # what a page shows needs none
        )


def record(
    name: str, tensors: tuple[Tensor, Tensor, Tensor], mask: Any, dropout: float
) -> Captured:
    """Tensors of four axes and a mask, as a call; the scale and the rest are for the tap to add.

    Raises CaptureError under dropout, or for a mask that cannot be read.
    """
    query, key, value = tensors
    if dropout:
        raise CaptureError(
            f"layer '{name}' drops weights at random (dropout {dropout}), so no weight is the "
            "model's own; call model.eval() first"
        )
    mask = mask.detach() if isinstance(mask, Tensor) else mask
    keep, bias = split_mask(name, mask, (query.shape[-2], key.shape[-2]))
    return Captured(
        name=name,
        route="sdpa",
        query=kept(query),
        key=kept(key),
        value=kept(value),
        mask=keep,
        scale=1.0,
        bias=bias,
    )


def split_mask(
    name: str, mask: Any, lengths: tuple[int, int]
) -> tuple[Tensor | None, Tensor | None]:
    """A mask as torch and Hugging Face pass it -> (boolean mask or None, bias or None).

    Boolean: True = may attend. Float: added to the logits; -inf or anything below half the
    dtype's lowest number forbids (models use `finfo.min`, which rounding makes the same), the
    rest is bias. Both results have four axes.
    """
    if mask is None:
        return None, None
    if not isinstance(mask, Tensor) or not (mask.dtype == torch.bool or mask.is_floating_point()):
        kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise CaptureError(
            f"layer '{name}' got a mask of kind {kind}; readable are boolean and float tensors"
        )
    mask = four_axes(mask)
    allowed = tuple({1, length} for length in lengths)
    if mask.shape[-2] not in allowed[0] or mask.shape[-1] not in allowed[1]:
        raise ShapeError(
            f"layer '{name}' got a mask of shape {tuple(mask.shape)}, which does not fit "
            f"{lengths[0]} queries and {lengths[1]} keys"
        )
    if mask.dtype == torch.bool:
        return (None if bool(mask.all()) else mask.clone()), None
    keep = mask > torch.finfo(mask.dtype).min / 2
    bias = torch.where(keep, mask, 0)
    some = bias.requires_grad or bool(bias.any())  # zeros may be learned, too
    return (None if bool(keep.all()) else keep), (bias if some else None)


def four_axes(tensor: Tensor) -> Tensor:
    """Four axes: missing ones in front have length 1, surplus ones are merged into the batch."""
    if tensor.dim() > 4:
        return tensor.reshape(-1, *tensor.shape[-3:])
    return tensor.reshape(*(1,) * (4 - tensor.dim()), *tensor.shape)


def kept(tensor: Tensor) -> Tensor:
    """A copy of its own: a view into a fused qkv would keep three times its size alive."""
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def pair_weights(call: Captured, logsumexp: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """The weights of single pairs, whatever the mask says: [heads, pairs] in float32.

    logsumexp: [heads, n];  i, j: [pairs]
    Cost: pairs x d products per head, in pieces of at most 2**22 numbers.
    """
    heads, n, d = call.query.shape[1:]
    m = call.key.shape[2]
    step = max(1, 2**22 // max(1, heads * d))
    parts = []
    for at in range(0, len(i), step):
        rows, columns = i[at : at + step], j[at : at + step]
        key = call.key[0, :, columns].repeat_interleave(heads // call.key.shape[1], 0)
        logits = (call.query[0, :, rows] * key).sum(-1) * call.scale
        if call.softcap:
            logits = call.softcap * torch.tanh(logits / call.softcap)
        if call.bias is not None:
            logits = logits + call.bias[0].expand(call.bias.shape[1], n, m)[:, rows, columns]
        parts.append((logits - logsumexp[:, rows]).exp())
    return torch.cat(parts, -1) if parts else torch.zeros(heads, 0)
