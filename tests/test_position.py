"""Position against plain loops, and what the papers prove."""

import math

import pytest
import torch
from laws import MASKS, POSITIONS, Draw, Sizes

from regard import Causal, attention
from regard.position import (
    T5,
    Fire,
    Kerple,
    Relative,
    Rotary,
    Shaw,
    Yarn,
    sinusoid,
)

EXACT, LOOP, SEEN = 1e-12, 1e-13, 1e-3
"""Rounding of float64, of one formula in it; a difference that is none of these."""

PARTS = [name for name in POSITIONS if name != "none"]
# Queries on a grid are all of its queries: they continue no sequence (see test_neighborhood.py).
ON_GRIDS = [
    name for name in PARTS if name.split(",", maxsplit=1)[0] in ("shift", "gaussian", "field")
]
CONTINUED = [name for name in PARTS if name != "bias" and name not in ON_GRIDS]
SIZES = Sizes(batch=1, heads=2, key_heads=2, n=12, m=12, width=4, value_width=3)


def normal(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def same(found, expected, tolerance):
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance, check_dtype=False)


def part(name):
    return POSITIONS[name](Draw(3, torch.float64), SIZES)


def bias(position, query, key):
    return position.on_score(query, key, torch.arange(query.shape[-2]), torch.arange(key.shape[-2]))


# Rotary


def llama(kind, base, length=2048, **more):
    config = pytest.importorskip("transformers", reason="the reference").LlamaConfig
    return config(
        hidden_size=256,
        num_attention_heads=2,
        head_dim=128,
        max_position_embeddings=length,
        rope_parameters={"rope_type": kind, "rope_theta": base, **more},
    )


def test_layouts_differ_by_a_permutation_of_channels():
    query, token = normal(2, 5, 8), torch.arange(5) + 70
    order = [0, 2, 4, 6, 1, 3, 5, 7]  # channel c of halves is channel order[c] of interleaved
    interleaved = Rotary.of(8, layout="interleaved").on_query(query, token)
    halves = Rotary.of(8).on_query(query[..., order], token)
    same(halves, interleaved[..., order], 0)
    assert (Rotary.of(8).on_query(query, token) - interleaved).abs().max() > SEEN


@pytest.mark.parametrize("layout", ["halves", "interleaved"])
def test_a_fraction_turns_the_first_channels_and_leaves_the_rest(layout):
    query, token = normal(2, 5, 8), torch.arange(5)
    found = Rotary.of(8, fraction=0.5, layout=layout).on_query(query, token)
    whole = Rotary.of(4, layout=layout).on_query(query[..., :4], token)
    same(found, torch.cat([whole, query[..., 4:]], -1), 0)


def test_float32_differs_from_llama_by_the_rounding_of_its_angles():
    """Theta, its reciprocal and its product with the position are rounded: 2^-22 of the angle."""
    pytest.importorskip("transformers", reason="the reference")
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    token = torch.tensor([0, 1, 7, 1000, 4095, 32767])
    query = torch.cat([torch.ones(6, 64), torch.zeros(6, 64)], -1)  # turned: cosines, then sines
    cosine, sine = LlamaRotaryEmbedding(llama("default", 1e4))(query, token[None])
    expected = torch.cat([cosine[0, :, :64], sine[0, :, :64]], -1)
    theta = torch.tensor(Rotary.of(128).frequencies[0], dtype=torch.float64).repeat(2)
    found = Rotary.of(128).on_query(query, token)
    assert found.dtype == torch.float32
    bound = token[:, None] * theta * 2**-22 + 1e-6
    assert ((found - expected).abs() <= bound).all()


def test_yarn_of_the_paper_is_linear_in_turns():
    width, base, length, factor = 128, 1e4, 4096, 16.0
    theta = base ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    kept = ((length * theta / (2 * math.pi) - 1) / (32 - 1)).clamp(0, 1)
    expected = (1 - kept) * theta / factor + kept * theta
    paper = Yarn(factor, length, ramp="rotations").frequencies(width, base)
    found = torch.tensor(paper, dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=LOOP, atol=0)
    channels = torch.tensor(Yarn(factor, length).frequencies(width, base), dtype=torch.float64)
    ratio = torch.maximum(found / channels, channels / found).max()
    assert float(ratio) == pytest.approx(3.04, abs=0.005)


def test_lengths_stay_and_scores_depend_on_differences():
    query, key = normal(1, 8), normal(1, 8, seed=1)
    rotary = Rotary.of(8)
    at = [torch.tensor([t]) for t in (0, 5, 1000)]
    for t in at:
        same(rotary.on_query(query, t).norm(), query.norm(), EXACT)
    near, far = (rotary.on_query(query, t + 3) @ rotary.on_key(key, t).mT for t in at[1:])
    same(near, far, EXACT)


# Biases by distance


def loops(rows, columns, of):
    """[..., rows, columns] of a function of i and j that returns one tensor."""
    return torch.stack(
        [torch.stack([of(i, j) for j in range(columns)], -1) for i in range(rows)], -2
    )


BLANK = torch.zeros(2, 7, 4, dtype=torch.float64), torch.zeros(2, 9, 4, dtype=torch.float64)


def test_relative_is_its_table():
    table = normal(2, 6)
    expected = loops(7, 9, lambda i, j: table[:, min(max(j - i - 1, -3), 2) + 3])
    same(bias(Relative(table, left=3, offset=1), *BLANK), expected, 0)


@pytest.mark.parametrize(("bidirectional", "last", "start"), [(True, 15, 91), (False, 31, 113)])
def test_the_last_bucket_of_t5_begins_before_its_largest_distance(bidirectional, last, start):
    part = T5(torch.zeros(1, 32), bidirectional=bidirectional)
    buckets = part.bucket(torch.arange(200))
    assert int((buckets == last).nonzero()[0]) == start


def test_kerple_is_its_formula():
    r1, r2 = torch.tensor([0.7, 1e-5]).double(), torch.tensor([0.3, 2.5]).double()
    least1, least2 = r1.clamp(min=0.01), r2.clamp(min=0.01)
    log = loops(7, 9, lambda i, j: -least1 * torch.log(1 + least2 * abs(i + 2 - j)))
    same(bias(Kerple(r1, r2, offset=2), *BLANK), log, LOOP)
    power = loops(7, 9, lambda i, j: -least1 * abs(i + 2 - j) ** least2.clamp(max=2))
    same(bias(Kerple(r1, r2, "power", offset=2), *BLANK), power, LOOP)


@pytest.mark.parametrize("threshold", [0.5, -4.0, 512.0])
def test_fire_is_its_formula(threshold):
    w1, b1, w2, b2 = normal(5), normal(5, seed=1), normal(2, 5, seed=2), normal(2, seed=3)
    c, eps = -0.3, 1e-6

    def one(i, j):
        p = i + 1
        far = math.log(abs(c) * max(p, abs(threshold)) + 1) + eps
        x = math.log(abs(c) * abs(p - j) + 1) / far
        return w2 @ (w1 * x + b1).relu() + b2

    tensors = (torch.tensor(x, dtype=torch.float64) for x in (c, threshold))
    same(bias(Fire(w1, b1, w2, b2, *tensors, eps, offset=1), *BLANK), loops(7, 9, one), LOOP)


# Sinusoids


@pytest.mark.parametrize("width", [8, 7])
def test_sinusoid_is_its_formula_in_three_layouts(width):
    position = torch.tensor([0.0, 1.0, 2.5, 100.0], dtype=torch.float64)

    def table(order, divisor):
        return torch.tensor(
            [[f(p / 10000 ** (c / divisor)) for f, c in order] for p in position.tolist()],
            dtype=torch.float64,
        )

    both, pairs = (math.sin, math.cos), width // 2
    interleaved = [(both[channel % 2], channel // 2) for channel in range(width)]
    same(sinusoid(position, width), table(interleaved, width / 2), LOOP)
    halves = sorted(interleaved, key=lambda entry: entry[0] is math.cos)
    same(sinusoid(position, width, layout="halves"), table(halves, width / 2), LOOP)
    fairseq = [(f, c) for f in both for c in range(pairs)]
    found = sinusoid(position, width, layout="fairseq")
    same(found[:, : 2 * pairs], table(fairseq, pairs - 1), LOOP)
    assert (found[:, 2 * pairs :] == 0).all()
    assert found.shape == (4, width)


# Biases that read the query or the key


def test_shaw_is_relative_key_of_wav2vec2_bert():
    bert = pytest.importorskip(
        "transformers.models.wav2vec2_bert.modeling_wav2vec2_bert", reason="the reference"
    )
    config = bert.Wav2Vec2BertConfig(
        hidden_size=16,
        num_attention_heads=2,
        position_embeddings_type="relative_key",
        left_max_position_embeddings=3,
        right_max_position_embeddings=2,
        attn_implementation="eager",
    )
    layer, x = bert.Wav2Vec2BertSelfAttention(config).double().eval(), normal(1, 9, 16)
    with torch.no_grad():
        _, expected = layer(x)
        query, key = (
            f(x).view(1, 9, 2, 8).transpose(1, 2) for f in (layer.linear_q, layer.linear_k)
        )
        table = layer.distance_embedding.weight
        same(attention(query, key, position=Shaw(table, 3)).dense(), expected, EXACT)


# Weights by offset


@pytest.mark.parametrize("mask", MASKS)
def test_offsets_are_sums_of_the_dense_matrix(mask, small_tiles):
    draw = Draw(5, torch.float64)
    query, key = draw.normal(1, 2, 12, 4), draw.normal(1, 2, 12, 4)
    position = Relative(draw.normal(2, 8), left=3)
    matrix = attention(query, key, position=position, mask=MASKS[mask](draw, SIZES))
    inputs, above = (query, key, position.table), normal(1, 2, 12, 6, seed=9)
    away = torch.arange(12) - torch.arange(12)[:, None]
    for left, right, offset in ((3, 2, 0), (0, 5, 4), (5, 0, -2)):
        dense = matrix.dense()
        at = (away - offset).clamp(-left, right) + left
        expected = torch.zeros(1, 2, 12, left + 1 + right, dtype=torch.float64)
        expected = expected.scatter_add(-1, at.expand_as(dense), dense)
        found = matrix.offsets(left, right, offset=offset)
        same(found, expected, EXACT)
        same(found.sum(-1), dense.sum(-1), EXACT)
        ours = torch.autograd.grad(found, inputs, above)
        for one, other in zip(ours, torch.autograd.grad(expected, inputs, above), strict=True):
            same(one, other, EXACT)


# Sequences that continue


@pytest.mark.parametrize("name", CONTINUED)
def test_new_queries_on_cached_keys_are_the_last_rows_of_the_whole(name):
    query, key, value = (
        normal(1, 2, 12, 4),
        normal(1, 2, 12, 4, seed=1),
        normal(1, 2, 12, 3, seed=2),
    )
    position = part(name)
    whole = attention(query, key, position=position.at(0), mask=Causal())
    for new in (1, 5):
        old = 12 - new
        rest = attention(
            query[..., old:, :], key, position=position.at(old), mask=Causal(offset=old)
        )
        same(rest.dense(), whole.dense()[..., old:, :], EXACT)
        same(rest @ value, (whole @ value)[..., old:, :], EXACT)


@pytest.mark.parametrize("name", CONTINUED)
def test_the_offset_matters(name):
    query, key = normal(1, 2, 12, 4), normal(1, 2, 12, 4, seed=1)
    zero, other = (
        attention(query[..., 8:, :], key, position=part(name).at(at), mask=Causal(offset=8)).dense()
        for at in (0, 8)
    )
    assert (zero - other).abs().max() > SEEN


# Shift invariance


# One-hot rows are almost all -inf, before and after.
@pytest.mark.parametrize("name", [name for name in PARTS if not name.startswith("shift")])
def test_shift_invariance_is_as_stated(name):
    """A query and a key move by r among other tokens: their score stays, or not."""
    position = part(name)
    query, key = normal(1, 2, 12, 4), normal(1, 2, 12, 4, seed=1)
    gap = 0.0
    for i, j in ((2, 1), (1, 4), (5, 0), (3, 3)):
        before = attention(query, key, position=position).logits()[..., i, j]
        for r in (1, 6):
            others = normal(1, 2, 12, 4, seed=2), normal(1, 2, 12, 4, seed=3)
            others[0][..., i + r, :], others[1][..., j + r, :] = query[..., i, :], key[..., j, :]
            after = attention(*others, position=position).logits()[..., i + r, j + r]
            gap = max(gap, float((after - before).detach().abs().max()))
    assert gap <= EXACT if position.shift_invariant else gap > SEEN


# What theorems say


@pytest.mark.parametrize("name", POSITIONS)
def test_only_without_position_does_order_not_matter(name):
    query, key, value = (
        normal(1, 2, 12, 4),
        normal(1, 2, 12, 4, seed=1),
        normal(1, 2, 12, 3, seed=2),
    )
    order = torch.randperm(12, generator=torch.Generator().manual_seed(4))
    position = POSITIONS[name](Draw(3, torch.float64), SIZES)
    plain = attention(query, key, position=position) @ value
    moved = attention(query[..., order, :], key[..., order, :], position=position)
    gap = (moved @ value[..., order, :] - plain[..., order, :]).abs().max()
    assert gap <= EXACT if position is None else gap > SEEN


def test_positions_that_move_with_their_tokens_restore_it():
    query, key, value = (
        normal(1, 2, 12, 4),
        normal(1, 2, 12, 4, seed=1),
        normal(1, 2, 12, 3, seed=2),
    )
    order = torch.randperm(12, generator=torch.Generator().manual_seed(4))
    plain = attention(query, key, position=Rotary.of(4)) @ value
    moved = attention(
        query[..., order, :], key[..., order, :], position=Rotary.of(4, positions=order)
    )
    same(moved @ value[..., order, :], plain[..., order, :], EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_causal_head_without_position_counts(dtype):
    """Equal keys, and a value that marks the first token: row t is 1 / t (2305.19466, thm. 1)."""
    ones, first = torch.ones(4096, 1, dtype=dtype), torch.zeros(4096, 1, dtype=dtype)
    first[0] = 1
    found = (attention(ones, ones, mask=Causal()) @ first)[:, 0]
    expected = 1 / torch.arange(1, 4097, dtype=dtype)
    ulp = torch.nextafter(expected, torch.tensor(torch.inf, dtype=dtype)) - expected
    assert ((found - expected).abs() <= ulp).all()


def test_one_causal_layer_is_blind_to_the_order_of_the_prefix_and_two_are_not():
    x = normal(12, 4)
    order = torch.randperm(11, generator=torch.Generator().manual_seed(1)).tolist()
    moved = x[[*order, 11]]

    def layer(x):
        return x + attention(x, x, mask=Causal()) @ x

    same(layer(moved)[-1], layer(x)[-1], EXACT)
    assert (layer(layer(moved))[-1] - layer(layer(x))[-1]).abs().max() > SEEN
