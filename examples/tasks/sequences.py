"""Sequences as numbers: what a word looks like, batches of like lengths, and a model that reads."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from examples.model import Batch
from regard import Padding
from regard.nn import Encoder, EncoderLayer, SelfAttention
from regard.position import T5

Words = tuple[Tensor, Tensor]
"""Features of words [batch, n, features], 0 where there is none, and the lengths [batch]."""

BATCH = 32


def features(word: str) -> list[str]:
    """The word, its small letters, its shape, and its first and last one to four letters."""
    shape = re.sub(r"[a-z]+", "x", re.sub(r"[A-Z]+", "X", re.sub(r"\d+", "9", word)))
    parts = [word, "lower " + word.lower(), "shape " + shape]
    return parts + [
        name for k in range(1, 5) for name in (f"first {word[:k]}", f"last {word[-k:]}")
    ]


@dataclass(frozen=True)
class Vocabulary:
    """Numbers from 1 of the features that stand twice or more in the training sentences."""

    number: dict[str, int]

    @staticmethod
    def of(sentences: Sequence[Sequence[str]]) -> Vocabulary:
        """Count the features of all words."""
        words = Counter(word for sentence in sentences for word in sentence)
        counts: Counter[str] = Counter()
        for word, count in words.items():
            for name in features(word):
                counts[name] += count
        kept = [name for name, count in counts.items() if count > 1]
        return Vocabulary({name: k for k, name in enumerate(kept, 1)})

    def read(self, sentences: Sequence[Sequence[str]]) -> list[Tensor]:
        """The features of each sentence's words, [n, features]."""
        known: dict[str, list[int]] = {}
        for sentence in sentences:
            for word in sentence:
                if word not in known:
                    known[word] = [self.number.get(name, 0) for name in features(word)]
        return [torch.tensor([known[word] for word in sentence]) for sentence in sentences]


@dataclass(frozen=True)
class Sequences:
    """Vectors [n, features] of each sequence, and what to say: a number, or one for each vector."""

    words: list[Tensor]
    targets: list[Tensor]

    def batch(self, chosen: Sequence[int]) -> Batch:
        """These sequences, padded, and their lengths; what to say: -100 behind the end."""
        words = [self.words[k] for k in chosen]
        targets = [self.targets[k] for k in chosen]
        pad = nn.utils.rnn.pad_sequence
        said = (
            pad(targets, batch_first=True, padding_value=-100)
            if targets[0].dim()
            else torch.stack(targets)
        )
        return (pad(words, batch_first=True), torch.tensor([len(x) for x in words])), said

    def batches(self, generator: torch.Generator, size: int = BATCH) -> Callable[[], Batch]:
        """Batches of sequences of about one length, again and again, in random order."""
        waiting: list[list[int]] = []

        def draw() -> Batch:
            if not waiting:
                # Lengths are only about sorted, so that batches differ from time to time.
                noise = torch.rand(len(self.words), generator=generator) * 4
                lengths = torch.tensor([len(x) for x in self.words]) + noise
                waiting.extend(x.tolist() for x in lengths.argsort().split(size))
                order = torch.randperm(len(waiting), generator=generator).tolist()
                waiting[:] = [waiting[k] for k in order]
            return self.batch(waiting.pop())

        return draw

    @torch.no_grad()
    def accuracy(self, model: nn.Module) -> float:
        """What the likeliest answer is right about, in %."""
        order = sorted(range(len(self.words)), key=lambda k: len(self.words[k]))
        right, asked = 0, 0
        for start in range(0, len(order), BATCH):
            words, targets = self.batch(order[start : start + BATCH])
            right += int((model(words).argmax(-1) == targets).sum())
            asked += int((targets >= 0).sum())
        return 100 * right / asked


class Reader(nn.Module):
    """Words to vectors [batch, n, width], of which each has seen the whole sentence.

    A word is the sum of the vectors of its features, so that one never seen before still has some.
    """

    def __init__(self, names: int, *, width: int, heads: int, blocks: int, dropout: float) -> None:
        super().__init__()
        # Ten or so features are added to one vector of standard deviation 1.
        table = torch.randn(names + 1, width) / 3
        self.embed = nn.EmbeddingBag.from_pretrained(table, freeze=False, mode="sum", padding_idx=0)
        self.dropout = nn.Dropout(dropout)
        self.encoder = Encoder(
            (
                EncoderLayer(
                    SelfAttention(
                        width, heads, position=T5(torch.zeros(heads, 32).requires_grad_())
                    ),
                    dropout=dropout,
                    norm_first=True,
                )
                for _ in range(blocks)
            ),
            nn.LayerNorm(width),
        )

    def forward(self, words: Words) -> Tensor:
        numbers, lengths = words
        x = self.embed(numbers.flatten(0, 1)).unflatten(0, numbers.shape[:2])
        mask = Padding.of_lengths(lengths, numbers.shape[1])
        return self.encoder(self.dropout(x), mask=mask)
