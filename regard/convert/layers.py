"""torch.nn.MultiheadAttention, alone or inside a model, becomes regard.nn.MultiHeadAttention."""

from __future__ import annotations

from torch import nn

from regard.custom import PairFunction
from regard.nn import MultiHeadAttention
from regard.normalizer import Normalizer, Softmax
from regard.position import Position
from regard.score import Dot, Score


def from_torch(
    layer: nn.MultiheadAttention,
    *,
    score: Score | PairFunction = Dot(),
    position: Position | None = None,
    normalizer: Normalizer = Softmax(),
) -> MultiHeadAttention:
    """The layer with the same parameters (the same tensors, not copies), mode and hooks.

    score, position, normalizer: parts in the place of the scaled dot product and softmax
    Raises TypeError for a subclass, whose forward may be another.

    >>> import torch
    >>> theirs = nn.MultiheadAttention(16, 4).eval()
    >>> ours, x = from_torch(theirs), torch.randn(5, 2, 16)
    >>> torch.allclose(ours(x, x, x)[0], theirs(x, x, x)[0], atol=1e-6)
    True
    """
    _check_exact(layer, "the layer")
    ours = MultiHeadAttention(
        layer.embed_dim,
        layer.num_heads,
        layer.dropout,
        layer.in_proj_bias is not None,
        layer.bias_k is not None,
        layer.add_zero_attn,
        layer.kdim,
        layer.vdim,
        layer.batch_first,
        "meta",
        score=score,
        position=position,
        normalizer=normalizer,
    )
    for name, parameter in layer.named_parameters(recurse=False):
        setattr(ours, name, parameter)
    ours.out_proj = layer.out_proj
    for name, hooks in vars(layer).items():
        if "hook" in name:  # torch's own dictionaries and flags, so that handles stay good
            setattr(ours, name, hooks)
    return ours.train(layer.training)


def swap(
    model: nn.Module,
    *,
    score: Score | PairFunction = Dot(),
    position: Position | None = None,
    normalizer: Normalizer = Softmax(),
) -> nn.Module:
    """Put regard's layer in the place of every torch.nn.MultiheadAttention inside a model.

    The model is changed and returned; with the default parts it computes the same as before, with
    the same parameters under the same names. A layer that stands in several places stays one.
    `nn.TransformerEncoder` and `Decoder` call the new layers in evaluation, too: their own fast
    paths, which would compute plain attention from the weights, do not start.
    Raises TypeError for a subclass, whose forward may be another, and ValueError if there is none.

    >>> model = swap(nn.Transformer(16, 4, 1, 1, 32, batch_first=True))
    >>> type(model.decoder.layers[0].multihead_attn)
    <class 'regard.nn.multihead.MultiHeadAttention'>
    """
    found = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, nn.MultiheadAttention)
    }
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no torch.nn.MultiheadAttention inside; a Hugging Face "
            'model takes attn_implementation="regard" after import regard.hf.'
        )
    for name, layer in found.items():
        _check_exact(layer, f"{name or 'the model'!r}")
    ours = {
        id(layer): from_torch(layer, score=score, position=position, normalizer=normalizer)
        for layer in found.values()
    }
    if id(model) in ours:
        return ours[id(model)]
    for parent in model.modules():
        for name, child in list(parent._modules.items()):  # named_children() leaves out repeats
            if id(child) in ours:
                setattr(parent, name, ours[id(child)])
        if isinstance(parent, nn.TransformerEncoder):
            # It would pack padded batches into nested tensors, which only torch's kernel reads.
            parent.use_nested_tensor = False
    return model


def _check_exact(layer: nn.Module, where: str) -> None:
    if type(layer) is not nn.MultiheadAttention:
        raise TypeError(
            f"{where} is a {type(layer).__module__}.{type(layer).__qualname__}; only "
            "torch.nn.MultiheadAttention itself is known to compute what takes its place."
        )
