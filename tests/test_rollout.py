"""Rollout by vectors is that of the stored matrices, in Python and on the page."""

import pytest
import torch
from reader import Reader

from regard import ShapeError
from regard.look import look


def arrays(n=7, layers=3):
    torch.manual_seed(0)
    return {"query": torch.randn(layers, 4, n, 8), "key": torch.randn(layers, 2, n, 8)}


def by_products(seen):
    """The n x n products of Abnar and Zuidema 2020, section 3, from the top layer down."""
    n = seen.captured[0].query.shape[2]
    whole, found = torch.eye(n), []
    for call in reversed(seen.captured):
        whole = whole @ (call.matrix.dense()[0].mean(0) + torch.eye(n)) / 2
        found.append(whole)
    return torch.stack(found[::-1])


@pytest.mark.parametrize("causal", [False, True])
def test_vectors_give_the_rows_of_the_products(causal):
    seen = look(arrays(), causal=causal)
    expected = by_products(seen)
    for query in (0, 3, 6):
        found = seen.rollout(query)
        torch.testing.assert_close(found, expected[:, query])
        torch.testing.assert_close(found.sum(-1), torch.ones(3))


def test_layers_of_different_sequences_are_refused():
    data = arrays()
    data["query"] = data["query"][:, :, :5]
    with pytest.raises(ShapeError, match=r"layer 0 'layer 0' has 5 queries and 7 keys; choose"):
        look(data).rollout(0)
    with pytest.raises(ShapeError, match="query is 7; the tokens are 0 to 6"):
        look(arrays()).rollout(7)


@pytest.mark.parametrize("n", [7, 150])
def test_the_page_has_the_same_shares(browser, tmp_path, n):
    seen = look(arrays(n), causal=True)
    page = Reader(browser, seen.save(tmp_path / "page.html"))
    (tmp_path / "saved").mkdir()
    page.save_into(tmp_path / "saved")
    page.go("#i=5&j=2&head=1")
    page.settles(i=5, j=2, head=1)
    if n > 128:
        page.run("document.querySelector('#rollout button').click()")
    assert "Through all layers: the last output of #5 comes from" in page.text("rollout")
    rows = page.saved("rollout", "csv")
    shares = [float(row[2]) for row in rows[1:]]
    assert shares == pytest.approx(seen.rollout(5)[0].tolist(), rel=1e-4, abs=1e-7)
    page.assert_quiet()


def test_no_rollout_where_there_is_none(browser, tmp_path):
    seen = look(arrays(layers=1))
    page = Reader(browser, seen.save(tmp_path / "one.html"))
    assert page.run("return document.getElementById('rollout-part').hidden")
