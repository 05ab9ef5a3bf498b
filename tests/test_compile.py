"""torch.compile and torch.export: products are one operator of the graph, the rest breaks it."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from importlib import import_module

import pytest
import torch

from regard import (
    T5,
    Additive,
    Alibi,
    Bias,
    Bilinear,
    Causal,
    Cosine,
    Distance,
    Documents,
    Dot,
    Dropout,
    FormError,
    Padding,
    PositionOnly,
    Prefix,
    Relu,
    Rotary,
    ShapeError,
    Sigmoid,
    Softmax,
    Window,
    attention,
)
from regard.kernel import extension
from regard.mask import Mask

if extension.load() is None:  # the header of the run says so
    pytest.skip(extension.missing(), allow_module_level=True)

HEADS, LENGTH, WIDTH = 4, 12, 8
RANDOM = torch.Generator().manual_seed(0)


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=RANDOM, dtype=dtype).requires_grad_()


def operands(length=LENGTH, dtype=torch.float32, batch=2):
    """Query with four heads, key and value with two."""
    return [normal(batch, h, length, w, dtype=dtype) for h, w in ((HEADS, 8), (2, 8), (2, 5))]


def compare(function, inputs, learned=(), compiled=None):
    """One graph gives bit by bit what no graph gives: outputs, and gradients of every tensor."""
    if compiled is None:
        torch.compiler.reset()
        compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    results = []
    for run in (function, compiled):
        output = run(*inputs)
        above = torch.ones_like(output) + torch.arange(output.shape[-1])
        leaves = [tensor for tensor in (*inputs, *learned) if tensor.requires_grad]
        results.append([output, *torch.autograd.grad(output, leaves, above)])
    same(*results)
    return results[1]


def same(results, others):
    for one, other in zip(results, others, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


IDS = torch.tensor([[0] * 5 + [1] * 7, [3] * 9 + [0] * 3])
REAL = torch.arange(LENGTH) < torch.tensor([[12], [7]])
GROUPS = {
    "scores": [
        {},
        {"score": Dot(scale=0.3)},
        {"score": Dot(scale=normal(HEADS))},
        {"score": Dot(softcap=3.0)},
        {"score": Bilinear(normal(WIDTH, WIDTH))},
        {"score": Cosine(scale=5.0)},
        {"score": Distance()},
        {"score": Additive(normal(HEADS, WIDTH))},
        {"score": Additive(normal(HEADS, WIDTH), activation="leaky_relu")},
    ],
    "positions and normalizers": [
        {"position": Alibi(normal(HEADS))},
        {"position": Alibi(normal(HEADS)), "score": PositionOnly()},
        {"position": Bias(normal(HEADS, LENGTH, LENGTH))},
        {"position": Rotary.of(WIDTH) + T5(normal(HEADS, 32)) + Bias(normal(LENGTH, LENGTH))},
        {"normalizer": Softmax(sink=normal(HEADS))},
        {"normalizer": Sigmoid(bias=-2.0)},
        {"normalizer": Relu(mean=True)},
        {"dropout": Dropout(0.3, seed=5)},
    ],
    "masks of numbers": [
        {"mask": mask}
        for mask in (
            Causal(1),
            Window(2, None),
            Causal() & Window(2, 0),
            Causal() | Prefix(3),
            ~Window(1, 1),
        )
    ],
    "masks of tensors": [
        {"mask": mask}
        for mask in (
            Causal() | Prefix(torch.tensor([3, 5])),
            Causal() & Documents(IDS),
            Causal() & Padding(REAL),
            torch.rand(LENGTH, LENGTH, generator=RANDOM) < 0.5,
        )
    ],
}


@pytest.mark.parametrize("name", GROUPS)
def test_one_graph_gives_the_same_numbers_and_gradients(name):
    """Of several products with operands of their own."""
    group = GROUPS[name]
    learned = [
        tensor
        for parts in group
        for part in parts.values()
        for tensor in (() if isinstance(part, torch.Tensor) else part.tensors())
        if tensor.requires_grad
    ]

    def function(*inputs):
        return torch.stack(
            [
                attention(2 * inputs[3 * k], inputs[3 * k + 1], **parts) @ inputs[3 * k + 2]
                for k, parts in enumerate(group)
            ]
        )

    compare(function, [x for _ in group for x in operands()], learned)


def test_parts_made_inside_the_graph_in_half_precision():
    def function(query, key, value, slopes, weight):
        A = attention(
            query, key, score=Additive(weight), position=Alibi(slopes), mask=Causal() | Prefix(2)
        )
        return A @ value

    compare(function, [*operands(dtype=torch.bfloat16), normal(HEADS), normal(HEADS, WIDTH)])


def test_transposes_and_what_keys_receive():
    x = normal(2, HEADS, 7, 3)
    compare(lambda x: attention(x, x, mask=Causal()).mT @ x, [x])
    compare(lambda x: attention(x, x, mask=Causal()).received(), [x])


def test_values_with_axes_of_their_own_and_views():
    compare(lambda x: attention(x[0], x[0]) @ x, [normal(3, 2, 4, 6, 5)])
    compare(lambda x: attention(x.mT, x.mT) @ x.mT, [normal(2, 6, 5)])
    x = normal(2, HEADS, 6, 5)
    A = attention(x, x, position=Alibi.of(HEADS), mask=Causal(), dropout=Dropout(0.5, seed=1))
    compare(lambda value: A @ value, [normal(2, HEADS, 6, 5)])


@pytest.mark.parametrize("lengths", [(0, 5), (5, 0), (1, 1)], ids=str)
def test_empty_lengths(lengths):
    (n, m), sink = lengths, normal(2)

    def function(query, key, value):
        A = attention(query, key, position=Alibi.of(2), mask=Causal(), normalizer=Softmax(sink))
        return A @ value

    compare(function, [normal(2, n, 3), normal(2, m, 3), normal(2, m, 4)], [sink])


def test_few_queries_read_a_shared_cache_once():
    compare(lambda q, k, v: attention(q[:, :, :1], k) @ v, operands())


def test_lengths_that_change_compile_no_more_graphs():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    def function(query, key, value):
        before = key.shape[-2] - query.shape[-2]
        A = attention(query, key, position=Alibi.of(HEADS, before), mask=Causal(before))
        return A @ value

    compiled = torch.compile(function, backend=backend, fullgraph=True, dynamic=True)
    for n, m in ((10, 12), (20, 30), (50, 51), (7, 40)):
        query, key, value = normal(3, HEADS, n, 8), normal(3, 2, m, 8), normal(3, 2, m, 5)
        assert torch.equal(compiled(query, key, value), function(query, key, value))
    assert len(graphs) == 1
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=True)
    for length in (9, 14):
        compare(function, operands(length), compiled=compiled)


def test_masked_nans_stay_out_of_a_trained_product():
    query, key, value = operands()
    with torch.no_grad():
        key[:, :, 5], value[0, 0, 7, 0], query[1, 1, 2] = torch.nan, torch.inf, torch.nan
    output, *_ = compare(lambda q, k, v: attention(q, k, mask=Causal()) @ v, [query, key, value])
    assert output[0, 0, 4].isfinite().all()
    assert output[0, 0, 5].isnan().all()
    compare(lambda q, k: attention(q, k, mask=Causal()).mT @ q, [query, key])


def test_dropout_drawn_in_a_graph_is_new_each_time_and_the_same_backward():
    def function(x):
        return attention(x, x, dropout=Dropout(0.5)).matmul(torch.eye(x.shape[-2]))

    x = normal(3, LENGTH, 4)
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    torch.manual_seed(7)
    wanted = function(x)
    torch.manual_seed(7)
    found, another = compiled(x), compiled(x)
    assert torch.equal(found, wanted)
    assert not torch.equal(found, another)
    gradients = [torch.autograd.grad(y.square().sum(), x)[0] for y in (found, wanted)]
    assert torch.equal(*gradients)


def test_a_graph_runs_the_form_that_runs_without_it():
    """Position alone over a long sequence is a recurrence, in a graph too."""
    slopes = (torch.rand(HEADS, 1, generator=RANDOM)[:, 0] + 0.1).requires_grad_()
    value = normal(1, HEADS, 1100, 3)
    tokens = torch.zeros(1, HEADS, 1100, 0)

    def function(value):
        parts = {"score": PositionOnly(), "position": Alibi(slopes), "mask": Causal()}
        return attention(tokens, tokens, **parts) @ value

    matrix = attention(tokens, tokens, score=PositionOnly(), position=Alibi(slopes), mask=Causal())
    assert matrix.explain(value).form == "recurrent"
    compare(function, [value], learned=[slopes])


@pytest.mark.skipif(not shutil.which("g++"), reason="inductor needs a C++ compiler, g++")
def test_inductor():
    slopes = normal(HEADS)

    def function(query, key, value):
        A = attention(query.cos(), key, position=Alibi(slopes), mask=Causal())
        return (A @ value).sin()

    compiled = torch.compile(function, backend="inductor", fullgraph=True)
    inputs = operands()
    results = []
    for run in (function, compiled):
        output = run(*inputs)
        results.append([output, *torch.autograd.grad(output.sum(), [*inputs, slopes])])
    for one, other in zip(*results, strict=True):  # its sine is not torch's
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-5)


@dataclass(frozen=True, repr=False)
class Own(Mask):
    """A user's own mask, for which a graph has no words."""

    offset: int

    def runs(self, rows, columns, device):
        return Causal(self.offset).runs(rows, columns, device)


BREAKS = {
    "own mask": lambda x: attention(x, x, mask=Own(1)) @ x,
    "function": lambda x: attention(x, x, score=lambda q, k, i, j: -torch.cdist(q, k, p=1)) @ x,
    "tiled": lambda x: attention(x, x, mask=Causal()).matmul(x, form="tiled"),
    "dense": lambda x: attention(x, x, mask=Causal()).matmul(x, form="dense"),
    "no kernel": lambda x: attention(x, x, score=Additive(x[0, 0], activation="gelu")) @ x,
    "entropy": lambda x: attention(x, x).entropy(),
    "row": lambda x: attention(x, x, position=Alibi.of(2))[..., 1, :] + 1,
    "head": lambda x: attention(x, x, mask=Causal())[1:] @ x[1:],
    "topk": lambda x: attention(2 * x, x, mask=Causal()).topk(2).values,
}


@pytest.mark.parametrize("name", BREAKS)
def test_what_a_graph_cannot_hold_runs_outside_and_fullgraph_says_so(name):
    function, x = BREAKS[name], torch.randn(2, 6, 3)
    torch.compiler.reset()
    compiled = torch.compile(function, backend="aot_eager")
    for _ in range(2):
        assert torch.equal(compiled(x), function(x))
    torch.compiler.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"regard runs '.*' of these"):
        torch.compile(function, backend="aot_eager", fullgraph=True)(x)


def test_what_runs_outside_is_not_traced_from_inside():
    """After torch.compile gave up on a function, and in the backward pass of a compiled step."""
    x = torch.randn(2, 6, 3)
    with pytest.raises(ShapeError):
        torch.compile(lambda x: attention(x, x) @ x[:, :3], backend="aot_eager")(x)

    def step(x):
        A = attention(x, x, mask=Own(1))
        output = A @ x
        output.square().sum().backward()
        return output, A.entropy(), x.grad

    results = []
    for run in (step, torch.compile(step, backend="aot_eager")):
        results.append(run(x.clone().requires_grad_()))
    same(*results)


def test_errors_are_those_without_a_graph():
    x = torch.randn(2, 6, 3)
    with pytest.raises(ShapeError, match="compares vectors of one width"):
        torch.compile(lambda x: attention(x, x[..., :2]) @ x, backend="aot_eager")(x)
    with pytest.raises(ShapeError, match="value must have length 6"):
        torch.compile(lambda x: attention(x, x) @ x[:, :3], backend="aot_eager")(x)

    def padded(x, lengths):
        return attention(x, x, mask=Padding.of_lengths(lengths, 6)) @ x

    compiled = torch.compile(padded, backend="aot_eager", fullgraph=True)
    x, lengths = torch.randn(2, 1, 6, 3), torch.tensor([2, 5])
    assert torch.equal(compiled(x, lengths), padded(x, lengths))
    with pytest.raises(RuntimeError, match="padded to 6 keys"):
        compiled(x, torch.tensor([2, 9]))


def test_the_operator_keeps_torchs_rules():
    import_module("regard.form.in_graph")
    query, key, value = operands()
    slopes = normal(HEADS)
    words = "None Rule Dot None real Alibi tensor whole Softmax None Causal whole"
    numbers = ([1, 0], [2.0], False, True)
    arguments = (query, key, value, [slopes], f"{words} None None", *numbers)
    torch.library.opcheck(torch.ops.regard.product.default, arguments)
    output = torch.ops.regard.product(*arguments)[0]
    (slope,) = torch.autograd.grad(output.sum(), slopes, create_graph=True)
    with pytest.raises(FormError, match="first derivatives only"):
        slope.sum().backward()
    unknown = f"{words} Neverheard None".replace("Causal whole Neverheard", "Neverheard")
    with pytest.raises(FormError, match="made with a part Neverheard, which is not loaded"):
        torch.ops.regard.product(query, key, value, [slopes], unknown, *numbers)
