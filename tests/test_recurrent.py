"""The form `recurrent`: dense, token by token and in chunks are one set of numbers."""

from __future__ import annotations

import laws
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import Case, condition, results

from regard import (
    FormError,
)
from regard.form import chunks, recurrent

EPS = torch.finfo(torch.float64).eps
SCORES = [name for name in laws.SCORES if name.startswith("features")]
OWN = ["none", "causal, last", "causal documents", "causal padded", "nothing"]
"""Masks that a state can hold for every draw of sizes, where the tokens of rows are the last."""
HELD = [*OWN, "causal", "causal, few see", "padding"]
"""Masks that a state can hold where only the mask says which tokens rows are."""


@pytest.fixture(params=[1, 4, 64], ids=lambda size: f"chunks of {size}", autouse=True)
def small_chunks(request, monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK", request.param)
    monkeypatch.setattr(chunks, "LEAF", 2)
    monkeypatch.setattr(chunks, "PIECE_NUMBERS", 64)


def assert_rounding(got, wanted, factor):
    for name, reference in wanted.items():
        assert torch.isfinite(got[name]).all(), name
        if reference.numel():
            bound = 256 * EPS * factor * max(1.0, float(reference.abs().max()))
            assert float((got[name] - reference).abs().max()) <= bound, name


@pytest.mark.parametrize("score", SCORES)
@given(
    mask=st.sampled_from(HELD),
    position=st.sampled_from(["none", "rotary"]),
    normalizer=st.sampled_from(["row sum", "identity"]),
    sizes=laws.sizes,
    seed=st.integers(0, 2**12).map(lambda k: 3 * k + 1),  # multiples of 3 have dropout
)
@settings(max_examples=12)
def test_form_equals_dense(score, mask, position, normalizer, sizes, seed):
    matrix, value = Case(score, position, mask, normalizer, sizes, seed).build(torch.float64)
    factor = condition(matrix)
    if factor > 1e4:  # a row sum near zero has no digits to compare
        return
    if matrix.score.recurs and mask not in OWN:
        mask = OWN[seed % len(OWN)]
        matrix, value = Case(score, mask=mask, **rest).build(torch.float64)
    assert recurrent.needs(matrix) is None
    got, wanted = (results(matrix, value, form) for form in ("recurrent", "dense"))
    assert_rounding(got, wanted, factor**3)
    x = laws.Draw(seed, torch.float64).normal(sizes.batch, sizes.heads, sizes.n, 3)
    one, other = (matrix.mT.matmul(x, form=form) for form in ("recurrent", "dense"))
    assert_rounding({"transposed": one.detach()}, {"transposed": other.detach()}, factor**3)
