"""Products of pairs of bfloat16 numbers (csrc/pairs.h), by every build of the kernels.

Builds for processors without such products compute the same in other words, which nothing but these
tests uses.
"""

from __future__ import annotations

import laws
import pytest
import torch
from laws import Case, Sizes

from regard import Causal, Dense, Softmax, attention
from regard.kernel import extension

CPU = extension.load()
pytestmark = pytest.mark.skipif(CPU is None, reason="the compiled kernels are not installed")
ISAS = [] if CPU is None else CPU.isas()
EPS = torch.finfo(torch.bfloat16).eps


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """In roundings, of norms."""
    return float((found.double() - wanted).norm() / wanted.norm()) / EPS


SIZES = {
    "tiles": Sizes(batch=2, heads=4, key_heads=2, n=130, m=200, width=32, value_width=32),
    "odd numbers": Sizes(batch=1, heads=2, key_heads=1, n=67, m=97, width=22, value_width=7),
    "one of each": Sizes(batch=1, heads=1, key_heads=1, n=1, m=1, width=2, value_width=1),
    "one query": Sizes(batch=1, heads=4, key_heads=2, n=1, m=301, width=64, value_width=32),
    "eight queries": Sizes(batch=1, heads=2, key_heads=2, n=8, m=95, width=32, value_width=64),
    "an odd width": Sizes(batch=1, heads=2, key_heads=2, n=70, m=33, width=9, value_width=16),
}


@pytest.mark.parametrize("norm", ["softmax", "sinks", "sigmoid", "relu"])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("isa", ISAS)
def test_pairs_round_at_most_twice_as_much_as_dense(isa, sizes, norm):
    """As the law for all forms, over masks and biases."""
    masks = [("none", "none"), ("causal window", "alibi"), ("padding", "bias")]
    errors, allowed = {}, {}
    for seed, (mask, position) in enumerate(masks):
        case = Case("dot", position, mask, norm, SIZES[sizes], seed)
        exact, low = case.build(torch.float64), case.build(torch.bfloat16)
        for high, rounded in zip(laws.inputs(*exact), laws.inputs(*low), strict=True):
            high.data.copy_(rounded)
        reference = laws.results(*exact, "dense")
        dense = laws.results(*low, "dense")
        with extension.instruction_set(isa, pairs=True):
            found = laws.results(*low, "fused")
        for name in ("output", "gradient of query", "gradient of key", "gradient of value"):
            if norm == "relu" and name in ("gradient of query", "gradient of key"):
                continue  # its derivative at a logit near 0 is 0 or 1, and not a rounded number
            scale = EPS * float(reference[name].norm()) or 1.0
            for homes, got in ((errors, found), (allowed, dense)):
                off = float((got[name] - reference[name]).norm()) / scale
                homes[name] = homes.get(name, 0.0) + off**2 / len(masks)
    for name, squares in errors.items():
        assert squares**0.5 <= 2 * allowed[name] ** 0.5 + 1, name


@pytest.mark.parametrize("rows", [3, 70])
@pytest.mark.parametrize("isa", ISAS)
def test_pairs_are_what_runs(isa, rows):
    """Their weights are rounded; so results differ from those of wide numbers, by roundings."""
    query, key, value = draw(2, rows, 32), draw(2, 100, 32, seed=1), draw(2, 100, 32, seed=2)
    found = []
    for pairs in (False, True):
        with extension.instruction_set(isa, pairs=pairs):
            found.append(attention(query, key).matmul(value, form="fused"))
    assert not torch.equal(*found)
    exact = attention(query.double(), key.double()).matmul(value.double(), form="dense")
    assert max(error(x, exact) for x in found) < 1


@pytest.mark.parametrize("rows", [1, 8, 70])
@pytest.mark.parametrize("isa", ISAS)
def test_pairs_sum_exactly_what_float32_holds(isa, rows):
    """Small integers, and weights that are powers of two, come out to the last digit."""
    value = torch.arange(-64, 64).reshape(4, 32).bfloat16()
    zeros = torch.zeros(rows, 16).bfloat16()
    with extension.instruction_set(isa, pairs=True):
        mean = attention(zeros, torch.zeros(4, 16).bfloat16()) @ value
        one = attention(zeros, draw(4, 16), mask=Dense(torch.eye(4, dtype=torch.bool)[[2] * rows]))
        picked = one @ value
    assert torch.equal(mean, value.mean(0).expand(rows, -1))
    assert torch.equal(picked, value[2].expand(rows, -1))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    "layout",
    {
        "an odd offset": lambda x: torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape),
        "rows an odd number apart": lambda x: torch.cat([x, x[..., :1]], -1)[..., :-1],
        "rows a multiple apart": lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],
        "heads inside": lambda x: x.transpose(-2, -3).contiguous().transpose(-2, -3),
        "one row for all": lambda x: x[..., :1, :].expand_as(x),
    }.items(),
    ids=lambda item: item[0],
)
def test_pairs_lie_anywhere(isa, layout):
    tensors = [layout[1](draw(3, 66, 32, seed=seed)).requires_grad_() for seed in range(4)]

    def results(form: str) -> list[torch.Tensor]:
        query, key, value, along = tensors if form == "fused" else [x.double() for x in tensors]
        output = attention(query, key, mask=Causal()).matmul(value, form=form)
        return [output, *torch.autograd.grad(output, tensors[:3], along.detach())]

    with extension.instruction_set(isa, pairs=True):
        found = results("fused")
    for got, wanted in zip(found, results("dense"), strict=True):
        got, wanted = got.detach(), wanted.detach().double()
        if float(wanted.norm()) < 1e-2:  # of one row for all, what cancels
            assert float(got.norm()) < 1e-2
        else:
            assert error(got, wanted) < 2


@pytest.mark.parametrize("rows", [2, 70])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("isa", ISAS)
def test_pairs_with_what_is_hidden_do_not_count(isa, bad, rows):
    """A pair of keys of which one is hidden takes nothing from its value, whatever that is."""
    keys = rows + 30
    query, key, value = draw(rows, 16), draw(keys, 16, seed=1), draw(keys, 16, seed=2)
    value[5, 3] = value[keys - 1, 0] = bad
    mask = torch.rand(rows, keys, generator=torch.Generator().manual_seed(3)) < 0.8
    mask[:, [5, keys - 1]] = False
    mask[1, 5] = True
    clean = torch.where(value.isfinite(), value, 0)
    with extension.instruction_set(isa, pairs=True):
        output = attention(query, key, mask=Dense(mask)) @ value
        wanted = attention(query, key, mask=Dense(mask)) @ clean
    others = [row for row in range(rows) if row != 1]
    assert torch.equal(output[others], wanted[others])
    assert not output[1].isfinite().all()


@pytest.mark.parametrize("isa", ISAS)
def test_pairs_of_rows_without_keys_give_zeros(isa):
    mask = Dense(torch.ones(40, 40, dtype=torch.bool).tril(-1))
    with extension.instruction_set(isa, pairs=True):
        output = attention(draw(40, 8), draw(40, 8, seed=1), mask=mask) @ draw(40, 8)
        beside = attention(draw(1, 8), draw(3, 8), normalizer=Softmax(sink=300.0)) @ draw(3, 8)
    assert (output[0] == 0).all()
    assert output[1:].all(-1).all()
    assert (beside == 0).all()
