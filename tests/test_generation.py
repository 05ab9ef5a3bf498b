"""Steps of a generation with a cache, joined: the matrix of the whole sequence, row by row."""

import importlib

import pytest
import torch
from reader import Reader
from test_capture import build
from torch import nn

from regard.errors import ShapeError
from regard.look import capture, look
from regard.nn import SelfAttention
from regard.position import Alibi, Rotary


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers", reason="the package transformers is not installed")


def causal_model(transformers, kind):
    model, inputs = build(transformers, kind)
    torch.manual_seed(0)
    kinds = {
        "gpt2": "GPT2LMHeadModel",
        "llama": "LlamaForCausalLM",
        "t5": "T5ForConditionalGeneration",
        "mistral-window": "MistralForCausalLM",
    }
    whole = getattr(transformers, kinds[kind])(model.config).eval()
    return whole, inputs["input_ids"]


def generated(model, ids, **options):
    with torch.no_grad(), capture(model) as record:
        out = model.generate(
            ids, max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0, **options
        )
    return record, out


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("cache", [None, "static"])
def test_the_joined_matrix_is_that_of_one_pass_over_everything(transformers, kind, cache):
    model, ids = causal_model(transformers, kind)
    record, out = generated(model, ids, cache_implementation=cache)
    with torch.no_grad(), capture(model) as whole:
        model(out[:, :-1], use_cache=False)
    assert len(record) == 2 * 6
    steps = record.joined()
    assert [call.steps for call in steps] == [(9, 1, 1, 1, 1, 1)] * 2
    n = out.shape[1] - 1
    for call, other in zip(steps, whole, strict=True):
        dense = call.matrix.dense()
        assert not dense[..., n:].any()  # of a static cache: room that was never filled
        torch.testing.assert_close(dense[..., :n], other.matrix.dense())
        torch.testing.assert_close(call.output, other.output)
        torch.testing.assert_close(call.inputs, other.inputs)
        torch.testing.assert_close(record[call.name].dense(), dense)
    assert record.shown().captured[0].query.shape[2] == n


@pytest.mark.parametrize("implementation", ["eager", "regard"])
def test_other_implementations(transformers, implementation):
    importlib.import_module("regard.hf")  # registers "regard"
    model, ids = causal_model(transformers, "llama")
    model.set_attn_implementation(implementation)
    record, out = generated(model, ids)
    with torch.no_grad(), capture(model) as whole:
        model(out[:, :-1], use_cache=False)
    for call, other in zip(record.joined(), whole, strict=True):
        torch.testing.assert_close(call.matrix.dense(), other.matrix.dense())


def test_a_cache_that_forgets_stays_single_steps(transformers):
    model, ids = causal_model(transformers, "mistral-window")
    record, _ = generated(model, ids)  # four keys of a window, then they move
    assert len(record.joined()) == len(record) == 12


def test_a_padded_batch(transformers):
    model, ids = causal_model(transformers, "llama")
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, :3] = 0
    record, out = generated(model, ids.repeat(2, 1), attention_mask=mask)
    long = torch.cat([mask, torch.ones(2, 5, dtype=torch.long)], 1)
    places = (long.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad(), capture(model) as whole:
        model(out[:, :-1], attention_mask=long, position_ids=places, use_cache=False)
    for call, other in zip(record.joined(), whole, strict=True):
        seen, expected = call.matrix.dense(), other.matrix.dense()
        torch.testing.assert_close(seen[0], expected[0])
        torch.testing.assert_close(seen[1, :, 3:], expected[1, :, 3:])  # padding is read by none


def test_both_attentions_of_an_encoder_decoder(transformers):
    model, ids = causal_model(transformers, "t5")
    record, out = generated(model, ids)
    with torch.no_grad(), capture(model) as whole:
        model(input_ids=ids, decoder_input_ids=out[:, :-1], use_cache=False)
    assert len(record.joined()) == len(whole) == 6
    for call in record.joined():
        other = next(x for x in whole if x.name == call.name)
        torch.testing.assert_close(call.matrix.dense(), other.matrix.dense())


def test_two_generations_and_two_runs_are_not_joined(transformers):
    model, ids = causal_model(transformers, "gpt2")
    with torch.no_grad(), capture(model) as record:
        for start in (ids, ids[:, :5]):
            model.generate(start, max_new_tokens=3, min_new_tokens=3, pad_token_id=0)
        model(ids)
        model(ids)
    lengths = [
        call.query.shape[2] for call in record.joined() if call.name.startswith("transformer.h.0")
    ]
    assert lengths == [11, 7, 9, 9]


def test_earlier_steps_keep_no_copies_of_the_cache(transformers):
    model, ids = causal_model(transformers, "gpt2")
    record, _ = generated(model, ids)
    first = [call for call in record if call.name == record[0].name]
    sizes = {}
    for call in first:
        storage = call.key.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
    assert len(first) == 6
    # 9 keys, then room for twice 10, which the other steps fit into.
    assert sum(sizes.values()) == (9 + 20) * 32 * 4
    for call in first:
        assert call.key.shape[2] == call.value.shape[2]
        torch.testing.assert_close(call.matrix @ call.value, call.output)


@pytest.mark.parametrize("position", [None, Rotary.of(8), Alibi.of(2)], ids=repr)
def test_steps_of_regards_own_layers(position):
    torch.manual_seed(0)
    layer, x = SelfAttention(16, 2, position=position).eval(), torch.randn(1, 9, 16)
    model = nn.ModuleDict({"own": layer})
    state, once = layer.state(), layer.state()
    with torch.no_grad(), capture(model) as record:
        layer(x[:, :6], state=state)
        for at in (6, 7, 8):
            layer.step(x[:, at], state)
    with torch.no_grad(), capture(model) as whole:
        layer(x, state=once)
    torch.testing.assert_close(record["own"].dense(), whole["own"].dense())
    if isinstance(position, Rotary):
        turned = record.joined()[0].turned
        torch.testing.assert_close(turned.query, whole[0].turned.query, atol=1e-5, rtol=0)


def test_the_page_shows_one_map_with_the_generated_tokens(browser, transformers, tmp_path):
    model, ids = causal_model(transformers, "llama")
    record, out = generated(model, ids)
    names = [f"t{at}" for at in range(out.shape[1])]
    seen = look(record, tokens=names)
    assert seen.scene.tokens.labels == tuple(names[:-1])
    page = Reader(browser, seen.save(tmp_path / "generation.html"))
    page.go("#layer=1&head=0&i=13&j=12")
    page.settles(layer=1, i=13, j=12)
    assert page.text("query-token") == "t13"
    assert "Joined from 6 steps of one generation, of which the first has 9 rows" in page.text(
        "map-hint"
    )
    assert "its output was not compared" in page.text("proof")
    page.until(lambda: page.check()[0] == "good")
    page.assert_quiet()
    with pytest.raises(ShapeError, match="3 tokens were given"):
        look(record, tokens=names[:3])
