"""Hugging Face models on regard: importing this registers attn_implementation="regard".

    import regard.hf
    model = AutoModel.from_pretrained(path, attn_implementation="regard")
    model(**batch, output_attentions=True).attentions  # lazy matrices: looked at in O(n) memory

output_i = sum_j A_ij value_j,
A_ij = softmax over visible j of softcap(scaling query_i . key_j) + bias_ij, with the model's sinks

query [batch, heads, n, d]; key, value [batch, key heads, m, d]; A [batch, heads, n, m], lazily.
Masks arrive as rules (`regard.hf.masks`) and are kept as runs. Weights are there for the asking:
`output_attentions=True` as an argument of a call, or of `generate`, gives `regard.Attention`s in
the places of tensors; `.dense()` makes the tensor. In the configuration it raises, as for every
implementation but "eager".

A query that sees no key gives 0 here; "eager" adds the lowest number to all its logits and so
spreads its weight evenly over keys that the model forbids. Such rows belong to padding.
The documents of `cu_seq_lens_q` and `cu_seq_lens_k` are honoured, as flash attention does; "eager"
and "sdpa" ignore them, and packed tokens see the documents before their own.

What a model asks of its attention and regard does not compute raises ModelError.
Cost: O(n) memory; a mask function that is not known here is asked about every pair once. Keys of a
static cache, which later steps overwrite, are copied where attentions are asked for; where they
are not, hooks on attention layers find None in the place of the matrix.
Source: transformers, integrations/sdpa_attention.py and masking_utils.py, which say what the
arguments mean.

>>> from transformers import LlamaConfig, LlamaModel
>>> config = LlamaConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
...                      num_attention_heads=2, attn_implementation="regard")
>>> import torch
>>> output = LlamaModel(config)(torch.tensor([[1, 2, 3]]), output_attentions=True)
>>> output.attentions[0]
Attention(1, 2, 3, 3): Dot(scale=0.5), Causal(), Softmax(); float32, lazy
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from regard.dropout import Dropout
from regard.errors import MissingPackageError, RegardError
from regard.look.record import HARMLESS, READ, split_mask
from regard.mask import Causal, Dense, Documents, Mask
from regard.matrix import Attention, attention
from regard.normalizer import Softmax
from regard.opaque import opaque
from regard.position.base import Bias, Position
from regard.score import Dot

OLDEST = "5.24"  # that the tests were run with; in 5.8 T5 does not ask the interface

try:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.utils import output_capturing

    from regard.hf.masks import Structure, structure
except ImportError as error:
    raise MissingPackageError(f"transformers>={OLDEST}", extra="hf") from error

NAME = "regard"


class ModelError(RegardError):
    """A model asks of its attention what regard does not compute: what, and what would work."""


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    **asked: Any,
) -> tuple[Tensor, Attention | None]:
    """Do the work of `AttentionInterface`: (output [batch, n, heads, e], the matrix A).

    The parameters are Hugging Face's, and `asked` is what else a layer or its caller names.
    No matrix where its keys will be overwritten and nobody asks for it (see `_to_keep`).
    """
    _check(module, asked)
    query, key, value = _autocast(query, key, value)
    lengths = query.shape[-2], key.shape[-2]
    mask, position = _visible(module, lengths, attention_mask, asked)
    sinks = asked.get("s_aux")
    matrix = attention(
        query,
        key,
        score=Dot(scale=scaling, softcap=asked.get("softcap")),
        position=position,
        mask=mask,
        normalizer=Softmax() if sinks is None else Softmax(sink=sinks.reshape(-1).to(query.dtype)),
        dropout=Dropout(float(dropout)) if dropout and module.training else None,
    )
    output = matrix.matmul(value).transpose(1, 2).contiguous()
    return output, _to_keep(matrix, asked)


def _check(module: nn.Module, asked: Mapping[str, Any]) -> None:
    given = {word for word, argument in asked.items() if argument is not None}
    if "cache" in given:
        raise ModelError(
            f"{_name(module)} reads keys from a paged cache (continuous batching), as regard does "
            "not; what works: model.generate, or attn_implementation='sdpa'"
        )
    if unknown := given - HARMLESS - READ:
        raise ModelError(
            f"{_name(module)} passes {', '.join(sorted(unknown))} to its attention, which regard "
            "does not know and which may change the result; what works: "
            "model.set_attn_implementation('eager')"
        )


def _name(module: nn.Module) -> str:
    layer = getattr(module, "layer_idx", None)
    return type(module).__name__ + ("" if layer is None else f" of layer {layer}")


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Under autocast products are taken in its dtype, as torch's own attention does."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind) or tensors[0].dtype == torch.float64:
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(tensor.to(dtype) for tensor in tensors)


def _visible(
    module: nn.Module, lengths: tuple[int, int], given: Any, asked: Mapping[str, Any]
) -> tuple[Mask | None, Position | None]:
    """The mask and the bias of a call."""
    bias = asked.get("position_bias")
    position: Position | None = None if bias is None else Bias(bias)
    mask: Mask | None = None
    causal = False
    if isinstance(given, Structure):
        given.check(*lengths)
        mask = None if given.rule is None else given
    elif given is not None:  # a tensor of the user's own
        keep, added = split_mask(_name(module), given, lengths)
        mask = None if keep is None else Dense(keep)
        if added is not None:
            position = Bias(added) if position is None else position + Bias(added)
    else:
        causal = _is_causal(module, lengths, asked)
        mask = Causal() if causal else None
    packed = _packed(module, lengths, causal, asked)
    if packed is not None:
        mask = packed if mask is None else mask & packed
    return mask, position


def _is_causal(module: nn.Module, lengths: tuple[int, int], asked: Mapping[str, Any]) -> bool:
    """Whether a call without a mask is causal: as integrations/sdpa_attention.py decides it."""
    window = asked.get("sliding_window")
    if window is not None and lengths[1] > window:
        raise ModelError(
            f"{_name(module)} attends within a window of {window} over {lengths[1]} keys, but "
            "passes no mask that says so; what works: model.set_attn_implementation('sdpa')"
        )
    causal = asked.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    return bool(causal) and lengths[0] > 1


def _packed(
    module: nn.Module, lengths: tuple[int, int], causal: bool, asked: Mapping[str, Any]
) -> Documents | None:
    """The documents that `cu_seq_lens_q` and `cu_seq_lens_k` count, of one packed sequence."""
    both = asked.get("cu_seq_lens_q"), asked.get("cu_seq_lens_k")
    if both[0] is None and both[1] is None:
        return None
    ids = []
    for ends, length in zip(both, lengths, strict=True):
        if ends is None or int(ends[0]) != 0 or int(ends[-1]) != length:
            raise ModelError(
                f"{_name(module)} is told that its documents end at {ends}, which does not cover "
                f"{length} tokens from 0 on; give cu_seq_lens_q and cu_seq_lens_k of one packed "
                "sequence, or position_ids that start again"
            )
        at = torch.arange(length, dtype=ends.dtype, device=ends.device)
        ids.append(torch.searchsorted(ends, at, right=True))
    if causal and ids[0].tolist() != ids[1].tolist():
        raise ModelError(
            f"{_name(module)} is causal over documents whose queries and keys differ in number; "
            "what works: attn_implementation='eager' with a mask"
        )
    return Documents(*ids)


@opaque
def _to_keep(matrix: Attention, asked: Mapping[str, Any]) -> Attention | None:
    """The matrix for looking at it later, when a static cache has overwritten its keys.

    Such keys have been written to in place; inference tensors do not tell. They are copied where
    attentions are asked for; else there is no matrix, rather than one that changes later.
    """
    key = matrix.key
    if not (key.is_inference() or key._version):
        return matrix
    return replace(matrix, key=key.clone()) if _is_asked_for(asked) else None


def _is_asked_for(asked: Mapping[str, Any]) -> bool:
    """Whether somebody may read the matrix of a call.

    Not every layer hands on what its model is asked (GPT-2's does not): a model collects the
    results of its layers by hooks, into what `capture_outputs` sets (transformers,
    utils/output_capturing.py). Outside of such models anybody may read it.
    """
    collector = getattr(output_capturing, "_active_collector", None)
    collected = None if collector is None else collector.get()
    if collected is None or asked.get("output_attentions"):
        return True
    return any("attentions" in name for name in collected)


def register() -> None:
    """Register attention and mask under the name "regard"; importing `regard.hf` does it.

    Both, always: under a name without a mask function models drop their masks without a word.
    """
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, structure)


register()
