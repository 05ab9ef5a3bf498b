"""Blocks and stacks: equal to torch's with the same parameters; steps equal the whole."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from regard import (
    T5,
    Additive,
    Alibi,
    Attention,
    Causal,
    FormError,
    Padding,
    Rotary,
    ShapeError,
    Window,
)
from regard.nn import (
    CrossAttention,
    Decoder,
    DecoderLayer,
    Encoder,
    EncoderDecoder,
    EncoderLayer,
    KVCache,
    RecurrentAttention,
    RecurrentState,
    SelfAttention,
)

D, H, N, M = 16, 4, 7, 9
GENERATOR = torch.Generator().manual_seed(11)
X = torch.randn(3, N, D, generator=GENERATOR, dtype=torch.float64)
MEMORY = torch.randn(3, M, D, generator=GENERATOR, dtype=torch.float64)
KEEP = Padding.of_lengths(torch.tensor([M, 4, 6]), M)
# Two ways to sum the same products in float64: some hundred roundings of 1e-16 each.
CLOSE = {"rtol": 1e-11, "atol": 1e-12}


def encoder_layer(norm_first=False, dropout=0.1, **parts):
    return EncoderLayer(SelfAttention(D, H, **parts), 24, dropout=dropout, norm_first=norm_first)


def decoder_layer(norm_first=False, dropout=0.1, **parts):
    own, cross = SelfAttention(D, H, **parts), CrossAttention(D, H)
    return DecoderLayer(own, cross, 24, dropout=dropout, norm_first=norm_first)


def seeded(make, *arguments, **more):
    """In float64; biases and norms away from 0 and 1, which would hide that one is left out."""
    torch.manual_seed(2)
    model = make(*arguments, **more).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn_like(parameter) / 10
    return model


def stack(make, count=2, **parts):
    kind = Encoder if make is encoder_layer else Decoder
    return seeded(lambda: kind([make(**parts) for _ in range(count)], nn.LayerNorm(D)))


def same_gradients(one, other, *pairs):
    """Outputs, and gradients of all parameters by name."""
    for model, output in ((one, pairs[0]), (other, pairs[1])):
        output.square().sum().backward()
        assert all(p.grad is not None for p in model.parameters())
    torch.testing.assert_close(*pairs, **CLOSE)
    theirs = dict(other.named_parameters())
    for name, parameter in one.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[name].grad, **CLOSE)


TORCH = {"batch_first": True, "dtype": torch.float64, "dropout": 0.1}


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("activation", [F.relu, F.gelu])
def test_encoder_layers_are_those_of_torch(norm_first, activation):
    make = functools.partial(EncoderLayer, SelfAttention(D, H), 24, activation=activation)
    ours = seeded(make, norm_first=norm_first)
    theirs = nn.TransformerEncoderLayer(
        D, H, 24, activation=activation, norm_first=norm_first, **TORCH
    ).eval()
    theirs.load_state_dict(ours.state_dict())
    wanted = theirs(X, src_mask=nn.Transformer.generate_square_subsequent_mask(N).double())
    same_gradients(ours, theirs, ours(X, mask=Causal()), wanted)
    hidden = torch.zeros(3, N, dtype=torch.bool)
    hidden[1, 4:] = True
    torch.testing.assert_close(
        ours(X, mask=Padding(~hidden)), theirs(X, src_key_padding_mask=hidden), **CLOSE
    )


@pytest.mark.parametrize("norm_first", [False, True])
def test_decoder_layers_are_those_of_torch(norm_first):
    ours = seeded(decoder_layer, norm_first)
    theirs = nn.TransformerDecoderLayer(D, H, 24, norm_first=norm_first, **TORCH).eval()
    theirs.load_state_dict(ours.state_dict())
    wanted = theirs(
        X,
        MEMORY,
        tgt_mask=nn.Transformer.generate_square_subsequent_mask(N).double(),
        memory_key_padding_mask=~KEEP.keep,
    )
    same_gradients(ours, theirs, ours(X, MEMORY, mask=Causal(), memory_mask=KEEP), wanted)


@pytest.mark.parametrize("norm_first", [False, True])
def test_encoder_and_decoder_are_torchs_transformer(norm_first):
    parts = {"norm_first": norm_first}
    ours = EncoderDecoder(stack(encoder_layer, **parts), stack(decoder_layer, **parts))
    theirs = nn.Transformer(D, H, 2, 2, 24, norm_first=norm_first, **TORCH).eval()
    theirs.load_state_dict(ours.state_dict())
    causal = nn.Transformer.generate_square_subsequent_mask(N).double()
    masks = {"src_key_padding_mask": ~KEEP.keep, "memory_key_padding_mask": ~KEEP.keep}
    wanted = theirs(MEMORY, X, tgt_mask=causal, **masks)
    same_gradients(ours, theirs, ours(MEMORY, X, source_mask=KEEP, memory_mask=KEEP), wanted)


def test_dropout_falls_where_torchs_does():
    """With the residual parts dropped altogether, only the sums and the norms are left."""
    for norm_first in (False, True):
        ours = encoder_layer(norm_first, dropout=1.0).double()
        theirs = nn.TransformerEncoderLayer(D, H, 24, 1.0, norm_first=norm_first, batch_first=True)
        theirs = theirs.double()
        theirs.load_state_dict(ours.state_dict())
        torch.testing.assert_close(ours(X), theirs(X), **CLOSE)
    torch.manual_seed(0)
    inside = encoder_layer(True, dropout=0.5).double()
    assert not torch.equal(inside(X), inside(X))
    assert torch.equal(inside.eval()(X), inside(X))


PARTS = {
    "plain": {},
    "grouped, rotary": {"num_kv_heads": 2, "position": Rotary.of(D // H)},
    "additive, alibi": {"score": Additive.of(H, D // H), "position": Alibi.of(H)},
    "t5": {"position": T5(torch.randn(H, 8, generator=GENERATOR), bidirectional=False)},
}


def steps(model, state, x, prompt):
    """A prompt, tokens one by one, and the last two together."""
    with torch.no_grad():
        found = [model(x[:, :prompt], state=state)]
        found += [model.step(x[:, t], state)[:, None] for t in range(prompt, N - 2)]
        found.append(model(x[:, N - 2 :], state=state))
    assert state.length == N
    return torch.cat(found, 1)


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("prompt", [0, 3])
def test_steps_of_stacks_equal_the_whole(name, norm_first, prompt):
    parts = {**PARTS[name], "norm_first": norm_first}
    encoder, decoder = stack(encoder_layer, **parts), stack(decoder_layer, **parts)
    state = encoder.state()
    assert all(isinstance(part, KVCache) for part in state.parts)
    torch.testing.assert_close(steps(encoder, state, X, prompt), encoder(X, mask=Causal()), **CLOSE)
    whole = decoder(X, MEMORY, mask=Causal(), memory_mask=KEEP)
    found = steps(decoder, decoder.state(MEMORY, KEEP), X, prompt)
    torch.testing.assert_close(found, whole, **CLOSE)


def test_a_recurrent_layer_steps_from_a_constant_state():
    layer = seeded(lambda: EncoderLayer(RecurrentAttention(D, H, decay="token", delta=True)))
    state, sizes = layer.state(), set()
    assert isinstance(state, RecurrentState)
    found = []
    for t in range(N):
        found.append(layer.step(X[:, t], state))
        sizes.add(state.bytes)
    torch.testing.assert_close(torch.stack(found, 1), layer(X), **CLOSE)
    assert len(sizes) == 1


def test_encoder_decoder_steps():
    model = EncoderDecoder(stack(encoder_layer), stack(decoder_layer))
    whole = model(MEMORY, X, source_mask=KEEP, memory_mask=KEEP)
    state = model.state(MEMORY, source_mask=KEEP, memory_mask=KEEP)
    found = torch.stack([model.step(X[:, t], state) for t in range(N)], 1)
    torch.testing.assert_close(found, whole, **CLOSE)
    # Two layers: N tokens and M of the memory, keys and values of D channels in float64.
    assert state.bytes == 2 * 3 * (N + M) * 2 * D * 8


def test_beams_take_their_memory_and_its_mask_along():
    decoder, index = stack(decoder_layer), torch.tensor([2, 0, 2])
    state, again = (
        decoder.state(MEMORY, KEEP),
        decoder.state(MEMORY[index], Padding(KEEP.keep[index])),
    )
    with torch.no_grad():
        decoder(X[:, :3], state=state)
        decoder(X[index, :3], state=again)
        state.reorder(index)
        found, wanted = (decoder.step(X[:, 3], one) for one in (state, again))
    torch.testing.assert_close(found, wanted, **CLOSE)


def test_matrices_on_request_and_only_then():
    encoder, decoder = stack(encoder_layer), stack(decoder_layer)
    output, matrices = encoder(X, mask=Window(2, 1), need_weights=True)
    assert torch.equal(output, encoder(X, mask=Window(2, 1)))
    assert [A.shape for A in matrices] == [(3, H, N, N)] * 2
    assert all(isinstance(A, Attention) for A in matrices)
    output, pairs = decoder(X, MEMORY, memory_mask=KEEP, need_weights=True)
    assert [A.shape for pair in pairs for A in pair] == [(3, H, N, N), (3, H, N, M)] * 2
    assert pairs[1][1].dense()[1, ..., 4:].abs().max() == 0  # padded
    output, (own, both) = EncoderDecoder(encoder, decoder)(MEMORY, X, need_weights=True)
    assert len(own) == len(both) == 2
    assert pairs[0][0].dense().triu(1).abs().max() > 0  # no mask, as in torch
    assert both[0][0].dense().triu(1).abs().max() == 0  # causal unless told otherwise


def test_cross_attention_from_what_is_kept():
    layer = seeded(lambda: CrossAttention(D, H, score=Additive.of(H, D // H), bias=False))
    whole, A = layer(X, MEMORY, mask=KEEP)
    kept = layer.project(MEMORY, KEEP)
    assert torch.equal(layer(X, kept)[0], whole)
    assert kept.length == M
    value = (MEMORY @ layer.in_proj_weight[2 * D :].mT).unflatten(-1, (H, -1)).transpose(1, 2)
    wanted = layer.out_proj((A.dense() @ value).transpose(1, 2).flatten(-2))
    torch.testing.assert_close(whole, wanted, **CLOSE)


def test_what_does_not_fit_says_so():
    own, cross = SelfAttention(D, H), CrossAttention(D, H)
    encoder, decoder = stack(encoder_layer), stack(decoder_layer)
    state = decoder.state(MEMORY)
    with pytest.raises(TypeError, match=r"self_attn is a Linear; .*SelfAttention"):
        EncoderLayer(nn.Linear(D, D))
    with pytest.raises(TypeError, match=r"multihead_attn is a SelfAttention; .*CrossAttention"):
        DecoderLayer(own, own)
    with pytest.raises(ShapeError, match="16 channels and multihead_attn 32"):
        DecoderLayer(own, CrossAttention(32, H))
    with pytest.raises(TypeError, match="dim_feedforward must be"):
        EncoderLayer(own, 2.5)
    with pytest.raises(ValueError, match="layers is empty"):
        Encoder([])
    with pytest.raises(TypeError, match="one of the layers is a EncoderLayer"):
        Decoder([encoder_layer()])
    with pytest.raises(ShapeError, match=r"layers have \[16, 32\] channels"):
        Encoder([encoder_layer(), EncoderLayer(SelfAttention(32, H))])
    with pytest.raises(ShapeError, match="encoder has 32 channels and the decoder 16"):
        EncoderDecoder(Encoder([EncoderLayer(SelfAttention(32, H))]), decoder)
    with pytest.raises(ValueError, match="neither is given"):
        decoder(X)
    with pytest.raises(ValueError, match="both are given"):
        decoder(X, MEMORY, state=state)
    with pytest.raises(ValueError, match="state has a mask of the memory"):
        decoder(X, memory_mask=KEEP, state=state)
    with pytest.raises(ValueError, match="a mask or a state"):
        encoder(X, mask=Causal(), state=encoder.state())
    with pytest.raises(FormError, match=r"hides the same keys from every token, by Padding"):
        decoder.state(MEMORY, Window(1, 1))
    with pytest.raises(ValueError, match="a Memory has its own mask"):
        cross.double()(X, cross.project(MEMORY), mask=KEEP)
    with pytest.raises(ShapeError, match=r"has 2 layers and needs a state of each, .* given 1"):
        encoder(X, state=stack(encoder_layer, 1).state())
    with pytest.raises(ShapeError, match=r"memory has shape \(3, 9, 15\)"):
        decoder(X, MEMORY[..., 1:])
    with pytest.raises(ShapeError, match="takes 16 channels"):
        encoder(X[..., 1:])


def test_encoder_and_decoder_are_one_graph():
    model = EncoderDecoder(stack(encoder_layer), stack(decoder_layer))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    masks = {"source_mask": KEEP, "memory_mask": KEEP}
    torch.testing.assert_close(compiled(MEMORY, X, **masks), model(MEMORY, X, **masks), **CLOSE)
