"""German to English: a sequence for a sequence, its length decided by the model, by beam search.

N vectors to N': encoder and decoder of two layers each (width 128, 4 heads, norms first, positions
of T5), words and signs as tokens, small letters; words that stand once in the training part are
unknown. Tatoeba, 29,000 pairs of 4 to 15 English words; twice through them at rate 0.002, dropout
0.2. The state of the decoder holds the memory, projected once, and the cache of what was written;
each step keeps the 4 best beginnings of each sentence, and `state.reorder` makes them go on. Scores
are divided by length ** 0.6, the beginning counted.

BLEU: Papineni et al. 2002, ACL, of small letters with words and signs as tokens, all sentences
together, one reference each.
"""

from __future__ import annotations

import gzip
import math
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from examples.model import Batch
from examples.tasks.sequences import BATCH, Sequences
from examples.tasks.task import Job, Task
from regard import Padding
from regard.nn import (
    CrossAttention,
    Decoder,
    DecoderLayer,
    Encoder,
    EncoderDecoder,
    EncoderLayer,
    SelfAttention,
    States,
)
from regard.position import T5

WIDTH, HEADS, LAYERS, EPOCHS, BEAMS, LONGEST = 128, 4, 2, 2, 4, 30
END, UNKNOWN = 1, 2
WHERE = "the folder of train.tsv.gz, test.tsv.gz and test_long.tsv.gz, rows of German and English \
(tatoeba.org by www.manythings.org/anki, CC BY 2.0; a split of its own)"
PUBLISHED = (
    (
        "none on this split; on Multi30k, as large, with longer sentences: small transformer",
        "33.9",
        "github.com/adamdayan/trans-late-former, validation part; not comparable",
    ),
)
FOUND = (
    "A low number: twice through the pairs, three minutes of one core, is too short for a "
    "translator; more was not tried. Sentences longer than any learned from are worse by far. One "
    "seed, so no spread."
)


def tokens(text: str) -> list[str]:
    """Words and signs, in small letters."""
    return re.findall(r"[^\W_]+(?:['’][^\W_]+)*|[^\w\s]", text.lower())


class Words:
    """Numbers of the words that stand twice or more; 0 is padding, 1 the end, 2 the unknown."""

    def __init__(self, sentences: list[list[str]]) -> None:
        counts = Counter(word for sentence in sentences for word in sentence)
        self.names = ["", "", "?", *(word for word, count in counts.items() if count > 1)]
        self.number = {word: k for k, word in enumerate(self.names) if k > UNKNOWN}

    def read(self, sentence: list[str]) -> Tensor:
        """The numbers of a sentence and the end."""
        return torch.tensor([*(self.number.get(word, UNKNOWN) for word in sentence), END])

    def write(self, numbers: Iterable[int]) -> list[str]:
        """The words before the end."""
        found = []
        for k in numbers:
            if k == END:
                break
            found.append(self.names[k])
        return found


def read(folder: Path | None, part: str) -> list[tuple[list[str], list[str]]]:
    """Pairs of a part; a few made-up ones without a folder."""
    if folder is None:
        return [(["ein", "hund"][k:], ["a", "dog"][k:]) for k in (0, 1)] * 20
    with gzip.open(folder / f"{part}.tsv.gz", "rt", encoding="utf-8") as file:
        rows = [line.rstrip("\n").split("\t") for line in file]
    return [(tokens(german), tokens(english)) for german, english in rows]


def attention(*, bidirectional: bool) -> SelfAttention:
    table = torch.zeros(HEADS, 32).requires_grad_()
    return SelfAttention(WIDTH, HEADS, position=T5(table, bidirectional=bidirectional))


class Translator(nn.Module):
    """Source and target tokens, padded by 0, to logits of the target's next ones."""

    def __init__(self, source: int, target: int) -> None:
        super().__init__()
        parts = {"dropout": 0.2, "norm_first": True}
        encoder = (EncoderLayer(attention(bidirectional=True), **parts) for _ in range(LAYERS))
        decoder = (
            DecoderLayer(attention(bidirectional=False), CrossAttention(WIDTH, HEADS), **parts)
            for _ in range(LAYERS)
        )
        self.source, self.target = nn.Embedding(source, WIDTH), nn.Embedding(target, WIDTH)
        self.dropout = nn.Dropout(0.2)
        self.model = EncoderDecoder(
            Encoder(encoder, nn.LayerNorm(WIDTH)), Decoder(decoder, nn.LayerNorm(WIDTH))
        )
        self.out = nn.Linear(WIDTH, target)

    def forward(self, both: tuple[Tensor, Tensor]) -> Tensor:
        source, target = both
        real = Padding(source > 0)
        vectors = (self.dropout(embed(x)) for embed, x in self._embeddings(source, target))
        return self.out(self.model(*vectors, source_mask=real, memory_mask=real))

    def _embeddings(self, source: Tensor, target: Tensor) -> list[tuple[nn.Embedding, Tensor]]:
        return [(self.source, source), (self.target, target)]

    def state(self, source: Tensor) -> States:
        """What the decoder begins from."""
        real = Padding(source > 0)
        return self.model.state(self.source(source), source_mask=real, memory_mask=real)

    def step(self, target: Tensor, state: States) -> Tensor:
        """Logits [batch, words] after one more target token [batch]."""
        return self.out(self.model.step(self.target(target), state))


@torch.no_grad()
def beam_search(
    model: Translator, source: Tensor, beams: int = BEAMS, longest: int = LONGEST
) -> Tensor:
    """The best of the beginnings kept at each step: source [batch, m] -> tokens [batch, n]."""
    batch = len(source)
    state = model.state(source.repeat_interleave(beams, 0))
    written = torch.full((batch * beams, 1), END)
    # All beams begin alike: only the first of each sentence counts in the first step.
    total = torch.full((batch, beams), -math.inf)
    total[:, 0] = 0
    done = torch.zeros(batch, beams, dtype=torch.bool)
    lengths = torch.ones(batch, beams)
    for _ in range(longest):
        gains = model.step(written[:, -1], state).log_softmax(-1).unflatten(0, (batch, beams))
        gains[..., 0] = -math.inf
        # A beam that has ended goes on with padding alone, at no cost.
        ended = torch.full_like(gains[0, 0], -math.inf)
        ended[0] = 0
        gains = torch.where(done[..., None], ended, gains)
        longer = lengths + (~done).float()
        scores = (total[..., None] + gains) / longer[..., None] ** 0.6
        best = scores.flatten(1).topk(beams).indices
        beam, token = best // gains.shape[-1], best % gains.shape[-1]
        total = total.gather(1, beam) + gains.flatten(1).gather(1, best)
        lengths = longer.gather(1, beam)
        index = (beam + beams * torch.arange(batch)[:, None]).flatten()
        state.reorder(index)
        written = torch.cat([written[index], token.flatten()[:, None]], 1)
        done = done.gather(1, beam) | (token == END)
        if bool(done.all()):  # while one goes on, it may still win: longer ones are divided by more
            break
    return written.unflatten(0, (batch, beams))[:, 0, 1:]


def bleu(found: list[list[str]], wanted: list[list[str]]) -> float:
    """100 exp(min(0, 1 - r / c)) (p1 p2 p3 p4)^(1/4): lengths r, c; p_n of the n-grams shared."""
    logs = []
    for n in range(1, 5):
        shared = total = 0
        for one, other in zip(found, wanted, strict=True):
            grams, known = (
                Counter(tuple(x[k : k + n]) for k in range(len(x) - n + 1)) for x in (one, other)
            )
            shared += (grams & known).total()
            total += grams.total()
        if not shared:
            return 0.0
        logs.append(math.log(shared / total))
    ratio = sum(map(len, wanted)) / max(sum(map(len, found)), 1)
    return 100 * math.exp(min(0.0, 1 - ratio) + sum(logs) / 4)


def learn(job: Job) -> list[float]:
    """Train a translator; BLEU of the test parts."""
    pairs = read(job.data, "train")
    german, english = (Words([pair[k] for pair in pairs]) for k in (0, 1))
    train = Sequences([german.read(x) for x, _ in pairs], [english.read(y) for _, y in pairs])
    torch.manual_seed(job.seed)
    model = Translator(len(german.names), len(english.names))
    draw = train.batches(torch.Generator().manual_seed(job.seed))

    def shifted() -> Batch:
        (source, _), target = draw()
        begun = torch.cat([torch.full((len(target), 1), END), target[:, :-1].clamp(min=0)], 1)
        return (source, begun), target

    job.train(model, shifted, EPOCHS * len(pairs) // BATCH, rate=2e-3)
    job.save(model)
    found = []
    for part in ("test", "test_long"):
        asked = sorted(read(job.data, part), key=lambda pair: len(pair[0]))
        said: list[list[str]] = []
        for k in range(0, len(asked), 50):
            source = [german.read(x) for x, _ in asked[k : k + 50]]
            rows = beam_search(model, nn.utils.rnn.pad_sequence(source, batch_first=True))
            said += [english.write(row) for row in rows.tolist()]
        found.append(bleu(said, [y for _, y in asked]))
    return found


TASK = Task(
    "translation",
    __doc__,
    WHERE,
    "2 + 2 layers of width 128 in regard, 4 beams",
    learn,
    ("BLEU, test part", "BLEU, longer sentences (16 to 25 words)"),
    PUBLISHED,
    FOUND,
    seeds=1,
)
main = TASK.main

if __name__ == "__main__":
    main(None)
