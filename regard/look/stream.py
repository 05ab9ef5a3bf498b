"""A map of any length, computed where it is looked at: what the server answers to its page."""

from __future__ import annotations

import math
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from regard.errors import ShapeError
from regard.look import visible
from regard.look.paired import Paired
from regard.look.record import Captured
from regard.look.sampled import Estimate, Region, typical_error
from regard.look.scene import Scene
from regard.look.spot import spot_of
from regard.look.titles import names_of, of_both

BLOCKS = 128  # per side of the map, at most
ROWS = 64  # computed before anybody may ask for something else: 32 MiB at 131,072 keys
KEPT = 24  # regions, of which the one looked at longest ago goes first
PATIENCE = 20.0  # seconds for which a region is refined after anybody asked for it
WAIT = 8.0  # seconds for which an answer waits for news
THUMB = 32  # blocks per side of the small picture of a head
TOP = 12  # keys in the table of one query


class Stream:
    """Answers about a scene, while a thread refines the region that was asked for last.

    scene: its calls may have any length; of two runs, both are computed from the same queries
    Raises nothing; `close` ends the thread.
    """

    def __init__(self, scene: Scene) -> None:
        self._scene = scene
        self._regions: OrderedDict[Region, Estimate | Paired] = OrderedDict()
        self._current: Region | None = None
        self._asked = 0.0
        self._heads = [(c.number, head) for c in scene.captured for head in range(c.query.shape[1])]
        self._thumbs: list[dict[str, Any]] = []
        self._thumbs_asked = -math.inf
        self._is_thumbs_turn = True
        self._news = threading.Condition()
        self._closed = False
        self._failed: Exception | None = None
        self._thread = threading.Thread(target=self._refine, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread, after the rows that it is computing."""
        with self._news:
            self._closed = True
            self._news.notify_all()
        self._thread.join()

    def answer(self, what: str, given: Mapping[str, str]) -> dict[str, Any] | None:
        """The answer to a request of the page; None if nothing has this name.

        Raises ShapeError for numbers that are missing or out of range.
        """
        ask = {
            "map": self._map,
            "cell": self._cell,
            "row": self._row,
            "heads": self._small,
            "find": self._find,
        }.get(what)
        return None if ask is None else ask(given)

    def _map(self, given: Mapping[str, str]) -> dict[str, Any]:
        """Blocks of a square view, once more queries are there than the `seen` of the page."""
        layer, head, top, left, span, seen = _numbers(
            given, "layer", "head", "top", "left", "span", "seen"
        )
        call = spot_of(self._scene, layer, head, 0, 0).call
        n, m = call.query.shape[2], call.key.shape[2]
        if not (0 <= top < n and 0 <= left < m and span > 0):
            raise ShapeError(
                f"no view of {span} cells begins at {top}, {left} in {n} queries x {m} keys"
            )
        size = math.ceil(min(span, max(n, m)) / BLOCKS)
        rows, columns = min(span, n - top), min(span, m - left)
        region = Region(layer, head, top, left, rows, columns, size)
        end = time.monotonic() + WAIT
        with self._news:
            self._asked = time.monotonic()
            self._current = region
            self._news.notify_all()
            while time.monotonic() < end and not self._has_news(region, seen):
                self._news.wait(end - time.monotonic())
            if self._failed is not None:
                raise ShapeError(f"the map could not be computed: {self._failed}")
            estimate = self._regions.get(region)
        told = {**_told(region, estimate), "labels": _labels_of(self._scene, region, (n, m))}
        if isinstance(estimate, Paired) and "mean" in told:
            other = _labels_of(self._scene.beside, region, (n, m))
            told["beside"] = {**_difference(estimate), "labels": other}
        return told

    def _small(self, given: Mapping[str, str]) -> dict[str, Any]:
        """The small pictures of heads that are there, once there are more than `seen`."""
        (seen,) = _numbers(given, "seen")
        end = time.monotonic() + WAIT
        with self._news:
            self._thumbs_asked = time.monotonic()
            self._news.notify_all()
            while time.monotonic() < end and len(self._thumbs) <= seen < len(self._heads):
                if self._closed or self._failed:
                    break
                self._news.wait(end - time.monotonic())
            return {"of": len(self._heads), "thumbs": self._thumbs[max(0, seen) :]}

    def _has_news(self, region: Region, seen: int) -> bool:
        estimate = self._regions.get(region)
        if self._closed or self._failed or self._current != region:
            return True
        if estimate is None or estimate.taken < estimate.first:
            return False
        # A drawing costs the page some milliseconds: it is told of a tenth more, not of each row.
        return estimate.is_exact or estimate.taken >= 1.1 * seen

    def _refine(self) -> None:
        """The thread: rows of the region that is looked at, until it is exact."""
        while True:
            with self._news:
                while not (self._closed or self._has_work() or self._lacks_thumbs()):
                    self._news.wait(1.0)
                if self._closed:
                    return
                region, is_thumb = self._next()
            try:
                if is_thumb:
                    self._add_thumb()
                elif region is not None and self._has_work():
                    estimate = self._regions.get(region) or self._opened(region)
                    with torch.inference_mode():
                        estimate.advance(ROWS)
            except (RuntimeError, MemoryError, ValueError) as error:
                self._failed = error  # told to the page, which is where somebody waits for it
            with self._news:
                self._news.notify_all()

    def _next(self) -> tuple[Region | None, bool]:
        """The region at hand, and whether a small picture comes before more of it.

        What is looked at has its first queries before any small picture is made; from then on
        they take turns.
        """
        region, estimate = self._current, None
        if region is not None and self._has_work():
            estimate = self._regions.get(region)
            if estimate is None or estimate.taken < estimate.first:
                return region, False
        self._is_thumbs_turn = not self._is_thumbs_turn
        return region, self._lacks_thumbs() and (estimate is None or self._is_thumbs_turn)

    def _lacks_thumbs(self) -> bool:
        wanted = time.monotonic() < self._thumbs_asked + PATIENCE
        return wanted and not self._failed and len(self._thumbs) < len(self._heads)

    def _add_thumb(self) -> None:
        number, head = self._heads[len(self._thumbs)]
        call = spot_of(self._scene, number, head, 0, 0).call
        n, m = call.query.shape[2], call.key.shape[2]
        estimate = Estimate(call, Region(number, head, 0, 0, n, m, -(-max(n, m) // THUMB)))
        with torch.inference_mode():
            estimate.advance(estimate.first)
        self._thumbs.append({"layer": number, "head": head, **_told(estimate.region, estimate)})

    def _has_work(self) -> bool:
        if self._current is None or self._failed or time.monotonic() > self._asked + PATIENCE:
            return False
        estimate = self._regions.get(self._current)
        return estimate is None or not estimate.is_exact

    def _opened(self, region: Region) -> Estimate | Paired:
        call = spot_of(self._scene, region.number, region.head, 0, 0).call
        other = self._other(call)
        estimate = Estimate(call, region) if other is None else Paired((call, other), region)
        with self._news:
            self._regions[region] = estimate
            if len(self._regions) > KEPT:
                self._regions.popitem(last=False)
        return estimate

    def _other(self, call: Captured) -> Captured | None:
        """The call of the run beside this one, if there is one."""
        beside = self._scene.beside
        # Not by number, which is the other model's own: the shapes were compared in this order.
        return None if beside is None else beside.captured[self._scene.captured.index(call)]

    def _beside(self, call: Captured, head: int, i: int, j: int) -> dict[str, Any] | None:
        """The weight of the other run where one of this run is read."""
        other = self._other(call)
        if other is None:
            return None
        seen = visible.at(other, torch.tensor([i]), torch.tensor([j]))
        with torch.inference_mode():
            row = other.matrix[0, head, i]
        assert isinstance(row, Tensor)
        return {
            "weight": float(row[j]) if bool(seen[head % len(seen), 0]) else None,
            "labels": [
                _label(self._scene.beside, at, length)
                for at, length in ((i, other.query.shape[2]), (j, len(row)))
            ],
        }

    def _cell(self, given: Mapping[str, str]) -> dict[str, Any]:
        """One weight, exactly, and the keys to which its query gives most."""
        layer, head, i, j = _numbers(given, "layer", "head", "i", "j")
        call = spot_of(self._scene, layer, head, i, j).call
        with torch.inference_mode():
            row = call.matrix[0, head, i]
            assert isinstance(row, Tensor)
            logit = call.matrix[0, head].logits(slice(i, i + 1), slice(j, j + 1))  # type: ignore[union-attr]
            seen = visible.at(call, torch.tensor([i]), torch.tensor([j]))
            if call.mask is None:
                keys = min(i + 1, len(row)) if call.causal else len(row)
            else:
                keys = int(_row_of(call.mask, head, i, len(row), call.causal).sum())
            top = row.topk(min(TOP, keys))
        return {
            "weight": float(row[j]) if bool(seen[head % len(seen), 0]) else None,
            "logit": float(logit) if bool(logit.isfinite()) else None,
            "keys": keys,
            "entropy": float(torch.special.entr(row.double()).sum()),
            "labels": [
                _label(self._scene, i, call.query.shape[2]),
                _label(self._scene, j, len(row)),
            ],
            "beside": self._beside(call, head, i, j),
            "top": [
                {"key": key, "label": _label(self._scene, key, len(row)), "weight": weight}
                for key, weight in zip(top.indices.tolist(), top.values.tolist(), strict=True)
            ],
        }

    def _row(self, given: Mapping[str, str]) -> dict[str, Any]:
        """All weights of one query, exactly."""
        layer, head, i = _numbers(given, "layer", "head", "i")
        call = spot_of(self._scene, layer, head, i, 0).call
        with torch.inference_mode():
            row = call.matrix[0, head, i]
        assert isinstance(row, Tensor)
        keys = torch.arange(len(row))
        seen = visible.at(call, torch.full_like(keys, i), keys)
        found = torch.where(seen[head % len(seen)], row, torch.nan)
        labels = self._scene.tokens.labels
        known = list(labels) if len(labels) == len(row) else None
        return {"weights": _listed(found), "labels": known}

    def _find(self, given: Mapping[str, str]) -> dict[str, Any]:
        """The next token after `start` that holds the words, and how many do."""
        (start,) = _numbers(given, "start")
        labels, words = self._scene.tokens.labels, given.get("words", "").lower()
        found = [at for at, label in enumerate(labels) if words and words in label.lower()]
        later = [at for at in found if at > start] or found
        return {"at": later[0] if later else None, "count": len(found)}


def _label(scene: Scene | None, at: int, length: int) -> str:
    labels = () if scene is None else scene.tokens.labels
    return labels[at] if len(labels) == length else f"#{at}"


def about(scene: Scene) -> dict[str, Any]:
    """What the page knows before it asks for anything."""
    return {
        "title": scene.title,
        "change": scene.change,
        "arrays": all(call.route == "arrays" for call in scene.captured),
        "notes": scene.notes,
        "blocks": BLOCKS,
        "labelled": len(scene.tokens.labels),
        "beside": scene.beside and {"title": of_both(scene), "names": names_of(scene)},
        "layers": [
            {
                "number": call.number,
                "name": call.name or "the model itself",
                "heads": call.query.shape[1],
                "n": call.query.shape[2],
                "m": call.key.shape[2],
                "masked": call.causal or call.mask is not None,
            }
            for call in scene.captured
        ],
    }


def _row_of(mask: Tensor, head: int, i: int, m: int, causal: bool) -> Tensor:
    row = mask[0, head % mask.shape[1], i % mask.shape[2]].expand(m)
    return row & (torch.arange(m) <= i) if causal else row


def _labels_of(
    scene: Scene | None, region: Region, lengths: tuple[int, int]
) -> list[list[str] | None]:
    """The words of rows and columns, where each cell stands alone and tokens are known."""
    labels = () if scene is None else scene.tokens.labels
    ranges = (region.top, region.rows), (region.left, region.columns)
    return [
        list(labels[start : start + count]) if region.size == 1 and len(labels) == length else None
        for length, (start, count) in zip(lengths, ranges, strict=True)
    ]


def _told(region: Region, found: Estimate | Paired | None) -> dict[str, Any]:
    estimate = found.here if isinstance(found, Paired) else found
    if estimate is None or estimate.taken < estimate.first:
        return {"taken": 0 if estimate is None else estimate.taken, "of": region.rows}
    mean, error = estimate.mean(), estimate.error()
    return {
        "taken": estimate.taken,
        "of": region.rows,
        "exact": estimate.is_exact,
        "size": region.size,
        "top": region.top,
        "left": region.left,
        "rows": mean.shape[0],
        "columns": mean.shape[1],
        "mean": _listed(mean),
        "largest": _listed(estimate.largest()),
        "error": None if estimate.is_exact else _listed(error),
        "keys": estimate.keys.tolist(),
        "typicalError": typical_error(estimate),
    }


def _difference(paired: Paired) -> dict[str, Any]:
    """The other run, and what this one has more of it, with the error that sampling makes."""
    mean, error = paired.there.mean(), paired.error()
    return {
        "mean": _listed(mean),
        "keys": paired.there.keys.tolist(),
        "error": None if paired.is_exact else _listed(error),
        "typicalError": typical_error(paired),
    }


def _listed(numbers: Tensor) -> list[float | None]:
    """For JSON, which has no NaN: null where a block is masked."""
    return [x if math.isfinite(x) else None for x in numbers.flatten().tolist()]


def _numbers(given: Mapping[str, str], *names: str) -> list[int]:
    try:
        return [int(given[name]) for name in names]
    except (KeyError, ValueError) as error:
        raise ShapeError(f"whole numbers are needed: {', '.join(names)}; given {given}") from error
