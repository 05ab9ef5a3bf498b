"""Neighborhoods against their authors' window rule and plain loops; grids and their positions."""

import itertools

import pytest
import torch

from regard import Dot, PositionOnly, attention
from regard.errors import DtypeError, ShapeError
from regard.form.tiles import Tiles
from regard.grid import Grid, from_patches, to_patches
from regard.neighborhood import Neighborhood
from regard.position import Field, Gaussian, Shift

CPU = torch.device("cpu")


def shown(mask):
    rows = mask.grid.rows
    return mask.runs(rows, rows, CPU).keep(slice(0, rows), slice(0, rows))


def natten_line(n, kernel, dilation, causal, border):
    """Which keys each query sees along one axis, [n, n], by loops.

    The window moves inward within the tokens that share the query's remainder by the dilation, as
    in NATTEN's get_window_start.
    """
    keep = torch.zeros(n, n, dtype=torch.bool)
    for i in range(n):
        group = [j for j in range(n) if j % dilation == i % dilation]
        at = group.index(i)
        first = at - (kernel - 1 if causal else kernel // 2)
        if border == "shift" and not causal:
            first = max(min(first, len(group) - kernel), 0)
        for place in range(first, first + kernel):
            if 0 <= place < len(group):
                keep[i, group[place]] = True
    return keep


@pytest.mark.parametrize("border", ["shift", "cut"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dilation", [1, 2, 3])
@pytest.mark.parametrize("kernel", [1, 2, 3, 4])
def test_a_line_is_the_window_rule(kernel, dilation, causal, border):
    for n in (kernel * dilation, kernel * dilation + 1, 15):
        mask = Neighborhood(n, kernel, dilation, causal, border)
        assert torch.equal(shown(mask), natten_line(n, kernel, dilation, causal, border))


@pytest.mark.parametrize("border", ["shift", "cut"])
@pytest.mark.parametrize(
    ("size", "kernel", "dilation", "causal"),
    [
        ((4, 5), (3, 2), (1, 2), (False, True)),
        ((4, 5), 3, 1, False),
        ((3, 3), 3, 1, False),  # boxes as wide as the grid: lines of keys that touch
        ((3, 4, 5), (3, 1, 2), (1, 1, 2), (True, False, False)),
    ],
)
def test_a_box_is_a_product_of_lines(size, kernel, dilation, causal, border):
    mask = Neighborhood(size, kernel, dilation, causal, border)
    lines = zip(size, mask.kernel_size, mask.dilation, mask.causal, strict=True)
    wanted = torch.ones(1, 1, dtype=torch.bool)
    for axis in lines:
        wanted = torch.kron(wanted.int(), natten_line(*axis, border).int()).bool()
    assert torch.equal(shown(mask), wanted)
    runs = mask.runs(mask.grid.rows, mask.grid.rows, CPU)
    same_row = runs._owner().diff() == 0
    assert (runs.start[1:] > runs.stop[:-1])[same_row].all()  # sorted, and none touch


def test_every_query_sees_as_many_keys_as_any_other_where_the_box_moves():
    assert shown(Neighborhood((5, 6), (3, 4))).sum(-1).eq(12).all()


def test_cost_is_linear_in_the_number_of_tokens():
    """A row of tiles meets the lines of its boxes, and not the whole image."""
    pairs = []
    for side in (16, 32, 64):
        tokens = torch.zeros(1, side * side, 1)
        mask = Neighborhood((side, side), 3)
        tiles = Tiles.of(attention(tokens, tokens, score=Dot(), mask=mask))
        met = sum(
            (span.columns.stop - span.columns.start) * (rows.stop - rows.start)
            for rows in tiles.row_blocks()
            for span in tiles.spans(rows)
        )
        pairs.append(met / side**2)
    assert pairs[2] < 1.5 * pairs[1]  # per token; of whole rows it would be 4


def test_all_forms_agree_on_content():
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 30, 4, dtype=torch.float64).unbind(0)
    matrix = attention(query, key, mask=Neighborhood((5, 6), 3, causal=(False, True)))
    found = matrix.matmul(value, form="tiled")
    torch.testing.assert_close(found, matrix.matmul(value, form="dense"), rtol=0, atol=1e-14)


# Positions on grids, by loops


def pairs_of(grid):
    places = [
        [s + t * q for s, t, q in zip(grid.start, grid.stride, at, strict=True)]
        for at in itertools.product(*map(range, grid.queries))
    ]
    keys = list(itertools.product(*map(range, grid.size)))
    for i, j in itertools.product(range(len(places)), range(len(keys))):
        yield i, j, [b - a for a, b in zip(places[i], keys[j], strict=True)]


GRID = Grid((3, 4), (2, 3), (1, 2), (0, -1))


def bias(part):
    tokens = torch.zeros(2, GRID.rows, 1).double(), torch.zeros(2, GRID.columns, 1).double()
    i, j = torch.arange(GRID.rows), torch.arange(GRID.columns)
    return part.on_score(*tokens, i, j).expand(2, -1, -1)


def test_gaussian_is_the_square_of_a_distance():
    torch.manual_seed(1)
    centre, numbers = torch.randn(2, 2).double(), torch.randn(2).double()
    matrices = torch.randn(2, 2, 2).double()
    round_ones, any_shape = (bias(Gaussian(centre, s, GRID)) for s in (numbers, matrices))
    for h, (i, j, d) in itertools.product(range(2), pairs_of(GRID)):
        away = torch.tensor(d) - centre[h]
        wanted = -(numbers[h] ** 2 * (away[0] ** 2 + away[1] ** 2))
        assert abs(round_ones[h, i, j] - wanted) <= 1e-13 * (1 + abs(wanted))
        wanted = -((matrices[h] @ away) ** 2).sum()
        assert abs(any_shape[h, i, j] - wanted) <= 1e-13 * (1 + abs(wanted))


def test_field_reads_its_table():
    torch.manual_seed(2)
    table = torch.randn(2, 2, 3).double()
    found = bias(Field(table, GRID, first=(-1, -2), dilation=(1, 2)))
    for h, (i, j, (a, b)) in itertools.product(range(2), pairs_of(GRID)):
        inside = (a, b) in itertools.product((-1, 0), (-2, 0, 2))
        wanted = table[h, a + 1, b // 2 + 1] if inside else float("-inf")
        assert found[h, i, j] == wanted


@pytest.mark.parametrize("alpha", [4.0, 60.0])
def test_quadratic_encoding_is_the_gaussian_up_to_a_constant_of_the_row(alpha):
    """v . r, v = -alpha (1, -2 c1, -2 c2), r = (|d|^2, d1, d2), as in theorem 1."""
    centre = torch.tensor([[1.0, -1.0], [0.0, 2.0]]).double()
    sharpness = torch.full((2,), alpha**0.5, dtype=torch.float64)
    found = bias(Gaussian(centre, sharpness, GRID))
    for h, (i, j, (a, b)) in itertools.product(range(2), pairs_of(GRID)):
        v = -alpha * torch.tensor([1.0, -2 * centre[h, 0], -2 * centre[h, 1]]).double()
        r = torch.tensor([a**2 + b**2, a, b]).double()
        constant = -alpha * (centre[h] ** 2).sum()
        assert abs(v @ r + constant - found[h, i, j]) <= 1e-13 * alpha * 100


def test_a_field_as_wide_as_the_grid_is_a_free_bias_of_every_displacement():
    table = torch.randn(1, 5, 7)
    field = Field(table, Grid((3, 4)), first=(-2, -3))
    tokens = torch.zeros(1, 12, 0)
    found = attention(tokens, tokens, score=PositionOnly(), position=field).logits()
    assert torch.isfinite(found).all()
    assert found.unique().numel() == table.numel()


@pytest.mark.parametrize(
    ("conv", "size", "patch"),
    [
        (torch.nn.Conv1d, (6,), (3,)),
        (torch.nn.Conv2d, (4, 6), (2, 3)),
        (torch.nn.Conv3d, (2, 4, 6), (1, 2, 3)),
    ],
)
@pytest.mark.parametrize("batch", [(), (2,), (0,)])
def test_patches_are_what_a_convolution_with_their_stride_reads(conv, size, patch, batch):
    torch.manual_seed(0)
    layer, image = conv(3, 5, patch, stride=patch).double(), torch.randn(*batch, 3, *size).double()
    tokens, grid = to_patches(image, patch)
    embedded = tokens @ layer.weight.flatten(1).mT + layer.bias
    wanted = layer(image)
    torch.testing.assert_close(embedded.mT, wanted.flatten(-grid.axes), rtol=0, atol=1e-14)
    assert grid.size == tuple(wanted.shape[-grid.axes :])
    assert torch.equal(from_patches(tokens, grid, patch), image)


TOKENS = torch.zeros(2, 12, 1)
ERRORS = {
    "moves": (lambda: Neighborhood((4, 8), 3, 2), ShapeError, ["6 tokens", "has 4", "'cut'"]),
    "axes": (lambda: Neighborhood((4, 8), (3, 3, 3)), ShapeError, ["3 numbers", "or 2"]),
    "causal": (lambda: Neighborhood((4, 8), 3, 1, [True]), ShapeError, ["2 of"]),
    "causal number": (lambda: Neighborhood(5, 3, causal=1), ShapeError, ["is 1;", "True or False"]),
    "causal numbers": (
        lambda: Neighborhood((4, 8), 3, causal=(True, 0)),
        ShapeError,
        ["(True, 0)", "2 of"],
    ),
    "border": (lambda: Neighborhood(4, 3, border="wrap"), ValueError, ["'shift'", "'wrap'"]),
    "size": (
        lambda: attention(TOKENS, TOKENS, mask=Neighborhood((3, 5), 3)),
        ShapeError,
        ["15 keys", "12 rows"],
    ),
    "grid": (lambda: Grid((3, 4), stride=0), ValueError, ["at least 1"]),
    "no grid": (lambda: Shift(torch.zeros(1, 2).long(), (3, 4)), DtypeError, ["Grid"]),
    "offsets": (lambda: Shift(torch.zeros(1, 2), Grid((3, 4))), DtypeError, ["integers"]),
    "offset axes": (lambda: Shift(torch.zeros(1, 3).long(), Grid((3, 4))), ShapeError, ["2 axes"]),
    "padding": (lambda: Shift(torch.zeros(1, 1).long(), Grid(3), "same"), ValueError, ["reflect"]),
    "sharpness": (
        lambda: Gaussian(torch.zeros(2, 2), torch.zeros(2, 3, 3), Grid((3, 4))),
        ShapeError,
        ["(2, 3, 3)", "[heads, 2, 2]"],
    ),
    "heads": (
        lambda: attention(TOKENS, TOKENS, position=Gaussian.of(torch.zeros(3, 2), Grid((3, 4)))),
        ShapeError,
        ["centre", "(3,)", "(2,)"],
    ),
    "continued": (
        lambda: Field(torch.zeros(2, 3), Grid(12)).at(4),
        ShapeError,
        ["queries from 4 on", "Grid(size, queries"],
    ),
    "patches": (lambda: to_patches(torch.zeros(3, 4, 5), (2, 2)), ShapeError, ["(4, 5)"]),
    "patch axes": (lambda: to_patches(torch.zeros(3, 4, 4), 2), ShapeError, ["as (2, 2)"]),
    "no patches": (
        lambda: from_patches(torch.zeros(4, 6), Grid((2, 2)), 2),
        ShapeError,
        ["(4, 6)", "multiple of 4"],
    ),
    "tokens": (
        lambda: attention(TOKENS, TOKENS, position=Field(torch.zeros(2, 3), Grid(9))),
        ShapeError,
        ["9 keys", "12 columns"],
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_say_what_would_work(name):
    call, kind, words = ERRORS[name]
    with pytest.raises(kind) as raised:
        call()
    assert all(word in str(raised.value) for word in words), raised.value


@pytest.mark.parametrize("shape", [(2, 16, 0), (0, 2, 16, 3)])
def test_values_without_numbers(shape):
    query = torch.ones(2, 16, 8)
    spot = Gaussian(torch.ones(2, 2), torch.ones(2), Grid((4, 4)))
    near = Neighborhood((4, 4), 3, border="cut")
    A = attention(query, query, score=PositionOnly(), position=spot, mask=near)
    for matrix in (A, A.mT):
        found = matrix.matmul(torch.zeros(shape), form="convolutional")
        assert found.shape == matrix.matmul(torch.zeros(shape), form="dense").shape
