"""Hugging Face models on regard: generation, training, what callers pass, and what is refused."""

import subprocess
import sys

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from families import WRITERS, build, exact_eager, inputs, padded

import regard
from regard.hf import ModelError, attend
from regard.hf.masks import Structure

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
