"""MultiHeadAttention in the place of torch's: what its documentation promises, and its traps."""

from __future__ import annotations

import copy
import inspect
import pickle
from itertools import product

import pytest
import torch
from torch import nn

from regard import (
    Additive,
    Alibi,
    Causal,
    DtypeError,
    Padding,
    ShapeError,
    Softmax,
    attention,
)
from regard.convert import from_torch, swap
from regard.nn import MultiHeadAttention

torch.manual_seed(0)
N, L, S, E, H = 2, 7, 9, 16, 4  # torch's letters
OPTIONS = [
    {},
    {"batch_first": True},
    {"bias": False},
    {"kdim": 6, "vdim": 10, "batch_first": True},
    {"add_bias_kv": True},
    {"add_zero_attn": True, "batch_first": True},
    {"add_bias_kv": True, "add_zero_attn": True},
]


def pair(**options):
    """Our layer and torch's, with the same weights."""
    theirs = nn.MultiheadAttention(E, H, dtype=torch.float64, **options)
    ours = MultiHeadAttention(E, H, dtype=torch.float64, **options)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


def inputs(options, batch=N):
    axes = () if batch is None else (batch,)
    widths = (E, options.get("kdim", E), options.get("vdim", E))
    made = [
        torch.randn(*axes, n, width, dtype=torch.float64)
        for n, width in zip((L, S, S), widths, strict=True)
    ]
    turned = batch is None or options.get("batch_first")
    return made if turned else [x.transpose(0, 1) for x in made]


def same(one, other, tolerance=1e-12):
    assert one.shape == other.shape
    assert torch.allclose(one, other, rtol=tolerance, atol=tolerance)


def test_the_signatures_begin_with_torchs():
    for name in ("__init__", "forward"):
        theirs = inspect.signature(getattr(nn.MultiheadAttention, name)).parameters
        ours = inspect.signature(getattr(MultiHeadAttention, name)).parameters
        assert list(ours)[: len(theirs)] == list(theirs)
        for argument, parameter in theirs.items():
            if argument not in ("key", "value"):  # which default to the query
                assert ours[argument].default == parameter.default
                assert ours[argument].kind == parameter.kind


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_results_and_gradients_are_those_of_torch(options):
    ours, theirs = pair(**options)
    x = inputs(options)
    output, weights = ours(*x, average_attn_weights=False)
    wanted, wanted_weights = theirs(*x, average_attn_weights=False)
    same(output, wanted)
    same(weights, wanted_weights)
    above = torch.randn_like(output)
    (output * above).sum().backward()
    (wanted * above).sum().backward()
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    assert {name for name, _ in ours.named_parameters()} == set(gradients)
    for name, parameter in ours.named_parameters():
        same(parameter.grad, gradients[name], 1e-11)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("batch", [N, None])
def test_masks_mean_what_they_mean_in_torch(options, batch):
    """Bool or float, of pairs or of keys, per head or not, with and without a batch."""
    ours, theirs = pair(**options)
    x = inputs(options, batch)
    axes, of_heads = ((), H) if batch is None else ((batch,), batch * H)
    ignored_keys = (torch.arange(S) >= S - 2).expand(*axes, S)
    ignored = torch.rand(L, S) < 0.4
    ignored[:, 0] = False
    added = torch.randn(L, S, dtype=torch.float64)
    per_head = torch.randn(of_heads, L, S, dtype=torch.float64)
    infinite = torch.zeros(L, S, dtype=torch.float64).masked_fill(ignored, -torch.inf)
    float_keys = torch.randn(*axes, S, dtype=torch.float64)
    pairs = [None, ignored, added, infinite, per_head, ignored.expand(of_heads, L, S)]
    for keys, mask in product([None, ignored_keys, float_keys], pairs):
        if keys is not None and mask is not None and keys.dtype != mask.dtype:
            continue  # torch warns of these
        arguments = {"key_padding_mask": keys, "attn_mask": mask}
        output, weights = ours(*x, **arguments)
        wanted, wanted_weights = theirs(*x, **arguments)
        same(output, wanted)
        same(weights, wanted_weights)
        same(ours(*x, need_weights=False, **arguments)[0], wanted)


def test_a_float_mask_gets_gradients():
    ours, theirs = pair()
    x = inputs({})
    found = []
    mask = torch.randn(L, S, dtype=torch.float64)
    for layer in (ours, theirs):
        leaf = mask.clone().requires_grad_()
        layer(*x, attn_mask=leaf, need_weights=False)[0].square().sum().backward()
        found.append(leaf.grad)
    same(*found)


def test_weights_are_a_tensor_the_matrix_or_nothing():
    ours, _ = pair(batch_first=True)
    x = inputs({"batch_first": True})
    output, A = ours(*x, need_weights="lazy")
    assert repr(A) == f"Attention({N}, {H}, {L}, {S}): Dot(), Softmax(); float64, lazy"
    same(ours(*x)[1], A.dense().mean(1))
    same(ours(*x, average_attn_weights=False)[1], A.dense())
    assert ours(*x, need_weights=False)[1] is None
    same(ours(*x, need_weights=False)[0], output)
    with pytest.raises(ValueError, match="True, False or \"lazy\", not 'all'"):
        ours(*x, need_weights="all")


def test_is_causal_is_a_mask_beside_the_other():
    """Torch takes it for a hint, and reads attn_mask or not depending on the other arguments."""
    ours, theirs = pair(batch_first=True)
    x = torch.randn(N, L, E, dtype=torch.float64)
    causal = torch.ones(L, L, dtype=torch.bool).triu(1)
    window = causal | torch.ones(L, L, dtype=torch.bool).tril(-3)
    for ignored, arguments in (
        (causal, {}),
        (causal, {"attn_mask": causal}),
        (causal, {"attn_mask": nn.Transformer.generate_square_subsequent_mask(L)}),
        (window, {"attn_mask": window}),
    ):
        wanted, weights = theirs(x, x, x, attn_mask=ignored)
        output, found = ours(x, x, x, is_causal=True, **arguments)
        same(output, wanted)
        same(found, weights)
        alone = repr(ours(x, is_causal=True, need_weights="lazy", **arguments)[1])
        assert "Causal()" in alone
        assert ("Dense" in alone) is (ignored is window)


@pytest.mark.parametrize("options", [{"add_bias_kv": True}, {"add_zero_attn": True}], ids=str)
def test_added_keys_are_visible_under_is_causal(options):
    ours, theirs = pair(batch_first=True, **options)
    x = torch.randn(N, L, E, dtype=torch.float64)
    causal = torch.ones(L, L, dtype=torch.bool).triu(1)
    output, weights = ours(x, x, x, is_causal=True)
    wanted, wanted_weights = theirs(x, x, x, attn_mask=causal)
    same(output, wanted)
    same(weights, wanted_weights)


def test_our_masks_are_the_opposite_of_torchs():
    ours, theirs = pair(batch_first=True)
    x = torch.randn(2, 6, 16, dtype=torch.float64)
    real = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    output, A = ours(x, mask=Causal() & Padding(real), need_weights="lazy")
    ignored = torch.ones(6, 6, dtype=torch.bool).triu(1)
    same(output, theirs(x, x, x, attn_mask=ignored, key_padding_mask=~real)[0])
    assert "Causal() & Padding(tensor(2, 6))" in repr(A)
    same(ours(x, mask=~ignored, key_padding_mask=~real)[0], output)


def test_rows_that_may_attend_to_nothing_are_zero():
    """Torch's layer gives NaN, or not, depending on need_weights and on the mode."""
    ours, _ = pair(batch_first=True)
    x = torch.randn(N, L, E, dtype=torch.float64, requires_grad=True)
    hidden = torch.zeros(N, L, dtype=torch.bool)
    hidden[1] = True
    output, weights = ours(x, x, x, key_padding_mask=hidden)
    same(output[1], ours.out_proj.bias.expand(L, E))
    assert not weights[1].any()
    output.sum().backward()
    assert x.grad.isfinite().all()


def test_state_dict_goes_both_ways():
    for options in OPTIONS:
        ours, theirs = pair(**options)
        theirs.load_state_dict(ours.state_dict(), strict=True)
        assert list(ours.state_dict()) == list(theirs.state_dict())


def test_initial_values_are_those_of_torch():
    for options in OPTIONS:
        torch.manual_seed(3)
        ours = MultiHeadAttention(E, H, **options)
        torch.manual_seed(3)
        theirs = nn.MultiheadAttention(E, H, **options)
        for name, value in theirs.state_dict().items():
            assert torch.equal(ours.state_dict()[name], value), name


def test_dropout_only_in_training_and_the_same_in_the_backward_pass():
    layer = MultiHeadAttention(E, H, dropout=0.5, batch_first=True).double()
    x = torch.randn(1, 8, E, dtype=torch.float64)
    assert layer.eval()(x, need_weights="lazy")[1].dropout is None
    _, A = layer.train()(x, need_weights="lazy")
    assert (A.dense() == 0).any()
    value = torch.randn(1, 4, 8, 4, dtype=torch.float64, requires_grad=True)
    (A @ value).sum().backward()
    assert torch.allclose(value.grad[..., 0], A.received())


def test_copies_pickles_and_autocast():
    ours, theirs = pair(batch_first=True)
    x = torch.randn(N, L, E, dtype=torch.float64)
    wanted = ours(x)[0]
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(twin(x)[0], wanted)
        assert twin.in_proj_weight is not ours.in_proj_weight
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, weights = ours.float()(x.float())
        reference, _ = theirs.float()(x.float(), x.float(), x.float())
    assert output.dtype == weights.dtype == reference.dtype == torch.bfloat16
    same(output.double(), wanted, 2e-2)


@pytest.mark.parametrize("need_weights", [True, False])
def test_one_graph_without_breaks(need_weights):
    ours, _ = pair(batch_first=True)
    x = torch.randn(N, L, E, dtype=torch.float64)
    hidden = (torch.arange(L) >= L - 2).expand(N, L)
    torch.compiler.reset()
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    arguments = {"key_padding_mask": hidden, "is_causal": True, "need_weights": need_weights}
    output, weights = compiled(x, x, x, **arguments)
    wanted, wanted_weights = ours(x, x, x, **arguments)
    same(output, wanted)
    if need_weights:
        same(weights, wanted_weights)
    program = torch.export.export(ours, (x, x, x), arguments)
    same(program.module()(x, x, x, **arguments)[0], wanted)


@pytest.mark.parametrize("batch_first", [True, False])
def test_swapped_into_a_transformer_outputs_change_by_rounding(batch_first):
    """Masks as the modules hand them on: as floats, with hints; in training and in evaluation."""
    model = nn.Transformer(E, H, 2, 2, 32, 0.0, batch_first=batch_first, dtype=torch.float64)
    source, target = torch.randn(N, 5, E).double(), torch.randn(N, L, E).double()
    if not batch_first:
        source, target = source.transpose(0, 1), target.transpose(0, 1)
    hidden = torch.zeros(N, 5, dtype=torch.bool)
    hidden[1, 3:] = True
    causal = nn.Transformer.generate_square_subsequent_mask(L, dtype=torch.float64)
    arguments = {"tgt_mask": causal, "src_key_padding_mask": hidden}
    arguments["memory_key_padding_mask"] = hidden
    swapped = swap(copy.deepcopy(model))
    for training in (True, False):
        for each in (model, swapped):
            each.train(training)
        with torch.set_grad_enabled(training):
            same(swapped(source, target, **arguments), model(source, target, **arguments))
    assert [n for n, _ in swapped.named_parameters()] == [n for n, _ in model.named_parameters()]
    assert list(swapped.state_dict()) == list(model.state_dict())


def test_an_encoder_in_evaluation_calls_the_layer():
    """Torch's fast path would compute plain attention from the weights, whatever the parts."""
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(E, H, 32, 0.0, batch_first=True), 2)
    swap(encoder.eval(), position=Alibi.of(H), normalizer=Softmax(sink=torch.zeros(H)))
    calls = []
    for layer in encoder.layers:
        forward = layer.self_attn.forward  # not a hook: with hooks, torch leaves its fast path
        layer.self_attn.forward = lambda *a, f=forward, **k: (calls.append(1), f(*a, **k))[1]
    x, hidden = torch.randn(N, L, E), (torch.arange(L) >= L - 2).expand(N, L)
    with torch.no_grad():
        assert encoder(x, src_key_padding_mask=hidden).shape == x.shape
    assert len(calls) == 2


def test_from_torch_shares_parameters_mode_and_hooks():
    theirs = nn.MultiheadAttention(E, H, add_bias_kv=True).eval()
    seen = []
    handle = theirs.register_forward_hook(lambda module, args, output: seen.append(type(module)))
    theirs.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(sorted(kwargs)), with_kwargs=True
    )
    theirs.register_full_backward_hook(lambda module, above, below: seen.append("backward"))
    ours = from_torch(theirs, score=Additive.of(H, E // H))
    shared = dict(ours.named_parameters())
    assert shared.pop("score.weight").requires_grad
    for name, parameter in theirs.named_parameters():
        assert shared.pop(name) is parameter
    assert not shared
    assert not ours.training
    x = torch.randn(3, 2, E, requires_grad=True)
    ours(x, need_weights=False)[0].sum().backward()
    assert seen == [["need_weights"], MultiHeadAttention, "backward"]
    handle.remove()
    ours(x)
    assert seen[3:] == [[]]


def test_swap_keeps_shared_layers_shared_and_says_what_it_cannot_do():
    layer = nn.MultiheadAttention(E, H)
    model = swap(nn.ModuleDict({"one": layer, "other": layer}))
    assert model["one"] is model["other"]
    assert isinstance(swap(layer), MultiHeadAttention)

    class Other(nn.MultiheadAttention):
        pass

    with pytest.raises(TypeError, match=r"'0' is a .*Other; only torch.nn.MultiheadAttention"):
        swap(nn.Sequential(Other(E, H)))
    with pytest.raises(ValueError, match=r"Sequential has no torch.nn.MultiheadAttention"):
        swap(nn.Sequential(nn.Linear(2, 2)))


def test_wrong_input_says_what_is_wrong():
    layer = MultiHeadAttention(E, H, batch_first=True)
    x = torch.randn(N, L, E)
    with pytest.raises(ShapeError, match=r"10 channels .* 4 heads"):
        MultiHeadAttention(10, 4)
    with pytest.raises(DtypeError, match="key must be a torch"):
        layer(x, [1.0])
    with pytest.raises(ShapeError, match=r"key_padding_mask has shape \(2, 6\).*\(2, 7\)"):
        layer(x, key_padding_mask=torch.zeros(N, 6, dtype=torch.bool))
    with pytest.raises(ShapeError, match=r"attn_mask has shape \(6, 7\).*\(7, 7\) or \(8, 7, 7\)"):
        layer(x, attn_mask=torch.zeros(6, L, dtype=torch.bool))
    with pytest.raises(DtypeError, match=r"True = ignored.*int64.*\.bool\(\)"):
        layer(x, attn_mask=torch.zeros(L, L, dtype=torch.int64))
    with pytest.raises(DtypeError, match=r"not Causal.*given as mask="):
        layer(x, attn_mask=Causal())
    same(layer(x, mask=Causal())[0], layer(x, is_causal=True)[0], 1e-6)
    assert attention(x, x).shape == (N, L, L)
