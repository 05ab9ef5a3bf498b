"""Heads that are free to leave their taps: the gate's formula, its limits, and what is measured."""

import math

import pytest
import torch
from torch import nn

from regard import PositionOnly, Softmax, attention
from regard.convert import from_conv
from regard.errors import DtypeError, ShapeError
from regard.grid import Grid
from regard.nn import GatedAttention
from regard.position import Field, Gaussian, Shift
from regard.receptive import receptive_field


def layer_of(gate, alpha=46.0, **more):
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 4, 3, **{"padding": 1, **more}).double()
    return conv, GatedAttention(from_conv(conv, heads="gaussian", alpha=alpha), 5, gate=gate)


X = torch.randn(2, 3, 5, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_forward_is_the_formula():
    conv, layer = layer_of(0.3, alpha=1.5)
    with torch.no_grad():
        layer.gate.copy_(torch.linspace(-2, 2, 9))
    tokens = nn.functional.pad(X, (1, 1, 1, 1)).flatten(-2).mT  # [2, 56, 3]
    own = X.flatten(-2).mT
    gates = 1 / (1 + (-layer.gate).exp())
    wanted = conv.bias.expand(2, 30, 4).clone()
    keys = torch.cartesian_prod(torch.arange(7), torch.arange(8)).double()
    queries = torch.cartesian_prod(torch.arange(5), torch.arange(6)).double() + 1
    for h, (a, b) in enumerate((a, b) for a in (-1, 0, 1) for b in (-1, 0, 1)):
        scores = (own @ layer.query[h]) @ (tokens @ layer.key[h]).mT / math.sqrt(5)
        away = keys - queries[:, None] - torch.tensor([a, b])
        content, position = scores.softmax(-1), (-1.5 * away.square().sum(-1)).softmax(-1)
        mixed = (1 - gates[h]) * content + gates[h] * position
        wanted = wanted + mixed @ tokens @ conv.weight[:, :, a + 1, b + 1].mT
    found = layer(X).flatten(-2).mT
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-13)
    mixture = layer.matrix(X)
    torch.testing.assert_close(mixture.dense()[..., 4:7, :], mixture[..., 4:7, :])
    assert (mixture.dense().sum(-1) - 1).abs().max() < 1e-14


@pytest.mark.parametrize("stride", [1, 2])
def test_an_open_gate_is_the_convolution_and_a_closed_one_content_alone(stride):
    conv, layer = layer_of(math.inf, stride=stride)
    torch.testing.assert_close(layer(X), conv(X), rtol=0, atol=1e-13)
    closed = layer_of(-math.inf, stride=stride)[1]
    matrix = closed.matrix(X)
    assert torch.equal(matrix.dense(), matrix.content.dense())
    assert matrix.position.shape == matrix.content.shape[1:]
    # The paper's formula is not the convolution; how far it is off falls with the gate.
    far = [(layer_of(g, stride=stride)[1](X) - conv(X)).abs().max() for g in (1.0, 4.0, 8.0)]
    assert far[0] > 10 * far[1] > 100 * far[2] > 0


def test_everything_that_moves_the_field_gets_a_gradient():
    layer = layer_of(1.0, alpha=2.0)[1]
    layer(X).square().sum().backward()
    named = dict(layer.named_parameters())
    assert {"gate", "query", "key", "local.position.centre", "local.position.sharpness"} < set(
        named
    )
    for name, parameter in named.items():
        assert parameter.grad.abs().max() > 0, name
        assert parameter.grad.shape == parameter.shape


def position_only(part, grid, heads):
    query, key = torch.zeros(heads, grid.rows, 0), torch.zeros(1, grid.columns, 0)
    return attention(query, key, score=PositionOnly(), position=part)


def test_a_shift_is_measured_as_its_offset():
    grid = Grid((7, 9))
    offsets = torch.tensor([[0, 0], [-2, 1], [3, -4]])
    found = receptive_field(position_only(Shift(offsets, grid), grid, 3), grid)
    assert torch.equal(found.centre, offsets.double())
    assert torch.equal(found.non_locality, offsets.double().square().sum(-1).sqrt())
    assert found.radius.abs().max() < 1e-7  # the root of a rounding


def test_measures_are_their_sums():
    grid = Grid((4, 5), (2, 3), 2, 0)
    torch.manual_seed(0)
    matrix = position_only(Gaussian.of(torch.randn(2, 2), grid, alpha=0.3), grid, 2)
    found, weights = receptive_field(matrix, grid), matrix.dense().double()
    keys, places = grid.keys(torch.arange(20)), grid.places(torch.arange(6))
    away = (keys - places[:, None]).double()
    share = weights / weights.sum((-2, -1), keepdim=True)
    centre = torch.einsum("hij,ija->ha", share, away)
    from_centre = (away - centre[:, None, None]).square().sum(-1)
    torch.testing.assert_close(found.centre, centre)
    torch.testing.assert_close(found.radius, (share * from_centre).sum((-2, -1)).sqrt())
    # Equation 8 of ConViT: the mean over queries, where rows sum to 1.
    wanted = (weights * away.square().sum(-1).sqrt()).sum((-2, -1)) / 6
    torch.testing.assert_close(found.non_locality, wanted, rtol=0, atol=1e-6)


def test_a_wider_spot_is_measured_as_wider_and_a_mixture_lies_between():
    grid = Grid((9, 9))
    spots = Gaussian(torch.zeros(3, 2), torch.tensor([3.0, 1.0, 0.3]), grid)
    radius = receptive_field(position_only(spots, grid, 3), grid).radius
    assert radius[0] < radius[1] < radius[2]
    layer = layer_of(0.0)[1]
    mixture, inner = layer.matrix(X), layer.local.grid((5, 6))
    parts = (mixture.content, mixture.position, mixture)
    content, position, both = (receptive_field(part, inner).non_locality for part in parts)
    torch.testing.assert_close(both, (content + position) / 2)


def test_a_head_that_sees_nothing_is_measured_as_zero():
    grid = Grid(4)
    field = Field(torch.zeros(1, 1), grid, first=9)
    found = receptive_field(position_only(field, grid, 1), grid)
    assert [x.abs().sum().item() for x in found] == [0, 0, 0]


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_autocast_projects_in_its_dtype_and_mixes_in_that_of_the_input(kind):
    layer, x = layer_of(0.3, alpha=1.5)[1].float(), X.to(kind)
    wanted = layer(x.float())
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(x)
        assert layer.matrix(x).dense().dtype == kind
    torch.testing.assert_close(found.float(), wanted, rtol=0, atol=0.05)
    assert layer(X[:0].float()).shape == (0, 4, 5, 6)
    with pytest.raises(DtypeError, match=r"layer\.weight has torch.float32"):
        layer(X)


def test_of_no_rows_nothing_is_measured():
    tokens = torch.zeros(2, 0, 1)
    found = receptive_field(attention(tokens, tokens), Grid(0))
    assert [tuple(x.shape) for x in found] == [(2, 1), (2,), (2,)]
    assert not any(x.any() for x in found)


def test_errors_say_what_would_work():
    conv = nn.Conv2d(3, 4, 3)
    with pytest.raises(DtypeError, match="heads='gaussian'"):
        GatedAttention(from_conv(conv), 4)
    with pytest.raises(ShapeError, match=r"\[\*batch, 3"):
        layer_of(1.0)[1](X[:, :2])
    mixture = layer_of(1.0)[1].matrix(X)
    with pytest.raises(ShapeError, match="by rows"):
        mixture[0]
    tokens = torch.zeros(2, 4, 1)
    with pytest.raises(ShapeError, match="12 keys"):
        receptive_field(attention(tokens, tokens, normalizer=Softmax()), Grid((3, 4)))
