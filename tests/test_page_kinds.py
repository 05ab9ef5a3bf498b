"""Kinds of heads on the page: names, scores and thresholds are those of Python."""

import pytest
from reader import Reader

from regard.look import kinds


@pytest.fixture
def page(browser, sentence):
    return Reader(browser, sentence[1])


def percent(text):
    return float(text.rstrip("%")) / 100


def test_every_thumbnail_says_its_kind(page, sentence):
    names = page.run(
        "return [...document.querySelectorAll('#heads .kind')].map((x) => x.textContent)"
    )
    assert names == [row.kind for row in sentence[0].table()]
    labels = page.run(
        "return [...document.querySelectorAll('#heads .thumb')].map((x) => x.ariaLabel)"
    )
    assert labels[2].startswith("Layer 0 head 2: kind previous, ")


def test_the_selected_heads_scores_are_those_of_python(page, sentence):
    for layer, head in ((0, 2), (1, 8), (4, 5)):
        row = next(r for r in sentence[0].table() if (r.layer, r.head) == (layer, head))
        page.go(f"#layer={layer}&head={head}&i=3&j=3")
        page.settles(layer=layer, head=head)
        assert page.text("kinds-title") == f"Kind: {row.kind}"
        lines = page.run(
            "return [...document.querySelectorAll('#kinds tbody tr')]"
            ".map((line) => [...line.cells].map((cell) => cell.textContent))"
        )
        for name, _, score, needs, _ in lines:
            expected = getattr(row, name)
            if expected is None:
                assert score == "–"
            else:
                assert percent(score) == pytest.approx(expected, abs=6e-3)
            if name == row.kind:
                assert percent(needs) == row.threshold
        assert "of this head’s weight" in page.text("kinds-hint")
    assert "of this row lies on the tokenizer’s own tokens" in page.text("sent")
    page.assert_quiet()


def test_heads_in_the_order_of_their_kinds(page, sentence):
    page.run(
        "const order = document.getElementById('order'); order.value = '+kind';"
        "order.dispatchEvent(new Event('change'))"
    )
    shown = page.run(
        "return [...document.querySelectorAll('#heads .thumb')]"
        ".map((x) => [Number(x.dataset.layer), Number(x.dataset.head)])"
    )
    rows = {(row.layer, row.head): row for row in sentence[0].table()}
    order = [*(kind.name for kind in kinds.KINDS), "none"]
    ranks = [(order.index(rows[*at].kind), -(rows[*at].score or 0)) for at in shown]
    assert ranks == sorted(ranks)
    assert len(shown) == 72
