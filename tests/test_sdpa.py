"""scaled_dot_product_attention with torch's arguments, and in the place of torch's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import regard
from regard import Causal, DtypeError, ShapeError, sdpa_kernel

torch.manual_seed(0)
KEEP = torch.rand(7, 9) < 0.6
KEEP[3] = False
CASES = [
    {},
    {"scale": 0.3},
    {"is_causal": True},
    {"attn_mask": KEEP},
    {"attn_mask": KEEP[:, :1]},
    {"attn_mask": torch.randn(7, 9).double()},
    {"attn_mask": torch.randn(2, 4, 7, 9).double()},
    {"attn_mask": torch.randn(2, 1, 1, 9).double(), "scale": 1.0},
]


def operands(key_heads=4, width=5):
    shapes = (2, 4, 7, 8), (2, key_heads, 9, 8), (2, key_heads, 9, width)
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("arguments", CASES, ids=lambda case: ", ".join(case) or "plain")
def test_numbers_and_gradients_are_those_of_torch(arguments):
    x = operands()
    above = torch.randn(2, 4, 7, 5, dtype=torch.float64)
    found = []
    for function in (regard.scaled_dot_product_attention, F.scaled_dot_product_attention):
        output = function(*x, **arguments)
        found.append([output, *torch.autograd.grad(output, x, above)])
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, rtol=1e-12, atol=1e-12)


def test_grouped_heads_as_in_torch():
    x = operands(key_heads=2)
    wanted = F.scaled_dot_product_attention(*x, enable_gqa=True)
    assert torch.allclose(regard.scaled_dot_product_attention(*x, enable_gqa=True), wanted)
    with pytest.raises(ShapeError, match="4 heads and key 2; with enable_gqa=True"):
        regard.scaled_dot_product_attention(*x)


def test_dropout_drops_whenever_it_is_asked_for():
    query, eye = torch.randn(1, 1, 64, 8), torch.eye(64)
    weights = regard.scaled_dot_product_attention(query, query, eye)
    kept = regard.scaled_dot_product_attention(query, query, eye, dropout_p=0.5)
    assert torch.allclose(kept, torch.where(kept == 0, 0, 2 * weights))
    assert 0.4 < (kept == 0).float().mean() < 0.6  # of 4096: ten standard deviations to each side


def test_inside_the_block_torchs_function_is_ours(monkeypatch):
    """Also where another module of torch calls it, and only inside."""
    layer = nn.MultiheadAttention(8, 2, batch_first=True)
    x = torch.randn(2, 5, 8, requires_grad=True)
    wanted = layer(x, x, x, need_weights=False)[0]
    seen = []
    multiply = regard.Attention.matmul
    monkeypatch.setattr(
        regard.Attention, "matmul", lambda A, value: (seen.append(repr(A)), multiply(A, value))[1]
    )
    with sdpa_kernel():
        output = layer(x, x, x, need_weights=False)[0]
        heads = F.scaled_dot_product_attention(x, x, x, is_causal=True)
    assert torch.allclose(output, wanted, atol=1e-6)
    (output.sum() + heads.sum()).backward()
    assert [text.partition(":")[0] for text in seen] == [
        "Attention(2, 2, 5, 5)",
        "Attention(2, 5, 5)",
    ]
    layer(x, x, x, need_weights=False)
    assert len(seen) == 2


def test_wrong_input_says_what_is_wrong():
    x = torch.randn(1, 2, 5, 4)
    with pytest.raises(ValueError, match="torch takes one of them"):
        regard.scaled_dot_product_attention(x, x, x, torch.ones(5, 5) > 0, is_causal=True)
    with pytest.raises(DtypeError, match="attn_mask is a tensor, not Causal"):
        regard.scaled_dot_product_attention(x, x, x, Causal())
    with pytest.raises(DtypeError, match="True = may attend"):
        regard.scaled_dot_product_attention(x, x, x, torch.ones(5, 5, dtype=torch.int64))
