"""Characters of a text as numbers, split into a part to learn from and a part to be tested on."""

from __future__ import annotations

import gzip
import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

WHERE = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
NURSERY = "a few lines to see that a script runs, and that is all they are for.\n" * 150
"""What `--quick` reads: nothing is learned from it."""


@dataclass(frozen=True)
class Text:
    """A text: the first nine tenths are for training, the rest is held out."""

    symbols: str
    training: Tensor
    held_out: Tensor
    about: str

    @staticmethod
    def of(text: str) -> Text:
        """Number the characters of a text in their order."""
        symbols = "".join(sorted(set(text)))
        number = {symbol: k for k, symbol in enumerate(symbols)}
        tokens = torch.tensor([number[symbol] for symbol in text])
        cut = len(text) * 9 // 10
        about = (
            f"Text: {len(text):,} characters, {len(symbols)} different ones, "
            f"SHA-256 {hashlib.sha256(text.encode()).hexdigest()[:16]}...."
        )
        return Text(symbols, tokens[:cut], tokens[cut:], about)

    @staticmethod
    def read(path: Path | None, *, quick: bool) -> Text:
        """Read a text file, plain or .gz, or its folder; a few lines if `quick`."""
        if quick:
            return Text.of(NURSERY)
        if path is None:
            raise SystemExit(
                "--data is missing: the path of a text to learn characters from, plain or .gz. The "
                f"results here are from Tiny Shakespeare, {WHERE}. --quick needs no text, and says "
                "nothing."
            )
        if path.is_dir():
            found = sorted(path.glob("input.txt*"))
            if not found:
                raise SystemExit(f"{path} holds no input.txt or input.txt.gz; {WHERE} is one.")
            path = found[0]
        if not path.exists():
            raise SystemExit(f"{path} does not exist; {WHERE} is the text of the results here.")
        raw = path.read_bytes()
        return Text.of((gzip.decompress(raw) if path.suffix == ".gz" else raw).decode())

    def pieces(self, count: int, length: int, generator: torch.Generator) -> Tensor:
        """Random pieces of the training part, [count, length]."""
        starts = torch.randint(len(self.training) - length, (count, 1), generator=generator)
        return self.training[starts + torch.arange(length)]

    @staticmethod
    def cut(tokens: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """A text in pieces that do not overlap, and the next character of each: [count, length]."""
        count = (len(tokens) - 1) // length
        now, after = (tokens[k : k + count * length].reshape(count, length) for k in (0, 1))
        return now, after
