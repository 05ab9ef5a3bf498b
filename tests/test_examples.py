"""Every example runs from its first line to its last table, on next to nothing."""

import importlib
import json
import re
import sys
from pathlib import Path

import pytest

pytest.importorskip("matplotlib", reason="the examples draw: pip install 'regard[examples]'")
pytest.importorskip("tqdm", reason="the examples show how far they are: regard[examples]")
pytest.importorskip("sklearn", reason="it brings the digits: regard[examples]")

ROOT = Path(__file__).parent.parent
# A page on what was learned, and the results that it shows.
PAGES = {
    "positions.md": ROOT / "examples" / "positions" / "results",
    "convolution.md": ROOT / "examples" / "convolution" / "results",
    "recurrence.md": ROOT / "examples" / "recurrence" / "results",
    "tasks.md": ROOT / "examples" / "tasks" / "results",
}
KEPT = sorted(path for results in PAGES.values() for path in results.glob("*.json"))
sys.path.append(str(ROOT))  # last, so that an installed regard is the one that is tested

SCRIPTS = {
    "positions.show": {"facts.md", "mask.md", "input.png", "score.png", "distance.png", "mask.png"},
    "positions.extrapolation": {"extrapolation.md", "extrapolation.png"},
    "positions.masked_and_causal": {"masked_and_causal.md", "learned.png"},
    "positions.length": {"length.md", "length.png"},
    "convolution.convert": {"convert.md", "convert.png"},
    "convolution.receptive": {"receptive.md", "receptive.png"},
    "convolution.data_size": {"data_size.md", "data_size.png", "fields.png"},
    "convolution.crossover": {"crossover.md", "crossover.png"},
    "recurrence.copy_task": {"copy_task.md", "copy_task.png"},
    "recurrence.copying": {"copying.md", "copying.png"},
    "recurrence.decode": {"decode.png"},
    "recurrence.generation": {"generation.md", "generation.png"},
    "recurrence.mimicry": {"mimicry.md", "mimicry.png"},
    "recurrence.recall": {"recall.md", "recall.png"},
    "tasks.cora": {"cora.md", "cora-0.safetensors"},
    "tasks.tagging": {"tagging.md", "tagging-0.safetensors"},
    "tasks.sentiment": {"sentiment.md", "sentiment-0.safetensors"},
    "tasks.digits": {"digits.md", "digits-0.safetensors"},
    "tasks.characters": {"characters.md", "characters-0.safetensors", "characters-0.txt"},
    "tasks.patches": {"patches.md", "patches-0.safetensors"},
    "tasks.translation": {"translation.md", "translation-0.safetensors"},
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_quick(name, tmp_path):
    script = importlib.import_module(f"examples.{name}")
    script.main(["--quick", "--out", str(tmp_path)])
    written = {path.name for path in tmp_path.iterdir()}
    assert written >= SCRIPTS[name]
    pages = [path.read_text() for path in tmp_path.glob("*.md")]
    assert all("nan" not in page.lower().split() for page in pages)


def test_numbers_that_were_kept_are_drawn_again_without_training(tmp_path):
    script = importlib.import_module("examples.positions.length")
    script.main(["--quick", "--out", str(tmp_path)])
    first = (tmp_path / "length.md").read_text()
    script.main(["--quick", "--out", str(tmp_path), "--redraw"])
    assert (tmp_path / "length.md").read_text() == first


def test_a_run_that_was_stopped_goes_on(tmp_path):
    script = importlib.import_module("examples.recurrence.copy_task")
    script.main(["--quick", "--out", str(tmp_path)])
    kept = tmp_path / "copy_task.json"
    whole = kept.read_text()
    conditions, results = json.loads(whole)
    kept.write_text(json.dumps([conditions, [[0.5] * len(results[0])]]))
    script.main(["--quick", "--out", str(tmp_path), "--resume"])
    assert json.loads(kept.read_text())[1] == [[0.5] * len(results[0]), *results[1:]]


def tables(text):
    return re.findall(r"(?:^\|.*\n)+", text, flags=re.M)


@pytest.mark.parametrize("name", PAGES)
def test_tables_of_the_page_are_those_of_the_results(name):
    """A table whose first line stands in a page of results is there whole."""
    pages = PAGES[name].glob("*.md")
    measured = {table for path in pages for table in tables(path.read_text())}
    heads = {table.split("\n")[0] for table in measured}
    shown = [t for t in tables((ROOT / "docs" / name).read_text()) if t.split("\n")[0] in heads]
    assert shown
    assert set(shown) <= measured


@pytest.mark.parametrize("page", KEPT, ids=lambda path: path.stem)
def test_pages_of_results_say_what_was_measured(page, tmp_path):
    """The committed tables are those of the committed numbers."""
    script = importlib.import_module(f"examples.{page.parent.parent.name}.{page.stem}")
    (tmp_path / page.name).write_bytes(page.read_bytes())
    script.main(["--redraw", "--out", str(tmp_path)])
    written = (tmp_path / page.name).with_suffix(".md").read_text()
    assert written == page.with_suffix(".md").read_text()
