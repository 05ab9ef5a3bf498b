"""The page inside other pages: a notebook's export, and a frame that allows scripts alone."""

import html

import pytest
import torch
from reader import Reader

from regard.look import look


@pytest.fixture
def cell():
    torch.manual_seed(0)
    seen = look({name: torch.randn(2, 9, 8) for name in ("query", "key", "value")})
    return f'<!doctype html><meta charset="utf-8"><body>{seen._repr_html_()}</body>'


def inside(browser, path, depth):
    """A reader of the page in the innermost frame."""
    browser.get("about:blank")
    browser.get_log("browser"), browser.get_log("performance")
    browser.get(path.as_uri())
    for _ in range(depth):
        browser.switch_to.frame(browser.find_element("tag name", "iframe"))
    page = Reader.__new__(Reader)
    page.driver, page.url = browser, path.as_uri()
    page.until(lambda: page.run("return document.body.dataset.state") is not None)
    return page


def works(page):
    page.driver.find_element("css selector", '#heads [data-head="1"]').click()
    page.settles(head=1)
    page.driver.switch_to.active_element.send_keys("[")
    page.settles(head=0)
    assert page.text("readout").startswith("weight ")
    assert page.run("return document.getElementById('map').width") > 100
    assert page.driver.get_log("browser") == []
    page.driver.switch_to.default_content()


def test_an_exported_notebook(browser, cell, tmp_path):
    path = tmp_path / "export.html"
    path.write_text(cell, "utf-8")
    works(inside(browser, path, 1))


@pytest.mark.parametrize("allowed", ["allow-scripts", "allow-scripts allow-downloads"])
def test_a_sandboxed_output(browser, cell, tmp_path, allowed):
    path = tmp_path / "sandbox.html"
    frame = f'<iframe sandbox="{allowed}" width="900" height="950" srcdoc="{html.escape(cell)}">'
    path.write_text(f'<!doctype html><meta charset="utf-8"><body>{frame}</iframe></body>', "utf-8")
    works(inside(browser, path, 2))
