"""A linear-attention layer and its RNN cell are one function; a softmax layer is fitted."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from regard import (
    T5,
    Alibi,
    Causal,
    Documents,
    Features,
    FormError,
    Identity,
    PositionOnly,
    Rotary,
    RowSum,
    ShapeError,
    Softmax,
)
from regard.convert import affine, linearize, lost, to_recurrent
from regard.feature_map import elu_plus_one, identity, unit
from regard.nn import (
    CellState,
    MultiHeadAttention,
    RecurrentAttention,
    RecurrentState,
    SelfAttention,
)

N, D, H = 19, 16, 4
EPS = torch.finfo(torch.float64).eps
SLOPES = torch.tensor([0.1, 0.2, 0.3, 0.4])[:, None, None]


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def made(kind=SelfAttention, seed=1, **parts):
    torch.manual_seed(seed)
    layer = kind(D, H, **parts).double().eval()
    for parameter in layer.parameters():  # biases begin at 0, which would hide a missing one
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return layer


LINEAR = {"score": Features(), "normalizer": RowSum()}
LAYERS = {
    "linear": lambda: made(**LINEAR),
    "linear, eps": lambda: made(score=Features(), normalizer=RowSum(eps=1e-6)),
    "linear, shared keys": lambda: made(num_kv_heads=2, **LINEAR),
    "linear, one key head": lambda: made(num_kv_heads=1, **LINEAR),
    "linear, rotary": lambda: made(position=Rotary.of(D // H), **LINEAR),
    "linear, own positions": lambda: made(
        position=Rotary.of(D // H, positions=torch.arange(N) * 3), **LINEAR
    ),
    "learned maps": lambda: made(score=Features(affine(H, D // H)), normalizer=Identity()),
    "module": lambda: made(
        score=Features(torch.nn.Sequential(torch.nn.Linear(D // H, 7), torch.nn.Softplus())),
        normalizer=RowSum(),
    ),
    "retention": lambda: made(
        score=Features(identity, log_decay=-SLOPES), num_kv_heads=2, normalizer=Identity()
    ),
    "constant beta": lambda: made(score=Features(unit, beta=0.3), normalizer=Identity()),
    "alibi alone": lambda: made(score=PositionOnly(), position=Alibi.of(H)),
} | {
    f"{decay}, {'delta' if delta else 'sum'}": lambda decay=decay, delta=delta: made(
        RecurrentAttention, decay=decay, delta=delta
    )
    for decay in ("none", "head", "token", "channel")
    for delta in (False, True)
}


def unrolled(cell, x, state=None):
    outputs = []
    for t in range(x.shape[-2]):
        output, state = cell(x[..., t, :], state)
        outputs.append(output)
    return torch.stack(outputs, -2), state


def gradients(output, layer, x, upstream):
    given = [x, *layer.parameters()]
    return torch.autograd.grad(output, given, upstream, allow_unused=True)


def assert_rounding(got, wanted):
    """Sums of up to N tokens and D channels, in another order: a few hundred roundings at most."""
    for one, other in zip(got, wanted, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            size = max(1.0, float(other.detach().abs().max()))
            assert float((one - other).detach().abs().max()) <= 16 * N * D * EPS * size


@pytest.mark.parametrize("name", LAYERS)
def test_a_cell_over_the_sequence_is_the_layer(name):
    """Outputs and gradients of the inputs and all parameters, back through every state."""
    layer = LAYERS[name]()
    x, upstream = normal(2, N, D).requires_grad_(), normal(2, N, D, seed=5)
    whole, _ = layer(x, mask=Causal())
    cell = to_recurrent(layer)
    output, state = unrolled(cell, x)
    assert state.length == N
    assert_rounding(
        [output, *gradients(output, layer, x, upstream)],
        [whole, *gradients(whole, layer, x, upstream)],
    )


@pytest.mark.parametrize("name", ["linear, rotary", "linear, shared keys", "token, delta"])
def test_a_prompt_at_once_and_then_the_cell(name):
    layer, x = LAYERS[name](), normal(2, N, D)
    whole, _ = layer(x, mask=Causal())
    held = layer.state()
    assert isinstance(held, RecurrentState)
    layer(x[:, :8], state=held)
    output, state = unrolled(to_recurrent(layer), x[:, 8:], CellState.of(held))
    assert_rounding([output], [whole[:, 8:]])
    one, _ = unrolled(to_recurrent(layer), x[:, :8])
    assert_rounding([one], [whole[:, :8]])
    assert state.memory.shape == held.state.shape


def test_a_state_is_a_value_and_of_constant_size():
    cell, x = to_recurrent(LAYERS["token, delta"]()), normal(N, D)
    _, state = unrolled(cell, x[:3])
    before = state.memory.clone()
    one, _ = cell(x[3], state)
    two, later = cell(x[3], state)
    assert torch.equal(one, two)
    assert torch.equal(state.memory, before)
    assert later.memory.shape == before.shape
    assert (state.length, later.length) == (3, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["linear, rotary", "retention", "channel, delta"])
def test_a_cell_computes_what_a_step_does(name, dtype):
    """Bit by bit, and in float32 between tokens whatever the layer's dtype."""
    layer, x = LAYERS[name]().to(dtype), normal(3, 2, D).to(dtype)
    cell, state, held = to_recurrent(layer), None, layer.state()
    with torch.no_grad():
        for one in x:
            output, state = cell(one, state)
            assert torch.equal(output, layer.step(one, held))
    assert output.dtype == dtype
    assert state.memory.dtype == torch.float32
    assert torch.equal(state.memory, held.state)


def test_parameters_are_shared_and_saved():
    layer = LAYERS["linear"]()
    cell = to_recurrent(layer)
    assert {id(p) for p in cell.parameters()} == {id(p) for p in layer.parameters()}
    again = to_recurrent(LAYERS["linear"]())
    again.layer.out_proj.weight.data.zero_()
    again.load_state_dict(cell.state_dict())
    x = normal(D)
    assert torch.equal(again(x)[0], cell(x)[0])


@pytest.mark.parametrize(
    ("layer", "says"),
    [
        (made, r"(?s)needs a score that factorises.*linearize\(layer, inputs\)"),
        (lambda: made(score=Features()), r"needs the normalizer RowSum\(\) or Identity"),
        (lambda: made(position=Alibi.of(H), **LINEAR), "log_decay multiplies"),
        (lambda: made(score=PositionOnly(), position=Alibi(-torch.ones(H))), "slopes of at least"),
        (
            lambda: made(score=Features(log_decay=-torch.ones(H, N, 1)), normalizer=Identity()),
            "log_decay of the 19 tokens of one sequence; a RecurrentAttention computes it",
        ),
        (
            lambda: made(score=Features(beta=torch.ones(H, N, 1)), normalizer=Identity()),
            "beta of the 19 tokens",
        ),
        (
            lambda: made(
                score=Features(erase=(torch.zeros(H, N, 4), torch.zeros(H, N, 4))),
                normalizer=Identity(),
            ),
            "what the tokens of one sequence erase",
        ),
        (lambda: made(dropout=0.1, **LINEAR).train(), "treats each pair by itself"),
    ],
)
def test_what_is_no_recurrence_is_explained(layer, says):
    with pytest.raises(FormError, match=says):
        to_recurrent(layer())


def test_layers_of_other_kinds_are_named():
    with pytest.raises(TypeError, match="its state_dict fits"):
        to_recurrent(MultiHeadAttention(D, H))
    with pytest.raises(TypeError, match="SelfAttention or RecurrentAttention, not GRUCell"):
        to_recurrent(torch.nn.GRUCell(D, D))

    class Other(SelfAttention):
        pass

    with pytest.raises(FormError, match="it is a Other"):
        to_recurrent(Other(D, H, **LINEAR))


def test_wrong_inputs_and_states_are_explained():
    cell = to_recurrent(LAYERS["linear"]())
    with pytest.raises(ShapeError, match="takes 16 channels"):
        cell(normal(2, D + 1))
    with pytest.raises(ShapeError, match=r"it must be \[\*batch, d_model\]"):
        cell(torch.tensor(1.0))
    _, state = cell(normal(2, D))
    with pytest.raises(ShapeError, match=r"state has shape \(2, 4, 4, 5\), but these tokens leave"):
        cell(normal(3, D), state)
    with pytest.raises(ShapeError, match="a cell begins with state None"):
        CellState.of(RecurrentState())
    drops = made(dropout=0.1, **LINEAR)
    cell = to_recurrent(drops)
    with pytest.raises(FormError, match="drops weights in training"):
        cell.train()(normal(D))


def inputs_of(layer, count=48, length=12):
    """Vectors whose queries and keys have directions to tell apart."""
    return normal(count, length, D, seed=7)


@pytest.fixture(scope="module")
def sharp():
    """A softmax layer whose rows are far from uniform."""
    layer = made()
    layer.in_proj_weight.data[: 2 * D] *= 2.0
    return layer


def test_a_fit_comes_nearer_and_does_not_touch_the_layer(sharp):
    before = copy.deepcopy(sharp.state_dict())
    x = inputs_of(sharp)
    torch.manual_seed(0)
    _, first = linearize(sharp, x, steps=0)
    linear, found = linearize(sharp, x, steps=150)
    assert all(after < start for after, start in zip(found.kl, first.kl, strict=True))
    assert found.output < first.output
    assert all(torch.equal(x, before[name]) for name, x in sharp.state_dict().items())
    assert torch.equal(linear.in_proj_weight, sharp.in_proj_weight)
    assert linear.in_proj_weight is not sharp.in_proj_weight
    _, plain = linearize(sharp, x, map=lambda heads, width: elu_plus_one)
    assert sum(found.kl) < sum(plain.kl)


def test_what_is_lost_is_what_the_formulas_say(sharp):
    """Against dense weights and logarithms, and the outputs of both layers."""
    x = inputs_of(sharp, count=5)
    linear, found = linearize(sharp, x, map=affine, steps=0)
    a, b = (layer(x, mask=Causal())[1].dense() for layer in (sharp, linear))
    kl = (a * (a.clamp(min=1e-6) / b.clamp(min=1e-6)).log()).sum(-1).mean((0, 2))
    torch.testing.assert_close(
        torch.tensor(found.kl, dtype=torch.float64), kl, rtol=1e-12, atol=1e-12
    )
    y, z = (layer(x, mask=Causal())[0] for layer in (sharp, linear))
    assert found.output == pytest.approx(float(((y - z).norm() / y.norm()).detach()), rel=1e-12)
    assert lost(sharp, linear, x) == found
    assert lost(sharp, sharp, x).kl == (0.0,) * H
    uniform = made()
    uniform.in_proj_weight.data[:D] = 0
    uniform.in_proj_bias.data[:D] = 0
    entropy = sum(math.log(t + 1) for t in range(12)) / 12
    assert lost(uniform, uniform, x).entropy == pytest.approx((entropy,) * H, rel=1e-12)


def test_rows_that_a_map_can_give_are_found():
    """A softmax whose scores are 0 is linear attention with constant features."""
    layer = made()
    layer.in_proj_weight.data[:D] = 0
    layer.in_proj_bias.data[:D] = 0
    x = inputs_of(layer)
    torch.manual_seed(0)
    _, found = linearize(layer, x, steps=400, rate=0.03)
    assert max(found.kl) < 1e-4
    assert found.output < 0.01


@pytest.mark.parametrize("position", [None, Rotary.of(D // H), Alibi.of(H)])
@pytest.mark.parametrize("num_kv_heads", [2, 4])
def test_a_fitted_layer_is_a_cell(position, num_kv_heads):
    layer = made(position=position, num_kv_heads=num_kv_heads)
    x = inputs_of(layer, count=6)
    torch.manual_seed(0)
    linear, found = linearize(layer, x, steps=3)
    assert len(found.kl) == H
    whole, _ = linear(x, mask=Causal())
    output, _ = unrolled(to_recurrent(linear), x)
    assert_rounding([output], [whole])


def test_alibi_becomes_a_decay_exactly():
    """With scores of 0, softmax with ALiBi and a decay of constant features are the same rows."""
    layer = made(position=Alibi.of(H))
    layer.in_proj_weight.data[: 2 * D] = 0
    layer.in_proj_bias.data[: 2 * D] = 0
    _, found = linearize(layer, inputs_of(layer, count=2), steps=0)
    assert max(map(abs, found.kl)) <= 1e-12
    assert found.output <= 1e-12


@pytest.mark.parametrize(
    ("layer", "mask", "says"),
    [
        (lambda: made(**LINEAR), Causal(), "already needs no fit"),
        (lambda: made(normalizer=Softmax(sink=0.0)), Causal(), "without a sink"),
        (lambda: made(RecurrentAttention), Causal(), "takes a softmax layer"),
        (lambda: made(dropout=0.1).train(), Causal(), "drops weights in training"),
        (lambda: made(position=T5(torch.zeros(H, 8))), Causal(), "a linear layer has no place for"),
        (lambda: made(position=Alibi.of(H)), None, "no token sees later ones"),
        (
            lambda: made(position=Alibi.of(H)),
            Documents(torch.arange(12) // 5),
            "give mask=Causal",
        ),
    ],
)
def test_what_cannot_be_fitted_is_explained(layer, mask, says):
    layer = layer()
    with pytest.raises(FormError, match=says):
        linearize(layer, inputs_of(layer), mask=mask)


def test_wrong_inputs_of_a_fit_are_explained():
    with pytest.raises(ShapeError, match=r"\[count, n, d_model\]"):
        linearize(made(), normal(5, D))
    with pytest.raises(TypeError, match="linearize takes a SelfAttention"):
        linearize(MultiHeadAttention(D, H), normal(2, 5, D))


def test_lost_reads_well():
    found = repr(linearize(made(), normal(3, 5, D), steps=0)[1])
    assert found.startswith("Lost(output ")
    assert found.count(",") == 2 * (H - 1) + 1
