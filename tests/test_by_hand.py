"""Cases small enough to work on paper, and what must hold without computing anything."""

import math

import pytest
import torch

from regard import (
    Additive,
    Alibi,
    Bias,
    Bilinear,
    Causal,
    Cosine,
    Distance,
    Documents,
    Dot,
    Dropout,
    Identity,
    Padding,
    PositionOnly,
    Prefix,
    Relu,
    RowSum,
    Sigmoid,
    Softmax,
    Window,
    attention,
)
from regard.form import tiles

FORMS = ["dense", "tiled"]
LN2, LN3 = math.log(2), math.log(3)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(tiles, "SMALLEST_SIDE", 2)
    monkeypatch.setattr(tiles, "TILE_NUMBERS", 1)


def exact(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def random(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


# Worked by hand.


@pytest.mark.parametrize("form", FORMS)
def test_two_tokens_dot_product(form):
    """Scores ln 3 and 0, so weights 3/4 and 1/4; the second token sees 0 and ln 3."""
    tokens = exact([1, 0], [0, 1])
    A = attention(LN3 * tokens, tokens, score=Dot(scale=1.0))
    close(A.dense(), exact([3 / 4, 1 / 4], [1 / 4, 3 / 4]))
    close(A.matmul(exact([4], [8]), form=form), exact([5], [7]))  # 3/4 4 + 1/4 8, 1/4 4 + 3/4 8
    close(A.logsumexp(), exact(math.log(4), math.log(4)))  # log(3 + 1)
    close(A.received(), exact(1, 1))


def test_default_scale_is_one_over_the_root_of_the_width():
    """Width 4: q.k = 4 and 0, halved to 2 and 0."""
    A = attention(exact([1, 1, 1, 1]), exact([1, 1, 1, 1], [0, 0, 0, 0]))
    close(A.logits(), exact([2, 0]))
    A = attention(exact([1, 1]), exact([3, 4], [0, 0]), score=Dot(scale=0.0))
    close(A.dense(), exact([1 / 2, 1 / 2]))  # a scale of zero is a scale, not "unset"


def test_additive_relevance():
    """w . relu(q + k): q = (1, -2), k = (1, 1) gives 2 + 0; k = (0, 4) gives 1 + 3 2."""
    query, keys, weight = exact([1, -2]), exact([1, 1], [0, 4]), exact(1, 3)
    A = attention(query, keys, score=Additive(weight, "relu"))
    close(A.logits(), exact([2, 7]))
    # tanh(ln 2) = (2 - 1/2) / (2 + 1/2) = 3/5, and tanh is odd
    A = attention(exact([LN2, 0]), exact([0, -LN2]), score=Additive(exact(10, 5)))
    close(A.logits(), exact([10 * 3 / 5 - 5 * 3 / 5]))
    # leaky_relu(-2) = -0.4 at slope 0.2; sigmoid(ln 3) = 3/4
    leaky = Additive(exact(1), "leaky_relu")
    close(attention(exact([-3]), exact([1]), score=leaky).logits(), exact([-0.4]))
    sigmoid = Additive(exact(1), "sigmoid")
    close(attention(exact([LN3]), exact([0]), score=sigmoid).logits(), exact([3 / 4]))


def test_other_scores():
    """q = (3, 4) has length 5; k = (1, 0): cosine 3/5, squared distance 4 + 16."""
    query, key = exact([3, 4]), exact([1, 0])
    close(attention(query, key, score=Cosine()).logits(), exact([0.6]))
    close(attention(query, key, score=Distance()).logits(), exact([-20]))
    close(attention(query, key, score=PositionOnly()).logits(), exact([0]))
    wide = Bilinear(exact([1, 0, 2], [0, 1, 0]))  # q^T W = (3, 4, 6)
    close(attention(query, exact([1, 1, 1]), score=wide).logits(), exact([13]))
    capped = Dot(scale=1.0, softcap=3 / LN2)  # s = 3: cap tanh(ln 2) = cap 3/5
    close(attention(query, key, score=capped).logits(), exact([3 / LN2 * 3 / 5]))


@pytest.mark.parametrize("form", FORMS)
def test_the_chain_of_four_tokens(form):
    """Q = W^q I, K = W^k I, V = W^v I, A = K^T Q, A' = softmax, O = V A', tokens as columns.

    I = identity, W^q = ln 2 times the shift a^i -> a^(i+1), W^k = identity, W^v = 10 identity. So
    q^i . k^j = ln 2 where j = i + 1 (mod 4), else 0, and a row of weights is 2/5 there, else 1/5.
    """
    inputs = torch.eye(4, dtype=torch.float64)
    w_q = LN2 * torch.eye(4, dtype=torch.float64).roll(1, dims=0)
    queries, keys, values = w_q @ inputs, inputs, 10 * inputs
    assert queries[1, 0] == LN2
    one_column_each_token = torch.softmax(keys.T @ queries, dim=0)  # A' of the lecture: keys down
    A = attention(queries.T, keys.T, score=Dot(scale=1.0))
    row = exact([0.2, 0.4, 0.2, 0.2])
    close(A.dense(), torch.cat([row.roll(i, dims=1) for i in range(4)]))
    close(A.dense(), one_column_each_token.T)
    output = A.matmul(values.T, form=form)
    close(output, torch.cat([10 * row.roll(i, dims=1) for i in range(4)]))
    close(output, (values @ one_column_each_token).T)


def test_heads_are_a_batch_axis_and_concatenate():
    """Head 0 looks at itself, head 1 at the other: b^i = (own value, other's value)."""
    far = 100.0  # e^-100 is below rounding
    eye = torch.eye(2, dtype=torch.float64)
    query, key = far * torch.stack([eye, eye.flip(0)]), torch.stack([eye, eye])
    value = torch.stack([exact([1], [2]), exact([30], [40])])
    heads = attention(query, key, score=Dot(scale=1.0)) @ value
    close(heads, torch.stack([exact([1], [2]), exact([40], [30])]))
    joined = heads.transpose(0, 1).reshape(2, 2)
    close(joined @ exact([1, 0], [1, 1]), exact([41, 40], [32, 30]))


def test_grouped_queries_share_key_heads():
    """Four query heads on two key heads: 0 and 1 read key head 0, 2 and 3 read key head 1."""
    value = exact([[5]], [[7]])
    output = attention(exact(*[[[1]]] * 4), exact([[1]], [[1]])) @ value
    close(output.flatten(), exact(5, 5, 7, 7))


def test_alibi():
    """Slopes of 8 heads are 1/2, 1/4, ...; at distances 0, 1, 2 of slope ln 2: 4/7, 2/7, 1/7."""
    close(Alibi.of(8).slopes.double(), exact(*[2.0**-k for k in range(1, 9)]))
    tokens = torch.zeros(3, 1, dtype=torch.float64)
    alibi = Alibi(torch.tensor(LN2, dtype=torch.float64))
    A = attention(tokens, tokens, position=alibi, mask=Causal())
    close(A.dense(), exact([1, 0, 0], [1 / 3, 2 / 3, 0], [1 / 7, 2 / 7, 4 / 7]))
    last = attention(tokens[:1], tokens, position=Alibi(alibi.slopes, offset=2))
    close(last.dense(), exact([1 / 7, 2 / 7, 4 / 7]))


def test_normalizers():
    """Logits ln 2 and -1: plus one, 2 / (2 + 1/e + 1); sigmoid(ln 2) = 2/3."""
    query, key = exact([1]), exact([LN2], [-1])
    rows = {
        Softmax(sink=0.0): [2 / (3 + 1 / math.e), 1 / (3 * math.e + 1)],
        Sigmoid(): [2 / 3, 1 / (1 + math.e)],
        Relu(): [LN2, 0],
        Relu(mean=True): [LN2 / 2, 0],
        RowSum(): [LN2 / (LN2 - 1), -1 / (LN2 - 1)],
        Identity(): [LN2, -1],
    }
    for normalizer, row in rows.items():
        close(attention(query, key, normalizer=normalizer).dense(), exact(row))
    only_sink = attention(query, key, normalizer=Softmax(0.0), mask=Prefix(0))
    close(only_sink.logsumexp(), exact(0))  # log e^0


@pytest.mark.parametrize("form", FORMS)
def test_causal_window(form):
    """The token and one before it, all scores equal: running means of two."""
    zeros = torch.zeros(4, 1, dtype=torch.float64)
    A = attention(zeros, zeros, mask=Causal() & Window(1, 9))
    close(A.matmul(exact([2], [4], [8], [16]), form=form), exact([2], [3], [6], [12]))
    close(A.entropy(), exact(0, LN2, LN2, LN2))
    close(A.distance(), exact(0, 0.5, 0.5, 0.5))
    close(A.received(), exact(1.5, 1, 1, 0.5))
    close(A.pool(3), exact([3 / 9, 0], [0.5 / 3, 0.5]))  # cells 3x3, 3x1, 1x3, 1x1
    close(A.pool(3, "max"), exact([1, 0], [0.5, 0.5]))
    assert A.topk(3).indices[0].tolist() == [0, -1, -1]


# What must hold without computing anything.


@pytest.mark.parametrize("score", [Dot(), Additive(random(3)), Distance(), Cosine()], ids=str)
def test_without_positions_permuted_tokens_give_permuted_outputs(score):
    tokens, value, order = random(2, 7, 3), random(2, 7, 2), torch.randperm(7)
    output = attention(tokens, tokens, score=score) @ value
    moved = attention(tokens[:, order], tokens[:, order], score=score) @ value[:, order]
    close(moved, output[:, order])
    alibi = {"score": score, "position": Alibi.of(2)}
    output = attention(tokens, tokens, **alibi) @ value
    moved = attention(tokens[:, order], tokens[:, order], **alibi) @ value[:, order]
    assert (moved - output[:, order]).abs().max() > 1e-3


@pytest.mark.parametrize("cached", range(8))
@pytest.mark.parametrize("form", FORMS)
def test_queries_that_continue_a_cache_see_what_the_whole_sees(form, cached):
    query, key, value = random(3, 2, 7, 3).unbind()

    def parts(offset):
        mask = Causal(offset) & Window(3, None, offset) | Prefix(1)
        return {"position": Alibi.of(2, offset=offset), "mask": mask}

    whole = attention(query, key, **parts(0)).matmul(value, form=form)
    later = attention(query[:, cached:], key, **parts(cached)).matmul(value, form=form)
    close(later, whole[:, cached:])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["key", "value"])
@pytest.mark.parametrize("form", FORMS)
def test_a_bad_token_reaches_the_rows_that_see_it_and_no_other(form, where, bad):
    """Gradients too: rows that do not see it give the gradient of a matrix without it."""
    mask = Documents(torch.tensor([0, 1, 0, 1, 0, 1, 0]))  # key 3 is seen by odd rows
    tensors = {"query": random(7, 3), "key": random(7, 3, seed=1), "value": random(7, 2, seed=2)}
    results = []
    for broken in (False, True):
        own = {name: tensor.clone() for name, tensor in tensors.items()}
        if broken:
            own[where][3] = bad
        for tensor in own.values():
            tensor.requires_grad_()
        output = attention(own["query"], own["key"], mask=mask).matmul(own["value"], form=form)
        output[::2].sum().backward()
        results.append((output.detach(), [own[name].grad for name in tensors]))
    (clean, gradients), (output, found) = results
    close(output[::2], clean[::2])
    assert not output[1::2].isfinite().any()
    for one, other in zip(found, gradients, strict=True):
        close(one, other)


@pytest.mark.parametrize("form", FORMS)
def test_what_stands_in_padded_keys_changes_nothing(form):
    query, key, value = random(2, 2, 5, 3), random(2, 2, 5, 3, seed=1), random(2, 2, 5, 2, seed=2)
    key[1, :, 3:] = value[1, :, 3:] = math.nan
    query.requires_grad_(), key.requires_grad_(), value.requires_grad_()
    mask = Padding.of_lengths(torch.tensor([5, 3]), 5)
    A = attention(query, key, mask=mask)
    output = A.matmul(value, form=form)
    close(output[1], attention(query[1], key[1, :, :3]).matmul(value[1, :, :3], form=form))
    output.square().sum().backward()
    assert query.grad.isfinite().all()
    assert key.grad[1, :, 3:].eq(0).all()
    assert value.grad[1, :, 3:].eq(0).all()
    for look in (A.logsumexp(), A.entropy(), A.received(), A.distance(), A.pool(2), A.topk(2)[0]):
        assert look.isfinite().all()


@pytest.mark.parametrize(
    "normalizer",
    [Softmax(), Softmax(0.5), Sigmoid(), Relu(mean=True), RowSum(), Identity()],
    ids=str,
)
@pytest.mark.parametrize("form", FORMS)
def test_minus_infinity_in_a_bias_forbids_as_a_mask_does(form, normalizer):
    keep = torch.tensor([[1, 0, 1, 1], [0, 0, 0, 0], [0, 1, 1, 1]], dtype=torch.bool)
    query, key, value = random(3, 2), random(4, 2, seed=1), random(4, 2, seed=2)
    finite = random(3, 4, seed=3)
    results = []
    hidden = finite.where(keep, -math.inf)
    for position, mask in [(Bias(hidden), None), (Bias(finite), keep)]:
        own = [tensor.clone().requires_grad_() for tensor in (query, key, value)]
        A = attention(*own[:2], position=position, mask=mask, normalizer=normalizer)
        output = A.matmul(own[2], form=form)
        gradients = torch.autograd.grad(output.square().sum(), own)
        looks = [A.dense(), A.entropy(), A.logsumexp(), A.received(), A.pool(2)]
        results.append([output, *gradients, *looks])
    for of_bias, of_mask in zip(*results, strict=True):
        close(of_bias, of_mask)
    assert results[0][0][1].eq(0).all()


def test_topk_does_not_name_keys_that_a_bias_forbids():
    zeros = torch.zeros(3, 1)
    A = attention(zeros[:1], zeros, position=Bias(torch.tensor([[-math.inf, 1.0, 0.0]])))
    assert A.topk(3).indices.tolist() == [[1, 2, -1]]


def test_pool_by_maximum_of_negative_weights():
    A = attention(exact([1]), exact([-2], [-3]), score=Dot(scale=1.0), normalizer=Identity())
    close(A.pool(2, "max"), exact([-2]))


@pytest.mark.parametrize("size", [1e2, 1e4, 1e6])
def test_huge_logits(size):
    """float32: the tiled error against float64 is at most twice that of dense, plus a rounding."""
    query, key, value = random(9, 4), size * random(9, 4, seed=1), random(9, 3, seed=2)
    truth = attention(query.float().double(), key.float().double()) @ value.float().double()
    A, value = attention(query.float(), key.float()), value.float()
    dense, tiled = (A.matmul(value, form=form) for form in FORMS)
    assert tiled.isfinite().all()
    rounding = torch.finfo(torch.float32).eps * value.abs().max()
    assert (tiled - truth).abs().max() <= 2 * (dense - truth).abs().max() + rounding


@pytest.mark.parametrize("form", FORMS)
def test_strides_do_not_matter(form):
    query = random(3, 9, 2, 5).transpose(1, 2)  # [batch, heads, n, d] out of [batch, n, heads, d]
    key = random(1, 1, 9, 5).expand(3, 2, 9, 5)
    value = random(3, 2, 9, 8, seed=1)[..., ::2]
    strided = attention(query, key, mask=Causal()).matmul(value, form=form)
    plain = [tensor.contiguous() for tensor in (query, key, value)]
    close(strided, attention(*plain[:2], mask=Causal()).matmul(plain[2], form=form))


# Dropout and functions of the user.


def test_dropout_is_the_same_matrix_every_time_it_is_looked_at():
    tokens = [tensor.requires_grad_() for tensor in random(3, 2, 9, 3).unbind()]
    query, key, value = tokens
    A = attention(query, key, mask=Causal(), dropout=Dropout(0.4, seed=7))
    again = attention(query, key, mask=Causal(), dropout=Dropout(0.4, seed=7))
    other = attention(query, key, mask=Causal(), dropout=Dropout(0.4, seed=8))
    outputs = [A.matmul(value, form=form) for form in FORMS]
    close(*outputs)
    close(again @ value, A @ value)
    assert (other @ value - A @ value).abs().max() > 1e-3
    weights = A.dense()
    close(weights @ value, A @ value)
    close(A[..., 4:6, :], weights[..., 4:6, :])
    close(A[..., 2], weights[..., 2])
    plain = attention(query, key, mask=Causal()).dense()
    kept = weights != 0
    close(weights, torch.where(kept, plain / 0.6, 0))
    for output in outputs:
        # The gradient of a sum of outputs is that of fixed kept pairs.
        found = torch.autograd.grad(output.square().sum(), tokens, retain_graph=True)
        fixed = ((plain * kept / 0.6) @ value).square().sum()
        expected = torch.autograd.grad(fixed, tokens, retain_graph=True)
        for one, two in zip(found, expected, strict=True):
            close(one, two)


@pytest.mark.parametrize("probability", [0.1, 0.5, 0.9])
def test_dropout_rate(probability):
    """Counts of rows, columns and heads stay within 5 standard deviations of a binomial."""
    zeros = torch.zeros(4, 64, 1)
    kept = attention(zeros, zeros, dropout=Dropout(probability, seed=3)).dense() != 0
    for axes in [(0, 1, 2), (1, 2), (0, 2), (0, 1)]:
        count = kept.numel() / kept.float().mean(axes).numel()
        spread = math.sqrt(probability * (1 - probability) / count)
        assert (kept.double().mean(axes) - (1 - probability)).abs().max() < 5 * spread
    equal_heads = (kept[0] == kept[1]).double().mean() - (1 - 2 * probability * (1 - probability))
    assert equal_heads.abs() < 5 * 0.5 / 64


LEAF = random(3, 3, seed=5).requires_grad_()
TABLE = LEAF.tanh()  # captured, and not a leaf


def closure(module, local):
    def score(query, key, i, j):
        near = torch.exp(-local.square() * (i[:, None] - j).abs())
        return (query @ TABLE) @ module(key).mT + near

    return score


class Scored(torch.nn.Module):
    """A score that is a module: its own parameters, and those of a part of it."""

    def __init__(self, module, local):
        super().__init__()
        self.module, self.local = module, torch.nn.Parameter(local)

    def forward(self, query, key, i, j):
        return closure(self.module, self.local)(query, key, i, j)


def bound(module, local):
    return Scored(module, local.detach()).forward


@pytest.mark.parametrize("make", [closure, Scored, bound])
def test_a_function_of_the_user_gets_all_its_gradients(make):
    torch.manual_seed(0)
    module = torch.nn.Linear(3, 3, dtype=torch.float64)
    local = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    score = make(module, local if make is closure else local.detach())
    owner = getattr(score, "__self__", score)
    held = [LEAF, *(owner.parameters() if make is not closure else [local, *module.parameters()])]
    query, key, value = (tensor.requires_grad_() for tensor in random(3, 2, 5, 3).unbind())
    A = attention(query, key, score=score, mask=Causal())
    found = {
        form: torch.autograd.grad(
            A.matmul(value, form=form).square().sum(), [query, key, value, *held], retain_graph=True
        )
        for form in FORMS
    }
    for tiled, dense in zip(found["tiled"], found["dense"], strict=True):
        assert dense.abs().max() > 0
        close(tiled, dense)
