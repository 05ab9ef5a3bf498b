"""What else the page of any length has: small pictures, both planes, words, drags, saved panels."""

import struct
from xml.etree import ElementTree

import pytest
import torch
from reader import Reader

from regard.look import look, payload

N = 300
TOKENS = [f"word{at}" for at in range(N)]


@pytest.fixture(scope="module")
def served():
    patch = pytest.MonkeyPatch()
    patch.setattr(payload, "STREAMED_ABOVE", 8)
    torch.manual_seed(0)
    data = {name: 2 * torch.randn(2, 2, N, 8) for name in ("query", "key")}
    seen = look({**data, "tokens": TOKENS}, causal=True)
    with seen.serve() as server:
        yield seen, server
    patch.undo()


def opened(browser, served, hash_):
    page = Reader(browser, served[1].url + hash_)
    page.until(lambda: page.run("return quality.dataset.exact") == "true", seconds=30)
    return page


def texts(drawing):
    return [
        x.text for x in ElementTree.fromstring(drawing).iter("{http://www.w3.org/2000/svg}text")
    ]


def numbers(rows, column):
    found = [row[column] for row in rows]
    return torch.tensor([float(x) if x else torch.nan for x in found])


def test_every_head_has_a_small_picture(browser, served, tmp_path):
    seen, _ = served
    page = opened(browser, served, "#i=200&j=5")
    page.until(lambda: page.text("heads-hint").startswith("4 of 4 heads"))
    assert "mean of 10 × 10 cells, estimated from 60 queries" in page.text("heads-hint")
    page.run('document.querySelector(\'#heads [data-layer="1"][data-head="1"]\').click()')
    page.settles(layer=1, head=1)
    label = "return document.querySelector('#heads [aria-pressed=true]').ariaLabel"
    assert page.run(label) == "Layer 1 head 1"
    page.save_into(tmp_path)
    header, *rows = page.saved("heads", "csv")
    assert header == ["layer", "head", "query", "key", "size", "mean_weight"]
    own = [row for row in rows if row[:2] == ["1", "1"]]
    found = numbers(own, 5).reshape(30, 30)
    exact = seen[1].pool(10)[0, 1]
    # Two random queries of each ten: right on the whole, not cell by cell.
    assert torch.equal(found.isnan(), torch.ones(30, 30).triu(1).bool())
    below = torch.ones(30, 30).tril(-1).bool()
    assert float(found[below].mean()) == pytest.approx(float(exact[below].mean()), rel=0.05)
    drawing = page.saved("heads", "svg")
    assert {"L0 H0", "L1 H1"} <= set(texts(drawing))
    assert "weight, times the even weight of all visible keys, log scale" in texts(drawing)


def test_mean_and_largest_have_their_names(browser, served, tmp_path):
    seen, _ = served
    page = opened(browser, served, "#layer=1&head=0&i=250&j=3")
    page.save_into(tmp_path)
    names = page.run("return [...document.querySelectorAll('#view option')].map((x) => x.text)")
    assert names == ["mean of 3 × 3 cells", "largest of 3 × 3 cells"]
    assert page.text("quality") == "Exact: every dot is the mean of 3 × 3 cells, all computed."
    page.run("view.value = 'max'; view.dispatchEvent(new Event('change'))")
    page.settles(plane="max")
    assert page.text("quality").startswith("Exact: every dot is the largest of 3 × 3 cells")
    page.until(lambda: "plane=max" in page.driver.current_url)
    _, *rows = page.saved("map", "csv")
    weights = seen[1][0, 0].dense()
    expected = torch.nn.functional.max_pool2d(weights[None], 3)[0]
    found = numbers(rows, 5).reshape(100, 100)
    below = torch.ones(100, 100).tril().bool()
    torch.testing.assert_close(found[below], expected[below])
    assert found[~below].isnan().all()


def test_words_stand_beside_single_cells(browser, served, tmp_path):
    page = opened(browser, served, "#i=100&j=90&top=90&left=80&span=24")
    page.save_into(tmp_path)
    drawing = page.saved("map", "svg")
    said = texts(drawing)
    assert said.count("word95") == 2  # a row and a column
    assert said.count("word82") == 1
    assert "word60" not in said
    assert said[0] == "Attention: layer 0, head 0"
    assert "Exact: single cells." in said
    assert "weight, times the even weight of all visible keys, log scale" in said
    picture = page.saved("map", "png")
    root = ElementTree.fromstring(drawing)
    size = (2 * int(root.get("width")), 2 * int(root.get("height")))
    assert struct.unpack(">II", picture[16:24]) == size
    assert not page.run("return mini.hidden")
    assert page.driver.get_log("browser") == []


def test_one_query_is_saved_whole(browser, served, tmp_path):
    seen, _ = served
    page = opened(browser, served, "#head=1&i=120&j=7")
    page.until(lambda: page.run("return document.body.dataset.read") == "0 1 120 7")
    page.save_into(tmp_path)
    header, *rows = page.saved("row", "csv")
    assert header == ["key", "token", "weight"]
    assert [row[1] for row in rows] == TOKENS
    torch.testing.assert_close(numbers(rows, 2)[:121], seen[0][0, 1, 120][:121])
    assert {row[2] for row in rows[121:]} == {""}
    assert "query word120 (120)" in texts(page.saved("row", "svg"))


def test_dragging_moves_the_view(browser, served):
    webdriver = pytest.importorskip("selenium.webdriver")
    page = opened(browser, served, "#i=150&j=100&top=120&left=80&span=64")
    cell = page.run("return JSON.parse(map.dataset.shown).cell")
    canvas = page.driver.find_element("id", "map")
    drag = webdriver.ActionChains(page.driver).move_to_element(canvas).click_and_hold()
    drag.move_by_offset(0, round(-10 * cell)).release().perform()
    page.settles(view={"top": 130, "left": 80, "span": 64}, i=150, j=100)
    page.until(lambda: page.run("return quality.dataset.exact") == "true")
    page.until(lambda: "top=130&left=80&span=64" in page.driver.current_url)


def test_a_token_is_found_and_keys_lead_to_the_buttons(browser, served):
    page = opened(browser, served, "#i=3&j=2")
    page.press("/")
    page.press(*"WORD29", "\ue007")
    page.settles(i=29)
    assert page.text("found") == "11 found"
    page.press("\ue007")
    page.settles(i=290)
    page.run("document.activeElement.blur()")
    page.press("e")
    assert page.run("return document.activeElement.ariaLabel") == "Save the map as SVG"


def test_the_scale_is_in_the_address(browser, served):
    page = opened(browser, served, "#i=3&j=2&scale=weight")
    assert page.state["scale"] == "weight"
    assert page.run("return document.querySelector('input[value=weight]').checked")
    assert "weight 0" in page.text("legend")
