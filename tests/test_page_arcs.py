"""Strongest edges, received totals, linked highlighting and search, in a real browser."""

import pytest
import torch
from reader import Reader

from regard.look import look


@pytest.fixture
def page(browser, sentence, tmp_path):
    page = Reader(browser, sentence[1])
    page.save_into(tmp_path)
    return page


def edges(page):
    rows = page.saved("arcs", "csv")
    assert rows[0] == ["query", "query_token", "key", "key_token", "weight"]
    return {(int(row[0]), int(row[2])): float(row[4]) for row in rows[1:]}


def smallest_set(weights, share):
    """Positions of the fewest weights that hold a share of their sum."""
    order = weights.flatten().argsort(descending=True)
    sums = weights.flatten()[order].cumsum(0)
    count = int((sums < share * weights.sum() - 1e-9).sum()) + 1
    return {tuple(divmod(int(at), weights.shape[-1])) for at in order[:count]}


@pytest.mark.parametrize("each", [True, False])
@pytest.mark.parametrize("sinks", [True, False])
def test_edges_are_the_smallest_set_that_holds_the_share(page, sentence, each, sinks):
    weights = sentence[0][2][0, 0].dense().double()
    if not sinks:
        weights[:, [0, 14]] = 0
    options = ("" if each else ",all") + ("" if sinks else ",nosinks")
    page.go(f"#layer=2&head=0&i=12&j=9&arcs=60{options}")
    page.settles(i=12, arcs={"share": 60, "each": each, "sinks": not sinks})
    if each:
        expected = {(i, j) for i in range(15) for _, j in smallest_set(weights[i : i + 1], 0.6)}
    else:
        expected = smallest_set(weights, 0.6)
    found = edges(page)
    assert set(found) == expected
    for (i, j), weight in found.items():
        assert weight == pytest.approx(float(weights[i, j]), rel=1e-4)
    drawn = page.run("return document.querySelectorAll('#arcs .edge').length")
    assert drawn == len(found)
    said = page.text("arcs-hint")
    assert said.startswith(f"The {len(found)} strongest of")
    assert ("Left out: 50% of the weight" in said) == (not sinks)
    page.assert_quiet()


def test_the_controls_of_the_edges_and_the_address(page):
    page.go("#layer=2&head=0&i=12&j=9")
    page.settles(i=12)
    before = len(edges(page))
    page.run(
        "const share = document.getElementById('arc-share'); share.value = 90;"
        "share.dispatchEvent(new Event('input'));"
        "document.getElementById('arc-each').click()"
    )
    page.until(lambda: page.driver.current_url.endswith("&arcs=90,all"))
    assert len(edges(page)) > before
    assert "90% of the weight of all rows together" in page.text("arcs-hint")
    page.run("document.querySelector('#arcs .end[data-query=\"3\"]')"
             ".dispatchEvent(new MouseEvent('click'))")  # fmt: skip
    page.settles(i=3, pinned=True)


def test_long_texts_show_the_edges_around_the_selection(browser, tmp_path):
    torch.manual_seed(0)
    seen = look({"query": torch.randn(1, 100, 8), "key": torch.randn(1, 100, 8)}, causal=True)
    page = Reader(browser, seen.save(tmp_path / "long.html"))
    (tmp_path / "saved").mkdir()
    page.save_into(tmp_path / "saved")
    page.go("#i=70&j=3")
    page.settles(i=70)
    found = edges(page)
    assert {i for i, _ in found} == set(range(50, 90))
    outside = len([1 for _, j in found if not 50 <= j < 90])
    assert f"{outside} of them end outside this part" in page.text("arcs-hint")
    assert "for the 40 queries around the selection" in page.text("arcs-hint")


@pytest.mark.parametrize("mask", ["none", "causal", "holes"])
def test_totals_are_sums_of_columns(browser, tmp_path, mask):
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 1, 2, 12, 8).unbind(0)
    keep = torch.ones(12, 12, dtype=torch.bool)
    if mask != "none":
        keep = keep.tril()
    if mask == "holes":
        keep[:, 3] = False
    seen = look(Masked(keep).eval(), (query, key, value))
    page = Reader(browser, seen.save(tmp_path / "page.html"))
    (tmp_path / "saved").mkdir()
    page.save_into(tmp_path / "saved")
    page.go("#head=1&i=0&j=5")
    page.settles(head=1, j=5)
    rows = page.saved("totals", "csv")
    weights = seen[0][0, 1].dense()
    even = keep / keep.sum(-1, keepdim=True)
    for j, row in enumerate(rows[1:]):
        assert float(row[2]) == pytest.approx(float(weights[:, j].sum()), rel=1e-5)
        assert float(row[3]) == pytest.approx(float(even[:, j].nan_to_num().sum()), abs=1e-6)
    page.assert_quiet()


class Masked(torch.nn.Module):
    def __init__(self, keep):
        super().__init__()
        self.keep = keep

    def forward(self, query, key, value):
        attend = torch.nn.functional.scaled_dot_product_attention
        return attend(query, key, value, attn_mask=self.keep)


def test_what_is_hovered_is_marked_everywhere(page):
    webdriver = pytest.importorskip("selenium.webdriver")
    page.go("#layer=2&head=0&i=12&j=9&pin=1")
    page.settles(i=12, j=9, pinned=True)
    words = page.driver.find_elements("css selector", "#sent .word")
    page.run("arguments[0].scrollIntoView({block: 'center'})", words[6])
    webdriver.ActionChains(page.driver).move_to_element(words[6]).perform()
    page.until(lambda: page.run("return document.querySelectorAll('.hot').length") > 3)
    marked = page.run(
        "return [...new Set([...document.querySelectorAll('.hot')]"
        ".map((x) => x.closest('[id]').id + ' ' + x.dataset.key))]"
    )
    assert {"sent 6", "totals 6", "arcs 6", "worked 6"} <= set(marked)
    left = page.run("return parseFloat(document.getElementById('map-hot').style.left)")
    box = page.run("return JSON.parse(document.getElementById('map').dataset.shown)")
    assert left == pytest.approx(box["box"]["x"] + 6 * box["cell"], abs=0.01)
    page.settles(i=12, j=9)  # and nothing is chosen
    page.run("document.body.dispatchEvent(new PointerEvent('pointerover', {bubbles: true}))")
    assert page.run("return document.querySelectorAll('.hot').length") == 0


def test_finding_a_token(page):
    page.go("#layer=2&head=0&i=0&j=0")
    page.settles(i=0, j=0)
    page.press("/")
    assert page.run("return document.activeElement.id") == "find"
    page.press("the", "\ue007")
    page.settles(i=1, pinned=True)  # "The"
    assert page.text("found") == "2 found"
    page.press("\ue007")
    page.settles(i=7)
    page.press("\ue007")
    page.settles(i=1)
    page.press("zebra", "\ue007")
    assert page.text("found") == "not found"
    page.assert_quiet()
