"""Weights of both signs: row sums and plain scores, whose rows and looks no exponential bounds."""

from __future__ import annotations

import laws
import pytest
import torch
from test_laws import assert_rounding

from regard import Bias, Causal, Dropout, Identity, PositionOnly, RowSum, Window, attention
from regard.form import FORMS
from regard.kernel import extension

pytestmark = pytest.mark.skipif(
    extension.load() is None, reason="the compiled kernels are not installed"
)
NORMALIZERS = [Identity(), RowSum(eps=300.0)]  # so large that no sum comes near zero
MASKS = {"all": None, "causal": Causal(-3), "window": Window(20, 30)}


def matrix_of(normalizer, mask, dtype=torch.float64, n=130, **parts):
    draw = laws.Draw(1, dtype)
    query, key = draw.normal(2, 4, n, 8), draw.normal(2, 2, 200, 8)
    value = draw.normal(2, 2, 200, 8)
    return attention(query, key, mask=mask, normalizer=normalizer, **parts), value


@pytest.mark.parametrize("dropout", [None, Dropout(0.4, seed=3)], ids=repr)
@pytest.mark.parametrize("n", [1, 130])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("normalizer", NORMALIZERS, ids=repr)
def test_products_and_gradients(normalizer, mask, n, dropout):
    hidden = torch.zeros(1, 200).double()
    hidden[:, ::7] = -torch.inf  # a bias, too, says that pairs are not there
    matrix, value = matrix_of(normalizer, mask, n=n, dropout=dropout, position=Bias(hidden))
    assert FORMS["fused"].needs(matrix) is None
    wanted = laws.results(matrix, value, "dense")
    assert_rounding(laws.results(matrix, value, "fused"), wanted, laws.condition(matrix))
    with torch.no_grad():
        assert_rounding({"": matrix.matmul(value, form="fused")}, {"": wanted["output"]}, 1)


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("normalizer", NORMALIZERS, ids=repr)
def test_looks(normalizer, mask):
    with torch.no_grad():
        matrix, _ = matrix_of(normalizer, mask)
        weights, seen = matrix.dense(), matrix.logits() > -torch.inf
        found = matrix.topk(5)
        visible = weights.masked_fill(~seen, -torch.inf).topk(5).values
        torch.testing.assert_close(found.values, visible.masked_fill(visible == -torch.inf, 0))
        assert torch.equal(found.indices < 0, visible == -torch.inf)
        size = weights.abs()
        away = (torch.arange(130)[:, None] + 7 - torch.arange(200)).abs()
        mean = (size * away).sum(-1) / size.sum(-1)
        torch.testing.assert_close(matrix.distance(offset=7), mean.nan_to_num())
        cells = weights.unflatten(-1, (20, 10)).unflatten(-3, (13, 10))
        torch.testing.assert_close(matrix.pool(10, "max"), cells.amax((-3, -1)))
        torch.testing.assert_close(matrix.pool(10), cells.mean((-3, -1)))
        torch.testing.assert_close(matrix.received(), weights.sum(-2))


def test_a_cell_of_negative_weights_has_a_negative_maximum():
    x = torch.ones(130, 4)
    with torch.no_grad():
        least = attention(x, -x, mask=Causal(), normalizer=Identity()).pool(65, "max")
    assert torch.equal(least, torch.tensor([[0.0, 0.0], [-2.0, 0.0]]))


def test_a_row_that_sums_to_zero_has_no_weights():
    x = torch.tensor([[1.0], [2.0]], requires_grad=True)
    matrix = attention(x, torch.tensor([[1.0], [-1.0]]), normalizer=RowSum())
    output = matrix.matmul(torch.eye(2), form="fused")
    assert torch.equal(output, torch.zeros(2, 2))
    assert torch.equal(*torch.autograd.grad(output.sum(), [x]), torch.zeros(2, 1))


def test_a_weight_of_minus_zero_is_there():
    """0 of a row whose sum is negative has a gradient; a hidden pair has none."""
    bias = torch.tensor([[0.0, -2.0, -torch.inf]], requires_grad=True)
    zeros, position = torch.zeros(3, 1), Bias(bias)
    parts = {"score": PositionOnly(), "position": position, "normalizer": RowSum()}
    matrix = attention(zeros, zeros, **parts)
    value = torch.tensor([[1.0], [3.0], [5.0]])
    output = matrix.matmul(value, form="fused")
    assert torch.equal(output, torch.full((3, 1), 3.0))
    gradient = torch.autograd.grad(output.sum(), bias)[0]
    assert torch.equal(gradient, torch.tensor([[3.0, 0.0, 0.0]]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sums_that_cancel_keep_as_many_digits_as_those_of_dense(dtype):
    """2000 terms of both signs, whose sum is up to 50 times as small as that of their sizes."""
    draw = laws.Draw(2, torch.float64)
    query, key = draw.normal(64, 8).detach().abs(), draw.normal(2000, 8).detach()
    value, normalizer = draw.normal(2000, 4).detach(), RowSum(eps=20.0)
    query, key, value = (x.to(dtype) for x in (query, key, value))
    exact = attention(query.double(), key.double(), normalizer=normalizer)
    assert 20 < laws.condition(exact) < 1000
    wanted = exact.matmul(value.double(), form="dense")
    errors = [
        float((attention(query, key, normalizer=normalizer).matmul(value, form=f) - wanted).norm())
        for f in ("fused", "dense")
    ]
    rounding = torch.finfo(dtype).eps * float(wanted.norm())
    assert errors[0] <= 2 * errors[1] + rounding
