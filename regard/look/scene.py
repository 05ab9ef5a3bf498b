"""What a page shows: the captured calls of one sequence, its tokens, and what is known about both.

A scene comes from a PyTorch model and its input (`of_model`), or from arrays (`of_arrays`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from regard.errors import DtypeError, ShapeError
from regard.look.capture import taps
from regard.look.image import Image, of_inputs
from regard.look.record import Captured, CaptureError


@dataclass(frozen=True, eq=False)
class Tokens:
    """The tokens of a sequence, as they are read.

    labels: one string per token
    joined: True where a token continues the one before it without a space
    special: True where the tokenizer added the token ([CLS], <s>)
    total: how many tokens the input had; more than len(labels) if only the first ones are shown
    """

    labels: tuple[str, ...] = ()
    joined: tuple[bool, ...] = ()
    special: tuple[bool, ...] = ()
    total: int = 0

    @classmethod
    def of_labels(cls, labels: Sequence[object]) -> Tokens:
        """Plain labels, none of them special."""
        texts = tuple(str(label) for label in labels)
        plain = (False,) * len(texts)
        return cls(labels=texts, joined=plain, special=plain, total=len(texts))


@dataclass(frozen=True, eq=False)
class Scene:
    """Everything that a page says, before it is laid out.

    title: the model's name, or the file's
    captured: one sequence per call, in float32
    change: largest difference between the model's outputs with and without the capture, 0.0 if
        every bit is equal; None if no model ran here
    notes: sentences the reader must know, such as which part of a long text is shown
    pooling: how the model makes one vector of its token vectors, if its files say so
    dtype: what the model computed in
    image: the picture that the model was given, if its tokens are patches of one
    beside: another run, whose calls have the shapes of these
    label: what the reader calls this run, "" for its title
    sources: the paths it was read from: the model's, and that of the text or the arrays
    """

    title: str
    captured: tuple[Captured, ...]
    tokens: Tokens = field(default_factory=Tokens)
    change: float | None = None
    notes: tuple[str, ...] = ()
    pooling: str | None = None
    dtype: str = "float32"
    image: Image | None = None
    beside: Scene | None = None
    label: str = ""
    sources: tuple[str, ...] = ()

    def placed_beside(self, other: Scene) -> Scene:
        """The scene with another run beside it; raises ShapeError unless their shapes agree."""
        shapes = [
            [(call.query.shape[1], *_lengths(call)) for call in scene.captured]
            for scene in (self, other)
        ]
        if shapes[0] != shapes[1]:
            mine, theirs = (f"{len(s)} layers of {sorted(set(s))}" for s in shapes)
            raise ShapeError(
                f"two runs are compared cell by cell, so their (heads, queries, keys) must agree; "
                f"this one has {mine}, the one beside it {theirs}. limit= (--tokens) or layers= "
                "(--layers) make them agree, or a text of as many tokens"
            )
        return replace(self, beside=replace(other, beside=None))


def of_model(
    model: nn.Module,
    inputs: Any,
    *,
    tokens: Tokens | None = None,
    layers: Sequence[int] | None = None,
    title: str | None = None,
) -> Scene:
    """Run a model twice, once plainly and once with its attention calls recorded.

    inputs: a tensor, a tuple of positional arguments, or a mapping of keyword arguments
    tokens: labels for every axis of their length
    layers: which calls to keep, counted from 0; all of them by default

    Raises CaptureError if the model is in training mode or if nothing could be recorded.
    """
    if model.training:
        raise CaptureError(
            "the model is in training mode, where dropout changes every run; call model.eval()"
        )
    with torch.no_grad():
        plain = _run(model, inputs)
        calls: list[Captured] = []
        with taps(model, calls):
            seen = _run(model, inputs)
    first = calls[0].key.shape[2] if calls else 0
    image = of_inputs(model, inputs, first)
    if image is not None and tokens is None:
        tokens = Tokens.of_labels(image.labels())
        tokens = replace(tokens, special=tuple(at < image.prefix for at in range(image.length)))
    name = type(model).__name__
    scene = of_calls(name, calls, tokens=tokens, layers=layers)
    change = _largest_change(plain, seen)
    return replace(scene, title=title or name, change=change, image=image)


def of_calls(
    name: str,
    calls: Sequence[Captured],
    *,
    tokens: Tokens | None = None,
    layers: Sequence[int] | None = None,
) -> Scene:
    """A scene of what was captured: the first sequence of each call.

    name: of the model;  tokens, layers: see `of_model`
    Raises CaptureError if there is nothing that a page shows.
    """
    calls = _readable(name, calls)
    batch = calls[0].query.shape[0]
    notes = [f"The input was a batch of {batch}; this is its first sequence."] if batch > 1 else []
    notes += [
        f"Not shown: {call.number} {call.name}, which {call.formula} normalizes, not softmax."
        for call in calls
        if call.given is not None
    ]
    calls = [call for call in calls if call.given is None]
    return Scene(
        title=name,
        captured=tuple(call.item(0) for call in _chosen(calls, layers)),
        tokens=_checked(tokens, calls),
        notes=tuple(notes),
        dtype=str(calls[0].query.dtype).removeprefix("torch."),
    )


def of_arrays(
    arrays: Mapping[str, Any],
    *,
    causal: bool = False,
    limit: int | None = None,
    layers: Sequence[int] | None = None,
    title: str = "arrays",
) -> Scene:
    """A scene from tensors or NumPy arrays.

    arrays: `query` and `key`, optionally `value` and `tokens`. Shapes [n, d], [heads, n, d] or
        [layers, heads, n, d]; key and value may have fewer heads than query (a divisor).
    causal: key j is visible to query i only if j <= i
    limit: keep the first `limit` queries and keys

    Raises ShapeError or DtypeError naming the array that does not fit.

    >>> scene = of_arrays({"query": torch.randn(4, 8), "key": torch.randn(4, 8)}, causal=True)
    >>> len(scene.captured), scene.captured[0].query.shape
    (1, torch.Size([1, 1, 4, 8]))
    """
    if missing := {"query", "key"} - set(arrays):
        raise ShapeError(
            f"the arrays need the names query and key; missing: {', '.join(sorted(missing))}; "
            f"found: {', '.join(sorted(arrays)) or 'none'}"
        )
    if extra := set(arrays) - {"query", "key", "value", "tokens"}:
        raise ShapeError(
            f"arrays named {', '.join(sorted(extra))} have no meaning here; "
            "read are query, key, value and tokens"
        )
    stacks = {n: _stack(n, arrays[n]) for n in ("query", "key", "value") if n in arrays}
    _check_stacks(stacks, causal)
    total = stacks["key"].shape[2]
    if limit is not None:
        stacks = {name: stack[:, :, :limit] for name, stack in stacks.items()}
    labels = [str(token) for token in _listed(arrays.get("tokens", ()))]
    if labels and len(labels) not in (total, arrays["query"].shape[-2]):
        raise ShapeError(
            f"tokens has {len(labels)} entries, but there are {total} keys and "
            f"{arrays['query'].shape[-2]} queries"
        )
    shown = Tokens.of_labels(labels[:limit])
    kept = min(total, limit or total)
    notes = () if kept == total else (f"There are {total} keys; the first {kept} are shown.",)
    return Scene(
        title=title,
        captured=_chosen(_array_calls(stacks, causal), layers),
        tokens=replace(shown, total=total),
        notes=notes,
    )


def _array_calls(stacks: Mapping[str, Tensor], causal: bool) -> list[Captured]:
    """One call per layer of checked stacks [layers, heads, length, width]."""
    return [
        Captured(
            name=f"layer {index}",
            route="arrays",
            query=query[None],
            key=stacks["key"][index][None],
            value=stacks["value"][index][None] if "value" in stacks else None,
            mask=None,
            scale=float(query.shape[-1]) ** -0.5,
            causal=causal,
            number=index,
        )
        for index, query in enumerate(stacks["query"])
    ]


def _readable(name: str, calls: Sequence[Captured]) -> list[Captured]:
    """The calls with their numbers; raises CaptureError if there is nothing that a page shows."""
    if not calls:
        raise CaptureError(
            f"{name} ran, but none of its attention could be recorded. Readable are Hugging Face "
            "models that use AttentionInterface, any module that calls "
            "F.scaled_dot_product_attention or nn.MultiheadAttention, layers of regard.nn, and "
            "other products with matrices of regard's. Attention code of a model's own can be "
            "looked at as arrays: look({'query': q, 'key': k, 'value': v})."
        )
    if empty := [call for call in calls if 0 in (*call.query.shape[:3], *call.key.shape[:3])]:
        raise CaptureError(
            f"layer '{empty[0].name}' of {name} compares {tuple(empty[0].query.shape)} queries "
            f"with {tuple(empty[0].key.shape)} keys, so there is no weight to look at; give an "
            "input of at least one token"
        )
    if all(call.given is not None for call in calls):
        raise CaptureError(
            f"every attention of {name} is normalized by {calls[0].formula}, and a page shows "
            "softmax weights. In Python: with regard.look's capture(model) as calls, each call's "
            "matrix has rows, topk, received, pool and statistics."
        )
    return [replace(call, number=number) for number, call in enumerate(calls)]


def _run(model: nn.Module, inputs: Any) -> Any:
    if isinstance(inputs, str):
        raise DtypeError(
            "a model's inputs are a tensor, a tuple of arguments or a mapping of keyword "
            "arguments, not a text; tokenize it first: tokenizer(text, return_tensors='pt')"
        )
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def _chosen(calls: Sequence[Captured], layers: Sequence[int] | None) -> tuple[Captured, ...]:
    if layers is None:
        return tuple(calls)
    numbered = {call.number: call for call in calls}
    if wrong := [layer for layer in layers if layer not in numbered]:
        known = f"0 to {len(calls) - 1}"
        if list(numbered) != list(range(len(calls))):
            known = ", ".join(map(str, numbered))
        raise ShapeError(
            f"layers {', '.join(map(str, wrong))} were asked for; the numbers of attention layers "
            f"here are {known}"
        )
    return tuple(numbered[layer] for layer in sorted(set(layers)))


def _checked(tokens: Tokens | None, calls: Sequence[Captured]) -> Tokens:
    if tokens is None:
        length = calls[0].key.shape[2]
        return Tokens(total=length)
    lengths = sorted({length for call in calls for length in _lengths(call)})
    if any(call.steps for call in calls) and len(tokens.labels) == lengths[-1] + 1:
        # The last token of a generation: it was made, and no step has read it.
        kept = lengths[-1]
        return Tokens(tokens.labels[:kept], tokens.joined[:kept], tokens.special[:kept], kept)
    if len(tokens.labels) not in lengths:
        raise ShapeError(
            f"{len(tokens.labels)} tokens were given, but the model's attention has lengths "
            f"{', '.join(map(str, lengths))}"
        )
    return tokens


def _lengths(call: Captured) -> tuple[int, int]:
    return call.query.shape[2], call.key.shape[2]


def _stack(name: str, array: Any) -> Tensor:
    """[n, d], [heads, n, d] or [layers, heads, n, d] -> float32 [layers, heads, n, d]."""
    try:
        tensor = torch.as_tensor(array)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DtypeError(f"{name} cannot be read as an array of numbers: {error}") from error
    if not tensor.is_floating_point():
        raise DtypeError(f"{name} has dtype {tensor.dtype}; a floating point dtype is needed")
    if not 2 <= tensor.dim() <= 4 or 0 in tensor.shape:
        raise ShapeError(
            f"{name} has shape {tuple(tensor.shape)}; what works: [n, d], [heads, n, d] or "
            "[layers, heads, n, d], none of them 0"
        )
    if not bool(tensor.isfinite().all()):
        raise ShapeError(f"{name} holds numbers that are not finite")
    return tensor.detach().float().reshape(*(1,) * (4 - tensor.dim()), *tensor.shape).contiguous()


def _check_stacks(stacks: Mapping[str, Tensor], causal: bool) -> None:
    query, key = stacks["query"], stacks["key"]
    shapes = ", ".join(f"{name} {tuple(stack.shape)}" for name, stack in stacks.items())
    given = f"as [layers, heads, length, width] they are {shapes}"
    if query.shape[3] != key.shape[3]:
        raise ShapeError(f"query and key must have the same width; {given}")
    for name, stack in stacks.items():
        if stack.shape[0] != query.shape[0]:
            raise ShapeError(f"{name} must have as many layers as query; {given}")
        if query.shape[1] % stack.shape[1]:
            raise ShapeError(f"the heads of {name} must divide the heads of query; {given}")
    value = stacks.get("value")
    if value is not None and value.shape[1:3] != key.shape[1:3]:
        raise ShapeError(f"value must have the heads and length of key; {given}")
    if causal and query.shape[2] != key.shape[2]:
        raise ShapeError(f"causal needs as many keys as queries, or an offset is a guess; {given}")


def _listed(tokens: Any) -> list[Any]:
    return list(tokens.tolist()) if hasattr(tokens, "tolist") else list(tokens)


def _largest_change(before: Any, after: Any) -> float:
    """The largest absolute difference between two outputs; 0.0 only if all bits are equal."""
    pairs = list(zip(_tensors(before), _tensors(after), strict=True))
    if not pairs:
        raise CaptureError("the model returned no tensor, so its output cannot be compared")
    worst = 0.0
    for left, right in pairs:
        if not torch.equal(left, right):
            difference = (left.double() - right.double()).abs()
            # NaN in the same place is no change; NaN in one place only must not be lost by max.
            difference[left.isnan() & right.isnan()] = 0.0
            worst = max(worst, float(difference.nan_to_num(nan=torch.inf).max()))
    return worst


def _tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, Mapping):
        output = tuple(output.values())
    if isinstance(output, list | tuple):
        return [tensor for part in output for tensor in _tensors(part)]
    return []
