"""Layers that know positions: on the input, and in the parts of attention layers."""

import dataclasses
import itertools

import laws
import pytest
import torch
from laws import POSITIONS, Sizes

from regard import DtypeError, ShapeError
from regard.nn import Continuous, Learned, SelfAttention, Sinusoidal
from regard.position import sinusoid

SIZES = Sizes(batch=2, heads=2, key_heads=2, n=9, m=9, width=6, value_width=3)


def test_a_layer_adds_the_values_of_relative_positions():
    part = POSITIONS["shaw"](laws.Draw(0, torch.float64), SIZES)
    values = torch.randn(6, 4, dtype=torch.float64)
    layer = SelfAttention(12, 2, position=dataclasses.replace(part, values=values)).double()
    plain = SelfAttention(12, 2, position=part).double()
    plain.load_state_dict(layer.state_dict(), strict=False)
    x = torch.randn(7, 12, dtype=torch.float64)
    with pytest.raises(ShapeError, match=r"width 4 .* width 6"):
        layer(x)
    values = torch.randn(6, 6, dtype=torch.float64)
    layer = SelfAttention(12, 2, position=dataclasses.replace(part, values=values)).double()
    layer.load_state_dict(plain.state_dict(), strict=False)
    output, A = layer(x)
    at = (torch.arange(7) - (torch.arange(7) + 1)[:, None]).clamp(-2, 3) + 2
    more = torch.einsum("hnm,nme->nhe", A.dense(), values[at]).flatten(-2)
    wanted = plain(x)[0] + more @ layer.out_proj.weight.mT
    assert (output - wanted).abs().max() <= 1e-12


def test_linear_rotation_dynamics_are_the_sinusoid():
    """FLOATER contains the sinusoid, and its solver has order four."""
    width, base = 6, 100.0
    theta = base ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)

    def turn(time, p):
        sine, cosine = p.unflatten(0, (-1, 2)).unbind(-1)
        return torch.stack([theta * cosine, -theta * sine], -1).flatten()

    positions = torch.arange(20)
    exact = sinusoid(positions.double(), width, base=base)
    error = []
    for steps in (5, 10, 20):
        layer = Continuous(width, turn, start=exact[0], spacing=1.0, steps=steps)
        error.append(float((layer.encoding(positions) - exact).abs().max()))
    slopes = [torch.log2(torch.tensor(a / b)) for a, b in itertools.pairwise(error)]
    assert error[-1] < 1e-5
    assert all(3.9 < slope < 4.2 for slope in slopes), slopes


def test_layers_on_the_input_continue_a_sequence():
    for layer in (Sinusoidal(6), Learned(20, 6), Continuous(6, lambda t, p: -p)):
        x = torch.randn(2, 8, 6)
        whole = layer(x)
        assert torch.equal(layer(x[:, 5:], offset=5), whole[:, 5:])
        order = torch.randperm(8)
        assert torch.allclose(layer(x[:, order], positions=order), whole[:, order])


@pytest.mark.parametrize(
    ("kind", "words", "call"),
    [
        (ShapeError, ["128", "Sinusoidal"], lambda: Learned(128, 4)(torch.zeros(129, 4))),
        (
            ShapeError,
            ["-1", "first position is 0"],
            lambda: Learned(128, 4).encoding(torch.tensor([-1])),
        ),
        (ShapeError, ["3", "4"], lambda: Sinusoidal(4)(torch.zeros(2, 3))),
        (DtypeError, ["float"], lambda: Learned(9, 4)(torch.zeros(2, 4), positions=torch.zeros(2))),
        (DtypeError, ["bool"], lambda: _at(torch.ones(2, dtype=torch.bool))),
        (ShapeError, ["(3,)", "2"], lambda: _at(torch.ones(3))),
        (ShapeError, ["(3,)", "(4,)"], lambda: Continuous(4, max, start=torch.zeros(3))),
        (ShapeError, ["-2"], lambda: Continuous(4, max).encoding(torch.tensor([-2]))),
        (ValueError, ["layout"], lambda: Sinusoidal(4, layout="odd")),
    ],
)
def test_what_does_not_fit_is_said(kind, words, call):
    with pytest.raises(kind) as caught:
        call()
    assert all(word in str(caught.value) for word in words), caught.value


def _at(positions):
    return Sinusoidal(4)(torch.zeros(2, 4), positions=positions)
