"""The house rules that a machine can check. A raised ceiling is a line here, with the reason."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import regard

ROOT = Path(__file__).parent.parent
PYTHON = sorted((ROOT / "regard").rglob("*.py"))
ALL = sorted(
    path
    for folder in ("regard", "tests", "bench", "examples")
    for path in (ROOT / folder).rglob("*.py")
)
TREES = {path: ast.parse(path.read_text()) for path in PYTHON}

# Signatures of torch are repeated, and the parts say what is computed.
MANY_PARAMETERS = {"MultiHeadAttention", "SelfAttention", "scaled_dot_product_attention"}


def functions(tree):
    return [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]


def name_of(path):
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", ALL, ids=name_of)
def test_files_have_at_most_400_lines(path):
    assert len(path.read_text().splitlines()) <= 400


@pytest.mark.parametrize("path", sorted((ROOT / "regard").rglob("*.[jc]s*")), ids=name_of)
def test_front_end_files_have_at_most_500_lines(path):
    assert len(path.read_text().splitlines()) <= 500


@pytest.mark.parametrize("path", PYTHON, ids=name_of)
def test_functions_have_at_most_60_lines(path):
    for function in functions(TREES[path]):
        body = function.end_lineno - function.lineno + 1
        documented = ast.get_docstring(function, clean=False)
        body -= len(documented.splitlines()) if documented else 0
        assert body <= 60, f"{function.name} has {body} lines"


@pytest.mark.parametrize("name", regard.__all__)
def test_public_signatures_have_at_most_7_parameters(name):
    public = getattr(regard, name)
    methods = vars(public).values() if inspect.isclass(public) else [public]
    for method in methods:
        if inspect.isfunction(method):
            count = len([p for p in inspect.signature(method).parameters if p != "self"])
            assert count <= 7 or name in MANY_PARAMETERS, f"{name}.{method.__name__}: {count}"


@pytest.mark.parametrize("name", regard.__all__)
def test_public_names_are_documented(name):
    documented = inspect.getdoc(getattr(regard, name))
    assert documented
    assert not documented.startswith(f"{name}(")  # what a dataclass writes by itself


def test_there_are_about_thirty_public_names():
    # Four more than 35: two are torch's, where torch's users look for them; `Features` and `recur`
    # are the whole recurrent family.
    assert len(regard.__all__) <= 39
    # The order that ruff gives: names in capitals first.
    order = sorted(regard.__all__, key=lambda name: (not name.isupper(), name))
    assert regard.__all__ == order
    assert all(hasattr(regard, name) for name in regard.__all__)


def test_imports_point_one_way():
    """errors <- parts <- matrix <- nn, look <- hf, cli; forms are fetched late by the matrix."""
    order = [
        {"errors"},
        {"part", "grouped", "trace", "runs", "opaque", "grid"},
        {"dropout", "mask", "normalizer", "position", "score", "custom", "feature_map", "features"},
        {"rule", "transposed", "neighborhood", "graph"},
        {"looking"},
        {"matrix"},
        {"form", "indexing", "explain", "picture", "sdpa", "interchange", "literal", "onnx"},
        {"nn", "look", "receptive"},
        {"convert", "commands"},
        {"cli", "hf"},
    ]
    level = {module: number for number, modules in enumerate(order) for module in modules}
    for path, tree in TREES.items():
        own = path.relative_to(ROOT / "regard").with_suffix("").parts[0]
        if own not in level:
            continue
        for node in tree.body:  # imports inside functions and TYPE_CHECKING are late
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("regard"):
                names = (
                    [alias.name for alias in node.names]
                    if node.module == "regard"
                    else [node.module.split(".")[1]]
                )
                for name in names:
                    assert level.get(name, -1) <= level[own], f"{name_of(path)} imports {name}"


def test_no_run_of_eight_lines_stands_twice():
    seen: dict[tuple[str, ...], str] = {}
    for path in ALL:
        lines = [
            (number, line.strip())
            for number, line in enumerate(path.read_text().splitlines(), 1)
            if len(line.strip()) > 3 and not re.match(r"(from|import|#|\w+,$)", line.strip())
        ]
        for start in range(len(lines) - 7):
            run = tuple(text for _, text in lines[start : start + 8])
            place = f"{name_of(path)}:{lines[start][0]}"
            assert run not in seen, f"{place} repeats {seen[run]}"
            seen[run] = place


@pytest.mark.parametrize("path", ALL, ids=name_of)
def test_no_marks_of_unfinished_work(path):
    if path != Path(__file__):
        assert not re.search(r"\b(TODO|FIXME|XXX|HACK)\b", path.read_text())


def test_importing_regard_imports_nothing_optional():
    """A fresh process in which every optional package is missing still computes."""
    code = """
import sys
for name in ('transformers', 'safetensors', 'triton', 'selenium', 'onnx', 'onnxscript'):
    sys.modules[name] = None  # as if it were not installed
import torch, regard
x = torch.randn(4, 2)
A = regard.attention(x, x)
assert torch.allclose(A @ x, A.matmul(x, form='dense'), atol=1e-6)
try:
    regard.look('some text')
except regard.MissingPackageError as error:
    assert 'pip install "regard[look]"' in str(error), error
else:
    raise AssertionError('no error')
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def snippets():
    text = (ROOT / "README.md").read_text()
    return re.findall(r"```python\n(.*?)```", text, flags=re.S)


@pytest.mark.parametrize("code", snippets(), ids=lambda code: code.split("\n")[0])
def test_snippets_of_the_readme_run(code):
    if "transformers" in code:
        pytest.importorskip("transformers", reason="the package transformers is not installed")
    exec(compile(code, "README.md", "exec"), {})


@pytest.mark.parametrize("path", sorted((ROOT / "docs").glob("*.md")), ids=name_of)
def test_pages_run_from_top_to_bottom_and_show_what_exists(path):
    text, names = path.read_text(), {}
    for code in re.findall(r"```python\n(.*?)```", text, flags=re.S):
        exec(compile(code, str(path), "exec"), names)
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
        assert (path.parent / target).exists(), target


def test_the_readme_shows_code_early_and_stays_short():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert lines.index("```python") < 12
    assert len(lines) <= 170
