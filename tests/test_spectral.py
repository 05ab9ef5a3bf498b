"""Long rows by position alone go through Fourier transforms, by name, and never by default."""

import math

import laws
import pytest
import torch
from laws import Draw

from regard import Alibi, Causal, PositionOnly, Window, attention
from regard.form import convolutional, spectral
from regard.grid import Grid
from regard.position import T5, Gaussian, Kerple

LONG = {
    "alibi, causal": (Grid(61), lambda d, g: Alibi(d.positive(2)), Causal()),
    "alibi, not causal": (Grid(61), lambda d, g: Alibi(d.positive(2), offset=3), None),
    "few see": (Grid(50, 33), lambda d, g: T5(d.normal(2, 8), max_distance=9), Causal(7)),
    "one side": (Grid(61), lambda d, g: Kerple(d.positive(2), d.positive(2)), Window(None, 4)),
    "image": (Grid((7, 9)), lambda d, g: Gaussian(d.normal(2, 2), d.positive(2), g), None),
    "strided image": (
        Grid((7, 9), (3, 4), (3, 2), (1, -1)),
        lambda d, g: Gaussian(d.normal(2, 2), d.positive(2, 2, 2), g),
        None,
    ),
    "volume": (Grid((3, 4, 5)), lambda d, g: Gaussian(d.normal(2, 3), d.positive(2), g), None),
    "no position": (Grid(20), lambda d, g: None, None),
}


def build_long(name, dtype, seed=2):
    grid, part, mask = LONG[name]
    draw = Draw(seed, dtype)
    query, key = draw.normal(1, 2, grid.rows, 1), draw.normal(2, 1, grid.columns, 1)
    more = {"score": PositionOnly(), "position": part(draw, grid), "mask": mask}
    return attention(query, key, **more), draw.normal(2, 1, grid.columns, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", LONG)
def test_long_rows_err_at_most_twice_as_much_as_dense(name, dtype, monkeypatch):
    monkeypatch.setattr(spectral, "LEAST", 1)
    exact, low = build_long(name, torch.float64), build_long(name, dtype)
    for high, rounded in zip(laws.inputs(*exact), laws.inputs(*low), strict=True):
        high.data.copy_(rounded)
    laws.assert_within_dense(exact, low, "convolutional", dtype)
    x = Draw(5, dtype).normal(2, 2, low[0].shape[-2], 2)
    reference = exact[0].mT.matmul(x.double(), form="dense").detach()
    form, dense = (low[0].mT.matmul(x, form=f).detach() for f in ("convolutional", "dense"))
    scale = torch.finfo(dtype).eps * float(reference.norm())
    error, allowed = (float((y - reference).norm()) / scale for y in (form, dense))
    assert error <= 2 * allowed + 1


def test_long_rows_run_by_name_and_cost_no_matrix():
    """16 384 keys: transforms of 2^15 numbers, where a matrix would have 2^28."""
    tokens, value = torch.zeros(2, 2**14, 1), torch.ones(2, 2**14, 2)
    slopes = torch.tensor([0.5, 0.01])
    matrix = attention(tokens, tokens, score=PositionOnly(), position=Alibi(slopes), mask=Causal())
    assert "Fourier" in convolutional.kernel(matrix)[0]
    assert (matrix.matmul(value, form="convolutional") - 1).abs().max() < 1e-5
    weights = matrix[:, 5000, 4990:5001]
    steps = torch.zeros(2, 2**14, 1)
    steps[:, 4990:5001, 0] = torch.arange(11.0)
    found = matrix.matmul(steps, form="convolutional")[:, 5000, 0]
    torch.testing.assert_close(found, weights @ torch.arange(11.0))


@pytest.mark.parametrize("big", [1e14, 1e30])
@pytest.mark.parametrize("name", ["alibi, causal", "few see", "one side"])
def test_huge_values_stay_out_of_rows_that_do_not_see_them(name, big, monkeypatch):
    """By default; asked for by name, a transform lets their rounding into every row."""
    monkeypatch.setattr(spectral, "LEAST", 1)
    matrix, value = build_long(name, torch.float32)
    assert convolutional.needs(matrix) is None
    assert not convolutional.pays(matrix)
    value = value.detach()
    huge = value.clone()
    huge[..., -1, :] = big
    blind = [i for i in range(matrix.shape[-2]) if matrix.logits(i, -1).isinf().all()]
    assert blind
    wanted = matrix.matmul(value, form="dense")[..., blind, :]
    found = (matrix @ huge)[..., blind, :]
    assert (found - wanted).abs().max() < 1e-6
    leaked = (matrix.matmul(huge, form="convolutional")[..., blind, :] - wanted).abs().max()
    assert 1e-3 < leaked <= torch.finfo(torch.float32).eps * big


@pytest.mark.parametrize(
    ("position", "mask"),
    [
        (Gaussian.of(torch.tensor([[0.0, -3.0]]), Grid((8, 8)), alpha=46.0), None),
        (Alibi(torch.tensor([0.5])), Causal(offset=-3)),  # its first rows see nothing
    ],
)
def test_long_rows_that_a_transform_would_lose_are_refused(position, mask, monkeypatch):
    monkeypatch.setattr(spectral, "LEAST", 1)
    tokens = torch.zeros(1, 64, 1)
    matrix = attention(tokens, tokens, score=PositionOnly(), position=position, mask=mask)
    assert "some row sees next to nothing" in convolutional.needs(matrix)
    assert matrix.explain().form != "convolutional"


@pytest.mark.parametrize("name", [name for name in LONG if name != "no position"])
def test_flops_of_long_rows_are_those_of_their_transforms(name, monkeypatch):
    monkeypatch.setattr(spectral, "LEAST", 1)
    grid, part, mask = LONG[name]
    draw, counted = Draw(3, torch.float32), []
    tokens = draw.normal(2, grid.rows, 1), draw.normal(2, grid.columns, 1)
    matrix = attention(*tokens, score=PositionOnly(), position=part(draw, grid), mask=mask)
    value = draw.normal(2, grid.columns, 3).detach()

    def watched(transform, products):
        def run(x, s, dim):
            size, count = math.prod(s), x[(..., *len(dim) * (0,))].numel()
            counted.append(size * count * (2.5 * math.log2(size) + 3 * products))
            return transform(x, s=s, dim=dim)

        return run

    # What comes back is a product of two spectra.
    monkeypatch.setattr(torch.fft, "rfftn", watched(torch.fft.rfftn, 0))
    monkeypatch.setattr(torch.fft, "irfftn", watched(torch.fft.irfftn, 1))
    convolutional.product(matrix, value)
    assert convolutional.flops(matrix, 3) == int(sum(counted))
