"""Two runs of any length on one page: the same views of both, their difference, and its error."""

import json

import pytest
import torch
from reader import Reader

from regard.look import look, payload
from regard.look.paired import Paired
from regard.look.record import Captured
from regard.look.sampled import Region

N = 300


def arrays(seed, n=N):
    generator = torch.Generator().manual_seed(seed)
    data = {name: 2 * torch.randn(2, 2, n, 8, generator=generator) for name in ("query", "key")}
    return {**data, "tokens": [f"{'ab'[seed]}{at}" for at in range(n)]}


@pytest.fixture(scope="module")
def served():
    patch = pytest.MonkeyPatch()
    patch.setattr(payload, "STREAMED_ABOVE", 8)
    other = look(arrays(1), causal=True).named("<b>after</b>")
    seen = look(arrays(0), causal=True, beside=other).named("before")
    with seen.serve() as server:
        yield seen, other, server
    patch.undo()


def opened(browser, served, hash_):
    page = Reader(browser, served[2].url + hash_)
    page.until(lambda: page.run("return quality.dataset.exact") == "true", seconds=30)
    return page


def shown(page, at=2):
    return json.loads(page.run(f"return document.getElementById('beside-{at}').dataset.shown"))


def test_both_runs_and_their_difference(browser, served):
    seen, other, _ = served
    page = opened(browser, served, "#layer=1&head=1&i=200&j=40")
    page.settles(layer=1, head=1, i=200, j=40)
    page.until(lambda: "a200 (200) → a40 (40), beside it b200 → b40" in page.text("beside-words"))
    mine, theirs = (float(run[1][0, 1, 200, 40]) for run in (seen, other))
    words = page.text("beside-words").replace("−", "-").split(": weight ")[1]
    here, rest = words.split(" and ")
    there, difference = rest.split(", difference ")
    for told, exact in ((here, mine), (there, theirs), (difference, mine - theirs)):
        assert float(told) == pytest.approx(exact, rel=0.06, abs=5.1e-4)
    told = shown(page)
    assert (told["rows"], told["columns"], told["size"]) == (100, 100, 3)
    cells = [run[1][0, 1].dense().reshape(100, 3, 100, 3).sum((1, 3)) for run in (seen, other)]
    visible = torch.ones(N, N).tril().reshape(100, 3, 100, 3).sum((1, 3)).clamp(min=1)
    largest = float(((cells[0] - cells[1]) / visible).abs().max())
    assert told["largest"] == pytest.approx(largest, rel=1e-4)
    assert page.text("beside-0-title") == "This run: before"
    assert page.text("beside-1-title") == "Beside it: <b>after</b>"
    assert page.run("return document.title") == "arrays: before and <b>after</b>: attention"
    assert page.run("return document.querySelectorAll('figcaption b').length") == 0
    assert page.driver.get_log("browser") == []


def test_it_follows_zoom_head_and_layer(browser, served, tmp_path):
    seen, other, _ = served
    page = opened(browser, served, "#layer=0&head=0&i=150&j=100&top=120&left=80&span=40")
    page.until(lambda: page.run("return quality.dataset.exact") == "true" and shown(page))
    assert (shown(page)["top"], shown(page)["left"], shown(page)["size"]) == (120, 80, 1)
    page.press("]", "}")
    page.settles(layer=1, head=1)
    page.until(lambda: page.run("return quality.dataset.exact") == "true")
    page.until(lambda: page.run("return document.getElementById('beside-2').dataset.shown"))
    page.save_into(tmp_path)
    header, *rows = page.saved("beside", "csv")
    assert header == ["query", "key", "weight", "weight_beside", "difference"]
    here, there = (run[1][0, 1][120:160, 80:120] for run in (seen, other))
    assert len(rows) == 1600
    for at, row in enumerate(rows):
        i, j = divmod(at, 40)
        assert row[:2] == [f"a{120 + i} ({120 + i})", f"a{80 + j} ({80 + j})"]
        if 80 + j > 120 + i:
            assert row[2:] == ["", "", ""]
            continue
        exact = [float(here[i, j]), float(there[i, j]), float(here[i, j] - there[i, j])]
        assert [float(x) for x in row[2:]] == pytest.approx(exact, abs=1e-6)
    drawing = page.saved("beside", "svg")
    assert "Two runs: layer 1, head 1" in drawing
    assert "arrays: before and &lt;b&gt;after&lt;/b&gt; · layer 1" in drawing
    assert drawing.count("<image") == 3
    assert page.saved("beside", "png").startswith(b"\x89PNG")


def test_a_click_on_a_map_selects_and_hovering_reads_a_block(browser, served):
    from selenium.webdriver import ActionChains

    page = opened(browser, served, "#layer=0&head=0&i=250&j=10")
    page.until(lambda: page.run("return document.getElementById('beside-2').dataset.shown"))
    canvas = page.driver.find_element("id", "beside-2")
    page.run("arguments[0].scrollIntoView({block: 'center'})", canvas)
    told = shown(page)
    x = told["box"]["x"] + 20.5 * told["cell"] - canvas.rect["width"] / 2
    y = told["box"]["y"] + 60.5 * told["cell"] - canvas.rect["height"] / 2
    ActionChains(page.driver).move_to_element_with_offset(canvas, x, y).perform()
    page.until(lambda: page.text("tip").startswith("block at query 180, key 60: mean weight "))
    ActionChains(page.driver).click().perform()
    page.settles(i=180, j=60)
    page.until(lambda: "a180 (180) → a60 (60)" in page.text("beside-words"))


def test_before_all_queries_are_there_the_error_is_told(browser):
    torch.manual_seed(0)
    runs = [{name: 2 * torch.randn(1, 1, 17_000, 8) for name in ("query", "key")} for _ in "ab"]
    with look(runs[0], beside=look(runs[1])).serve() as server:
        page = Reader(browser, server.url)
        page.until(lambda: page.run("return map.dataset.shown"), seconds=60)
        words = page.text("beside-hint")
        assert "Both are estimated from the same " in words
        assert "the standard error of the difference is " in words
        assert page.text("beside-0-title") == "This run: first run"
        assert page.text("beside-1-title") == "Beside it: second run"


def test_one_run_has_no_such_part(browser, monkeypatch):
    monkeypatch.setattr(payload, "STREAMED_ABOVE", 8)
    with look(arrays(0)).serve() as server:
        page = Reader(browser, server.url)
        assert page.run("return document.getElementById('beside-part').hidden")


def calls(shared):
    """Two runs, which have so much of their queries and keys in common."""
    torch.manual_seed(0)
    common = torch.randn(3, 1, 1, 400, 8)
    return tuple(
        Captured(
            "", "arrays", *(shared * common + (1 - shared) * torch.randn(3, 1, 1, 400, 8)),
            mask=None, scale=1.0, causal=True,
        )
        for _ in range(2)
    )  # fmt: skip


@pytest.mark.parametrize("shared", [0.0, 0.95])
def test_the_error_of_the_difference_is_that_of_many_draws(shared):
    both, region = calls(shared), Region(0, 0, 0, 0, 400, 400, 50)
    exact = both[0].matrix.pool(50)[0, 0] - both[1].matrix.pool(50)[0, 0]
    found, errors, apart = [], [], []
    for seed in range(200):
        paired = Paired(both, region, seed=seed)
        paired.advance(8 * 10)
        found.append(paired.mean() - exact)
        errors.append(paired.error())
        apart.append((paired.here.error().square() + paired.there.error().square()).sqrt())
    below = torch.ones(8, 8).tril().bool()
    spread = torch.stack(found).square().mean(0).sqrt()[below]
    told = torch.stack(errors).square().mean(0).sqrt()[below]
    # Each ratio is of 200 draws: 5 % by chance (1 / sqrt(400)), and all cells must do.
    assert float((told / spread - 1).abs().mean()) < 0.1
    assert float((told / spread - 1).abs().max()) < 0.35
    if shared:  # what both have in common is no error
        assert float(told.mean()) < 0.7 * float(torch.stack(apart).mean(0)[below].mean())
    assert bool(torch.stack(errors)[0].isnan().logical_not()[below].all())
