"""Biases that the compiled kernels know by their form: bands, and further channels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import laws
import pytest
import torch
from test_laws import assert_rounding

from regard import (
    Additive,
    Bilinear,
    Causal,
    Cosine,
    Distance,
    Documents,
    Dot,
    FormError,
    PositionOnly,
    ShapeError,
    Softmax,
    Window,
    attention,
)
from regard.form import FORMS
from regard.kernel import extension
from regard.position import Shaw
from regard.position.base import Band, Position

pytestmark = pytest.mark.skipif(
    extension.load() is None, reason="the compiled kernels are not installed"
)


def assert_fused_equals_dense(matrix, value):
    assert FORMS["fused"].needs(matrix) is None
    found = laws.results(matrix, value, "fused")
    assert_rounding(found, laws.results(matrix, value, "dense"), 1)
    with torch.no_grad():  # few rows go another way where nothing is learned
        assert_rounding({"": matrix.matmul(value, form="fused")}, {"": found["output"]}, 1)


# Tiles have 64 rows and 96 keys: tails only, bands narrower and wider than a tile, edges on theirs.
BANDS = {
    "one entry": (130, 100, 1, 0, 0, None),
    "narrow": (130, 200, 9, 4, 3, Causal()),
    "tails only": (70, 300, 5, 2, 1000, None),
    "far before": (70, 300, 5, 2, -1000, None),
    "one pair short of the first": (64, 96, 5, 2, 96, None),
    "one pair short of the last": (64, 96, 5, 2, -64, None),
    "as wide as a tile": (128, 192, 96, 32, 0, None),
    "wider": (70, 400, 300, 150, -20, Window(50, 60)),
    "to the left": (200, 200, 65, 64, 0, Causal()),
    "to the right": (200, 200, 65, 0, 0, None),
    "one row": (1, 300, 33, 32, 299, None),
    "few rows": (3, 300, 33, 20, 200, Causal(290)),
    "pieces": (150, 150, 40, 20, 0, Documents(torch.arange(150) // 7 % 3)),
}


@pytest.mark.parametrize(("n", "m", "width", "left", "offset", "mask"), BANDS.values(), ids=BANDS)
def test_bands_reach_across_tiles(n, m, width, left, offset, mask):
    draw = laws.Draw(1, torch.float64)
    matrix = attention(
        draw.normal(2, 4, n, 8),
        draw.normal(2, 2, m, 8),
        position=Shaw(draw.normal(4, width, 8), left, offset=offset),
        mask=mask,
    )
    assert_fused_equals_dense(matrix, draw.normal(2, 2, m, 8))


@dataclass(frozen=True, eq=False, repr=False)
class Given(Position):
    """A band that does not depend on the query."""

    table: torch.Tensor  # [*batch, heads, n, width]
    left: int
    offset: int

    trailing: ClassVar[dict[str, int]] = {"table": 2}

    def on_score(self, query, key, i, j):
        right = self.table.shape[-1] - 1 - self.left
        entry = (j - (i + self.offset)[:, None]).clamp(-self.left, right) + self.left
        return self.table[..., i[:, None], entry]

    def band(self, query, i):
        return Band(self.left, self.offset, self.table[..., : len(i), :])


TABLES = {
    "of all lanes": lambda draw: draw.normal(70, 9),
    "of heads": lambda draw: draw.normal(1, 4, 70, 9),
    "of batch entries": lambda draw: draw.normal(2, 1, 70, 9),
    "of all rows": lambda draw: draw.normal(4, 1, 9).expand(4, 70, 9),
    "heads inside": lambda draw: draw.normal(2, 70, 4, 9).transpose(1, 2),
    "entries outside": lambda draw: draw.normal(2, 4, 9, 70).mT,
    "a part of": lambda draw: draw.normal(2, 4, 70, 20)[..., 3:12],
    "in half precision": lambda draw: draw.normal(2, 4, 70, 9).half(),
    "in bfloat16": lambda draw: draw.normal(2, 4, 70, 9).bfloat16(),
    "negative": lambda draw: torch._neg_view(draw.normal(2, 4, 70, 9)),
}


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_a_band_may_be_shared_and_lie_anywhere(table, threads):
    draw = laws.Draw(2, torch.float64)
    band = table(draw).detach().requires_grad_()
    exact = band.detach().double().requires_grad_()
    query, key = draw.normal(2, 4, 70, 5), draw.normal(2, 2, 150, 5)
    value = draw.normal(2, 2, 150, 3)
    matrix, reference = (
        attention(query, key, position=Given(one, 4, 30), mask=Causal(60)) for one in (band, exact)
    )
    torch.set_num_threads(threads)
    try:
        got = laws.results(matrix, value, "fused")
    finally:
        torch.set_num_threads(1)
    wanted = laws.results(reference, value, "dense")
    if band.dtype != torch.float64:  # the gradient is rounded once, to the band's dtype
        name, least = "gradient of position.table", torch.finfo(band.dtype)
        found, subnormal = got.pop(name).double(), least.eps * least.tiny
        torch.testing.assert_close(found, wanted.pop(name), rtol=least.eps, atol=subnormal + 1e-12)
    assert_rounding(got, wanted, 1)


@dataclass(frozen=True, eq=False, repr=False)
class Waves(Position):
    """bias_ij = sum_w amplitude_w cos(frequency_w (i - j)), as cos cos + sin sin."""

    amplitude: torch.Tensor  # [*batch, heads, waves]
    frequency: torch.Tensor  # [waves]

    trailing: ClassVar[dict[str, int]] = {"amplitude": 1, "frequency": 1}

    def on_score(self, query, key, i, j):
        waves = self._angles(i[:, None] - j).cos().to(query.dtype)  # [r, c, waves]
        return (waves @ self.amplitude.to(query.dtype)[..., None, :, None]).squeeze(-1)

    def channels(self, query, key, i, j):
        of_rows, of_keys = (
            torch.cat([angles.cos(), angles.sin()], -1) for angles in map(self._angles, (i, j))
        )
        amplitude = self.amplitude.double()
        return of_rows * torch.cat([amplitude, amplitude], -1)[..., None, :], of_keys

    def _angles(self, distance):
        """In float64: of large angles, float32 keeps few digits of a turn."""
        return self.frequency.double() * distance[..., None]


SCORES = {
    "dot": lambda draw: Dot(),
    "scaled": lambda draw: Dot(scale=-0.7),
    "scale by head": lambda draw: Dot(scale=draw.normal(4)),
    "bilinear": lambda draw: Bilinear(draw.normal(4, 5, 5), scale=0.3),
    "cosine": lambda draw: Cosine(scale=draw.normal(2, 4)),
    "position only": lambda draw: PositionOnly(),
}


@pytest.mark.parametrize("n", [1, 3, 70])
@pytest.mark.parametrize("score", SCORES.values(), ids=SCORES)
def test_a_bias_may_be_further_channels(score, n):
    draw = laws.Draw(4, torch.float64)
    waves = Waves(draw.normal(2, 4, 3), draw.normal(3).detach())
    more = Waves(draw.normal(4, 2), draw.normal(2).detach()) + Shaw(draw.normal(4, 9, 5), 4)
    matrix = attention(
        draw.normal(1, 4, n, 5),
        draw.normal(2, 2, 150, 5),
        score=score(draw),
        position=waves + more,
        mask=Causal(60),
        normalizer=Softmax(sink=draw.normal(4)),
    )
    assert_fused_equals_dense(matrix, draw.normal(2, 2, 150, 8))


def test_what_channels_are_made_of_is_learned():
    draw = laws.Draw(5, torch.float64)
    waves = Waves(draw.normal(2, 3), draw.normal(3))
    matrix = attention(draw.normal(2, 9, 5), draw.normal(2, 9, 5), position=waves)
    assert_fused_equals_dense(matrix, draw.normal(2, 9, 8))


@pytest.mark.parametrize("score", [Dot(softcap=3.0), Distance(), Additive(torch.ones(4))], ids=repr)
def test_channels_belong_to_a_product(score):
    x, waves = torch.randn(5, 4), Waves(torch.randn(3), torch.randn(3))
    matrix = attention(x, x, score=score, position=waves)
    with pytest.raises(FormError, match=r"no kernel for the position .* with the score"):
        matrix.matmul(x, form="fused")
    assert matrix.explain().form == "tiled"


@pytest.mark.parametrize(
    ("position", "numbers"),
    [
        (Shaw(torch.randn(31, 4), 15), 2 * 4 * 50 * 31),
        (Waves(torch.randn(4, 3), torch.randn(3)), 2 * 4 * 50 * (4 + 6) + 2 * 60 * (4 + 6)),
    ],
    ids=["band", "channels"],
)
def test_explain_counts_what_a_position_writes(position, numbers):
    query, key = torch.randn(2, 4, 50, 4), torch.randn(2, 1, 60, 4)
    plain, told = (attention(query, key, position=p).explain() for p in (None, position))
    assert told.form == "fused"
    assert told.memory - plain.memory == 4 * numbers


def test_lanes_that_share_the_band_of_one_row_are_added_up():
    draw = laws.Draw(6, torch.float64)
    query, key, value = draw.normal(40, 4, 1, 5), draw.normal(40, 4, 30, 5), draw.normal(4, 30, 3)
    matrix = attention(query, key, position=Given(draw.normal(1, 9), 4, 15))
    torch.set_num_threads(3)
    try:
        got = laws.results(matrix, value, "fused")
    finally:
        torch.set_num_threads(1)
    assert_rounding(got, laws.results(matrix, value, "dense"), 1)


def test_looks_see_a_band():
    draw = laws.Draw(3, torch.float64)
    position = Shaw(draw.normal(2, 31, 4), 20)
    with torch.no_grad():
        matrix = attention(draw.normal(2, 150, 4), draw.normal(2, 150, 4), position=position)
        weights = matrix.dense()
        torch.testing.assert_close(matrix.topk(3).values, weights.topk(3).values)
        torch.testing.assert_close(matrix.entropy(), -torch.xlogy(weights, weights).sum(-1))
        torch.testing.assert_close(matrix.received(), weights.sum(-2))
        torch.testing.assert_close(matrix.logsumexp(), matrix.logits().logsumexp(-1))


def test_two_bands_are_not_known():
    x, position = torch.randn(5, 4), Shaw(torch.randn(3, 4), 1)
    with pytest.raises(FormError, match="adds one band of relative positions at most"):
        attention(x, x, position=position + position).matmul(x, form="fused")
    assert attention(x, x, position=position + position).explain().form == "tiled"


@pytest.mark.parametrize("shape", [(1, 9), (4, 9), (5, 0)])
def test_a_band_must_fit_the_matrix(shape):
    x = torch.randn(2, 5, 4)
    position = Given(torch.randn(shape), 4, 0)
    with pytest.raises(ShapeError, match=r"has a band of shape .* it must be \(2, [05]\) and the"):
        attention(x, x, position=position).matmul(x, form="fused")


def test_a_bias_of_no_known_form_is_not_known():
    class Other(Shaw):
        def band(self, query, i):
            return None

    x = torch.randn(5, 4)
    with pytest.raises(FormError, match="has no kernel for the position Other"):
        attention(x, x, position=Other(torch.randn(3, 4), 1)).matmul(x, form="fused")
