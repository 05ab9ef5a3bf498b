"""Matrices and parts through files: bit by bit the same, and nothing that a file could run."""

import importlib
import json
import pkgutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import regard
from regard import (
    Alibi,
    Bias,
    Bilinear,
    Causal,
    Dense,
    Documents,
    Dot,
    Dropout,
    Features,
    Mask,
    Padding,
    Position,
    Window,
)
from regard.feature_map import Hedgehog
from regard.interchange import FileError
from regard.interchange.names import kinds
from regard.neighborhood import Neighborhood
from regard.part import Part
from tests.laws import MASKS, NORMALIZERS, POSITIONS, SCORES, Case, Draw, Sizes

safetensors = pytest.importorskip(
    "safetensors.torch", reason="the package safetensors is not installed"
)

SIZES = Sizes(2, 4, 2, 5, 6, 8, 3)
# Of which laws.py has no line: they are tested against others, or made by the library alone.
MORE = {
    "neighborhood": lambda draw, s: Neighborhood((2, 3), (1, 3), causal=(True, False)),
    "hedgehog": lambda draw, s: Features(Hedgehog(draw.normal(s.width, 4))),
    "dropout": lambda draw, s: Dropout(0.3, seed=2**62 + 1),
    "dropout of a graph": lambda draw, s: Dropout(0.3, seed=torch.tensor(7)),
    "rule": lambda draw, s: Case("dot", "alibi", "none", "sinks", s, 0).build(draw.dtype)[0].rule,
    "runs": lambda draw, s: (
        Case("dot", "none", "dense", "softmax", s, 0).build(draw.dtype)[0][0].mask
    ),
}
PARTS = {
    f"{kind} {name}": make
    for kind, table in (
        ("score", SCORES),
        ("position", POSITIONS),
        ("mask", MASKS),
        ("normalizer", NORMALIZERS),
        ("more", MORE),
    )
    for name, make in table.items()
    if name not in ("own function", "none")
}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "it.safetensors"


def same(one, other):
    """Alike in all: classes, numbers, dtypes, gradients; tensors bit by bit."""
    if isinstance(one, torch.Tensor):
        assert (one.dtype, one.shape, one.requires_grad) == (
            other.dtype, other.shape, other.requires_grad,
        )  # fmt: skip
        bits = [x.detach().flatten().contiguous().view(torch.uint8) for x in (one, other)]
        assert torch.equal(*bits)
    elif isinstance(one, tuple):
        assert len(one) == len(other)
        for pair in zip(one, other, strict=True):
            same(*pair)
    elif hasattr(one, "__dataclass_fields__"):
        assert type(one) is type(other)
        for name in one.__dataclass_fields__:
            same(getattr(one, name), getattr(other, name))
    else:
        assert type(one) is type(other)
        assert one == other


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
@pytest.mark.parametrize("name", PARTS)
def test_every_part_comes_back(name, dtype, path):
    part = PARTS[name](Draw(0, dtype), SIZES)
    part.save(path)
    found = regard.load(path)
    same(part, found)
    assert repr(found) == repr(part)
    assert not list(path.parent.glob(".*"))


def below(kind):
    return {kind} | {each for sub in kind.__subclasses__() for each in below(sub)}


def met(item):
    """The classes of a part and of all that it holds."""
    if isinstance(item, tuple):
        return set().union(*map(met, item))
    if not hasattr(item, "__dataclass_fields__"):
        return set()
    held = (getattr(item, name) for name in item.__dataclass_fields__)
    return {type(item)}.union(*map(met, held))


def test_no_part_of_the_library_is_forgotten():
    for module in pkgutil.walk_packages(regard.__path__, "regard."):
        if not module.name.startswith(("regard.hf", "regard.__main__", "regard.kernel._cpu")):
            importlib.import_module(module.name)
    parts = {
        kind
        for kind in below(Part)
        if kind.__module__.startswith("regard.")
        and not kind.__module__.startswith("regard.hf")
        and "__dataclass_fields__" in vars(kind)
        and not kind.__name__.startswith("_")
    }
    covered = set().union(*(met(make(Draw(0, torch.float64), SIZES)) for make in PARTS.values()))
    assert {kind.__name__ for kind in parts - covered} == {"Custom"}
    assert covered <= set(kinds().values())


@pytest.mark.parametrize("seed", range(3))  # with and without dropout, and expanded axes
@pytest.mark.parametrize(
    "names",
    [("dot", "alibi", "causal padded", "sinks"), ("leaky_relu", "t5", "dense", "relu mean"),
     ("features erase", "none", "none", "identity"),
     ("position only", "shift", "prefix", "softmax")],
    ids=" ".join,
)  # fmt: skip
def test_a_matrix_comes_back(names, seed, path):
    A, value = Case(*names, SIZES, seed).build(torch.float32)
    A.save(path)
    B = regard.load(path)
    assert repr(A) == repr(B)
    same((A.query, A.key, A.rule, A.mask, A.dropout), (B.query, B.key, B.rule, B.mask, B.dropout))
    assert torch.equal(A @ value, B @ value)
    one = A[0, 1]  # one head: its runs, and the lane that its dropout depends on
    one.save(path)
    head = regard.load(path)
    assert torch.equal(one.dense(), head.dense())
    assert torch.equal(one.lanes, head.lanes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_odd_numbers_keep_their_bits(dtype, path):
    strange = torch.tensor([torch.inf, -torch.inf, torch.nan, -0.0, 1e-40], dtype=dtype)
    part = Bias(strange.expand(3, 5)) + Bias(strange[:, None])
    part.save(path)
    same(regard.load(path), part)
    for scale in (torch.inf, -torch.inf, 5e-324, 1 / 3, -0.0):
        Dot(scale=scale).save(path)
        assert str(regard.load(path).scale) == str(scale)
    Dot(scale=torch.nan).save(path)
    assert str(regard.load(path).scale) == "nan"


def test_views_are_saved_as_what_they_show_and_expanded_ones_stay_small(path):
    whole = torch.randn(3, 1, 4, 6, 8)
    query, key = whole[0].expand(1000, 4, 6, 8), whole[1].mT.contiguous().mT
    A = regard.attention(query, key, mask=Dense(torch.rand(6, 1) < 0.5))
    A.save(path)
    assert path.stat().st_size < 8 * whole.nbytes
    B = regard.load(path)
    assert B.query.stride(0) == 0
    assert torch.equal(A[7].dense(), B[7].dense())


def test_one_tensor_in_two_places_stays_one(path):
    x = torch.randn(5, 4, requires_grad=True)
    A = regard.attention(x, x, score=Bilinear(x[:4]), position=Bias(x @ x.mT))
    A.save(path)
    assert set(safetensors.load_file(path)) == {"query", "score.weight", "position.bias"}
    B = regard.load(path)
    assert B.query is B.key
    (gradient,) = torch.autograd.grad(B.matmul(x.detach()).sum(), B.query)
    assert gradient.shape == x.shape
    assert B.position.bias.is_leaf


def test_a_matrix_is_saved_over_the_file_it_was_read_from(path):
    regard.attention(torch.randn(64, 32), torch.randn(64, 32)).save(path)
    A = regard.load(path)
    wanted = A.query.clone()
    A.save(path)
    assert torch.equal(regard.load(path).query, wanted)
    assert torch.equal(A.query, wanted)


def test_a_file_tells_other_programs_what_it_holds(path):
    A = regard.attention(torch.randn(2, 5, 4), torch.randn(2, 5, 4), position=Alibi.of(2))
    A.save(path)
    with safetensors.safe_open(path, framework="pt") as archive:
        assert set(archive.keys()) == {"query", "key", "position.slopes"}
        metadata = archive.metadata()
    assert metadata["version"] == "1"
    assert json.loads(metadata["structure"])["fields"]["score"]["part"] == "Dot"


@dataclass(frozen=True, repr=False)
class Odd(Mask):
    """A mask of one's own, which sees odd keys."""

    def runs(self, rows, columns, device):
        return Dense((torch.arange(columns) % 2 == 1)[None]).runs(rows, columns, device)

    def __repr__(self):
        return "Odd()"


@dataclass(frozen=True)
class Mine(Position):
    """A position of one's own."""


def test_a_mask_of_ones_own_is_saved_as_its_runs(path):
    x = torch.randn(7, 4)
    for mask in (Odd(), Odd() & Causal()):
        A = regard.attention(x, x, mask=mask)
        A.save(path)
        B = regard.load(path)
        assert torch.equal(A.dense(), B.dense())
        assert repr(B) == repr(A)


def test_a_matrix_of_a_hugging_face_model_is_saved_for_a_process_without_it(path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    importlib.import_module("regard.hf")
    config = transformers.GPT2Config(
        n_layer=1, n_head=2, n_embd=8, vocab_size=20, attn_implementation="regard"
    )
    tokens = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 0]])
    real = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    model = transformers.GPT2Model(config).eval()
    A = model(tokens, attention_mask=real, output_attentions=True).attentions[0]
    A.save(path)
    numbers = path.with_suffix(".pt")
    torch.save(A.dense().detach(), numbers)
    code = f"""
import sys, torch
sys.modules["transformers"] = None
import regard
found = regard.load({str(path)!r}).dense()
assert torch.equal(found, torch.load({str(numbers)!r}))
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent)


def test_what_is_code_is_refused(path):
    x = torch.randn(5, 4)

    def laplace(query, key, i, j):
        return -torch.cdist(query, key, p=1)

    own = regard.attention(x, x, score=laplace)
    for item, named in (
        (own, "the score function laplace is code"),
        (Features(lambda x: x), "<lambda>, a map or value of your own"),
        (Features(torch.nn.Linear(4, 4)), "Linear(in_features=4"),
        (Odd(), "Odd(), a part of your own"),
        (Alibi.of(2) + Mine(), "a part of your own"),
    ):
        with pytest.raises(FileError, match=r"cannot hold it. What works: save query") as told:
            item.save(path)
        assert named in str(told.value)
    with pytest.raises(FileError, match="without numbers of its own"):
        Bias(torch.empty(2, 2, device="meta")).save(path)
    assert not list(path.parent.iterdir())


def test_without_safetensors_the_error_says_how_to_install_it():
    code = """
import sys
sys.modules["safetensors"] = None  # as if it were not installed
import regard
for call in (lambda: regard.Causal().save("x"), lambda: regard.load("x")):
    try:
        call()
    except regard.MissingPackageError as error:
        assert 'pip install "regard[save]"' in str(error), error
    else:
        raise AssertionError("no error")
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent)


def test_a_part_with_gradients_goes_on_learning_in_a_layer(path):
    position = Alibi(torch.rand(2).requires_grad_())
    position.save(path)
    layer = regard.nn.SelfAttention(8, 2, position=regard.load(path))
    assert any(torch.equal(p, position.slopes) for p in layer.parameters())


def test_masks_of_packed_batches_keep_their_batch(path):
    mask = Documents(torch.tensor([[0, 0, 1]])) | (
        Padding(torch.ones(2, 3, dtype=torch.bool)) & Window(1, None)
    )
    mask.save(path)
    same(regard.load(path), mask)
