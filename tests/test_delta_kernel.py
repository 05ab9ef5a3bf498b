"""The kernels of erasing and of a decay for each channel: the numbers of PyTorch's chunks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from recurrences import HOWS, LAYOUTS, WEIGHTS, Case, assert_same, results
from test_recurrent_kernel import CPU, ISAS, one_thread_again  # noqa: F401
from torch.utils.checkpoint import checkpoint

from regard import Causal, Documents, Features, Identity, RowSum, attention, recur
from regard.feature_map import identity, unit
from regard.form import scan
from regard.form.chunks import Tokens
from regard.kernel import extension
from regard.kernel.recurrence import How

pytestmark = pytest.mark.skipif(CPU is None, reason="the compiled kernels are not installed")
ROWS = {
    "GLA": {"decay": "channel"},
    "GLA, strong": {"decay": "channel, strong"},
    "GLA, forgets": {"decay": "channel, forgets"},
    "GLA, all tokens": {"decay": "channel of all tokens"},
    "DeltaNet": {"erases": "delta"},
    "RetNet, erasing": {"decay": "head", "erases": "delta"},
    "Gated DeltaNet": {"decay": "token", "erases": "delta"},
    "Gated DeltaNet, forgets": {"decay": "forgets", "erases": "delta"},
    "KDA": {"decay": "channel", "erases": "delta"},
    "KDA, forgets": {"decay": "channel, forgets", "erases": "other"},
    "other": {"decay": "channel", "erases": "other"},
}
FEW = {name: ROWS[name] for name in ("GLA", "DeltaNet", "Gated DeltaNet", "KDA, forgets")}


def rows(which):
    return pytest.mark.parametrize("row", which.values(), ids=which)


@rows(ROWS)
@pytest.mark.parametrize("n", [2, 15, 33, 64, 65, 127, 200, 600])
def test_lengths(n, row):
    assert_same(Case(n, 5, **row))


@rows(FEW)
@pytest.mark.parametrize("how", list(HOWS.values())[1:], ids=list(HOWS)[1:])
def test_sums_divide_and_features_are_made_around_it(how, row):
    assert_same(Case(130, 5, **row, how=how))


@rows(FEW)
@pytest.mark.parametrize(
    ("d", "e"), [(1, 1), (1, 17), (3, 16), (16, 3), (17, 80), (64, 64), (80, 1), (128, 128)]
)
def test_widths(d, e, row):
    assert_same(Case(130, d, e, **row))


@rows(ROWS)
@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set(isa, row):
    with extension.instruction_set(isa):
        for n in (30, 150):
            assert_same(Case(n, 20, 17, **row))


LANES = {
    "no axes": ((), (), ()),
    "heads share keys": ((2, 2, 3), (2, 2, 1), (2, 2, 1)),
    "heads have decays": ((2, 2, 3), (2, 2, 1), (3,)),
    "a batch shares decays": ((3, 1, 2), (1, 1, 2), (1, 1, 1)),
    "six axes": ((1, 2, 1, 1, 2, 1), (2, 1, 1, 1, 1), (2, 1)),
}


@pytest.mark.parametrize("threads", [1, 2, 3])
@rows(FEW)
@pytest.mark.parametrize("lanes", LANES.values(), ids=LANES)
def test_lanes_broadcast(lanes, row, threads):
    """Threads that have no lane of their own take columns of values."""
    torch.set_num_threads(threads)
    assert_same(Case(100, 6, 70, **row, lanes=lanes))


@pytest.mark.parametrize("threads", [1, 2, 3, 4])
@rows(FEW)
def test_threads_may_change_rounding_and_nothing_else(row, threads):
    torch.set_num_threads(threads)
    case = Case(200, 17, 130, **row, lanes=((1,), (1,), (1,)))
    assert_same(case)
    first, again = (results(case, scan.scan) for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)


@rows(FEW)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_layouts(layout, row):
    case = Case(70, 8, 6, **row)
    given = [x if x is None else layout(x) for x in case.draw()]
    with torch.no_grad():
        tokens = Tokens(*given[:-1])
        one, other = (f(tokens, given[-1], WEIGHTS) for f in (scan.scan, scan.in_pytorch))
    for got, wanted in zip(one, other, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
    assert_same(case, given)


@rows(FEW)
def test_each_gradient_alone(row):
    case, found = Case(130, 5, 7, **row), []
    for function in (scan.scan, scan.in_pytorch):
        for name in case.names:
            given = dict(zip(case.names, case.draw(), strict=True))
            if given[name] is None:
                continue
            leaf = given[name].requires_grad_()
            *tokens, state = given.values()
            output, after = function(Tokens(*tokens), state, WEIGHTS)
            loss = output.sum() + (after.sum() if after.requires_grad else 0)
            found.append(torch.autograd.grad(loss, leaf)[0])
    half = len(found) // 2
    for got, wanted in zip(found[:half], found[half:], strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-11)


@rows(FEW)
def test_a_state_alone_has_no_queries(row):
    case, found = Case(150, 5, 7, **row), []
    for function in (scan.scan, scan.in_pytorch):
        _, *leaves = (x if x is None else x.requires_grad_() for x in case.draw())
        output, after = function(Tokens(None, *leaves[:-1]), leaves[-1], WEIGHTS)
        assert output is None
        learned = [x for x in leaves if x is not None]
        found.append((after, *torch.autograd.grad(after.square().sum(), learned)))
    for got, wanted in zip(*found, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-11)


@rows(FEW)
def test_it_differentiates_twice_and_in_checkpoints(row):
    leaves = [x if x is None else x.requires_grad_() for x in Case(5, 2, 2, **row).draw()]

    def function(*given):
        return scan.scan(Tokens(*given[:-1]), given[-1], WEIGHTS)

    finite = [x for x in leaves if x is not None and x.isfinite().all()]
    if len(finite) == sum(x is not None for x in leaves):  # no step from -inf has a slope
        assert torch.autograd.gradcheck(function, leaves)
        assert torch.autograd.gradgradcheck(function, leaves)
    found = []
    for use_reentrant in (None, True, False):
        if use_reentrant is None:
            output, after = function(*leaves)
        else:
            output, after = checkpoint(function, *leaves, use_reentrant=use_reentrant)
        for x in finite:
            x.grad = None
        (output.sum() + after.square().sum()).backward()
        found.append([x.grad.clone() for x in finite])
    for other in found[1:]:
        assert all(torch.equal(x, y) for x, y in zip(found[0], other, strict=True))


@rows({**FEW, "KDA": ROWS["KDA"]})
def test_float32_is_as_near_as_pytorch(row):
    """In the mean over a tensor: each number of either is rounded differently."""
    case = Case(1000, 32, 24, **row)
    exact = results(case, scan.in_pytorch)
    given = [x if x is None else x.float() for x in case.draw()]
    one, other = (results(case, f, given) for f in (scan.scan, scan.in_pytorch))
    for name, wanted in exact.items():
        error, theirs = ((x[name].double() - wanted).norm() for x in (one, other))
        assert error <= 2 * theirs, name


@pytest.mark.parametrize("erases", ["nothing", "delta"])
def test_the_gradient_of_a_strong_decay_has_digits(erases):
    """It is e^-30 of what the pairs around it weigh: no difference of their sums has any left."""
    case, found = Case(100, 6, 3, "channel", erases=erases), []
    for function in (scan.scan, scan.in_pytorch):
        given = dict(zip(case.names, case.draw(), strict=True))
        decay = given["log_decay"] = (given["log_decay"] - 30).requires_grad_()
        *tokens, state = given.values()
        output, _ = function(Tokens(*tokens), state, WEIGHTS)
        found.append(torch.autograd.grad(output.sum(), decay)[0])
    assert 0 < found[1].abs().max() < 1e-10
    torch.testing.assert_close(*found, rtol=1e-11, atol=1e-26)


SCORES = {
    "GLA": lambda decay, beta: Features(identity, log_decay=decay),
    "GLA, elu": lambda decay, beta: Features(log_decay=decay),
    "DeltaNet": lambda decay, beta: Features(unit, beta=beta),
    "Gated DeltaNet": lambda decay, beta: Features(unit, log_decay=decay[..., :1], beta=beta),
    "KDA": lambda decay, beta: Features(unit, log_decay=decay, beta=beta),
}


@pytest.mark.parametrize("score", SCORES.values(), ids=SCORES)
def test_end_to_end_with_documents_and_states(score):
    draw = torch.Generator().manual_seed(3)
    query, key, value = torch.randn(3, 2, 200, 8, generator=draw, dtype=torch.float64)
    decay = -torch.rand(2, 200, 8, generator=draw, dtype=torch.float64)
    beta = torch.rand(2, 200, 1, generator=draw, dtype=torch.float64)
    leaves = [x.requires_grad_() for x in (query, key, value, decay, beta)]
    normalizer = RowSum() if score is SCORES["GLA, elu"] else Identity()
    ids = torch.arange(4).repeat_interleave(torch.tensor([70, 1, 64, 65]))
    for mask in (Causal(), Causal() & Documents(ids)):
        A = attention(query, key, score=score(decay, beta), mask=mask, normalizer=normalizer)
        assert " in C++ for " in A.explain(value).kernel
        found = []
        for form in ("recurrent", "dense"):
            output = A.matmul(value, form=form)
            learned = torch.autograd.grad(output.square().sum(), leaves, allow_unused=True)
            found.append([output, *(x for x in learned if x is not None)])
        for got, wanted in zip(*found, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-11)
    parts = {"mask": Causal(), "normalizer": normalizer}
    whole, end = recur(attention(query, key, score=score(decay, beta), **parts), value)
    for sizes in ([90, 1, 109], [64, 136], [1, 199]):
        state, outputs = None, []
        for q, k, v, g, b in zip(*(x.split(sizes, -2) for x in leaves), strict=True):
            output, state = recur(attention(q, k, score=score(g, b), **parts), v, state)
            outputs.append(output)
        torch.testing.assert_close(torch.cat(outputs, -2), whole, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(state, end, rtol=1e-12, atol=1e-12)


@rows(FEW)
def test_a_forgotten_state_may_overflow(row):
    """What came before a token with a decay of -inf for all channels does not matter."""
    case = replace(Case(300, 3, 40, **row), decay="channel" if "GLA" in str(row) else "token")
    given = dict(zip(case.names, case.draw(), strict=True))
    given["log_decay"][..., 192, :] = -torch.inf
    found = []
    for _ in range(2):
        *tokens, state = given.values()
        output, after = scan.scan(Tokens(*tokens), state, How(None))
        found.append((output[:, 192:], after))
        given["state"] = given["state"] * 1e300
        given["value"] = given["value"].clone()
        given["value"][:, :128] *= 1e300
    for got, wanted in zip(*found, strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("name", ["log_decay", "beta"])
@pytest.mark.parametrize("wide", [1, 5])
@pytest.mark.parametrize("at", [0, 3, 70, 71, 100, 199])
def test_a_document_ends_what_nan_did(at, wide, name, kernels, monkeypatch):
    """As in dense: outputs of the same document, from the first pair that the token is between."""
    if not kernels:
        monkeypatch.setattr(scan, "KERNELS", None)
    draw = torch.Generator().manual_seed(3)
    query, key, value = torch.randn(3, 2, 200, 5, generator=draw, dtype=torch.float64)
    told = {
        "log_decay": -torch.rand(2, 200, wide, generator=draw, dtype=torch.float64),
        "beta": torch.rand(2, 200, 1, generator=draw, dtype=torch.float64),
    }
    ids = torch.arange(4).repeat_interleave(torch.tensor([70, 1, 64, 65]))
    mask, clean = Causal() & Documents(ids), {key: x.clone() for key, x in told.items()}
    told[name][0, at] = torch.nan
    if name == "log_decay":
        del told["beta"], clean["beta"]
    found = []
    for parts in (told, clean):
        leaf = value.clone().requires_grad_()
        A = attention(query, key, score=Features(unit, **parts), mask=mask, normalizer=Identity())
        output = A.matmul(leaf, form="recurrent")
        met = A.matmul(value, form="dense").isnan()
        assert torch.equal(output.isnan(), met)
        output.masked_fill(met, 0).sum().backward()
        assert leaf.grad.isfinite().all()
        found.append((output, leaf.grad))
    end = int((ids <= ids[at]).sum())
    for got, wanted in zip(*found, strict=True):
        torch.testing.assert_close(got[0, end:], wanted[0, end:], rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(got[1], wanted[1], rtol=1e-13, atol=1e-13)


def test_nan_reaches_the_state_of_its_own_document():
    query, key, value = torch.randn(3, 2, 100, 5, dtype=torch.float64)
    decay = -torch.rand(2, 100, 5, dtype=torch.float64)
    decay[0, 20] = decay[1, 80] = torch.nan
    ids = torch.arange(100) // 50
    A = attention(
        query,
        key,
        score=Features(log_decay=decay),
        mask=Causal() & Documents(ids),
        normalizer=Identity(),
    )
    _, state = recur(A, value)
    assert state[0].isfinite().all()
    assert state[1].isnan().all()
    first = attention(
        query[:, :1],
        key[:, :1],
        score=Features(log_decay=decay[:1, 20:21].clone()),
        mask=Causal(),
        normalizer=Identity(),
    )
    assert recur(first, value[:, :1], state)[1].isnan().all()
