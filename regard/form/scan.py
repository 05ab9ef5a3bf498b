"""A recurrence over its tokens, in C++ where there is a kernel for it, else in PyTorch.

The kernels know every recurrence of `chunks`, on a CPU. What differentiates in other ways than
backwards runs there: second derivatives, forward mode, `torch.func`.
reference  regard/form/chunks.py        kernels  csrc/chunk.h, csrc/delta.h
memory     of the kernels: inputs, outputs, for a backward pass a state for each chunk of tokens
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from regard.feature_map import elu_plus_one
from regard.features import Features
from regard.form import chunks, chunks_gpu
from regard.form.chunks import Tokens
from regard.form.past import Past
from regard.form.tiles import compute_dtype
from regard.kernel import extension, recurrence
from regard.kernel.recurrence import How, Inputs, Results
from regard.normalizer import Identity, Normalizer

if TYPE_CHECKING:
    from regard.matrix import Attention
    from regard.rule import Rule

BATCH_AXES = 6
DTYPES = (torch.float32, torch.float64)
TENSORS = (Tensor, torch.nn.Parameter)
IN_TRITON = "Triton, which was asked for"
AXES = f"more than {BATCH_AXES} batch and head axes, one of them for heads that share a key"
KERNELS = extension.load()
Scan = Callable[[Tokens, Tensor], tuple[Tensor | None, Tensor]]


def scan(tokens: Tokens, state: Tensor, how: How) -> tuple[Tensor | None, Tensor]:
    """Outputs [*lanes, n, e] of all tokens, and the state after them.

    Where outputs are divided by sums, the state's last column is the sum of keys.
    """
    if tokens.key.shape[-2] < 2 or needs(tokens) is not None:
        return in_pytorch(tokens, state, how)
    given = Inputs(*tokens, state)
    if given.sums_apart and how != How(None):
        return _around(partial(scan, how=How(None)), tokens, state, how)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in given):
        run: Any = _Scan.apply  # torch leaves its type out
        output, after = run(how, *given)
    else:
        output, after, *_ = recurrence.recur(given, how, keep=False)
    return None if tokens.query is None else output, after


def how(rule: Rule, shape: torch.Size, found: Past) -> How:
    """What is done with the tokens of a matrix of this shape.

    elu(x) + 1 is left to the kernels where nothing stands in between.
    """
    score, (n, m) = rule.score, shape[-2:]
    elu = (
        isinstance(score, Features)
        and score.map is elu_plus_one
        and score.key_map is None
        and not isinstance(score.scale, Tensor)
        and score.scale == 1
        and not score.erases
        and rule.position is None
        and found.offset is not None
        and found.keep is None  # tokens that are hidden, or padded, have features of 0
        and n + found.offset <= m
    )
    return How(eps(rule.normalizer), elu)


def eps(normalizer: Normalizer) -> float | None:
    """What is added to the sums that divide, or None where scores are weights."""
    return None if isinstance(normalizer, Identity) else getattr(normalizer, "eps", 0.0)


def needs(tokens: Tokens) -> str | None:
    """What keeps a recurrence from the kernels, or None."""
    key, given = tokens.key, [x for x in tokens if x is not None]
    reasons = {
        IN_TRITON: chunks_gpu.runs(tokens),
        "tensors of a class of their own": any(type(x) not in TENSORS for x in given),
        "numbers of other kinds": any(x.dtype != key.dtype for x in given),
        "no channels": 0 in (key.shape[-1], tokens.value.shape[-1]),
        AXES: max(x.dim() for x in given) > BATCH_AXES + 2,
    }
    of_tensors = next((reason for reason, holds in reasons.items() if holds), None)
    return of_tensors or _unavailable(key.device, key.dtype)


def needs_of(matrix: Attention) -> str | None:
    """The same of a matrix, for `explain`."""
    score = matrix.score
    erases, by_channel = (
        isinstance(score, Features) and getattr(score, name) for name in ("erases", "by_channel")
    )
    if chunks_gpu.lacks(matrix.device, erases=erases, by_channel=by_channel) is None:
        return IN_TRITON
    # Heads that share a key have an axis of their own.
    if len(matrix.shape) - 2 + 1 > BATCH_AXES:
        return AXES
    return _unavailable(matrix.device, compute_dtype(matrix.dtype))


def _unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """What keeps all recurrences from the kernels, or None."""
    if device.type != "cpu" or dtype not in DTYPES:
        return f"{dtype} on {device}"
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return "transforms of torch.func and forward mode"
    return "no compiled kernels" if KERNELS is None else None


def in_pytorch(tokens: Tokens, state: Tensor, how: How) -> tuple[Tensor | None, Tensor]:
    """The same in chunks of PyTorch."""
    return _around(chunks.scan, tokens, state, how)


def _around(run: Scan, tokens: Tokens, state: Tensor, how: How) -> tuple[Tensor | None, Tensor]:
    """`run`, with features made before it, and sums divided after it."""
    if how.elu:
        query = None if tokens.query is None else elu_plus_one(tokens.query)
        tokens = tokens._replace(query=query, key=elu_plus_one(tokens.key))
    if how.eps is None:
        return run(tokens, state)
    output, after = run(with_ones(tokens), state)
    return None if output is None else divided(output, how.eps), after


def with_ones(tokens: Tokens) -> Tokens:
    """Values with a last column of ones, which the recurrence sums like any other."""
    return tokens._replace(value=F.pad(tokens.value, (0, 1), value=1.0))


def divided(output: Tensor, eps: float) -> Tensor:
    """The last column, sums of scores, and eps divide the others; 0 where that is 0."""
    total = output[..., -1:] + eps
    empty = total == 0
    return torch.where(empty, 0, output[..., :-1] / torch.where(empty, 1, total))


class _Scan(torch.autograd.Function):
    """The kernels as one differentiable step; a derivative of its gradients is that of `chunks`."""

    @staticmethod
    def forward(ctx: Any, how: How, *given: Tensor | None) -> tuple[Tensor, Tensor]:
        results = recurrence.recur(Inputs(*given), how, keep=True)  # type: ignore[arg-type]
        ctx.how = how
        ctx.set_materialize_grads(False)
        if not any(ctx.needs_input_grad[2:]):  # the state does not depend on queries
            ctx.mark_non_differentiable(results.after)
        ctx.save_for_backward(*given, *results)
        return results.output, results.after

    @staticmethod
    def backward(ctx: Any, *above: Tensor | None) -> tuple[Any, ...]:
        saved, size = ctx.saved_tensors, len(Inputs._fields)  # checkpoints unpack them once
        given, wanted = Inputs(*saved[:size]), ctx.needs_input_grad[1:]
        if torch.is_grad_enabled() or any(map(_is_batched, above)):
            with torch.enable_grad():
                return None, *_differentiable(ctx.how, given, above, wanted)
        results = Results(*saved[size:])
        found = recurrence.recur_grad(given, ctx.how, results, above, wanted)  # type: ignore[arg-type]
        return None, *(
            gradient if x is None or gradient is None else gradient.sum_to_size(x.shape)
            for gradient, x in zip(found, given, strict=True)
        )


def _is_batched(x: Tensor | None) -> bool:
    """Whether x stands for several gradients, as torch.vmap and is_grads_batched=True give them."""
    kinds = torch._C._functorch
    return x is not None and (kinds.is_batchedtensor(x) or kinds.is_legacy_batchedtensor(x))


def _differentiable(
    how: How,
    given: Inputs,
    above: tuple[Tensor | None, ...],
    wanted: tuple[bool, ...],
) -> list[Tensor | None]:
    """Gradients that have gradients of their own, as create_graph=True asks for them."""
    results = in_pytorch(Tokens(*given[:-1]), given.state, how)
    learned = [x for x, want in zip(given, wanted, strict=True) if want]
    pairs = [(x, g) for x, g in zip(results, above, strict=True) if x is not None and g is not None]
    outputs, gradients = zip(*pairs, strict=True)
    found = iter(
        torch.autograd.grad(
            outputs,
            learned,  # type: ignore[arg-type]
            gradients,
            create_graph=True,
            allow_unused=True,
        )
    )
    return [next(found) if want else None for want in wanted]
