"""The library against the loops of `oracle.py`: every part, both forms, every look, in float64.

Tiles are two pairs wide here, so that a matrix of nine rows spans several of them.
"""

from dataclasses import dataclass, field

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from regard import (
    Additive,
    Alibi,
    Bias,
    Bilinear,
    Causal,
    Cosine,
    Dense,
    Distance,
    Documents,
    Dot,
    Identity,
    Padding,
    PositionOnly,
    Prefix,
    Relu,
    RowSum,
    ShapeError,
    Sigmoid,
    Softmax,
    Window,
    attention,
)
from regard.custom import Custom
from regard.form import tiles

FORMS = ["dense", "tiled"]
drawn = settings(max_examples=100, derandomize=True, deadline=None)
# The dearest tests: many products in many tiles for each example.
drawn_few = settings(drawn, max_examples=60)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(tiles, "SMALLEST_SIDE", 2)
    monkeypatch.setattr(tiles, "TILE_NUMBERS", 1)


def array(tensor):
    return tensor.detach().numpy()


def same(found, expected):
    """Equal to 1e-12 of the largest number expected; infinities exactly."""
    found, expected = torch.as_tensor(found).detach().numpy(), np.asarray(expected)
    assert found.shape == expected.shape
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(found[~finite], expected[~finite])
    size = max(1.0, np.abs(expected[finite]).max(initial=0.0))
    np.testing.assert_allclose(found[finite], expected[finite], rtol=0, atol=1e-12 * size)


@dataclass
class Case:
    """A matrix for the library, the same matrix for the oracle, and its tensors with gradients."""

    b: int
    h: int
    g: int
    n: int
    m: int
    random: np.random.Generator
    leaves: list = field(default_factory=list)

    def normal(self, *shape):
        leaf = torch.from_numpy(self.random.standard_normal(shape)).requires_grad_()
        self.leaves.append(leaf)
        return leaf

    def matrix(self):
        return attention(self.query, self.key, **self.parts)

    def logits(self):
        arrays = self.query.detach().numpy(), self.key.detach().numpy()
        return oracle.logits(*arrays, self.score, self.bias, self.keep)

    def weights(self):
        return oracle.weights(self.logits(), self.normalizer)


def lanes(draw, case):
    """A shape that broadcasts to [batch, heads]."""
    return draw(st.sampled_from([(), (1,), (case.h,), (case.b, case.h), (case.b, 1)]))


def exp_dot(query, key, i, j):
    return (query @ key.mT).exp()


def draw_score(draw, case, width, *, positive):
    """(score, its formula); with `positive`, all scores of one sign, as RowSum expects."""
    kinds = ["dot", "cosine", "distance", "additive", "bilinear", "none", "function"]
    kind = draw(st.sampled_from(["distance", "function"] if positive else kinds))
    scale = case.normal(*lanes(draw, case)) if draw(st.booleans()) and not positive else None
    given_scale, factor = (0.7, 0.7) if scale is None else (scale, array(scale))
    if kind == "dot":
        cap = draw(st.sampled_from([None, 1.5]))
        if draw(st.booleans()):
            return Dot(softcap=cap), oracle.dot(softcap=cap)
        return Dot(given_scale, cap), oracle.dot(factor, cap)
    if kind == "cosine":
        return Cosine(given_scale), oracle.cosine(factor)
    if kind == "distance":
        return Distance(given_scale), oracle.distance(factor)
    if kind == "additive":
        name = draw(st.sampled_from(sorted(oracle.ACTIVATIONS)))
        weight = case.normal(*lanes(draw, case), width)
        return Additive(weight, name, 0.3), oracle.additive(array(weight), name, 0.3)
    if kind == "bilinear":
        weight = case.normal(*lanes(draw, case), width, width)
        return Bilinear(weight, given_scale), oracle.bilinear(array(weight), factor)
    if kind == "none":
        return PositionOnly(), oracle.position_only()
    return exp_dot, lambda q, k, lane: float(np.exp(q @ k))


def draw_position(draw, case, *, hidden):
    """(position, its formula); a tenth of a bias is -inf with `hidden`."""
    kind = draw(st.sampled_from(["none", "alibi", "bias", "both"]))
    part, formula = None, oracle.no_bias
    if kind in ("alibi", "both"):
        slopes = case.normal(*lanes(draw, case))
        offset = draw(st.integers(-3, 5))
        part, formula = Alibi(slopes, offset), oracle.alibi(array(slopes), offset)
    if kind in ("bias", "both"):
        axes = (case.n, case.m)
        shape = draw(st.sampled_from([axes, (case.h, *axes), (case.b, 1, *axes), (1, axes[1])]))
        bias = case.normal(*shape)
        with torch.no_grad():
            bias[torch.from_numpy(case.random.random(shape) < 0.1 * hidden)] = -torch.inf
        own = Bias(bias)
        part = own if part is None else part + own
        formula = oracle.both(formula, oracle.explicit(array(bias)))
    return part, formula


def draw_mask(draw, case, depth=2):
    if depth and draw(st.booleans()):
        one, sees = draw_mask(draw, case, depth - 1)
        if draw(st.booleans()):
            return ~one, lambda *at: not sees(*at)
        other, also = draw_mask(draw, case, depth - 1)
        if draw(st.booleans()):
            return one & other, lambda *at: sees(*at) and also(*at)
        return one | other, lambda *at: sees(*at) or also(*at)
    b, n, m, random = case.b, case.n, case.m, case.random
    offset = draw(st.integers(-n - 2, m + 2))
    kind = draw(st.sampled_from(["causal", "window", "documents", "prefix", "padding", "dense"]))
    if kind == "causal":
        return Causal(offset), oracle.causal(offset)
    if kind == "window":
        left, right = (draw(st.one_of(st.none(), st.integers(0, 4))) for _ in range(2))
        return Window(left, right, offset), oracle.window(left, right, offset)
    if kind == "documents":
        ids, key_ids = random.integers(0, 3, (b, n)), random.integers(0, 3, (b, m))
        if n == m and draw(st.booleans()):
            return Documents(torch.from_numpy(ids)), oracle.documents(ids)
        tensors = torch.from_numpy(ids), torch.from_numpy(key_ids)
        return Documents(*tensors), oracle.documents(ids, key_ids)
    if kind == "prefix":
        if draw(st.booleans()):
            length = draw(st.integers(0, m + 2))
            return Prefix(length), oracle.prefix(length)
        lengths = random.integers(0, m + 1, b)
        return Prefix(torch.from_numpy(lengths)), oracle.prefix(lengths)
    if kind == "padding":
        if draw(st.booleans()):
            lengths = random.integers(0, m + 1, b)
            keep = np.arange(m) < lengths[:, None]
            return Padding.of_lengths(torch.from_numpy(lengths), m), oracle.padding(keep)
        keep = random.random((b, m)) < 0.7
        return Padding(torch.from_numpy(keep)), oracle.padding(keep)
    shapes = [(n, m), (case.h, n, m), (b, case.h, n, m), (b, 1, 1, m), (n, 1)]
    keep = random.random(draw(st.sampled_from(shapes))) < 0.6
    return Dense(torch.from_numpy(keep)), oracle.stored(keep)


def draw_normalizer(draw, case, kind):
    if kind == "softmax":
        return Softmax(), oracle.softmax(), None
    if kind == "sink":
        if draw(st.booleans()):
            return Softmax(sink=0.5), oracle.softmax(0.5), 0.5
        sink = case.normal(*lanes(draw, case))
        return Softmax(sink), oracle.softmax(array(sink)), array(sink)
    if kind == "sigmoid":
        return Sigmoid(-0.5), oracle.sigmoid(-0.5), None
    if kind == "relu":
        mean = draw(st.booleans())
        return Relu(mean), oracle.relu(mean), None
    if kind == "sum":
        return RowSum(), oracle.row_sum(), None
    return Identity(), oracle.identity(), None


@st.composite
def cases(draw):
    g, group = draw(st.sampled_from([(1, 1), (2, 1), (1, 2), (2, 2), (1, 3)]))
    # One number in seven is an empty axis; hypothesis' own integers would give many more.
    lengths = st.sampled_from([2, 5, 9, 1, 4, 8, 0])
    n = draw(lengths)
    m = n if draw(st.booleans()) else draw(lengths)
    random = np.random.default_rng(draw(st.integers(0, 10**6)))
    case = Case(draw(st.integers(1, 2)), g * group, g, n, m, random)
    width, value_width = draw(st.sampled_from([(1, 1), (3, 2), (2, 3)]))
    case.query = case.normal(case.b, case.h, n, width)
    case.key = case.normal(case.b, g, m, width)
    case.value = case.normal(case.b, g, m, value_width)
    kind = draw(st.sampled_from(["softmax", "sink", "sigmoid", "relu", "sum", "identity"]))
    score, case.score = draw_score(draw, case, width, positive=kind == "sum")
    position, case.bias = None, oracle.no_bias
    if kind != "sum":
        position, case.bias = draw_position(draw, case, hidden=kind != "identity")
    mask, case.keep = draw_mask(draw, case) if draw(st.booleans()) else (None, oracle.everything)
    normalizer, case.normalizer, case.sink = draw_normalizer(draw, case, kind)
    case.parts = {"score": score, "position": position, "mask": mask, "normalizer": normalizer}
    return case


@drawn
@given(cases())
def test_output_in_both_forms(case):
    expected = oracle.product(case.weights(), array(case.value))
    for form in FORMS:
        same(case.matrix().matmul(case.value, form=form), expected)
    same(case.matrix() @ case.value, expected)
    x = torch.from_numpy(case.random.standard_normal((case.b, case.h, case.n, 2)))
    same(case.matrix().mT @ x, oracle.transposed_product(case.weights(), x.numpy()))


@drawn
@given(cases(), st.data())
def test_rows_columns_and_blocks(case, data):
    weights, logits, A = case.weights(), case.logits(), case.matrix()
    same(A.dense(), weights)
    same(A.logits(), logits)
    rows = data.draw(st.lists(st.integers(-case.n, case.n - 1), max_size=4)) if case.n else []
    columns = data.draw(st.lists(st.integers(-case.m, case.m - 1), max_size=4)) if case.m else []
    few, some = torch.tensor(rows, dtype=torch.long), torch.tensor(columns, dtype=torch.long)
    same(A[..., few, :], weights[:, :, rows])
    same(A[..., :, some], weights[..., columns])
    with pytest.raises(ShapeError, match="pair up"):
        A[..., few, some]
    same(A.logits(few, some), logits[:, :, rows][..., columns])
    same(A[..., 1:7:2, 2:], weights[..., 1:7:2, 2:])
    if isinstance(A.score, Custom):  # it may hold tensors for all heads
        with pytest.raises(ShapeError, match="all of them first"):
            A[-1, 0]
    else:
        same(A[-1, 0].dense(), weights[-1, 0])
        same(A[:, 1:].dense(), weights[:, 1:])
    assert isinstance(A[..., 0:99, :], torch.Tensor)  # bounds ask for rows, however few there are
    for i in rows[:1]:
        same(A[..., i, :], weights[..., i, :])
        for j in columns[:1]:
            same(A[..., i, j], weights[..., i, j])
            same(A[..., i, j][0, -1], weights[0, -1, i, j])


@drawn_few
@given(cases(), st.integers(-2, 3), st.integers(1, 10))
def test_looks(case, offset, size):
    weights, logits, A = case.weights(), case.logits(), case.matrix()
    same(A.logsumexp(), oracle.logsumexp(logits, case.sink))
    same(A.entropy(), oracle.entropy(weights))
    same(A.received(), oracle.received(weights))
    same(A.distance(offset=offset), oracle.mean_distance(weights, offset))
    for reduce in ("mean", "max"):
        same(A.pool(size, reduce), oracle.pool(weights, size, reduce))


@drawn
@given(cases(), st.integers(1, 11))
def test_topk(case, k):
    """Values as expected; indices by what they name, because equal weights have no order."""
    weights, visible = case.weights(), case.logits() > -np.inf
    values, indices = case.matrix().topk(k)
    same(values, oracle.topk(weights, case.logits(), k).reshape(case.b, case.h, case.n, k))
    assert indices.shape == values.shape
    assert indices.dtype == torch.int64
    for b, h, i in np.ndindex(case.b, case.h, case.n):
        chosen = [j for j in indices[b, h, i].tolist() if j >= 0]
        count = min(k, visible[b, h, i].sum())
        assert len(set(chosen)) == len(chosen) == count
        assert indices[b, h, i, count:].eq(-1).all()
        assert visible[b, h, i, chosen].all()
        same(values[b, h, i, :count], weights[b, h, i, chosen])


@drawn
@given(st.data(), st.integers(0, 9), st.integers(0, 9))
def test_mask_algebra_is_logic(data, n, m):
    case = Case(2, 2, 2, n, m, np.random.default_rng(data.draw(st.integers(0, 10**6))))
    mask, keep = draw_mask(data.draw, case, depth=4)
    zeros = torch.zeros(2, 2, n, 1), torch.zeros(2, 2, m, 1)
    A = attention(*zeros, score=lambda q, k, i, j: q @ k.mT + 1, mask=mask, normalizer=Identity())
    expected = np.array(
        [keep((b, h), i, j) for b in range(2) for h in range(2) for i in range(n) for j in range(m)]
    ).reshape(2, 2, n, m)
    np.testing.assert_array_equal(A.dense(), expected)
    same(A @ torch.eye(m), expected.astype(np.float32))


def gradients(case, output):
    """Of a weighted sum of the output, for every tensor of the case."""
    towards = torch.linspace(-1, 2, output.numel(), dtype=output.dtype).reshape(output.shape)
    # Positions alone depend on no tensor: a gradient of zero, not an error of this test.
    total = (output * towards).sum() + 0 * case.query.sum()
    found = torch.autograd.grad(total, case.leaves, materialize_grads=True)
    return [array(gradient) for gradient in found]


@drawn_few
@given(cases())
def test_gradients_are_those_of_dense(case):
    A, some, last = case.matrix(), torch.arange(0, case.n, 2), torch.arange(case.m)[-2:]
    for looked, dense in [
        (A.matmul(case.value, form="tiled"), A.matmul(case.value, form="dense")),
        (A.mT @ A.query, A.dense().mT @ A.query),
        (A[..., some, :], A.dense()[..., some, :]),
        (A[..., :, last], A.dense()[..., :, last]),
        (A[..., some, -2:], A.dense()[..., some, -2:]),
        (A.received(), A.dense().sum(-2)),
    ]:
        for found, expected in zip(gradients(case, looked), gradients(case, dense), strict=True):
            same(found, expected)


DRAWN = torch.Generator().manual_seed(3)


def numbers(*shape):
    """Fixed float64 numbers that require gradients."""
    return torch.randn(shape, dtype=torch.float64, generator=DRAWN).requires_grad_()


def squared_laplace(query, key, i, j):
    gap = (query[..., :, None, :] - key[..., None, :, :]).abs().sum(-1)
    return -gap + 0.1 * (i[:, None] - j)


SCORES = {
    "dot": lambda: Dot(scale=numbers(2)),
    "softcap": lambda: Dot(softcap=2.0),
    "bilinear": lambda: Bilinear(numbers(2, 3, 3)),
    "cosine": lambda: Cosine(numbers(2)),
    "distance": lambda: Distance(numbers(1)),
    "additive": lambda: Additive(numbers(3)),
    "function": lambda: squared_laplace,
}
NORMALIZERS = {
    "softmax": Softmax,
    "sink": lambda: Softmax(numbers(2)),
    "sigmoid": lambda: Sigmoid(0.5),
    "relu": lambda: Relu(mean=True),
    "sum": lambda: RowSum(eps=30.0),
    "identity": Identity,
}


@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("score", SCORES)
def test_gradients_are_finite_differences(score, normalizer):
    query, key, value = numbers(2, 3, 3), numbers(1, 4, 3), numbers(1, 4, 2)
    score, normalizer = SCORES[score](), NORMALIZERS[normalizer]()
    slopes, bias = numbers(2), numbers(3, 4)
    position = Alibi(slopes) + Bias(bias)
    held = [t for part in (score, normalizer) for t in getattr(part, "__dict__", {}).values()]
    held = [slopes, bias, *(t for t in held if isinstance(t, torch.Tensor))]

    def results(query, key, value, *_):
        A = attention(
            query, key, score=score, position=position, mask=Causal(1), normalizer=normalizer
        )
        return A.matmul(value, form="dense"), A.logsumexp(), A[..., 1, :], A.received()

    # Fast mode compares one random projection of the Jacobian.
    assert torch.autograd.gradcheck(results, (query, key, value, *held), fast_mode=True)
