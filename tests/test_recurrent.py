"""The form `recurrent`: dense, token by token and in chunks are one set of numbers."""

from __future__ import annotations

from collections import defaultdict

import laws
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import Case, Sizes, results

from regard import (
    Alibi,
    Causal,
    Documents,
    Dot,
    Dropout,
    Features,
    FormError,
    Identity,
    Padding,
    PositionOnly,
    RowSum,
    ShapeError,
    Softmax,
    Window,
    attention,
)
from regard.feature_map import Affine, Hedgehog, identity, unit
from regard.form import chunks, recurrent, scan
from regard.form.recurrent import recur
from regard.kernel import extension

EPS = torch.finfo(torch.float64).eps
SCORES = [name for name in laws.SCORES if name.startswith("features")]
OWN = ["none", "causal, last", "causal documents", "causal padded", "nothing"]
"""Masks that a state can hold for every draw of sizes, where the tokens of rows are the last."""
HELD = [*OWN, "causal", "causal, few see", "padding"]
"""Masks that a state can hold where only the mask says which tokens rows are."""


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """In PyTorch; the kernels' chunks are what they are."""
    monkeypatch.setattr(chunks, "CHUNK", 4)
    monkeypatch.setattr(chunks, "PIECE_NUMBERS", 64)
    monkeypatch.setattr(scan, "KERNELS", None)


def assert_rounding(got, wanted, factor):
    for name, reference in wanted.items():
        assert torch.isfinite(got[name]).all(), name
        if reference.numel():
            bound = 256 * EPS * factor * max(1.0, float(reference.abs().max()))
            assert float((got[name] - reference).abs().max()) <= bound, name


def cancellation(matrix):
    """How much rounding RowSum amplifies: c = sum_jc |q_ic k_jc| / |sum_jc q_ic k_jc|.

    A state adds up channels after keys, so that the digits lost are those of all products. The sum
    T is off by c roundings of itself. Output N / T and gradients, at most (g v - g N / T) / T, have
    it as a divisor once or twice, and relative errors of divisors add up: c to the first power.
    """
    if not isinstance(matrix.normalizer, RowSum):
        return 1.0
    query, key = (x.detach().abs() for x in matrix.rule.operands(matrix.query, matrix.key))
    i, j = (torch.arange(length) for length in matrix.shape[-2:])
    logits, sizes = matrix.logits().detach(), matrix.rule.logits(query, key, i, j, None).detach()
    size = torch.where(logits == -torch.inf, 0, sizes.abs()).sum(-1)
    total = torch.where(logits == -torch.inf, 0, logits).sum(-1) + matrix.normalizer.eps
    return float((size / total.abs()).max().clamp(min=1)) if size.numel() else 1.0


def set_chunk(size):
    """None: the kernels run, where they can; the fixture sets all back."""
    chunks.CHUNK, scan.KERNELS = size or 64, None if size else extension.load()


@pytest.mark.parametrize("chunk", [3, 4, None], ids=["3", "4", "in C++"])
@pytest.mark.parametrize("score", SCORES)
@given(
    mask=st.sampled_from(HELD),
    position=st.sampled_from(["none", "rotary"]),
    normalizer=st.sampled_from(["row sum", "identity"]),
    sizes=laws.sizes,
    seed=st.integers(0, 2**12).map(lambda k: 3 * k + 1),  # multiples of 3 have dropout
)
@settings(max_examples=8)
def test_form_equals_dense(score, chunk, mask, position, normalizer, sizes, seed):
    set_chunk(chunk)
    matrix, value = Case(score, position, mask, normalizer, sizes, seed).build(torch.float64)
    if matrix.score.recurs and mask not in OWN:
        mask = OWN[seed % len(OWN)]
        matrix, value = Case(score, position, mask, normalizer, sizes, seed).build(torch.float64)
    factor = cancellation(matrix)
    if factor > 1e4:  # a row sum near zero has no digits to compare
        return
    assert recurrent.needs(matrix) is None
    got, wanted = (results(matrix, value, form) for form in ("recurrent", "dense"))
    assert_rounding(got, wanted, factor)
    x = laws.Draw(seed, torch.float64).normal(sizes.batch, sizes.heads, sizes.n, 3)
    one, other = (matrix.mT.matmul(x, form=form) for form in ("recurrent", "dense"))
    assert_rounding({"transposed": one.detach()}, {"transposed": other.detach()}, factor)


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def lanes(*shape):
    return random(*shape, 9, 6, seed=len(shape)).abs().requires_grad_() / 40


SHARED = {
    "decays of heads, delta": (2, {"log_decay": -lanes(4), "beta": 0.3}),
    "decays of heads that all tokens share": (1, {"log_decay": -lanes(4)[:, :1]}),
    "decays of heads, erasing of all": (4, {"log_decay": -lanes(4), "erase": (lanes(), lanes())}),
    "decays of all, erasing of heads": (1, {"log_decay": -lanes(), "erase": (lanes(4), lanes(1))}),
    "decays of batch entries, erasing of heads": (
        2,
        {"log_decay": -lanes(3, 1), "erase": (lanes(4), lanes(2, 4)[:1])},
    ),
    "one number for a batch entry": (2, {"log_decay": -lanes(3, 1)[..., :1], "beta": 0.3}),
    "betas of heads and batch entries": (2, {"beta": lanes(3, 4)[..., :1]}),
}
"""Key heads, and tensors that have batch entries and heads which queries or keys lack."""


@pytest.mark.parametrize("chunk", [1, 3, 4, 16, None])
@pytest.mark.parametrize("name", SHARED)
def test_every_part_may_have_lanes_of_its_own(name, chunk):
    """Heads, key heads and batch entries of decays and erasing broadcast with those of the keys."""
    set_chunk(chunk)
    key_heads, parts = SHARED[name]
    batch = max(x.shape[0] if x.dim() > 3 else 1 for x in Features(unit, **parts).tensors())
    query = random(batch, 4, 9, 6).requires_grad_()
    key, value = random(2, 1, key_heads, 9, 6).requires_grad_()
    A = attention(query, key, score=Features(unit, **parts), mask=Causal(), normalizer=Identity())
    assert A.explain(value).form == "recurrent"
    assert_rounding(*(results(A, value, form) for form in ("recurrent", "dense")), 1)


class Quotient:
    """RowSum as a recurrence has it, densely: the scores times [value, 1], and their quotient.

    Rows whose weights divide scores by their own sum round better: what is common cancels.
    """

    def __init__(self, matrix):
        self.query, self.key, self.rule = matrix.query, matrix.key, matrix.rule
        self.scores, self.eps = matrix.with_normalizer(Identity()), matrix.normalizer.eps

    def matmul(self, value, form):
        both = self.scores.matmul(torch.nn.functional.pad(value, (0, 1), value=1.0), form=form)
        return both[..., :-1] / (both[..., -1:] + self.eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("normalizer", ["row sum", "identity"])
@pytest.mark.parametrize("chunk", [16, None], ids=["in PyTorch", "in C++"])
@pytest.mark.parametrize("score", SCORES)
def test_low_precision_error_is_at_most_twice_that_of_dense(score, chunk, normalizer, dtype):
    """Against float64 dense, pooled over seeds, as in tests/test_laws.py.

    Under RowSum dense is a quotient here, as the recurrence is, and four times the error of rows
    that divide by their own sum is allowed: twice for the quotient, and twice for the recurrence.
    """
    set_chunk(chunk)  # 16 is smaller than any that is used for as many tokens
    squares, allowed, whole = (defaultdict(float) for _ in range(3))
    for seed in (1, 4):
        sizes = Sizes(batch=1, heads=2, key_heads=1, n=33, m=33, width=8, value_width=8)
        case = Case(score, "none", "causal", normalizer, sizes, seed)
        exact, low = case.build(torch.float64), case.build(dtype)
        for high, rounded in zip(laws.inputs(*exact), laws.inputs(*low), strict=True):
            high.data.copy_(rounded)
        if cancellation(exact[0]) > 50:
            continue
        reference = results(*exact, "dense")
        terms = reference | laws.contributions(*exact)
        quotient = Quotient(low[0]) if normalizer == "row sum" else low[0]
        for found, matrix, form in (
            (squares, low[0], "recurrent"),
            (allowed, quotient, "dense"),
            (whole, low[0], "dense"),
        ):
            for name, result in results(matrix, low[1], form).items():
                scale = torch.finfo(dtype).eps * float(terms[name].norm()) or 1.0
                found[name] += (float((result - reference[name]).norm()) / scale) ** 2
    assert squares
    for name, total in squares.items():
        error, dense, plain = (x**0.5 for x in (total, allowed[name], whole[name]))
        assert error <= 2 * dense + 1, f"{name}: {error:.2f} roundings, dense {dense:.2f}"
        assert error <= 4 * plain + 1, f"{name}: {error:.2f} roundings, dense {plain:.2f}"


Q, K, V = random(3, 2, 4, 20, 6).unbind(0)
LINEAR = {"score": Features(), "normalizer": RowSum()}


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        ({"score": Dot(), "normalizer": RowSum()}, "needs a score that factorises"),
        ({"score": Features()}, "needs the normalizer RowSum"),
        ({**LINEAR, "dropout": Dropout(0.1, seed=0)}, "treats each pair by itself"),
        ({**LINEAR, "position": Alibi.of(4)}, "log_decay multiplies"),
        ({**LINEAR, "mask": Causal() & Window(3, 0)}, "needs a mask under which"),
        ({**LINEAR, "mask": Documents(torch.arange(20) // 7)}, "needs a mask under which"),
        ({"score": PositionOnly(), "mask": Causal()}, "as Alibi's is"),
        ({"score": PositionOnly(), "position": Alibi.of(4)}, "needs a causal mask"),
        (
            {"score": PositionOnly(), "position": Alibi(-torch.ones(4)), "mask": Causal()},
            "slopes of at least 0",
        ),
        (
            {
                "score": PositionOnly(),
                "position": Alibi.of(4),
                "mask": Causal(),
                "normalizer": Softmax(sink=0.0),
            },
            "without a sink",
        ),
    ],
)
def test_it_says_what_it_needs(parts, says):
    A = attention(Q, K, **parts)
    with pytest.raises(FormError, match=says):
        A.matmul(V, form="recurrent")
    with pytest.raises(FormError, match=says):
        recur(A, V)
    assert A.explain(V).form != "recurrent"


def test_without_a_mask_there_is_a_product_but_no_state():
    A = attention(Q, K, **LINEAR)
    assert A.explain(V).kernel.startswith("one state of all keys")
    with pytest.raises(FormError, match="give mask=Causal"):
        recur(A, V)
    phi_q, phi_k = (torch.nn.functional.elu(x) + 1 for x in (Q, K))
    wanted = phi_q @ (phi_k.mT @ V) / (phi_q @ phi_k.sum(-2)[..., None])
    torch.testing.assert_close(A @ V, wanted, rtol=1e-13, atol=1e-13)


def test_wrong_shapes_are_explained():
    with pytest.raises(ShapeError, match="keys of the tokens 0 to 4; with decay or erasing"):
        attention(Q, K[..., :5, :], score=Features(log_decay=-0.1))
    with pytest.raises(ShapeError, match=r"it must be \[\*batch, heads, 1 or 20, 1 or 6\]"):
        attention(Q, K, score=Features(log_decay=torch.zeros(4, 20)))
    with pytest.raises(ShapeError, match=r"erase's read has shape \(20, 1\)"):
        attention(Q, K, score=Features(erase=(torch.zeros(20, 1), torch.zeros(20, 6))))
    with pytest.raises(ShapeError, match="maps queries to 6 features and keys to 4"):
        attention(Q, K, score=Features(identity, Hedgehog(torch.zeros(6, 2).double())))
    with pytest.raises(ValueError, match="beta or erase, not both"):
        Features(beta=1.0, erase=(Q, Q))
    A = attention(Q, K, mask=Causal(), **LINEAR)
    with pytest.raises(ShapeError, match=r"leave one of \(2, 4, 6, 7\)"):
        recur(A, V, torch.zeros(2, 4, 6, 6, dtype=torch.float64))


def test_a_state_is_shared_by_the_heads_that_share_a_key():
    """Grouped heads keep one state for each key head, unless decays differ within a group."""
    parts = {"mask": Causal(), "normalizer": RowSum()}
    key, value = K[:, :2], V[:, :2]
    _, state = recur(attention(Q, key, score=Features(), **parts), value)
    assert state.shape == (2, 2, 6, 7)
    slopes = torch.tensor([0.1, 0.2, 0.3, 0.4]).double()[:, None, None]
    A = attention(Q, key, score=Features(log_decay=-slopes), **parts)
    output, state = recur(A, value)
    assert state.shape == (2, 4, 6, 7)
    again, _ = recur(A, value, torch.zeros_like(state))
    torch.testing.assert_close(output, again)


def test_documents_begin_anew():
    """Packed documents of any lengths are as many sequences, each from an empty state."""
    lengths = [7, 1, 4, 8]
    ids = torch.arange(4).repeat_interleave(torch.tensor(lengths))
    score = Features(identity, log_decay=-0.1, beta=0.2)
    A = attention(Q, K, score=score, mask=Causal() & Documents(ids), normalizer=Identity())
    pieces = [x.split(lengths, -2) for x in (Q, K, V)]
    apart = [
        attention(q, k, score=score, mask=Causal(), normalizer=Identity()) @ v
        for q, k, v in zip(*pieces, strict=True)
    ]
    assert recurrent.needs(A) is None
    torch.testing.assert_close(A @ V, torch.cat(apart, -2), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("chunk", [4, None], ids=["in PyTorch", "in C++"])
def test_it_differentiates_twice_and_under_inference_mode(chunk):
    set_chunk(chunk)
    tensors = [x[:1, :1, :5, :2].clone().requires_grad_() for x in (Q, K, V)]

    def product(q, k, v):
        return attention(q, k, mask=Causal(), **LINEAR).matmul(v, form="recurrent")

    assert torch.autograd.gradcheck(product, tensors)
    assert torch.autograd.gradgradcheck(product, tensors)
    with torch.inference_mode():
        A = attention(Q * 1, K * 1, mask=Causal(), **LINEAR)
        found = A.mT @ (V * 1), A @ (V * 1)
    A = attention(Q, K, mask=Causal(), **LINEAR)
    torch.testing.assert_close(found[0], A.mT.matmul(V, form="dense"))
    torch.testing.assert_close(found[1], A.matmul(V, form="dense"))


def test_the_transpose_trains_what_only_phi_reads():
    """And it has no graph where nothing learns."""
    weight = random(6, 6).requires_grad_()
    parts = {"mask": Causal(), "normalizer": RowSum()}
    A = attention(Q, K, score=Features(lambda x: (x @ weight).exp()), **parts)
    found = {form: A.mT.matmul(V, form=form) for form in ("recurrent", "dense")}
    assert A.explain(V).form == "recurrent"
    one, other = (torch.autograd.grad(x.square().sum(), weight)[0] for x in found.values())
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    assert not (attention(Q, K, score=Features(), **parts).mT @ V).requires_grad
    with torch.no_grad():
        assert not (A.mT @ V).requires_grad


def test_the_past_of_a_mask_is_found_once(monkeypatch):
    found, real = [], recurrent.past
    monkeypatch.setattr(recurrent, "past", lambda *a, **k: found.append(a) or real(*a, **k))
    A = attention(Q, K, mask=Causal() & Documents(torch.arange(20) // 7), **LINEAR)
    A @ V
    assert len(found) == 1


def test_a_decay_that_is_a_growth_is_explained():
    with pytest.raises(ValueError, match="log_decay is the natural logarithm"):
        Features(log_decay=0.9)


def test_heads_with_biases_of_their_own_may_share_keys_and_a_weight():
    score = Features(Affine(random(6, 5).abs(), random(4, 5).abs()))
    A = attention(Q, K[:, :2], score=score, mask=Causal(), normalizer=RowSum())
    one, other = (A.matmul(V[:, :2], form=form) for form in ("recurrent", "dense"))
    torch.testing.assert_close(one, other)


@pytest.mark.parametrize("chunk", [4, None], ids=["in PyTorch", "in C++"])
@pytest.mark.parametrize("key_heads", [1, 2, 4])
@pytest.mark.parametrize("place", ["key", "value", "query"])
@pytest.mark.parametrize("hidden", [True, False])
def test_a_state_keeps_nan_from_rows_that_do_not_see_it(hidden, place, key_heads, chunk):
    """NaN in token 13 reaches the rows after it; in a padded one nobody, nor the state."""
    set_chunk(chunk)
    inputs = {"query": Q, "key": K[:, :key_heads], "value": V[:, :key_heads]}
    inputs = {name: x.clone() for name, x in inputs.items()}
    inputs[place][1, 0, 13, 2] = torch.nan
    query, key, value = inputs.values()
    keep = torch.ones(2, 20, dtype=torch.bool)
    keep[1, 13] = not hidden
    A = attention(query, key, mask=Causal() & Padding(keep), **LINEAR)
    output, state = recur(A, value)
    torch.testing.assert_close(output, A.matmul(value, form="dense"), equal_nan=True)
    assert output.isfinite().all(-1)[1, 0, :13].all()
    assert output.isfinite().all(-1)[0].all()
    spoiled = place != "query" and not hidden
    assert state.isfinite().flatten(-2).all(-1).tolist() == [
        [True] * key_heads,
        [not spoiled] + [True] * (key_heads - 1),
    ]
    again = {name: x[..., :1, :] for name, x in (("query", Q), ("key", K[:, :key_heads]))}
    more, _ = recur(
        attention(*again.values(), mask=Causal(), **LINEAR), V[:, :key_heads, :1], state
    )
    assert more.isfinite().all(-1)[1, 0].item() != spoiled


def test_a_state_of_other_sequences_is_explained():
    A = attention(Q, K, mask=Causal(), **LINEAR)
    _, state = recur(A, V)
    with pytest.raises(ShapeError, match=r"state has shape \(2, 4, 6, 7\), but .* \(1, 4, 6, 7\)"):
        recur(attention(Q[:1], K[:1], mask=Causal(), **LINEAR), V[:1], state)
    with pytest.raises(ShapeError, match="leave one of"):
        recur(A, V, torch.zeros(3, 4, 6, 7, dtype=torch.float64))
    one, _ = recur(A, V, state[:1])
    assert one.shape == V.shape
