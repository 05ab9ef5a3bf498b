"""The recurrent family beside Mamba-2 as transformers has it, its scan in plain PyTorch.

S_t = e^(dt_t A) S_(t-1) + B_t (dt_t x_t)^T,  y_t = S_t^T C_t + D x_t  (Dao, Gu 2024,
arXiv:2405.21060) is `Features` with query C, key B, value dt x and log_decay dt A: one number for
each token of a head, where the heads of a group share B and C. Their scan casts to float32; here
its casts go to float64, so that both are compared to rounding.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from regard import Causal, Features, Identity, attention, recur
from regard.feature_map import identity

pytest.importorskip("transformers", reason="the package transformers is not installed")
from transformers import DynamicCache, Mamba2Config
from transformers.models.mamba2 import modeling_mamba2 as theirs

EPS = torch.finfo(torch.float64).eps
HEADS, WIDTH, STATE, CHUNK, BATCH = 6, 8, 16, 32, 2
GROUPS = [1, 2, 6]
LENGTHS = [1, 32, 75]  # less than a chunk, one, and not a whole number of them
SCAN = theirs.mamba2_chunk_scan


def by_head(x):
    """[batch, n, heads or groups, .] -> [batch, heads, n, .]: heads of a group share B and C."""
    return x.repeat_interleave(HEADS // x.shape[2], 2).transpose(1, 2)


def their_scan(x, dt, A, B, C, **given):
    return SCAN(x, dt, A, B, C, **given)


def scan(x, dt, A, B, C, chunk_size, **given):
    """Their function by `recur`; states are transposed."""
    dt = F.softplus(dt + given["dt_bias"]).clamp(*given["dt_limit"])
    dt = dt.transpose(1, 2)[..., None]
    score = Features(identity, log_decay=dt * A[:, None, None])
    matrix = attention(by_head(C), by_head(B), score=score, mask=Causal(), normalizer=Identity())
    start = given["initial_states"]
    output, state = recur(matrix, dt * by_head(x), None if start is None else start.mT)
    output = output.transpose(1, 2) + given["D"][:, None] * x
    return (output, state.mT) if given["return_final_states"] else output


@pytest.fixture
def in_float64(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


def mixer(groups):
    torch.manual_seed(0)
    config = Mamba2Config(
        num_heads=HEADS,
        head_dim=WIDTH,
        hidden_size=HEADS * WIDTH // 2,
        state_size=STATE,
        n_groups=groups,
        chunk_size=CHUNK,
        num_hidden_layers=1,
    )
    return theirs.Mamba2Mixer(config, 0).double(), config


def what_a_mixer_scans(monkeypatch, groups, n):
    """What a mixer gives to its scan, with a state to begin from: a call, and its leaves."""
    kept = []

    def watched(*tensors, **named):
        kept.append((tensors, named))
        return SCAN(*tensors, **named)

    with monkeypatch.context() as patch:
        patch.setattr(theirs, "mamba2_chunk_scan", watched)
        layer, config = mixer(groups)
        layer(torch.randn(BATCH, n, layer.hidden_size).double(), cache=DynamicCache(config=config))
    ((tensors, named),) = kept
    named["initial_states"] = torch.randn(BATCH, HEADS, WIDTH, STATE).double()
    leaves = {
        name: x.detach().requires_grad_()
        for name, x in (*zip(["x", "dt", "A", "B", "C"], tensors, strict=False), *named.items())
        if isinstance(x, torch.Tensor)
    }
    assert list(leaves) == ["x", "dt", "A", "B", "C", "D", "dt_bias", "initial_states"]

    def call(function):
        return function(**(named | leaves))

    return call, leaves


def assert_rounding(ours, other):
    """Equal but for roundings of sums over tokens and channels, the largest number's."""
    assert ours.dtype == other.dtype == torch.float64
    size = float(other.detach().abs().max())
    assert float((ours - other).detach().abs().max()) <= (max(LENGTHS) + STATE) * EPS * size
    assert size > 0


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("n", LENGTHS)
def test_outputs_states_and_gradients_are_theirs(monkeypatch, groups, n):
    call, leaves = what_a_mixer_scans(monkeypatch, groups, n)
    found, wanted = call(scan), call(their_scan)
    for ours, other in zip(found, wanted, strict=True):
        assert_rounding(ours, other)
    weights = [torch.randn_like(x) for x in wanted]
    for ours, other in zip(
        *(torch.autograd.grad(result, leaves.values(), weights) for result in (found, wanted)),
        strict=True,
    ):
        assert_rounding(ours, other)


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("groups", GROUPS)
def test_one_more_token_is_theirs(monkeypatch, groups):
    """Their update of a cached state, beside `recur` of one token."""
    call, leaves = what_a_mixer_scans(monkeypatch, groups, 1)
    x, dt, A, B, C, D, dt_bias, state = (leaf.detach() for leaf in leaves.values())
    after = state.clone()
    output = theirs.mamba2_selective_state_update(
        after,  # in place
        x[:, 0],
        dt[:, 0, :, None].expand(-1, -1, WIDTH),
        A[:, None, None].expand(-1, WIDTH, STATE),
        B[:, 0],
        C[:, 0],
        D[:, None].expand(-1, WIDTH),
        dt_bias[:, None].expand(-1, WIDTH),
        dt_softplus=True,
    )
    ours, state = call(scan)
    assert_rounding(ours[:, 0], output)
    assert_rounding(state, after)
