"""Attention rollout by vectors: what an output of the last layer comes from, through all layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from regard.errors import ShapeError
from regard.look.record import Captured


def rollout(calls: Sequence[Captured], query: int) -> Tensor:
    """Shares of the tokens below each layer in one token above the last: [layers, n].

    r_L = e_query,  r_{l-1} = r_l (mean over heads of A_l + I) / 2;  row l of the result is r_l for
    what goes into layer l, so row 0 is of the inputs. Half of every layer's output is taken to come
    along the residual connection, all heads count alike, and values and everything else in the
    layer are ignored. Rows sum to 1, less what learned sinks take.

    Abnar and Zuidema 2020, arXiv:2005.00928, section 3, who meant encoders. Cost: one product with
    each transposed matrix, O(n) memory; their n x n products are never formed.
    Raises ShapeError unless all calls are self-attention of one sequence.
    """
    n = calls[-1].query.shape[2]
    for call in calls:
        if call.query.shape[2] != n or call.key.shape[2] != n:
            raise ShapeError(
                f"rollout goes through self-attention of one sequence of {n} tokens, but layer "
                f"{call.number} '{call.name}' has {call.query.shape[2]} queries and "
                f"{call.key.shape[2]} keys; choose layers of one kind: look(..., layers=[...])"
            )
    if not 0 <= query < n:
        raise ShapeError(f"query is {query}; the tokens are 0 to {n - 1}")
    row = torch.zeros(n)
    row[query] = 1
    rows = []
    for call in reversed(calls):
        heads = call.query.shape[1]
        product: Tensor = call.matrix.mT @ row[:, None].expand(1, heads, n, 1).contiguous()
        row = (product[0, :, :, 0].mean(0) + row) / 2
        rows.append(row)
    return torch.stack(rows[::-1])
