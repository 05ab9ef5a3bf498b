"""Position parts against the code that released models run, and against loops over their formulas.

Peers are transformers (rotary, T5, ALiBi, XLNet, Marian) and x-transformers (CoPE). Tests of a
peer are skipped where it is not installed; the loops need nothing.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import regard
from regard import position as P

F64 = torch.float64


def peer(name: str) -> Any:
    """Import a module of transformers, or skip the test."""
    pytest.importorskip("transformers", reason="transformers is the peer compared with")
    return pytest.importorskip(f"transformers.{name}", reason=f"transformers has no {name}")


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal numbers in float64, the same for the same seed."""
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def close(ours: Tensor, theirs: Tensor, atol: float) -> None:
    """Assert equal shapes, dtypes and numbers, to an absolute error."""
    torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)


# Rotary: (scaling, rope_type, what else its rope_parameters say, sequence length)

SHORT = tuple(1.0 + 0.03125 * c for c in range(32))
LONG = tuple(1.0 + 0.5 * c for c in range(32))
LONG_ROPE = {
    "short_factor": list(SHORT),
    "long_factor": list(LONG),
    "original_max_position_embeddings": 4096,
}
YARN = {"factor": 16.0, "original_max_position_embeddings": 4096}
LLAMA = {"factor": 8.0, "original_max_position_embeddings": 8192}

SCALINGS: dict[str, tuple[P.Scaling, str, dict[str, Any], int | None]] = {
    "linear": (P.Interpolation(4.0), "linear", {"factor": 4.0}, None),
    "dynamic, shorter": (P.DynamicNtk(2.0, 100, 4096), "dynamic", {"factor": 2.0}, 100),
    "dynamic, longer": (P.DynamicNtk(2.0, 10000, 4096), "dynamic", {"factor": 2.0}, 10000),
    "yarn": (P.Yarn(16.0, 4096), "yarn", YARN, None),
    "yarn, unrounded": (
        P.Yarn(16.0, 4096, rounded=False),
        "yarn",
        YARN | {"truncate": False},
        None,
    ),
    "yarn, other turns": (
        P.Yarn(16.0, 4096, fast=20.0, slow=2.0, attention_factor=1.5),
        "yarn",
        YARN | {"beta_fast": 20.0, "beta_slow": 2.0, "attention_factor": 1.5},
        None,
    ),
    "longrope, short": (
        P.LongRope(SHORT, LONG, 4096, 4096, factor=32.0),
        "longrope",
        LONG_ROPE | {"factor": 32.0},
        4096,
    ),
    "longrope, long": (
        P.LongRope(SHORT, LONG, 4097, 4096, factor=32.0),
        "longrope",
        LONG_ROPE | {"factor": 32.0},
        4097,
    ),
    "longrope, attention_factor": (
        P.LongRope(SHORT, LONG, 4097, 4096, factor=32.0, attention_factor=1.25),
        "longrope",
        LONG_ROPE | {"factor": 32.0, "attention_factor": 1.25},
        4097,
    ),
    "longrope, factor 1": (
        P.LongRope(SHORT, LONG, 1, 4096, factor=1.0),
        "longrope",
        LONG_ROPE | {"factor": 1.0},
        1,
    ),
    "llama3": (
        P.Llama3(8.0, 8192),
        "llama3",
        LLAMA | {"low_freq_factor": 1.0, "high_freq_factor": 4.0},
        None,
    ),
    "llama3, other turns": (
        P.Llama3(8.0, 8192, slow=2.0, fast=16.0),
        "llama3",
        LLAMA | {"low_freq_factor": 2.0, "high_freq_factor": 16.0},
        None,
    ),
    "proportional": (P.Proportional(0.25), "proportional", {"partial_rotary_factor": 0.25}, None),
    "proportional, divided": (
        P.Proportional(0.7, factor=8.0),
        "proportional",
        {"partial_rotary_factor": 0.7, "factor": 8.0},
        None,
    ),
}


def theirs(
    kind: str, more: dict[str, Any], length: int | None, *, head_dim: int, base: float
) -> tuple[Tensor, float]:
    """What transformers computes for a Llama of one head: inv_freq in float32 and the magnitude."""
    rope, llama = peer("modeling_rope_utils"), peer("models.llama.configuration_llama")
    config = llama.LlamaConfig(
        hidden_size=head_dim,
        num_attention_heads=1,
        head_dim=head_dim,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": kind, "rope_theta": base, **more},
    )
    inv_freq, magnitude = rope.ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), length)
    return inv_freq, magnitude


def test_every_type_of_transformers_is_compared() -> None:
    """A type that transformers adds is missing here until a scaling is compared with it."""
    known = set(peer("modeling_rope_utils").ROPE_INIT_FUNCTIONS)
    assert known == {kind for _, kind, _, _ in SCALINGS.values()}


@pytest.mark.parametrize("base", [10000.0, 500000.0])
@pytest.mark.parametrize("name", SCALINGS)
def test_frequencies(name: str, base: float) -> None:
    """The frequencies and magnitude of a scaling are those of transformers, which has float32."""
    scaling, kind, more, length = SCALINGS[name]
    inv_freq, magnitude = theirs(kind, more, length, head_dim=64, base=base)
    ours = torch.tensor(scaling.frequencies(64, base), dtype=F64)
    torch.testing.assert_close(ours, inv_freq.double(), rtol=1e-6, atol=0)
    assert scaling.magnitude == pytest.approx(magnitude, rel=1e-6, abs=0)


@pytest.mark.parametrize("name", ["linear", "dynamic, longer", "yarn", "llama3"])
def test_frequencies_of_a_fraction(name: str) -> None:
    """A fraction of the channels has the exponents of its own width, as partial_rotary_factor."""
    scaling, kind, more, length = SCALINGS[name]
    more = more | {"partial_rotary_factor": 0.5}
    inv_freq, magnitude = theirs(kind, more, length, head_dim=64, base=10000.0)
    rotary = P.Rotary.of(64, scaling=scaling, fraction=0.5)
    ours = torch.as_tensor(rotary.frequencies, dtype=F64).flatten()
    torch.testing.assert_close(ours, inv_freq.double(), rtol=1e-6, atol=0)
    assert rotary.magnitude == pytest.approx(magnitude, rel=1e-6, abs=0)


def cosines_and_sines(first: int, last: int, width: int, base: float) -> tuple[Tensor, Tensor]:
    """[last - first, width / 2] of cos and sin (position / base^(2 c / width)), in float64."""
    angles = [
        [token / base ** (2 * c / width) for c in range(width // 2)] for token in range(first, last)
    ]
    cosines = [[math.cos(angle) for angle in row] for row in angles]
    sines = [[math.sin(angle) for angle in row] for row in angles]
    return torch.tensor(cosines, dtype=F64), torch.tensor(sines, dtype=F64)


@pytest.mark.parametrize("base", [10000.0, 500000.0])
@pytest.mark.parametrize("offset", [0, 5])
def test_halves_is_llama(offset: int, base: float) -> None:
    """Queries and keys turn as Llama's do."""
    query, key = normal(2, 3, 40, 16), normal(2, 3, 45, 16, seed=1)
    rotate = peer("models.llama.modeling_llama").apply_rotary_pos_emb
    cos, sin = (torch.cat([x, x], -1)[None] for x in cosines_and_sines(0, 45, 16, base))
    rows = slice(offset, offset + 40)
    want_query, _ = rotate(query, query, cos[:, rows], sin[:, rows])
    _, want_key = rotate(key, key, cos, sin)
    rotary = P.Rotary.of(16, base=base, layout="halves", offset=offset)
    close(rotary.on_query(query, torch.arange(40)), want_query, 1e-13)
    close(rotary.on_key(key, torch.arange(45)), want_key, 1e-13)


@pytest.mark.parametrize("fraction", [0.5, 1.0])
@pytest.mark.parametrize("offset", [0, 5])
def test_interleaved_is_gptj(offset: int, fraction: float) -> None:
    """Queries and keys turn as GPT-J's do, whose rotary_dim leaves further channels alone."""
    query, key = normal(2, 3, 40, 16), normal(2, 3, 45, 16, seed=1)
    width = int(16 * fraction)
    apply = peer("models.gptj.modeling_gptj").apply_rotary_pos_emb
    cos, sin = cosines_and_sines(0, 45, width, 10000.0)

    def rotate(x: Tensor, first: int) -> Tensor:
        rows = slice(first, first + x.shape[-2])
        turning = x[..., :width].transpose(1, 2)
        turned = apply(turning, sin[None, rows], cos[None, rows]).transpose(1, 2)
        return torch.cat([turned, x[..., width:]], -1)

    rotary = P.Rotary.of(16, fraction=fraction, layout="interleaved", offset=offset)
    close(rotary.on_query(query, torch.arange(40)), rotate(query, offset), 1e-13)
    close(rotary.on_key(key, torch.arange(45)), rotate(key, 0), 1e-13)


# Biases by i - j


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(
    ("buckets", "max_distance"), [(32, 128), (32, 20), (64, 256), (12, 100), (320, 800)]
)
def test_buckets_are_t5s(buckets: int, max_distance: int, bidirectional: bool) -> None:
    """Every bucket up to distance 4096 on both sides is T5's."""
    bucket = peer("models.t5.modeling_t5").T5Attention._relative_position_bucket
    distance = torch.arange(-4096, 4097)
    want = bucket(-distance, bidirectional, buckets, max_distance)
    ours = P.T5(torch.zeros(1, buckets), bidirectional, max_distance).bucket(distance)
    assert torch.equal(ours, want)


@pytest.mark.parametrize("decoder", [True, False])
def test_bias_is_t5s(decoder: bool) -> None:
    """The bias of a matrix is what a layer of T5 adds, with its weight transposed."""
    t5 = peer("models.t5.modeling_t5")
    config = t5.T5Config(d_model=8, d_kv=4, num_heads=3, is_decoder=decoder)
    layer = t5.T5Attention(config, has_relative_attention_bias=True, layer_idx=0)
    weight = normal(config.relative_attention_num_buckets, 3)
    layer.relative_attention_bias.weight.data = weight
    want = layer.compute_bias(30, 300, past_seen_tokens=270)[0]
    part = P.T5(weight.T, bidirectional=not decoder, offset=270)
    ours = part.on_score(normal(3, 30, 4), normal(3, 300, 4), torch.arange(30), torch.arange(300))
    assert torch.equal(ours, want)


@pytest.mark.parametrize("heads", range(1, 65))
def test_alibi_is_blooms(heads: int) -> None:
    """Causal weights are those of BLOOM, whose bias is slope j: rows of softmax do not differ."""
    build = peer("models.bloom.modeling_bloom").build_alibi_tensor
    query, key = normal(heads, 24, 8).float(), normal(heads, 24, 8, seed=1).float()
    bias = build(torch.ones(1, 24, dtype=torch.long), heads, torch.float32)
    later = torch.ones(24, 24, dtype=torch.bool).triu(1)
    scores = query @ key.mT * 8**-0.5 + bias
    want = scores.masked_fill(later, -torch.inf).softmax(-1)
    ours = regard.attention(query, key, mask=regard.Causal(), position=P.Alibi.of(heads))
    torch.testing.assert_close(ours.dense(), want)


# Biases that read the query or the key


def dot(x: Tensor, y: Tensor) -> float:
    """Sum x_c y_c by a loop."""
    return math.fsum(a * b for a, b in zip(x.tolist(), y.tolist(), strict=True))


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("offset", [0, 4])
def test_transformer_xl_by_loop(offset: int, scale: float | None) -> None:
    """With the score it makes scale ((q + u) . k + (q + v) . W R), also by its channels."""
    heads, width, wide, n, m = 2, 4, 6, 5, 9
    query, key = normal(heads, n, width), normal(heads, m, width, seed=1)
    weight, (u, v) = normal(heads, width, wide, seed=2), normal(2, heads, width, seed=3)
    by = width**-0.5 if scale is None else scale
    want = torch.zeros(heads, n, m, dtype=F64)
    for h in range(heads):
        for i in range(n):
            for j in range(m):
                angles = [(i + offset - j) / 10000 ** (2 * c / wide) for c in range(wide // 2)]
                sinusoid = [*map(math.sin, angles), *map(math.cos, angles)]
                seen = [dot(row, torch.tensor(sinusoid, dtype=F64)) for row in weight[h]]
                by_content = dot(query[h, i] + u[h], key[h, j])
                by_position = dot(query[h, i] + v[h], torch.tensor(seen, dtype=F64))
                want[h, i, j] = by * (by_content + by_position)
    part = P.TransformerXL(weight, u, v, scale, offset)
    rows, columns = torch.arange(n), torch.arange(m)
    score = query @ key.mT * by
    close(score + part.on_score(query, key, rows, columns), want, 1e-13)
    of_queries, of_keys = part.channels(query, key, rows, columns)
    close(score + of_queries @ of_keys.mT, want, 1e-13)


@pytest.mark.parametrize("memory", [0, 6])
def test_transformer_xl_is_xlnets(memory: int) -> None:
    """Weights are those of XLNet's attention, with as many keys of memory as the offset."""
    xlnet = peer("models.xlnet.modeling_xlnet")
    n, batch, heads, width, model = 7, 2, 3, 4, 12
    m = n + memory
    query, key = normal(batch, heads, n, width), normal(batch, heads, m, width, seed=1)
    weight, (u, v) = normal(heads, width, model, seed=2), normal(2, heads, width, seed=3)
    order = torch.arange(m, -n, -1, dtype=F64)
    inverse = torch.tensor([10000 ** (-2 * c / model) for c in range(model // 2)], dtype=F64)
    encoding = xlnet.XLNetModel.positional_embedding(order, inverse, batch)
    core = SimpleNamespace(
        r_w_bias=u,
        r_r_bias=v,
        scale=width**-0.5,
        rel_shift_bnij=xlnet.XLNetRelativeAttention.rel_shift_bnij,
        dropout=torch.nn.Identity(),
    )
    _, weights = xlnet.XLNetRelativeAttention.rel_attn_core(
        core,
        query.permute(2, 0, 1, 3),
        key.permute(2, 0, 1, 3),
        key.permute(2, 0, 1, 3),
        torch.einsum("pbw,hdw->pbhd", encoding, weight),
        output_attentions=True,
    )
    ours = regard.attention(query, key, position=P.TransformerXL(weight, u, v, offset=memory))
    close(ours.dense(), weights.permute(2, 3, 0, 1), 1e-13)


@pytest.mark.parametrize("offset", [0, 6])
@pytest.mark.parametrize("entries", [3, 32])
def test_cope_is_x_transformers(entries: int, offset: int) -> None:
    """The bias is that of CoPE on logits which a causal mask has already cut."""
    reason = "x-transformers is the peer compared with"
    peers = pytest.importorskip("x_transformers.x_transformers", reason=reason)
    n, m, width = 8, 8 + offset, 4
    query, key = normal(2, 3, n, width), normal(2, 3, m, width, seed=1)
    cope = peers.CoPE(width, 3, entries).double()
    cope.pos_emb.data = normal(entries, width, seed=2)
    later = torch.ones(n, m, dtype=torch.bool).triu(offset + 1)
    logits = (query @ key.mT * width**-0.5).masked_fill(later, -torch.inf)
    want = cope(query, logits).detach()
    part = P.Cope(cope.pos_emb.detach(), offset=offset)
    close(part.on_score(query, key, torch.arange(n), torch.arange(m)), want, 1e-13)
    ours = regard.attention(query, key, mask=regard.Causal(offset), position=part)
    close(ours.dense(), (logits + want).softmax(-1), 1e-13)


@pytest.mark.parametrize("offset", [0, 4])
@pytest.mark.parametrize(("left", "right"), [(2, 1), (0, 3), (20, 0), (3, 20)])
def test_shaw_by_loop(left: int, right: int, offset: int) -> None:
    """Weights and output of Shaw's eq. 3 to 5, pair by pair."""
    heads, width, n, m = 2, 4, 6, 9
    query, key, value = (normal(heads, k, width, seed=k) for k in (n, m, m + 1))
    value = value[:, :m]
    keys, values = normal(2, left + 1 + right, width, seed=1)
    part = P.Shaw(keys, left, values, offset=offset)
    bias, weights = torch.zeros(2, heads, n, m, dtype=F64)
    output = torch.zeros(heads, n, width, dtype=F64)
    for h in range(heads):
        for i in range(n):
            at = [min(max(j - i - offset, -left), right) + left for j in range(m)]
            bias[h, i] = torch.tensor([dot(query[h, i], keys[o]) / 2 for o in at], dtype=F64)
            scores = [dot(query[h, i], key[h, j] + keys[at[j]]) / 2 for j in range(m)]
            total = math.fsum(map(math.exp, scores))
            for j in range(m):
                weights[h, i, j] = math.exp(scores[j]) / total
                output[h, i] += weights[h, i, j] * (value[h, j] + values[at[j]])
    close(part.on_score(query, key, torch.arange(n), torch.arange(m)), bias, 1e-13)
    matrix = regard.attention(query, key, position=part)
    close(matrix.dense(), weights, 1e-13)
    more = part.on_output(matrix)
    assert more is not None
    close(matrix @ value + more, output, 1e-13)


# The input


@pytest.mark.parametrize("width", [16, 7, 512])
def test_sinusoid_is_marians(width: int) -> None:
    """The table of Marian, which is rounded from float64 too: an angle may differ by one ulp."""
    marian = peer("models.marian.modeling_marian")
    want = marian.MarianSinusoidalPositionalEmbedding(200, width).create_weight()
    ours = P.sinusoid(torch.arange(200), width, layout="halves")
    close(ours, want, torch.finfo(torch.float32).eps)
