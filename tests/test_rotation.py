"""Rotary encoding as a record finds it: what a layer made, turned, is what was multiplied."""

import pytest
import torch
from test_capture import TINY, build
from torch import nn

from regard import Causal
from regard.look import capture
from regard.look.rotation import given_angles, turn
from regard.nn import SelfAttention
from regard.position import Rotary, Yarn


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers", reason="the package transformers is not installed")


def apart(one, other):
    """The largest difference of angles."""
    return float(((one - other + torch.pi).remainder(2 * torch.pi) - torch.pi).abs().max())


@pytest.mark.parametrize("layout", ["halves", "interleaved"])
@pytest.mark.parametrize("fraction", [1.0, 0.5, 0.25])
@pytest.mark.parametrize("factor", [1.0, 1.25])
def test_angles_are_those_of_the_part(layout, fraction, factor):
    torch.manual_seed(0)
    rotary = Rotary.of(16, layout=layout, fraction=fraction, base=100.0)
    x, width = torch.randn(2, 3, 80, 16), int(16 * fraction)
    after = rotary.on_query(x, torch.arange(80))
    after[..., :width] *= factor
    found = turn(x, after)
    exact = torch.arange(80)[:, None] * torch.tensor(rotary.frequencies[0])
    assert (found.layout, found.own) == (layout, False)
    assert found.factor == pytest.approx(factor, rel=1e-6)
    assert found.angles.shape == (2, 80, 8 * fraction)
    assert apart(found.angles, exact) < 1e-4


def test_what_is_no_rotation_has_no_angles():
    torch.manual_seed(0)
    x = torch.randn(1, 3, 9, 8)
    after = Rotary.of(8).on_query(x, torch.arange(9))
    assert turn(x, x) is None
    assert turn(x, 1.01 * x) is None
    assert turn(x, torch.randn_like(x)) is None
    uneven = torch.cat([x[:, :1], after[:, 1:]], 1)  # each token turns all heads alike
    assert turn(x, uneven) is None
    assert turn(x[:, :, :1], after[:, :, :1]) is None  # position 0 does not turn
    longer = after.clone()
    longer[:, :, 4:] *= 1.01  # no factor of all tokens
    assert turn(x, longer) is None
    half = after.bfloat16()
    other = half.clone()
    other[0, 1, 7, 2] *= 1.2  # far more than bfloat16 rounds by
    assert turn(x.bfloat16(), half) is not None
    assert turn(x.bfloat16(), other) is None


def test_cosines_and_sines_are_read_as_angles_and_a_factor():
    at = torch.arange(6)[:, None] * torch.tensor([1.0, 0.1])
    for wide in (at, torch.cat([at, at], -1), at.repeat_interleave(2, -1)):
        ((angles, factor),) = given_angles([None, (1.5 * wide.cos(), 1.5 * wide.sin())])
        assert factor == pytest.approx(1.5)
        assert apart(angles[0], at) < 1e-6
    ((angles, factor),) = given_angles([torch.polar(torch.ones_like(at), at)])
    assert factor == 1.0
    assert apart(angles[0], at) < 1e-6
    assert given_angles([(torch.randn(6, 4), torch.randn(6, 4))]) == []
    assert given_angles([(at.cos(), at.sin()[:5]), at, (at.cos(), None)]) == []


NARROW = {**TINY, "intermediate_size": 48, "max_position_embeddings": 64}
GROUPED = {**NARROW, "num_key_value_heads": 2}
SCALED = {"factor": 4.0, "original_max_position_embeddings": 16}
FREQUENCIES = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "llama3": {**SCALED, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "yarn": SCALED,
}
FUSED = {"GPTNeoX": 4}  # query, key and value of each of so many heads side by side
MODELS = {
    **{f"Llama {kind}": ("Llama", GROUPED, kind) for kind in FREQUENCIES},
    "GPTNeoX": ("GPTNeoX", NARROW, ""),
    "Phi": ("Phi", GROUPED, ""),
    "StableLm": ("StableLm", GROUPED, ""),
    "Cohere": ("Cohere", GROUPED, ""),
    "Glm": ("Glm", {**GROUPED, "pad_token_id": 0, "head_dim": 16}, ""),
    "GptOss": (
        "GptOss",
        {**GROUPED, "head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1},
        "",
    ),
}
INTERLEAVED = {"Cohere", "Glm"}


def a_model(transformers, kind, words, frequencies="", length=40):
    """A small model with random weights, and the ids of two sequences."""
    torch.manual_seed(0)
    if frequencies:
        rope = {"rope_type": frequencies, "rope_theta": 1e4, **FREQUENCIES[frequencies]}
        words = {**words, "rope_parameters": rope}
    config = getattr(transformers, f"{kind}Config")(**words)
    ids = torch.randint(3, 50, (2, length))
    return getattr(transformers, f"{kind}Model")(config).eval(), ids


def outputs_of(model, parts, ids):
    """What modules whose names end in one of these give, by name."""
    made, hooks = {}, []
    for name, module in model.named_modules():
        if name.endswith(parts):
            hooks.append(
                module.register_forward_hook(lambda m, a, o, name=name: made.update({name: o}))
            )
    with torch.no_grad(), capture(model) as record:
        model(input_ids=ids)
    for hook in hooks:
        hook.remove()
    return record, made


def rotated(x, angles, factor, layout):
    """Su et al. 2021, equation 34, over the first channels; x: [batch, heads, n, d]."""
    channels = 2 * angles.shape[-1]
    head, rest = x[..., :channels].double(), x[..., channels:].double()
    cosine, sine = (factor * f(angles.double())[:, None] for f in (torch.cos, torch.sin))
    if layout == "halves":
        one, other = head.chunk(2, -1)
        turned = torch.cat([one * cosine - other * sine, other * cosine + one * sine], -1)
    else:
        one, other = head[..., ::2], head[..., 1::2]
        turned = torch.stack([one * cosine - other * sine, other * cosine + one * sine], -1)
        turned = turned.flatten(-2)
    return torch.cat([turned, rest], -1)


@pytest.mark.parametrize("name", MODELS)
def test_what_a_model_made_and_turned_is_what_it_multiplied(transformers, name):
    kind, words, frequencies = MODELS[name]
    model, ids = a_model(transformers, kind, words, frequencies)
    record, made = outputs_of(model, ("q_proj", "k_proj", "query_key_value", "rotary_emb"), ids)
    cosine, sine = made["rotary_emb"]
    for call in record:
        found, d = call.turned, call.query.shape[-1]
        if kind in FUSED:
            both = made[f"{call.name}.query_key_value"].unflatten(-1, (FUSED[kind], 3, d))
            before = [both[..., part, :] for part in (0, 1)]
            assert found.made_by == ("query_key_value", "query_key_value")
        else:
            before = [made[f"{call.name}.{x}_proj"].unflatten(-1, (-1, d)) for x in "qk"]
            assert found.made_by == ("q_proj", "k_proj")
        assert found.layout == ("interleaved" if kind in INTERLEAVED else "halves")
        assert found.own
        assert call.unturned == ""
        exact = (cosine.square() + sine.square()).sqrt()
        for side, x, after, angles in zip(
            (0, 1), before, (call.query, call.key), (found.query, found.key), strict=True
        ):
            factor = found.factors[side]
            torch.testing.assert_close(exact, torch.full_like(exact, factor))
            again = rotated(x.transpose(1, 2), angles, factor, found.layout)
            torch.testing.assert_close(again, after.double(), atol=1e-6, rtol=1e-6)
    scaled = name in ("Llama yarn", "GptOss")
    assert (record[0].turned.factors[0] != 1.0) == scaled
    partial = {"GPTNeoX": 1, "Phi": 2, "StableLm": 1, "Glm": 4}
    assert record[0].turned.query.shape[-1] == partial.get(name, 4)


def test_a_query_that_is_scaled_early_has_a_factor_of_its_own(transformers):
    words = {**NARROW, "position_embedding_type": "rotary", "pad_token_id": 0}
    model, ids = a_model(transformers, "Esm", words)
    record, _ = outputs_of(model, ("nothing",), ids)
    assert record[0].scale == 1.0
    assert record[0].turned.factors == (pytest.approx(8**-0.5), 1.0)
    assert not record[0].turned.own


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_few_digits_are_enough(transformers, dtype):
    for name in ("Llama yarn", "GPTNeoX"):
        model, ids = a_model(transformers, *MODELS[name])
        whole, _ = outputs_of(model, ("nothing",), ids)
        record, _ = outputs_of(model.to(dtype), ("nothing",), ids)
        for call, exact in zip(record, whole, strict=True):
            assert call.turned.own
            assert call.turned.query.shape == exact.turned.query.shape
            assert apart(call.turned.query, exact.turned.query) < 4 * torch.finfo(dtype).eps


def test_where_it_cannot_be_known_the_record_says_so(transformers):
    latent = {
        "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
        "v_head_dim": 8, "n_routed_experts": 4, "n_group": 1, "topk_group": 1,
        "num_experts_per_tok": 1, "first_k_dense_replace": 2,
    }  # fmt: skip
    experts = {"head_dim": 8, "num_local_experts": 2}
    # DeepSeek turns the last numbers and stores their pairs elsewhere; Llama 4 normalizes after it.
    for kind, words in (
        ("DeepseekV3", {**NARROW, **latent}),
        ("Llama4Text", {**GROUPED, **experts}),
    ):
        model, ids = a_model(transformers, kind, words)
        record, _ = outputs_of(model, ("nothing",), ids)
        assert record[0].turned is None
        assert record[0].unturned == "it was given cosines and sines of positions"
    for kind in ("bert", "gpt2", "vit", "t5"):
        model, inputs = build(transformers, kind)
        with torch.no_grad(), capture(model) as record:
            model(**inputs)
        assert {(call.turned, call.unturned) for call in record} == {(None, "")}


def test_a_layer_without_positions_in_a_model_with_them(transformers):
    words = {**GROUPED, "pad_token_id": 0, "no_rope_layers": [1, 0]}
    model, ids = a_model(transformers, "SmolLM3", words)
    record, _ = outputs_of(model, ("nothing",), ids)
    assert record[0].turned is not None
    assert (record[1].turned, record[1].unturned) == (None, "")
    assert record[1].made_by == ("q_proj", "k_proj", "v_proj")


def test_steps_of_a_generation_keep_the_factor(transformers):
    model, ids = a_model(transformers, *MODELS["Llama yarn"], length=9)
    with torch.no_grad(), capture(model) as record:
        cache = model(input_ids=ids[:, :8], use_cache=True).past_key_values
        model(input_ids=ids[:, 8:], past_key_values=cache, use_cache=True)
    with torch.no_grad(), capture(model) as whole:
        model(input_ids=ids)
    joined, exact = record.joined()[0].turned, whole[0].turned
    assert joined.factors == pytest.approx(exact.factors, rel=1e-6)
    torch.testing.assert_close(joined.query, exact.query)
    torch.testing.assert_close(joined.key, exact.key)


def test_regards_own_rotary():
    torch.manual_seed(0)
    for rotary, factor in ((Rotary.of(8), 1.0), (Rotary.of(8, scaling=Yarn(4.0, 16)), None)):
        layer = SelfAttention(16, 2, position=rotary).eval()
        with torch.no_grad(), capture(nn.ModuleList([layer])[0]) as record:
            layer(torch.randn(1, 6, 16), mask=Causal())
        found = record[0].turned
        exact = torch.arange(6)[:, None] * torch.tensor(rotary.frequencies[0])
        assert apart(found.query[0], exact) < 1e-4
        assert found.factors[0] == pytest.approx(rotary.magnitude if factor is None else factor)
