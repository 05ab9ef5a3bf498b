"""What is measured: every row of RESULTS.md as data."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial

import torch

from bench import peers, work
from bench.contestant import Contestant
from bench.problem import Parts, Problem, Shape, Tensors, nothing
from bench.work import Work
from regard import (
    Additive,
    Alibi,
    Bias,
    Causal,
    Documents,
    Dot,
    Dropout,
    PositionOnly,
    Softmax,
    Window,
)
from regard.graph import Graph
from regard.grid import Grid
from regard.neighborhood import Neighborhood
from regard.position import Gaussian, Shaw, TransformerXL

LEFT = 256
"""Neighbours to the left in a window; with the token itself it shows 257 keys."""
DOCUMENTS = (700, 500, 848)
"""Lengths of the documents that are packed into one sequence."""


@dataclass(frozen=True)
class Case:
    """Contestants that take turns; the first is regard, against which the others are set.

    work: what is counted
    footprint: the memory of a call is measured, too
    price: the contestants solve different problems, and the first is the plain one
    """

    title: str
    contestants: tuple[Contestant, ...]
    work: Work = work.PRODUCTS
    footprint: bool = False
    price: bool = False

    @property
    def problem(self) -> Problem:
        """The problem of the first contestant."""
        return self.contestants[0].problem

    @property
    def name(self) -> str:
        """What `--only` searches."""
        return f"{self.kind}, {self.problem.shape}"

    @property
    def kind(self) -> str:
        """The name without the shape."""
        dtype = str(self.problem.dtype).removeprefix("torch.")
        return f"{self.title}, {dtype}, {self.passes}"

    @property
    def passes(self) -> str:
        """Which passes are timed."""
        return "forward + backward" if self.problem.train else "forward"


def causal(tensors: Tensors) -> Parts:
    """The causal mask."""
    return {"mask": Causal()}


def windowed(tensors: Tensors) -> Parts:
    """A causal window."""
    return {"mask": Causal() & Window(LEFT, 0)}


def softmax(problem: Problem, *, footprint: bool = False) -> Case:
    """Plain attention beside torch's own kernel."""
    is_causal = problem.parts is causal
    return Case(
        "causal" if is_causal else "full",
        (
            Contestant("regard", problem, peers.product, ours=True),
            Contestant("torch sdpa", problem, partial(peers.sdpa, is_causal=is_causal)),
        ),
        footprint=footprint,
    )


def plain() -> list[Case]:
    """Softmax dot products of the usual shapes."""
    long, middle, short = Shape(1, 8, 2048, 64), Shape(8, 12, 512, 64), Shape(8, 12, 128, 32)
    wide = Shape(1, 8, 2048, 128)
    both = [
        Problem(shape, parts) if parts else Problem(shape)
        for shape in (long, middle, wide, short)
        for parts in (None, causal)
    ]
    half = [
        Problem(long, dtype=torch.bfloat16),
        Problem(long, causal, dtype=torch.bfloat16),
        Problem(middle, causal, dtype=torch.bfloat16),
        Problem(wide, causal, dtype=torch.bfloat16),
    ]
    trained = [replace(problem, train=True) for problem in both if problem.shape != wide]
    trained += [replace(problem, train=True) for problem in half]
    return [
        softmax(problem, footprint=problem.train and problem.shape == long)
        for problem in both + half + trained
    ]


def decode() -> list[Case]:
    """One new token against a cache, four query heads to a key head."""
    shape = Shape(8, 32, 1, 128, keys=8192, key_heads=8)
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        problem = Problem(shape, dtype=dtype)
        contestants = (
            Contestant("regard", problem, peers.product, ours=True),
            Contestant("torch sdpa, enable_gqa", problem, partial(peers.sdpa, enable_gqa=True)),
            Contestant("torch sdpa, group folded by hand", problem, peers.sdpa_folded),
        )
        found.append(Case("decode, grouped heads", contestants, work.CACHE))
    return found


def window() -> list[Case]:
    """A window, for which torch needs a mask tensor or a compiler."""
    problem = Problem(Shape(1, 8, 8192, 64), windowed)
    masked, flex = (partial(way, left=LEFT) for way in (peers.sdpa_window, peers.flex_window))
    contestants = (
        Contestant("regard", problem, peers.product, ours=True),
        Contestant("torch sdpa, mask tensor", problem, masked),
        Contestant("torch flex_attention, compiled", problem, flex, compiles=True),
    )
    return [Case(f"causal window {LEFT}", contestants, footprint=True)]


def additive(tensors: Tensors, activation: str) -> Parts:
    """An additive score with a weight per head."""
    return {"score": Additive(tensors["weight"], activation)}


def weight(shape: Shape) -> Tensors:
    """The w of additive scores."""
    return {"weight": torch.randn(shape.heads, shape.width)}


def additives() -> list[Case]:
    """Additive scores; KeOps is left out of training, whose backward it compiles for a minute."""
    found = []
    for title, activation in (("additive tanh", "tanh"), ("GATv2", "leaky_relu")):
        for train in (False, True):
            problem = Problem(
                Shape(1, 4, 1024, 64),
                partial(additive, activation=activation),
                weight,
                learned=("weight",),
                train=train,
            )
            eager, compiled, keops = (
                partial(way, activation=activation)
                for way in (peers.eager_additive, peers.compiled_additive, peers.keops_additive)
            )
            contestants = [
                Contestant("regard", problem, peers.product, ours=True),
                Contestant("torch eager", problem, eager),
                Contestant("torch.compile", problem, compiled, compiles=True),
            ]
            if not train:
                contestants.append(Contestant("pykeops", problem, keops, compiles=True))
            found.append(Case(title, tuple(contestants), work.TRIPLES, footprint=train))
    return found


NODES, EDGES = 8192, 10
"""Of a graph: how many, and how many into each."""


@cache
def graph() -> Graph:
    """Edges from nodes of near numbers, as nodes of a graph have that were put in order."""
    generator = torch.Generator().manual_seed(0)
    target = torch.arange(NODES).repeat(EDGES)
    source = target + torch.randint(-200, 200, target.shape, generator=generator)
    return Graph(torch.stack([source % NODES, target]).unique(dim=1))


def edgewise(tensors: Tensors) -> Parts:
    """GATv2 along the edges of a graph, which a model makes a mask of once."""
    return {"score": Additive(tensors["weight"], "leaky_relu"), "mask": graph()}


def graphs() -> list[Case]:
    """Attention along edges beside sums over edges."""
    shape = Shape(1, 8, NODES, 8)
    along = partial(peers.edge_by_edge, edges=graph().edges)
    problems = [
        Problem(shape, edgewise, weight, learned=("weight",), train=train)
        for train in (False, True)
    ]
    return [
        Case(
            f"GATv2 along {EDGES} edges a node",
            (
                Contestant("regard", problem, peers.product, ours=True),
                Contestant("torch index_add, edge by edge", problem, along),
            ),
            work.TRIPLES,
        )
        for problem in problems
    ]


SIDE, TAPS = 64, 7
"""Of an image, and of the field that its heads see."""


def spots(tensors: Tensors) -> Parts:
    """Heads that look at a soft spot of the field, which learns."""
    side = math.isqrt(tensors["query"].shape[-2])
    near = Neighborhood((side, side), TAPS, border="cut")
    spot = Gaussian(tensors["centre"], tensors["sharpness"], Grid((side, side)))
    return {"score": PositionOnly(), "position": spot, "mask": near}


def centres(shape: Shape) -> Tensors:
    """Where they look, and how sharply."""
    return {"centre": torch.randn(shape.heads, 2), "sharpness": torch.rand(shape.heads)}


def fields() -> list[Case]:
    """Position alone: a convolution against the same matrix as a matrix."""
    found = []
    for train in (False, True):
        learned = ("centre", "sharpness")
        problem = Problem(
            Shape(1, 2, SIDE * SIDE, 64), spots, centres, learned=learned, train=train
        )
        contestants = (
            Contestant("regard", problem, peers.product, ours=True),
            Contestant("torch conv2d by hand", problem, partial(peers.convolution, taps=TAPS)),
            Contestant("regard, form dense", problem, partial(peers.product_in, form="dense")),
        )
        title = f"field of {TAPS} x {TAPS} on {SIDE} x {SIDE}"
        found.append(Case(title, contestants, work.TAPS, footprint=not train))
    return found


def looking() -> list[Case]:
    """Statistics of a map that is never stored."""
    problem = Problem(Shape(1, 1, 16384, 64), looked=True)
    contestants = (
        Contestant("regard", problem, peers.looks, ours=True),
        Contestant("torch eager", problem, peers.looked_eagerly),
    )
    title = "topk(8), entropy, received and pool(256)"
    return [Case(title, contestants, work.LOGITS, footprint=True)]


def small() -> list[Case]:
    """A call so small that only its overhead is seen."""
    case = softmax(Problem(Shape(1, 1, 16, 16)))
    return [replace(case, title="small call", work=work.CALL)]


def sinks(shape: Shape) -> Tensors:
    """A sink for each head."""
    return {"sink": torch.randn(shape.heads)}


def bias(shape: Shape) -> Tensors:
    """A bias for each head and pair."""
    return {"bias": torch.randn(shape.heads, shape.n, shape.m)}


def slopes(shape: Shape) -> Tensors:
    """ALiBi's slopes, which are not learned."""
    return {"slopes": Alibi.of(shape.heads).slopes}


BAND = 129
"""Relative positions that Shaw's table tells apart: the token itself and 128 before it."""


def band(shape: Shape) -> Tensors:
    """Shaw's table, one for each head."""
    return {"band": torch.randn(shape.heads, BAND, shape.width)}


def waves(shape: Shape) -> Tensors:
    """What Transformer-XL learns: the map of its sinusoids, and its u and v."""
    heads, width = shape.heads, shape.width
    return {
        "wave": torch.randn(heads, width, width) * width**-0.5,
        "u": torch.randn(heads, width),
        "v": torch.randn(heads, width),
    }


def documents(shape: Shape) -> Tensors:
    """The document of each token."""
    return {"documents": torch.arange(len(DOCUMENTS)).repeat_interleave(torch.tensor(DOCUMENTS))}


PLAIN = Problem(Shape(1, 8, sum(DOCUMENTS), 64), causal)


def with_part(extras: Callable[[Shape], Tensors] = nothing, **parts: object) -> Problem:
    """The plain problem with one part more; a part that needs a tensor is a function of them."""

    def all_parts(tensors: Tensors) -> Parts:
        made = {name: part(tensors) if callable(part) else part for name, part in parts.items()}
        return {"mask": Causal(), **made}

    return replace(PLAIN, parts=all_parts, extras=extras)


PRICED: dict[str, Problem] = {
    "plain": PLAIN,
    "ALiBi": with_part(slopes, position=lambda t: Alibi(t["slopes"])),
    "dense bias": replace(with_part(bias, position=lambda t: Bias(t["bias"])), learned=("bias",)),
    "Shaw": replace(
        with_part(band, position=lambda t: Shaw(t["band"], BAND - 1)), learned=("band",)
    ),
    "Transformer-XL": replace(
        with_part(waves, position=lambda t: TransformerXL(t["wave"], t["u"], t["v"])),
        learned=("wave", "u", "v"),
    ),
    "documents": with_part(documents, mask=lambda t: Causal() & Documents(t["documents"])),
    f"window {LEFT}": replace(PLAIN, parts=windowed),
    "sinks": replace(
        with_part(sinks, normalizer=lambda t: Softmax(sink=t["sink"])), learned=("sink",)
    ),
    "softcap": with_part(score=Dot(softcap=30.0)),
    "dropout": with_part(dropout=Dropout(0.1, seed=1)),
    "value of width 128": replace(PLAIN, shape=PLAIN.shape._replace(value_width=128)),
    "value of width 32": replace(PLAIN, shape=PLAIN.shape._replace(value_width=32)),
}
"""Parts, each of which should cost what the plain kernel costs per visible pair."""


def prices() -> list[Case]:
    """Each part beside the plain causal product."""
    return [
        Case(
            "price of parts",
            tuple(
                Contestant(name, replace(problem, train=train), peers.product, ours=True)
                for name, problem in PRICED.items()
            ),
            price=True,
        )
        for train in (False, True)
    ]


CASES = [
    *plain(),
    *decode(),
    *window(),
    *additives(),
    *graphs(),
    *fields(),
    *looking(),
    *small(),
    *prices(),
]
