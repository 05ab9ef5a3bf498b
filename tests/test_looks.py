"""Looks, one by one and all in one pass, against their formulas on the dense weights."""

from __future__ import annotations

import laws
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import MASKS, NORMALIZERS, POSITIONS, SCORES, Case, Sizes, condition
from test_laws import COMPILED, assert_rounding

from regard import Attention, Bias, Causal, Dropout, Relu, Sigmoid, Softmax, attention
from regard.form import looks
from regard.kernel import cpu, extension

ISAS = extension.load().isas() if COMPILED else []
FIELDS = ("logsumexp", "entropy", "distance", "received", "values", "named", "mean", "max")


def by_definition(matrix: Attention, k: int, side: int, offset: int) -> dict[str, torch.Tensor]:
    """The formulas, on all weights and logits."""
    logits, weights = matrix.logits(), matrix.dense()
    if isinstance(matrix.normalizer, Softmax) and matrix.normalizer.sink is not None:
        sink = torch.as_tensor(matrix.normalizer.sink, dtype=logits.dtype)
        sink = sink.reshape(*sink.shape, 1, 1).expand(*logits.shape[:-1], 1)
        all_logits = torch.cat([logits, sink], -1)
    else:
        all_logits = logits
    *batch, n, m = weights.shape
    size = weights.abs()
    total = size.sum(-1, keepdim=True)
    share = torch.where(total > 0, size / torch.where(total > 0, total, 1), 0)
    far = (torch.arange(n)[:, None] + offset - torch.arange(m)).abs()
    visible = torch.where(logits > -torch.inf, weights, -torch.inf)
    visible = torch.nn.functional.pad(visible, (0, k), value=-torch.inf)
    values = visible.sort(-1, descending=True).values[..., :k]
    values = torch.where(values > -torch.inf, values, 0)
    cells = [
        [weights[..., i : i + side, j : j + side] for j in range(0, m, side)]
        for i in range(0, n, side)
    ]

    def of_cells(reduce):
        found = [torch.stack([reduce(cell) for cell in row], -1) for row in cells if row]
        shape = (*batch, -(-n // side), -(-m // side))
        return torch.stack(found, -2) if found else weights.new_zeros(shape)

    return {
        "logsumexp": all_logits.logsumexp(-1),
        "entropy": torch.special.entr(share).sum(-1),
        "distance": (share * far).sum(-1),
        "received": weights.sum(-2),
        "values": values,
        "named": values,
        "mean": of_cells(lambda cell: cell.mean((-2, -1))),
        "max": of_cells(lambda cell: cell.amax((-2, -1))),
    }


def named(matrix: Attention, indices: torch.Tensor) -> torch.Tensor:
    """The dense weights that indices name; 0 for -1."""
    weights = torch.nn.functional.pad(matrix.dense(), (0, 1))
    return weights.gather(-1, indices.where(indices >= 0, weights.shape[-1] - 1))


def at_once(matrix: Attention, k: int, side: int, offset: int) -> dict[str, torch.Tensor]:
    found = matrix.statistics(topk=k, pool=side, offset=offset)
    values, indices = found.topk
    answers = (*found[:4], values, named(matrix, indices), *found.pool)
    return dict(zip(FIELDS, answers, strict=True))


def one_by_one(matrix: Attention, k: int, side: int, offset: int) -> dict[str, torch.Tensor]:
    of_rows = matrix.logsumexp(), matrix.entropy(), matrix.distance(offset=offset)
    values, indices = matrix.topk(k)
    pools = matrix.pool(side), matrix.pool(side, "max")
    answers = (*of_rows, matrix.received(), values, named(matrix, indices), *pools)
    return dict(zip(FIELDS, answers, strict=True))


def without_infinity(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A row that sees no key has logsumexp -inf, which has no difference from itself."""
    return {name: x.masked_fill(x == -torch.inf, -1e3) for name, x in found.items()}


def assert_equal(got, wanted, factor: float = 1) -> None:
    assert_rounding(without_infinity(got), without_infinity(wanted), factor)


@pytest.fixture(params=["compiled", "in PyTorch"])
def way(request, monkeypatch, small_tiles):
    if request.param == "in PyTorch":
        monkeypatch.setattr(looks.fused, "needs", lambda matrix: "is not used here.")
    elif not COMPILED:
        pytest.skip("the compiled kernels are not installed")


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("mask", MASKS)
@given(data=st.data(), sizes=laws.sizes, seed=st.integers(0, 2**16))
@settings(max_examples=4)
def test_looks_equal_their_formulas(mask, normalizer, data, sizes, seed):
    """All at once equal one by one to rounding, and both equal the definition."""
    score = data.draw(st.sampled_from(list(SCORES)))
    position = data.draw(st.sampled_from(list(POSITIONS)))
    asked = data.draw(st.tuples(st.integers(1, 20), st.integers(1, 20), st.integers(-3, 3)))
    matrix, _ = Case(score, position, mask, normalizer, sizes, seed).build(torch.float64)
    matrix = matrix.detach()
    factor = condition(matrix)
    if factor > 1e4:
        return  # a row sum near zero has no digits to compare
    wanted, found = by_definition(matrix, *asked), at_once(matrix, *asked)
    assert_equal(found, wanted, factor**2)
    assert_equal(one_by_one(matrix, *asked), found, factor**2)


LONG = Sizes(batch=1, heads=2, key_heads=1, n=150, m=420, width=9, value_width=1)
COMPILED_ONLY = pytest.mark.skipif(not COMPILED, reason="the compiled kernels are not installed")
NORMS = [Softmax(), Softmax(sink=3.0), Sigmoid(-1.0), Relu(mean=True)]


def long_matrix(normalizer, dropout=None, mask=None, dtype=torch.float64) -> Attention:
    draw = laws.Draw(1, dtype)
    query, key = draw.normal(1, 2, 150, 9), draw.normal(1, 1, 420, 9)
    return attention(query, key, normalizer=normalizer, dropout=dropout, mask=mask).detach()


@COMPILED_ONLY
@pytest.mark.parametrize("dropout", [None, Dropout(0.4, seed=3)], ids=["kept", "dropped"])
@pytest.mark.parametrize("normalizer", NORMS, ids=repr)
@pytest.mark.parametrize("blocks", [0, 1, 3, 5])
def test_blocks_beyond_a_strip_are_computed_again(blocks, normalizer, dropout, monkeypatch):
    """Five blocks of keys, of which a strip holds some, under a mask that leaves some out."""
    monkeypatch.setattr(cpu, "STRIP_BYTES", blocks * cpu.rows_of_a_tile() * 96 * 8)
    for mask in (None, Causal(offset=200)):
        matrix = long_matrix(normalizer, dropout, mask)
        for side in (7, 64, 100):
            wanted = by_definition(matrix, 5, side, 2)
            assert_equal(at_once(matrix, 5, side, 2), wanted)
            assert_equal(one_by_one(matrix, 5, side, 2), wanted)


@COMPILED_ONLY
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("normalizer", NORMS, ids=repr)
def test_every_instruction_set_looks_alike(isa, normalizer):
    matrix = long_matrix(normalizer, mask=Causal(offset=100))
    wanted = by_definition(matrix, 4, 50, 0)
    with extension.instruction_set(isa):
        assert_equal(at_once(matrix, 4, 50, 0), wanted)


@COMPILED_ONLY
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("normalizer", NORMS, ids=repr)
def test_float32_rounds_at_most_twice_as_much_as_the_formulas(isa, normalizer):
    """Against float64, in norm: error <= 2 error(formulas on dense float32) + one rounding."""
    low = long_matrix(normalizer, dtype=torch.float32)
    exact = attention(low.query.double(), low.key.double(), normalizer=normalizer)
    reference, dense = by_definition(exact, 4, 50, 0), by_definition(low, 4, 50, 0)
    with extension.instruction_set(isa):
        found = at_once(low, 4, 50, 0)
    for name, right in reference.items():
        unit = torch.finfo(torch.float32).eps * float(right.norm())
        error, allowed = (float((x[name] - right).norm()) / unit for x in (found, dense))
        assert error <= 2 * allowed + 1, f"{name}: {error:.2f} roundings, dense {allowed:.2f}"


@COMPILED_ONLY
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_sums_over_rows_are_the_same_every_time(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        matrix = long_matrix(Softmax())
        first, again = (at_once(matrix, 4, 50, 0) for _ in range(2))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.usefixtures("way")
def test_a_sink_that_takes_all_leaves_rows_without_weight():
    matrix = long_matrix(Softmax(sink=1e4))
    matrix = attention(
        matrix.query[..., :9, :], matrix.key[..., :13, :], normalizer=matrix.normalizer
    )
    found = matrix.statistics(topk=2, pool=5)
    assert (found.logsumexp == 1e4).all()
    for left in (found.entropy, found.distance, found.received, found.topk.values, *found.pool):
        assert (left == 0).all()
    assert (found.topk.indices >= 0).all()  # keys that are seen, with weight 0


@pytest.mark.usefixtures("way")
def test_rows_beside_a_sink_keep_their_digits():
    """Shares of what a sink leaves, however little, are those without it."""
    # Multiples of 1/8: logits and their differences from the sink are exact, whatever the draw.
    x = (24 * torch.randn(2, 9, 4, dtype=torch.float64)).round() / 8
    plain = attention(x, x, mask=Causal())
    beside = attention(x, x, mask=Causal(), normalizer=Softmax(sink=torch.tensor(300.0)))
    assert float(beside.dense().max()) < 1e-50
    for question in ("entropy", "distance"):
        found, wanted = (getattr(A, question)() for A in (beside, plain))
        assert torch.allclose(found, wanted, rtol=1e-14, atol=1e-14), question


@pytest.mark.usefixtures("way")
def test_a_row_that_overflowed_is_not_a_number_at_any_key():
    x = torch.tensor([[1.0]])
    A = attention(x, torch.tensor([[torch.inf], [torch.inf], [-3e38]]))
    assert A.dense().isnan().all()
    assert A.received().isnan().all()


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("normalizer", NORMS, ids=repr)
def test_a_row_with_a_nan_has_no_largest_weights(normalizer):
    """NaN is neither more nor less than a weight: it is not left out, as if rows saw less."""
    query, key = torch.randn(2, 70, 8, dtype=torch.float64).unbind(0)
    key[40] = torch.nan  # rows from 40 on see it
    A = attention(query, key, mask=Causal(), normalizer=normalizer)
    found = A.statistics(topk=2, pool=10)
    for values, indices in (found.topk, A.topk(2)):
        assert values[40:].isnan().all()
        assert (indices[40:] == -1).all()
        assert values[:40].isfinite().all()
        assert (indices[1:40] >= 0).all()
    weights = A.dense().tril()  # hidden pairs have none
    wanted = weights.unflatten(-1, (7, 10)).unflatten(0, (7, 10)).amax((1, 3))
    for largest in (found.pool.max, A.pool(10, reduce="max")):
        assert torch.allclose(largest, wanted, equal_nan=True)


@pytest.mark.usefixtures("way")
def test_hidden_by_infinite_biases_is_not_a_nan():
    bias = torch.where(torch.eye(9, dtype=torch.bool), 0, -torch.inf)
    found = attention(torch.randn(9, 4), torch.randn(9, 4), position=Bias(bias)).topk(1)
    assert (found.values == 1).all()
    assert found.indices[:, 0].tolist() == list(range(9))


@COMPILED_ONLY
@pytest.mark.parametrize("normalizer", NORMS, ids=repr)
def test_a_nan_stays_with_its_row(normalizer):
    query, key = torch.randn(2, 70, 8, dtype=torch.float64).unbind(0)
    clean = attention(query[3:], key, mask=Causal(offset=3), normalizer=normalizer)
    wanted = clean.statistics(topk=2, pool=70)
    query[2] = torch.nan
    found = attention(query, key, mask=Causal(), normalizer=normalizer).statistics(topk=2, pool=1)
    assert_equal({"entropy": found.entropy[3:]}, {"entropy": wanted.entropy})
    assert_equal({"received": found.received[3:]}, {"received": wanted.received[3:]})
    assert found.received[:3].isnan().all()
    assert found.pool.mean[2, :3].isnan().all()
    assert (found.pool.mean[2, 3:] == 0).all()


def test_what_is_not_asked_is_none_and_half_precision_is_looked_at_in_float32():
    found = attention(*torch.randn(2, 2, 5, 4, dtype=torch.bfloat16).unbind(0)).statistics()
    assert found.topk is None
    assert found.pool is None
    assert {x.dtype for x in found[:4]} == {torch.float32}
    assert found.received.shape == (2, 5)
