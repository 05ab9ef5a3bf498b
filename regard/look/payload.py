"""A scene as the numbers that travel inside the page.

Query, key, value, the model's own head outputs and logsumexp travel, all of length n; the page
computes weights from them. The n x n weights never travel: above `POOLED_ABOVE` tokens the whole
map is two pooled planes per head, computed here in tiles.
"""

from __future__ import annotations

import math
import sys
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from regard.errors import ShapeError
from regard.form.looks import Pool
from regard.look import kinds, visible
from regard.look.record import Captured
from regard.look.scene import Scene, Tokens
from regard.look.statistics import HeadStatistics, of_call
from regard.look.store import Store
from regard.look.titles import names_of, of_both
from regard.matrix import Attention

SINGLE_BYTES = 16 * 2**20  # up to here float32 travels, beyond it float16
PAGE_BYTES = 64 * 2**20  # browsers open larger pages, but slowly, and mail does not carry them
POOLED_ABOVE = 1024
STREAMED_ABOVE = 16384  # a server makes no page of all maps of so many tokens: minutes per layer
SIGNS_PER_BYTE = 16 / 13  # at most: arrays are also deflated, which no estimate counts on
_PLANE_CELLS = 160  # a plane has at most this many blocks per side
ROWS_COMPARED = 2048  # of a long input, for the error that rounding makes
MIXING_NUMBERS = 2**20  # of all W^o together, which travel in float16: about 2.5 MB
_ROWS = 256  # rows per tile where weights are compared


def payload(scene: Scene) -> dict[str, Any]:
    """Everything the page reads, ready for `json.dumps`.

    Raises ShapeError if the page would be larger than `PAGE_BYTES`, naming what would fit.
    """
    assert sys.byteorder == "little", "typed arrays in a page are little-endian"
    dtype, size = _precision(scene)
    _check_size(scene, size)
    store, worst = Store(), 0.0
    mixes = (
        dtype == torch.float32
        and sum(call.mixing.weight.numel() for call in _calls(scene) if call.mixing is not None)
        <= MIXING_NUMBERS
    )
    runs = []
    for run in _runs(scene):
        layers = []
        for call in run.captured:
            rounded = _rounded(call, dtype)
            if dtype == torch.float16:
                worst = max(worst, _weight_error(call, rounded))
            told = _layer(call, rounded, dtype, run.tokens, store)
            layers.append({**told, **_around(call, dtype, mixes, store)})
        runs.append(layers)
    tokens, beside = scene.tokens, scene.beside
    return {
        "title": scene.title,
        "tokens": {
            "labels": tokens.labels,
            "joined": tokens.joined,
            "special": tokens.special,
            "total": tokens.total,
        },
        "change": scene.change,
        "notes": scene.notes,
        "pooling": scene.pooling,
        "dtype": scene.dtype,
        "image": _image(scene),
        "precision": {
            "travels": str(dtype).removeprefix("torch."),
            "weightError": worst if dtype == torch.float16 else None,
            "allRows": all(call.query.shape[2] <= ROWS_COMPARED for call in scene.captured),
        },
        "kinds": [asdict(kind) for kind in kinds.KINDS],
        "aboveChance": kinds.ABOVE_CHANCE,
        "errorsAbove": kinds.ERRORS_ABOVE,
        "layers": runs[0],
        "beside": beside
        and {
            "title": of_both(scene),
            "names": names_of(scene),
            "labels": beside.tokens.labels,
            "layers": runs[1],
        },
        "arrays": store.arrays,
    }


def is_streamed(scene: Scene) -> bool:
    """Whether a server computes a scene's maps: a page of all would be slow, or too large."""
    if max(map(_length, _calls(scene))) > STREAMED_ABOVE:
        return True
    return _spent(scene, _precision(scene)[1]) > PAGE_BYTES


def _precision(scene: Scene) -> tuple[torch.dtype, int]:
    """What numbers travel in, and their bytes."""
    numbers = sum(t.numel() for call in _calls(scene) for t in _travelling(call, True))
    if 4 * numbers <= SINGLE_BYTES:
        return torch.float32, 4 * numbers
    # Inputs and outputs stay behind; outputs are compared here.
    numbers = sum(t.numel() for call in _calls(scene) for t in _travelling(call, False))
    return torch.float16, 2 * numbers


def _runs(scene: Scene) -> list[Scene]:
    return [scene] if scene.beside is None else [scene, scene.beside]


def _calls(scene: Scene) -> list[Captured]:
    """The calls of all runs."""
    return [call for run in _runs(scene) for call in run.captured]


def _image(scene: Scene) -> dict[str, Any] | None:
    image = scene.image
    if image is None:
        return None
    places = {name: getattr(image, name) for name in ("rows", "columns", "prefix", "length")}
    return {**places, "png": image.png()}


def _travelling(call: Captured, outputs: bool) -> list[Tensor]:
    tensors = [call.query, call.key, call.value, _bias(call)[1]]
    tensors += [call.output, call.inputs, call.memory] if outputs else []
    return [tensor for tensor in tensors if tensor is not None]


def _pooled(scene: Scene) -> int:
    """Bytes of the planes of all heads."""
    long = (call for call in _calls(scene) if _length(call) > POOLED_ABOVE)
    return sum(2 * 2 * _PLANE_CELLS**2 * call.query.shape[1] for call in long)


def _spent(scene: Scene, size: int) -> float:
    return (size + _pooled(scene)) * SIGNS_PER_BYTE


def _check_size(scene: Scene, size: int) -> None:
    calls, pooled = scene.captured, _pooled(scene)
    spent, allowed = _spent(scene, size), PAGE_BYTES
    if spent <= allowed:
        return
    length = max(map(_length, calls))
    layers = int(len(calls) * allowed / spent)
    ways = [f"--tokens {_tokens_that_fit(size, pooled, length)}"]
    if layers > 0:
        ways.append(f"--layers {','.join(map(str, range(layers)))} (any {layers} of them)")
    else:
        one = _tokens_that_fit(size / len(calls), pooled / len(calls), length)
        ways.append(f"--layers 0 --tokens {one} (any one layer)")
    raise ShapeError(
        f"the page would take about {spent / 2**20:.0f} MB for {len(calls)} layers of {length} "
        f"tokens; the limit is {allowed / 2**20:.0f} MB. What would fit: {' or '.join(ways)}; "
        "--serve shows any length"
    )


def _tokens_that_fit(size: float, pooled: float, length: int) -> int:
    """How many tokens fit if `length` take `size` bytes, with or without `pooled` planes."""
    allowed = PAGE_BYTES / SIGNS_PER_BYTE
    plain = min(POOLED_ABOVE, int(length * allowed / size))
    return max(1, plain, int(length * (allowed - pooled) / size))


def _length(call: Captured) -> int:
    return max(call.query.shape[2], call.key.shape[2])


def _rounded(call: Captured, dtype: torch.dtype) -> Captured:
    """The call with the numbers that travel, so that the page's rows sum to 1 exactly."""
    if dtype == torch.float32:
        return call
    largest = max(float(x.abs().max()) for x in _travelling(call, False) if x.numel())
    if largest > torch.finfo(dtype).max:
        raise ShapeError(
            f"layer '{call.name}' holds {largest:g}, which float16 cannot; look at fewer tokens "
            "or layers, so that the page may keep float32"
        )

    def through(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(dtype).float()

    query, key = call.query.to(dtype).float(), call.key.to(dtype).float()
    return replace(
        call,
        query=query,
        key=key,
        value=through(call.value),
        bias=through(call.bias),
    )


def _weight_error(call: Captured, rounded: Captured) -> float:
    """The largest difference that rounding makes to any weight of the rows that are compared.

    All rows, or of a long input evenly spread ones.
    """
    exact, near = call.matrix, rounded.matrix
    worst = 0.0
    rows = torch.arange(0, call.query.shape[2], -(-call.query.shape[2] // ROWS_COMPARED))
    for some in rows.split(_ROWS):
        worst = max(worst, float((_weights(exact, some) - _weights(near, some)).abs().max()))
    return worst


def _weights(matrix: Attention, rows: Tensor) -> Tensor:
    taken = matrix[..., rows, :]
    assert isinstance(taken, Tensor)
    return taken


def _layer(
    call: Captured, rounded: Captured, dtype: torch.dtype, tokens: Tokens, store: Store
) -> dict[str, Any]:
    _, heads, n, d = call.query.shape
    kv_heads, m = call.key.shape[1:3]
    single = dtype == torch.float32
    toeplitz, bias = _bias(rounded)
    spans, bits = visible.spans_or_bits(call)
    size = _plane_size(call) if _length(call) > POOLED_ABOVE else None
    found = call.matrix.statistics(pool=size)
    logsumexp = found.logsumexp if rounded is call else rounded.matrix.logsumexp()

    def kept(tensor: Tensor | None) -> int | None:
        return store.add(None if tensor is None else tensor.to(dtype))

    return {
        "name": call.name or "the model itself",
        "number": call.number,
        "route": call.route,
        "heads": heads,
        "kvHeads": kv_heads,
        "n": n,
        "m": m,
        "d": d,
        "e": 0 if call.value is None else call.value.shape[-1],
        "scale": call.scale,
        "softcap": call.softcap,
        "formula": call.formula,
        "causal": call.causal,
        "query": kept(call.query),
        "key": kept(call.key),
        "value": kept(call.value),
        "output": kept(call.output) if single else None,
        "inputs": kept(call.inputs) if single else None,
        "width": 0 if call.inputs is None else call.inputs.shape[-1],
        "madeBy": call.made_by,
        "steps": call.steps,
        "gap": None if single else store.add(_gap(call)),
        "logsumexp": store.add(logsumexp.float()),
        "sinks": store.add(call.sinks),
        "spans": store.add(spans),
        "bits": store.add(bits),
        "bias": kept(bias),
        "biasToeplitz": toeplitz,
        "received": None if size is None else kept(found.received[0]),
        "moved": None if size is None else kept(_moved(rounded)),
        "statistics": _statistics(of_call(call, tokens, found)),
        "planes": None if size is None else _planes(call, found.pool, size, store),
    }


def _around(call: Captured, dtype: torch.dtype, mixes: bool, store: Store) -> dict[str, Any]:
    """What stands before and after the heads: the other sequence, rotary angles, W^o."""
    memory, turned, mixing = call.memory, call.turned, call.mixing
    return {
        "memory": store.add(memory) if dtype == torch.float32 else None,
        "memoryOf": call.memory_of,
        "memoryWidth": 0 if memory is None else memory.shape[-1],
        "turned": turned
        and {
            "layout": turned.layout,
            "pairs": turned.query.shape[-1],
            "query": store.add(turned.query),
            "key": store.add(turned.key),
            "factors": turned.factors,
            "gap": turned.gap,
            "madeBy": turned.made_by,
            "own": turned.own,
        },
        "unturned": call.unturned,
        "mixing": mixing
        and {
            "name": mixing.name,
            "width": mixing.weight.shape[0],
            "numbers": mixing.weight.numel(),
            "weight": store.add(mixing.weight.half()) if mixes else None,
            "bias": store.add(mixing.bias.float()) if mixes and mixing.bias is not None else None,
        },
    }


def _gap(call: Captured) -> Tensor | None:
    """The largest difference in each row between the model's output and A v, [heads, n]."""
    if call.value is None or call.output is None:
        return None
    found: Tensor = call.matrix @ call.value
    return (found - call.output).abs().amax(-1)[0]


def _moved(call: Captured) -> Tensor | None:
    """sum_j alpha_ij |v_j|, [heads, n]: what the view of values divides by."""
    if call.value is None:
        return None
    found: Tensor = call.matrix @ call.value.norm(dim=-1, keepdim=True)
    return found[0, ..., 0]


def _bias(call: Captured) -> tuple[bool, Tensor | None]:
    """The bias as [1 or heads, n, m], or, where it depends on j - i alone, as [.., n + m - 1].

    A Toeplitz bias is its first column from the last row up, then its first row.
    """
    if call.bias is None:
        return False, None
    n, m = call.query.shape[2], call.key.shape[2]
    bias = call.bias[0].expand(call.bias.shape[1], n, m)
    if n > 1 and m > 1 and torch.equal(bias[:, 1:, 1:], bias[:, :-1, :-1]):
        return True, torch.cat([bias[:, :, 0].flip(-1), bias[:, 0, 1:]], dim=-1)
    return False, bias


def _plane_size(call: Captured) -> int:
    """The side of a plane's blocks."""
    return 8 * math.ceil(_length(call) / _PLANE_CELLS / 8)


def _planes(call: Captured, pool: Pool | None, size: int, store: Store) -> dict[str, Any]:
    """The whole map in blocks: mean weight per visible cell, and largest weight.

    float16 keeps three digits of a mean; weights below 6e-8 become 0, a lift of 2e-4 at 4096.
    """
    assert pool is not None
    share = visible.share(call, size)  # [1 or heads, rows, columns]
    mean = pool.mean[0] / share
    largest = torch.where(share > 0, pool.max[0], torch.nan)
    return {
        "size": size,
        "rows": mean.shape[-2],
        "columns": mean.shape[-1],
        "mean": store.add(mean.half()),
        "max": store.add(largest.half()),
    }


def _statistics(found: HeadStatistics) -> dict[str, Any]:
    """Lists of one number per head; None where a call has no such number."""
    numbers = {
        name: None if tensor is None else tensor.tolist()
        for name, tensor in vars(found).items()
        if tensor is None or isinstance(tensor, Tensor)
    }
    scores = {
        x.kind.name: {
            "score": x.score.tolist(),
            "chance": x.chance.tolist(),
            "error": x.error.tolist(),
            "queries": x.queries,
        }
        for x in found.scores
    }
    return {**numbers, "kinds": found.kinds, "scores": scores}
