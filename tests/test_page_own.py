"""Layers of regard on the page: whatever the score, the worked output equals the layer's own."""

import pytest
import torch
from reader import Reader
from torch import nn

from regard import Additive, Alibi, Bias, Causal, Distance, Rotary, Softmax
from regard.convert import from_conv
from regard.look import look
from regard.nn import SelfAttention


def layers():
    torch.manual_seed(0)
    x = torch.randn(1, 7, 16)
    additive = SelfAttention(16, 4, score=Additive.of(4, 4), position=Alibi.of(4))
    yield "additive", additive, (x,), "Additive"
    yield "distance", SelfAttention(16, 4, score=Distance()), (x,), "Distance"
    both = Rotary.of(4) + Bias(torch.randn(4, 7, 7))
    sinks = Softmax(sink=torch.randn(4))
    yield "rotary", SelfAttention(16, 4, position=both, normalizer=sinks), (x,), "q · k"
    conv = from_conv(nn.Conv2d(3, 8, 3, padding=1))
    yield "conv", conv, (torch.randn(1, 3, 5, 5),), "positions alone"


@pytest.mark.parametrize("kind", [kind for kind, *_ in layers()])
def test_outputs_of_regards_layers_check_out(browser, tmp_path, kind):
    model, given, words = next(rest for name, *rest in layers() if name == kind)
    seen = look(model.eval(), given)
    assert seen.scene.change == 0.0
    page = Reader(browser, seen.save(tmp_path / "own.html"))
    for head, i in ((0, 0), (1, 4), (3, 6)):
        page.go(f"#head={head}&i={i}&j=2")
        page.settles(head=head, i=i)
        state, difference = page.check()
        assert state == "good"
        assert difference < 1e-5
    assert words in page.text("worked")
    assert "a matrix of regard’s" in page.text("map-hint")
    page.assert_quiet()


def test_a_causal_layer_is_a_triangle(browser, tmp_path):
    class Decoder(SelfAttention):
        def forward(self, x):
            return super().forward(x, mask=Causal())

    seen = look(Decoder(8, 2).eval(), torch.randn(1, 6, 8))
    assert seen.captured[0].causal
    page = Reader(browser, seen.save(tmp_path / "causal.html"))
    page.go("#head=1&i=2&j=5")
    page.settles(i=2, j=5)
    assert page.text("readout") == "masked, future"
