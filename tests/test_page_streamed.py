"""The page of a map of any length, in a real browser that reaches its own server alone."""

import json

import pytest
import torch
from reader import Reader

from regard.look import look, payload

N = 20_000


@pytest.fixture(scope="module")
def long():
    torch.manual_seed(0)
    data = {name: torch.randn(1, 2, N, 8) for name in ("query", "key")}
    data["query"] = data["query"] * 2
    seen = look(data, causal=True)
    with seen.serve() as server:
        yield seen, server


def opened(browser, server, hash_=""):
    page = Reader(browser, server.url + hash_)
    page.until(lambda: page.run("return map.dataset.shown") not in (None, ""), seconds=30)
    return page


def quality(page):
    return page.run("return {...document.getElementById('quality').dataset}")


def exact(page, **state):
    page.settles(**state)
    page.until(lambda: quality(page).get("exact") == "true", seconds=60)
    return json.loads(page.run("return map.dataset.shown"))


def asked_of_others(page):
    """Every address that was asked for and is not below the page's own."""
    asked = set()
    for entry in page.driver.get_log("performance"):
        event = json.loads(entry["message"])["message"]
        if event["method"] == "Network.requestWillBeSent":
            asked.add(event["params"]["request"]["url"])
    base = page.url.split("#")[0]
    return {x for x in asked if not x.startswith((base, "chrome:", "data:", "about:", "blob:"))}


def test_the_overview_is_sampled_says_so_and_is_refined(browser, long):
    _, server = long
    page = opened(browser, server)
    first = quality(page)
    words = page.text("quality")
    assert first["exact"] == "false"
    assert words.startswith("Sampled: every dot is a mean of 157 × 157 cells, estimated from ")
    assert "of 20,000 queries" in words
    assert "Standard error" in words
    assert json.loads(page.run("return map.dataset.shown"))["rows"] == 128
    done = page.run("return progress.value")
    page.until(lambda: int(quality(page)["taken"]) > int(first["taken"]), seconds=30)
    page.until(lambda: page.run("return progress.value") > done)
    assert "20,000 queries × 20,000 keys" in page.text("facts")
    assert page.driver.get_log("browser") == []
    assert asked_of_others(page) == set()


def test_zoomed_cells_are_exact(browser, long, tmp_path):
    seen, server = long
    page = opened(browser, server, "#head=1&i=15000&j=700&top=14980&left=680&span=64")
    page.save_into(tmp_path)
    shown = exact(page, i=15000, j=700, head=1)
    assert (shown["top"], shown["left"], shown["size"], shown["rows"]) == (14980, 680, 1, 64)
    assert page.text("quality") == "Exact: single cells."
    header, *lines = page.saved("map", "csv")
    assert header == ["query", "key", "size", "mean_weight", "standard_error", "largest_weight"]
    expected = seen[0][0, 1][14980:15044, 680:744].flatten().tolist()
    for at in (0, 7, 64, 20 * 64 + 20, 4095):
        i, j, size, weight, error, largest = lines[at]
        assert largest == weight
        assert (int(i), int(j), size, error) == (14980 + at // 64, 680 + at % 64, "1", "0")
        # Two products of the same row in blocks of other rows may add in another order.
        assert float(weight) == pytest.approx(expected[at], rel=1e-5)
    page.until(lambda: page.run("return readout.dataset.weight"))
    told = float(page.run("return readout.dataset.weight"))
    assert told == pytest.approx(float(seen[0][0, 1, 15000, 700]), rel=1e-6)
    best = int(seen[0][0, 1, 15000].argmax())
    assert page.run("return document.querySelector('#row td').textContent") == str(best)
    assert asked_of_others(page) == set()


def test_keys_zoom_move_and_choose_heads(browser, long):
    _, server = long
    page = opened(browser, server, "#i=9000&j=4000")
    page.press("1")
    exact(page, view={"top": 8968, "left": 3968, "span": 64})
    page.press("+")
    exact(page, view={"top": 8984, "left": 3984, "span": 32})
    page.press("]")
    page.settles(head=1)
    page.press("]")
    page.settles(head=1)  # there are two
    page.press("\ue015")
    page.settles(i=9001)
    page.press("0")
    page.settles(view=None)
    page.until(lambda: quality(page)["exact"] == "false")
    page.until(lambda: "head=1&i=9001&j=4000" in page.driver.current_url)
    assert page.driver.get_log("browser") == []


def test_masked_cells_are_hatched_and_say_so(browser, long):
    _, server = long
    page = opened(browser, server, "#i=100&j=15000")
    page.until(lambda: page.text("readout") == "masked")
    assert "Hatched cells are masked" in page.text("map-hint")


def test_hostile_names_and_tokens_stay_text(browser, monkeypatch):
    monkeypatch.setattr(payload, "STREAMED_ABOVE", 8)
    torch.manual_seed(0)
    evil = "</script><img src=x onerror=alert(1)>"
    data = {name: torch.randn(1, 12, 4) for name in ("query", "key")}
    with look({**data, "tokens": [evil] * 12}).serve() as server:
        page = opened(browser, server, "#i=3&j=2")
        page.until(lambda: page.text("key-token") == evil)
        assert page.run("return document.querySelectorAll('img, script[src]').length") == 0
        assert page.driver.get_log("browser") == []


def test_short_inputs_keep_the_whole_page():
    with look({"query": torch.ones(3, 2), "key": torch.ones(3, 2)}).serve() as server:
        assert server._closed is None
