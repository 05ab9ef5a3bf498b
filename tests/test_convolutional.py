"""The form `convolutional` gives the numbers of `dense`, and says what it cannot compute."""

from dataclasses import dataclass

import laws
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import NORMALIZERS, Draw, Sizes

from regard import Alibi, Bias, Causal, Dot, Dropout, FormError, PositionOnly, Window, attention
from regard.form import FORMS, convolutional
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
            got[name], reference, rtol=0, atol=256 * EPS * factor * max(1.0, size), msg=name
        )


@pytest.mark.parametrize(("parts", "grid"), PAIRS)
@given(
    normalizer=st.sampled_from([n for n in NORMALIZERS if n != "row sum"]), seed=st.integers(0, 99)
)
@settings(max_examples=4)
def test_product_equals_dense(parts, grid, normalizer, seed):
    matrix, value = build(parts, grid, normalizer, seed)
    assert convolutional.needs(matrix) is None
    got, wanted = (laws.results(matrix, value, form) for form in ("convolutional", "dense"))
    assert_rounding(got, wanted)


@pytest.mark.parametrize(("parts", "grid"), PAIRS)
def test_transpose_equals_dense(parts, grid):
    matrix, value = build(parts, grid, "sinks", seed=5)
    x = Draw(1, torch.float64).normal(2, 2, matrix.shape[-2], 3)
    inputs = [t for t in (x, *matrix.rule.tensors()) if t.requires_grad]
    found = []
    for form in ("convolutional", "dense"):
        output = matrix.mT.matmul(x, form=form)
        loss = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).reshape(output.shape)
        gradients = torch.autograd.grad(output, inputs, loss, allow_unused=True)
        pairs = zip(gradients, inputs, strict=True)
        found.append([output, *(torch.zeros_like(t) if g is None else g for g, t in pairs)])
    for one, other in zip(*found, strict=True):
        assert_rounding({"": one}, {"": other})
