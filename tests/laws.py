"""The lists that every law runs over: a new part is one line here.

Each entry builds a part for given sizes; tensors in it require gradients, so that laws about
gradients cover them. `Sizes` are drawn so that they cross the edges of the tests' small tiles.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from regard import (
    Additive,
    Alibi,
    Attention,
    Bias,
    Bilinear,
    Causal,
    Cosine,
    Dense,
    Distance,
    Documents,
    Dot,
    Dropout,
    Features,
    Identity,
    Padding,
    PositionOnly,
    Prefix,
    Relu,
    RowSum,
    Sigmoid,
    Softmax,
    Window,
    attention,
)
from regard.feature_map import Affine, RandomFeatures, identity, softmax
from regard.form import FORMS
from regard.graph import Graph
from regard.grid import Grid
from regard.position import (
    T5,
    Cope,
    Field,
    Fire,
    Gaussian,
    Kerple,
    Relative,
    Rotary,
    Shaw,
    Shift,
    TransformerXL,
)

__all__ = ["FORMS", "MASKS", "NORMALIZERS", "POSITIONS", "SCORES", "Case", "Sizes", "sizes"]


@dataclass(frozen=True)
class Sizes:
    """batch, heads, key heads, n rows, m columns, width of query and key, width of value."""

    batch: int
    heads: int
    key_heads: int
    n: int
    m: int
    width: int
    value_width: int


sizes = st.builds(
    lambda batch, key_heads, group, n, m, width, value_width: Sizes(
        batch, key_heads * group, key_heads, n, m, width, value_width
    ),
    st.integers(1, 2),
    st.integers(1, 2),
    st.integers(1, 2),
    st.sampled_from([0, 1, 2, 3, 5, 8, 9, 13, 17]),
    st.sampled_from([0, 1, 2, 4, 7, 8, 9, 16, 17]),
    st.sampled_from([1, 2, 5, 8]),
    st.sampled_from([1, 3, 8]),
)


class Draw:
    """Random tensors of one dtype, seeded; all require gradients.

    one_sign: no negative numbers, for the row sum, which scores of both signs bring near zero
    """

    def __init__(self, seed: int, dtype: torch.dtype, *, one_sign: bool = False) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype = dtype
        self.one_sign = one_sign

    def normal(self, *shape: int) -> Tensor:
        # Drawn in float64 and rounded, so that one seed means the same case in every dtype.
        numbers = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        numbers = numbers.abs() if self.one_sign else numbers
        return numbers.to(self.dtype).requires_grad_()

    def positive(self, *shape: int) -> Tensor:
        """In (0, 0.5): slopes that do not push every weight onto one key."""
        numbers = torch.rand(shape, generator=self.generator, dtype=torch.float64) / 2
        return numbers.to(self.dtype).requires_grad_()

    def integers(self, high: int, *shape: int) -> Tensor:
        return torch.randint(max(high, 1), shape, generator=self.generator)

    def bits(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self.generator) < 0.6


def _laplace(draw: Draw, s: Sizes) -> Callable[..., Tensor]:
    sharpness = draw.normal(s.heads, 1, 1)
    square = sharpness.square()  # not a leaf: gradients must reach what it was made from

    def laplace(query: Tensor, key: Tensor, i: Tensor, j: Tensor) -> Tensor:
        distance = (query[..., :, None, :] - key[..., None, :, :]).abs().sum(-1)
        return -square * distance + 0.01 * (i[:, None] - j)

    return laplace


def _learned_rotary(draw: Draw, s: Sizes) -> Rotary | None:
    """Two coordinates for each token, between whole numbers, and an odd channel that stays."""
    if s.width < 2:
        return None
    tokens = 3 * draw.normal(s.batch, 1, max(s.n + 1, s.m), 2).detach()
    frequencies = draw.normal(2, s.width // 2)
    return Rotary(frequencies, "interleaved", tokens, magnitude=1.1, offset=1)


def _fire(draw: Draw, s: Sizes) -> Fire:
    network = draw.normal(4), draw.normal(4), draw.normal(s.heads, 4), draw.normal(s.heads)
    # The derivative by c is a difference of two numbers of size 1 / c.
    return Fire(*network, c=0.1 + draw.positive(), threshold=draw.normal(), offset=1)


def grid(s: Sizes) -> Grid:
    """The keys in two dimensions, as square as they divide, and the queries in other ones."""
    sizes = []
    for length in (s.m, s.n):
        height = next(h for h in range(4, 0, -1) if length % h == 0)
        sizes.append((height, length // height))
    return Grid(*sizes, stride=(1, 2), start=(0, -1))


def _tokens(draw: Draw, s: Sizes, *wide: str) -> Features:
    """Decays (some of them to nothing) and erasing that stays bounded; none if rows go on."""
    if s.n > s.m:
        return Features(identity)
    kind, *erases = wide
    shape = {
        "head": (s.heads, 1, 1),
        "token": (s.batch, s.heads, s.m, 1),
        "channel": (s.heads, s.m, s.width),
        "none": (0,),
    }[kind]
    decay = -4 * draw.positive(*shape) if kind != "none" else None
    offset, beta, erase = s.m - s.n, None, None
    if "delta" in erases:
        beta = draw.positive(s.batch, 1, s.m, 1) / s.width
    if "erase" in erases:
        erase = tuple(draw.normal(s.heads, s.m, s.width) / (4 * s.width) for _ in range(2))
    return Features(
        softmax if beta is not None else identity, None, 0.5, decay, beta, erase, offset
    )


SCORES: dict[str, Callable[[Draw, Sizes], object]] = {
    "dot": lambda draw, s: Dot(),
    "dot softcap": lambda draw, s: Dot(scale=draw.normal(s.heads), softcap=1.5),
    "bilinear": lambda draw, s: Bilinear(draw.normal(s.heads, s.width, s.width)),
    "cosine": lambda draw, s: Cosine(scale=3.0),
    "distance": lambda draw, s: Distance(scale=draw.normal(s.heads)),
    "tanh": lambda draw, s: Additive(draw.normal(s.heads, s.width)),
    "leaky_relu": lambda draw, s: Additive(draw.normal(s.width), "leaky_relu"),
    "relu": lambda draw, s: Additive(draw.normal(s.heads, s.width), "relu"),
    "gelu": lambda draw, s: Additive(draw.normal(s.heads, s.width), "gelu"),
    "sigmoid": lambda draw, s: Additive(draw.normal(s.heads, s.width), "sigmoid"),
    "position only": lambda draw, s: PositionOnly(),
    "own function": _laplace,
    # A row sum divides the scale away: its gradient is then all rounding.
    "features": lambda draw, s: Features(scale=0.5 if draw.one_sign else draw.normal(s.heads)),
    "features learned": lambda draw, s: Features(
        Affine(draw.normal(s.heads, s.width, s.width), draw.normal(s.heads, s.width)), torch.exp
    ),
    "features random": lambda draw, s: Features(RandomFeatures(draw.normal(s.width, s.width) / 2)),
    "features retention": lambda draw, s: _tokens(draw, s, "head"),
    "features decay": lambda draw, s: _tokens(draw, s, "token"),
    "features decays": lambda draw, s: _tokens(draw, s, "channel"),
    "features delta": lambda draw, s: _tokens(draw, s, "none", "delta"),
    "features gated delta": lambda draw, s: _tokens(draw, s, "token", "delta"),
    "features erase": lambda draw, s: _tokens(draw, s, "channel", "erase"),
}

POSITIONS: dict[str, Callable[[Draw, Sizes], object]] = {
    "none": lambda draw, s: None,
    "alibi": lambda draw, s: Alibi(draw.positive(s.heads), offset=2),
    "bias": lambda draw, s: Bias(draw.normal(s.batch, 1, s.n, s.m)),
    "rotary": lambda draw, s: Rotary.of(s.width, offset=1) if s.width % 2 == 0 else None,
    "learned rotary": _learned_rotary,
    "relative": lambda draw, s: Relative(draw.normal(s.heads, 8), left=3, offset=1),
    "t5": lambda draw, s: T5(draw.normal(s.heads, 8), max_distance=9),
    "t5 one way": lambda draw, s: T5(draw.normal(s.heads, 6), bidirectional=False, max_distance=9),
    "kerple log": lambda draw, s: Kerple(draw.positive(s.heads), draw.positive(s.heads), offset=2),
    "kerple power": lambda draw, s: Kerple(draw.positive(s.heads), draw.positive(s.heads), "power"),
    "fire": _fire,
    "shaw": lambda draw, s: Shaw(draw.normal(s.heads, 6, s.width), left=2, offset=1),
    "transformer-xl": lambda draw, s: TransformerXL(
        draw.normal(s.heads, s.width, 6),
        draw.normal(s.heads, s.width),
        draw.normal(s.heads, s.width),
    ),
    "cope": lambda draw, s: Cope(draw.normal(s.heads, 4, s.width)),
    "shift": lambda draw, s: Shift(draw.integers(3, s.heads, 2) - 1, grid(s), "reflect"),
    "shift, zeros": lambda draw, s: Shift(draw.integers(5, s.heads, 2) - 2, grid(s)),
    # Wide spots: squares of the distances met here go up to hundreds, and gradients sum them.
    "gaussian": lambda draw, s: Gaussian(
        draw.normal(s.heads, 2), draw.positive(s.heads) / 4, grid(s)
    ),
    "gaussian, any shape": lambda draw, s: Gaussian(
        draw.normal(s.heads, 2), draw.normal(s.heads, 2, 2) / 4, grid(s)
    ),
    "field": lambda draw, s: Field(draw.normal(s.heads, 3, 2), grid(s), dilation=(1, 2)),
    "alibi + row bias": lambda draw, s: Alibi.of(s.heads) + Bias(draw.normal(s.heads, 1, s.m)),
}

MASKS: dict[str, Callable[[Draw, Sizes], object]] = {
    "none": lambda draw, s: None,
    "causal": lambda draw, s: Causal(),
    "causal, last": lambda draw, s: Causal(offset=s.m - s.n),
    "causal, few see": lambda draw, s: Causal(offset=-3),
    "window": lambda draw, s: Window(2, 1, offset=1),
    "causal window": lambda draw, s: Causal(offset=2) & Window(3, None),
    "documents": lambda draw, s: Documents(
        draw.integers(3, s.batch, s.n), draw.integers(3, s.batch, s.m)
    ),
    "causal documents": lambda draw, s: (
        Causal(s.m - s.n)
        & Documents(
            (docs := draw.integers(3, s.batch, max(s.n, s.m)).sort().values)[
                :, docs.shape[-1] - s.n :
            ],
            docs[:, docs.shape[-1] - s.m :],
        )
    ),
    "causal padded": lambda draw, s: (
        Causal(s.m - s.n) & Padding.of_lengths(draw.integers(s.m + 1, s.batch), s.m)
    ),
    "prefix": lambda draw, s: Causal() | Prefix(draw.integers(s.m, s.batch)),
    "padding": lambda draw, s: Padding(draw.bits(s.batch, s.m)),
    "dense": lambda draw, s: Dense(draw.bits(s.batch, s.heads, s.n, s.m)),
    "not window": lambda draw, s: ~Window(1, 1) & Padding(draw.bits(s.batch, s.m)),
    "graph": lambda draw, s: Graph(
        torch.stack([draw.integers(size, 2 * s.n * min(s.m, 1)) for size in (s.m, s.n)])
    ),
    "nothing": lambda draw, s: Causal() & ~Causal(),
}

NORMALIZERS: dict[str, Callable[[Draw, Sizes], object]] = {
    "softmax": lambda draw, s: Softmax(),
    "sinks": lambda draw, s: Softmax(sink=draw.normal(s.heads)),
    "softmax plus one": lambda draw, s: Softmax(sink=0.0),
    "sigmoid": lambda draw, s: Sigmoid(bias=-1.0),
    "relu": lambda draw, s: Relu(),
    "relu mean": lambda draw, s: Relu(mean=True),
    "row sum": lambda draw, s: RowSum(eps=1e-3),
    "identity": lambda draw, s: Identity(),
}


@dataclass(frozen=True)
class Case:
    """One matrix and value, named by its parts, made again from its seed in any dtype."""

    score: str
    position: str
    mask: str
    normalizer: str
    sizes: Sizes
    seed: int

    def build(self, dtype: torch.dtype) -> tuple[Attention, Tensor]:
        s, draw = self.sizes, Draw(self.seed, dtype, one_sign=self.normalizer == "row sum")
        # Batch axes that broadcast, one way after the other; dropout for every third seed.
        way = self.seed % 4
        matrix = attention(
            draw.normal(1 if way == 3 else s.batch, s.heads, s.n, s.width),
            draw.normal(1 if way == 2 else s.batch, s.key_heads, s.m, s.width),
            score=SCORES[self.score](draw, s),
            position=POSITIONS[self.position](draw, s),
            mask=MASKS[self.mask](draw, s),
            normalizer=NORMALIZERS[self.normalizer](draw, s),
            dropout=Dropout(0.3, seed=self.seed) if self.seed % 3 == 0 else None,
        )
        more = (2, s.batch) if way == 1 else (1,)
        return matrix, draw.normal(*more, s.key_heads, s.m, s.value_width)


cases = st.builds(
    Case,
    st.sampled_from(list(SCORES)),
    st.sampled_from(list(POSITIONS)),
    st.sampled_from(list(MASKS)),
    st.sampled_from(list(NORMALIZERS)),
    sizes,
    st.integers(0, 2**16),
)


def inputs(matrix: Attention, value: Tensor) -> list[Tensor]:
    """Everything the product depends on."""
    return [matrix.query, matrix.key, value, *matrix.rule.tensors()]


def on(matrix: Attention, tensors: list[Tensor], form: str) -> Tensor:
    """The product of the same parts on other `inputs`."""
    query, key, value, *own = tensors
    rule = matrix.rule.with_tensors(own)
    return Attention(query, key, rule, matrix.mask, matrix.dropout).matmul(value, form=form)


def results(matrix: Attention, value: Tensor, form: str, seed: int = 0) -> dict[str, Tensor]:
    """The product and its gradients with respect to everything, under a random linear loss."""
    output = matrix.matmul(value, form=form)
    generator = torch.Generator().manual_seed(seed)
    loss = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output.dtype)
    inputs = {"query": matrix.query, "key": matrix.key, "value": value}
    inputs |= {name: x for name, x in matrix.rule.named_tensors() if x.requires_grad}
    gradients = torch.autograd.grad(output, list(inputs.values()), loss, allow_unused=True)
    return {"output": output.detach()} | {
        f"gradient of {name}": torch.zeros_like(x) if gradient is None else gradient
        for (name, x), gradient in zip(inputs.items(), gradients, strict=True)
    }


def contributions(matrix: Attention, value: Tensor, seed: int = 0) -> dict[str, Tensor]:
    """Sum of |gradient| over the rows that the gradient of a part's tensor is the sum of.

    The rounding of a sum is measured against the sizes of its terms (Higham 2002, eq. 4.4).
    """
    names = {name: x for name, x in matrix.rule.named_tensors() if x.requires_grad}
    if not names:
        return {}
    output = matrix.matmul(value, form="dense")
    generator = torch.Generator().manual_seed(seed)
    loss = torch.randn(output.shape, generator=generator, dtype=torch.float64)
    rows = output.shape[-2]
    eye = torch.eye(rows, dtype=loss.dtype).reshape(rows, *[1] * (loss.dim() - 2), rows, 1)
    of_rows = loss * eye
    terms = torch.autograd.grad(
        output, list(names.values()), of_rows, is_grads_batched=True, allow_unused=True
    )
    return {
        f"gradient of {name}": torch.zeros(()) if term is None else term.abs().sum(0)
        for name, term in zip(names, terms, strict=True)
    }


def condition(matrix: Attention) -> float:
    """How much rounding a normalizer amplifies: 1, but sum |logit| / |sum logit| for RowSum."""
    if not isinstance(matrix.normalizer, RowSum):
        return 1.0
    logits = matrix.logits().detach().double()
    logits = torch.where(logits == -torch.inf, 0, logits)
    total, size = logits.sum(-1) + matrix.normalizer.eps, logits.abs().sum(-1)
    return float((size / total.abs()).max().clamp(min=1)) if size.numel() else 1.0


def assert_within_dense(
    exact: tuple[Attention, Tensor], low: tuple[Attention, Tensor], form: str, dtype: torch.dtype
) -> None:
    """Output and gradients, measured in roundings of the norm of what they are sums of."""
    eps = torch.finfo(dtype).eps
    reference, terms = results(*exact, "dense"), contributions(*exact)
    found, dense = (results(*low, name) for name in (form, "dense"))
    for name, right in reference.items():
        scale = eps * float(terms.get(name, right).norm()) or 1.0
        error, allowed = (float((x[name] - right).norm()) / scale for x in (found, dense))
        assert error <= 2 * allowed + 1, f"{name}: {error:.2f} roundings, dense {allowed:.2f}"
