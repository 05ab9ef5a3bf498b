"""Products of regard's own matrices, as a tap records them.

A softmax over scaled dot products, with any position and mask, is written down as such. Of other
scores the logits travel, n x m of them, as a bias with the score's name. Matrices under another
normalizer stay lazy: they are there in Python, but a page of softmax weights cannot show them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from regard.look.record import Captured, CaptureError, four_axes, kept
from regard.look.rotation import turned
from regard.mask import Causal
from regard.matrix import Attention
from regard.normalizer import Softmax
from regard.runs import compile_mask
from regard.score import Bilinear, Cosine, Dot, PositionOnly

LOGITS_AT_MOST = 2**26  # numbers of one call, 256 MiB; longer inputs need a score of dot products


def of_product(name: str, matrix: Attention, value: Tensor, output: Tensor) -> Captured:
    """The product `matrix @ value` under a module's name.

    Raises CaptureError under dropout, and for logits that would be too many to keep.
    """
    if matrix.dropout is not None:
        raise CaptureError(
            f"layer '{name}' drops weights at random ({matrix.dropout}), so no weight is the "
            "model's own; call model.eval() first"
        )
    matrix = matrix.detach()
    call = replace(
        _numbers(name, matrix),
        value=None,
        output=kept(four_axes(output)),
        **pairs(matrix),
    )
    return _with_value(_without_forbidden(call), value)


def of_matrix(name: str, matrix: Attention) -> Captured:
    """A matrix that no model multiplied by, such as one read from a file; it has no value."""
    matrix = matrix.detach()
    return _without_forbidden(replace(_numbers(name, matrix), route="arrays", **pairs(matrix)))


def _numbers(name: str, matrix: Attention) -> Captured:
    """Query, key, and what their logits are made of."""
    query, key = matrix.rule.operands(matrix.query, matrix.key)
    batch = matrix.shape[:-2]
    query = query.expand(*batch, *query.shape[-2:])
    groups = key.shape[-3] if key.dim() > 2 else 1
    key = key.expand(*batch[:-1], groups, *key.shape[-2:])
    score, normalizer = matrix.score, matrix.normalizer
    before = [("", four_axes(x)) for x in (matrix.query, matrix.key) if matrix.position is not None]
    call = Captured(
        name=name,
        route="regard",
        query=kept(four_axes(query)),
        key=kept(four_axes(key)),
        value=None,
        mask=None,
        scale=1.0,
        turned=turned(before, four_axes(query), four_axes(key)),
    )
    if not isinstance(normalizer, Softmax):
        return replace(call, given=matrix, formula=repr(normalizer))
    sinks = normalizer.sink
    if sinks is not None:
        heads = call.query.shape[1]
        sinks = torch.as_tensor(sinks, dtype=call.query.dtype).expand(*batch).reshape(-1, heads)[0]
        call = replace(call, sinks=kept(sinks))
    if not isinstance(score, Dot | Bilinear | Cosine | PositionOnly):
        return replace(call, scale=0.0, bias=_logits(name, matrix), formula=repr(score))
    if isinstance(score, PositionOnly):
        call = replace(call, scale=0.0)
    elif isinstance(score.scale, Tensor):  # one per head, say: it goes into the queries
        call = replace(call, query=kept(four_axes(query * score.scale.detach()[..., None, None])))
    else:
        scale = query.shape[-1] ** -0.5 if score.scale is None else float(score.scale)
        call = replace(call, scale=scale)
    if isinstance(score, Dot):
        call = replace(call, softcap=score.softcap)
    if matrix.position is None:
        return call
    return replace(call, bias=_bias(name, matrix, query, key))


def _bias(name: str, matrix: Attention, query: Tensor, key: Tensor) -> Tensor | None:
    """What a position adds to the scores: [batch, heads or 1, n, m]."""
    assert matrix.position is not None
    n, m = matrix.shape[-2:]
    rows, columns = (torch.arange(length, device=matrix.device) for length in (n, m))
    if matrix.position.on_score(query, key, rows[:1], columns) is None:
        return None
    _check_size(name, matrix)
    bias = matrix.position.on_score(query, key, rows, columns)
    return None if bias is None else kept(four_axes(bias.expand(*bias.shape[:-2], n, m)))


def _without_forbidden(call: Captured) -> Captured:
    """Biases of minus infinity as what they are, pairs that a mask forbids."""
    bias = call.bias
    if bias is None or not bool((bias == -torch.inf).any()):
        return call
    keep = bias > -torch.inf
    mask = keep if call.mask is None else keep & call.mask
    return replace(call, bias=torch.where(keep, bias, 0), mask=mask)


def _logits(name: str, matrix: Attention) -> Tensor:
    """All logits, 0 where the mask forbids a pair."""
    _check_size(name, matrix)
    logits = four_axes(matrix.logits())
    return kept(torch.where(logits == -torch.inf, 0, logits))


def _check_size(name: str, matrix: Attention) -> None:
    if matrix.shape.numel() > LOGITS_AT_MOST:
        raise CaptureError(
            f"layer '{name}' compares {tuple(matrix.shape)} pairs by {matrix.score} and "
            f"{matrix.position}, whose numbers would all be kept, more than {LOGITS_AT_MOST:,}; "
            "what works: fewer tokens or sequences, or the matrix that the layer returns, in Python"
        )


def _with_value(call: Captured, value: Tensor) -> Captured:
    """The call with as many value heads as key heads, and one batch axis for all.

    Raises CaptureError where the heads of key and value do not fit together.
    """
    value = kept(four_axes(value))
    output = call.output
    assert output is not None
    batch, groups = output.shape[0], max(call.key.shape[1], value.shape[1])

    def grown(tensor: Tensor, heads: int) -> Tensor:
        if heads % tensor.shape[1]:
            raise CaptureError(
                f"layer '{call.name}' has {call.key.shape[1]} key heads and {value.shape[1]} "
                "value heads, of which neither divides the other"
            )
        shared = tensor.repeat_interleave(heads // tensor.shape[1], 1)
        return shared.expand(batch, *shared.shape[1:]) if shared.shape[0] == 1 else shared

    return replace(
        call,
        query=grown(call.query, call.query.shape[1]),
        key=grown(call.key, groups),
        value=grown(value, groups),
    )


def pairs(matrix: Attention) -> dict[str, Any]:
    """The fields of Captured that say which pairs a matrix sees; a triangle needs no tensor."""
    runs = matrix.runs
    if runs is None:
        return {"mask": None, "causal": False}
    triangle = compile_mask(Causal(), runs.rows, runs.columns, matrix.device)
    names = ("offsets", "start", "stop")
    if runs.batch == () and all(
        torch.equal(getattr(runs, name), getattr(triangle, name)) for name in names
    ):
        return {"mask": None, "causal": True}
    return {"mask": four_axes(runs.keep(slice(None), slice(None))), "causal": False}
