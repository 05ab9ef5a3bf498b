"""The recurrent family beside the loops that flash-linear-attention publishes as references.

Each of its operators has a file `naive.py` of plain PyTorch. They are read by path, since importing
the package itself needs Triton. They compute in float32, [batch, tokens, heads, width] but for two,
and scale queries by width^-1/2.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from regard import Causal, Features, Identity, RowSum, attention, recur
from regard.feature_map import identity

found = importlib.util.find_spec("fla")
if found is None or not found.submodule_search_locations:
    pytest.skip("the package fla-core is not installed", allow_module_level=True)
pytest.importorskip("einops", reason="the package einops is not installed")
FOLDER = Path(found.submodule_search_locations[0]) / "ops"

B, H, N, D, E = 2, 3, 96, 16, 8  # more than one chunk, and not a whole number of them
EPS = torch.finfo(torch.float32).eps


def theirs(operator, function):
    path = FOLDER / operator / "naive.py"
    spec = importlib.util.spec_from_file_location(f"naive_{operator}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, function)


def draw(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


Q, V = draw(B, H, N, D, seed=1), draw(B, H, N, E, seed=2)
K = F.normalize(draw(B, H, N, D, seed=3), dim=-1)
G, G_CHANNEL = -draw(B, H, N, 1, seed=4).abs() / 5, -draw(B, H, N, D, seed=5).abs() / 5
BETA, GATE = draw(B, H, N, 1, seed=6).sigmoid(), draw(B, H, N, D, seed=7).sigmoid()
WRITE, P = draw(B, H, N, E, seed=8).sigmoid(), F.normalize(draw(B, H, N, D, seed=9), dim=-1)
HEADS = (1 - 2.0 ** (-5 - torch.arange(H, dtype=torch.float64))).log()[:, None, None]


def to_theirs(x):
    """[batch, heads, tokens, .] -> [batch, tokens, heads, .] in float32; one number, no axis."""
    x = x.transpose(1, 2).float()
    return x[..., 0] if x.shape[-1] == 1 else x


# operator, function, what it is given, the score, and the values as they are written
PEERS = {
    "linear attention": (
        ("linear_attn", "naive_recurrent_linear_attn"),
        {"q": Q, "k": K, "v": V},
        {},
        V,
    ),
    "simple GLA": (
        ("simple_gla", "naive_recurrent_simple_gla"),
        {"q": Q, "k": K, "v": V, "g": G},
        {"log_decay": G},
        V,
    ),
    "GLA": (
        ("gla", "naive_recurrent_gla"),
        {"q": Q, "k": K, "v": V, "gk": G_CHANNEL},
        {"log_decay": G_CHANNEL},
        V,
    ),
    "Gated DeltaNet": (
        ("gated_delta_rule", "naive_recurrent_gated_delta_rule"),
        {"q": Q, "k": K, "v": V, "beta": BETA, "g": G},
        {"log_decay": G, "beta": BETA},
        V,
    ),
    "KDA": (
        ("kda", "naive_recurrent_kda"),
        {"q": Q, "k": K, "v": V, "g": G_CHANNEL, "beta": BETA},
        {"log_decay": G_CHANNEL, "beta": BETA},
        V,
    ),
    "GDN-2": (
        ("gdn2", "naive_recurrent_gdn2"),
        {"q": Q, "k": K, "v": V, "g": G_CHANNEL, "b": GATE, "w": WRITE},
        {"log_decay": G_CHANNEL, "erase": (GATE * K, -K)},
        WRITE * V,
    ),
    "Comba": (
        ("comba", "naive_recurrent_comba"),
        {"q": Q, "k": K, "v": V, "p": P, "beta": BETA, "g": G},
        {"log_decay": G, "erase": (P, -BETA * K)},
        BETA * V,
    ),
}


def bound(matrix, value):
    """Roundings of sums over tokens and channels in float32, of terms of these sizes."""
    return (N + D) * EPS * float((matrix.dense().abs() @ value.abs()).max())


def of(parts):
    score = Features(identity, scale=D**-0.5, **parts)
    return attention(Q, K, score=score, mask=Causal(), normalizer=Identity())


@pytest.mark.parametrize("name", PEERS)
def test_outputs_and_states_are_theirs(name):
    where, given, parts, value = PEERS[name]
    given = {key: to_theirs(x) for key, x in given.items()}
    output, state = theirs(*where)(**given, output_final_state=True)
    matrix = of(parts)
    ours, after = recur(matrix, value)
    assert float((output.transpose(1, 2) - ours).abs().max()) <= bound(matrix, value)
    # A state is what unit queries of one channel would read, without a scale.
    assert float((state - after).abs().max()) <= bound(matrix, value) * D**0.5
    torch.testing.assert_close(matrix.matmul(value, form="dense"), ours, rtol=1e-11, atol=1e-11)


def test_delta_rule_and_retention_have_heads_first():
    q, k, v, beta = (x.float() for x in (Q, K, V, BETA))
    output, _ = theirs("delta_rule", "delta_rule_recurrence")(q, k, v, beta)
    matrix = of({"beta": BETA})
    assert float((output - matrix @ V).abs().max()) <= bound(matrix, V)
    output = theirs("retention", "naive_retention")(q, k, v)
    matrix = of({"log_decay": HEADS})
    # Their decay is 2^(distance x log2) of a float32 logarithm: off by distance roundings of it.
    assert float((output - matrix @ V).abs().max()) <= bound(matrix, V)


def test_normalised_linear_attention():
    """Their eps, 1e-10, is added to sums of scaled scores."""
    q, k = Q.abs(), K.abs()
    given = {"q": to_theirs(q), "k": to_theirs(k), "v": to_theirs(V)}
    output, _ = theirs(*PEERS["linear attention"][0])(**given, normalize=True)
    score = Features(identity, scale=D**-0.5)
    matrix = attention(q, k, score=score, mask=Causal(), normalizer=RowSum(eps=1e-10))
    assert float((output.transpose(1, 2) - matrix @ V).abs().max()) <= 2 * bound(matrix, V)
