"""The formula of one matrix: score, position and normalizer, as one part."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from regard.normalizer import Normalizer, Softmax
from regard.part import Part
from regard.position.base import Position
from regard.score import Dot, Score


@dataclass(frozen=True, eq=False, repr=False)
class Rule(Part):
    """logit_ij = score(query_i, key_j) + bias_ij, and how a row of logits becomes weights."""

    score: Score
    position: Position | None
    normalizer: Normalizer

    @staticmethod
    def of(score: Score, position: Position | None, normalizer: Normalizer) -> Rule:
        """The rule of some parts; one for all matrices of parts that hold nothing large."""
        parts = (score, position, normalizer)
        placed = position is not None and position.tensors()
        holds = placed or score.tensors() or normalizer.tensors() or score.foreign
        if holds or torch.compiler.is_compiling():  # a rule that is kept would keep them alive
            return Rule(*parts)
        return _shared(*parts)

    @cached_property
    def plain(self) -> bool:
        """Whether this is softmax(scale query . key) with a scale that is a number."""
        score, normalizer = self.score, self.normalizer
        return (
            self.position is None
            and type(score) is Dot
            and score.softcap is None
            and not isinstance(score.scale, Tensor)
            and type(normalizer) is Softmax
            and normalizer.sink is None
        )

    def tensors(self) -> tuple[Tensor, ...]:
        """A rule is made anew for every matrix; its parts know theirs."""
        position = () if self.position is None else self.position.tensors()
        return (*self.score.tensors(), *position, *self.normalizer.tensors())

    @property
    def whole_rows(self) -> bool:
        """Whether logits of a tile need the keys of whole rows."""
        position = self.position
        return self.score.whole_rows or (position is not None and position.whole_rows)

    def numbers_per_pair(self, width: int) -> int:
        """How many numbers a tile holds for each pair: what decides the tile's size."""
        more = 0 if self.position is None else self.position.numbers_per_pair()
        return self.score.numbers_per_pair(width) + more

    def operands(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Everything that is done once per token; `logits` compares the results."""
        if self.position is not None:
            device = query.device
            query = self.position.on_query(query, torch.arange(query.shape[-2], device=device))
            key = self.position.on_key(key, torch.arange(key.shape[-2], device=device))
        return self.score.prepare(query, key)

    def logits(
        self, query: Tensor, key: Tensor, i: Tensor, j: Tensor, keep: Tensor | None
    ) -> Tensor:
        """Logits of a tile of operands, [*, r, c]; -inf where `keep` forbids a pair."""
        logits = self.score.pair(query, key, i, j)
        if self.position is not None:
            bias = self.position.on_score(query, key, i, j)
            if bias is not None:
                logits = logits + bias.to(logits.dtype)
        return logits if keep is None else torch.where(keep, logits, -torch.inf)


@lru_cache(maxsize=64)
def _shared(score: Score, position: Position | None, normalizer: Normalizer) -> Rule:
    return Rule(score, position, normalizer)
