"""Two runs side by side: both maps, and the difference of their weights."""

import json

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
            "const side = canvas.width / 9;"
            "return [...canvas.getContext('2d').getImageData((j + 0.5) * side, (i + 0.5) * side,"
            " 1, 1).data]",
            i,
            j,
        )
        assert (blue > red) == (float(difference[i, j]) > 0)  # blue above, orange below


def test_one_run_has_no_such_part(browser, tmp_path):
    page = Reader(browser, look(arrays(0)).save(tmp_path / "one.html"))
    assert page.run("return document.getElementById('beside-part').hidden")
    page.assert_quiet()


def test_runs_that_do_not_fit_say_so():
    with pytest.raises(ShapeError, match=r"must agree; this one has 2 layers of \[\(2, 9, 9\)\]"):
        look(arrays(0), beside=look(arrays(1, n=8)))
    with pytest.raises(ShapeError, match="layers= make them agree"):
        look(arrays(0), beside=look(arrays(1), layers=[0]))
    assert look(arrays(0), beside=look(arrays(1, n=9), limit=9)).scene.beside is not None
