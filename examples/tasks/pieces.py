"""Words in pieces: pairs of signs that often stand side by side become one sign, again and again.

Sennrich, Haddow, Birch 2016, ACL (byte pair encoding), algorithm 1.
"""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

PADDING, END, UNKNOWN = 0, 1, 2
START = "▁"
"""Before the first letter of each word, so that pieces can be joined again."""


class Pieces:
    """Numbers of pieces: 0 is padding, 1 the end, 2 a letter never seen, then letters and pairs.

    merges: at most so many pairs become pieces, the most frequent one first
    """

    def __init__(self, sentences: Iterable[Sequence[str]], merges: int) -> None:
        counts = Counter(word for sentence in sentences for word in sentence)
        spelled = [list(START + word) for word in counts]
        letters = sorted({letter for word in spelled for letter in word})
        self.rank = _learn(spelled, list(counts.values()), merges)
        self.names = ["", "", "?", *letters, *map("".join, self.rank)]
        self.number = {name: k for k, name in enumerate(self.names) if k > UNKNOWN}
        self._known: dict[str, list[int]] = {}

    def read(self, sentence: Sequence[str]) -> Tensor:
        """The numbers of the pieces of all words, and the end."""
        numbers = [k for word in sentence for k in self._split(word)]
        return torch.tensor([*numbers, END])

    def write(self, numbers: Iterable[int]) -> list[str]:
        """The words before the end."""
        found = []
        for k in numbers:
            if k == END:
                break
            found.append(self.names[k])
        return "".join(found).replace(START, " ").split()

    def _split(self, word: str) -> list[int]:
        if word not in self._known:
            parts = list(START + word)
            while len(parts) > 1:
                last = len(self.rank)
                best = min(pairwise(parts), key=lambda p: self.rank.get(p, last))
                if best not in self.rank:
                    break
                parts = _joined(parts, best)
            self._known[word] = [self.number.get(part, UNKNOWN) for part in parts]
        return self._known[word]


def _joined(parts: list[str], pair: tuple[str, str]) -> list[str]:
    """A word in which the pair is one piece, from the left."""
    found: list[str] = []
    k = 0
    while k < len(parts):
        if tuple(parts[k : k + 2]) == pair:
            found.append("".join(pair))
            k += 2
        else:
            found.append(parts[k])
            k += 1
    return found


def _learn(words: list[list[str]], counts: list[int], merges: int) -> dict[tuple[str, str], int]:
    """The pairs that were joined, numbered in their order; of equal counts the first by letters."""
    seen: Counter[tuple[str, str]] = Counter()
    where: defaultdict[tuple[str, str], set[int]] = defaultdict(set)
    for k, (word, count) in enumerate(zip(words, counts, strict=True)):
        for pair in pairwise(word):
            seen[pair] += count
            where[pair].add(k)
    rank: dict[tuple[str, str], int] = {}
    # Counts change while they wait: an entry that is out of date is left out when it comes first.
    heap = [(-count, pair) for pair, count in seen.items()]
    heapq.heapify(heap)
    while len(rank) < merges and heap:
        count, best = heapq.heappop(heap)
        if count > -2:
            break
        if seen[best] != -count:
            continue
        rank[best] = len(rank)
        changed = set()
        for k in where.pop(best):
            old, words[k] = words[k], _joined(words[k], best)
            for sign, word in ((-1, old), (1, words[k])):
                for pair in pairwise(word):
                    seen[pair] += sign * counts[k]
                    where[pair].add(k)
                    changed.add(pair)
        for pair in changed - {best}:
            heapq.heappush(heap, (-seen[pair], pair))
    return rank
