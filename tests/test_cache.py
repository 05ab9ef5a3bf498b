"""Caches: prefill and steps give what the whole sequence gives, and their size is what it says."""

from __future__ import annotations

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
    Prefix,
    Rotary,
    RowSum,
    ShapeError,
    Window,
)
from regard.feature_map import elu_plus_one, identity
from regard.nn import KVCache, RecurrentAttention, RecurrentState, SelfAttention, generate
from regard.position import Fire

N, D, H = 23, 16, 4
X = torch.randn(2, N, D, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def layer_of(**parts):
    torch.manual_seed(1)
    return SelfAttention(D, H, num_kv_heads=parts.pop("num_kv_heads", 2), **parts).double().eval()


def positions():
    network = [torch.randn(3), torch.randn(3), torch.randn(H, 3), torch.randn(H)]
    own = torch.arange(N) * 2 + 1
    return {
        "none": None,
        "rotary": Rotary.of(D // H),
        "rotary of own positions": Rotary.of(D // H, positions=own),
        "alibi": Alibi.of(H),
        "t5": T5(torch.randn(H, 8), bidirectional=False, max_distance=9),
        "fire": Fire(*network, c=torch.tensor(0.1), threshold=torch.tensor(5.0)),
        "rotary + alibi": Rotary.of(D // H) + Alibi.of(H),
    }


LINEAR = {
    "linear": {"score": Features(elu_plus_one), "normalizer": RowSum()},
    "retention": {
        "score": Features(identity, log_decay=-torch.tensor([0.1, 0.2, 0.3, 0.4])[:, None, None]),
        "normalizer": Identity(),
    },
    "delta": {"score": Features(identity, log_decay=-0.1, beta=0.3), "normalizer": Identity()},
}
LAYERS = {f"softmax, {name}": {"position": position} for name, position in positions().items()}
LAYERS |= LINEAR | {"linear, rotary": {**LINEAR["linear"], "position": Rotary.of(D // H)}}


def whole_and_steps(layer, state, prompt, mask=None):
    """The sequence at once, and in a prompt, single tokens, and a rest of several."""
    with torch.no_grad():
        whole, _ = layer(X, mask=Causal() if mask is None else mask)
        parts = [layer(X[:, :prompt], state=state)[0]]
        for t in range(prompt, N - 3):
            parts.append(layer.step(X[:, t], state)[:, None])
        parts.append(layer(X[:, N - 3 :], state=state)[0])
    assert state.length == N
    return whole, torch.cat(parts, 1)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("prompt", [0, 1, 10])
def test_prefill_and_steps_equal_the_whole(name, prompt):
    layer = layer_of(**LAYERS[name])
    state = layer.state()
    assert isinstance(state, RecurrentState if name.split(",")[0] in LINEAR else KVCache)
    torch.testing.assert_close(*whole_and_steps(layer, state, prompt), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("decay", ["none", "head", "token", "channel"])
@pytest.mark.parametrize("delta", [False, True])
def test_layers_of_the_family_step(decay, delta):
    torch.manual_seed(1)
    layer = RecurrentAttention(D, H, decay=decay, delta=delta).double()
    whole, steps = whole_and_steps(layer, layer.state(), 7)
    torch.testing.assert_close(whole, steps, rtol=1e-11, atol=1e-12)
    output, A = layer(X)
    torch.testing.assert_close(output, whole)
    assert A.explain().form == "recurrent"
    output.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


def test_documents_reset_a_layer():
    layer = RecurrentAttention(D, H, decay="token", delta=True).double()
    packed, _ = layer(X, mask=Documents((torch.arange(N) >= 9).long()))
    apart = torch.cat([layer(X[:, :9])[0], layer(X[:, 9:])[0]], 1)
    torch.testing.assert_close(packed, apart, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "sinks"),
    [("alibi", 0), ("t5", 0)]
    + [(name, sinks) for name in ("none", "rotary", "rotary of own positions") for sinks in (0, 3)],
)
def test_a_window_keeps_its_keys_alone(name, sinks):
    layer, left = layer_of(position=positions()[name]), 5
    mask = Window(left, 0)
    mask = mask | (Prefix(sinks) & Causal()) if sinks else mask
    cache = KVCache(left, sinks)
    whole, steps = whole_and_steps(layer, cache, 10, mask)
    torch.testing.assert_close(whole, steps, rtol=1e-11, atol=1e-12)


def test_a_window_does_not_grow():
    layer, cache, sizes = layer_of(position=Rotary.of(D // H)), KVCache(5, 2), []
    with torch.no_grad():
        for t in range(100):
            layer.step(X[:, t % N], cache)
            sizes.append(cache.bytes)
    assert max(sizes) == max(sizes[:20]) == min(sizes[20:])


def test_what_drops_keys_says_so():
    fire = positions()["fire"]
    with pytest.raises(FormError, match="drops keys"):
        layer_of(position=fire)(X, state=KVCache(5))
    with pytest.raises(FormError, match="beside sinks Rotary"):
        layer_of(position=Alibi.of(H))(X, state=KVCache(5, 2))
    with pytest.raises(FormError, match="RecurrentState"):
        layer_of(**LINEAR["delta"])(X, state=KVCache(5))
    with pytest.raises(ValueError, match="sinks need left"):
        KVCache(sinks=2)
    with pytest.raises(ValueError, match="a mask or a state"):
        layer_of()(X, mask=Causal(), state=KVCache())
    with pytest.raises(FormError, match="form 'recurrent' needs a score that factorises"):
        layer_of()(X, state=RecurrentState())


@pytest.mark.parametrize("name", ["softmax, rotary", "delta"])
def test_beams_are_reordered(name):
    layer, index = layer_of(**LAYERS[name]), torch.tensor([1, 1])
    with torch.no_grad():
        state = layer.state()
        layer(X[:, :10], state=state)
        state.reorder(index)
        found = layer.step(X[:, 10], state)
        again = layer.state()
        layer(X[index, :10], state=again)
        torch.testing.assert_close(found, layer.step(X[:, 10], again))


@pytest.mark.parametrize("name", ["softmax, rotary", "linear", "delta"])
def test_gradients_go_through_a_state(name):
    layer = layer_of(**LAYERS[name])
    found = []
    for parts in ([X], [X[:, :9], X[:, 9:10], X[:, 10:]]):
        state = layer.state()
        outputs = [layer(part, state=state)[0] for part in parts]
        loss = torch.cat(outputs, 1).square().sum()
        found.append(torch.autograd.grad(loss, list(layer.parameters())))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-11)


def test_a_recurrent_state_does_not_grow():
    layer = layer_of(**LINEAR["linear"]).float()
    state, sizes = layer.state(), set()
    with torch.no_grad():
        for x in torch.zeros(3, D).split(1):
            layer.step(x, state)
            sizes.add(state.bytes)
        layer(torch.zeros(1, 100_000, D), state=state)
    sizes.add(state.bytes)
    assert sizes == {2 * (D // H) * (D // H + 1) * 4}  # key heads, features, width and its sum
    assert state.length == 100_003


class Model(torch.nn.Module):
    def __init__(self, **parts):
        super().__init__()
        torch.manual_seed(5)
        self.embedding, self.layer = torch.nn.Embedding(11, D), layer_of(**parts).float()

    def forward(self, tokens, state=None):
        x = self.embedding(tokens)
        mask = Causal() if state is None else None
        x = x + self.layer(x, mask=mask, state=state)[0]
        return x @ self.embedding.weight.mT


@pytest.mark.parametrize("name", ["softmax, rotary", "linear", "delta"])
def test_generation_is_that_of_the_whole_sequence(name):
    model, tokens = Model(**LAYERS[name]), torch.tensor([[1, 2, 3], [7, 7, 9]])
    found = generate(model, tokens, 12, state=model.layer.state())
    for _ in range(12):
        tokens = torch.cat([tokens, model(tokens)[:, -1:].argmax(-1)], 1)
    assert torch.equal(found, tokens[:, 3:])


PLAIN_AND_LINEAR = [LAYERS["softmax, none"], LAYERS["linear, rotary"]]


@pytest.mark.parametrize("parts", PLAIN_AND_LINEAR, ids=["cache", "recurrence"])
@pytest.mark.parametrize(("first", "then"), [(2, 1), (1, 2)])
def test_a_state_is_of_one_batch(first, then, parts):
    layer = layer_of(**parts)
    state = layer.state()
    layer(X[:first, :5], state=state)
    with pytest.raises(ShapeError, match=rf"5 tokens of sequences \({first},\), .* \({then},\)"):
        layer.step(X[:then, 5], state)
    state.reorder(torch.zeros(then, dtype=torch.long))
    output = layer.step(X[:1, 5].expand(then, -1), state)
    torch.testing.assert_close(output[0], layer(X[:1, :6], mask=Causal())[0][0, 5])


@pytest.mark.parametrize("place", [5, 8])
def test_nan_reaches_the_same_rows_of_both_states(place):
    """The rows from its token on, in a prompt and in steps."""
    layer, x = layer_of(**LINEAR["linear"]), X.clone()
    x[0, place, 3] = torch.nan
    found = []
    for state in (KVCache(), RecurrentState()):
        prompt, _ = layer(x[:, :7], state=state)
        found.append(torch.cat([prompt, layer(x[:, 7:], state=state)[0]], 1))
    torch.testing.assert_close(*found, equal_nan=True)
    for output in found:
        assert output.isfinite().all(-1).sum(-1).tolist() == [place, N]


@pytest.mark.parametrize("place", [Alibi.of(H), Rotary.of(D // H) + Alibi.of(H)])
def test_a_layer_whose_pairs_count_has_a_cache(place):
    layer = layer_of(**LINEAR["linear"] | {"position": place})
    state = layer.state()
    assert isinstance(state, KVCache)
    torch.testing.assert_close(*whole_and_steps(layer, state, 7), rtol=1e-11, atol=1e-12)
    layer = layer_of(**LINEAR["linear"], dropout=0.1)
    assert isinstance(layer.state(), RecurrentState)
    before = torch.get_rng_state()
    assert isinstance(layer.train().state(), KVCache)
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(FormError, match=r"this layer has no state: .*log_decay multiplies"):
        RecurrentAttention(D, H, position=place).state()


@pytest.mark.parametrize("left", [None, 5])
def test_a_cache_goes_on_outside_of_inference_mode(left):
    layer, cache = layer_of(), KVCache(left)
    mask = Causal() if left is None else Window(left, 0)
    with torch.inference_mode():
        prompt, _ = layer(X[:, :9], state=cache)
    with torch.no_grad():
        steps = [layer.step(X[:, t], cache) for t in (9, 10)]
        with torch.inference_mode():
            steps.append(layer.step(X[:, 11], cache))
        steps.append(layer.step(X[:, 12], cache))
        whole, _ = layer(X[:, :13], mask=mask)
    torch.testing.assert_close(torch.cat([prompt, torch.stack(steps, 1)], 1), whole)


def test_steps_leave_what_backward_needs():
    """Slopes that learn beside projections that do not: their matrix holds the cached keys."""
    layer = layer_of(position=Alibi(torch.full((H,), 0.3, dtype=torch.float64).requires_grad_()))
    layer.in_proj_weight.requires_grad_(False)
    layer.in_proj_bias.requires_grad_(False)
    (slopes,) = layer.position.parameters()
    cache, gradients = layer.state(), []
    stepped = torch.stack([layer.step(X[:, t], cache) for t in range(7)], 1)
    for output in (stepped, layer(X[:, :7], mask=Causal())[0]):
        gradients += torch.autograd.grad(output.square().sum(), slopes)
    torch.testing.assert_close(*gradients, rtol=1e-11, atol=1e-12)
