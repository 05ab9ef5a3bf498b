"""Kinds of heads: planted heads are called by their names, others "none"; the table says it all."""

import csv

import pytest
import torch

from regard.errors import ShapeError
from regard.look import kinds, look, statistics
from regard.look.record import pair_weights
from regard.look.scene import of_arrays

WORDS = ["a", "b", "c", "d", "e", "f", "g", "h"] * 2  # every token has one copy, eight places on
N = len(WORDS)
HARD = 50.0  # logits so far apart that a planted weight is 1 to float32's last digits


def planted(target):
    """A head whose query i puts all its weight on target(i), or spreads it evenly for None."""
    query = torch.zeros(N, N)
    for i in range(N):
        if (j := target(i)) is not None:
            query[i, j] = HARD * N**0.5  # the scale takes the root away again
    return query


HEADS = {
    "previous": lambda i: max(i - 1, 0),
    "next": lambda i: min(i + 1, N - 1),
    "current": lambda i: i,
    "duplicate": lambda i: (i + 8) % N,
    "induction": lambda i: i - 7 if i >= 8 else 3,
    "sink": lambda i: 0,
    "broad": lambda i: None,
    "none": lambda i: (5 * i + 5) % N,
}


def scene(**more):
    query = torch.stack([planted(target) for target in HEADS.values()])
    return {"query": query, "key": torch.eye(N)[None], "tokens": WORDS, **more}


def test_planted_heads_get_their_names():
    assert [row.kind for row in look(scene()).table()] == list(HEADS)


def test_a_head_that_looks_around_itself_is_local():
    # Even weights over the four neighbours on each side of 64 tokens, by a distance penalty.
    n = 64
    i, j = torch.arange(n)[:, None], torch.arange(n)
    query = torch.where((i - j).abs() <= 4, HARD * n**0.5, 0.0)
    row = look({"query": query, "key": torch.eye(n)}).table()[0]
    assert row.kind == "local"
    assert row.local == pytest.approx(1)
    assert row.score == row.local
    assert row.threshold == 0.6


def test_scores_are_sums_over_the_weights():
    """Every score against the definition, over the stored weights of random heads."""
    torch.manual_seed(1)
    data = {"query": torch.randn(4, N, 8), "key": torch.randn(2, N, 8), "tokens": WORDS}
    seen = look(data, causal=True)
    weights = seen.captured[0].matrix.dense()[0]
    i, j = torch.arange(N)[:, None], torch.arange(N)
    same = torch.tensor([[a == b for b in WORDS] for a in WORDS])
    after_copy = torch.zeros(N, N, dtype=torch.bool)
    after_copy[:, 1:] = (same & (j < i))[:, :-1]
    patterns = {
        "previous": j == i - 1,
        "next": j == i + 1,
        "current": j == i,
        "local": (i - j).abs() <= 4,
        "duplicate": same & (i != j),
        "induction": after_copy,
        "sink": (j == 0).expand(N, N),
    }
    causal = j <= i
    for row in seen.table():
        for name, pattern in patterns.items():
            rows = (pattern & causal).any(-1)
            if rows.sum() < kinds.QUERIES_AT_LEAST:
                assert getattr(row, name) is None
                continue
            expected = (weights[row.head] * pattern).sum(-1)[rows].mean()
            assert getattr(row, name) == pytest.approx(float(expected), abs=1e-6), name
    assert look(data, causal=True).table()[0].next is None  # the future is masked


def test_chance_and_thresholds_keep_short_texts_honest():
    """In five tokens, "within 4" is everything: a score of 1 earns no name there."""
    query = torch.zeros(5, 5)
    query[:, 2] = 1e3
    found = statistics.of_call(*scene_of({"query": query, "key": torch.eye(5)}))
    local = next(x for x in found.scores if x.kind.name == "local")
    assert local.score.tolist() == pytest.approx([1])
    assert local.chance.tolist() == pytest.approx([1])
    assert found.kinds == ("none",)


def scene_of(data):
    made = of_arrays(data)
    return made.captured[0], made.tokens


def test_cross_attention_has_no_positions_to_compare():
    row = look({"query": torch.zeros(5, 4), "key": torch.zeros(9, 4)}).table()[0]
    assert (row.queries, row.keys, row.previous, row.local) == (5, 9, None, None)
    assert row.kind == "broad"


def test_many_copies_are_thinned_evenly(monkeypatch):
    monkeypatch.setattr(kinds, "PAIRS_AT_MOST", 100)
    i, j = kinds._copies(["x"] * 40)
    assert len(i) <= 120
    assert set(i.tolist()) == set(range(0, 40, 16))
    assert bool((i != j).all())


def test_weights_of_pairs_in_pieces(monkeypatch):
    torch.manual_seed(0)
    call, _ = scene_of({"query": torch.randn(4, 9, 8), "key": torch.randn(2, 9, 8)})
    call = type(call)(**{**vars(call), "softcap": 1.5, "bias": torch.randn(1, 4, 9, 9)})
    i, j = torch.cartesian_prod(torch.arange(9), torch.arange(9)).unbind(-1)
    found = pair_weights(call, call.matrix.logsumexp()[0], i, j)
    torch.testing.assert_close(found.reshape(4, 9, 9), call.matrix.dense()[0])


def test_the_table_as_text_csv_and_records(tmp_path):
    table = look(scene(), layers=[0]).table()
    text = table.csv(tmp_path / "heads.csv")
    assert (tmp_path / "heads.csv").read_text() == text
    rows = list(csv.DictReader(text.splitlines()))
    assert [row["kind"] for row in rows] == list(HEADS)
    assert float(rows[0]["previous"]) == pytest.approx(table[0].previous)
    assert rows[0]["special"] == ""
    assert table.records()[2]["kind"] == "current"
    assert repr(table).splitlines()[0].split()[:3] == ["layer", "head", "name"]
    assert len(repr(table).splitlines()) == len(table) + 1
    assert "<td>induction</td>" in table._repr_html_()


def test_layers_by_name_and_number():
    seen = look({"query": torch.zeros(3, 2, 5, 4), "key": torch.zeros(3, 2, 5, 4)}, layers=[0, 2])
    assert seen["layer 2"].shape == seen[2].shape == (1, 2, 5, 5)
    with pytest.raises(ShapeError, match=r"no layer 1 here; there are 0 'layer 0', 2 'layer 2'"):
        seen[1]


def test_names_of_layers_may_stop_where_they_are_clear():
    model = torch.nn.TransformerEncoder(torch.nn.TransformerEncoderLayer(8, 2, 8), 2).eval()
    seen = look(model, torch.randn(5, 1, 8))
    assert [call.name for call in seen.captured] == ["layers.0.self_attn", "layers.1.self_attn"]
    assert torch.equal(seen["layers.1"].query, seen[1].query)
    with pytest.raises(ShapeError, match=r"'layers' is part of several names: 'layers.0.self_"):
        seen["layers"]
    with pytest.raises(ShapeError, match=r"no layer 'layers.1.self' here"):
        seen["layers.1.self"]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("deviation", [0.0, 1.0, 4.0])
def test_random_heads_hardly_have_a_name_but_broad_or_none(causal, deviation):
    torch.manual_seed(0)
    labels = ["the", "cat", "sat", "on", "the", "mat", "and", "the", "dog", "sat"]
    for n in (10, 40, 160):
        query, key = deviation * torch.randn(100, n, 64), torch.randn(100, n, 64)
        tokens = [labels[at % 10] for at in range(n)]
        table = look({"query": query, "key": key, "tokens": tokens}, causal=causal).table()
        names = [row.kind for row in table]
        # Three standard errors on one side of a normal distribution, for each of seven kinds.
        assert sum(name not in ("broad", "none") for name in names) <= 7 * 0.00135 * len(names) + 1
        assert deviation > 1 or set(names) == {"broad"}


def test_the_error_of_a_score_is_that_of_a_mean():
    torch.manual_seed(0)
    mass, rows = torch.rand(3, 9), torch.arange(9)[None] > 2
    told = kinds.error_of(mass, rows)
    torch.testing.assert_close(told, mass[:, 3:].std(1) / 6**0.5)


def test_few_queries_that_differ_earn_no_name():
    """Two of five copies are attended to: 40 % of the weight, three errors of which are 73 %."""
    scores = kinds.Scores(
        kinds.KINDS[1],
        torch.tensor([0.4, 0.4]),
        torch.tensor([0.1, 0.1]),
        5,
        torch.tensor([0.245, 0.05]),
    )
    assert scores.met.tolist() == [False, True]
