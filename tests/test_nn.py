"""Self-attention as a layer, with any part; what torch's layer has too is in test_multihead.py."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

import regard
from regard import (
    Additive,
    Alibi,
    Attention,
    Bias,
    Causal,
    Features,
    RowSum,
    ShapeError,
    Softmax,
)
from regard.nn import RecurrentAttention, SelfAttention

torch.manual_seed(0)


@pytest.mark.parametrize("kv_heads", [None, 1, 2])
def test_self_attention_with_grouped_heads(kv_heads):
    layer = SelfAttention(16, 4, num_kv_heads=kv_heads).double()
    x = torch.randn(2, 3, 7, 16, dtype=torch.float64)
    output, A = layer(x)
    assert output.shape == x.shape
    assert A.shape == (2, 3, 4, 7, 7)
    heads = kv_heads or 4
    assert A.key.shape[-3] == heads
    value = (x @ layer.in_proj_weight.mT + layer.in_proj_bias)[..., -4 * heads :]
    value = value.unflatten(-1, (heads, 4)).transpose(-3, -2).repeat_interleave(4 // heads, -3)
    wanted = layer.out_proj((A.dense() @ value).transpose(-3, -2).flatten(-2))
    assert torch.allclose(output, wanted, atol=1e-12)


def test_self_attention_has_the_weights_of_torch():
    layer = SelfAttention(16, 4)
    nn.MultiheadAttention(16, 4).load_state_dict(layer.state_dict())


class Learned(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4, bias=False)

    def forward(self, query, key, i, j):
        return self.inner(query) @ key.mT


def test_tensors_of_parts_become_parameters_and_buffers():
    layer = SelfAttention(
        16,
        4,
        score=Additive.of(4, 4),
        position=Alibi.of(4) + Bias(torch.zeros(4, 1, 1).requires_grad_()),
        normalizer=Softmax(sink=torch.zeros(4).requires_grad_()),
    )
    names = dict(layer.named_parameters())
    assert {"score.weight", "position.parts_1_bias", "normalizer.sink"} < set(names)
    assert [name for name, _ in layer.named_buffers()] == ["position.parts_0_slopes"]
    output, _ = layer(torch.randn(2, 9, 16), mask=Causal())
    output.square().sum().backward()
    for name, parameter in names.items():
        assert parameter.grad is not None, name
        # A bias that is one number per head moves every logit of a row alike: no gradient but
        # through the sink, which there is.
        assert parameter.grad.abs().max() > 0, name


def test_a_module_as_score_trains_and_moves():
    layer = SelfAttention(16, 4, score=Learned()).double()
    assert "score.inner.weight" in dict(layer.named_parameters())
    output, A = layer(torch.randn(1, 5, 16, dtype=torch.float64))
    output.sum().backward()
    assert layer.score.inner.weight.grad.abs().max() > 0
    assert isinstance(A, Attention)


def test_moving_a_layer_moves_its_parts():
    layer = SelfAttention(8, 2, score=Additive.of(2, 4), position=Alibi.of(2)).double()
    _, A = layer(torch.randn(3, 8, dtype=torch.float64))
    assert {tensor.dtype for tensor in A.rule.tensors()} == {torch.float64}


def test_detach_keeps_the_numbers_and_drops_the_graph():
    layer = SelfAttention(8, 2, score=Additive.of(2, 4))
    _, A = layer(torch.randn(3, 8))
    assert A.query.requires_grad
    kept = A.detach()
    assert not any(x.requires_grad for x in (kept.query, kept.key, *kept.rule.tensors()))
    assert torch.equal(kept.dense(), A.dense())


def test_a_compiled_layer_gives_the_same_numbers():
    """A product in a graph, then looking at its matrix outside."""
    layer = SelfAttention(8, 2, score=Additive.of(2, 4), position=Alibi.of(2)).double()
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    results = []
    for run in (layer, torch.compile(layer, backend="eager")):
        layer.zero_grad()
        output, A = run(x, mask=Causal())
        (output.square().sum() + A.logsumexp().sum()).backward()
        results.append([output, A.entropy(), *(p.grad.clone() for p in layer.parameters())])
    for one, other in zip(*results, strict=True):
        assert torch.allclose(one, other, rtol=1e-12, atol=1e-12)


def test_wrong_sizes_say_what_is_wrong():
    with pytest.raises(ShapeError, match=r"4 heads cannot share 3"):
        SelfAttention(16, 4, num_kv_heads=3)
    with pytest.raises(ShapeError, match=r"\(2, 5, 12\).*16 channels"):
        SelfAttention(16, 4)(torch.randn(2, 5, 12))


@pytest.mark.parametrize("kind", [SelfAttention, RecurrentAttention])
def test_a_module_may_be_a_feature_map(kind):
    """It is trained, saved, copied and moved with its layer, and it may be exchanged."""
    own = {"map": nn.Linear(4, 3)}
    if kind is SelfAttention:
        own = {"score": Features(nn.Linear(4, 3), nn.Linear(4, 3)), "normalizer": RowSum(1e-6)}
    layer, x = kind(16, 4, **own).double(), torch.randn(2, 7, 16, dtype=torch.float64)
    assert {"score.map.weight", "score.map.bias"} <= set(layer.state_dict())
    output, _ = layer(x, mask=None)
    output.square().sum().backward()
    assert layer.score.map.weight.grad.abs().sum() > 0
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        twin.score.map.weight.mul_(2)
    assert not torch.allclose(twin(x)[0], output)
    assert torch.equal(layer(x)[0], output)
    twin.score.map = layer.score.map
    assert torch.equal(twin(x)[0], output)


def test_a_feature_map_lives_as_long_as_its_owner():
    def maps():
        module, weight = nn.Linear(4, 4), torch.zeros(4, 4)
        seen.extend([weakref.ref(module), weakref.ref(weight)])
        return module, lambda x, weight=weight: x @ weight, lambda x: x @ weight

    seen = []
    for map in maps():
        regard.attention(torch.zeros(5, 4), torch.zeros(5, 4), score=Features(map))
    del map
    gc.collect()
    assert [reference() for reference in seen] == [None, None]
