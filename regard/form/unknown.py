"""NaN in what a recurrence does to its state, which the end of a document stops.

A decay of 0 ends a document, and 0 * NaN is NaN: no arithmetic forgets it. NaN in decays and in
what is erased or written is taken out, and put into the outputs that have met it.
reference  regard/form/dense.py: a pair of one document is NaN if a token between them is
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from regard.form.chunks import Tokens


def without_nan(tokens: Tokens, begins: Tensor, *, begun: bool) -> tuple[Tokens, Tensor | None]:
    """The tokens with 0 for NaN, and those that met one, [*, n, 1]; None if there is none.

    begins: the tokens that begin a document, [*, n, 1]
    begun: whether there is a state of earlier tokens, which the first one meets
    """
    sides = {name: getattr(tokens, name) for name in ("log_decay", "read", "write", "key")}
    given = {name: x for name, x in sides.items() if x is not None}
    # -inf is no NaN, and -inf + -inf neither.
    if not any(math.isnan(x.detach().sum()) for x in given.values()):
        return tokens, None
    own = given.pop("key").isnan().any(-1, keepdim=True)
    crossed = torch.zeros_like(begins)
    for x in given.values():
        crossed = crossed | x.isnan().any(-1, keepdim=True)
    # Nothing comes before the first token of a document.
    crossed = crossed & ~begins
    if not begun:
        crossed[..., :1, :] = False
    met = _last(own | crossed)
    clean = tokens._replace(
        **{name: x.masked_fill(x.isnan(), 0) for name, x in {**given, "key": tokens.key}.items()}
    )
    return clean, (met >= _last(begins)) & (met >= 0)


def _last(which: Tensor) -> Tensor:
    """The last of these up to each token, -1 before the first: [*, n, 1]."""
    places = torch.arange(which.shape[-2], device=which.device)[:, None]
    found: Tensor = torch.where(which, places, -1).cummax(-2).values
    return found
