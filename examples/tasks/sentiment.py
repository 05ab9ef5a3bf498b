"""Whether a review is kind: one label for a whole sentence.

N vectors to one label: a word is the sum of two vectors, its own and that of the pair with the word
before it, if they stand twice in the folds learned from. One layer (width 32, 4 heads, positions of
T5), and a second attention with one learned query for each head, whose weights say which words
count; one linear layer. One channel of the vectors begins as the log ratio of naive Bayes, counted
in the folds learned from (Wang and Manning 2012, ACL, give such ratios to a linear classifier); all
others begin at random. Sentence polarity data of Pang and Lee, ten folds: of the first 10 seeds
each is tested on the fold of its number and learns from the nine others; 3 times through them at
rate 0.003, dropout 0.5, a fifth of the words hidden.

These numbers were chosen by learning from folds 0 to 6 and looking at 7 to 9: 77.7 % there; as wide
as 64, 77.9; without the ratios, 77.1 (width 64); also without pairs, 75.6; with the mean in place
of the second attention, 75.1 (width 32, no ratios); half of the words hidden, 75.6 (no ratios).
"""

from __future__ import annotations

import gzip
from collections import Counter
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

import regard
from examples.tasks.sequences import Sequences, Words
from examples.tasks.task import Job, Task
from regard import Padding
from regard.nn import Encoder, EncoderLayer, SelfAttention
from regard.position import T5

FOLDS = 10
WIDTH, HEADS, INNER, BATCH, EPOCHS, HIDDEN = 32, 4, 64, 64, 3, 0.2
WHERE = "the folder of polarity.tsv.gz, rows of label, fold and text (sentence polarity v1.0, Pang \
and Lee 2005, from github.com/nltk/nltk_data, CC BY 4.0; its folds are random ones)"
KIM = "Kim, EMNLP 2014, arXiv:1408.5882, table 2; other random folds"
PUBLISHED = (
    ("CNN, random vectors", "76.1", KIM),
    ("naive Bayes, presence of words", "77.9", "computed on these folds"),
    ("CNN, fixed word2vec", "81.0", KIM),
    ("CNN, tuned word2vec", "81.5", KIM),
)
FOUND = (
    "2.2 above Kim's network from random vectors, and 0.4 above naive Bayes on the same folds, "
    "which is the standard error of either over all 10,662 sentences: no more than its level. The "
    "counts of naive Bayes that one channel begins with are part of that; without them 0.9 is "
    "lost where settings were chosen. Folds 0 to 6, not looked at for that, have 78.3 as well. "
    "Networks with vectors learned from other text are 3 ahead."
)


def read(folder: Path | None) -> list[tuple[int, int, list[str]]]:
    """Labels, folds and words; two made-up sentences in every fold without a folder."""
    if folder is None:
        made_up = (["bad", "film"], ["a", "good", "film", "."])
        return [(y, fold, made_up[y]) for fold in range(FOLDS) for y in (0, 1)]
    with gzip.open(folder / "polarity.tsv.gz", "rt", encoding="utf-8") as file:
        rows = [line.rstrip("\n").split("\t") for line in file]
    return [(int(label), int(fold), text.split(" ")) for label, fold, text in rows]


def marks(words: list[str]) -> list[str]:
    """Each word, and each with the one before it: two marks for a word."""
    return [mark for pair in pairwise(["", *words]) for mark in (pair[1], " ".join(pair))]


class Critic(nn.Module):
    """Marks [batch, n, 2] and lengths [batch] to logits of both labels, [batch, 2]."""

    def __init__(self, ratios: Tensor) -> None:
        super().__init__()
        table = 0.1 * torch.randn(len(ratios), WIDTH)
        table[:, 0] = 0.3 * ratios
        self.embed = nn.EmbeddingBag.from_pretrained(table, freeze=False, mode="sum", padding_idx=0)
        self.dropout = nn.Dropout(0.5)
        position = T5(torch.zeros(HEADS, 32).requires_grad_())
        layer = EncoderLayer(
            SelfAttention(WIDTH, HEADS, position=position), INNER, dropout=0.5, norm_first=True
        )
        self.encoder = Encoder([layer], nn.LayerNorm(WIDTH))
        self.query = nn.Parameter(torch.zeros(HEADS, 1, WIDTH // HEADS))
        self.to_key = nn.Linear(WIDTH, WIDTH)
        self.out = nn.Linear(WIDTH, 2)

    def forward(self, words: Words) -> Tensor:
        marks, lengths = words
        if self.training:
            marks = marks * (torch.rand(*marks.shape[:2], 1) >= HIDDEN)
        x = self.embed(marks.flatten(0, 1)).unflatten(0, marks.shape[:2])
        real = Padding.of_lengths(lengths, x.shape[1])
        x = self.encoder(self.dropout(x), mask=real)
        # One query for all sentences, learned: where to look for what is said.
        key, value = (y.unflatten(-1, (HEADS, -1)).transpose(1, 2) for y in (self.to_key(x), x))
        A = regard.attention(self.query.expand(len(x), -1, -1, -1), key, mask=real)
        return self.out(self.dropout((A @ value).transpose(1, 2).flatten(1)))


def log_ratios(train: Sequences, marks: int) -> Tensor:
    """For each mark log(p / q): its shares of all marks of kind and of other sentences, [marks].

    As in naive Bayes, a mark counts once in a sentence, and once more than it was seen.
    """
    counts = torch.ones(2, marks)
    for words, label in zip(train.words, train.targets, strict=True):
        counts[label, words.unique()] += 1
    other, kind = (counts / counts.sum(1, keepdim=True)).log()
    return torch.cat([torch.zeros(1), (kind - other)[1:]])  # 0 is no mark


def learn(job: Job) -> list[float]:
    """Train on nine folds; accuracy on the tenth."""
    rows = read(job.data)
    parts = [
        [row for row in rows if (row[1] == job.seed % FOLDS) == tested] for tested in (False, True)
    ]
    seen = Counter(mark for _, _, words in parts[0] for mark in marks(words))
    number = {mark: k for k, mark in enumerate((m for m, c in seen.items() if c > 1), 1)}
    train, test = (
        Sequences(
            [
                torch.tensor([number.get(mark, 0) for mark in marks(words)]).unflatten(0, (-1, 2))
                for _, _, words in part
            ],
            [torch.tensor(label) for label, _, _ in part],
        )
        for part in parts
    )
    torch.manual_seed(job.seed)
    model = Critic(log_ratios(train, len(number) + 1))
    draw = train.batches(torch.Generator().manual_seed(job.seed), BATCH)
    job.train(model, draw, EPOCHS * len(train.words) // BATCH, rate=3e-3)
    job.save(model)
    return [test.accuracy(model), train.accuracy(model)]


TASK = Task(
    "sentiment",
    __doc__,
    WHERE,
    "1 layer and 1 learned query in regard",
    learn,
    ("accuracy in %, fold left out", "accuracy in %, folds learned from"),
    PUBLISHED,
    FOUND,
    seeds=10,
)
main = TASK.main

if __name__ == "__main__":
    main(None)
