"""The kinds of heads: a score for each, what it must reach, and the honest answer "none".

A score is the weight that a head puts on the keys of a pattern, averaged over the queries that may
see such a key. It is compared with a threshold and with chance, the same average under weights
that are equal over all visible keys. The patterns of previous, duplicate and induction are those
of TransformerLens (`head_detector.py`); Clark et al. 2019, arXiv:1906.04341, section 3, describes
next, local, broad and special tokens; Olsson et al. 2022, arXiv:2209.11895, induction.

Thresholds were held against the 72 heads of MiniLM over 40 texts of 12, 40 and 120 words
(`python -m bench.kinds`). Scores of previous, next and duplicate have a gap, in which their
thresholds lie; those of sink, local and broad have none, and depend on the length. No head there is
one of induction or current, which are not calibrated. Texts in two disjoint halves, then by source:

    words of each text                               12        40        120
    heads with the same name in both halves          68 of 72  71        71
    ... in texts of one source and of the other      66        66        67
    labels by one text that are the head's usual     81 %      90 %      93 %
    random heads named, not "broad" or "none"        1 of 7680 0         0

Equal weights are "broad", which is what the word says, and so are models with random weights.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from regard.look import visible
from regard.look.record import Captured, pair_weights

WITHIN = 4  # how far "local" reaches to each side
QUERIES_AT_LEAST = 4  # a score of fewer queries says nothing about a head
ABOVE_CHANCE = 2.0  # a label also needs so many times the score of equal weights
# And so many standard errors above it: of ten tokens, random logits else reach any threshold.
ERRORS_ABOVE = 3.0
PAIRS_AT_MOST = 2**20  # of one pattern; beyond it every so many queries are left out


@dataclass(frozen=True)
class Kind:
    """A kind of head: its name, what is scored, and the score that earns the name."""

    name: str
    words: str
    threshold: float


# In the order in which a head is named: the narrower pattern first. Mean scores of MiniLM's heads
# on both sides of the gaps, in 120 words: duplicate 0.27 and 0.09, previous 0.28 and 0.18, next
# 0.23 and 0.12.
KINDS = (
    Kind("induction", "on the token after an earlier copy of the query’s token", 0.3),
    Kind("duplicate", "on other copies of the query’s token", 0.2),
    Kind("previous", "on the token before", 0.22),
    Kind("next", "on the token after", 0.22),
    Kind("current", "on the query’s own token", 0.4),
    Kind("sink", "on tokens the tokenizer added, or else on the first, and on a learned sink", 0.5),
    Kind("local", f"within {WITHIN} tokens to each side", 0.6),
    Kind("broad", "effective keys, exp(entropy), per visible key", 0.5),
)


@dataclass(frozen=True, eq=False)
class Scores:
    """One kind's scores in one call. score, chance: [heads]; queries: how many were averaged.

    error: [heads], the standard error of the score as a mean over these queries
    """

    kind: Kind
    score: Tensor
    chance: Tensor
    queries: int
    error: Tensor

    @property
    def met(self) -> Tensor:
        """Which heads earn the name, [heads]."""
        if self.kind.name == "broad":  # equal weights are what it means
            return self.score >= self.kind.threshold
        above = torch.maximum(ABOVE_CHANCE * self.chance, self.chance + ERRORS_ABOVE * self.error)
        return (self.score >= self.kind.threshold) & (self.score >= above)


def named(scores: Sequence[Scores], heads: int) -> tuple[str, ...]:
    """The kind of each head: the first of `KINDS` that it earns, or "none"."""
    names = ["none"] * heads
    for found in reversed(scores):
        names = [
            found.kind.name if met else name
            for met, name in zip(found.met.tolist(), names, strict=True)
        ]
    return tuple(names)


def patterns(call: Captured, labels: Sequence[str]) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(name of the kind, queries i, keys j) of the pairs each pattern consists of.

    Only where queries and keys are the same positions; copies need labels that are tokens.
    """
    n, m = call.query.shape[2], call.key.shape[2]
    if n != m:
        return
    rows = torch.arange(n)
    for name, offset in (("previous", -1), ("next", 1), ("current", 0)):
        keep = (rows + offset >= 0) & (rows + offset < n)
        yield name, rows[keep], rows[keep] + offset
    near = rows[:, None] + torch.arange(-WITHIN, WITHIN + 1)
    inside = (near >= 0) & (near < n)
    yield "local", rows[:, None].expand_as(near)[inside], near[inside]
    if len(labels) == n:
        i, j = _copies(labels)
        yield "duplicate", i, j
        earlier = j < i
        yield "induction", i[earlier], j[earlier] + 1


def _copies(labels: Sequence[str]) -> tuple[Tensor, Tensor]:
    """All pairs of different positions with the same label."""
    places = defaultdict(list)
    for at, label in enumerate(labels):
        places[label].append(at)
    groups = [torch.tensor(group) for group in places.values() if len(group) > 1]
    count = sum(len(group) ** 2 for group in groups)
    stride = -(-count // PAIRS_AT_MOST) or 1
    pairs = [torch.cartesian_prod(group[::stride], group) for group in groups]
    i, j = torch.cat(pairs).unbind(-1) if pairs else torch.zeros(2, 0, dtype=torch.long)
    return i[i != j], j[i != j]


def score(
    name: str, call: Captured, logsumexp: Tensor, pairs: tuple[Tensor, Tensor]
) -> Scores | None:
    """How much of each query's weight lies on its pairs; None where too few queries have any.

    logsumexp: [heads, n]
    """
    i, j = pairs
    n = call.query.shape[2]
    seen = visible.at(call, i, j)  # [1 or heads, pairs]
    weights = torch.where(seen, pair_weights(call, logsumexp, i, j), 0)
    mass = torch.zeros(weights.shape[0], n).index_add_(1, i, weights)
    keys = torch.zeros(seen.shape[0], n).index_add_(1, i, seen.float())
    rows = keys > 0
    queries = rows.sum(-1)
    if int(queries.min()) < QUERIES_AT_LEAST:
        return None
    chance = keys / visible.counts(call).clamp(min=1)
    heads = call.query.shape[1]
    return Scores(
        next(kind for kind in KINDS if kind.name == name),
        mass.sum(-1) / queries,
        (chance.sum(-1) / queries).expand(heads),
        int(queries.min()),
        error_of(mass, rows),
    )


def error_of(mass: Tensor, rows: Tensor) -> Tensor:
    """The standard error of a mean over some rows, [heads].

    mass: [heads, n];  rows: [1 or heads, n], which ones count, two at least
    """
    count = rows.sum(-1, keepdim=True)
    apart = torch.where(rows, mass - torch.where(rows, mass, 0).sum(-1, True) / count, 0)
    return (apart.square().sum(-1) / ((count - 1) * count)[:, 0]).sqrt()
