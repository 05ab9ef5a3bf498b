"""The worked output's rotary step, its other sequence, and what W^o makes of it, in a browser."""

import math

import pytest
import torch
from reader import Reader
from test_capture import build
from test_rotation import MODELS, a_model
from torch import nn

from regard.look import look


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers", reason="the package transformers is not installed")


def strips(page, where):
    """(name, how many numbers, the largest) of each strip inside a selector."""
    labels = page.run(
        "return [...document.querySelectorAll(arguments[0] + ' .strip')].map((x) => x.ariaLabel)",
        where,
    )
    found = []
    for label in labels:
        name, rest = label.split(": ", 1) if not label.startswith("sum: o: ") else ("o", label[8:])
        found.append((name, int(rest.split()[0]), float(rest.split()[-1].replace("−", "-"))))
    return found


def shown(number):
    return pytest.approx(number, rel=6e-3, abs=6e-4)


def test_rotary_is_a_step_of_its_own(browser, transformers, tmp_path):
    model, inputs = build(transformers, "llama")
    seen = look(model, inputs)
    page = Reader(browser, seen.save(tmp_path / "llama.html"))
    page.go("#layer=1&head=3&i=5&j=2&step=3")
    page.settles(layer=1, head=3, i=5, j=2, step=3)
    assert "turned by an angle that grows with the token’s position" in page.text("step-words")
    call = seen.captured[1]
    with torch.no_grad():
        layer = model.layers[1].self_attn
        query = layer.q_proj(call.inputs)[0, 5].unflatten(-1, (4, 8))[3]
        key = layer.k_proj(call.inputs)[0, 2].unflatten(-1, (2, 8))[1]
    before, angle, after, *of_key = strips(page, "#worked .turn")
    assert before == ("q", 8, shown(float(query.abs().max())))
    assert angle == ("angle", 4, shown(float(call.turned.query[0, 5].abs().max())))
    assert angle[2] <= math.pi
    assert after == ("R q", 8, shown(float(call.query[0, 3, 5].abs().max())))
    assert of_key[0] == ("k", 8, shown(float(key.abs().max())))
    # Not innerText, which of a panel out of the window is empty.
    titles = (
        "return [...document.querySelectorAll('#worked th')].map((x) => x.firstChild.textContent)"
    )
    assert page.run(titles)[1:4] == ["aⱼ", "kⱼ", "R kⱼ"]
    page.assert_quiet()


def test_rotary_with_a_factor_and_of_some_numbers(browser, transformers, tmp_path):
    model, ids = a_model(transformers, *MODELS["Llama yarn"], length=9)
    seen = look(model, {"input_ids": ids[:1]})
    page = Reader(browser, seen.save(tmp_path / "yarn.html"))
    page.go("#layer=1&head=3&i=5&j=2&step=3")
    page.settles(layer=1, head=3, i=5, j=2, step=3)
    words = page.text("step-words")
    assert "each pair of numbers (c and c + 4) of q and k is turned" in words
    assert "and multiplied by 1.139, so that" in words
    assert "those of the cosines and sines that the layer was given" in words
    assert "What “q_proj” and “k_proj” made, turned by them, is what was multiplied" in words
    call, layer = seen.captured[1], model.layers[1].self_attn
    with torch.no_grad():
        query = layer.q_proj(call.inputs)[0, 5].unflatten(-1, (4, 8))[3]
        key = layer.k_proj(call.inputs)[0, 2].unflatten(-1, (2, 8))[1]
    before, _, after, of_key, *_ = strips(page, "#worked .turn")
    assert before == ("q", 8, shown(float(query.abs().max())))
    assert after == ("R q", 8, shown(float(call.query[0, 3, 5].abs().max())))
    assert of_key == ("k", 8, shown(float(key.abs().max())))
    model, ids = a_model(transformers, *MODELS["GPTNeoX"], length=9)
    page = Reader(browser, look(model, {"input_ids": ids[:1]}).save(tmp_path / "neox.html"))
    page.go("#layer=1&head=3&i=5&j=2&step=3")
    page.settles(layer=1, head=3, step=3)
    assert "of the first 2 of 8 numbers, each pair (c and c + 1)" in page.text("step-words")
    assert "What “query_key_value” made, turned by them" in page.text("step-words")
    page.assert_quiet()


def test_a_rotation_that_was_not_found_is_said_to_be_unknown(browser, transformers, tmp_path):
    words = {**MODELS["Phi"][1], "head_dim": 8, "num_local_experts": 2}
    model, ids = a_model(transformers, "Llama4Text", words, length=9)
    page = Reader(browser, look(model, {"input_ids": ids[:1]}).save(tmp_path / "llama4.html"))
    page.go("#layer=1&head=3&i=5&j=2&step=3")
    page.settles(layer=1, head=3, step=3)
    assert "for it was given cosines and sines of positions. But none" in page.text("step-words")
    assert "so the angles are not known" in page.text("step-words")
    assert page.run("return document.querySelectorAll('#worked .turn').length") == 0
    page.assert_quiet()


def test_the_other_sequence_is_named_and_shown(browser, transformers, tmp_path):
    model, inputs = build(transformers, "bart")
    seen = look(model, inputs)
    call = next(x for x in seen.captured if x.memory is not None)
    page = Reader(browser, seen.save(tmp_path / "bart.html"))
    page.go(f"#layer={call.number}&head=0&i=3&j=2&step=1")
    page.settles(layer=call.number, i=3, j=2, step=1)
    words = "Keys and values come from the output of “encoder”: 9 vectors of 32 numbers."
    assert words in page.text("step-words")
    assert strips(page, "#worked tr[data-key='2']")[0] == (
        "a",
        32,
        shown(float(call.memory[0, 2].abs().max())),
    )
    page.go(f"#layer={call.number}&head=0&i=3&j=2&step=2")
    page.settles(step=2)
    assert page.text("step-words").endswith("q by “q_proj”, k by “k_proj”, v by “v_proj”.")
    page.assert_quiet()


def test_what_w_o_makes_of_weighted_values_and_of_all_heads(browser, tmp_path):
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(16, 4, batch_first=True).eval()
    nn.init.normal_(layer.out_proj.bias)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.mixer = layer

        def forward(self, x):
            return self.mixer(x, x, x, need_weights=False)[0]

    x = torch.randn(1, 6, 16)
    seen = look(Model().eval(), x)
    page = Reader(browser, seen.save(tmp_path / "mha.html"))
    page.go("#layer=0&head=2&i=4&j=1&step=13")
    page.settles(head=2, i=4, j=1, step=13)
    assert "“mixer.out_proj” mixes: W^o, 16 × 16 numbers" in page.text("step-words")
    with torch.no_grad():
        output = layer(x, x, x)[0][0, 4]
    call = seen.captured[0]
    part = layer.out_proj.weight.detach()[:, 8:12]
    moved = call.matrix[0, 2, 4, 1] * (part @ call.value[0, 2, 1])
    row = strips(page, "#worked tr[data-key='1']")
    assert row[-1] == ("W^o α′v", 16, shown(float(moved.abs().max())))
    *parts, bias, whole = strips(page, "#worked .together")[-6:]
    assert [name for name, *_ in parts] == [f"W^o b, head {head}" for head in range(4)]
    assert parts[2][2] == shown(float((part @ call.output[0, 2, 4]).abs().max()))
    assert bias == ("bias", 16, shown(float(layer.out_proj.bias.abs().max())))
    assert whole == ("o", 16, shown(float(output.abs().max())))
    page.assert_quiet()


def test_large_matrices_stay_out_and_the_page_says_so(browser, tmp_path, monkeypatch):
    from regard.look import payload

    monkeypatch.setattr(payload, "MIXING_NUMBERS", 100)
    layer = nn.MultiheadAttention(16, 4, batch_first=True).eval()
    x = torch.randn(1, 6, 16)
    seen = look(layer, {"query": x, "key": x, "value": x, "need_weights": False})
    page = Reader(browser, seen.save(tmp_path / "mha.html"))
    page.go("#head=2&i=4&j=1&step=13")
    page.settles(head=2, step=13)
    assert "They are not in this page" in page.text("step-words")
    assert "W^o" not in page.text("worked")
    page.assert_quiet()
