"""Are the names of heads those of the head, or of the text: the table of `regard/look/kinds.py`.

    python -m bench.kinds --ewt en_ewt-ud-dev.conllu.gz --plays input.txt.gz

Texts are the beginnings of UD EWT's documents and of pieces of Shakespeare, 20 of each; the model
is the MiniLM of the `look` extra. No draw is made but for random logits, whose seed is 0.
"""

from __future__ import annotations

import argparse
import gzip
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from regard.look import kinds, look

WORDS = (12, 40, 120)
TEXTS = 20  # of each source
HEADS = 24
DEVIATIONS = (0.0, 1.0, 2.0, 4.0)


def documents(path: Path) -> list[str]:
    """The documents of a CoNLL-U file, as texts."""
    found: list[list[str]] = []
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            if line.startswith("# newdoc"):
                found.append([])
            elif line.startswith("# text ="):
                found[-1].append(line[9:].strip())
    return [" ".join(sentences) for sentences in found]


def beginnings(ewt: Path, plays: Path, count: int) -> list[str]:
    """Texts of so many words: those of EWT's documents that have as many, then pieces of plays."""
    long = [x for x in documents(ewt) if len(x.split()) >= count][:TEXTS]
    with gzip.open(plays, "rt", encoding="utf-8") as file:
        whole = file.read()
    step = len(whole) // (TEXTS + 1)
    pieces = [whole[at * step :][: 12 * count].split(maxsplit=1)[1] for at in range(TEXTS)]
    return [" ".join(text.split()[:count]) for text in long + pieces]


def majority(names: Iterable[str]) -> str:
    """The name given most often, the first of several."""
    return Counter(names).most_common(1)[0][0]


def alike(named: Sequence[Sequence[str]], halves: tuple[slice, slice]) -> int:
    """Heads to which both halves of the texts give the same name most often."""
    pairs = ([majority(column) for column in zip(*named[half], strict=True)] for half in halves)
    return sum(one == other for one, other in zip(*pairs, strict=True))


def random_names(labels: Sequence[str], causal: bool) -> list[str]:
    """The names of heads whose queries and keys are random."""
    n, names = len(labels), []
    for deviation in DEVIATIONS:
        query, key = torch.randn(HEADS, n, 64) * deviation, torch.randn(HEADS, n, 64)
        seen = look({"query": query, "key": key, "tokens": list(labels)}, causal=causal)
        names += [row.kind for row in seen.table()]
    return names


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ewt", type=Path, required=True)
    parser.add_argument("--plays", type=Path, required=True)
    options = parser.parse_args()
    torch.manual_seed(0)
    for count in WORDS:
        named, null = [], []
        for text in beginnings(options.ewt, options.plays, count):
            seen = look(text)
            named.append([row.kind for row in seen.table()])
            for causal in (False, True):
                null += random_names(seen.scene.tokens.labels, causal)
        own = [majority(column) for column in zip(*named, strict=True)]
        labels = [(name, mine) for row in named for name, mine in zip(row, own, strict=True)]
        false = sum(name not in ("broad", "none") for name in null)
        print(f"{count} words, {len(own)} heads")
        print("  alike by every other text", alike(named, (slice(0, None, 2), slice(1, None, 2))))
        print("  alike by source", alike(named, (slice(0, TEXTS), slice(TEXTS, None))))
        print("  of one text", sum(name == mine for name, mine in labels) / len(labels))
        print("  random, named otherwise", false, "of", len(null))
        order = [*(kind.name for kind in kinds.KINDS), "none"]
        print("  heads of each kind", {name: own.count(name) for name in order if name in own})


if __name__ == "__main__":
    main()
