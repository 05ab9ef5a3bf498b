"""Every form gives the numbers of `dense`, gradients included, for all parts."""

from __future__ import annotations

import itertools
from collections import defaultdict

import laws
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from laws import FORMS, MASKS, NORMALIZERS, POSITIONS, SCORES, Case, Sizes, condition, results

import regard.form.tiles
from regard import FormError
from regard.kernel import extension

COMPILED = extension.load() is not None  # if not, the header of the run says so
# Forms of few matrices have laws of their own: test_convolutional.py, test_recurrent.py.
FASTER = ["tiled", *(["fused"] if COMPILED else [])]
EPS = torch.finfo(torch.float64).eps
PRODUCTS = ("dot", "bilinear", "cosine", "position only")


def applies(form: str, score: str, normalizer: str, position: str = "none") -> bool:
    """Whether a form has these parts; those that it lacks are named here, and it must say so."""
    kind = position.split(",", maxsplit=1)[0]
    lacks = score in ("gelu", "own function") or score.startswith("features")
    lacks = lacks or kind in ("fire", "cope", "shift", "gaussian", "field")
    # Further channels are those of a product.
    lacks = lacks or (position == "transformer-xl" and score not in PRODUCTS)
    return form != "fused" or not lacks


pytestmark = pytest.mark.usefixtures("small_tiles")


def assert_rounding(got: dict, wanted: dict, factor: float) -> None:
    """Equal up to float64 rounding of sums of a few dozen terms, amplified by `factor`.

    factor: c = sum |score| / |sum score| of a row sum T, which is off by c roundings of itself.
        Weights divide by T once, gradients once or twice, and relative errors of divisors add up.
    """
    for name, reference in wanted.items():
        assert torch.isfinite(got[name]).all(), name
        if not reference.numel():
            continue
        bound = 256 * EPS * factor * max(1.0, float(reference.detach().abs().max()))
        error = float((got[name] - reference).detach().abs().max())
        assert error <= bound, f"{name}: error {error:.3g} is above {bound:.3g}"


@pytest.mark.parametrize("form", FASTER)
@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("score", SCORES)
@given(
    position=st.sampled_from(list(POSITIONS)),
    mask=st.sampled_from(list(MASKS)),
    sizes=laws.sizes,
    seed=st.integers(0, 2**16),
)
@settings(max_examples=6)
def test_form_equals_dense(score, normalizer, form, position, mask, sizes, seed):
    matrix, value = Case(score, position, mask, normalizer, sizes, seed).build(torch.float64)
    factor = condition(matrix)
    assume(factor < 1e4)  # a row sum near zero has no digits to compare
    if not applies(form, score, normalizer, position):
        with pytest.raises(FormError, match=f"form '{form}' has no kernel"):
            matrix.matmul(value, form=form)
        return
    assert FORMS[form].needs(matrix) is None
    assert_rounding(results(matrix, value, form), results(matrix, value, "dense"), factor)


@pytest.mark.parametrize(
    ("form", "position"),
    [each for each in itertools.product(FASTER, POSITIONS) if applies(each[0], "dot", "", each[1])],
)
@pytest.mark.parametrize("mask", MASKS)
@given(sizes=laws.sizes, seed=st.integers(0, 2**16))
@settings(max_examples=3)
def test_transpose_equals_dense(mask, position, form, sizes, seed):
    matrix, _ = Case("dot", position, mask, "sinks", sizes, seed).build(torch.float64)
    x = laws.Draw(seed, torch.float64).normal(sizes.batch, sizes.heads, sizes.n, 3)
    inputs = [matrix.query, matrix.key, x, *matrix.rule.tensors()]
    inputs = [tensor for tensor in inputs if tensor.requires_grad]
    got, wanted = [], []
    for by, found in ((form, got), ("dense", wanted)):
        output = matrix.mT.matmul(x, form=by)
        loss = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).reshape(output.shape)
        found += [output, *torch.autograd.grad(output, inputs, loss, allow_unused=True)]
    for one, other, tensor in zip(got, wanted, [None, *inputs], strict=True):
        one = torch.zeros_like(tensor) if one is None else one
        other = torch.zeros_like(tensor) if other is None else other
        assert_rounding({"": one}, {"": other}, 1)


LOW = [torch.float32, torch.bfloat16, torch.float16]
# A gradient of few numbers is now and then right to the last digit by luck, in either form: errors
# are pooled over some seeds, and over more where the first do not show the law.
SEEDS = [range(6), range(6, 30)]
# Parts of which the law leaves out, in half precision, the gradients that go through the logits.
# Near a kink a derivative is one of two numbers and not a rounded one; a user's function runs in
# its caller's dtype, tile by tile, so that the partial sums of its gradients round once a tile.
LEFT_OUT = {"relu", "leaky_relu", "relu mean", "own function"}
THROUGH_WEIGHTS_ONLY = {"output", "gradient of value"}


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize(
    ("normalizer", "score", "position"),
    [
        (normalizer, score, "none" if normalizer == "row sum" else "alibi")
        for normalizer, score in itertools.product(NORMALIZERS, SCORES)
    ]
    + list(itertools.product(["softmax"], ["dot", "cosine"], ["shaw", "transformer-xl"])),
)
def test_low_precision_error_is_at_most_twice_that_of_dense(
    score, normalizer, position, dtype, monkeypatch
):
    """Against float64 dense: error(form) <= 2 error(dense in that dtype) + one rounding.

    An error is the norm of the difference over the norm of the result, in roundings, pooled.
    """
    monkeypatch.setattr(regard.form.tiles, "SMALLEST_SIDE", 24)  # three blocks of rows and of keys
    forms = [form for form in FASTER if applies(form, score, normalizer, position)]
    eps = torch.finfo(dtype).eps
    squares = {by: defaultdict(float) for by in ("dense", *forms)}
    cases = 0
    for seeds in SEEDS:
        for seed in seeds:
            mask = ["none", "causal window", "padding"][seed % 3]
            sizes = Sizes(batch=1, heads=2, key_heads=1, n=65, m=57, width=16, value_width=8)
            case = Case(score, position, mask, normalizer, sizes, seed)
            cases += add_errors(squares, case, dtype)
        assert cases >= 3
        missed = {}
        for form, (name, allowed) in itertools.product(forms, squares["dense"].items()):
            if eps > 1e-4 and {score, normalizer} & LEFT_OUT and name not in THROUGH_WEIGHTS_ONLY:
                continue
            error, dense = ((total / cases) ** 0.5 for total in (squares[form][name], allowed))
            if not error <= 2 * dense + 1:
                missed[form, name] = f"{error:.2f} roundings, dense {dense:.2f}"
        if not missed:
            return
    raise AssertionError(f"over {cases} draws: {missed}")


def add_errors(squares: dict, case: Case, dtype: torch.dtype) -> bool:
    """Add the squared errors of one draw in roundings, by form and tensor; False: it has none."""
    exact, low = case.build(torch.float64), case.build(dtype)
    if condition(exact[0]) > 50:
        return False  # a row sum near zero: what is left of it is rounding, in every form
    # Both start from the numbers that the low precision holds, so that only sums differ.
    for high, rounded in zip(laws.inputs(*exact), laws.inputs(*low), strict=True):
        high.data.copy_(rounded)
    reference = results(*exact, "dense")
    # What rounds in the gradient of a part is a sum of rows' contributions.
    terms = reference | laws.contributions(*exact)
    for by, found in squares.items():
        for name, result in results(*low, by).items():
            scale = torch.finfo(dtype).eps * float(terms[name].norm()) or 1.0
            found[name] += (float((result - reference[name]).norm()) / scale) ** 2
    return True


@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("score", [name for name in SCORES if name != "own function"])
def test_gradcheck_of_the_definition(score, normalizer):
    """The definition's own gradients are right, by finite differences."""
    sizes = Sizes(batch=1, heads=2, key_heads=1, n=3, m=4, width=2, value_width=2)
    matrix, value = Case(score, "alibi", "causal", normalizer, sizes, seed=3).build(torch.float64)
    assert condition(matrix) < 1e3
    tensors = laws.inputs(matrix, value)
    assert torch.autograd.gradcheck(lambda *given: laws.on(matrix, list(given), "dense"), tensors)
