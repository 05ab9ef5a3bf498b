"""Every encoding drawn, and what attention knows of order, from live operators; nothing is trained.

Pictures: `input` the encodings that are added to the input, and what a dot product can read from
them; `score` the biases that are added to the score; `distance` some of them by distance; `mask`
what a causal mask gives away. Tables, `facts`: how each score changes when query and key move
together, and how each output changes when the tokens are permuted.

Sources stand with each part of regard; those of `mask` are Kazemnejad et al. 2023,
arXiv:2305.19466, theorem 1, and Zuo, Guerzhoy, Guerzhoy 2025, arXiv:2501.00073.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from examples import report
from examples.positions import order, pictures
from examples.positions.encodings import RESULTS
from examples.positions.known import HEADS, KNOWN, WIDTH, Known, field, placed, random
from examples.positions.pictures import Lines, Map
from regard import Causal, attention
from regard.nn import Learned, Sinusoidal
from regard.position import (
    T5,
    Alibi,
    Cope,
    Fire,
    Interpolation,
    Kerple,
    Position,
    Rotary,
    Shaw,
    TransformerXL,
)

SHIFTS = (1, 5, 11)


def shift_gap(known: Known, n: int = 24) -> float:
    """The largest change of a score when its query and key move together, among other tokens."""
    query, key, _ = order.vectors(HEADS, n, WIDTH)
    largest = 0.0
    for i, j in ((2, 1), (1, 4), (8, 0), (3, 3)):
        scores = []
        for by in (0, *SHIFTS):
            rows, columns, _ = order.vectors(HEADS, n, WIDTH, seed=1 + by)
            rows[:, i + by], columns[:, j + by] = query[:, i], key[:, j]
            rows, columns, part = placed(known, rows, columns)
            scores.append(attention(rows, columns, position=part).logits()[:, i + by, j + by])
        moved = torch.stack(scores).detach()
        largest = max(largest, float((moved - moved[0]).abs().max()))
    return largest


def facts(folder: Path) -> None:
    """The table of what each encoding does, measured."""
    rows = []
    for known in KNOWN:
        query, key, value = order.vectors(HEADS, 16, WIDTH)
        _, _, part = placed(known, query, key)
        full = order.order_gap((query, key, value), lambda q, k, known=known: placed(known, q, k))
        invariant = known.where == "nothing" or (part is not None and part.shift_invariant)
        form = attention(query, key, position=part, mask=Causal()).explain(value).form
        gap = shift_gap(known)
        if (gap < 1e-12) is not invariant:
            raise AssertionError(f"{known.name} says {invariant}, and a score moves by {gap}.")
        alone = part is not None and part.toeplitz
        said = ["yes" if fact else "no" for fact in (invariant, alone)]
        rows.append((known.name, known.where, f"{gap:.1e}", *said, f"{full:.1e}", form))
    head = (
        "encoding",
        "acts on",
        "score moves by",
        "shift-invariant",
        "by i - j alone",
        "output moves by",
        "form",
    )
    shifts = ", ".join(map(str, SHIFTS[:-1]))
    report.write(
        folder,
        "facts",
        "# What each encoding does, measured",
        "`python -m examples.positions.show`, float64, random numbers where an encoding learns "
        f"them. *Score moves by*: the largest change of a score when query and key move {shifts} "
        f"or {SHIFTS[-1]} places to the right among other tokens; *shift-invariant* is what the "
        "part says of itself, and the script stops if the two disagree. *By i - j alone*: the bias "
        "is one vector of n + m - 1 numbers (Toeplitz). *Output moves by*: how far the output of "
        "permuted tokens is from the permuted output, without a mask. *Form*: what runs on this "
        "CPU under a causal mask.",
        report.table(head, rows),
    )


def draw_input(folder: Path, n: int = 64, width: int = 64) -> None:
    """The encodings of the input, one column per position, and their cosines."""
    layers: dict[str, nn.Module] = {
        "sinusoidal": Sinusoidal(width),
        "learned, before training": Learned(n, width),
        "continuous, a random path": field(width),
    }
    top, bottom = [], []
    for name, layer in layers.items():
        with torch.no_grad():
            encoding = layer.encoding(torch.arange(n))
        unit = encoding / encoding.norm(dim=-1, keepdim=True)
        top.append(Map(name, encoding.T, "value", "position i", "channel"))
        bottom.append(Map("", unit @ unit.T, "cosine of $e_i$, $e_j$", "position j", "position i"))
    pictures.maps([top, bottom], folder, "input")


def bias(part: Position, query: Tensor, key: Tensor) -> Tensor:
    """What a part changes of the scores, [n, n]; NaN where the causal mask hides the key."""
    changed, plain = (
        attention(query, key, position=position, mask=Causal()).logits()
        for position in (part, None)
    )
    return (changed - plain).detach().squeeze(0)


def draw_score(folder: Path, n: int = 48, width: int = 16) -> None:
    """The biases of the score: rows are queries, columns keys, causal."""
    equal = torch.ones(1, n, width, dtype=torch.float64)
    marked = torch.full((1, n, 2), -20.0, dtype=torch.float64)
    marked[:, ::8], marked[..., 1] = 20.0, 0.0
    count = torch.stack([torch.zeros(8), -torch.arange(8.0)], -1).double()
    buckets = T5(-torch.arange(8.0)[None], bidirectional=False, max_distance=32)
    ramp = Fire(*(torch.tensor(x) for x in ([1.0], [0.0], [[-3.0]], [0.0], 1.0, 8.0)))
    log = Kerple(torch.tensor([1.0]), torch.tensor([1.0]))
    xl = TransformerXL(random(1, width, 32), random(1, width), random(1, width))
    shown = (
        ("ALiBi, slope 1/16", Alibi(torch.tensor([1 / 16])), equal, equal),
        ("Kerple, $-\\log(1 + d)$", log, equal, equal),
        ("FIRE, $f(x) = -3x$", ramp, equal, equal),
        ("CoPE, marked tokens count", Cope(count, scale=1.0), equal[..., :2], marked),
        ("T5, 8 buckets: 0, -1, ... -7", buckets, equal, equal),
        ("Shaw, clipped at 8", Shaw(random(17, width), 8), equal, equal),
        ("Transformer-XL", xl, equal, equal),
        ("rotary, on equal vectors", Rotary.of(width), equal, equal),
    )
    found = [
        Map(name, bias(part, query, key), "added to the score", "key j", "query i")
        for name, part, query, key in shown
    ]
    pictures.maps([found[:4], found[4:]], folder, "score")


def draw_distance(folder: Path, n: int = 128, width: int = 64) -> None:
    """Some encodings by distance: the last row of each matrix, read from the diagonal."""
    equal = torch.ones(1, n, width, dtype=torch.float64)

    def back(part: Position, row: int = n - 1) -> list[float]:
        return bias(part, equal, equal)[row, : row + 1].flip(0).tolist()

    alibi = {f"slope 1/{2**k}": back(Alibi(torch.tensor([2.0**-k]))) for k in (2, 4, 6, 8)}
    one, half = torch.tensor([1.0]), torch.tensor([0.5])
    kerple = {
        "log, $-\\log(1 + d)$": back(Kerple(one, one)),
        "power, $-d^{1/2}$": back(Kerple(one, half, "power")),
    }
    ramp = Fire(*(torch.tensor(x) for x in ([1.0], [0.0], [[-3.0]], [0.0], 1.0, 8.0)))
    fire = {f"query at {row}": back(ramp, row) for row in (15, 63, n - 1)}
    rotary = {
        "base 10000": back(Rotary.of(width)),
        "positions divided by 4": back(Rotary.of(width, scaling=Interpolation(4.0))),
    }
    y = "added to the score"
    panels = [
        Lines("ALiBi: one line for each head", alibi, "distance i - j", y),
        Lines("Kerple: falls ever more slowly", kerple, "distance i - j", y),
        Lines("FIRE: depends on the query's place too", fire, "distance i - j", y),
        Lines("rotary, on equal vectors: falls, in waves", rotary, "distance i - j", y),
    ]
    pictures.lines([panels[:2], panels[2:]], folder, "distance")


def draw_mask(folder: Path, depth: int, seeds: int, sequences: int) -> None:
    """What a causal mask gives away: a count, the order of the prefix, the position."""
    n = 64
    counted = {"output of the head": order.counted(n).tolist()}
    exact = {"1 / t": [1 / t for t in range(1, n + 1)]}
    gaps = order.prefix_gaps(depth, seeds)
    cases = {
        "causal, first token marked": (Causal(), True, False),
        "causal, with squares": (Causal(), False, True),
        "causal": (Causal(), False, False),
        "no mask, first token marked, with squares": (None, True, True),
    }
    probed = {}
    for name, (mask, marked, squares) in cases.items():
        found = [
            [order.probe(state, squares) for state in states]
            for seed in range(seeds)
            for states in [order.states(mask, depth, seed, (sequences, n), marked)]
        ]
        probed[name] = [sum(column) / seeds for column in zip(*found, strict=True)]
    shuffled = {"largest change": [max(gap) for gap in gaps]}
    change, read = "change of the last output", "$R^2$ of a linear map"
    panels = [
        Lines("equal keys, first value 1", counted | exact, "token t", "output", "both", 1),
        Lines("shuffle all but the last token", shuffled, "layers", change, "y", 1),
        Lines("read the position off", probed, "layers", read, limits=(-0.05, 1.0)),
    ]
    pictures.lines([panels], folder, "mask")
    rows = [(name, *(f"{x:.2f}" for x in found)) for name, found in probed.items()]
    report.write(
        folder,
        "mask",
        "# What a causal mask gives away",
        f"`python -m examples.positions.show`: untrained transformers without positions, {seeds} "
        f"seeds, {sequences} random sequences of {n} tokens. R^2 of a linear map from a token's "
        "vector to its position (the first one left out), fitted to half of the sequences and "
        "tested on the other half; 1 is perfect, 0 no better than always guessing the middle. "
        '"With squares" may also read the squares of the centred channels.',
        report.table(("network", "input", *(f"layer {k + 1}" for k in range(depth))), rows),
        "Largest change of the last output when all tokens before it are shuffled, by depth: "
        + ", ".join(f"{max(gap):.1e}" for gap in gaps)
        + ".",
    )


def main(given: list[str] | None = None) -> None:
    """Write all pictures and tables."""
    parser = report.arguments(__doc__)
    options = report.parse(parser, given, RESULTS)
    torch.manual_seed(0)
    draw_input(options.out)
    draw_score(options.out)
    draw_distance(options.out)
    facts(options.out)
    depth, sequences = (2, 32) if options.quick else (4, 400)
    draw_mask(options.out, depth, options.seeds, sequences)


if __name__ == "__main__":
    main()
