"""Several gradients at once, and torch.func: the numbers of `dense`, or a sentence."""

from dataclasses import replace

import laws
import pytest
import torch
from laws import Case, Sizes
from test_laws import COMPILED, EPS, FASTER, applies

from regard import Causal, FormError, Padding, attention

SIZES = Sizes(2, 4, 2, 5, 6, 3, 2)
CASES = {
    "plain": Case("dot", "none", "none", "softmax", SIZES, 1),
    "causal": Case("dot", "none", "causal", "sinks", SIZES, 2),
    "dropout": Case("bilinear", "none", "none", "softmax", SIZES, 3),
    "tables": Case("tanh", "alibi", "causal", "softmax", SIZES, 4),
    "own function": Case("own function", "none", "causal", "sigmoid", SIZES, 5),
    "bias": Case("distance", "bias", "none", "row sum", SIZES, 7),
    "field": Case("position only", "none", "none", "softmax", SIZES, 8),
}


def parameters(names=CASES):
    return [
        pytest.param(form, CASES[name], id=f"{form}-{name}")
        for name in names
        for form in FASTER
        if applies(form, CASES[name].score, "", CASES[name].position)
    ]


def assert_rounding(found, wanted):
    for one, other in zip(found, wanted, strict=True):
        bound = 1024 * EPS * max(1.0, float(other.detach().abs().max()))
        torch.testing.assert_close(one, other, rtol=0, atol=bound)


def one_by_one(output, inputs, above):
    each = [
        torch.autograd.grad(output, inputs, x, retain_graph=True, materialize_grads=True)
        for x in above
    ]
    return [torch.stack(gradients) for gradients in zip(*each, strict=True)]


def several(output, inputs, above):
    return torch.autograd.grad(output, inputs, above, is_grads_batched=True, materialize_grads=True)


def mapped(output, inputs, above):
    def of(one):
        return torch.autograd.grad(output, inputs, one, retain_graph=True, materialize_grads=True)

    return torch.vmap(of)(above)


@pytest.mark.parametrize("derive", [several, mapped])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("form", "case"), parameters())
def test_several_gradients_at_once(form, case, transposed, derive):
    matrix, value = case.build(torch.float64)
    found = []
    for by, way in ((form, derive), ("dense", one_by_one)):
        if transposed:
            value = laws.Draw(1, torch.float64).normal(2, SIZES.heads, SIZES.n, 2)
        output = (matrix.mT if transposed else matrix).matmul(value, form=by)
        inputs = [t for t in (*laws.inputs(matrix, value),) if t.requires_grad]
        above = laws.Draw(0, torch.float64).normal(3, *output.shape).detach()
        found.append(way(output, inputs, above))
    assert_rounding(*found)


@pytest.mark.skipif(not COMPILED, reason="the compiled kernels are not built")
def test_a_jacobian_through_tables_of_exponentials():
    """In float32 additive tanh goes through tables, which are a step of their own."""
    matrix, value = CASES["tables"].build(torch.float32)
    output = matrix.matmul(value, form="fused")
    above = laws.Draw(0, torch.float32).normal(3, *output.shape).detach()
    inputs = [matrix.query, *matrix.score.tensors()]
    wanted, got = (way(output, inputs, above) for way in (one_by_one, several))
    assert all(map(torch.equal, got, wanted))


def test_jacobian_of_torch_autograd():
    x, y = torch.randn(2, 4, 3, dtype=torch.float64)
    found = []
    for form in (*FASTER, "dense"):

        def product(x, y, form=form):
            return attention(x, x, mask=Causal()).matmul(y, form=form)

        found.append(torch.autograd.functional.jacobian(product, (x, y), vectorize=True))
    for other in found[:-1]:
        assert_rounding(other, found[-1])


def functions(case):
    """From the inputs of a product to its sum, by the form that is chosen and by the definition."""
    matrix, value = case.build(torch.float64)
    matrix, given = replace(matrix), [t.detach() for t in laws.inputs(matrix, value)]
    return given, *(
        lambda *x, form=form: laws.on(matrix, list(x), form) for form in (None, "dense")
    )


@pytest.mark.parametrize("name", [name for name in CASES if name != "own function"])
def test_transforms_of_torch_func(name):
    given, chosen, dense = functions(CASES[name])
    places = tuple(range(len(given)))
    several = [torch.stack([x, 0.5 * x, -x if x.dim() > 1 else x]) for x in given]
    assert_rounding([torch.vmap(chosen)(*several)], [torch.vmap(dense)(*several)])

    def slopes(function):
        return torch.func.grad(lambda *x: function(*x).square().sum(), places)

    assert_rounding(slopes(chosen)(*given), slopes(dense)(*given))
    assert_rounding(torch.vmap(slopes(chosen))(*several), torch.vmap(slopes(dense))(*several))
    one = (0, *[None] * (len(given) - 1))
    got, wanted = (torch.vmap(f, one)(several[0], *given[1:]) for f in (chosen, dense))
    assert_rounding([got], [wanted])


def test_a_jacobian_of_torch_func():
    given, chosen, dense = functions(CASES["causal"])
    found = [torch.func.jacrev(f, (0, 2))(*given) for f in (chosen, dense)]
    assert_rounding(*found)


def test_samples_of_a_user_s_own_function():
    temperature = torch.tensor(2.0, dtype=torch.float64)

    def loss(temperature, x, form=None):
        def score(query, key, i, j):
            return -temperature * (query[..., :, None, :] - key[..., None, :, :]).abs().sum(-1)

        A = attention(x, x, score=score, mask=Causal())
        return A.matmul(x, form=form).square().sum()

    x = torch.randn(3, 2, 5, 2, dtype=torch.float64)
    assert_rounding(
        torch.vmap(lambda x: loss(temperature, x)[None])(x).unbind(),
        torch.stack([loss(temperature, each, "dense")[None] for each in x]).unbind(),
    )


@pytest.mark.parametrize("form", [None, "dense"])
def test_under_vmap_nan_reaches_only_the_rows_that_see_it(form):
    x = torch.randn(3, 2, 5, 4)
    x[1, 0, 3, 2] = torch.nan
    found = torch.vmap(lambda x: attention(x, x, mask=Causal()).matmul(x, form=form))(x)
    wanted = attention(x, x, mask=Causal()).matmul(x, form=form)
    torch.testing.assert_close(found, wanted, equal_nan=True)
    assert found.isnan().any(-1).sum() == 2
    found = torch.vmap(lambda x: attention(x, x, mask=Causal()).mT.matmul(x, form=form))(x)
    wanted = attention(x, x, mask=Causal()).mT.matmul(x, form=form)
    torch.testing.assert_close(found, wanted, equal_nan=True)


def test_what_cannot_work_says_what_does():
    x = torch.randn(3, 5, 2)
    with pytest.raises(FormError, match="form='dense'"):
        torch.func.jvp(lambda x: attention(x, x) @ x, (x[0],), (x[0],))
    with pytest.raises(FormError, match="form='dense'"):
        torch.func.hessian(lambda x: (attention(x, x) @ x).sum())(x[0])
    slope = torch.func.grad(lambda x: (attention(x, x) @ x).sum())
    with pytest.raises(FormError, match="form='dense'"):
        torch.func.grad(lambda x: slope(x).square().sum())(x[0])


@pytest.mark.parametrize("form", [None, "dense"])
def test_a_mask_cannot_be_mapped_and_says_what_works(form):
    x, keep = torch.randn(3, 5, 2), torch.ones(3, 5, dtype=torch.bool)

    def product(x, keep):
        return attention(x, x, mask=Padding(keep)).matmul(x, form=form)

    with pytest.raises(FormError, match="as a batch axis"):
        torch.vmap(product)(x, keep)
    assert torch.vmap(product, (0, None))(x, keep[0]).shape == (3, 5, 2)


def test_dense_has_all_transforms_under_a_mask():
    x = torch.randn(3, 4, 2, dtype=torch.float64)

    def f(x):
        return attention(x, x, mask=Causal()).matmul(x, form="dense").square().sum()

    hessians = torch.vmap(torch.func.hessian(f))(x)
    wanted = torch.stack([torch.autograd.functional.hessian(f, each) for each in x])
    assert_rounding([hessians], [wanted])
