"""Layers: torch's weights and results, and any part."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from regard import (
    Additive,
    Alibi,
    Attention,
    Bias,
    Causal,
    DtypeError,
    Padding,
    ShapeError,
    Softmax,
)
from regard.nn import MultiHeadAttention, SelfAttention

torch.manual_seed(0)


def pair(**options):
    """Our layer and torch's, with the same weights."""
    theirs = nn.MultiheadAttention(16, 4, dtype=torch.float64, **options)
    ours = MultiHeadAttention(16, 4, **options).double()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


@pytest.mark.parametrize(
    "options",
    [{}, {"batch_first": True}, {"bias": False}, {"kdim": 6, "vdim": 10, "batch_first": True}],
    ids=str,
)
def test_results_and_gradients_are_those_of_torch(options):
    ours, theirs = pair(**options)
    n, m = 7, 9
    shapes = [(2, n, 16), (2, m, options.get("kdim", 16)), (2, m, options.get("vdim", 16))]
    inputs = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    if not options.get("batch_first"):
        inputs = [x.transpose(0, 1) for x in inputs]
    upstream = torch.randn(2, n, 16, dtype=torch.float64)
    upstream = upstream if options.get("batch_first") else upstream.transpose(0, 1)
    output, A = ours(*inputs)
    wanted, weights = theirs(*inputs, average_attn_weights=False)
    assert torch.allclose(output, wanted, rtol=1e-12, atol=1e-12)
    assert torch.allclose(A.dense(), weights, rtol=1e-12, atol=1e-12)
    output.backward(upstream)
    wanted.backward(upstream)
    gradients = dict(theirs.named_parameters())
    assert {name for name, _ in ours.named_parameters()} == set(gradients)
    for name, parameter in ours.named_parameters():
        assert torch.allclose(parameter.grad, gradients[name].grad, rtol=1e-11, atol=1e-12), name


def test_state_dict_goes_both_ways():
    ours, theirs = pair()
    theirs.load_state_dict(ours.state_dict())
    assert list(ours.state_dict()) == list(theirs.state_dict())


def test_initial_values_are_those_of_torch():
    torch.manual_seed(3)
    ours = MultiHeadAttention(16, 4)
    torch.manual_seed(3)
    theirs = nn.MultiheadAttention(16, 4)
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name


def test_masks_are_the_opposite_of_torchs():
    ours, theirs = pair(batch_first=True)
    x = torch.randn(2, 6, 16, dtype=torch.float64)
    real = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    output, A = ours(x, mask=Causal() & Padding(real))
    ignored = torch.ones(6, 6, dtype=torch.bool).triu(1)
    wanted, _ = theirs(x, x, x, attn_mask=ignored, key_padding_mask=~real)
    assert torch.allclose(output, wanted, atol=1e-12)
    assert "Causal() & Padding(tensor(2, 6))" in repr(A)


def test_one_sequence_without_a_batch():
    ours, theirs = pair()
    x = torch.randn(5, 16, dtype=torch.float64)
    output, A = ours(x)
    assert torch.allclose(output, theirs(x, x, x)[0], atol=1e-12)
    assert A.shape == (4, 5, 5)


def test_dropout_only_in_training_and_the_same_in_the_backward_pass():
    layer = MultiHeadAttention(16, 4, dropout=0.5, batch_first=True).double()
    x = torch.randn(1, 8, 16, dtype=torch.float64)
    assert layer.eval()(x)[1].dropout is None
    _, A = layer.train()(x)
    assert (A.dense() == 0).any()
    value = torch.randn(1, 4, 8, 4, dtype=torch.float64, requires_grad=True)
    (A @ value).sum().backward()
    assert torch.allclose(value.grad[..., 0], A.received())


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
    with pytest.raises(ShapeError, match=r"10 channels .* 4 heads"):
        MultiHeadAttention(10, 4)
    with pytest.raises(ShapeError, match=r"4 heads cannot share 3"):
        SelfAttention(16, 4, num_kv_heads=3)
    with pytest.raises(ShapeError, match=r"\(2, 5, 12\).*16 channels"):
        SelfAttention(16, 4)(torch.randn(2, 5, 12))
    with pytest.raises(DtypeError, match="key must be a torch"):
        MultiHeadAttention(16, 4)(torch.randn(2, 5, 16), [1.0])
