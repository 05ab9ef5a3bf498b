"""A matrix whose scores factorise, as a recurrence: time and memory O(n), a state of constant size.

output_t = S_t^T q_t, where S_t holds all that the tokens up to t left behind; see `chunks` for the
algorithm. Without a mask one state of all tokens serves every query: phi(Q) (phi(K)^T V).
RowSum divides by the same recurrence of a value that is 1: a column of ones beside the values.
reference  regard/form/dense.py::product
work       see regard/form/chunks.py; 2 (n + m) d e without a mask
precision  float32 at least; under RowSum numerator and denominator round apart, where those of
           dense share their scores: gradients in float32 have up to four times its error
           (tests/test_recurrent.py), and up to twice that of a dense quotient
after      Katharopoulos et al. 2020, arXiv:2006.16236, eqs. 4 to 12
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from regard import errors
from regard.dropout import Dropout
from regard.features import Features
from regard.form import chunks, chunks_gpu, fused, scan
from regard.form.chunks import Tokens
from regard.form.groups import Groups
from regard.form.past import Past, past
from regard.form.tiles import compute_dtype
from regard.form.unknown import without_nan
from regard.kernel import cpu, recurrence
from regard.kernel.recurrence import How
from regard.normalizer import Identity, Normalizer, RowSum, Softmax
from regard.opaque import opaque
from regard.position.base import Position, terms
from regard.position.toeplitz import Alibi
from regard.score import PositionOnly
from regard.trace import graph_leaves

if TYPE_CHECKING:
    from regard.matrix import Attention
    from regard.rule import Rule

SHORT = 1024
"""Rows from which position-only ALiBi takes longer in `fused`, 8 heads of width 64 on two cores."""


def needs(matrix: Attention) -> str | None:
    """A score that factorises, RowSum or Identity, and a mask that hides the future alone."""
    if type(matrix.score) is PositionOnly:
        reason = _needs_alibi(matrix) or _needs_no_dropout(matrix.dropout)
    else:
        reason = needs_of(matrix.score, matrix.position, matrix.normalizer, matrix.dropout)
    return reason or (_needs_mask(matrix) if _past(matrix) is None else None)


def needs_of(
    score: Any, position: Position | None, normalizer: Normalizer, dropout: Dropout | None
) -> str | None:
    """What `needs` says of any matrix of these parts, whatever its mask."""
    if type(score) is not Features:
        return "needs a score that factorises, phi(q) . phi(k), as that of Features does."
    if type(normalizer) not in (RowSum, Identity):
        return (
            f"needs the normalizer RowSum() or Identity(), under which weights are scores; "
            f"{normalizer} bends each of them."
        )
    return _needs_no_bias(position) or _needs_no_dropout(dropout)


def _needs_no_dropout(dropout: Dropout | None) -> str | None:
    if dropout is None:
        return None
    return f"has one state for all pairs, and {dropout} treats each pair by itself."


def _needs_no_bias(position: Position | None) -> str | None:
    for part in terms(position):
        if type(part).on_score is not Position.on_score:
            return (
                f"has no state for {part}, which is added to each score; log_decay multiplies it."
            )
    return None


def _needs_alibi(matrix: Attention) -> str | None:
    position, normalizer = matrix.position, matrix.normalizer
    if type(normalizer) is not Softmax or normalizer.sink is not None:
        return f"of position alone needs Softmax() without a sink, not {normalizer}."
    if type(position) is not Alibi:
        return (
            f"of position alone needs a bias whose exponential is a power of the distance, as "
            f"Alibi's is; {position} has none."
        )
    if not bool((position.slopes.detach() >= 0).all()):
        return "needs slopes of at least 0: with others the state would grow without bound."
    if _past(matrix) is not None and not _causal(matrix):
        return "of position alone needs a causal mask."
    return None


def _causal(matrix: Attention) -> bool:
    found = _past(matrix)
    return found is not None and found.offset is not None


def _needs_mask(matrix: Attention) -> str:
    return (
        "needs a mask under which each row sees all real keys, or those up to its own token in its "
        f"own document: none, Causal(), Causal() & Documents(...), with Padding; {matrix.mask} is "
        "none of these."
    )


def _past(matrix: Attention) -> Past | None:
    """What each row sees, if a state can hold it; found once for a matrix."""
    if "_past" in matrix.__dict__:
        kept: Past | None = matrix.__dict__["_past"]
        return kept
    score, position = matrix.score, matrix.position
    offset = score.offset if isinstance(score, Features) and score.recurs else None
    if isinstance(score, PositionOnly) and isinstance(position, Alibi):
        offset = position.offset
    found = matrix.__dict__["_past"] = past(matrix, offset, implied=isinstance(score, Features))
    return found


def pays(matrix: Attention) -> bool:
    """Whether nothing else that applies is faster.

    All queries and keys meet a state once, and visible pairs each other elsewhere: for few queries
    of many keys that is less. Two cores: at width 64 both took as long for 128 tokens, and for one
    query of 4096 keys pairs took a fifth. Kernels do short position-only matrices.
    """
    score, (n, m) = matrix.score, matrix.shape[-2:]
    if isinstance(score, Features) and score.erases:  # elsewhere keys come one after the other
        return True
    if type(score) is PositionOnly and n < SHORT and fused.needs(matrix) is None:
        return False
    pairs: float = n * m
    if matrix.runs is not None:
        counts = matrix.runs.counts()
        pairs = float(counts.sum()) * n / max(counts.numel(), 1)
    features, out = _features(matrix), matrix.key.shape[-1]
    return 2 * (n + m) * features * out <= pairs * (score.flops_per_pair(features) + 2 * out)


def _features(matrix: Attention) -> int:
    return 1 if type(matrix.score) is PositionOnly else matrix.score.compared(matrix.query)


def kernel(matrix: Attention) -> tuple[str, int, int]:
    """What `explain` says: the code that runs, bytes beyond inputs and outputs, side of a tile."""
    size, score = compute_dtype(matrix.dtype).itemsize, matrix.score
    d, lanes = _features(matrix), math.prod(matrix.shape[:-2])
    if not _causal(matrix):
        return "one state of all keys, in PyTorch", lanes * d * d * size, 1
    erases = isinstance(score, Features) and score.erases
    by_channel = isinstance(score, Features) and score.by_channel
    reason = scan.needs_of(matrix)
    if reason is None:
        how = f"a state and chunks of tokens, in C++ for {cpu.instruction_set()}"
        n, e = matrix.shape[-1], matrix.key.shape[-1] + (scan.eps(matrix.normalizer) is not None)
        apart = erases or by_channel
        return how, lanes * recurrence.state_bytes(n, d, e, size, sums_apart=apart), chunks.CHUNK
    on_gpu = chunks_gpu.kernel(matrix.query.device, matrix.shape[-1], erases, by_channel)
    if on_gpu.states:
        return on_gpu.said, lanes * on_gpu.states * d * d * size, chunks_gpu.CHUNK
    numbers = chunks.CHUNK + by_channel * d
    tokens = min(matrix.shape[-1], max(chunks.PIECE_NUMBERS // max(lanes * numbers, 1), 1))
    # Counted with torch's profiler, for widths of 16 and 64 (tests/test_recurrent_costs.py).
    held = (5 * chunks.CHUNK + (9 + 18 * erases + 10 * by_channel) * d) // 2
    why = on_gpu.said or f" ({reason})"
    how = f"a state and chunks of tokens, in PyTorch{why}, backward recomputes"
    return how, lanes * tokens * held * size, chunks.CHUNK


def flops(matrix: Attention, out: int) -> int:
    """Of the forward product with values of width `out`, counted as `chunks` does."""
    (n, m), lanes = matrix.shape[-2:], math.prod(matrix.shape[:-2])
    d, e = _features(matrix), out + (not isinstance(matrix.normalizer, Identity))
    found = _past(matrix)
    if found is None or found.offset is None:
        return 2 * lanes * (n + m) * d * e
    tokens = max(n + found.offset, 0)
    rows, chunk = min(n, tokens), min(chunks.CHUNK, max(tokens, 1))
    once = rows * (chunk * (d + e) + d * e) + tokens * d * e
    if isinstance(matrix.score, Features) and matrix.score.erases:
        if scan.needs_of(matrix) is None:
            solved, answered = chunk * (4 * d + 3 * e) // 2 + 2 * d * e, chunk * (d + e)
        else:  # what a chunk does to any state, so that all are done at once
            solved = chunk * (5 * d + 3 * e) // 2 + d * d + d * e + d * d * e // chunk
            answered = chunk * (d + e) + d * e
        once += rows * answered + tokens * solved
    return 2 * lanes * once


def product(matrix: Attention, value: Tensor) -> Tensor:
    """The matrix times value."""
    return _run(matrix, value, None)[0]


def product_transposed(matrix: Attention, x: Tensor) -> Tensor:
    """The transpose of the matrix times x: the gradient of x . (A v) with respect to v."""
    batch, graph = matrix.shape[:-2], torch.is_grad_enabled()
    with torch.inference_mode(False), torch.enable_grad():
        if matrix.query.is_inference() or x.is_inference():  # autograd cannot keep such tensors
            matrix, x = _cloned(matrix), x.clone()
        lanes = torch.broadcast_shapes(batch, x.shape[:-2])
        value = x.new_zeros(*lanes, matrix.shape[-1], x.shape[-1]).requires_grad_()
        output = product(matrix, value)
        if graph:  # phi, too, may read what learns: a module does, or a function with a closure
            known = (matrix.query, matrix.key, x, *matrix.rule.tensors())
            graph = any(tensor.requires_grad for tensor in known) or any(
                leaf is not value for leaf in graph_leaves(output)
            )
        (found,) = torch.autograd.grad(output, value, x.expand_as(output), create_graph=graph)
    return found if graph else found.detach()


def _cloned(matrix: Attention) -> Attention:
    rule = matrix.rule.with_tensors([tensor.clone() for tensor in matrix.rule.tensors()])
    return replace(matrix, query=matrix.query.clone(), key=matrix.key.clone(), rule=rule)


@opaque
def recur(matrix: Attention, value: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The product, begun from the state of earlier tokens, and the state after the last.

    matrix: of a part of a sequence with itself, causal, with Features or position-only Alibi
    value: [*batch, key heads, n, e]
    state: what the tokens before left behind; None at the beginning
    Returns the output [*batch, heads, n, e], and the state S [*batch, heads, d, e] in float32 at
    least, heads being key heads where decay and erasing do not differ within a group; under RowSum
    a last column holds z, the sum of keys: [*batch, heads, d, e + 1]. It has gradients.
    With Documents, the state belongs to the document of the first token.
    Raises FormError where the matrix is no recurrence, ShapeError for a state that does not fit.

    >>> import regard
    >>> from regard import Causal, Features, RowSum
    >>> parts = {"score": Features(), "mask": Causal(), "normalizer": RowSum()}
    >>> q, k, v = torch.randn(3, 10, 4).unbind(0)
    >>> first, state = recur(regard.attention(q[:7], k[:7], **parts), v[:7])
    >>> second, state = recur(regard.attention(q[7:], k[7:], **parts), v[7:], state)
    >>> torch.allclose(torch.cat([first, second]), regard.attention(q, k, **parts) @ v, atol=1e-6)
    True
    >>> state.shape
    torch.Size([4, 5])
    """
    reason = needs(matrix)
    if reason is None and not _causal(matrix):
        reason = "has a state only where rows see no later keys; give mask=Causal()."
    if reason is not None:
        raise errors.FormError(f"form 'recurrent' {reason}\n  matrix: {matrix}")
    errors.check_tensor("value", value)
    errors.check_pair("value", value, "query", matrix.query)
    errors.check_factor("value", matrix.shape, value, errors.heads_of(matrix.key))
    return _shielded(matrix, value, state)


def _shielded(matrix: Attention, value: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """`_run`, where NaN and infinity reach the rows that see them, and the state if the last does.

    A state holds what the last row sees, but for that row's own query.
    """
    from regard import form  # forms together, of which this is one

    if form.all_finite(matrix, value):
        return _run(matrix, value, state)
    bad = ~value.isfinite().all(-1)
    clean, poisoned = form.shield(matrix, bad)
    if poisoned is None:  # finite numbers whose sum is not
        return _run(matrix, value, state)
    output, after = _run(clean, value.masked_fill(bad[..., None], 0), state)
    output = torch.where(poisoned[..., None], torch.nan, output)
    _, by_keys = form.shield(replace(matrix, query=torch.zeros_like(matrix.query)), bad)
    if by_keys is None or not by_keys.shape[-1]:
        return output, after
    last, lanes = by_keys[..., -1].float(), after.shape[:-2]
    if lanes and last.dim() and lanes[-1] not in (1, last.shape[-1]):  # heads share a state
        last = last.unflatten(-1, (lanes[-1], -1)).sum(-1)
    last = last.expand(torch.broadcast_shapes(last.shape, lanes)).sum_to_size(lanes)
    return output, torch.where(last[..., None, None] > 0, torch.nan, after)


def _run(matrix: Attention, value: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    found = _past(matrix)
    assert found is not None
    batch = _output_batch(matrix, value)
    groups = Groups.of(matrix, batch)
    with torch.autocast(value.device.type, enabled=False):
        how = scan.how(matrix.rule, matrix.shape, found)
        tokens = _tokens(matrix.rule, matrix.query, matrix.key, value, groups, mapped=not how.elu)
        if found.keep is not None:
            hidden = groups.split(~found.keep[..., None])
            tokens = tokens._replace(key=tokens.key.masked_fill(hidden, 0))
        if found.offset is None:
            tokens = tokens if how.eps is None else scan.with_ones(tokens)
            assert tokens.query is not None
            after = tokens.key.mT @ tokens.value
            output = tokens.query @ after
            output = output if how.eps is None else scan.divided(output, how.eps)
        else:
            output, after = _since_start(tokens, found, groups, state, how)
    return groups.join(output, batch).to(value.dtype), groups.join(after, None)


def step(
    rule: Rule, query: Tensor, key: Tensor, value: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`recur` of one token, without matrix and mask, which take longer than what is computed."""
    heads, shared = errors.heads_of(query), errors.heads_of(key)
    groups = Groups(shared, heads // shared) if shared > 1 else Groups(heads, 1)
    with torch.autocast(value.device.type, enabled=False):
        tokens = _tokens(rule, query, key, value, groups)
        how = How(scan.eps(rule.normalizer))
        begun = _begun(tokens, state, groups, sums=how.eps is not None)
        output, after = scan.in_pytorch(tokens, begun, how)
    assert output is not None
    batch = (*errors.common_shape([query.shape[:-3], output.shape[:-4]]), heads)
    return groups.join(output, batch).to(value.dtype), groups.join(after, None)


def _output_batch(matrix: Attention, value: Tensor) -> tuple[int, ...]:
    """The batch and head axes of the product."""
    batch, axes = matrix.shape[:-2], list(value.shape[:-2])
    if axes and batch:
        axes[-1] = max(axes[-1], batch[-1])
    return errors.common_shape([axes, batch])


def _tokens(
    rule: Rule, query: Tensor, key: Tensor, value: Tensor, groups: Groups, *, mapped: bool = True
) -> Tokens:
    """What the recurrence reads, in float32 at least; not `mapped`, before the score's map."""
    dtype = compute_dtype(query.dtype)
    value = groups.split(value.to(dtype))
    score, position = rule.score, rule.position
    if isinstance(position, Alibi) and isinstance(score, PositionOnly):
        one, other = (value.new_ones(1, 1, x.shape[-2], 1) for x in (query, key))
        slopes = groups.split(position.slopes.to(dtype)[..., None, None])
        return Tokens(one, other, value, -slopes)
    assert isinstance(score, Features)
    pair = rule.operands(query, key) if mapped else (query, key)
    query, key = (x.to(dtype) for x in pair)
    query, key = groups.split(score.scaled(query)), groups.split(key)
    decay, beta = (groups.split_if_tensor(x) for x in (score.log_decay, score.beta))
    erase: Any = score.erase and tuple(map(groups.split, score.erase))
    own = replace(score, log_decay=decay, beta=beta, erase=erase)
    erasing = own.erasing(key) if own.erases else (None, None)
    return Tokens(query, own.written(key), value, own.decay(key), *erasing)


def _since_start(
    tokens: Tokens, found: Past, groups: Groups, given: Tensor | None, how: How
) -> tuple[Tensor, Tensor]:
    """Outputs of all rows, and the state after the last one's token."""
    query, offset = tokens.query, found.offset
    assert query is not None
    assert offset is not None
    n = query.shape[-2]
    before, early, last = max(offset, 0), min(max(-offset, 0), n), max(n + offset, 0)
    lined, met = tokens._replace(query=None).lengthened(last), None
    if found.begins is not None:
        begins = groups.split(F.pad(found.begins[..., early:], (before, 0))[..., None])
        lined, met = without_nan(lined, begins, begun=given is not None)
        decay = query.new_zeros(1, 1) if lined.log_decay is None else lined.log_decay
        lined = lined._replace(log_decay=torch.where(begins, -torch.inf, decay))
    state = _begun(lined, given, groups, sums=how.eps is not None)
    if before:
        _, state = scan.scan(lined.part(slice(0, before)), state, how)
    rest = lined.part(slice(before, last))._replace(query=query[..., early:, :])
    output, state = scan.scan(rest, state, how)
    assert output is not None
    if met is not None:
        output = torch.where(met[..., before:, :], torch.nan, output)
        state = torch.where(met[..., -1:, :], torch.nan, state)
    return F.pad(output, (0, 0, early, 0)) if early else output, state


def _begun(tokens: Tokens, state: Tensor | None, groups: Groups, *, sums: bool) -> Tensor:
    """The state before these tokens: the given one if it fits, or an empty one."""
    start = tokens.start(sums)
    if state is None:
        return start
    errors.check_tensor("state", state, shape="[*batch, heads, d, e]")
    heads = errors.heads_of(state)
    lanes = (*start.shape[:-4], start.shape[-4] * start.shape[-3])
    fits = state.shape[-2:] == start.shape[-2:] and heads in (1, groups.shared, groups.heads)
    if not (fits and errors.fits(state.shape[:-3], lanes[:-1])):
        raise errors.ShapeError(
            f"state has shape {errors.show(state.shape)}, but these tokens leave one of "
            f"{errors.show((*lanes, *start.shape[-2:]))}; give what came of those before, or None."
        )
    return start + groups.split(state).to(start.dtype)
