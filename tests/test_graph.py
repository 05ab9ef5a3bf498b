"""Attention along the edges of a graph."""

from __future__ import annotations

import re

import laws
import pytest
import torch
from test_laws import assert_rounding

from regard import Additive, Causal, Dropout, DtypeError, ShapeError, Softmax, attention
from regard.form import FORMS
from regard.graph import Graph
from regard.kernel import extension

CPU = extension.load()
ISAS = [] if CPU is None else CPU.isas()
NODES = 500


def edges(count: int = 900, nodes: int = NODES) -> torch.Tensor:
    return torch.randint(nodes, (2, count), generator=torch.Generator().manual_seed(0))


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return drawn.requires_grad_()


@pytest.mark.parametrize("form", ["dense", "tiled", "fused"])
def test_gatv2_of_edges_one_by_one(form):
    """e_ji = a . leaky_relu(q_i + k_j), a softmax over the edges into i (Brody et al., eq. 7)."""
    if form == "fused" and CPU is None:
        pytest.skip("the compiled kernels are not installed")
    query, key, value = (normal(2, NODES, 5, seed=seed) for seed in range(3))
    score = Additive(normal(2, 5, seed=3), activation="leaky_relu")
    graph = edges()
    source, target = torch.cat([graph, torch.arange(NODES).expand(2, -1)], 1).unique(dim=1)
    features = torch.nn.functional.leaky_relu(query[:, target] + key[:, source], 0.2)
    weights = (features * score.weight[:, None]).sum(-1).exp()
    zeros = torch.zeros(2, NODES, dtype=torch.float64)
    weights = weights / zeros.index_add(1, target, weights)[:, target]
    wanted = torch.zeros_like(value).index_add(1, target, weights[..., None] * value[:, source])
    matrix = attention(query, key, score=score, mask=Graph(graph, loops=True))
    found = matrix.matmul(value, form=form)
    tensors = (query, key, value, score.weight)
    along = normal(2, NODES, 5, seed=4).detach()
    gradients = (torch.autograd.grad(x, tensors, along) for x in (found, wanted))
    for got, right in zip((found, *next(gradients)), (wanted, *next(gradients)), strict=True):
        assert torch.allclose(got, right, rtol=1e-12, atol=1e-12)


@pytest.mark.skipif(CPU is None, reason="the compiled kernels are not installed")
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    ("score", "norm"),
    [("dot softcap", "softmax"), ("distance", "row sum"), ("tanh", "sinks"), ("relu", "sigmoid")],
)
def test_keys_from_anywhere_make_a_block(isa, score, norm):
    """Blocks whose keys do not follow each other, in every build."""
    sizes = laws.Sizes(batch=2, heads=2, key_heads=1, n=70, m=600, width=12, value_width=20)
    case = laws.Case(score, "none", "none", norm, sizes, seed=5)
    matrix, value = case.build(torch.float64)
    graph = Graph(torch.stack([edges(200, 600)[0], edges(200, 70)[1]]))
    some = attention(
        matrix.query, matrix.key, score=matrix.score, mask=graph, normalizer=matrix.normalizer
    )
    wanted = laws.results(some, value, "dense")
    with extension.instruction_set(isa):
        assert_rounding(laws.results(some, value, "fused"), wanted, 1)


@pytest.mark.skipif(CPU is None, reason="the compiled kernels are not installed")
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("score", ["dot", "leaky_relu"])
def test_weights_of_keys_from_anywhere_fall_as_in_dense(isa, score):
    sizes = laws.Sizes(batch=2, heads=2, key_heads=1, n=70, m=600, width=12, value_width=20)
    matrix, value = laws.Case(score, "none", "none", "softmax", sizes, seed=5).build(torch.float64)
    graph = Graph(torch.stack([edges(400, 600)[0], edges(400, 70)[1]]))
    some = attention(
        matrix.query, matrix.key, score=matrix.score, mask=graph, dropout=Dropout(0.4, seed=3)
    )
    wanted = laws.results(some, value, "dense")
    with extension.instruction_set(isa):
        assert_rounding(laws.results(some, value, "fused"), wanted, 1)


@pytest.mark.skipif(CPU is None, reason="the compiled kernels are not installed")
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("rows", [3, 130])
def test_keys_from_anywhere_come_in_pairs(isa, rows):
    query, key, value = (normal(n, 32, seed=n) for n in (rows, 700, 701))
    value = value[:700]
    low = [x.detach().bfloat16() for x in (query, key, value)]
    graph = Graph(torch.stack([edges(3 * rows, 700)[0], edges(3 * rows, rows)[1]]))
    wanted = attention(low[0].double(), low[1].double(), mask=graph) @ low[2].double()
    with extension.instruction_set(isa, pairs=True):
        found = attention(low[0], low[1], mask=graph) @ low[2]
    eps = torch.finfo(torch.bfloat16).eps
    assert float((found.double() - wanted).norm() / wanted.norm()) < eps


def test_nodes_without_edges_give_zero_and_edges_count_once():
    graph = Graph(torch.tensor([[1, 1, 2], [0, 0, 0]]))
    x = torch.eye(3)
    for form in (form for form in FORMS if form in ("dense", "tiled")):
        output = attention(torch.zeros(3, 3), x, mask=graph).matmul(x, form=form)
        assert output.tolist() == [[0, 0.5, 0.5], [0, 0, 0], [0, 0, 0]]


def test_it_combines_with_other_masks_and_no_edges_are_fine():
    keep = (Graph(edges(40, 9), loops=True) & Causal()).runs(9, 9, torch.device("cpu"))
    assert keep.keep(slice(0, 9), slice(0, 9)).triu(1).sum() == 0
    assert keep.counts().min() == 1
    empty = Graph(torch.zeros(2, 0, dtype=torch.long))
    assert (attention(torch.ones(4, 2), torch.ones(4, 2), mask=empty) @ torch.ones(4, 2) == 0).all()
    sunk = attention(torch.ones(4, 2), torch.ones(4, 2), mask=empty, normalizer=Softmax(sink=0.0))
    assert (sunk @ torch.ones(4, 2) == 0).all()


@pytest.mark.parametrize(
    ("given", "error", "says"),
    [
        (torch.zeros(2, 3), DtypeError, "takes a tensor of integers"),
        (torch.zeros(5, 2, dtype=torch.long), ShapeError, "looks transposed: use edges.mT"),
        (torch.zeros(3, 5, dtype=torch.long), ShapeError, "must be [2, E]"),
    ],
)
def test_what_is_no_list_of_edges_is_refused(given, error, says):
    with pytest.raises(error, match=re.escape(says)):
        Graph(given)


def test_edges_beyond_the_matrix_are_refused():
    x = torch.ones(4, 2)
    with pytest.raises(ShapeError, match="source is node 4; the matrix has 4 keys"):
        attention(x, x, mask=Graph(torch.tensor([[0, 4], [0, 0]]))) @ x
    with pytest.raises(ShapeError, match="target is node -1; the matrix has 4 queries"):
        attention(x, x, mask=Graph(torch.tensor([[0, 3], [0, -1]]))) @ x
    with pytest.raises(ShapeError, match="loops=True"):
        attention(x, torch.ones(5, 2), mask=Graph(torch.tensor([[0], [0]]), loops=True))
