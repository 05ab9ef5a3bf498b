"""What the form `recurrent` says of its work and memory, and where it is chosen."""

from __future__ import annotations

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from regard import Causal, Features, Identity, RowSum, attention
from regard.form import recurrent, scan

FEATURES = {
    "plain": Features(),
    "other width": Features(lambda x: torch.cat([x, x * x], -1)),
    "decay": Features(log_decay=-0.1),
    "decays": Features(log_decay=-torch.rand(1, 2048, 1)),
    "channels": Features(log_decay=-torch.rand(1, 2048, 16)),
    "delta": Features(beta=0.1),
    "channels, delta": Features(log_decay=-torch.rand(1, 2048, 16), beta=0.1),
}


@pytest.fixture
def in_pytorch(monkeypatch):
    monkeypatch.setattr(scan, "KERNELS", None)


@pytest.mark.usefixtures("in_pytorch")
@pytest.mark.parametrize("normalizer", [RowSum(), Identity()])
@pytest.mark.parametrize("name", [name for name in FEATURES if not name.startswith("channels")])
@pytest.mark.parametrize("offset", [None, 0, 1024])
def test_flops_are_those_that_torch_counts(name, offset, normalizer):
    """Of products; torch leaves out the solving of triangles, C^2 (d + e) for each chunk of C."""
    if offset is None and FEATURES[name].recurs:
        return
    query, (key, value) = torch.randn(1, 2048 - (offset or 0), 16), torch.randn(2, 1, 2048, 16)
    score, mask = FEATURES[name], None if offset is None else Causal(offset)
    A = attention(query, key, score=score.at(offset or 0), mask=mask, normalizer=normalizer)
    with FlopCounterMode(display=False) as counter:
        A.matmul(value, form="recurrent")
    wide = 16 + isinstance(normalizer, RowSum)
    solved = 2048 * 64 * (16 + wide) if score.erases else 0
    assert recurrent.flops(A, 16) == counter.get_total_flops() + solved


@pytest.mark.usefixtures("in_pytorch")
@pytest.mark.parametrize("name", FEATURES)
def test_memory_is_about_what_torch_allocates(name):
    A = attention(*torch.randn(2, 1, 2048, 16), score=FEATURES[name], mask=Causal())
    A = A.with_normalizer(Identity())
    value = torch.randn(1, 2048, 16)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        A.matmul(value, form="recurrent")
    events = sorted(watched.profiler.kineto_results.events(), key=lambda each: each.start_ns())
    steps = torch.tensor([each.nbytes() for each in events if each.name() == "[memory]"])
    assert 1 / 1.5 <= recurrent.kernel(A)[1] / int(steps.cumsum(0).max()) <= 1.5


@pytest.mark.parametrize(
    ("n", "m", "parts", "form"),
    [
        (1, 4096, {}, "tiled"),
        (1, 4096, {"mask": Causal(4095)}, "tiled"),
        (1, 4096, {"mask": Causal(4095), "score": Features(beta=0.1, offset=4095)}, "recurrent"),
        (4096, 1, {}, "tiled"),
        (64, 64, {"mask": Causal()}, "tiled"),
        (256, 256, {"mask": Causal()}, "recurrent"),
        (256, 256, {}, "recurrent"),
    ],
)
def test_it_runs_where_it_pays(n, m, parts, form):
    """Not for few queries of many keys, which meet no more than one state's worth of pairs."""
    query, key = torch.randn(2, n, 64), torch.randn(2, m, 64)
    assert (
        attention(query, key, **{"score": Features(), "normalizer": RowSum(), **parts})
        .explain()
        .form
        == form
    )


def test_a_pair_costs_what_its_decay_and_erasing_cost():
    costs = [FEATURES[name].flops_per_pair(16) for name in FEATURES]
    assert costs == [32, 32, 34, 34, 64, 112, 112]
    A = attention(*torch.randn(2, 3, 20, 6), score=FEATURES["other width"])  # softmax: pair by pair
    assert A.explain(torch.randn(3, 20, 5)).flops == 3 * 20 * 20 * 2 * (12 + 5)


def test_a_map_is_not_called_for_its_width_again():
    calls, (query, key, value) = [], torch.randn(3, 20, 6)

    def map(x):
        calls.append(x.shape)
        return x.exp()

    for _ in range(3):
        A = attention(query, key, score=Features(map, log_decay=-0.1), mask=Causal())
    assert len(calls) == 1
    calls.clear()
    A.with_normalizer(RowSum()) @ value
    assert [shape[-2] for shape in calls] == [20, 20]
