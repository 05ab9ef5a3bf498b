"""Chunks of a recurrence on a GPU: where Triton's kernels run in the place of PyTorch's products.

They are asked for by the environment variable REGARD_TRITON=1, since they were tested in Triton's
interpreter and compiled for GPUs, but have not run on one. What they lack runs in PyTorch.
reference  regard/form/chunks.py::scan
"""

from __future__ import annotations

import importlib
import math
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from regard import errors

if TYPE_CHECKING:
    from regard.form.chunks import Tokens

Scan = Callable[["Tokens", Tensor], tuple[Tensor | None, Tensor]]

CHUNK = 32
"""Tokens of a chunk of the kernels."""


class Kernel(NamedTuple):
    """What `explain` says, all of it or what PyTorch's code adds; and Triton's states a lane."""

    said: str
    states: int


def lacks(device: torch.device, *, erases: bool, by_channel: bool) -> str | None:
    """Why PyTorch runs, as the end of a sentence about Triton; None where Triton does."""
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return "is for CUDA devices"
    if erases:
        return "has no erasing"
    if by_channel:
        return "has no decay for each channel"
    if os.environ.get("REGARD_TRITON") != "1":
        return "is asked for by REGARD_TRITON=1: it was tested in its interpreter, on no GPU"
    return None


def kernel(device: torch.device, tokens: int, erases: bool, by_channel: bool) -> Kernel:
    """What runs on a device: no states where it is PyTorch's code."""
    reason = lacks(device, erases=erases, by_channel=by_channel)
    if reason is None:
        how = "a state and chunks of tokens, in Triton, backward recomputes states"
        return Kernel(how, -(-tokens // CHUNK))
    return Kernel(f" (not in Triton, which {reason})" if device.type == "cuda" else "", 0)


def runs(tokens: Tokens) -> bool:
    """Whether Triton does these tokens."""
    decay, key = tokens.log_decay, tokens.key
    by_channel = decay is not None and decay.shape[-1] > 1
    if lacks(key.device, erases=tokens.read is not None, by_channel=by_channel) is not None:
        return False
    some = tokens.query is not None and 0 not in (*key.shape, *tokens.value.shape)
    # Transforms differentiate what PyTorch does, and cannot look into a kernel.
    return some and not torch._C._are_functorch_transforms_active()


def scan(tokens: Tokens, state: Tensor, in_pytorch: Scan) -> tuple[Tensor, Tensor]:
    """`chunks.scan` of tokens that `runs` says yes to; gradients of gradients are `in_pytorch`'s.

    Raises MissingPackageError without Triton.
    """
    query, key, value, decay = tokens[:4]
    assert query is not None
    n, width = value.shape[-2:]
    lanes = torch.broadcast_shapes(tokens.lanes(), state.shape[:-2])
    whole = torch.broadcast_shapes(lanes, query.shape[:-2])
    # Heads of a group are the last axis, and read one state; other axes are expanded.
    grouped = len(lanes) > 0 and (*lanes[:-1], whole[-1]) == whole and lanes[-1] == 1
    own = lanes if grouped else whole
    if decay is not None:
        decay = _flat(decay.expand(*decay.shape[:-2], n, 1), own)[..., 0]
    apply: Any = _Chunked.apply
    output, after = apply(
        in_pytorch,
        _flat(query, whole),
        _flat(key, own),
        _flat(value, own),
        decay,
        _flat(state, own),
    )
    output, after = output.view(*whole, n, width), after.view(*own, *state.shape[-2:])
    if own != lanes:  # copies of one state are alike
        axes = (1,) * (len(own) - len(lanes)) + tuple(lanes)
        after = after[tuple(slice(0, 1 if size == 1 else None) for size in axes)]
        after = after.reshape(*lanes, *state.shape[-2:])
    return output, after


def _flat(x: Tensor, lanes: tuple[int, ...]) -> Tensor:
    """[lanes, r, c], contiguous."""
    x = x.expand(*lanes, *x.shape[-2:])
    return x.reshape(math.prod(lanes), *x.shape[-2:]).contiguous()


def _kernels() -> Any:
    try:
        return importlib.import_module("regard.kernel.chunks_triton")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != "triton":
            raise
        raise errors.MissingPackageError("triton", extra="gpu") from error


def _on(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device, whatever the tensors' is."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


class _Chunked(torch.autograd.Function):
    """The kernels' products: query [lanes * readers, n, d], decay [lanes, n], others [lanes, .]."""

    @staticmethod
    def forward(ctx: Any, in_pytorch: Scan, *inputs: Any) -> Any:
        ctx.in_pytorch = in_pytorch
        ctx.save_for_backward(*inputs)
        with _on(inputs[0].device):
            return _kernels().forward(*inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        inputs = ctx.saved_tensors
        if torch.is_grad_enabled():  # of create_graph=True
            return None, *_differentiable(ctx.in_pytorch, inputs, gradients)
        with _on(inputs[0].device):
            found = _kernels().backward(inputs, *(each.contiguous() for each in gradients))
        return None, *found


def _differentiable(
    in_pytorch: Scan, inputs: tuple[Tensor | None, ...], gradients: tuple[Tensor, ...]
) -> list[Tensor | None]:
    """Gradients that have gradients: those of the same product in PyTorch."""
    from regard.form.chunks import Tokens

    # Views, so that what inputs were made from, maybe of each other, is not differentiated here.
    query, key, value, decay, state = own = [x if x is None else x.view_as(x) for x in inputs]
    assert query is not None
    assert key is not None
    assert value is not None
    assert state is not None
    lanes = key.shape[0]
    tokens = Tokens(
        query.unflatten(0, (lanes, -1)),
        key[:, None],
        value[:, None],
        None if decay is None else decay[:, None, :, None],
    )
    output, after = in_pytorch(tokens, state[:, None])
    assert output is not None
    learns = [x for x in own if x is not None and x.requires_grad]
    found = iter(
        torch.autograd.grad(
            (output.flatten(0, 1), after[:, 0]), learns, gradients, create_graph=True
        )
    )
    return [next(found) if x is not None and x.requires_grad else None for x in own]
