"""What is said about each head in numbers: for the page, for Python and for a CSV file."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from html import escape
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regard.form.looks import Statistics
from regard.look import kinds, visible
from regard.look.record import Captured
from regard.look.scene import Scene, Tokens


@dataclass(frozen=True, eq=False)
class HeadStatistics:
    """Of one call. Tensors are [heads], averaged over the queries that see any key.

    entropy: in nats;  keys: exp(entropy), the effective number of keys
    distance: mean |i - j|;  first: weight on key 0
    special: weight on tokens that the tokenizer added, or None without any
    sink: weight on a learned sink that has no token, or None without one
    scores: of each kind that could be scored;  kinds: the name of each head's kind
    """

    entropy: Tensor
    keys: Tensor
    distance: Tensor
    first: Tensor
    special: Tensor | None
    sink: Tensor | None
    scores: tuple[kinds.Scores, ...]
    kinds: tuple[str, ...]


def of_call(call: Captured, tokens: Tokens, found: Statistics | None = None) -> HeadStatistics:
    """The statistics of one sequence's call.

    found: what `call.matrix.statistics()` gave, if it is known already
    """
    found = call.matrix.statistics() if found is None else found
    rows = found.logsumexp[0].isfinite()  # [heads, n]
    count = rows.sum(-1).clamp(min=1)

    def mean(per_row: Tensor) -> Tensor:
        return torch.where(rows, per_row, 0).sum(-1) / count

    received = found.received[0]  # [heads, m]
    marked = torch.tensor(tokens.special, dtype=torch.bool)
    special = None
    if marked.any() and len(marked) == received.shape[-1]:
        special = received[:, marked].sum(-1) / count
    first = received[:, 0] / count
    sink = None if call.sinks is None else 1 - received.sum(-1) / count
    keys = mean(found.entropy[0].exp())
    scored = {
        name: kinds.score(name, call, found.logsumexp[0], (i, j))
        for name, i, j in kinds.patterns(call, tokens.labels)
    }
    queries = int(rows.sum(-1).min())
    if queries >= kinds.QUERIES_AT_LEAST:
        allowed = visible.counts(call).clamp(min=1)
        seen = torch.zeros(call.key.shape[2])
        seen[marked if special is not None else slice(0, 1)] = 1
        chance = seen.sum() / allowed.float()
        by_name = {kind.name: kind for kind in kinds.KINDS}
        on_sink = (first if special is None else special) + (0 if sink is None else sink)
        zero = torch.zeros_like(on_sink)  # one column for all queries: not a mean of their own sets
        even = mean(chance.expand_as(rows))
        scored["sink"] = kinds.Scores(by_name["sink"], on_sink, even, queries, zero)
        several = rows & (allowed > 1)  # one key alone is neither broad nor narrow
        asked = several.sum(-1)
        if int(asked.min()) >= kinds.QUERIES_AT_LEAST:
            share = torch.where(several, found.entropy[0].exp() / allowed, 0).sum(-1) / asked
            even = torch.ones_like(share)
            scored["broad"] = kinds.Scores(by_name["broad"], share, even, int(asked.min()), zero)
    scores = tuple(x for kind in kinds.KINDS if (x := scored.get(kind.name)) is not None)
    return HeadStatistics(
        mean(found.entropy[0]),
        keys,
        mean(found.distance[0]),
        first,
        special,
        sink,
        scores,
        kinds.named(scores, call.query.shape[1]),
    )


@dataclass(frozen=True)
class HeadRow:
    """One head in a table; see `HeadStatistics` for the numbers. None where there is no number.

    layer: its number;  name: of its module;  queries, keys: how many there are
    score, threshold: of the kind that names the head, None for "none"
    previous to broad: the score of every kind
    """

    layer: int
    head: int
    name: str
    route: str
    queries: int
    keys: int
    entropy: float
    effective_keys: float
    distance: float
    first: float
    special: float | None
    learned_sink: float | None
    kind: str
    score: float | None
    threshold: float | None
    induction: float | None = None
    duplicate: float | None = None
    previous: float | None = None
    next: float | None = None
    current: float | None = None
    sink: float | None = None
    local: float | None = None
    broad: float | None = None


COLUMNS = tuple(field.name for field in fields(HeadRow))


@dataclass(frozen=True)
class Table:
    """One row per layer and head. Prints itself; `csv` and `records` hand it on.

    >>> from regard import look
    >>> table = look({"query": torch.zeros(2, 5, 8), "key": torch.zeros(2, 5, 8)}).table()
    >>> table[1].kind, table[1].effective_keys, table.csv().splitlines()[0][:15]
    ('broad', 5.0, 'layer,head,name')
    """

    rows: tuple[HeadRow, ...]

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[HeadRow]:
        return iter(self.rows)

    def __getitem__(self, index: int) -> HeadRow:
        return self.rows[index]

    def csv(self, path: str | Path | None = None) -> str:
        """The table as comma-separated values with a header; empty where there is no number.

        path: also write it there. Raises OSError if that cannot be done.
        """
        text = csv_of(COLUMNS, (tuple(asdict(row).values()) for row in self.rows))
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text

    def records(self) -> list[dict[str, Any]]:
        """One dictionary per row: `pandas.DataFrame(table.records())`."""
        return [asdict(row) for row in self.rows]

    def __repr__(self) -> str:
        lines = [[shown(getattr(row, name)) for name in COLUMNS] for row in self.rows]
        widths = [max(map(len, column)) for column in zip(COLUMNS, *lines, strict=True)]
        return "\n".join(
            "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
            for line in (COLUMNS, *lines)
        )

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{name}</th>" for name in COLUMNS)
        body = "".join(
            "<tr>"
            + "".join(f"<td>{escape(shown(getattr(row, name)))}</td>" for name in COLUMNS)
            + "</tr>"
            for row in self.rows
        )
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def csv_of(columns: tuple[str, ...], rows: Any) -> str:
    """Rows as comma-separated values, with quotes where a text needs them."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    return buffer.getvalue()


def shown(cell: object) -> str:
    """A cell as it is printed: three digits of a number, nothing for None."""
    if cell is None:
        return ""
    return f"{cell:.3g}" if isinstance(cell, float) else str(cell)


def table_of(scene: Scene) -> Table:
    """The table of every head in a scene, in the order of the calls."""
    return Table(
        tuple(row for call in scene.captured for row in _rows(call, of_call(call, scene.tokens)))
    )


def _rows(call: Captured, found: HeadStatistics) -> Iterator[HeadRow]:
    def number(tensor: Tensor | None, head: int) -> float | None:
        return None if tensor is None else float(tensor[head])

    for head, name in enumerate(found.kinds):
        scores = {x.kind.name: float(x.score[head]) for x in found.scores}
        threshold = {x.kind.name: x.kind.threshold for x in found.scores}.get(name)
        yield HeadRow(
            layer=call.number,
            head=head,
            name=call.name,
            route=call.route,
            queries=call.query.shape[2],
            keys=call.key.shape[2],
            entropy=float(found.entropy[head]),
            effective_keys=float(found.keys[head]),
            distance=float(found.distance[head]),
            first=float(found.first[head]),
            special=number(found.special, head),
            learned_sink=number(found.sink, head),
            kind=name,
            score=scores.get(name),
            threshold=threshold,
            **scores,
        )
