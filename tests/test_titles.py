"""Two runs are told apart by what differs between them."""

from dataclasses import replace

import numpy
import pytest
import torch
from torch import nn

from regard.cli import main
from regard.look import capture, look
from regard.look.scene import Scene, Tokens
from regard.look.titles import names_of, of_both


def two(one, other):
    """Two scenes of texts by one model, each given as words or as keyword arguments."""
    made = []
    for given in (one, other):
        given = {"words": given} if isinstance(given, str) else dict(given)
        tokens = Tokens.of_labels(given.pop("words", "the same").split())
        made.append(Scene(given.pop("title", "MiniLM"), (), tokens, **given))
    return replace(made[0], beside=made[1])


CASES = [
    ("the cat sat", "the cat lay", ("“the cat sat”", "“the cat lay”")),
    ("a cat", "a cat sat", ("“a cat”", "“a cat sat”")),
    (
        "the animal did not cross because it was too tired",
        "the animal did not cross because it was too wide",
        ("“… was too tired”", "“… was too wide”"),
    ),
    ({"title": "A"}, {"title": "B"}, ("A", "B")),
    ({"label": "before"}, {"label": "after", "title": "B"}, ("before", "after")),
    ({"label": "mine"}, {}, ("mine", "MiniLM")),
    ({"label": "x", "words": "a b"}, {"label": "x", "words": "a c"}, ("“a b”", "“a c”")),
    ({"sources": ("m", "a/t.txt")}, {"sources": ("m", "b/t.txt")}, ("a/t.txt", "b/t.txt")),
    ({"sources": ("m/1/x",)}, {"sources": ("m/2/x",)}, ("1/x", "2/x")),
    ({"sources": ("m", "a/one.txt")}, {"sources": ("m", "b/two.txt")}, ("one.txt", "two.txt")),
    ({}, {}, ("first run", "second run")),
]


@pytest.mark.parametrize(("one", "other", "names"), CASES)
def test_names(one, other, names):
    assert names_of(two(one, other)) == names


def test_of_both():
    assert of_both(two("the cat sat", "the cat lay")) == "MiniLM: “the cat sat” and “the cat lay”"
    assert of_both(two({"title": "A"}, {"title": "B"})) == "A · B"
    assert of_both(two({}, {})) == "MiniLM: first run and second run"


def test_words_of_several_tokens_are_whole():
    tokens = [
        Tokens(("[CLS]", "un", "tired", end, "[SEP]"), (False, False, True, True, False),
               (True, False, False, False, True), 5)
        for end in ("ly", "ness")
    ]  # fmt: skip
    scene = Scene("M", (), tokens[0], beside=Scene("M", (), tokens[1]))
    assert names_of(scene) == ("“untiredly”", "“untiredness”")


def test_hostile_names_are_one_short_line_and_never_markup():
    hostile = "<script>alert(1)</script>\u202egnp.exe\x00\n\u2028" + "x" * 200
    scene = two({"label": hostile + "1"}, {"label": hostile + "2"})
    one, other = names_of(scene)
    assert one != other
    assert max(len(one), len(other)) <= 40
    assert (one + other).isprintable()
    torch.manual_seed(0)
    arrays = [{name: torch.randn(5, 8) for name in ("query", "key")} for _ in "ab"]
    seen = look(arrays[0], beside=look(arrays[1]).named(hostile + "2")).named(hostile + "1")
    for drawn in (seen.html, seen.figure("difference").svg):
        assert "<script>alert" not in drawn
        assert "\x00" not in drawn
        assert "\u202e" not in drawn


def test_records_have_the_names_they_are_given():
    torch.manual_seed(0)
    layer, x = nn.MultiheadAttention(8, 2, batch_first=True).eval(), torch.randn(1, 5, 8)
    records = []
    for _ in range(2):
        with torch.no_grad(), capture(layer) as record:
            layer(x, x, x, need_weights=False)
        records.append(record)
    figure = records[0].figure("difference", beside=records[1])
    assert "MultiheadAttention: first run and second run" in figure.svg
    records[0].name, records[1].name = "step 0", "step 9"
    assert "step 0 · step 9" in records[0].figure("difference", beside=records[1]).svg


def test_the_command_line_names_runs(tmp_path, capsys):
    for at, folder in enumerate(("a", "b")):
        torch.manual_seed(at)
        (tmp_path / folder).mkdir()
        arrays = {name: torch.randn(5, 8).numpy() for name in ("query", "key")}
        numpy.savez(tmp_path / folder / "run.npz", **arrays)
    files = [str(tmp_path / folder / "run.npz") for folder in "ab"]
    out = tmp_path / "difference.svg"
    assert main(["look", files[0], "--beside", files[1], "--output", str(out)]) == 0
    assert "run.npz: a/run.npz and b/run.npz" in out.read_text("utf-8")
    named = ["--label", "old", "--beside-label", "new"]
    assert main(["look", files[0], "--beside", files[1], *named, "--output", str(out)]) == 0
    assert "run.npz: old and new" in out.read_text("utf-8")
    assert main(["look", files[0], "--beside-label", "new", "--output", str(out)]) != 0
    assert "--beside-label names the run of --beside" in capsys.readouterr().err
