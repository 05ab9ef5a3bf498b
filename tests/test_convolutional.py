"""The form `convolutional` gives the numbers of `dense`, and says what it cannot compute."""

import pickle
from dataclasses import dataclass

import laws
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import NORMALIZERS, Draw, Sizes
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from regard import (
    Alibi,
    Bias,
    Causal,
    Dot,
    Dropout,
    FormError,
    PositionOnly,
    ShapeError,
    Sigmoid,
    Window,
    attention,
)
from regard.convert import from_conv
from regard.form import convolutional, filters, fused, split, support
from regard.grid import Grid
from regard.neighborhood import Neighborhood
from regard.position import T5, Field, Gaussian, Kerple, Relative, Shift

EPS = torch.finfo(torch.float64).eps
SMOOTH = [name for name in NORMALIZERS if name != "row sum"]  # whose sum may be near zero


@dataclass(frozen=True)
class Where:
    """A grid with heads on it."""

    grid: Grid
    heads: int = 2

    @property
    def axes(self):
        return self.grid.axes


def square(where):
    """Whether queries and keys are the same, as under Neighborhood."""
    return where.grid == Grid(where.grid.size) and where.grid.rows > 0


def offsets(draw, where, reach):
    return draw.integers(2 * reach + 1, where.heads, where.axes) - reach


def spot(draw, where):
    heads, axes = where.heads, where.axes
    return Gaussian(draw.normal(heads, axes), draw.positive(heads, axes, axes), where.grid)


def field(draw, where, **more):
    taps = (3, 2, 2)[: where.axes]
    return Field(draw.normal(where.heads, *taps), where.grid, **more)


def near(where, **more):
    return Neighborhood(where.grid.size, [min(3, n) for n in where.grid.size], **more)


# From a draw and where to position and mask; None where the grid is not of that kind.
PARTS = {
    "shift, zeros": lambda d, w: (Shift(offsets(d, w, 3), w.grid), None),
    "shift, replicate": lambda d, w: (Shift(offsets(d, w, 3), w.grid, "replicate"), None),
    "shift, circular": lambda d, w: (Shift(offsets(d, w, 3), w.grid, "circular"), None),
    "shift, one for all": lambda d, w: (Shift(offsets(d, w, 1)[:1], w.grid, "reflect"), None),
    "field": lambda d, w: (field(d, w), None),
    "field, dilated": lambda d, w: (field(d, w, dilation=2, first=-1), None),
    "field + gaussian": lambda d, w: (field(d, w) + spot(d, w), None),
    "two fields": lambda d, w: (field(d, w) + field(d, w, first=0), None),
    "box": lambda d, w: (None, near(w)) if square(w) else None,
    "gaussian, shifted box": lambda d, w: (spot(d, w), near(w)) if square(w) else None,
    "gaussian, cut box": lambda d, w: (spot(d, w), near(w, border="cut")) if square(w) else None,
    "field, causal box": lambda d, w: (
        (field(d, w), near(w, causal=[True] + [False] * (w.axes - 1))) if square(w) else None
    ),
    "gaussian, dilated box": lambda d, w: (
        (spot(d, w), near(w, dilation=2, border="cut")) if square(w) else None
    ),
    "window": lambda d, w: (
        (Alibi(d.positive(w.heads), offset=1), Window(2, 1, offset=1)) if lined(w) else None
    ),
    "causal window": lambda d, w: (
        (Kerple(d.positive(w.heads), d.positive(w.heads)), Causal(1) & Window(4, None))
        if lined(w)
        else None
    ),
    "t5 + relative": lambda d, w: (
        (T5(d.normal(w.heads, 8)) + Relative(d.normal(1, 3), left=1), Window(3, 3))
        if lined(w)
        else None
    ),
}


def lined(where):
    """Whether a window's n and m are those of this grid."""
    return where.axes == 1 and where.grid.stride == (1,)


GRIDS = {
    "line": Grid(9),
    "short line": Grid(2),
    "nothing": Grid(0),
    "no queries": Grid(5, 0),
    "rectangle": Grid(12, 7),
    "stride": Grid(11, 5, 2, -1),
    "image": Grid((5, 7)),
    "thin image": Grid((1, 6)),
    "strided image": Grid((6, 7), (3, 2), (2, 3), (-1, 1)),
    "outside": Grid((3, 4), (2, 2), 1, (6, -9)),
    "volume": Grid((3, 4, 3)),
}
PAIRS = [(p, g) for p in PARTS for g in GRIDS if PARTS[p](Draw(0, torch.float64), Where(GRIDS[g]))]


def build(parts, grid, normalizer, seed, dtype=torch.float64):
    where, draw = Where(GRIDS[grid]), Draw(seed, dtype)
    position, mask = PARTS[parts](draw, where)
    n, m = where.grid.rows, where.grid.columns
    s = Sizes(2, where.heads, 1 + seed % 2, n, m, 3, 2)
    matrix = attention(
        draw.normal(1 + seed // 2 % 2, s.heads, n, 3),
        draw.normal(1, s.key_heads, m, 3),
        score=PositionOnly(),
        position=position,
        mask=mask,
        normalizer=NORMALIZERS[normalizer](draw, s),
    )
    return matrix, draw.normal(2, s.key_heads, m, 1 + seed % 3)


def assert_rounding(got, wanted, factor=1.0):
    for name, reference in wanted.items():
        size = float(reference.detach().abs().max()) if reference.numel() else 0
        torch.testing.assert_close(
            got[name], reference, rtol=0, atol=256 * EPS * factor * max(1.0, size), msg=str(name)
        )


@pytest.mark.parametrize(("parts", "grid"), PAIRS)
@given(
    normalizer=st.sampled_from([n for n in NORMALIZERS if n != "row sum"]), seed=st.integers(0, 99)
)
@settings(max_examples=2)
def test_product_equals_dense(parts, grid, normalizer, seed):
    matrix, value = build(parts, grid, normalizer, seed)
    assert convolutional.needs(matrix) is None
    got, wanted = (laws.results(matrix, value, form) for form in ("convolutional", "dense"))
    assert_rounding(got, wanted)


def transposed(matrix, x, form):
    """The transpose times x, and its gradients, under a linear loss."""
    output = matrix.mT.matmul(x, form=form)
    inputs = [t for t in (x, *matrix.rule.tensors()) if t.requires_grad]
    loss = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).reshape(output.shape)
    gradients = torch.autograd.grad(output, inputs, loss, allow_unused=True)
    pairs = zip(gradients, inputs, strict=True)
    found = [output, *(torch.zeros_like(t) if g is None else g for g, t in pairs)]
    return dict(enumerate(found))


@pytest.mark.parametrize(("parts", "grid"), PAIRS)
def test_transpose_equals_dense(parts, grid):
    matrix, _ = build(parts, grid, "sinks", seed=5)
    x = Draw(1, torch.float64).normal(2, 2, matrix.shape[-2], 3)
    assert_rounding(transposed(matrix, x, "convolutional"), transposed(matrix, x, "dense"))


LINE, IMAGE = torch.zeros(1, 6, 2), torch.zeros(1, 20, 2)
FIELD = Field(torch.zeros(1, 3), Grid(6))
REFUSED = {
    "content": (LINE, {"score": Dot(), "position": FIELD}, "compares vectors"),
    "dropout": (LINE, {"position": FIELD, "dropout": Dropout(0.1)}, "draws for single pairs"),
    "bias": (LINE, {"position": FIELD + Bias(torch.zeros(6, 6))}, "by displacement"),
    "masked shift": (
        LINE,
        {"position": Shift(torch.zeros(1, 1).long(), Grid(6)), "mask": Causal()},
        "Shift to be alone",
    ),
    "long, but few": (LINE, {"position": Alibi.of(1)}, "rows of 4096 keys or more"),
    "long, float64": (
        LINE.double(),
        {"position": Alibi.of(1), "mask": Causal()},
        "rounding would show in torch.float64",
    ),
    "long, sigmoid": (LINE, {"position": Alibi.of(1), "normalizer": Sigmoid()}, "under Softmax"),
    "mask": (LINE, {"position": FIELD, "mask": ~Causal()}, "mask by displacement"),
    "grids": (
        IMAGE,
        {"position": Field(torch.zeros(1, 1, 1), Grid((5, 4))), "mask": Neighborhood((4, 5), 3)},
        "on one grid",
    ),
    "line on an image": (
        IMAGE,
        {"position": Alibi.of(1), "mask": Neighborhood((4, 5), 3)},
        "is for lines",
    ),
    "axes": (LINE, {"mask": Neighborhood((1, 1, 2, 3), 1)}, "1, 2 or 3 axes"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_convolution_is_refused_and_runs_elsewhere(name):
    tokens, parts, words = REFUSED[name]
    matrix = attention(tokens, tokens, **{"score": PositionOnly(), **parts})
    with pytest.raises(FormError, match=words):
        matrix.matmul(tokens, form="convolutional")
    assert words in matrix.explain().not_chosen["convolutional"]


def test_it_is_chosen_and_says_what_it_runs():
    tokens, grid = torch.zeros(2, 48, 5), Grid((6, 8))
    near, spot = Neighborhood((6, 8), 3), Gaussian(torch.zeros(2, 2), torch.ones(2), grid)
    matrix = attention(tokens, tokens, score=PositionOnly(), position=spot, mask=near)
    found = matrix.explain()
    assert found.form == "convolutional"
    assert "9 taps, and 24 rows at borders" in found.kernel
    assert found.pairs == 2 * 48 * 9
    shift = Shift(torch.tensor([[0, 1], [1, 0]]), grid)
    matrix = attention(tokens, tokens, score=PositionOnly(), position=shift)
    assert "a read of one key" in matrix.explain().kernel


@pytest.mark.parametrize(("size", "taps", "width"), [((6, 8), 3, 5), ((4, 4), 3, 2), (9, 4, 3)])
def test_flops_of_a_field_are_those_that_torch_counts(size, taps, width):
    """Few rows see all taps; the others are as many short rows, or a few whole ones."""
    grid, draw = Grid(size), Draw(0, torch.float32)
    tokens, value = draw.normal(2, grid.rows, 1), draw.normal(2, grid.columns, width)
    table = draw.normal(2, *grid.axes * (taps,))
    matrix = attention(tokens, tokens, score=PositionOnly(), position=Field(table, grid))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        matrix.matmul(value, form="convolutional")
    found = matrix.explain(value)
    assert found.form == "convolutional"
    assert found.flops == counter.get_total_flops() > 0
    assert found.flops < 2 * 2 * grid.rows * grid.columns * width  # what a matrix would take
    shift = Shift(torch.ones(2, grid.axes).long(), grid)
    matrix = attention(tokens, tokens, score=PositionOnly(), position=shift)
    assert matrix.explain(value).flops == 2 * grid.rows * width  # each row reads one key


def test_it_is_not_chosen_where_compiled_tiles_know_all_parts(monkeypatch):
    tokens = torch.zeros(2, 48, 5)
    matrix = attention(tokens, tokens, score=PositionOnly(), mask=Neighborhood((6, 8), 3))
    monkeypatch.setattr(fused, "needs", lambda matrix: None)
    assert not convolutional.pays(matrix)
    assert matrix.explain().form == "fused"
    assert "less exact" in matrix.explain().not_chosen["convolutional"]
    monkeypatch.setattr(fused, "needs", lambda matrix: "has no kernels here.")
    assert convolutional.pays(matrix)
    assert matrix.explain().form == "convolutional"


LEADS = [(), (1,), (3,), (2, 1), (2, 3), (1, 3)]


@pytest.mark.parametrize("lead", LEADS, ids=str)
@pytest.mark.parametrize("kind", ["shift", "field"])
def test_every_mix_of_batch_and_head_axes(kind, lead):
    """Of offsets or tables, of queries, and of values; values of one batch entry and of none."""
    grid, draw, tried = Grid((4, 5)), Draw(0, torch.float64), 0
    if kind == "shift":
        position = Shift(draw.integers(5, *lead, 2) - 2, grid)
    else:
        position = Field(draw.normal(*lead, 3, 3), grid)
    for of_query in LEADS:
        query, key = draw.normal(*of_query, 20, 1), draw.normal(20, 1)
        try:
            matrix = attention(query, key, score=PositionOnly(), position=position)
        except ShapeError:
            continue
        for of_value in [*LEADS, (3, 1), (0, 1)]:
            value = draw.normal(*of_value, 20, 2)
            try:
                wanted = laws.results(matrix, value, "dense")
            except ShapeError:
                continue
            assert_rounding(laws.results(matrix, value, "convolutional"), wanted)
            x = draw.normal(*wanted["output"].shape)
            found, right = (matrix.mT.matmul(x, form=f) for f in ("convolutional", "dense"))
            assert_rounding({"": found}, {"": right})
            assert found.shape == right.shape
            tried += 1
    assert tried >= 6


@pytest.mark.parametrize("parts", ["field + gaussian", "gaussian, cut box", "causal window"])
def test_border_rows_some_at_a_time_equal_dense(parts, monkeypatch):
    monkeypatch.setattr(split, "BLOCK", 1000)
    grid = "line" if parts == "causal window" else "image"
    matrix, value = build(parts, grid, "softmax", 4)
    got, wanted = (laws.results(matrix, value, form) for form in ("convolutional", "dense"))
    assert_rounding(got, wanted)
    x = Draw(1, torch.float64).normal(2, 2, matrix.shape[-2], 3)
    found, right = (matrix.mT.matmul(x, form=form) for form in ("convolutional", "dense"))
    assert_rounding({"": found}, {"": right})


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that is made."""

    found = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor):
            self.found = max(self.found, made.numel() * made.element_size())
        return made


def test_wide_windows_cost_no_matrix_and_explain_says_what_they_cost():
    """Half of 4096 keys each: 4 million taps of border rows, 8 million weights."""
    n, e = 4096, 2
    tokens, value = torch.zeros(2, n, 1), torch.ones(2, n, e)
    slopes, mask = torch.tensor([0.5, 0.01]), Window(n // 2 - 1, 0)
    matrix = attention(tokens, tokens, score=PositionOnly(), position=Alibi(slopes), mask=mask)
    with Largest() as largest:
        output = matrix.matmul(value, form="convolutional")
    assert (output - 1).abs().max() < 1e-5
    said = convolutional.memory(matrix, value)
    assert largest.found <= said <= split.BLOCK + 4 * 4 * 2 * n * e
    layer = from_conv(torch.nn.Conv2d(1, 1, 3), heads="min")  # its keys have no width
    assert layer.matrix(9).explain(torch.zeros(3, 1, 81, 8)).memory >= 4 * 3 * 8 * 81


def test_support_is_looked_for_once(monkeypatch):
    calls, find = [], support._find
    monkeypatch.setattr(support, "_find", lambda matrix: calls.append(1) or find(matrix))
    matrix, value = build("field + gaussian", "image", "softmax", 1)
    wanted = matrix @ value
    assert len(calls) == 1
    assert torch.equal(pickle.loads(pickle.dumps(matrix.detach())) @ value, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("parts", ["shift, replicate", "field + gaussian", "gaussian, shifted box"])
def test_low_precision_error_is_at_most_twice_that_of_dense(parts, dtype):
    """Against float64 dense: error(form) <= 2 error(dense in that dtype) + one rounding."""
    exact, low = (build(parts, "image", "softmax", 3, kind) for kind in (torch.float64, dtype))
    for high, rounded in zip(laws.inputs(*exact), laws.inputs(*low), strict=True):
        high.data.copy_(rounded)
    laws.assert_within_dense(exact, low, "convolutional", dtype)


def test_autocast_changes_no_sum():
    matrix, value = build("field + gaussian", "image", "softmax", 1, torch.float32)
    wanted = matrix @ value, matrix.mT @ (matrix @ value)
    with torch.autocast("cpu", torch.bfloat16):
        found = matrix @ value, matrix.mT @ (matrix @ value)
    assert all(map(torch.equal, found, wanted))


def test_gradients_of_gradients():
    """Unlike tiles, a convolution is differentiated as often as one likes."""
    matrix, value = build("gaussian, cut box", "image", "softmax", 0)
    tensors = [value, *matrix.rule.tensors()]

    def run(value, *own):
        given = [matrix.query, matrix.key, value, *own]
        return laws.on(matrix, given, "convolutional")[..., :6, :]

    assert torch.autograd.gradgradcheck(run, tensors)


def test_a_large_field_stores_nothing_of_the_size_of_the_matrix(monkeypatch):
    """128 x 128 tokens: a dense matrix would be 2^28 numbers a head."""
    largest = 0
    whole = torch.nn.functional.conv2d

    def watched(image, *rest, **more):
        nonlocal largest
        largest = max(largest, image.numel())
        return whole(image, *rest, **more)

    monkeypatch.setattr(filters, "CONVOLUTIONS", (None, watched, None))
    grid = Grid((128, 128))
    tokens = torch.zeros(2, grid.rows, 0)
    value = torch.ones(1, grid.rows, 3)
    spot = Field(torch.randn(2, 7, 7), grid)
    matrix = attention(tokens, tokens, score=PositionOnly(), position=spot)
    assert ((matrix @ value) - 1).abs().max() < 1e-5  # rows sum to 1
    assert 0 < largest <= 3 * grid.rows
