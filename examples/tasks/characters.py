"""The next character of Shakespeare: a causal encoder that generates from its cache.

N vectors to N' of which the model decides what and how many: 4 layers, 4 heads, width 128, 64
characters of context, pieces 12 at a time, as the small model of nanoGPT's page for a CPU, but with
1,000 steps in place of 2,000, rotary positions and a rate of 0.002. Tiny Shakespeare, first nine
tenths to learn from; the loss is that of all held-out characters, in pieces of 64 that do not
overlap, so that the first ones of a piece see next to nothing.

nanoGPT: github.com/karpathy/nanoGPT; Su et al. 2021 (rotary), arXiv:2104.09864.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from examples.model import Batch, perplexity
from examples.tasks.task import Job, Task
from examples.text import Text
from regard import Causal, Rotary
from regard.nn import Encoder, EncoderLayer, SelfAttention, States, generate

WIDTH, HEADS, LAYERS, LENGTH, BATCH, STEPS = 128, 4, 4, 64, 12, 1000
WHERE = "input.txt or input.txt.gz of Tiny Shakespeare (github.com/karpathy/char-rnn, \
data/tinyshakespeare)"
NANO = "README of github.com/karpathy/nanoGPT"
PUBLISHED = (
    ("uniform / single characters / pairs", "4.174 / 3.347 / 2.486", "computed on this split"),
    ("nanoGPT: 4 layers, width 128, context 64, 2,000 steps", "1.88", NANO),
    ("6-grams, Witten-Bell smoothing", "1.698", "computed on this split"),
    ("nanoGPT: 6 layers, width 384, context 256, on an A100", "1.4697", NANO),
)
FOUND = (
    "0.08 below nanoGPT's model of this size with half its steps, and 0.11 above counted 6-grams; "
    "the large model's level needs a larger one and a longer context."
)


class Writer(nn.Module):
    """Tokens [batch, n] to logits of the next ones [batch, n, symbols]; with a state, goes on."""

    def __init__(self, symbols: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(symbols, WIDTH)
        self.encoder = Encoder(
            (
                EncoderLayer(
                    SelfAttention(WIDTH, HEADS, position=Rotary.of(WIDTH // HEADS)),
                    dropout=0.0,
                    norm_first=True,
                )
                for _ in range(LAYERS)
            ),
            nn.LayerNorm(WIDTH),
        )
        self.out = nn.Linear(WIDTH, symbols)

    def forward(self, tokens: Tensor, state: States | None = None) -> Tensor:
        mask = Causal() if state is None else None
        return self.out(self.encoder(self.embed(tokens), mask=mask, state=state))


def learn(job: Job) -> list[float]:
    """Train a writer; its loss on the held-out text, and a page that it writes."""
    text = Text.read(job.data, quick=job.quick)
    torch.manual_seed(job.seed)
    generator = torch.Generator().manual_seed(job.seed)
    model = Writer(len(text.symbols))

    def draw() -> Batch:
        pieces = text.pieces(BATCH, LENGTH + 1, generator)
        return pieces[:, :-1], pieces[:, 1:]

    job.train(model, draw, STEPS, rate=2e-3)
    job.save(model)
    start = torch.zeros(1, 1, dtype=torch.long)  # the first symbol, a line break
    written = generate(
        model,
        start,
        200,
        state=model.encoder.state(),
        choose=lambda logits: torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0],
    )
    (job.out / f"{job.name}-{job.seed}.txt").write_text(
        "".join(text.symbols[k] for k in written[0].tolist()) + "\n"
    )
    return [math.log(perplexity(model, Text.cut(text.held_out, LENGTH)))]


TASK = Task(
    "characters",
    __doc__,
    WHERE,
    "4 layers, width 128, context 64, 1,000 steps, in regard",
    learn,
    ("loss in nats per character",),
    PUBLISHED,
    FOUND,
    seeds=3,
)
main = TASK.main

if __name__ == "__main__":
    main(None)
