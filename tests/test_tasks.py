"""What the scripts of `examples/tasks` compute besides training: known answers, by other ways."""

from __future__ import annotations

import itertools
import math
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("tqdm", reason="the examples show how far they are: regard[examples]")
pytest.importorskip("safetensors", reason="the examples save models: regard[examples]")
pytest.importorskip("numpy", reason="the examples read arrays: regard[examples]")

sys.path.append(str(Path(__file__).parent.parent))

from examples.tasks import digits, pieces, sequences, translation


def random_words():
    generator = torch.Generator().manual_seed(4)
    lengths = torch.randint(1, 9, (70,), generator=generator).tolist()
    words = [torch.randint(5, (n, 3), generator=generator) for n in lengths]
    return sequences.Sequences(words, [x.sum(-1) for x in words])


def test_an_epoch_reads_every_sequence_once():
    data = random_words()
    draw = data.batches(torch.Generator().manual_seed(0))
    found = []
    for _ in range(3):  # 70 sequences in batches of 32
        (words, lengths), said = draw()
        assert ((said == -100).sum(1) == words.shape[1] - lengths).all()
        found += [x[:n].tolist() for x, n in zip(words, lengths, strict=True)]
    assert sorted(found) == sorted(x.tolist() for x in data.words)


def test_accuracy_counts_what_is_asked_alone():
    data = random_words()

    class Sum(nn.Module):
        """Right about sums below 7."""

        def forward(self, words):
            return nn.functional.one_hot(words[0].sum(-1).clamp(max=6), 13).float()

    asked = torch.cat(data.targets)
    wanted = 100 * float((asked < 7).double().mean())
    assert 0 < wanted < 100
    assert data.accuracy(Sum()) == pytest.approx(wanted)


def test_words_that_were_never_seen_have_features():
    vocabulary = sequences.Vocabulary.of([["walked", "talked"], ["Walked", "once"]])
    (known, new), (lonely,) = vocabulary.read([["walked", "balked"], ["xyz"]])
    number = vocabulary.number["last lked"]
    assert number in known.tolist()
    assert number in new.tolist()
    assert "once" not in vocabulary.number  # it stands once
    assert lonely.count_nonzero() == 1  # its shape, that of all small words


def test_the_bands_of_a_tone():
    time = torch.arange(4000) / digits.RATE
    low, high = (digits.spectra(torch.sin(2 * torch.pi * f * time)) for f in (300.0, 3000.0))
    assert low.shape == (1 + 4000 // digits.HOP, digits.BANDS)
    top = 2595 * math.log10(1 + digits.RATE / 2 / 700)
    centres = torch.linspace(0, top, digits.BANDS + 2)
    for f, raw in ((300.0, low), (3000.0, high)):
        mel = 2595 * math.log10(1 + f / 700)
        wave = torch.sin(2 * torch.pi * f * time)
        window = torch.hann_window(digits.FRAME)
        power = torch.stft(wave, digits.FRAME, digits.HOP, window=window, return_complex=True)
        energy = (power.abs().square().mT @ digits.bands())[20]
        assert (centres[1:-1] - mel).abs().argmin() == energy.argmax()
        assert raw.mean(0).abs().max() < 1e-4  # float32 sums of 63 numbers of size 10


def every_sequence(longest):
    """Of tokens 1 to 4, that ends with the end or is as long as may be."""
    for n in range(1, longest + 1):
        for one in itertools.product((1, 2, 3, 4), repeat=n):
            if translation.END not in one[:-1] and (one[-1] == translation.END or n == longest):
                yield one


def test_a_wide_beam_finds_the_best_translation_of_all():
    """Every sequence of up to four tokens, scored by the whole model at once."""
    torch.manual_seed(3)
    model = translation.Translator(5).eval()
    # One table for what is read and written would say each token again.
    model.embed = torch.randn(5, translation.WIDTH).__getitem__
    with torch.no_grad():
        model.out.weight *= 2  # far from uniform, so that tokens differ, and lengths:
        model.out.bias[translation.END] -= 3
    source = torch.randint(2, 5, (16, 5))
    source[:8, 3:] = 0
    found = translation.beam_search(model, source, beams=128, longest=4)
    best = []
    for row in source:
        scores = {}
        for n, group in itertools.groupby(sorted(every_sequence(4), key=len), len):
            ones = torch.tensor(list(group))
            begun = torch.cat([torch.full_like(ones[:, :1], translation.END), ones[:, :-1]], 1)
            with torch.no_grad():
                gains = model((row[None, row > 0].expand(len(ones), -1), begun)).log_softmax(-1)
            total = gains.gather(-1, ones[..., None]).sum((1, 2))
            # Its length counts the beginning, as in the search.
            scores |= zip(map(tuple, ones.tolist()), (total / (1 + n) ** 0.6).tolist(), strict=True)
        best.append(list(max(scores, key=scores.__getitem__)))
    assert [row[row > 0].tolist() for row in found] == best
    assert max(map(len, best)) == 4  # its end depends on what beams keep
    greedy = translation.beam_search(model, source, beams=1, longest=4)
    assert [row[row > 0].tolist() for row in greedy] != best  # or there was nothing to find


def test_pieces_join_the_most_frequent_pair_first():
    words = ["low"] * 5 + ["lower"] * 2 + ["newest"] * 6 + ["widest"] * 3
    known = pieces.Pieces([words], 4)
    # Nine each: es, st, and est, of which the first by letters is taken; then one of seven.
    assert list(known.rank) == [("e", "s"), ("es", "t"), ("l", "o"), ("lo", "w")]
    assert [known.names[k] for k in known.read(["lowest"]).tolist()] == ["▁", "low", "est", ""]


@pytest.mark.parametrize("merges", [0, 3, 1000])
def test_pieces_are_words_again(merges):
    sentence = ["banana", "bandana", "a", "aaaa", "an", ",", "ban"]
    known = pieces.Pieces([sentence, sentence], merges)
    numbers = known.read(sentence).tolist()
    assert known.write([*numbers, 5]) == sentence  # nothing behind the end
    assert pieces.UNKNOWN in known.read(["x"]).tolist()


def by_hand(words, merges):
    """All pairs counted anew before each merge."""
    words, found = [tuple("▁" + word) for word in words], []
    for _ in range(merges):
        counts = Counter(pair for word in words for pair in itertools.pairwise(word))
        best = min(counts, key=lambda pair: (-counts[pair], pair), default=None)
        if best is None or counts[best] < 2:
            break
        found.append(best)
        words = [tuple(pieces._joined(list(word), best)) for word in words]
    return found


def test_counts_that_are_kept_are_those_counted_anew():
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, 9, (60,), generator=generator).tolist()
    draw = [torch.randint(3, (n,), generator=generator).tolist() for n in lengths]
    words = ["".join("abc"[k] for k in one) for one in draw]
    found = list(pieces.Pieces([words], 25).rank)
    assert found == by_hand(words, 25)
    assert len(found) == 25


def test_bleu_of_a_known_case():
    wanted = ["the", "cat", "is", "on", "the", "mat"]
    assert translation.bleu([wanted], [wanted]) == pytest.approx(100)
    assert translation.bleu([["the"] * 6], [wanted]) == 0  # no pair is shared
    found = ["the", "cat", "is", "on", "a", "mat"]
    # Shared of 6, 5, 4, 3: 5, 3, 2, 1.
    product = (5 / 6) * (3 / 5) * (2 / 4) * (1 / 3)
    assert translation.bleu([found], [wanted]) == pytest.approx(100 * product**0.25)
    short = wanted[:5]  # nothing wrong, but one word too few: exp(1 - 6 / 5)
    assert translation.bleu([short], [wanted]) == pytest.approx(81.8730753)
