"""x @ A: what Python computes, compiled code computes, too."""

import pytest
import torch

from regard import Causal, ShapeError, attention
from regard.form import fused

X, KEYS = torch.Generator().manual_seed(0), 6


def normal(*shape):
    return torch.randn(*shape, generator=X, dtype=torch.float64)


QUERY, KEY = normal(2, 4, 5, 3), normal(2, 2, KEYS, 3)
WAYS = {
    "x @ A": lambda A, x: x @ A,
    "matmul(x, A)": lambda A, x: torch.matmul(x, A),
    "x.matmul(A)": lambda A, x: x.matmul(A),
    "x.__matmul__(A)": lambda A, x: x.__matmul__(A),
    "matmul(A, x)": torch.matmul,
    "A @ x": lambda A, x: A @ x,
    "x @ A.mT": lambda A, x: x @ A.mT,
    "A.mT @ x": lambda A, x: A.mT @ x,
}


def product(way):
    def run(query, key, x):
        return WAYS[way](attention(query, key, mask=Causal(1)), x)

    return run


def defined(way, query, key, x):
    """The same of weights as a tensor."""
    return WAYS[way](attention(query, key, mask=Causal(1)).dense(), x)


def sizes(way, left, right):
    """An x of the lengths that a way wants, for grouped heads; `x @ A` sums over rows."""
    rows, columns = (KEYS, 5) if "A.mT" in way else (5, KEYS)
    from_left = way.startswith("x") or way == "matmul(x, A)"
    return normal(2, 4, left, rows) if from_left else normal(2, 4, columns, right)


@pytest.mark.parametrize("way", WAYS)
def test_products_from_both_sides(way):
    x = sizes(way, 3, 2).requires_grad_()
    query, key = QUERY.clone().requires_grad_(), KEY.clone().requires_grad_()
    results = []
    for function in (product(way), lambda *given: defined(way, *given)):
        output = function(query, key, x)
        loss = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
        results.append([output, *torch.autograd.grad(output, (query, key, x), loss)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


compiled = pytest.mark.skipif(fused.KERNELS is None, reason="the compiled kernels are not built")


@compiled
@pytest.mark.parametrize("way", ["x @ A", "A @ x", "matmul(x, A)", "x @ A.mT"])
def test_one_graph_where_the_lengths_tell_the_sides_apart(way):
    torch.compiler.reset()
    x = sizes(way, 3, 2)
    run = torch.compile(product(way), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(run(QUERY, KEY, x), defined(way, QUERY, KEY, x))


@compiled
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("way", ["x @ A", "A @ x", "x.matmul(A)"])
def test_compiled_code_is_right_where_the_lengths_fit_both_sides(way, dynamic):
    torch.compiler.reset()
    run = torch.compile(product(way), backend="aot_eager", dynamic=dynamic)
    for n in (5, 6):
        query, key, x = normal(2, n, 3), normal(2, n, 3), normal(2, n, n)
        torch.testing.assert_close(run(query, key, x), defined(way, query, key, x))


@compiled
def test_a_graph_that_may_not_break_says_how_to_tell_the_sides_apart():
    torch.compiler.reset()
    x = normal(2, 5, 5)
    run = torch.compile(product("x @ A"), backend="aot_eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="which is meant"):
        run(normal(2, 5, 3), normal(2, 5, 3), x)


@compiled
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("way", ["x @ A", "A @ x"])
def test_an_exported_program_knows_the_sides(way, strict):
    class Module(torch.nn.Module):
        def forward(self, query, key, x):
            return product(way)(query, key, x)

    given = normal(2, 5, 3), normal(2, 5, 3), normal(2, 5, 5)
    program = torch.export.export(Module(), given, strict=strict)
    torch.testing.assert_close(program.module()(*given), defined(way, *given))


def test_what_does_not_fit_says_what_would():
    A = attention(QUERY, KEY)
    for x in (normal(3, 6), normal(5)):
        with pytest.raises(ShapeError, match=r"it must be \[\*batch, heads, r, 5\]"):
            x @ A
    with pytest.raises(TypeError, match="x @ A takes a tensor"):
        2.0 @ A
    with pytest.raises(TypeError, match="exp takes tensors"):
        torch.exp(A)
