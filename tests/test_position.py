"""What attention knows of positions: nothing by itself, and exactly what each part says."""

import dataclasses
import itertools
import math

import laws
import pytest
import torch
from laws import MASKS, POSITIONS, Sizes

import regard
from regard import Causal, Dot, DtypeError, PositionOnly, Rotary, ShapeError
from regard.nn import Continuous, Learned, SelfAttention, Sinusoidal
from regard.position import (
    Cope,
    Fire,
    Kerple,
    LongRope,
    Ntk,
    Relative,
    Shaw,
    TransformerXL,
    Yarn,
    sinusoid,
)

SIZES = Sizes(batch=2, heads=2, key_heads=2, n=9, m=9, width=6, value_width=3)
PARTS = [name for name in POSITIONS if name != "none"]
WITH_OFFSET = [name for name in PARTS if "bias" not in name]


def part_of(name, seed=0, sizes=SIZES):
    return POSITIONS[name](laws.Draw(seed, torch.float64), sizes)


def vectors(seed=1, sizes=SIZES):
    draw = laws.Draw(seed, torch.float64)
    query = draw.normal(sizes.batch, sizes.heads, sizes.n, sizes.width)
    key = draw.normal(sizes.batch, sizes.heads, sizes.m, sizes.width)
    return query, key, draw.normal(sizes.batch, sizes.heads, sizes.m, sizes.value_width)


def test_without_positions_permuted_tokens_give_permuted_outputs():
    layers = [SelfAttention(8, 2).double() for _ in range(2)]
    x, order = torch.randn(2, 20, 8, dtype=torch.float64), torch.randperm(20)

    def stack(x):
        for layer in layers:
            x = x + torch.tanh(layer(x)[0])
        return x

    assert (stack(x[:, order]) - stack(x)[:, order]).abs().max() <= 1e-12


@pytest.mark.parametrize("name", PARTS)
def test_every_part_breaks_permutation_equivariance(name):
    query, key, value = vectors()
    order = torch.tensor([3, 0, 7, 1, 8, 2, 6, 4, 5])  # no reflection, which |i - j| survives

    def output(query, key, value):
        return regard.attention(query, key, position=part_of(name)) @ value

    moved = output(query[..., order, :], key[..., order, :], value[..., order, :])
    assert (moved - output(query, key, value)[..., order, :]).abs().max() > 1e-3


@pytest.mark.parametrize("name", PARTS)
def test_shift_invariance_is_as_stated(name):
    """s(i + r, j + r) = s(i, j) where the pair's vectors move along and other keys stay."""
    part = part_of(name)
    query, key, _ = (x.detach() for x in vectors())
    query = query[..., :1, :].expand_as(query)
    key[..., 5, :] = key[..., 2, :]
    logits = regard.attention(query, key, position=part).logits()
    gap = (logits[..., 8, 5] - logits[..., 5, 2]).abs().max()
    assert (gap < 1e-12) == part.shift_invariant, gap


@pytest.mark.parametrize("name", WITH_OFFSET)
def test_a_continued_sequence_has_the_last_rows_of_the_whole(name):
    part = part_of(name)
    query, key, value = vectors()
    start = part.offset
    whole_key = torch.cat([key, key.flip(-2)], -2)
    whole_value = torch.cat([value, value.flip(-2)], -2)
    if isinstance(part, Rotary) and part.positions is not None:
        tokens = torch.randn(2, 1, 40, 2, dtype=torch.float64)
        part = dataclasses.replace(part, positions=tokens)
    first = regard.attention(query, whole_key, position=part, mask=Causal(start)) @ whole_value
    later, more = part.at(start + 5), Causal(start + 5)
    rest = regard.attention(query[..., 5:, :], whole_key, position=later, mask=more) @ whole_value
    assert (first[..., 5:, :] - rest).abs().max() <= 1e-13


def test_one_causal_head_without_positions_says_one_over_t():
    """Kazemnejad et al. 2023, arXiv:2305.19466, theorem 1: equal keys, values mark the first."""
    n = 4096
    ones = torch.ones(n, 1, dtype=torch.float64)
    first = torch.zeros(n, 1, dtype=torch.float64)
    first[0] = 1
    output = (regard.attention(ones, ones, mask=Causal()) @ first)[:, 0]
    exact = 1 / torch.arange(1, n + 1, dtype=torch.float64)
    assert ((output - exact).abs() <= torch.finfo(torch.float64).eps * exact).all()


def test_one_causal_layer_is_blind_to_the_order_of_the_prefix_and_two_are_not():
    one, two = (SelfAttention(8, 2).double() for _ in range(2))
    x = torch.randn(10, 8, dtype=torch.float64)
    moved = torch.cat([x[:9][torch.randperm(9)], x[9:]])

    def last(x, layers):
        for layer in layers:
            x = x + layer(x, mask=Causal())[0]
        return x[-1]

    assert (last(x, [one]) - last(moved, [one])).abs().max() < 1e-13
    assert (last(x, [one, two]) - last(moved, [one, two])).abs().max() > 1e-4


@pytest.mark.parametrize("mask", MASKS)
def test_offsets_sum_the_weights_of_each_relative_position(mask):
    draw = laws.Draw(3, torch.float64)
    query, key, _ = vectors()
    A = regard.attention(query, key, position=part_of("alibi"), mask=MASKS[mask](draw, SIZES))
    at = (torch.arange(9) - (torch.arange(9) + 1)[:, None]).clamp(-2, 3) + 2
    weights = A.dense()
    wanted = torch.stack([(weights * (at == o)).sum(-1) for o in range(6)], -1)
    found = A.offsets(2, 3, offset=1)
    loss = torch.randn(found.shape, dtype=torch.float64)
    inputs = [query, key, *A.rule.tensors()]
    one, other = (torch.autograd.grad(y, inputs, loss, allow_unused=True) for y in (found, wanted))
    for x, y in zip((found, *one), (wanted, *other), strict=True):
        assert (x - y).abs().max() <= 1e-12


def test_a_layer_adds_the_values_of_relative_positions():
    part = part_of("shaw")
    values = torch.randn(6, 4, dtype=torch.float64)
    layer = SelfAttention(12, 2, position=dataclasses.replace(part, values=values)).double()
    plain = SelfAttention(12, 2, position=part).double()
    plain.load_state_dict(layer.state_dict(), strict=False)
    x = torch.randn(7, 12, dtype=torch.float64)
    with pytest.raises(RuntimeError):  # values are as wide as the heads' outputs
        layer(x)
    values = torch.randn(6, 6, dtype=torch.float64)
    layer = SelfAttention(12, 2, position=dataclasses.replace(part, values=values)).double()
    layer.load_state_dict(plain.state_dict(), strict=False)
    output, A = layer(x)
    at = (torch.arange(7) - (torch.arange(7) + 1)[:, None]).clamp(-2, 3) + 2
    more = torch.einsum("hnm,nme->nhe", A.dense(), values[at]).flatten(-2)
    wanted = plain(x)[0] + more @ layer.out_proj.weight.mT
    assert (output - wanted).abs().max() <= 1e-12


@pytest.mark.parametrize("kind", ["log", "power"])
def test_kerple_is_its_formula(kind):
    r1, r2 = torch.tensor([0.5, 2.0]).double(), torch.tensor([0.3, 1.7]).double()
    found = Kerple(r1, r2, kind).by_distance(torch.arange(-5, 6))
    for h in range(2):
        for at, d in enumerate(range(-5, 6)):
            d, a, b = abs(d), float(r1[h]), float(r2[h])
            wanted = -a * math.log(1 + b * d) if kind == "log" else -a * d**b
            assert abs(float(found[h, at]) - wanted) <= 1e-13


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


TABLE = torch.zeros(2, 5)


@pytest.mark.parametrize(
    ("kind", "words", "call"),
    [
        (ShapeError, ["7", "pairs"], lambda: Rotary.of(7)),
        (ShapeError, ["4 pairs", "6"], lambda: _dot(Rotary.of(8))),
        (DtypeError, ["bool"], lambda: Rotary.of(6, positions=torch.ones(9, dtype=torch.bool))),
        (ShapeError, ["(4, 9)", "[:, None]"], lambda: Rotary.of(6, positions=torch.zeros(4, 9))),
        (ShapeError, ["5 tokens", "9"], lambda: _dot(Rotary.of(6, positions=torch.zeros(5)))),
        (ShapeError, ["10", "even"], lambda: Rotary.axial(10, torch.zeros(9, 2))),
        (ShapeError, ["left"], lambda: Relative(TABLE, left=5)),
        (ShapeError, ["5 buckets", "even"], lambda: T5(TABLE)),
        (ShapeError, ["3", "2"], lambda: _dot(T5(torch.zeros(3, 8)))),
        (ShapeError, ["5", "6"], lambda: _dot(Shaw(TABLE, left=1))),
        (ShapeError, ["5", "6"], lambda: _dot(Cope(TABLE))),
        (
            ShapeError,
            ["3", "4"],
            lambda: TransformerXL(torch.zeros(2, 4, 6), *torch.zeros(2, 2, 3)),
        ),
        (ShapeError, ["even"], lambda: TransformerXL(torch.zeros(2, 4, 5), *torch.zeros(2, 2, 4))),
        (ValueError, ["cubic"], lambda: Kerple(TABLE[:, 0], TABLE[:, 0], "cubic")),
        (ValueError, ["fast", "slow"], lambda: Yarn(2.0, 64, fast=1.0, slow=2.0)),
        (ShapeError, ["2", "4"], lambda: Ntk(2.0).frequencies(2, 10.0)),
        (ShapeError, ["1", "3"], lambda: LongRope((1.0,), (), 1, 2).frequencies(6, 10.0)),
        (ShapeError, ["[k]"], lambda: dataclasses.replace(Fire.of(2), hidden=torch.zeros(3))),
        (ShapeError, ["128", "Sinusoidal"], lambda: Learned(128, 4)(torch.zeros(129, 4))),
        (ShapeError, ["3", "4"], lambda: Sinusoidal(4)(torch.zeros(2, 3))),
        (DtypeError, ["float"], lambda: Learned(9, 4)(torch.zeros(2, 4), positions=torch.zeros(2))),
        (ShapeError, ["3", "2"], lambda: Sinusoidal(4)(torch.zeros(2, 4), positions=torch.ones(3))),
    ],
)
def test_what_does_not_fit_is_said(kind, words, call):
    with pytest.raises(kind) as caught:
        call()
    assert all(word in str(caught.value) for word in words), caught.value


def _xl(width, vector):
    return TransformerXL(torch.zeros(2, 4, width), *torch.zeros(2, 2, vector))


def _dot(position):
    query, key, _ = vectors()
    return regard.attention(query, key, score=Dot(), position=position)


def test_position_only_heads_read_no_vectors_and_toeplitz_parts_one_vector_each():
    part = Relative(torch.randn(2, 4, dtype=torch.float64), left=2)
    query, key, _ = vectors()
    logits = regard.attention(query, key, score=PositionOnly(), position=part).logits()
    assert part.vector(9, 9, query.device).shape == (2, 17)
    for i, j in ((0, 0), (8, 0), (0, 8), (4, 5)):
        at = min(max(j - i, -2), 1) + 2
        assert torch.equal(logits[0, :, i, j], part.table[:, at])
