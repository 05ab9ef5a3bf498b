"""The page in a real browser: it opens without errors or requests, and answers to its reader."""

import json
import time

import pytest
import torch
from reader import Reader

from regard.look import Look, look, payload
from regard.look.scene import Scene, of_arrays


@pytest.fixture
def page(browser, sentence):
    return Reader(browser, sentence[1])


def test_opens_without_errors_or_requests(page):
    assert "all-MiniLM-L6-v2" in page.text("title")
    assert "bit-identical" in page.text("proof")
    page.until(lambda: page.run("return document.getElementById('heads').dataset.painted"))
    assert page.run("return document.querySelectorAll('#heads .thumb').length") == 72
    page.assert_quiet()


def test_keys_move_the_selection_and_the_address(page):
    page.go("#layer=2&head=3&i=8&j=4")
    page.settles(layer=2, head=3, i=8, j=4, pinned=False)
    for key, expected in (
        ("\ue013", {"i": 7}),  # arrow up
        ("\ue015", {"i": 8}),  # arrow down
        ("\ue014", {"j": 5}),  # arrow right
        ("\ue012", {"j": 4}),  # arrow left
        ("]", {"head": 4}),
        ("[", {"head": 3}),
        ("}", {"layer": 3}),
        ("{", {"layer": 2}),
        ("p", {"pinned": True}),
        ("\ue00c", {"pinned": False}),  # escape
        ("\ue007", {"pinned": True}),  # enter
    ):
        page.press(key)
        page.settles(**expected)
    here = "layer=2&head=3&i=8&j=4&pin=1&scale=lift"
    page.until(lambda: page.driver.current_url.endswith(f"#{here}"))
    page.press(*["\ue012"] * 9)
    page.settles(j=0)  # and no further
    page.assert_quiet()


def test_a_link_wins_over_the_address_of_the_move_before_it(page):
    page.go("#layer=2&head=3&i=8&j=4")
    page.settles(layer=2, head=3, i=8, j=4)
    # The page writes its address 200 ms after a move: here just after a link is followed, and
    # before the browser has told the page of it.
    page.run("late = []; kept = setTimeout; setTimeout = (action) => late.push(action)")
    page.press("]")
    page.settles(head=4)
    moved = page.run(
        "setTimeout = kept; location.hash = '#layer=1&head=2&i=3&j=1';"
        "for (const action of late) action(); return late.length"
    )
    assert moved
    page.settles(layer=1, head=2, i=3, j=1)


def test_clicks_choose_heads_cells_and_tokens(page):
    page.run('document.querySelector(\'#heads [data-layer="4"][data-head="7"]\').click()')
    page.settles(layer=4, head=7)
    assert page.text("map-title") == "Layer 4, head 7"
    page.click_cell(5, 2)
    page.settles(i=5, j=2, pinned=True)
    page.run("document.querySelectorAll('#sent .word')[9].click()")
    page.settles(i=5, j=9)
    page.run("document.querySelectorAll('#received .word')[3].click()")
    page.settles(i=3, j=9)
    page.run("document.querySelector('#worked tr[data-key=\"1\"] td').click()")
    page.settles(i=3, j=1)
    page.run("document.querySelector('#worked tr[data-key=\"1\"] .dot').click()")
    assert page.run("return document.querySelectorAll('#worked .products .sum span').length") == 32
    page.assert_quiet()


def test_weights_are_those_of_the_model(page, sentence):
    for layer, head, i, j in ((0, 0, 0, 0), (3, 7, 9, 2), (5, 11, 14, 13)):
        page.go(f"#layer={layer}&head={head}&i={i}&j={j}")
        page.settles(layer=layer, head=head, i=i, j=j)
        weight = float(sentence[0].captured[layer].matrix[0, head, i, j])
        said = page.text("readout").replace("\u2212", "-")
        assert float(said.split()[1].rstrip(",")) == pytest.approx(weight, rel=6e-2, abs=6e-4)


def test_every_output_equals_the_models_own(page):
    heads = [(layer, head) for layer in range(6) for head in (0, 2, 5, 11)]
    for at, (layer, head) in enumerate(heads):
        page.go(f"#layer={layer}&head={head}&i={at % 15}&j=0")
        page.settles(layer=layer, head=head)
        kind, difference = page.check()
        assert kind == "good"
        assert difference < 1e-5
    page.assert_quiet()


def test_a_wrong_output_is_called_wrong(browser, sentence, tmp_path):
    scene = sentence[0].scene
    call = scene.captured[0]
    wrong = call.output + 1e-4
    seen = Look(Scene("wrong", (type(call)(**{**vars(call), "output": wrong}),), scene.tokens))
    page = Reader(browser, seen.save(tmp_path / "wrong.html"))
    kind, difference = page.check()
    assert kind == "bad"
    assert difference == pytest.approx(1e-4, rel=0.05)
    assert "DIFFERS" in page.text("check")


def grouped(n=12, **more):
    torch.manual_seed(0)
    return {
        "query": torch.randn(2, 4, n, 8),
        "key": torch.randn(2, 2, n, 8),
        "value": torch.randn(2, 2, n, 8),
        **more,
    }


def test_masked_cells_and_grouped_heads(browser, tmp_path):
    seen = look(grouped(), causal=True)
    page = Reader(browser, seen.save(tmp_path / "causal.html"))
    page.go("#layer=1&head=3&i=4&j=7")
    page.settles(i=4, j=7)
    assert page.text("readout") == "masked, future"
    page.press("\ue012", "\ue012", "\ue012")
    page.settles(j=4)
    weight = float(seen.captured[1].matrix[0, 3, 4, 4])
    assert float(page.text("readout").split()[1].rstrip(",")) == pytest.approx(weight, abs=6e-4)
    assert "this one reads key head 1" in page.text("map-hint")
    assert page.check() == ("none", None)
    assert "future" in page.text("worked")
    page.assert_quiet()


class Special(torch.nn.Module):
    """Attention with a float mask, so that the page needs bias and bits."""

    def __init__(self, mask):
        super().__init__()
        self.mask = mask

    def forward(self, query, key, value):
        attend = torch.nn.functional.scaled_dot_product_attention
        return attend(query, key, value, attn_mask=self.mask, scale=0.3, enable_gqa=True)


@pytest.mark.parametrize("half", [False, True])
def test_bias_and_holes_check_out(browser, tmp_path, monkeypatch, half):
    if half:
        monkeypatch.setattr(payload, "SINGLE_BYTES", 0)
    data = grouped()
    mask = torch.randn(4, 12, 12)
    mask[:, :, 3] = -torch.inf
    mask[1, 5, :] = -torch.inf
    inputs = (data["query"][:1], data["key"][:1], data["value"][:1])
    seen = look(Special(mask).eval(), inputs)
    page = Reader(browser, seen.save(tmp_path / "bias.html"))
    for head, i in ((0, 0), (1, 4), (3, 11), (1, 5)):
        page.go(f"#head={head}&i={i}&j=3")
        page.settles(head=head, i=i)
        kind, difference = page.check()
        assert kind == "good"
        assert difference < (5e-3 if half else 1e-5)
        assert page.text("readout") == "masked"
    assert "no key is visible, so the output is 0" in page.text("worked")
    assert ("rounded to float16" in page.text("notes")) == half
    page.assert_quiet()


def test_an_encoder_decoder_checks_out(browser, tmp_path):
    """Toeplitz bias, causal spans, and a cross attention of another length."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=50, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4,
        decoder_start_token_id=0,
    )  # fmt: skip
    model = transformers.T5Model(config).eval()
    ids = torch.randint(3, 50, (1, 9))
    seen = look(model, {"input_ids": ids, "decoder_input_ids": ids[:, :5]})
    assert [call.matrix.shape for call in seen.captured] == [
        (1, 4, 9, 9),
        (1, 4, 5, 5),
        (1, 4, 5, 9),
    ]
    page = Reader(browser, seen.save(tmp_path / "t5.html"))
    for layer, head, i in ((0, 1, 0), (0, 3, 8), (1, 0, 0), (1, 2, 3), (2, 3, 4)):
        page.go(f"#layer={layer}&head={head}&i={i}&j=0")
        page.settles(layer=layer, head=head, i=i)
        kind, difference = page.check()
        assert kind == "good"
        assert difference < 1e-5
    assert page.run("return document.querySelectorAll('#worked tr[data-key]').length") == 9
    page.assert_quiet()


def test_sinks_and_softcap_check_out(browser, tmp_path):
    data = grouped()
    plain = of_arrays({name: array[:1] for name, array in data.items()}).captured[0]
    call = type(plain)(**{**vars(plain), "sinks": torch.randn(4), "softcap": 1.5})
    call = type(plain)(**{**vars(call), "output": call.matrix @ call.value})
    page = Reader(browser, Look(Scene("sinks", (call,))).save(tmp_path / "sinks.html"))
    kind, difference = page.check()
    assert kind == "good"
    assert difference < 1e-5
    assert "sink, which has no key and no value" in page.text("worked")
    assert "capped at 1.5" in page.text("worked") or "cap at 1.5" in page.text("worked")
    assert "The sink, which has no token, takes" in page.text("sent")
    page.assert_quiet()


def test_long_maps_are_pooled_and_say_so(browser, tmp_path, monkeypatch):
    monkeypatch.setattr(payload, "POOLED_ABOVE", 64)
    monkeypatch.setattr(payload, "_PLANE_CELLS", 10)
    seen = look(grouped(n=150), causal=True)
    page = Reader(browser, seen.save(tmp_path / "pooled.html"))
    assert "pooled in blocks of 16 × 16 cells" in page.text("notes")
    options = page.run("return [...document.getElementById('view').options].map((o) => o.text)")
    assert options == ["mean of 16 × 16 cells", "largest of 16 × 16 cells"]
    page.click_cell(5, 2)
    page.settles(i=80, j=32, pinned=True)
    page.press("1")
    page.settles(view={"top": 48, "left": 0, "span": 64})
    assert "block" not in page.text("map-hint")
    weight = float(seen.captured[0].matrix[0, 0, 80, 32])
    page.go("#layer=0&head=0&i=80&j=32")
    page.settles(i=80, j=32)
    assert float(page.text("readout").split()[1].rstrip(",")) == pytest.approx(weight, abs=6e-4)
    page.assert_quiet()


def test_the_notebook_frame_opens(browser, tmp_path):
    frame = tmp_path / "notebook.html"
    frame.write_text(f"<!doctype html>{look(grouped())._repr_html_()}", encoding="utf-8")
    browser.get("about:blank")
    browser.get_log("browser")
    browser.get(frame.as_uri())
    browser.switch_to.frame(0)
    try:
        end = time.monotonic() + 10
        state = None
        while state is None and time.monotonic() < end:
            state = browser.execute_script("return document.body?.dataset.state ?? null")
        assert json.loads(state)["layer"] in (0, 1)
        assert browser.get_log("browser") == []
    finally:
        browser.switch_to.default_content()
