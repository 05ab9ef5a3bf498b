"""What the page saves: SVG with text as text, PNG at twice the size, CSV with the numbers."""

import struct
from dataclasses import replace
from xml.etree import ElementTree

import pytest
import torch
from reader import Reader

from regard.look import Look, look
from regard.look.scene import Scene, of_arrays

NAME = "{http://www.w3.org/2000/svg}"
PANELS = ("heads", "map", "kinds", "sent", "received", "arcs", "totals", "worked")
HOSTILE = ["</text><script>alert(1)</script>", "a & b", "\x01\x07", '"x, y"', "<img src=x>", "ок"]


@pytest.fixture
def page(browser, sentence, tmp_path):
    page = Reader(browser, sentence[1])
    page.go("#layer=2&head=0&i=12&j=9")
    page.settles(i=12, j=9)
    page.until(lambda: page.run("return document.getElementById('heads').dataset.painted"))
    page.save_into(tmp_path)
    return page


def texts(drawing):
    return [node.text for node in ElementTree.fromstring(drawing).iter(f"{NAME}text")]


@pytest.mark.parametrize("panel", PANELS)
def test_svg_and_png_of_every_panel(page, panel):
    drawing = page.saved(panel, "svg")
    root = ElementTree.fromstring(drawing)
    said = " ".join(texts(drawing))
    assert "all-MiniLM-L6-v2 (BertModel)" in said
    if panel == "heads":
        assert {"L0 H0", "L5 H11", "previous"} <= set(texts(drawing))
    else:
        assert "layer 2, head 0" in said
        assert "Sinks take 50% on the tokenizer’s own tokens" in said
    if panel in ("heads", "map", "sent", "received"):
        assert "weight, times the even weight of all visible keys, log scale" in said
    if panel in ("map", "sent", "received", "worked"):
        assert "because" in said
    if panel == "worked":
        assert "equals the model’s own output" in said
    picture = page.saved(panel, "png")
    width, height = struct.unpack(">II", picture[16:24])
    assert (width, height) == (2 * int(root.get("width")), 2 * int(root.get("height")))
    page.assert_quiet()


def test_csv_of_rows_columns_and_the_map(page, sentence):
    weights = sentence[0][2][0, 0].dense()
    rows = page.saved("map", "csv")
    assert rows[0][:3] == ["query \\ key", "[CLS] (0)", "The (1)"]
    found = torch.tensor([[float(x) for x in row[1:]] for row in rows[1:]])
    torch.testing.assert_close(found, weights)
    sent = page.saved("sent", "csv")
    assert sent[0] == ["key", "token", "weight", "lift"]
    assert [float(row[2]) for row in sent[1:]] == pytest.approx(weights[12].tolist(), rel=1e-4)
    assert float(sent[10][3]) == pytest.approx(15 * float(weights[12, 9]), rel=1e-4)
    received = page.saved("received", "csv")
    assert [float(row[2]) for row in received[1:]] == pytest.approx(
        weights[:, 9].tolist(), rel=1e-4
    )


def test_csv_of_heads_and_kinds_is_pythons_table(page, sentence):
    table = sentence[0].table()
    rows = page.saved("heads", "csv")
    names = {name: at for at, name in enumerate(rows[0])}
    assert len(rows) == 73
    for line, row in zip(rows[1:], table, strict=True):
        assert (int(line[0]), int(line[1]), line[2]) == (row.layer, row.head, row.name)
        assert line[names["kind"]] == row.kind
        assert float(line[names["entropy"]]) == pytest.approx(row.entropy, rel=1e-5)
        assert line[names["induction"]] == ""
    kinds = page.saved("kinds", "csv")
    told = {row[0]: row for row in kinds[1:]}
    row = next(r for r in table if (r.layer, r.head) == (2, 0))
    assert float(told["previous"][1]) == pytest.approx(row.previous, rel=1e-5)
    assert told["induction"][1] == ""


def test_csv_of_the_worked_output_adds_up(page, sentence):
    rows = page.saved("worked", "csv")
    call = sentence[0].captured[2]
    parts = torch.tensor([[float(x) for x in row[8:]] for row in rows[1:16]])
    assert rows[16][0] == "b"
    assert rows[17][0] == "model"
    own = torch.tensor([float(x) for x in rows[17][8:]])
    torch.testing.assert_close(parts.sum(0), own, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(own, call.output[0, 0, 12])


def test_hostile_tokens_stay_text(browser, tmp_path):
    torch.manual_seed(0)
    data = {"query": torch.randn(2, 6, 8), "key": torch.randn(2, 6, 8), "tokens": HOSTILE}
    data["value"] = torch.randn(2, 6, 8)
    seen = look(data)
    page = Reader(browser, seen.save(tmp_path / "hostile.html"))
    saved = tmp_path / "saved"
    saved.mkdir()
    page.save_into(saved)
    for panel in ("map", "sent", "worked"):
        drawing = page.saved(panel, "svg")
        assert "<script" not in drawing
        # Words of a token may stand in one text each.
        assert "<img src=x>" in " ".join(texts(drawing)).replace("  ", " ")
        assert "\ufffd\ufffd" in drawing
    assert page.saved("sent", "csv")[4][1] == '"x, y"'
    assert page.run("return document.querySelectorAll('img').length") == 0
    page.assert_quiet()


def test_the_key_e_leads_to_the_buttons(page):
    page.press("e")
    label = page.run("return document.activeElement.ariaLabel")
    assert label == "Save the map as SVG"
    page.run("document.querySelector('#worked .dot').focus()")
    page.press("e")
    assert page.run("return document.activeElement.ariaLabel") == "Save the worked output as SVG"


def test_hostile_names_of_models_and_layers_stay_text(browser, tmp_path):
    name = "</title><script>alert(1)</script><img src=x onerror=alert(2)>\x00"
    call = of_arrays({"query": torch.ones(3, 4), "key": torch.ones(3, 4)}).captured[0]
    scene = Scene(name, (replace(call, name=name),), notes=(name,))
    page = Reader(browser, Look(scene).save(tmp_path / "hostile.html"))
    assert page.text("title").startswith("</title><script>")
    assert page.run("return document.title").startswith("</title><script>")
    assert page.run("return document.querySelectorAll('img').length") == 0
    assert page.run("return document.querySelectorAll('script').length") == 2
    saved = tmp_path / "saved"
    saved.mkdir()
    page.save_into(saved)
    assert "<script" not in page.saved("map", "svg")
    drawing = Look(scene).figure("map", layer=0).svg
    assert ElementTree.fromstring(drawing) is not None
    assert "<script" not in drawing
    page.assert_quiet()
