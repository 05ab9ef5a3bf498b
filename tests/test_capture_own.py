"""Layers of regard and products with its matrices, captured; and what cannot be shown says why."""

import pytest
import torch
from torch import nn

import regard
from regard import (
    T5,
    Additive,
    Alibi,
    Bias,
    Bilinear,
    Causal,
    Cosine,
    Distance,
    Dot,
    Features,
    Rotary,
    RowSum,
    Sigmoid,
    Softmax,
    Window,
)
from regard.convert import from_conv
from regard.look import CaptureError, capture, look, own
from regard.nn import MultiHeadAttention, RecurrentAttention, SelfAttention
from regard.position.content import Cope, Shaw


class Layer(nn.Module):
    """One attention of given parts over its input, which gives the matrix away."""

    def __init__(self, key_heads=4, **parts):
        super().__init__()
        self.key_heads, self.parts, self.last = key_heads, parts, None

    def forward(self, query, key, value):
        self.last = regard.attention(query, key, **self.parts)
        return self.last @ value


def inputs(key_heads=4, n=9, m=9, batch=2):
    torch.manual_seed(0)
    keys = torch.randn(2, batch, key_heads, m, 8)
    return torch.randn(batch, 4, n, 8), keys[0], keys[1]


def parts():
    torch.manual_seed(1)
    yield "plain", {}
    yield "scale per head", {"score": Dot(scale=torch.rand(4))}
    yield "softcap", {"score": Dot(softcap=1.5)}
    yield "bilinear", {"score": Bilinear(torch.randn(8, 8))}
    yield "cosine", {"score": Cosine(3.0)}
    yield "distance", {"score": Distance()}
    yield "additive", {"score": Additive.of(4, 8)}
    yield "own function", {"score": lambda q, k, i, j: -torch.cdist(q, k, p=1)}
    yield "rotary", {"position": Rotary.of(8)}
    yield "alibi", {"position": Alibi.of(4), "mask": Causal()}
    yield "t5 and bias", {"position": T5.of(4) + Bias(torch.randn(4, 9, 9))}
    yield "shaw", {"position": Shaw.of(8, 2, 2, values=False)}
    yield "cope", {"position": Cope.of(8, 4), "mask": Causal()}
    yield "additive with alibi", {"score": Additive.of(4, 8), "position": Alibi.of(4)}
    yield "window and sink", {"mask": Causal() & Window(2, 0), "normalizer": Softmax(sink=0.5)}
    yield "sinks", {"normalizer": Softmax(sink=torch.randn(4))}
    yield "position only", {"score": regard.PositionOnly(), "position": Alibi.of(4)}


@pytest.mark.parametrize("kind", dict(parts()))
@pytest.mark.parametrize("key_heads", [4, 2])
def test_what_is_recorded_is_the_matrix(kind, key_heads):
    layer, given = Layer(**dict(parts())[kind]).eval(), inputs(key_heads)
    if key_heads != 4 and kind in ("additive", "additive with alibi", "own function"):
        given = inputs(4)  # these compare head by head
    with torch.no_grad(), capture(layer) as calls:
        output = layer(*given)
    (call,) = calls
    assert call.route == "regard"
    torch.testing.assert_close(call.matrix.dense(), layer.last.dense())
    torch.testing.assert_close(call.matrix @ call.value, output)
    torch.testing.assert_close(call.output, output)
    one = call.item(1)
    torch.testing.assert_close(one.matrix.dense()[0], layer.last.dense()[1])


@pytest.mark.parametrize("normalizer", [Sigmoid(), RowSum()])
def test_other_normalizers_stay_lazy_and_cannot_be_a_page(normalizer):
    score = Dot() if isinstance(normalizer, Sigmoid) else Features()
    layer = Layer(score=score, normalizer=normalizer).eval()
    with torch.no_grad(), capture(layer) as calls:
        layer(*inputs())
    torch.testing.assert_close(calls[0].matrix.dense(), layer.last.dense())
    assert calls[0].formula == repr(normalizer)
    with pytest.raises(CaptureError, match=rf"normalized by {type(normalizer).__name__}.*softmax"):
        look(layer, inputs())


def test_layers_that_cannot_be_shown_are_named():
    model = nn.Sequential()
    model.first, model.second = SelfAttention(8, 2), SelfAttention(8, 2, normalizer=Sigmoid())
    model.forward = lambda x: model.second(model.first(x)[0])[0]
    seen = look(model.eval(), torch.randn(1, 5, 8))
    assert [call.name for call in seen.captured] == ["first"]
    assert seen.scene.notes == ("Not shown: 1 second, which Sigmoid() normalizes, not softmax.",)
    with pytest.raises(regard.ShapeError, match=r"layers 1 were asked for.*here are 0"):
        look(model, torch.randn(1, 5, 8), layers=[1])


def layers():
    torch.manual_seed(0)
    x = torch.randn(1, 7, 16)
    yield "self", SelfAttention(16, 4, num_kv_heads=2, position=Alibi.of(4)), (x,)
    yield "multihead", MultiHeadAttention(16, 4, batch_first=True), (x, x, x)
    yield "swapped", regard.convert.swap(nn.MultiheadAttention(16, 4, batch_first=True)), (x, x, x)
    yield "conv", from_conv(nn.Conv2d(3, 8, 3, padding=1)), (torch.randn(1, 3, 6, 6),)
    yield "recurrent", RecurrentAttention(16, 4), (x,)


@pytest.mark.parametrize("kind", [kind for kind, *_ in layers()])
def test_layers_of_regard_are_recorded_bit_for_bit(kind):
    model, given = next((m.eval(), x) for name, m, x in layers() if name == kind)
    with torch.no_grad():
        plain = model(*given)
        with capture(model) as calls:
            tapped = model(*given)
    first = lambda x: x[0] if isinstance(x, tuple) else x  # noqa: E731
    assert torch.equal(first(plain), first(tapped))
    assert [call.route for call in calls] == ["regard"]
    call = calls[0]
    if call.given is None:
        torch.testing.assert_close(call.matrix @ call.value, call.output, rtol=1e-4, atol=1e-5)


def test_the_method_is_restored_and_others_pass_through():
    before = regard.Attention.matmul
    layer, given = Layer().eval(), inputs()
    other = Layer().eval()
    with torch.no_grad(), capture(layer) as calls:
        other(*given)
        regard.attention(*given[:2]) @ given[2]
        assert calls == []
        layer(*given)
    assert len(calls) == 1
    assert regard.Attention.matmul is before


def test_torchs_function_on_regard_is_recorded_once():
    class Raw(nn.Module):
        def forward(self, query, key, value):
            return nn.functional.scaled_dot_product_attention(query, key, value)

    with torch.no_grad(), regard.sdpa_kernel(), capture(Raw()) as calls:
        Raw()  # a module that is not the captured one
    model = Raw().eval()
    with torch.no_grad(), regard.sdpa_kernel(), capture(model) as calls:
        output = model(*inputs())
    assert [call.route for call in calls] == ["sdpa"]
    torch.testing.assert_close(calls[0].matrix @ calls[0].value, output)


def test_dropout_and_too_many_logits_are_refused(monkeypatch):
    layer = SelfAttention(8, 2, dropout=0.5).train()
    with capture(layer), pytest.raises(CaptureError, match=r"drops weights.*model\.eval\(\)"):
        layer(torch.randn(1, 5, 8))
    monkeypatch.setattr(own, "LOGITS_AT_MOST", 100)
    layer = Layer(score=Additive.of(4, 8)).eval()
    with torch.no_grad(), capture(layer), pytest.raises(CaptureError, match="fewer tokens"):
        layer(*inputs())


@pytest.mark.parametrize("model", [SelfAttention(8, 2), nn.MultiheadAttention(8, 2)])
def test_an_input_without_tokens_is_refused(model):
    x = torch.zeros(1, 0, 8) if isinstance(model, SelfAttention) else torch.zeros(0, 1, 8)
    given = (x,) if isinstance(model, SelfAttention) else (x, x, x)
    with pytest.raises(CaptureError, match="no weight to look at; give an input of at least one"):
        look(model.eval(), given)
