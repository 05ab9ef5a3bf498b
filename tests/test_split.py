"""Rows at a border as what a convolution leaves of them: the numbers of `dense`.

In float64, where PyTorch convolves slowly, single rows are faster and are what is chosen; so these
tests ask for convolutions there.
"""

import laws
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import Draw
from test_convolutional import PAIRS, SMOOTH, assert_rounding, build, transposed

from regard import PositionOnly, Softmax, attention
from regard.form import convolutional, split, support
from regard.grid import Grid
from regard.position import Field, Gaussian


@pytest.fixture(autouse=True)
def convolutions(monkeypatch):
    monkeypatch.setattr(support, "SLOW", ())


def of_split(matrix, dtype=torch.float64):
    return split.Split.of(matrix, support.find(matrix), dtype)


@pytest.mark.parametrize(("parts", "grid"), [p for p in PAIRS if "shift, " not in p[0]])
@given(normalizer=st.sampled_from(SMOOTH), seed=st.integers(0, 99))
@settings(max_examples=2)
def test_product_and_transpose_equal_dense(parts, grid, normalizer, seed):
    matrix, value = build(parts, grid, normalizer, seed)
    got, wanted = (laws.results(matrix, value, form) for form in ("convolutional", "dense"))
    assert_rounding(got, wanted)
    x = Draw(1, torch.float64).normal(2, 2, matrix.shape[-2], 3)
    assert_rounding(transposed(matrix, x, "convolutional"), transposed(matrix, x, "dense"))


def of_field(table, grid, sink=None):
    tokens = table.detach().new_zeros(1, table.shape[0], grid.rows, 1).requires_grad_()
    position = Field(table, grid)
    return attention(
        tokens, tokens, score=PositionOnly(), position=position, normalizer=Softmax(sink)
    )


def test_a_row_that_sees_little_is_computed_for_itself():
    """The last row sees the weights e^-100 and e^-101, of a filter of which one weight is 1."""
    table = torch.tensor([[-100.0, -101.0, 0.0], [0.5, 0.25, 0.0]], dtype=torch.float64)
    table.requires_grad_()
    matrix, value = of_field(table, Grid(9)), Draw(0, torch.float64).normal(1, 2, 9, 3)
    found = of_split(matrix)
    assert found.box.count == 9
    assert found.rows.tolist() == [8]
    got, wanted = (laws.results(matrix, value, form) for form in ("convolutional", "dense"))
    assert_rounding(got, wanted)
    assert got["output"][0, 0, 8].abs().max() > 1e-3
    got, wanted = (transposed(matrix, value, form) for form in ("convolutional", "dense"))
    assert_rounding(got, wanted)


def test_rows_that_see_no_weight_at_all_are_zero_and_part_of_the_convolution():
    table = torch.tensor([[-torch.inf, -torch.inf, 0.0]], dtype=torch.float64)
    matrix, value = of_field(table, Grid(5)), torch.ones(1, 1, 5, 2, dtype=torch.float64)
    assert of_split(matrix).rows.tolist() == []
    output = matrix.matmul(value, form="convolutional")
    assert output[0, 0, :, 0].tolist() == [1, 1, 1, 1, 0]


@pytest.mark.parametrize("sink", [-1000.0, -30.0, 0.0, 30.0, 700.0, 1000.0])
def test_sinks_of_any_size(sink):
    draw = Draw(0, torch.float64)
    table, sinks = draw.normal(2, 3, 3), torch.tensor([sink, -1.0], dtype=torch.float64)
    matrix = of_field(table, Grid((4, 5)), sinks.requires_grad_())
    value = draw.normal(1, 2, 20, 3)
    got, wanted = (laws.results(matrix, value, form) for form in ("convolutional", "dense"))
    assert_rounding(got, wanted)


def test_gradients_of_gradients():
    draw = Draw(0, torch.float64)
    centre = torch.tensor([[0.0, 3.0], [-0.5, 0.2]], dtype=torch.float64, requires_grad=True)
    spot = Gaussian(centre, draw.positive(2), Grid((3, 4)))
    table, value = draw.normal(2, 2, 3), draw.normal(2, 12, 2)

    def run(value, table, centre, sharpness):
        position = Field(table, Grid((3, 4))) + Gaussian(centre, sharpness, Grid((3, 4)))
        tokens = torch.zeros(2, 12, 0, dtype=torch.float64)
        matrix = attention(tokens, tokens, score=PositionOnly(), position=position)
        return matrix.matmul(value, form="convolutional")

    given = (value, table, spot.centre, spot.sharpness)
    assert torch.autograd.gradcheck(run, given)
    assert torch.autograd.gradgradcheck(run, given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("grid", ["line", "image", "strided image", "volume"])
def test_low_precision_error_is_at_most_twice_that_of_dense(grid, dtype):
    exact, low = (build("field", grid, "softmax", 3, kind) for kind in (torch.float64, dtype))
    for high, rounded in zip(laws.inputs(*exact), laws.inputs(*low), strict=True):
        high.data.copy_(rounded)
    assert len(of_split(low[0], torch.float32).rows) == 0
    laws.assert_within_dense(exact, low, "convolutional", dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_filters_near_the_least_total_keep_their_digits(dtype):
    """Weights fall off as fast as a row may see them before it is computed for itself."""
    steep = -torch.tensor(split.least_total(dtype), dtype=dtype).log() * 0.99
    table = torch.stack([-steep, steep * 0]).expand(1, 2).clone().requires_grad_()
    low = of_field(table, Grid(6)), Draw(0, dtype).normal(1, 1, 6, 3)
    assert len(of_split(low[0], dtype).rows) == 0
    exact = of_field(table.detach().double().requires_grad_(), Grid(6)), low[1].detach().double()
    exact[1].requires_grad_()
    if dtype == torch.float64:
        got, wanted = (laws.results(*low, form) for form in ("convolutional", "dense"))
        assert_rounding(got, wanted)
    else:
        laws.assert_within_dense(exact, low, "convolutional", dtype)


@pytest.mark.parametrize("seed", range(8))
def test_gradients_of_one_hot_filters_err_by_the_rounding_of_their_terms(seed):
    """Rows see one weight, so that all gradients of the table are nearly 0."""
    draw = Draw(seed, torch.float32)
    table = (40 * draw.normal(2, 3, 3).detach()).requires_grad_()
    low = of_field(table, Grid((9, 7))), draw.normal(1, 2, 63, 3)
    exact = of_field(table.detach().double().requires_grad_(), Grid((9, 7)))
    value = low[1].detach().double().requires_grad_()
    name = "gradient of position.table"
    got = laws.results(*low, "convolutional")[name]
    wanted = laws.results(exact, value, "dense")[name]
    generator = torch.Generator().manual_seed(0)  # as laws.results draws the gradient from above
    above = torch.randn(1, 2, 63, 3, generator=generator, dtype=torch.float64)
    terms = above.abs().sum() * value.detach().abs().max()
    assert (got - wanted).abs().max() <= torch.finfo(torch.float32).eps * terms


def test_in_float64_rows_at_a_border_are_single(monkeypatch):
    monkeypatch.undo()
    for dtype, rows in ((torch.float64, 24), (torch.float32, 0)):
        matrix = of_field(torch.zeros(2, 3, 3, dtype=dtype), Grid((6, 8)))
        assert support.find(matrix).border == rows
        assert ("rows at borders" in convolutional.kernel(matrix)[0]) == bool(rows)
