"""What a record knows of a call besides its weights: the other sequence, and W^o."""

import pytest
import torch
from test_capture import build
from torch import nn

from regard.look import capture
from regard.nn import CrossAttention


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers", reason="the package transformers is not installed")


def recorded(model, *args, **kwargs):
    with torch.no_grad(), capture(model) as record:
        output = model(*args, **kwargs)
    return record, output


KINDS = ("gpt2", "llama", "bert", "vit", "t5", "bart")


@pytest.mark.parametrize("kind", KINDS)
def test_the_layer_that_mixes_heads_gives_what_the_model_goes_on_with(transformers, kind):
    model, inputs = build(transformers, kind)
    names = dict(model.named_modules())
    with torch.no_grad(), capture(model) as record:
        kept, hooks = {}, []
        for name, module in names.items():
            hooks.append(
                module.register_forward_hook(lambda m, a, o, name=name: kept.update({name: o}))
            )
        model(**inputs)
    for hook in hooks:
        hook.remove()
    for call in record:
        heads = call.output.transpose(1, 2).flatten(2)
        made = nn.functional.linear(heads, call.mixing.weight, call.mixing.bias)
        torch.testing.assert_close(made, kept[call.mixing.name])


def test_cross_attention_knows_the_other_sequence(transformers):
    for kind in ("t5", "bart"):
        model, inputs = build(transformers, kind)
        record, output = recorded(model, **inputs)
        crossed = [call for call in record if call.query.shape[2] != call.key.shape[2]]
        assert len(crossed) == 2
        for call in crossed:
            assert call.memory_of == "encoder"
            assert torch.equal(call.memory, output.encoder_last_hidden_state)
            assert call.made_by[1:] in (("k_proj", "v_proj"), ("k", "v"))
            assert call.inputs.shape[1] == call.query.shape[2]
        assert all(call.memory is None for call in record if call not in crossed)


def test_torch_and_regard_cross_attention():
    torch.manual_seed(0)
    model = nn.Transformer(16, 2, 1, 1, 32, batch_first=True).eval()
    record, _ = recorded(model, torch.randn(1, 5, 16), torch.randn(1, 5, 16))
    own, cross = record[1], record[2]
    assert (own.memory, cross.memory_of) == (None, "encoder")  # lengths agree, vectors do not
    assert cross.made_by == ("in_proj[0:16]", "in_proj[16:32]", "in_proj[32:48]")
    assert cross.mixing.name.endswith("multihead_attn.out_proj")
    layer = CrossAttention(16, 2).eval()
    memory = torch.randn(1, 7, 16)
    record, output = recorded(layer, torch.randn(1, 3, 16), memory)
    assert torch.equal(record[0].memory, memory)
    heads = record[0].output.transpose(1, 2).flatten(2)
    mixing = record[0].mixing
    torch.testing.assert_close(nn.functional.linear(heads, mixing.weight, mixing.bias), output[0])


def test_one_layer_for_query_key_and_value(transformers):
    model, inputs = build(transformers, "gpt2")
    record, _ = recorded(model, **inputs)
    assert record[0].made_by == ("c_attn[0:32]", "c_attn[32:64]", "c_attn[64:96]")
    assert record[0].mixing.name == "h.0.attn.c_proj"
