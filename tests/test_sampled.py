"""Maps from a sample of queries: unbiased, with the error that they say, exact at the end."""

import math

import pytest
import torch

from regard.look.record import Captured
from regard.look.sampled import Estimate, Region, typical_error
from regard.look.stream import BLOCKS, Stream, about


def call(n=192, m=192, causal=True, mask=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    query, key = (torch.randn(1, 2, length, 8, generator=generator) for length in (n, m))
    return Captured("layer", "arrays", 2 * query, key, None, mask, scale=0.5, causal=causal)


def blocks(weights, visible, size):
    """Mean of the visible cells of each block, by hand."""
    n, m = weights.shape
    found = torch.full((math.ceil(n / size), math.ceil(m / size)), torch.nan, dtype=torch.float64)
    for r in range(found.shape[0]):
        for c in range(found.shape[1]):
            place = slice(r * size, (r + 1) * size), slice(c * size, (c + 1) * size)
            cells = weights[place][visible[place]]
            if len(cells):
                found[r, c] = cells.double().mean()
    return found


@pytest.mark.parametrize("size", [1, 5, 16])
@pytest.mark.parametrize("kind", ["causal", "full", "mask", "both"])
def test_all_queries_are_exact(kind, size):
    n, m = 61, 61 if kind in ("causal", "both") else 47
    mask = None
    if kind in ("mask", "both"):
        mask = torch.rand(1, 2, n, m, generator=torch.Generator().manual_seed(3)) < 0.5
    one = call(n, m, kind in ("causal", "both"), mask)
    region = Region(0, 1, 7, 3, 50, 40, size)
    estimate = Estimate(one, region)
    while not estimate.is_exact:
        estimate.advance(7)
    visible = torch.ones(n, m, dtype=torch.bool) if mask is None else mask[0, 1]
    if one.causal:
        visible = visible & (torch.arange(m) <= torch.arange(n)[:, None])
    inside = slice(7, 57), slice(3, 43)
    weights = one.matrix.dense()[0, 1]
    torch.testing.assert_close(
        estimate.mean(), blocks(weights[inside], visible[inside], size), equal_nan=True,
        rtol=1e-5, atol=1e-9,
    )  # fmt: skip
    counts = visible.sum(-1).double()[inside[0]]
    torch.testing.assert_close(
        estimate.keys, torch.stack([part.mean() for part in counts.split(size)])
    )
    assert bool((estimate.error()[~estimate.mean().isnan()] == 0).all())
    assert typical_error(estimate) == 0.0


def test_estimates_are_unbiased_and_their_errors_true():
    """z = (estimate - exact) / (standard error of the population) has mean 0 and variance 1.

    Over 300 draws the mean of z of one block is 0 within 4 / sqrt(300), and the mean of z^2 over
    blocks of a row, which share their draws, is 1 within a few times sqrt(2 / (300 x rows)).
    """
    one, size, drawn, draws = call(), 16, 4, 300
    region = Region(0, 0, 0, 0, 192, 192, size)
    weights = one.matrix.dense()[0, 0].double()
    seen = torch.tril(torch.ones(192, 192, dtype=torch.bool))
    exact = blocks(weights, seen, size)
    sums = weights.reshape(12, size, 12, size).sum(-1)  # [row blocks, rows, column blocks]
    cells = seen.reshape(12, size, 12, size).sum((1, 3))
    true = size / cells * (sums.var(1) / drawn * (1 - drawn / size)).sqrt()
    there = cells > 0
    there[0, 0] = False  # causal rows that see this block alone: each gives it 1, no error at all
    z, ratio = [], []
    for seed in range(draws):
        estimate = Estimate(one, region, seed=seed)
        estimate.advance(drawn * 12)
        z.append(((estimate.mean() - exact) / true)[there])
        ratio.append((estimate.error() / true)[there].square())
    z, ratio = torch.stack(z), torch.stack(ratio)
    assert float(z.mean(0).abs().max()) < 4.5 / math.sqrt(draws)  # 77 blocks
    # Heavy tails make z^2 vary more than a normal's 2; 12 independent rows of blocks remain.
    assert abs(float(z.square().mean()) - 1) < 0.1
    assert abs(float(ratio.mean()) - 1) < 0.1


def test_every_block_has_two_queries_first_the_low_last_one_too():
    for rows in (192, 180, 178, 177):
        estimate = Estimate(call(causal=False), Region(0, 0, 0, 0, rows, 192, 16))
        estimate.advance(estimate.first)
        assert bool(estimate.mean().isfinite().all())
        assert bool(estimate.error().isfinite().all())
        assert estimate.taken == 24
        assert math.isfinite(typical_error(estimate))


def test_the_error_shrinks_and_is_finite_after_the_first_round():
    estimate = Estimate(call(), Region(0, 0, 0, 0, 192, 192, 16))
    estimate.advance(12)
    assert math.isinf(typical_error(estimate))  # one query of a block has no variance
    errors = []
    for more in (12, 72, 60):
        estimate.advance(more)
        errors.append(typical_error(estimate))
    assert math.inf > errors[0] > errors[1] > errors[2] > 0
    assert estimate.taken == 156


def test_a_stream_answers_with_news_and_refuses_nonsense():
    from regard.errors import ShapeError
    from regard.look.scene import of_arrays

    torch.manual_seed(0)
    scene = of_arrays({"query": torch.randn(2, 700, 8), "key": torch.randn(2, 700, 8)}, causal=True)
    assert about(scene)["layers"][0]["n"] == 700
    stream = Stream(scene)
    try:
        asked = {"layer": "0", "head": "1", "top": "0", "left": "0", "span": "700"}
        seen, told = 0, {}
        while not told.get("exact"):
            told = stream.answer("map", {**asked, "seen": str(seen)})
            assert told["taken"] > seen
            seen = told["taken"]
        assert (told["size"], told["of"], seen) == (math.ceil(700 / BLOCKS), 700, 700)
        matrix = scene.captured[0].matrix
        cell = stream.answer("cell", {"layer": "0", "head": "1", "i": "600", "j": "5"})
        assert cell["weight"] == float(matrix[0, 1, 600, 5])
        assert cell["keys"] == 601
        best = matrix[0, 1, 600].topk(12)
        assert [x["key"] for x in cell["top"]] == best.indices.tolist()
        assert cell["entropy"] == pytest.approx(float(matrix.entropy()[0, 1, 600]), rel=1e-5)
        future = stream.answer("cell", {"layer": "0", "head": "0", "i": "5", "j": "6"})
        assert future["weight"] is None
        assert len(future["top"]) == 6
        assert stream.answer("etc", {}) is None
        for what, given in (
            ("map", {}),
            ("map", {**asked, "seen": "x"}),
            ("map", {**asked, "seen": "0", "top": "700"}),
            ("map", {**asked, "seen": "0", "span": "0"}),
            ("map", {**asked, "seen": "0", "head": "2"}),
            ("cell", {"layer": "4", "head": "0", "i": "0", "j": "0"}),
        ):
            with pytest.raises(ShapeError):
                stream.answer(what, given)
    finally:
        stream.close()
    assert not stream._thread.is_alive()
