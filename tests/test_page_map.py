"""The map in a real browser: zooming and moving from the whole to single cells, exactly."""

import json

import pytest
import torch
from reader import Reader

from regard.look import look


def arrays(n=300, m=None):
    torch.manual_seed(0)
    m = n if m is None else m
    return {
        "query": torch.randn(1, 2, n, 8),
        "key": torch.randn(1, 2, m, 8),
        "value": torch.randn(1, 2, m, 8),
    }


@pytest.fixture(scope="module")
def causal(tmp_path_factory):
    seen = look(arrays(), causal=True)
    return seen, seen.save(tmp_path_factory.mktemp("map") / "causal.html")


@pytest.fixture
def page(browser, causal):
    return Reader(browser, causal[1])


def shown(page):
    """What the map says it shows, once every tile of it is exact."""
    page.until(lambda: json.loads(page.run("return map.dataset.shown"))["missing"] == 0)
    return json.loads(page.run("return map.dataset.shown"))


def test_zooming_by_keys_and_buttons(page):
    page.go("#layer=0&head=1&i=200&j=100")
    page.settles(i=200, j=100, view=None)
    page.press("+")
    page.settles(view={"top": 100, "left": 50, "span": 150})  # the selection stays in its place
    assert shown(page)["size"] == 1
    page.press("1")
    page.settles(view={"top": 168, "left": 68, "span": 64})
    page.run("document.getElementById('zoom-out').click()")
    page.settles(view={"top": 136, "left": 36, "span": 128})
    page.press("-", "-")
    page.settles(view=None)
    page.press("+")
    page.press("0")
    page.settles(view=None)
    page.assert_quiet()


def test_the_deepest_zoom_is_eight_cells_and_stays_inside(page):
    page.go("#layer=0&head=0&i=299&j=0")
    page.settles(i=299)
    page.press(*"++++++++++")
    page.until(lambda: page.state["view"] and page.state["view"]["span"] == 8)
    page.press("+")
    view = page.state["view"]
    assert (view["left"], view["span"]) == (0, 8)
    assert view["top"] <= 299 < view["top"] + 9  # the selection stays, and no row beyond the last
    assert view["top"] + 8 <= 300
    assert shown(page)["cell"] == 40


def test_the_view_is_in_the_address_and_follows_the_selection(page):
    page.go("#layer=0&head=1&i=150&j=140&top=100&left=90&span=100")
    page.settles(i=150, view={"top": 100, "left": 90, "span": 100})
    page.press("\ue015")
    page.settles(i=151, view={"top": 100, "left": 90, "span": 100})
    page.until(lambda: page.driver.current_url.endswith("scale=lift&top=100&left=90&span=100"))
    page.run("query.value = 250; query.dispatchEvent(new Event('change'))")
    page.settles(i=250, view={"top": 200, "left": 90, "span": 100})
    # A view that is not inside the map is brought there.
    page.go("#layer=0&head=1&i=299&j=299&top=900&left=-5&span=50")
    page.settles(view={"top": 250, "left": 250, "span": 50})


def test_dragging_moves_and_clicking_selects(page):
    webdriver = pytest.importorskip("selenium.webdriver")
    page.go("#layer=0&head=1&i=150&j=140&top=100&left=90&span=100")
    page.settles(view={"top": 100, "left": 90, "span": 100})
    cell = shown(page)["cell"]
    page.run("map.scrollIntoView({block: 'center'})")
    canvas = page.driver.find_element("id", "map")
    actions = webdriver.ActionChains(page.driver).move_to_element(canvas).click_and_hold()
    actions.move_by_offset(round(10 * cell), round(20 * cell)).release().perform()
    page.settles(view={"top": 80, "left": 80, "span": 100})
    assert page.state["pinned"] is False
    page.click_cell(30, 20)  # in the view
    page.settles(i=110, j=100, pinned=True, view={"top": 80, "left": 80, "span": 100})
    page.run("mini.scrollIntoView({block: 'center'})")
    mini = page.driver.find_element("id", "mini")
    webdriver.ActionChains(page.driver).move_to_element(mini).click().perform()
    page.until(lambda: page.state["view"]["top"] != 80)
    view = page.state["view"]
    # The middle of the small map, to its two or three cells in a pixel and a border of one.
    assert abs(view["top"] - 100) <= 8
    assert abs(view["left"] - 100) <= 8
    page.assert_quiet()


def test_blocks_are_means_and_largest_of_exact_cells(browser, tmp_path):
    seen, size = look(arrays(n=900), causal=True), 2  # 900 cells on about 500 pixels
    page = Reader(browser, seen.save(tmp_path / "long.html"))
    page.save_into(tmp_path)
    weights = seen[0][0, 1].dense()
    for plane in ("mean", "max"):
        page.go(f"#layer=0&head=1&i=9&j=9&plane={plane}")
        page.settles(i=9, plane=plane)
        assert shown(page)["size"] == size
        rows = page.saved("map", "csv")
        for r, c in ((0, 0), (200, 10), (449, 3), (300, 300), (30, 31)):
            block = weights[r * size : (r + 1) * size, c * size : (c + 1) * size]
            i = torch.arange(r * size, r * size + block.shape[0])[:, None]
            j = torch.arange(c * size, c * size + block.shape[1])
            seen = block[j <= i]
            told = rows[r + 1][c + 1]
            if not len(seen):
                assert told == ""
                continue
            expected = seen.mean() if plane == "mean" else seen.max()
            assert float(told) == pytest.approx(float(expected), rel=1e-4, abs=1e-7)


def test_the_view_of_values_is_alpha_times_the_length_of_v(page, causal, tmp_path):
    seen = causal[0]
    weights, value = seen[0][0, 1].dense(), seen.captured[0].value[0, 1]
    parts = weights * value.norm(dim=-1)
    parts = parts / parts.sum(-1, keepdim=True)
    page.save_into(tmp_path)
    page.go("#layer=0&head=1&i=20&j=11&scale=value&top=0&left=0&span=40")
    page.settles(scale="value")
    shown(page)
    rows = page.saved("map", "csv")
    for i, j in ((0, 0), (20, 11), (39, 2)):
        assert float(rows[i + 1][j + 1]) == pytest.approx(float(parts[i, j]), rel=1e-4)
    # The readout keeps saying the weight itself.
    said = page.text("readout").split()[1].rstrip(",")
    assert float(said) == pytest.approx(float(weights[20, 11]), abs=6e-4)
    assert "moves by α |v| of" in page.text("sent")


def test_unequal_lengths_zoom_on_both_axes(browser, tmp_path):
    seen = look(arrays(n=40, m=200))
    page = Reader(browser, seen.save(tmp_path / "cross.html"))
    page.go("#layer=0&head=0&i=39&j=150&top=0&left=100&span=100")
    page.settles(i=39, j=150)
    now = shown(page)
    assert now["origin"] == {"top": 0, "left": 100}
    assert now["box"]["width"] == pytest.approx(100 * now["cell"])
    assert now["box"]["height"] == pytest.approx(40 * now["cell"])
    page.assert_quiet()


def test_thousands_of_tokens_zoom_to_exact_cells(browser, tmp_path):
    n = 5000
    torch.manual_seed(0)
    data = {name: torch.randn(1, 1, n, 8) for name in ("query", "key")}
    data["query"] = data["query"] * 3  # so that weights differ by orders of magnitude
    seen = look(data, causal=True)
    page = Reader(browser, seen.save(tmp_path / "long.html"))
    page.save_into(tmp_path)
    assert shown(page)["size"] == 32  # pooled when the page was made
    matrix = seen[0]
    for i, j in ((4700, 1234), (2500, 2500), (4999, 0)):
        page.go(f"#i={i}&j={j}&top={i - 20}&left={j - 20}&span=40")
        page.settles(i=i, j=j)
        now = shown(page)
        assert now["size"] == 1
        rows = page.saved("map", "csv")
        top, left = now["origin"]["top"], now["origin"]["left"]
        exact = matrix[0, 0, top : top + 40, left : left + 40]
        for r in (0, 17, 39):
            for c in (0, 20, 39):
                told = rows[r + 1][c + 1]
                if left + c > top + r:
                    assert told == ""
                else:
                    assert float(told) == pytest.approx(float(exact[r, c]), rel=1e-3, abs=1e-9)
    # Half way in, blocks are computed from exact cells, not from the blocks that travelled.
    page.go("#i=3000&j=1000&top=2000&left=0&span=2500")
    page.settles(i=3000, j=1000)
    now = shown(page)
    size = now["size"]
    assert size == 8
    rows = page.saved("map", "csv")
    cells = matrix[0, 0, 2000 + 10 * size : 2000 + 11 * size, 5 * size : 6 * size]
    assert float(rows[11][6]) == pytest.approx(float(cells.mean()), rel=1e-3)
    page.assert_quiet()


def test_moving_over_the_map_lays_the_page_out_once_a_frame(browser, sentence):
    page = Reader(browser, sentence[1])
    page.go("#layer=2&head=0&i=12&j=9")
    page.settles(i=12, j=9)
    left, top, width, height = page.run(
        "const canvas = document.getElementById('map'); canvas.scrollIntoView({block: 'center'});"
        "const {left, top, width, height} = canvas.getBoundingClientRect();"
        "return [left, top, width, height]"
    )
    browser.execute_cdp_cmd("Performance.enable", {})

    def layouts():
        told = browser.execute_cdp_cmd("Performance.getMetrics", {})["metrics"]
        return next(x["value"] for x in told if x["name"] == "LayoutCount")

    moves, frames = 20, "return performance.getEntriesByName('drawn').length"
    before, drawn = layouts(), page.run(frames)
    for at in range(moves):
        share = 0.3 + 0.03 * at
        where = {"x": left + share * width, "y": top + share * height}
        browser.execute_cdp_cmd("Input.dispatchMouseEvent", {"type": "mouseMoved", **where})
    page.until(lambda: page.run(frames) > drawn)
    assert layouts() - before <= 2 * (page.run(frames) - drawn) + 2


def test_the_map_fits_its_box_at_every_width(browser, sentence):
    page = Reader(browser, sentence[1])
    size = browser.get_window_size()
    try:
        for width in (1500, 1391, 1360, 1287, 1200, 900, 700, 500):
            browser.set_window_size(width, size["height"])
            page.until(
                lambda: page.run(
                    "const box = document.getElementById('map-box');"
                    "return box.scrollWidth <= box.clientWidth"
                )
            )
    finally:
        browser.set_window_size(size["width"], size["height"])
