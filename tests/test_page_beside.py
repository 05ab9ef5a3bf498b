"""Two runs side by side: both maps, and the difference of their weights."""

import json
import struct
from xml.etree import ElementTree

import pytest
import torch
from reader import Reader

from regard.errors import ShapeError
from regard.look import look


def arrays(seed, n=9):
    generator = torch.Generator().manual_seed(seed)
    data = {name: torch.randn(2, 2, n, 8, generator=generator) for name in ("query", "key")}
    return {**data, "tokens": [f"{'ab'[seed]}{at}" for at in range(n)]}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    other = look(arrays(1))
    seen = look(arrays(0), beside=other)
    return seen, other, seen.save(tmp_path_factory.mktemp("beside") / "two.html")


def test_both_runs_and_their_difference(browser, runs):
    seen, other, path = runs
    page = Reader(browser, path)
    page.go("#layer=1&head=1&i=4&j=2")
    page.settles(layer=1, head=1, i=4, j=2)
    page.until(lambda: "a4 (4) → a2 (2), beside it b4 → b2" in page.text("beside-words"))
    mine, theirs = (float(run[1][0, 1, 4, 2]) for run in (seen, other))
    words = page.text("beside-words").replace("−", "-").split(": weight ")[1]
    here, rest = words.split(" and ")
    there, difference = rest.split(", difference ")
    # Three digits are shown, or two below a thousandth.
    for told, exact in ((here, mine), (there, theirs), (difference, mine - theirs)):
        assert float(told) == pytest.approx(exact, abs=5.1e-4)
    shown = json.loads(page.run("return document.getElementById('beside-2').dataset.shown"))
    assert (shown["rows"], shown["columns"], shown["size"]) == (9, 9, 1)
    largest = float((seen[1][0, 1].dense() - other[1][0, 1].dense()).abs().max())
    assert shown["largest"] == pytest.approx(largest, rel=1e-4)
    page.assert_quiet()


def test_the_sign_has_a_colour(browser, runs):
    seen, other, path = runs
    page = Reader(browser, path)
    page.go("#layer=0&head=0&i=0&j=0")
    page.settles(layer=0, head=0)
    page.until(lambda: page.run("return document.getElementById('beside-2').dataset.shown"))
    difference = seen[0][0, 0].dense() - other[0][0, 0].dense()
    for place in (difference.argmax(), difference.argmin()):
        i, j = divmod(int(place), 9)
        red, _, blue, _ = page.run(
            "const canvas = document.getElementById('beside-2'), [i, j] = arguments;"
            "const {box, cell} = JSON.parse(canvas.dataset.shown);"
            "return [...canvas.getContext('2d').getImageData(box.x + (j + 0.5) * cell,"
            " box.y + (i + 0.5) * cell, 1, 1).data]",
            i,
            j,
        )
        assert (blue > red) == (float(difference[i, j]) > 0)  # blue above, orange below


def test_saved_as_svg_png_and_csv(browser, runs, tmp_path):
    seen, _other, path = runs
    page = Reader(browser, path)
    page.go("#layer=1&head=1&i=4&j=2")
    page.settles(layer=1, head=1, i=4, j=2)
    page.save_into(tmp_path)
    drawing = page.saved("beside", "svg")
    root = ElementTree.fromstring(drawing)
    said = [node.text for node in root.iter("{http://www.w3.org/2000/svg}text")]
    assert said[0] == "Two runs: layer 1, head 1"
    assert {"a3", "b3", "difference of weights", "This run − the one beside it"} <= set(said)
    assert "weight, times the even weight of all visible keys, log scale" in said
    assert drawing.count("<image") == 3
    picture = page.saved("beside", "png")
    assert struct.unpack(">II", picture[16:24]) == (
        2 * int(root.get("width")),
        2 * int(root.get("height")),
    )
    rows = page.saved("beside", "csv")
    expected = seen.figure("difference", layer=1, head=1)
    assert tuple(rows[0]) == expected.columns
    for row, wanted in zip(rows[1:], expected.rows, strict=True):
        assert tuple(row[:2]) == wanted[:2]
        assert [float(x) for x in row[2:]] == pytest.approx(wanted[2:], abs=1e-6)
    page.assert_quiet()


def test_one_run_has_no_such_part(browser, tmp_path):
    page = Reader(browser, look(arrays(0)).save(tmp_path / "one.html"))
    assert page.run("return document.getElementById('beside-part').hidden")
    page.assert_quiet()


def test_runs_that_do_not_fit_say_so():
    with pytest.raises(ShapeError, match=r"must agree; this one has 2 layers of \[\(2, 9, 9\)\]"):
        look(arrays(0), beside=look(arrays(1, n=8)))
    with pytest.raises(ShapeError, match=r"layers= \(--layers\) make them agree"):
        look(arrays(0), beside=look(arrays(1), layers=[0]))
    assert look(arrays(0), beside=look(arrays(1, n=9), limit=9)).scene.beside is not None
