"""The kernels of recurrences: the numbers of PyTorch's chunks, which test_recurrent.py compares."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from recurrences import HOWS, INF, LAYOUTS, WEIGHTS, Case, assert_same, results
from test_kernel import run
from torch.utils.checkpoint import checkpoint

from regard import Causal, Documents, Features, RowSum, attention, recur
from regard.form import scan
from regard.form.chunks import Tokens
from regard.kernel import extension, recurrence
from regard.kernel.recurrence import How

CPU = extension.load()
pytestmark = pytest.mark.skipif(CPU is None, reason="the compiled kernels are not installed")
ISAS = [] if CPU is None else CPU.isas()
NAMES = ("query", "key", "value", "log_decay", "state")


@pytest.fixture(autouse=True)
def one_thread_again():
    yield
    torch.set_num_threads(1)


@pytest.mark.parametrize("how", HOWS.values(), ids=HOWS)
@pytest.mark.parametrize("decay", ["none", "head", "token", "strong", "forgets"])
@pytest.mark.parametrize("n", [2, 63, 64, 65, 127, 200, 600])
def test_lengths_and_decays(n, decay, how):
    assert_same(Case(n, decay=decay, how=how))


@pytest.mark.parametrize("how", HOWS.values(), ids=HOWS)
@pytest.mark.parametrize("decay", ["none", "token"])
@pytest.mark.parametrize(
    ("d", "e"), [(1, 1), (1, 17), (3, 16), (16, 3), (17, 80), (64, 64), (80, 1), (128, 128)]
)
def test_widths(d, e, decay, how):
    assert_same(Case(130, d, e, decay, how))


@pytest.mark.parametrize("how", HOWS.values(), ids=HOWS)
@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set(isa, how):
    with extension.instruction_set(isa):
        for decay in ("none", "head", "forgets"):
            assert_same(Case(150, 20, 17, decay, how))


LANES = {
    "no axes": ((), (), ()),
    "heads share keys": ((2, 2, 3), (2, 2, 1), (2, 2, 1)),
    "heads have decays": ((2, 2, 3), (2, 2, 1), (3,)),
    "a batch shares decays": ((3, 1, 2), (1, 1, 2), (1, 1, 1)),
    "queries of one": ((1,), (4,), (4,)),
    "six axes": ((1, 2, 1, 1, 2, 1), (2, 1, 1, 1, 1), (2, 1)),
}


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("how", HOWS.values(), ids=HOWS)
@pytest.mark.parametrize("lanes", LANES.values(), ids=LANES)
def test_lanes_broadcast(lanes, how, threads, monkeypatch):
    monkeypatch.setattr(recurrence, "PIECE_CHUNKS", 1)
    torch.set_num_threads(threads)
    for decay in ("none", "head", "token"):
        assert_same(Case(200, decay=decay, how=how, lanes=lanes))


@pytest.mark.parametrize("threads", [1, 2, 3, 4])
@pytest.mark.parametrize("decay", ["none", "head", "token", "forgets"])
@pytest.mark.parametrize("n", [200, 1000])
def test_threads_may_change_rounding_and_nothing_else(n, decay, threads, monkeypatch):
    """A lane is cut into pieces; at one number of threads the same bits come out every time."""
    monkeypatch.setattr(recurrence, "PIECE_CHUNKS", 1)
    torch.set_num_threads(threads)
    case = Case(n, 17, 6, decay, How(1e-6), lanes=((1,), (1,), (1,)))
    assert_same(case)
    first, again = (results(case, scan.scan) for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_layouts(layout):
    case = Case(70, 8, 6, "token", How(1e-6))
    given = [layout(x) for x in case.draw()]
    with torch.no_grad():
        tokens = Tokens(*given[:-1])
        one, other = (f(tokens, given[-1], case.how) for f in (scan.scan, scan.in_pytorch))
    for got, wanted in zip(one, other, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
    outputs = []
    for function in (scan.scan, scan.in_pytorch):
        leaves = [x.detach().clone().requires_grad_() for x in case.draw()]
        output, after = function(Tokens(*leaves[:-1]), leaves[-1], case.how)
        above = [layout(torch.ones_like(x) * torch.arange(x.shape[-1])) for x in (output, after)]
        outputs.append(torch.autograd.grad((output, after), leaves, above))
    for got, wanted in zip(*outputs, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("wanted", NAMES)
def test_one_gradient_alone(wanted):
    case, found = Case(130, 5, 7, "token", How(1e-6)), []
    for function in (scan.scan, scan.in_pytorch):
        given = dict(zip(case.names, case.draw(), strict=True))
        leaf = given[wanted] = given[wanted].requires_grad_()
        *tokens, state = given.values()
        output, after = function(Tokens(*tokens), state, case.how)
        for one in (output, after):
            if one.requires_grad:
                found.append(torch.autograd.grad(one.sum(), leaf, retain_graph=True)[0])
    half = len(found) // 2
    for got, reference in zip(found[:half], found[half:], strict=True):
        torch.testing.assert_close(got, reference, rtol=1e-11, atol=1e-11)


def test_a_state_alone_has_no_queries():
    case = Case(150, 5, 7, "token", How(1e-6))
    found = []
    for function in (scan.scan, scan.in_pytorch):
        _, key, value, decay, state = (x.requires_grad_() for x in case.draw())
        output, after = function(Tokens(None, key, value, decay), state, case.how)
        assert output is None
        found.append(
            (after, *torch.autograd.grad(after.square().sum(), (key, value, decay, state)))
        )
    for got, wanted in zip(*found, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("how", HOWS.values(), ids=HOWS)
def test_it_differentiates_twice(how):
    case = Case(5, 2, 2, "token", how)
    leaves = [x.requires_grad_() for x in case.draw()]

    def function(*given):
        return scan.scan(Tokens(*given[:-1]), given[-1], how)

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


def several(output, leaves, above):
    return torch.autograd.grad(output, leaves, above, is_grads_batched=True)


def mapped(output, leaves, above):
    return torch.vmap(lambda one: torch.autograd.grad(output, leaves, one, retain_graph=True))(
        above
    )


@pytest.mark.parametrize("derive", [several, mapped])
def test_many_gradients_at_once(derive):
    case, found = Case(70, 2, 3, "token", How(1e-6)), []
    for function in (scan.scan, scan.in_pytorch):
        leaves = [x.requires_grad_() for x in case.draw()]
        output, _ = function(Tokens(*leaves[:-1]), leaves[-1], case.how)
        draw = torch.Generator().manual_seed(0)
        above = torch.randn(3, *output.shape, generator=draw, dtype=output.dtype)
        if function is scan.scan:
            found.append(derive(output, leaves, above))
        else:
            each = [torch.autograd.grad(output, leaves, x, retain_graph=True) for x in above]
            found.append([torch.stack(gradients) for gradients in zip(*each, strict=True)])
    for got, wanted in zip(*found, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_checkpoint_may_hold_it(use_reentrant):
    """Such a checkpoint unpacks saved tensors once."""
    case, found = Case(70, 4, 3, "token", How(1e-6)), []

    def function(*given):
        return scan.scan(Tokens(*given[:-1]), given[-1], case.how)

    for run_it in (function, partial(checkpoint, function, use_reentrant=use_reentrant)):
        leaves = [x.requires_grad_() for x in case.draw()]
        output, after = run_it(*leaves)
        (output.sum() + after.square().sum()).backward()
        found.append([x.grad for x in leaves])
    for got, wanted in zip(*found, strict=True):
        assert torch.equal(got, wanted)


def test_rows_whose_sum_is_zero_are_zero():
    """And so are their gradients."""
    case = Case(70, 4, 3, "none", How(0.0))
    given = case.draw()
    given[0][:, 10:20] = 0
    assert_same(case, given)
    assert (results(case, scan.scan, given)["output"][:, 10:20] == 0).all()


def test_what_is_forgotten_or_hidden_may_overflow():
    """Keys after a query, and those before -inf, do not matter however large they are."""
    query, key, value, decay, state = Case(64, 2, 2, "token").draw()
    query[:, 30:40] = query[:, 50:] = key[:, 40:50] = 1e200
    decay[:, 50] = -INF
    clean = key.clone()
    clean[:, 40:50] = 0
    one, _ = scan.scan(Tokens(query, key, value, decay), state, WEIGHTS)
    other, _ = scan.scan(Tokens(query, clean, value, decay), state, WEIGHTS)
    assert one.isfinite().all()
    assert torch.equal(one[:, :40], other[:, :40])
    assert torch.equal(one[:, 50:], other[:, 50:])


@pytest.mark.parametrize("threads", [1, 2])
def test_a_forgotten_state_may_overflow(threads, monkeypatch):
    """As may its products with queries after -inf, forwards and backwards."""
    monkeypatch.setattr(recurrence, "PIECE_CHUNKS", 1)
    torch.set_num_threads(threads)
    query, key, value, decay, state = Case(400, 3, 2, "token", lanes=((1,), (1,), (1,))).draw()
    key[:, :70] = value[:, :70] = 1e200  # a state of infinity, and then large ones
    key[:, 70:110] = query[:, 110:] = 1e160
    decay[:, [70, 110]] = -INF
    found = []
    for _ in range(2):
        leaves = [x.clone().requires_grad_() for x in (query, key, value, decay)]
        output, after = scan.scan(Tokens(*leaves), state, WEIGHTS)
        gradients = torch.autograd.grad(output[:, 110:].sum() + after.sum(), leaves[:3])
        found.append([output[:, 110:], after, *(x[:, 110:] for x in gradients), gradients[2]])
        key[:, :110] = value[:, :70] = 0
    for got, wanted in zip(*found, strict=True):
        assert got.isfinite().all()
        assert torch.equal(got, wanted)


def test_features_far_below_zero_are_those_of_dense():
    """e^x; elu(x) + 1 as a sum of two numbers has no digits there."""
    query, key, value = torch.randn(3, 2, 70, 4, dtype=torch.float64).unbind(0)
    A = attention(query - 50, key - 30, score=Features(), mask=Causal(), normalizer=RowSum())
    output = A.matmul(value, form="recurrent")
    torch.testing.assert_close(output, A.matmul(value, form="dense"))
    B = attention(query, key, score=Features(torch.exp), mask=Causal(), normalizer=RowSum())
    torch.testing.assert_close(output, B.matmul(value, form="dense"))


def test_documents_and_states_end_to_end():
    draw = torch.Generator().manual_seed(3)
    query, key, value = torch.randn(3, 2, 200, 8, generator=draw, dtype=torch.float64)
    ids = torch.arange(4).repeat_interleave(torch.tensor([70, 1, 64, 65]))
    parts = {"score": Features(), "normalizer": RowSum()}
    packed = attention(query, key, mask=Causal() & Documents(ids), **parts)
    assert " in C++ for " in packed.explain(value).kernel
    torch.testing.assert_close(packed @ value, packed.matmul(value, form="dense"))
    whole, end = recur(attention(query, key, mask=Causal(), **parts), value)
    state, outputs = None, []
    for q, k, v in zip(*(x.split([90, 1, 109], -2) for x in (query, key, value)), strict=True):
        output, state = recur(attention(q, k, mask=Causal(), **parts), v, state)
        outputs.append(output)
    torch.testing.assert_close(torch.cat(outputs, -2), whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state, end, rtol=1e-12, atol=1e-12)


class Own(torch.Tensor):
    """A class of its own, which addresses would not see."""


def test_what_the_kernels_do_not_do_runs_in_pytorch_and_is_said():
    query, key, value = torch.randn(3, 2, 70, 4, dtype=torch.float64).unbind(0)
    A = attention(*[torch.randn(*7 * [1], 70, 4)] * 2, score=Features(), mask=Causal())
    assert f"in PyTorch ({scan.AXES})" in A.with_normalizer(RowSum()).explain().kernel
    given = Tokens(query, key, value)
    assert scan.needs(given) is None
    assert scan.needs(given._replace(key=key.as_subclass(Own))) is not None
    assert scan.needs(given._replace(key=key.bfloat16())) is not None
    state = value.new_zeros(2, 4, 4)

    def loss(query):
        return scan.scan(Tokens(query, key, value), state, WEIGHTS)[0].square().sum()

    _, slope = torch.func.jvp(loss, (query,), (torch.ones_like(query),))  # has no kernels
    leaf = query.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(loss(leaf), leaf)
    torch.testing.assert_close(slope, wanted.sum())
    slopes = torch.func.grad(loss)(query)
    torch.testing.assert_close(slopes / wanted.norm(), wanted / wanted.norm())


def test_without_the_extension_it_runs_in_pytorch_and_says_so():
    code = """
import sys
sys.modules['regard.kernel._cpu'] = None  # as if it were not installed
import torch, regard
from regard import Causal, Features, RowSum
x = torch.randn(300, 4)
A = regard.attention(x, x, score=Features(), mask=Causal(), normalizer=RowSum())
print('in PyTorch (no compiled kernels)' in A.explain(x).kernel)
print(torch.allclose(A @ x, A.matmul(x, form='dense'), atol=1e-5))
"""
    assert run(code).split()[-2:] == ["True", "True"]


def test_states_for_the_backward_pass_are_what_explain_counts():
    query, key, value = torch.randn(3, 2, 1000, 48).unbind(0)
    A = attention(query.requires_grad_(), key, score=Features(), mask=Causal(), normalizer=RowSum())
    kept = []

    def pack(x):
        kept.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        A.matmul(value, form="recurrent")
    states = max(x.numel() for x in kept if x.dim() == 1) * 4
    assert states == A.explain(value).memory
