"""The laws of the recurrence's Triton kernels, on a GPU or in Triton's interpreter on a CPU.

`test_triton.py` runs this file in a process of its own: Triton reads TRITON_INTERPRET when it is
imported, and other tests may have imported it by then.
"""

from __future__ import annotations

import math
import os

import pytest
import torch

from regard import (
    Alibi,
    Causal,
    Documents,
    Features,
    Identity,
    PositionOnly,
    RowSum,
    attention,
    recur,
)
from regard.feature_map import identity
from regard.form import chunks_gpu

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
EPS = torch.finfo(torch.float64).eps


def watched(name, function, names):
    def called(*inputs):
        names.append(name)
        return function(*inputs)

    return called


@pytest.fixture(autouse=True)
def ran(monkeypatch):
    """Names of what Triton did, in order."""
    from regard.kernel import chunks_triton

    names = []
    for name in ("forward", "backward"):
        monkeypatch.setattr(chunks_triton, name, watched(name, getattr(chunks_triton, name), names))
    monkeypatch.setenv("REGARD_TRITON", "1")
    return names


def draw(*shape, dtype=torch.float64):
    return torch.randn(shape, dtype=torch.float64).to(DEVICE, dtype).requires_grad_()


def decays(kind, heads, n):
    """At most 0; the extreme ones have -inf and -1000 among them."""
    if kind == "none":
        return None
    if kind == "head":
        return (-torch.rand(heads, 1, 1).double() / 10).to(DEVICE).requires_grad_()
    g = -torch.rand(heads, n, 1).double() / 3
    if kind == "extreme":
        g[:, ::7] = -1e3
        g[:, 5::11] = -torch.inf
        g[:, 40:48] = 0
    return g.to(DEVICE).requires_grad_()


def assert_rounding(found, wanted):
    """Sums of dozens of terms, in float64."""
    for one, other in zip(found, wanted, strict=True):
        assert one.shape == other.shape
        assert one.isfinite().all()
        bound = 256 * EPS * max(1.0, float(other.detach().abs().max()))
        assert float((one - other).detach().abs().max()) <= bound


def derived(outputs, leaves, weights):
    return [*outputs, *torch.autograd.grad(outputs, leaves, weights)]


CASES = [  # tokens, width of keys, width of values, decay
    (1, 8, 8, "token"),
    (17, 8, 16, "none"),
    (17, 40, 8, "token"),
    (64, 16, 16, "head"),
    (65, 16, 8, "token"),
    (65, 64, 40, "none"),
    (130, 16, 16, "token"),
    (130, 40, 16, "head"),
    (65, 16, 16, "extreme"),
    (130, 8, 40, "extreme"),
]


@pytest.mark.parametrize(("n", "d", "e", "kind"), CASES)
def test_outputs_states_and_gradients_are_those_of_pytorch_and_of_dense(
    monkeypatch, ran, n, d, e, kind
):
    """With a state to begin from, and a loss of the output and the state that is left."""
    torch.manual_seed(n + d)
    query, key, value, state = draw(2, n, d), draw(2, n, d), draw(2, n, e), draw(2, d, e)
    decay = decays(kind, 2, n)
    score = Features(identity, scale=d**-0.5, log_decay=decay)
    A = attention(query, key, score=score, mask=Causal(), normalizer=Identity())
    weights, of_state = torch.randn_like(value), torch.randn_like(state)
    leaves = [query, key, value, *([] if decay is None else [decay])]
    found = derived(recur(A, value, state), [*leaves, state], [weights, of_state])
    assert ran == (["forward", "backward"] if n > 1 else [])
    if n <= 65:
        alone = derived([A.matmul(value, form="recurrent")], leaves, weights)
        assert_rounding(alone, derived([A.matmul(value, form="dense")], leaves, weights))
    monkeypatch.delenv("REGARD_TRITON")
    ran.clear()
    wanted = derived(recur(A, value, state), [*leaves, state], [weights, of_state])
    assert not ran
    assert_rounding(found, wanted)


@pytest.mark.parametrize(("batch", "decay_heads"), [((), 1), ((), 4), ((2,), 1)])
def test_heads_in_groups_documents_and_row_sums(ran, batch, decay_heads):
    """Keys of two heads for four of queries; those of one batch entry for two."""
    torch.manual_seed(0)
    n = 33
    query, key, value = draw(*batch, 4, n, 8).exp(), draw(2, n, 8).exp(), draw(2, n, 8)
    decay = decays("token", decay_heads, n)
    mask = Causal() & Documents(torch.arange(n, device=DEVICE) // 15)
    score = Features(identity, log_decay=decay)
    A = attention(query, key, score=score, mask=mask, normalizer=RowSum())
    weights = torch.randn_like(query)
    leaves = [query, key, value, decay]
    found = derived([A.matmul(value, form="recurrent")], leaves, weights)
    assert ran == ["forward", "backward"]
    assert_rounding(found, derived([A.matmul(value, form="dense")], leaves, weights))
    output, state = recur(A, value)
    assert state.shape == ((4 if decay_heads == 4 else 2), 8, 9)
    assert_rounding([output], found[:1])


def test_position_alone_is_a_state_of_one_number_for_each_channel(ran):
    """Keys and queries of width 1, which all heads and batch entries share."""
    torch.manual_seed(0)
    query, key, value = (draw(2, 3, 40, 5) for _ in range(3))
    slopes = torch.rand(3, dtype=torch.float64).to(DEVICE).requires_grad_()
    A = attention(query, key, score=PositionOnly(), position=Alibi(slopes), mask=Causal())
    weights = torch.randn_like(value)
    ours, dense = (
        derived([A.matmul(value, form=form)], [value, slopes], weights)
        for form in ("recurrent", "dense")
    )
    assert ran == ["forward", "backward"]
    assert_rounding(ours, dense)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_errors_are_at_most_twice_those_of_dense(ran, dtype):
    """Beside dense in float64 of the same inputs; and one rounding of the result."""
    torch.manual_seed(0)
    inputs = [draw(2, 65, 16, dtype=dtype) for _ in range(3)]
    decay, weights = decays("token", 2, 65).float(), torch.randn_like(inputs[0])

    def results(form, dtype):
        query, key, value, g = (
            x.detach().to(dtype if i < 3 else torch.promote_types(dtype, torch.float32))
            for i, x in enumerate([*inputs, decay])
        )
        leaves = [x.requires_grad_() for x in (query, key, value, g)]
        score = Features(identity, scale=0.25, log_decay=g)
        A = attention(query, key, score=score, mask=Causal(), normalizer=Identity())
        return derived([A.matmul(value, form=form)], leaves, weights.to(dtype))

    truth = results("dense", torch.float64)
    ran.clear()
    ours, dense = results("recurrent", dtype), results("dense", dtype)
    assert ran == ["forward", "backward"]
    for one, other, true in zip(ours, dense, truth, strict=True):
        rounding = torch.finfo(one.dtype).eps * float(true.detach().abs().max())
        allowed = 2 * float((other - true).detach().abs().max()) + rounding
        assert float((one - true).detach().abs().max()) <= allowed


def test_gradients_of_gradients_are_those_of_dense(ran):
    torch.manual_seed(0)
    query, key, value = (draw(2, 20, 4) for _ in range(3))
    decay = decays("token", 2, 20)
    leaves, results = [query, key, value, decay], []
    # Keys that were made of queries: what a gradient passes on the way counts once.
    score = Features(identity, log_decay=decay)
    A = attention(query, key + query, score=score, mask=Causal(), normalizer=Identity())
    for form in ("recurrent", "dense"):
        output = A.matmul(value, form=form)
        first = torch.autograd.grad(output.square().sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum(x.square().sum() for x in first), leaves)
        results.append([*first, *second])
    # The second time once through the kernels: by the output, of which the first gradient is made.
    assert ran == ["forward", "backward"]
    assert_rounding(*results)


def test_what_it_lacks_runs_elsewhere_and_explain_says_so(monkeypatch, ran):
    query, key, value = (draw(2, 200, 8) for _ in range(3))
    channels = Features(identity, log_decay=-torch.rand(2, 200, 8, device=DEVICE).double())
    reasons = {
        "has no erasing": Features(identity, beta=0.1),
        "has no decay for each channel": channels,
        "is asked for by REGARD_TRITON=1": Features(identity),
    }
    for reason, score in reasons.items():
        A = attention(query, key, score=score, mask=Causal(), normalizer=Identity())
        if "REGARD" in reason:
            assert "in Triton" in A.explain(value).kernel
            # A state for each chunk.
            states = math.ceil(200 / chunks_gpu.CHUNK)
            assert A.explain(value).memory == 2 * states * 8 * 8 * 8
            monkeypatch.delenv("REGARD_TRITON")
        A.matmul(value, form="recurrent").sum().backward()
        assert not ran
        how = A.explain(value).kernel
        assert "tokens, in Triton" not in how
        told = chunks_gpu.kernel(torch.device("cuda"), 200, score.erases, score.by_channel)
        assert reason in told.said
        assert INTERPRETED or reason in how
