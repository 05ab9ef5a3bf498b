"""ONNX graphs give the numbers of the definition, in onnxruntime and in onnx's own evaluator."""

from collections import Counter
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import regard
from regard import (
    Additive,
    Alibi,
    Bias,
    Causal,
    Dot,
    Dropout,
    Features,
    FormError,
    Mask,
    Padding,
    Prefix,
    Rotary,
    Softmax,
    Window,
)
from regard.neighborhood import Neighborhood
from regard.nn import MultiHeadAttention, SelfAttention
from regard.position import Shaw
from tests.laws import MASKS, NORMALIZERS, POSITIONS, SCORES, Draw, Sizes

ort, reference = (
    pytest.importorskip(name, reason=f"the package {name.partition('.')[0]} is not installed")
    for name in ("onnxruntime", "onnx.reference")
)
pytest.importorskip("onnxscript", reason="the package onnxscript is not installed")
import regard.onnx  # noqa: E402, after the packages it needs
from regard.onnx import decompositions, export  # noqa: E402

SIZES, SQUARE = Sizes(2, 4, 2, 6, 7, 8, 3), Sizes(2, 4, 2, 6, 6, 8, 3)
EPS = torch.finfo(torch.float32).eps
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


class Products(nn.Module):
    """Products of matrices of one query and key, one output for each list of parts."""

    def __init__(self, all_parts):
        super().__init__()
        self.all_parts = all_parts

    def forward(self, query, key, value):
        found = [regard.attention(query, key, **parts) @ value for parts in self.all_parts]
        return tuple(found)


def operands(s=SIZES, dtype=torch.float32):
    draw = Draw(5, dtype)
    shapes = [
        (s.heads, s.n, s.width),
        (s.key_heads, s.m, s.width),
        (s.key_heads, s.m, s.value_width),
    ]
    return tuple(draw.normal(s.batch, *shape).detach() for shape in shapes)


def run(program, inputs):
    """Outputs in onnxruntime."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(program.model_proto.SerializeToString(), options)
    named = {i.name: x.detach().numpy() for i, x in zip(session.get_inputs(), inputs, strict=True)}
    return [torch.from_numpy(output) for output in session.run(None, named)]


def nodes(program):
    return Counter(node.op_type for node in program.model.graph)


def assert_within_dense(found, parts, inputs, name):
    """The error against float64 is at most twice that of dense, and one rounding of the output."""

    def dense(dtype):
        query, key, value = (x.to(dtype) for x in inputs)
        made = {kind: make(dtype) for kind, make in parts.items()}
        return regard.attention(query, key, **made).matmul(value, form="dense").detach().double()

    exact = dense(torch.float64)
    own, error = (float((x - exact).norm()) for x in (dense(torch.float32), found.double()))
    assert error <= 2 * own + EPS * float(exact.norm()), name


def parts_of(table, kind, names):
    for name in names:
        yield name, {kind: lambda dtype, make=table[name]: make(Draw(1, dtype), SIZES)}


REFUSED = [name for name in SCORES if name.startswith("features") and name not in (
    "features", "features learned", "features random"
)]  # fmt: skip
TABLES = {
    "score": (SCORES, [name for name in SCORES if name not in ("own function", *REFUSED)]),
    "position": (POSITIONS, list(POSITIONS)),
    "mask": (MASKS, list(MASKS)),
    "normalizer": (NORMALIZERS, list(NORMALIZERS)),
}


@pytest.mark.parametrize("kind", TABLES)
def test_every_part_in_one_graph(kind):
    table, names = TABLES[kind]
    cases = list(parts_of(table, kind, names))
    module = Products([{k: make(torch.float32) for k, make in parts.items()} for _, parts in cases])
    program = export(module, operands())
    for (name, parts), output in zip(cases, run(program, operands()), strict=True):
        assert_within_dense(output, parts, operands(), name)
    wanted = {
        "score": 4,  # two dot products, bilinear, cosine
        "position": len(names),
        "mask": len(names),
        "normalizer": 1,
    }
    assert nodes(program)["Attention"] == wanted[kind]


def attributes(program):
    (node,) = (node for node in program.model.graph if node.op_type == "Attention")
    given = {name: attribute.value for name, attribute in node.attributes.items()}
    return given, [None if x is None else list(x.shape) for x in node.inputs]


LAYERS = {
    "grouped, causal": (lambda: SelfAttention(16, 4, num_kv_heads=2), {"mask": Causal()}),
    "alibi, window": (
        lambda: SelfAttention(16, 4, position=Alibi.of(4)),
        {"mask": Causal() & Window(3, 0)},
    ),
    "rotary, prefix": (
        lambda: SelfAttention(16, 4, position=Rotary.of(4), score=Dot(softcap=2.0)),
        {"mask": Causal() | Prefix(2)},
    ),
    "shaw": (lambda: SelfAttention(16, 4, position=Shaw.of(4, 2, 1, values=False)), {}),
    "additive, sinks": (
        lambda: SelfAttention(
            16, 4, score=Additive.of(4, 4), normalizer=Softmax(sink=torch.ones(4).requires_grad_())
        ),
        {},
    ),
    "weights": (lambda: MultiHeadAttention(16, 4, batch_first=True), {"is_causal": True}),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_for_any_length(name, tmp_path):
    torch.manual_seed(0)
    layer, arguments = LAYERS[name][0]().eval(), LAYERS[name][1]
    path = tmp_path / "layer.onnx"
    axes = ({0: "batch", 1: "length"},)
    program = export(layer, (torch.randn(2, 7, 16),), path, kwargs=arguments, axes=axes)
    assert path.stat().st_size > 0
    for batch, length in ((3, 12), (1, 1)):
        x = torch.randn(batch, length, 16)
        wanted = [y.detach() for y in layer(x, **arguments) if isinstance(y, torch.Tensor)]
        for found, right in zip(run(program, (x,)), wanted, strict=True):
            # Both are in float32: four roundings of numbers of the outputs' size, in every layer
            # of products (three projections, two products, a softmax).
            assert torch.allclose(found, right, rtol=0, atol=24 * EPS * float(right.abs().max()))
    if name == "grouped, causal":
        given, shapes = attributes(program)
        assert given == {"is_causal": 1, "scale": 0.5}
        assert [shape[1] for shape in shapes[:3]] == [4, 2, 2]
        assert len(shapes) == 3  # and nothing of n x m


def test_attributes_and_the_reference_evaluator():
    query, key, value = operands()
    module = Products([{"score": Dot(scale=0.25, softcap=1.5)}])
    program = export(module, (query, key, value))
    given, _ = attributes(program)
    assert given == {"scale": 0.25, "softcap": 1.5, "is_causal": 0}
    evaluator = reference.ReferenceEvaluator(program.model_proto)
    names = [i.name for i in program.model_proto.graph.input]
    found = evaluator.run(None, dict(zip(names, (x.numpy() for x in operands()), strict=True)))[0]
    parts = {"score": lambda dtype: Dot(scale=0.25, softcap=1.5)}
    assert_within_dense(torch.from_numpy(found), parts, operands(), "reference")


ODD = {
    "a negative scale": {"score": lambda dtype: Dot(scale=-0.5)},
    "a softcap under a mask": {
        "score": lambda dtype: Dot(scale=4.0, softcap=0.5), "mask": lambda dtype: Causal(),
    },
    "causal beside a bias": {
        "position": lambda dtype: Bias(torch.linspace(-1, 1, 6, dtype=dtype)[None]),
        "mask": lambda dtype: Causal(-1),
    },
    "rows without keys": {
        "position": lambda dtype: Bias(torch.full((6, 1), -torch.inf, dtype=dtype)),
    },
    "padding alone": {"mask": lambda dtype: Padding(torch.arange(6) < 4)},
    "neighborhood": {
        "mask": lambda dtype: Neighborhood((2, 3), (1, 2), dilation=(2, 1), causal=(True, False)),
    },
}  # fmt: skip


def test_half_precision_is_computed_in_float32():
    x = operands(SQUARE, torch.float16)
    program = export(Products([{"mask": Causal()}]), x)
    (found,) = run(program, x)
    exact = regard.attention(*(t.double() for t in x[:2]), mask=Causal()) @ x[2].double()
    assert found.dtype == torch.float16
    # One rounding of the output; those of float32 before it are 2^13 times smaller.
    half = torch.finfo(torch.float16).eps / 2
    assert float(((found.double() - exact) / exact).abs().max()) <= half * 1.01


def test_what_runtimes_disagree_about():
    module = Products([{k: make(torch.float32) for k, make in p.items()} for p in ODD.values()])
    program = export(module, operands(SQUARE))
    for (name, parts), output in zip(ODD.items(), run(program, operands(SQUARE)), strict=True):
        assert_within_dense(output, parts, operands(SQUARE), name)
    # The softcap under a mask is spelled out: older runtimes cap the mask with the scores.
    assert nodes(program)["Attention"] == len(ODD) - 1


def test_shapes_without_batch_and_with_more():
    class Shapes(nn.Module):
        def forward(self, x, y):
            A = regard.attention(x[0, 0], x[0, 0], mask=Causal())
            B = regard.attention(y, x[:, None, :1], mask=Window(1, 1))
            return A @ x[0, 0], B @ x[:, None, :1], B.mT @ y, A.mT @ x[0, 0]

    x, y = torch.randn(2, 3, 5, 4), torch.randn(1, 3, 6, 5, 4)
    found = run(export(Shapes(), (x, y)), (x, y))
    for output, right in zip(found, Shapes()(x, y), strict=True):
        assert output.shape == right.shape
        assert torch.allclose(output, right, rtol=0, atol=24 * EPS * float(right.abs().max()))


@dataclass(frozen=True, repr=False)
class Odd(Mask):
    """A mask of one's own."""

    def __repr__(self):
        return "Odd()"


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"dropout": Dropout(0.5)}, r"no dropout, which is for training; call model.eval\(\)"),
        (
            {"score": lambda q, k, i, j: q @ k.mT},
            "'attention' of these arguments looks at .* or has a function",
        ),
        ({"score": Features(log_decay=-0.1)}, "no decay and no delta rule"),
        ({"mask": Odd() & Causal()}, r"the mask Odd\(\) has no formula for an ONNX graph"),
    ],
)
def test_refusals_say_why(parts, words):
    query, key, value = operands()
    with pytest.raises(FormError, match=words):
        export(Products([parts]), (query, key, value))


def test_refusals_of_the_exporter():
    query, key, value = operands()
    with pytest.raises(ValueError, match="opset 22 has no operator Attention; 23 is the first"):
        export(Products([{}]), (query, key, value), opset_version=22)
    with pytest.raises(regard.ShapeError, match="'n' may vary, but its example has length 1"):
        export(SelfAttention(4, 1), (torch.ones(1, 3, 4),), axes=({0: "n"},))
    with pytest.raises(FormError, match="form 'fused' was asked for, but an ONNX graph"):
        regard.onnx.product(regard.attention(query, key), value, form="fused")


def test_a_look_is_no_part_of_a_graph():
    layer = SelfAttention(8, 2, position=Shaw.of(4, 1, 1))  # its values are looked up by offset
    with pytest.raises(FormError, match="holds products of regard's own parts; 'offsets'"):
        export(layer.eval(), (torch.randn(1, 3, 8),))


def test_a_trace_is_refused_instead_of_recording_numbers(tmp_path):
    x = torch.randn(1, 2, 5, 4)
    with pytest.raises(FormError, match="would record a product of regard as a constant"):
        torch.jit.trace(lambda x: regard.attention(x, x) @ x, x)
    with pytest.raises(FormError, match=r"torch.onnx.export with dynamo=False"):
        torch.onnx.export(Products([{}]), (x, x, x), tmp_path / "old.onnx", dynamo=False)
    traced = torch.jit.trace(lambda x: regard.attention(x, x).matmul(x, form="dense"), x)
    other = torch.randn(1, 2, 5, 4)
    right = regard.attention(other, other) @ other
    assert torch.allclose(traced(other), right, rtol=0, atol=24 * EPS * float(right.abs().max()))


def test_torchs_own_call_and_exported_programs():
    """`torch.onnx.export` alone, and programs that hold `regard::product`."""
    layer = nn.Sequential(nn.Linear(8, 8), MultiHeadAttention(8, 2, batch_first=True)).eval()

    class Output(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return self.layer(x)[0]

    x = torch.randn(2, 5, 8)
    right = Output()(x).detach()
    program = torch.export.export(Output(), (x,)).run_decompositions(decompositions())
    direct = torch.onnx.export(Output(), (x,), dynamo=True, opset_version=23, verbose=False)
    lowered = torch.onnx.export(program, dynamo=True, opset_version=24, verbose=False)
    for made in (direct, lowered):
        assert torch.allclose(run(made, (x,))[0], right, rtol=0, atol=24 * EPS)
        assert nodes(made)["Attention"] >= 1
