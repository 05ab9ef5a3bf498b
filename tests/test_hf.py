"""Hugging Face models on regard compute what their own eager code computes.

In float64, to 1e-10: rounding alone, since both sides take the same sums in another order.
"""

import families
import pytest
import torch
from families import FAMILIES, TEXT, both, padded

import regard
import regard.hf

SIDES = [
    (name, side)
    for name, family in FAMILIES.items()
    for side in (("none", "left", "right") if family.reads in ("text", "both") else ("none",))
]
CLOSE = {"rtol": 1e-10, "atol": 1e-10}


def real_tokens(name, side):
    """The rows of logits that anybody reads."""
    return padded(side).bool() if name in TEXT else slice(None)


@pytest.mark.parametrize(("name", "side"), SIDES)
def test_logits_and_loss_are_those_of_eager(name, side):
    eager, own = both(name, side)
    keep = real_tokens(name, side)
    torch.testing.assert_close(own.logits[keep], eager.logits[keep], **CLOSE)
    torch.testing.assert_close(own.output.loss, eager.output.loss, **CLOSE)


@pytest.mark.parametrize(("name", "side"), SIDES)
def test_every_parameter_gets_the_gradient_of_eager(name, side):
    eager, own = both(name, side)
    assert own.gradients.keys() == eager.gradients.keys()
    assert len(own.gradients) > 10
    for parameter, gradient in eager.gradients.items():
        torch.testing.assert_close(own.gradients[parameter], gradient, **CLOSE, msg=parameter)


@pytest.mark.parametrize(("name", "side"), SIDES)
def test_attentions_are_lazy_and_hold_the_weights_of_eager(name, side):
    eager, own = both(name, side)
    assert len(own.attentions) == len(eager.attentions) >= 2
    for lazy, weight in zip(own.attentions, eager.attentions, strict=True):
        assert isinstance(lazy, regard.Attention)
        assert lazy.shape == weight.shape
        seen, told = lazy.dense(), weight
        if lazy.shape[-2] == families.TOKENS:  # rows of padding are nobody's
            keep = padded(side).bool()
            seen, told = (x.transpose(1, 2)[keep] for x in (seen, told))
        torch.testing.assert_close(seen, told, **CLOSE)
