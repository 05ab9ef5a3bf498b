"""Taps that read query, key and value out of a running model, without changing the model.

Three routes, all active at once:

- **interface**: Hugging Face models ask `AttentionInterface.get_interface` for their attention
  function, whichever implementation is configured, the model file's own eager code included.
  That one method is wrapped while the tap is open. Query and key arrive after rotary encoding and
  before grouped key heads are repeated; bias, sinks and softcap arrive by name.
- **sdpa**: a `TorchFunctionMode` sees every call of `F.scaled_dot_product_attention`, including
  the one inside `nn.MultiheadAttention`. It is muted inside the interface route, so that no call
  is recorded twice.
- **regard**: `Attention.matmul` is wrapped, which layers of `regard.nn` and all that multiply by a
  matrix of regard's end in. It is muted inside the other two.

Models with attention code of their own (no route) record nothing, and the caller is told.
"""

from __future__ import annotations

import inspect
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from regard.look import own
from regard.look.inputs import Running
from regard.look.record import (
    HARMLESS,
    READ,
    Captured,
    CaptureError,
    four_axes,
    kept,
    record,
)
from regard.mask import Mask
from regard.matrix import Attention
from regard.sdpa import scaled_dot_product_attention


@contextmanager
def taps(model: nn.Module, calls: list[Captured]) -> Iterator[None]:
    """Append every attention call that `model` makes while the block runs; see `capture`."""
    running = Running(calls)
    hooks = []
    for name, module in model.named_modules():
        hooks.append(
            module.register_forward_pre_hook(
                lambda m, args, kwargs, name=name: running.enter(
                    m, name, [*args, *kwargs.values()]
                ),
                with_kwargs=True,
            )
        )
        # A forward hook must return None, or its result replaces the output.
        hooks.append(
            module.register_forward_hook(
                lambda m, _, output: running.leave(m, output), always_call=True
            )
        )
    tap = _SdpaTap(calls, running)
    try:
        with (
            _interface_tap(model, calls, running, tap),
            _product_tap(calls, running, tap),
            tap,
        ):
            yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _product_tap(calls: list[Captured], running: Running, sdpa: _SdpaTap) -> Iterator[None]:
    """The route of regard's own matrices."""
    original = Attention.matmul

    def matmul(self: Attention, value: Tensor, *, form: str | None = None) -> Tensor:
        if not running or sdpa.is_muted:
            return original(self, value, form=form)
        with sdpa.muted():
            output = original(self, value, form=form)
            here = running[-1]
            calls.append(here.completed(own.of_product(here.name, self, value, output)))
        return output

    Attention.matmul = matmul  # type: ignore[method-assign]
    try:
        yield
    finally:
        Attention.matmul = original  # type: ignore[method-assign]


def _interface_tap(
    model: nn.Module, calls: list[Captured], running: Running, sdpa: _SdpaTap
) -> Any:
    """The interface route, or nothing if no Hugging Face model can be in this process."""
    modeling = sys.modules.get("transformers.modeling_utils")
    interface = getattr(modeling, "AttentionInterface", None)
    if interface is None or not hasattr(interface, "get_interface"):
        return nullcontext()
    return _wrapped_interface(interface, model, (calls, running), sdpa)


@contextmanager
def _wrapped_interface(
    interface: Any,
    model: nn.Module,
    lists: tuple[list[Captured], Running],
    sdpa: _SdpaTap,
) -> Iterator[None]:
    calls, running = lists
    names = {module: name for name, module in model.named_modules()}
    original = interface.get_interface

    def get_interface(self: Any, implementation: str | None, default: Any) -> Any:
        inner = original(self, implementation, default)
        known = implementation in ("sdpa", "regard") or inner is default

        # The signature is Hugging Face's; **kwargs is theirs to fill, and `_read` checks it.
        def attend(
            module: nn.Module,
            query: Tensor,
            key: Tensor,
            value: Tensor,
            attention_mask: Any,
            **kwargs: Any,
        ) -> Any:
            if module not in names:
                return inner(module, query, key, value, attention_mask, **kwargs)
            if not known:
                raise CaptureError(
                    f"layer '{names[module]}' runs attention implementation '{implementation}', "
                    "whose masks cannot be read here; what works: "
                    "model.set_attn_implementation('sdpa') or 'eager'"
                )
            wanted = {"output_attentions": True} if implementation == "regard" else {}
            with sdpa.muted():
                result = inner(module, query, key, value, attention_mask, **{**kwargs, **wanted})
            asked = kwargs.get("is_causal")
            asked = getattr(module, "is_causal", True) if asked is None else asked
            # sdpa turns the flag into a triangle only without a mask and for more than one query;
            # eager code never reads it (integrations/sdpa_attention.py, is_causal).
            triangle = inner is not default and attention_mask is None and query.shape[2] > 1
            causal = bool(asked) and triangle
            tensors = (query, key, value)
            call = _read_interface(names[module], tensors, attention_mask, causal, kwargs)
            if isinstance(result[1], Attention):  # of regard, which reads words that others ignore
                call = replace(call, **own.pairs(result[1]))
            call = replace(call, output=kept(result[0].transpose(1, 2)))
            here = running[-1] if running else None
            calls.append(here.completed(call) if here and here.module is module else call)
            return result

        return attend

    interface.get_interface = get_interface
    try:
        yield
    finally:
        interface.get_interface = original


def _read_interface(
    name: str,
    tensors: tuple[Tensor, Tensor, Tensor],
    mask: Any,
    causal: bool,
    kwargs: Mapping[str, Any],
) -> Captured:
    query, key, _ = tensors
    given = {word for word, argument in kwargs.items() if argument is not None}
    if unknown := given - HARMLESS - READ:
        raise CaptureError(
            f"layer '{name}' passes {', '.join(sorted(unknown))} to its attention, which this "
            "version cannot record; the captured numbers would not be the model's"
        )
    window = kwargs.get("sliding_window")
    if window is not None and mask is None and key.shape[2] > window:
        raise CaptureError(
            f"layer '{name}' attends within a window of {window} over {key.shape[2]} keys but "
            "passes no mask that says so; what works: model.set_attn_implementation('sdpa')"
        )
    scale = kwargs.get("scaling")
    rule = isinstance(mask, Mask)  # of regard, whose matrix says more
    call = record(name, tensors, None if rule else mask, dropout=kwargs.get("dropout") or 0.0)
    bias, extra = call.bias, kwargs.get("position_bias")
    if extra is not None:
        bias = kept(extra) if bias is None else bias + extra.detach()
    sinks = kwargs.get("s_aux")
    return replace(
        call,
        route="interface",
        scale=query.shape[-1] ** -0.5 if scale is None else float(scale),
        causal=causal,
        bias=bias,
        sinks=None if sinks is None else kept(sinks.reshape(-1)),
        softcap=kwargs.get("softcap"),
    )


_SDPA = inspect.signature(scaled_dot_product_attention)


class _SdpaTap(TorchFunctionMode):
    """Records calls of `F.scaled_dot_product_attention` under the innermost open module's name."""

    def __init__(self, calls: list[Captured], running: Running) -> None:
        super().__init__()
        self._calls = calls
        self._running = running
        self._silent = 0

    @property
    def is_muted(self) -> bool:
        """Whether an outer call is being recorded."""
        return self._silent > 0

    @contextmanager
    def muted(self) -> Iterator[None]:
        self._silent += 1
        try:
            yield
        finally:
            self._silent -= 1

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        # No open module: the call is made by somebody else while the tap is open.
        if self._running and not self._silent:
            if func is F.scaled_dot_product_attention:
                return self._attend(*args, **kwargs)
            if func is F.multi_head_attention_forward:
                return self._multi_head(args, kwargs)
        return func(*args, **kwargs)

    def _attend(self, *args: Any, **kwargs: Any) -> Tensor:
        """The call itself, read with torch's signature."""
        with self.muted():
            output = F.scaled_dot_product_attention(*args, **kwargs)
        given = _SDPA.bind(*args, **kwargs)
        given.apply_defaults()
        query, key, value, mask, dropout, causal, scale, _ = given.arguments.values()
        tensors = (four_axes(query), four_axes(key), four_axes(value))
        here = self._running[-1]
        call = record(here.name, tensors, mask, dropout=dropout)
        scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
        call = replace(call, scale=scale, causal=causal, output=kept(four_axes(output)))
        self._calls.append(here.completed(call))
        return output

    def _multi_head(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the body of nn.MultiheadAttention so that its sdpa call is seen.

        The public function, called under a mode, hands itself to the mode as a whole. Its code
        object is run with `has_torch_function` answering False instead. A caller who asks for the
        weights gets them from an untouched call; the sdpa call is then made only for the record,
        which therefore has no output of the model's own.
        """
        whole = F.multi_head_attention_forward
        bound = inspect.signature(whole).bind(*args, **kwargs)
        bound.apply_defaults()
        wanted = bound.arguments["need_weights"]
        bound.arguments["need_weights"] = False
        body = types.FunctionType(
            whole.__code__,
            {**whole.__globals__, "has_torch_function": lambda *_: False},
            whole.__name__,
            whole.__defaults__,
            whole.__closure__,
        )
        before = len(self._calls)
        with self:
            result = body(*bound.args, **bound.kwargs)
        if not wanted:
            return result
        self._calls[before:] = [replace(call, output=None) for call in self._calls[before:]]
        return whole(*args, **kwargs)
