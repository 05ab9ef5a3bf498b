"""Position against transformers and x-transformers, plain loops, and what the papers prove."""

import math

import pytest
import torch

from regard import Alibi, Bias, Causal, PositionOnly, attention
from regard.errors import DtypeError, ShapeError
from regard.position import (
    T5,
    Cope,
    DynamicNtk,
    Fire,
    Interpolation,
    Kerple,
    Llama3,
    LongRope,
    Ntk,
    Proportional,
    Relative,
    Rotary,
    Shaw,
    TransformerXL,
    Yarn,
    sinusoid,
)
from tests.laws import MASKS, POSITIONS, Draw, Sizes

EXACT, LOOP, FLOAT32, SEEN = 1e-12, 1e-13, 1e-6, 1e-3
"""Rounding of float64, of one formula in it, of float32; a difference that is none of these."""

PARTS = [name for name in POSITIONS if name != "none"]
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


LONG = tuple(1 + c / 8 for c in range(64))
SHORT = tuple(1 + c / 64 for c in range(64))
ROPE = {  # what transformers is configured with, its length and base, and the same here
    "default": ({}, None, 1e4, {}),
    "linear": ({"factor": 4.0}, None, 1e4, {"scaling": Interpolation(4.0)}),
    "dynamic": ({"factor": 4.0}, 8192, 1e4, {"scaling": DynamicNtk(4.0, 8192, 2048)}),
    "dynamic, short": ({"factor": 4.0}, 100, 1e4, {"scaling": DynamicNtk(4.0, 100, 2048)}),
    "yarn": (
        {"factor": 16.0, "original_max_position_embeddings": 4096},
        None,
        1e4,
        {"scaling": Yarn(16.0, 4096)},
    ),
    "yarn, not rounded": (
        {
            "factor": 4.0,
            "original_max_position_embeddings": 4096,
            "beta_fast": 20.0,
            "beta_slow": 2.0,
            "truncate": False,
            "attention_factor": 1.25,
        },
        None,
        1.5e5,
        {"scaling": Yarn(4.0, 4096, 20.0, 2.0, rounded=False, attention_factor=1.25)},
    ),
    "longrope": (
        {
            "factor": 32.0,
            "original_max_position_embeddings": 4096,
            "short_factor": list(SHORT),
            "long_factor": list(LONG),
        },
        5000,
        1e4,
        {"scaling": LongRope(SHORT, LONG, 5000, 4096, 32.0)},
    ),
    "longrope, short": (
        {
            "factor": 32.0,
            "original_max_position_embeddings": 4096,
            "short_factor": list(SHORT),
            "long_factor": list(LONG),
        },
        4096,
        1e4,
        {"scaling": LongRope(SHORT, LONG, 4096, 4096, 32.0)},
    ),
    "llama3": (
        {
            "factor": 8.0,
            "original_max_position_embeddings": 8192,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
        },
        None,
        5e5,
        {"scaling": Llama3(8.0, 8192)},
    ),
    "proportional": (
        {"partial_rotary_factor": 0.25, "factor": 2.0},
        None,
        1e6,
        {"scaling": Proportional(0.25, 2.0)},
    ),
    "linear, partial": (
        {"factor": 2.0, "partial_rotary_factor": 0.5},
        None,
        1e4,
        {"scaling": Interpolation(2.0), "fraction": 0.5},
    ),
}


def llama(kind, base, length=2048, **more):
    config = pytest.importorskip("transformers", reason="the reference").LlamaConfig
    return config(
        hidden_size=256,
        num_attention_heads=2,
        head_dim=128,
        max_position_embeddings=length,
        rope_parameters={"rope_type": kind, "rope_theta": base, **more},
    )


def test_every_type_of_transformers_is_compared():
    utils = pytest.importorskip("transformers.modeling_rope_utils", reason="the reference")
    assert {name.split(",")[0] for name in ROPE} == {"default", *utils.ROPE_INIT_FUNCTIONS}


@pytest.mark.parametrize("name", ROPE)
def test_frequencies_are_those_of_transformers(name):
    utils = pytest.importorskip("transformers.modeling_rope_utils", reason="the reference")
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    more, length, base, ours = ROPE[name]
    kind = name.split(",")[0]
    compute = LlamaRotaryEmbedding.compute_default_rope_parameters
    compute = utils.ROPE_INIT_FUNCTIONS.get(kind, compute)
    expected, factor = compute(llama(kind, base, **more), device=None, seq_len=length)
    rotary = Rotary.of(128, base=base, **ours)
    found = torch.tensor(rotary.frequencies[0], dtype=torch.float64)
    torch.testing.assert_close(found, expected.double(), rtol=1e-6, atol=0)
    assert rotary.magnitude == pytest.approx(factor, rel=1e-6)


def test_halves_turn_as_llama_does():
    llama = pytest.importorskip("transformers.models.llama.modeling_llama", reason="the reference")
    query, token = normal(2, 3, 5, 8), torch.arange(5) + 1000
    theta = 10000.0 ** (-torch.arange(0, 8, 2, dtype=torch.float64) / 8)
    angle = (token[:, None] * theta).repeat(1, 2)[None]
    expected, _ = llama.apply_rotary_pos_emb(query, query, angle.cos(), angle.sin())
    same(Rotary.of(8).on_query(query, token), expected, EXACT)
    same(Rotary.of(8, offset=1000).on_query(query, torch.arange(5)), expected, EXACT)
    same(Rotary.of(8).on_key(query, token), expected, EXACT)


def test_interleaved_turn_as_gptj_does():
    gptj = pytest.importorskip("transformers.models.gptj.modeling_gptj", reason="the reference")
    query, token = normal(2, 3, 5, 8), torch.arange(5) + 1000
    theta = 10000.0 ** (-torch.arange(0, 8, 2, dtype=torch.float64) / 8)
    angle = (token[:, None] * theta)[None]
    expected = gptj.apply_rotary_pos_emb(query.transpose(1, 2), angle.sin(), angle.cos())
    found = Rotary.of(8, layout="interleaved").on_query(query, token)
    same(found, expected.transpose(1, 2), EXACT)


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


@pytest.mark.parametrize(("bidirectional", "last"), [(True, 91), (False, 113)])
def test_t5_buckets_are_those_of_transformers(bidirectional, last):
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5", reason="the reference")
    distance = torch.arange(-4096, 4097)
    for buckets, most in ((32, 128), (8, 9), (64, 512)):
        expected = t5.T5Attention._relative_position_bucket(
            -distance, bidirectional=bidirectional, num_buckets=buckets, max_distance=most
        )
        found = T5(torch.zeros(1, buckets), bidirectional, most).bucket(distance)
        assert torch.equal(found, expected)
    bucket = T5(torch.zeros(1, 32), bidirectional).bucket
    top = 15 if bidirectional else 31
    assert bucket(torch.tensor([last - 1, last, 128])).tolist() == [top - 1, top, top]


@pytest.mark.parametrize("decoder", [False, True])
def test_t5_bias_is_that_of_transformers(decoder):
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5", reason="the reference")
    config = t5.T5Config(d_model=8, d_kv=2, num_heads=4, is_decoder=decoder)
    layer = t5.T5Attention(config, has_relative_attention_bias=True, layer_idx=0)
    table = normal(4, 32, dtype=torch.float32)
    with torch.no_grad():
        layer.relative_attention_bias.weight.copy_(table.T)
        expected = layer.compute_bias(40, 150, past_seen_tokens=110)[0]
    position = T5(table, bidirectional=not decoder, offset=110)
    same(bias(position, torch.zeros(4, 40, 2), torch.zeros(4, 150, 2)), expected, 0)


@pytest.mark.parametrize("heads", range(1, 65))
def test_alibi_gives_the_weights_of_bloom(heads):
    """Bloom adds slope j, which differs from -slope (i - j) by a constant for each row."""
    bloom = pytest.importorskip("transformers.models.bloom.modeling_bloom", reason="the reference")
    theirs = bloom.build_alibi_tensor(torch.ones(1, 40), heads, torch.float32).expand(-1, 40, -1)
    ahead = torch.ones(40, 40).triu(1).bool()
    expected = theirs.masked_fill(ahead, -torch.inf).softmax(-1)
    zeros = torch.zeros(heads, 40, 1)
    matrix = attention(zeros, zeros, score=PositionOnly(), position=Alibi.of(heads), mask=Causal())
    same(matrix.dense(), expected, FLOAT32)


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


@pytest.mark.parametrize("width", [8, 9])
def test_sinusoid_halves_are_marians(width):
    marian = pytest.importorskip(
        "transformers.models.marian.modeling_marian", reason="the reference"
    )
    expected = marian.MarianSinusoidalPositionalEmbedding(50, width).create_weight()
    same(sinusoid(torch.arange(50), width, layout="halves"), expected, 2**-23)


# Biases that read the query or the key


def test_shaw_is_its_formula_and_adds_to_the_output():
    query, key, value = normal(2, 7, 4), normal(2, 9, 4, seed=1), normal(2, 9, 3, seed=2)
    keys, values = normal(5, 4, seed=3), normal(5, 3, seed=4)

    def entry(i, j):
        return min(max(j - i - 1, -3), 1) + 3

    shaw = Shaw(keys, 3, values, offset=1)
    expected = loops(7, 9, lambda i, j: (query[:, i] * keys[entry(i, j)]).sum(-1) / 2)
    same(bias(shaw, query, key), expected, LOOP)
    unscaled = Shaw(keys, 3, scale=1.0, offset=1)
    same(bias(unscaled, query, key), 2 * expected, LOOP)

    matrix = attention(query, key, position=shaw)
    weights = ((query @ key.mT) / 2 + expected).softmax(-1)
    same(matrix.dense(), weights, EXACT)
    joined = torch.stack([torch.stack([values[entry(i, j)] for j in range(9)]) for i in range(7)])
    same(matrix @ value, weights @ value, EXACT)
    same(shaw.on_output(matrix), torch.einsum("hij,ijc->hic", weights, joined), EXACT)


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


def test_transformer_xl_is_a_gather_of_its_formula():
    query, key = normal(2, 7, 4), normal(2, 9, 4, seed=1)
    weight, u, v = normal(2, 4, 6, seed=2), normal(2, 4, seed=3), normal(2, 4, seed=4)

    def one(i, j):
        angles = [(i + 1 - j) / 10000 ** (2 * c / 6) for c in range(3)]
        wave = [f(angle) for f in (math.sin, math.cos) for angle in angles]
        seen = weight @ torch.tensor(wave, dtype=torch.float64)
        return ((u * key[:, j]).sum(-1) + ((query[:, i] + v) * seen).sum(-1)) / 2

    position = TransformerXL(weight, u, v, offset=1)
    same(bias(position, query, key), loops(7, 9, one), LOOP)
    of_query, of_key = position.channels(query, key, torch.arange(7), torch.arange(9))
    same(of_query @ of_key.mT, loops(7, 9, one), LOOP)


def test_transformer_xl_gives_the_weights_of_xlnet():
    xlnet = pytest.importorskip("transformers.models.xlnet.modeling_xlnet", reason="the reference")
    config = xlnet.XLNetConfig(d_model=8, n_head=2, n_layer=1, d_inner=8, dropout=0.0)
    layer = xlnet.XLNetRelativeAttention(config).double().eval()
    query, key = normal(1, 2, 5, 4), normal(1, 2, 9, 4, seed=1)  # four keys come from memory
    weight, u, v = normal(2, 4, 8, seed=2), normal(2, 4, seed=3), normal(2, 4, seed=4)
    angle = torch.arange(9, -5, -1)[:, None] / 10000 ** (torch.arange(0, 8, 2).double() / 8)
    wave = torch.cat([angle.sin(), angle.cos()], -1)[:, None]
    with torch.no_grad():
        layer.r_w_bias.copy_(u)
        layer.r_r_bias.copy_(v)
        ours = (x.permute(2, 0, 1, 3) for x in (query, key, key))
        relative = torch.einsum("pbw,hdw->pbhd", wave, weight)
        _, theirs = layer.rel_attn_core(*ours, relative, output_attentions=True)
    # Positions of XLNet's gather are those of queries that begin where its keys do.
    found = attention(query, key, position=TransformerXL(weight, u, v)).dense()
    shifted = attention(query, key, position=TransformerXL(weight, u, v, offset=4)).dense()
    expected = theirs.permute(2, 3, 0, 1)
    gaps = [float((x - expected).abs().max()) for x in (found, shifted)]
    assert min(gaps) <= EXACT, gaps


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, FLOAT32), (torch.float64, EXACT)])
@pytest.mark.parametrize("entries", [3, 20])
def test_cope_is_that_of_x_transformers(dtype, tolerance, entries):
    other = pytest.importorskip("x_transformers.x_transformers", reason="the reference")
    unit = torch.nn.functional.normalize
    query, table = unit(normal(1, 2, 8, 4), dim=-1), unit(normal(entries, 4, seed=2), dim=-1)
    query, table, key = query.to(dtype), table.to(dtype), normal(1, 2, 8, 4, seed=1, dtype=dtype)
    theirs = other.CoPE(dim=4, heads=2, max_pos=entries).to(dtype)
    ahead = torch.ones(8, 8).triu(1).bool()
    with torch.no_grad():
        theirs.pos_emb.copy_(table)
        logits = (query @ key.mT / 2).masked_fill(ahead, -torch.finfo(dtype).max)
        expected = theirs(query, logits)
    same(bias(Cope(table), query, key), expected, tolerance)


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


@pytest.mark.parametrize("name", [name for name in PARTS if name != "bias"])
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


@pytest.mark.parametrize("name", [name for name in PARTS if name != "bias"])
def test_the_offset_matters(name):
    query, key = normal(1, 2, 12, 4), normal(1, 2, 12, 4, seed=1)
    zero, other = (
        attention(query[..., 8:, :], key, position=part(name).at(at), mask=Causal(offset=8)).dense()
        for at in (0, 8)
    )
    assert (zero - other).abs().max() > SEEN


# Shift invariance


@pytest.mark.parametrize("name", PARTS)
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
            gap = max(gap, float((after - before).abs().max()))
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


# Errors


QUERY = torch.zeros(1, 2, 5, 4)


def on(position):
    return lambda: attention(QUERY, QUERY, position=position())


ERRORS = {
    "rotary, odd": (lambda: Rotary.of(7), ShapeError, ["7"]),
    "rotary, odd part": (lambda: Rotary.of(8, fraction=0.375), ShapeError, ["0.375", "8", "3"]),
    "rotary, axes": (lambda: Rotary.axial(6, torch.zeros(5, 2)), ShapeError, ["6", "2"]),
    "rotary, wide": (on(lambda: Rotary.of(8)), ShapeError, ["width 4", "4 pairs"]),
    "rotary, few": (
        on(lambda: Rotary.of(4, positions=torch.arange(3))),
        ShapeError,
        ["3 tokens", "5 keys"],
    ),
    "rotary, offset": (
        on(lambda: Rotary.of(4, positions=torch.arange(6), offset=2)),
        ShapeError,
        ["6 tokens", "2 to 6"],
    ),
    "rotary, bool": (
        lambda: Rotary.of(4, positions=torch.ones(5, dtype=torch.bool)),
        DtypeError,
        ["bool"],
    ),
    "rotary, list": (lambda: Rotary.of(4, positions=[0, 1]), DtypeError, ["list"]),
    "rotary, shape": (lambda: Rotary.of(4, positions=torch.zeros(2, 5)), ShapeError, ["(2, 5)"]),
    "rotary, no coordinates": (on(lambda: Rotary(((1.0,), (0.5,)))), ShapeError, ["2 coordinates"]),
    "rotary, layout": (lambda: Rotary.of(4, layout="thirds"), ValueError, ["'thirds'"]),
    "relative, short": (lambda: Relative(torch.zeros(2, 2), 3), ShapeError, ["2 ent", "-3", "4"]),
    "relative, heads": (on(lambda: Relative(torch.zeros(3, 8), 3)), ShapeError, ["3", "2"]),
    "shaw, short": (lambda: Shaw(torch.zeros(2, 4), 3), ShapeError, ["2 ent", "-3", "4"]),
    "shaw, short values": (
        lambda: Shaw(torch.zeros(4, 4), 3, torch.zeros(3, 4)),
        ShapeError,
        ["3 ent", "-3", "4"],
    ),
    "shaw, width": (on(lambda: Shaw(torch.zeros(3, 6), 1)), ShapeError, ["width 6", "width 4"]),
    "shaw, heads": (on(lambda: Shaw(torch.zeros(3, 3, 4), 1)), ShapeError, ["3", "2"]),
    "t5, odd": (lambda: T5(torch.zeros(1, 7)), ShapeError, ["7 buckets", "4"]),
    "t5, few": (lambda: T5(torch.zeros(1, 2)), ShapeError, ["2 buckets", "4"]),
    "t5, one": (lambda: T5(torch.zeros(1, 1), bidirectional=False), ShapeError, ["1 buckets", "2"]),
    "t5, distance": (lambda: T5(torch.zeros(1, 32), max_distance=8), ValueError, ["9", "8"]),
    "t5, heads": (on(lambda: T5(torch.zeros(3, 8))), ShapeError, ["3", "2"]),
    "alibi, heads": (on(lambda: Alibi.of(3)), ShapeError, ["3", "2"]),
    "kerple, heads": (on(lambda: Kerple.of(3)), ShapeError, ["3", "2"]),
    "kerple, kind": (
        lambda: Kerple(torch.ones(1), torch.ones(1), "square"),
        ValueError,
        ["'square'"],
    ),
    "fire, heads": (on(lambda: Fire.of(3)), ShapeError, ["3", "2"]),
    "fire, network": (
        lambda: Fire(torch.ones(4), torch.ones(5), torch.ones(2, 4), torch.ones(2), *torch.ones(2)),
        ShapeError,
        ["4, 5"],
    ),
    "fire, output": (
        lambda: Fire(torch.ones(4), torch.ones(4), torch.ones(2, 4), torch.ones(3), *torch.ones(2)),
        ShapeError,
        ["2", "3"],
    ),
    "xl, width": (on(lambda: TransformerXL.of(2, 6, 8)), ShapeError, ["width 6", "width 4"]),
    "xl, heads": (on(lambda: TransformerXL.of(3, 4, 8)), ShapeError, ["3", "2"]),
    "xl, odd": (lambda: TransformerXL.of(2, 4, 7), ShapeError, ["7 columns"]),
    "cope, width": (on(lambda: Cope.of(6, 3)), ShapeError, ["width 6", "width 4"]),
    "cope, heads": (on(lambda: Cope(torch.zeros(3, 3, 4))), ShapeError, ["3", "2"]),
    "bias": (on(lambda: Bias(torch.zeros(5, 6))), ShapeError, ["(5, 6)", "(5, 5)"]),
    "longrope": (
        lambda: Rotary.of(8, scaling=LongRope((1.0,) * 3, (1.0,) * 4, 9, 10)),
        ShapeError,
        ["3 short", "4 pairs", "8"],
    ),
    "ntk": (lambda: Rotary.of(2, scaling=Ntk(2.0)), ShapeError, ["4", "2"]),
    "yarn, order": (lambda: Yarn(2.0, 100, fast=1.0, slow=2.0), ValueError, ["1.0", "2.0"]),
    "yarn, ramp": (lambda: Yarn(2.0, 100, ramp="turns"), ValueError, ["'turns'"]),
    "sinusoid": (lambda: sinusoid(torch.arange(3), 4, layout="pairs"), ValueError, ["'pairs'"]),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_name_the_numbers(name):
    call, kind, parts = ERRORS[name]
    with pytest.raises(kind) as raised:
        call()
    for said in parts:
        assert said in str(raised.value)


def test_transformer_xl_is_a_product_of_further_channels():
    """What `channels` says is the bias itself, for groups of heads too."""
    draw = laws.Draw(0, torch.float64)
    query, key = draw.normal(4, 9, 6), draw.normal(2, 11, 6)
    part = TransformerXL(draw.normal(4, 6, 8), draw.normal(4, 6), draw.normal(4, 6), offset=2)
    i, j = torch.arange(9), torch.arange(11)
    left, right = part.channels(query, key, i, j)
    product = left @ right.repeat_interleave(2, 0).mT
    assert (product - part.on_score(query, key, i, j)).abs().max() <= 1e-12
