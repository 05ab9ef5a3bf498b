"""The attention function that Hugging Face calls, beside transformers' own for `sdpa`."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from families import build, exact_eager, inputs, t
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function

import regard
from regard.errors import RegardError
from regard.hf import ModelError, attend
from regard.hf.masks import structure

CLOSE = {"rtol": 1e-10, "atol": 1e-10}
LOWEST = torch.finfo(torch.float64).min


def layer(**facts):
    return SimpleNamespace(**{"training": False, "num_key_value_groups": 2, **facts})


def vectors(rows=5, columns=5, batch=2):
    torch.manual_seed(0)
    query = torch.randn(batch, rows, 4, 8).double().transpose(1, 2)  # strided, as models pass it
    key, value = torch.randn(2, batch, columns, 2, 8).double().transpose(2, 3).unbind(0)
    return query, key, value


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("columns", [5, 8])
@pytest.mark.parametrize("facts", [{}, {"is_causal": False}, {"is_causal": True}])
@pytest.mark.parametrize("asked", [{}, {"is_causal": False}, {"is_causal": True, "scaling": 0.9}])
def test_without_a_mask_the_flags_decide_as_in_sdpa(rows, columns, facts, asked):
    """Also a static cache longer than its queries: rows then count from the first key."""
    given = layer(**facts), *vectors(rows, columns), None
    bias = {"position_bias": torch.randn(1, 4, rows, columns).double()}
    for more in (asked, {**asked, **bias}):
        expected, _ = sdpa_attention_forward(*given, **more)
        output, matrix = attend(*given, **more)
        assert output.is_contiguous()
        assert matrix.shape == (2, 4, rows, columns)
        torch.testing.assert_close(output, expected, **CLOSE)


FLOATS = torch.tensor(
    [[0.0, LOWEST, 0.5, 0.0, -torch.inf]] + [[0.0, 0.0, -0.25, LOWEST, LOWEST]] * 4
).double()
USERS = {
    "bool": FLOATS[None, None] > -1,
    "no bias": FLOATS.where(FLOATS < -1, 0)[None, None],
    "a bias, too": FLOATS[None, None].repeat(2, 1, 1, 1),
    "for each head": FLOATS * torch.tensor([0.5, 1.0, 1.0, 0.9]).double()[:, None, None],
    "of keys alone": FLOATS[1][None, None, None],
}


@pytest.mark.parametrize("name", USERS)
def test_masks_of_the_user_mean_what_they_mean_in_sdpa(name):
    given, mask = (layer(), *vectors()), USERS[name]
    own = mask.clone().requires_grad_(mask.is_floating_point())
    theirs = mask.clone().requires_grad_(mask.is_floating_point())
    output, _ = attend(*given, own)
    expected, _ = sdpa_attention_forward(*given, theirs)
    torch.testing.assert_close(output, expected, **CLOSE)
    if mask.is_floating_point():
        output.square().sum().backward()
        expected.square().sum().backward()
        seen = theirs > LOWEST / 2
        torch.testing.assert_close(own.grad[seen], theirs.grad[seen], **CLOSE)


def test_a_model_takes_the_users_mask_of_four_axes():
    model, given = build("llama"), inputs("llama")
    keep = torch.rand(2, 1, 9, 9, generator=torch.manual_seed(0)) > 0.4
    keep |= torch.eye(9, dtype=torch.bool)
    given["attention_mask"] = torch.zeros(keep.shape).double().masked_fill(~keep, LOWEST)
    found = []
    for kind in ("eager", "regard"):
        model.set_attn_implementation(kind)
        with torch.no_grad(), exact_eager():
            found.append(model(**given).logits)
    torch.testing.assert_close(found[1], found[0], **CLOSE)


def test_a_query_without_keys_gives_zero_and_not_the_mean():
    query, key, value = vectors()
    real = torch.tensor([[True] * 5, [False] * 2 + [True] * 3])
    mask = structure(batch_size=2, q_length=5, kv_length=5, attention_mask=real)
    output, matrix = attend(layer(), query, key, value, mask)
    assert output[1, :2].eq(0).all()
    assert matrix.dense()[1, :, :2].eq(0).all()
    assert output[1, 2:].ne(0).all()
    lowest = torch.zeros(5, 5).double().masked_fill(torch.ones(5, 5).triu(1).bool(), LOWEST)
    lowest = lowest.masked_fill(~real[:, None, None], LOWEST)
    eager, _ = sdpa_attention_forward(layer(), query, key, value, lowest)
    torch.testing.assert_close(eager[1, 0], value[1].mean(1).repeat_interleave(2, 0), **CLOSE)


def test_sinks_softcap_and_bias_by_hand():
    query, key, value = vectors()
    sinks, bias = torch.randn(4).double(), torch.randn(1, 4, 5, 5).double()
    mask = structure(batch_size=2, q_length=5, kv_length=5)
    output, _ = attend(
        layer(), query, key, value, mask, scaling=2.0, s_aux=sinks, softcap=0.7, position_bias=bias
    )
    logits = 0.7 * (2.0 * query @ key.repeat_interleave(2, 1).mT / 0.7).tanh() + bias
    terms = logits.masked_fill(~torch.ones(5, 5, dtype=torch.bool).tril(), -torch.inf).exp()
    weights = terms / (terms.sum(-1, keepdim=True) + sinks.exp()[:, None, None])
    expected = (weights @ value.repeat_interleave(2, 1)).transpose(1, 2)
    torch.testing.assert_close(output, expected, **CLOSE)


@pytest.mark.parametrize("causal", [False, True])
def test_packed_documents_do_not_see_each_other(causal):
    query, key, value = vectors(7, 7, batch=1)
    ends = torch.tensor([0, 2, 6, 7], dtype=torch.int32)
    asked = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 4, "max_length_k": 4}
    output, _ = attend(layer(), query, key, value, None, is_causal=causal, **asked)
    for start, stop in ((0, 2), (2, 6), (6, 7)):
        part = [x[:, :, start:stop] for x in (query, key, value)]
        expected, _ = sdpa_attention_forward(layer(), *part, None, is_causal=causal)
        torch.testing.assert_close(output[:, start:stop], expected, **CLOSE)
    mask = structure(batch_size=1, q_length=7, kv_length=7)
    again, _ = attend(layer(), query, key, value, mask, **asked)
    assert torch.equal(again, output) == causal


def test_a_matrix_keeps_keys_that_a_static_cache_overwrites():
    query, key, value = vectors()
    cache = torch.zeros(2, 2, 5, 8).double()
    cache.copy_(key)
    output, matrix = attend(layer(), query, cache, value, None)
    cache.zero_()
    torch.testing.assert_close((matrix @ value).transpose(1, 2), output, **CLOSE)
    _, matrix = attend(layer(), query, key, value, None)
    assert matrix.key is key  # a cache that grows is not copied
    with torch.inference_mode():
        _, matrix = attend(layer(), query, key + 0, value, None)
    assert matrix.shape == (2, 4, 5, 5)


REFUSED = {
    "Llama of layer 3 passes block_indices, indices": {"block_indices": 1, "indices": 2},
    "paged cache": {"cache": object()},
    "window of 3 over 5 keys, but passes no mask": {"sliding_window": 3},
    "does not cover 5 tokens": {"cu_seq_lens_q": torch.tensor([0, 4])},
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_would_change_the_result_is_refused(words):
    class Llama(torch.nn.Module):
        layer_idx = 3

    with pytest.raises(ModelError, match=words):
        attend(Llama(), *vectors(), None, **REFUSED[words])


def test_documents_of_two_lengths_are_not_causal():
    ends = {"cu_seq_lens_q": torch.tensor([0, 2, 4]), "cu_seq_lens_k": torch.tensor([0, 1, 4])}
    with pytest.raises(ModelError, match="differ in number"):
        attend(layer(), *vectors(4, 4, batch=1), None, **ends)
    output, _ = attend(layer(is_causal=False), *vectors(4, 4, batch=1), None, **ends)
    assert output.shape == (1, 4, 4, 8)


def test_masks_of_another_size_or_kind_are_refused():
    for mask in (torch.ones(1, 1, 5, 4), torch.ones(1, 1, 5, 5, dtype=torch.long)):
        with pytest.raises(RegardError, match="got a mask of"):
            attend(layer(), *vectors(), mask)
    mask = structure(batch_size=2, q_length=5, kv_length=5)
    with pytest.raises(RegardError, match="5 queries and 5 keys"):
        attend(layer(), *vectors(3, 5), mask)


def test_words_without_an_effect_are_taken():
    asked = {"output_attentions": True, "position_ids": torch.arange(5), "sliding_window": 9}
    output, _ = attend(layer(), *vectors(), None, **asked, softcap=None, s_aux=None)
    torch.testing.assert_close(output, attend(layer(), *vectors(), None)[0], rtol=0, atol=0)


def test_a_compiled_call_is_the_same_call():
    query, key, value = vectors()
    real = torch.tensor([[True] * 5, [True] * 4 + [False]])

    def call(query, key, value):
        mask = structure(
            batch_size=2, q_length=5, kv_length=5, attention_mask=real,
            mask_function=causal_mask_function,
        )  # fmt: skip
        return attend(LAYER, query, key, value, mask, scaling=0.5)

    output, matrix = torch.compile(call, backend="eager")(query, key, value)
    expected, _ = call(query, key, value)
    assert torch.equal(output, expected)
    assert isinstance(matrix, regard.Attention)


LAYER = layer()


def test_both_functions_are_registered():
    """Without the second, models would drop their masks without a word."""
    assert t.AttentionInterface()["regard"] is attend
    assert t.AttentionMaskInterface()["regard"] is structure


def test_without_transformers_the_error_names_the_command():
    code = """
import sys, regard
assert 'transformers' not in sys.modules
sys.modules['transformers'] = None
try:
    import regard.hf
except regard.MissingPackageError as error:
    assert 'pip install "regard[hf]"' in str(error), error
else:
    raise AssertionError('no error')
"""
    subprocess.run([sys.executable, "-c", code], check=True)
