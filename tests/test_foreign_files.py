"""Files that regard did not write, or that were changed: an error that says so, and nothing run."""

import json

import pytest
import torch

import regard
from regard import Alibi, Causal, Dropout
from regard.interchange import FileError

safetensors = pytest.importorskip(
    "safetensors.torch", reason="the package safetensors is not installed"
)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "it.safetensors"


def write(path, structure, tensors=None, **metadata):
    metadata = {"format": "regard", "version": "1"} | metadata
    if not isinstance(structure, str):
        structure = json.dumps(structure)
    tensors = {"slopes": torch.ones(2)} if tensors is None else tensors
    safetensors.save_file(tensors, path, metadata=metadata | {"structure": structure})


def part(name, **fields):
    return {"part": name, "fields": fields}


SLOPES = {"tensor": "slopes"}


@pytest.mark.parametrize(
    ("structure", "words"),
    [
        (part("Alibii", slopes=SLOPES), "names a part Alibii, which this regard does not have"),
        (part("Custom", function="print"), "names a part Custom"),
        (part("Part"), "names a part Part"),
        (part("Alibi", slopes={"tensor": "other"}), "is no tensor of the file"),
        (part("Alibi", slopes=SLOPES, steep=1), "has a field steep"),
        (part("Alibi", slopes=3), "has 3 as slopes"),
        (part("Alibi"), "missing 1 required positional argument"),
        (part("Alibi", slopes=SLOPES, offset=True), "has True as offset"),
        (part("Alibi", slopes=SLOPES, offset=1.5), "has 1.5 as offset"),
        (part("Window", left=-1, right=0), "Window's left must be at least 0"),
        (part("Positions", parts=[1, 2]), r"has \(1, 2\) as parts"),
        (part("And", one=part("Causal"), other=None), "has None as other"),
        (part("Features", map={"function": "os.system"}), "is no tensor of the file, function"),
        (part("Features", map="os.system"), "has 'os.system' as map"),
        (part("Alibi", slopes=SLOPES | {"shape": [2, -1]}), "which is none"),
        (part("Alibi", slopes=SLOPES | {"shape": "2"}), "which is none"),
        (part("Alibi", slopes=SLOPES | {"shape": [3]}), "must match the existing size"),
        (part("Attention", query=SLOPES), "missing 1 required positional argument"),
        (part("Attention", query=SLOPES, key=SLOPES, mode=1), "unexpected keyword argument 'mode'"),
        (part("Attention", query=SLOPES, key=SLOPES), r"query has shape \(2,\)"),
        ({"eval": "print()"}, "is no tensor of the file"),
        ("{", "no readable structure"),
        ("[" * 100_000 + "]" * 100_000, "no readable structure|does not accept"),
        ("9" * 5000, "no readable structure"),
    ],
)
def test_files_that_are_not_regards_say_so(structure, words, path):
    write(path, structure)
    with pytest.raises(FileError, match=words):
        regard.load(path)


def test_foreign_and_broken_files(path):
    safetensors.save_file({"query": torch.ones(2), "key": torch.ones(2)}, path)
    with pytest.raises(
        FileError, match=r"was not written by regard: it has tensors \(key, query\)"
    ):
        regard.load(path)
    for version, words in (("2", "reads versions up to 1"), ("new", "which is no number")):
        write(path, part("Causal"), version=version)
        with pytest.raises(FileError, match=words):
            regard.load(path)
    Alibi(torch.ones(1000)).save(path)
    whole = path.read_bytes()
    for length in (0, 4, 100, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(FileError, match="is not a whole safetensors file"):
            regard.load(path)
    torch.save({"slopes": torch.ones(2)}, path)  # a pickle is not read, let alone run
    with pytest.raises(FileError, match="is not a whole safetensors file"):
        regard.load(path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        regard.load(path.parent / "other")
    with pytest.raises(FileNotFoundError, match="is a directory"):
        regard.load(path.parent)
    with pytest.raises(FileNotFoundError):
        Causal().save(path.parent / "no" / "such")


@pytest.mark.parametrize(
    ("change", "to"),
    [("stop", [9, 3, 3]), ("start", [-1, 0, 0]), ("start", [2, 2, 2]), ("offsets", [0, 1, 2, 9]),
     ("offsets", [0, 2, 1, 3]), ("offsets", [0, 3]), ("offsets", [0, 2, 3, 3])],
)  # fmt: skip
def test_runs_that_kernels_could_not_trust_are_refused(change, to, path):
    A = regard.attention(torch.randn(1, 3, 2), torch.randn(1, 3, 2), mask=Causal())[0]
    A.save(path)
    with safetensors.safe_open(path, framework="pt") as archive:
        structure = archive.metadata()["structure"]
    tensors = safetensors.load_file(path)
    name = f"mask.compiled.{change}"
    write(path, structure, tensors | {name: torch.tensor(to, dtype=tensors[name].dtype)})
    with pytest.raises(FileError, match="runs of visible keys"):
        regard.load(path)


def test_lanes_of_another_shape_are_refused(path):
    A = regard.attention(torch.randn(2, 3, 2), torch.randn(2, 3, 2), dropout=Dropout(0.5, seed=1))
    A[0].save(path)
    with safetensors.safe_open(path, framework="pt") as archive:
        structure = archive.metadata()["structure"]
    write(path, structure, safetensors.load_file(path) | {"lanes": torch.zeros(3)})
    with pytest.raises(FileError, match=r"lanes must be whole numbers of shape \(\)"):
        regard.load(path)
