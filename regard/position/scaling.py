"""Frequencies of a rotary encoding, and the ways to stretch them to longer sequences.

A scaling says the frequencies theta_c of width / 2 pairs of channels, and the factor by which it
multiplies rotated vectors (`magnitude`; logits change by its square). Numbers are Python's floats:
they are exact to float64, and no `model.to(bfloat16)` rounds them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from regard import errors

Frequencies = tuple[float, ...]


@dataclass(frozen=True)
class Scaling:
    """No scaling, and the base of those that do: theta_c = base^(-2 c / width).

    Su et al. 2021, arXiv:2104.09864, section 3.2.2.

    >>> Scaling().frequencies(4, 10000.0)
    (1.0, 0.01)
    """

    def frequencies(self, width: int, base: float) -> Frequencies:
        """One frequency, in radians per position, for each of the width / 2 pairs of channels."""
        return tuple(base ** (-2 * c / width) for c in range(width // 2))

    @property
    def magnitude(self) -> float:
        """What rotated queries and keys are multiplied by."""
        return 1.0


@dataclass(frozen=True)
class Interpolation(Scaling):
    """Position interpolation: theta_c / factor, so that factor L positions span the angles of L.

    Chen et al. 2023, arXiv:2306.15595, eq. 4. In transformers: "linear".

    >>> Interpolation(4.0).frequencies(4, 10000.0)
    (0.25, 0.0025)
    """

    factor: float

    def __post_init__(self) -> None:
        errors.check_number("Interpolation's factor", self.factor, least=1)

    def frequencies(self, width: int, base: float) -> Frequencies:
        return tuple(theta / self.factor for theta in super().frequencies(width, base))


@dataclass(frozen=True)
class Ntk(Scaling):
    """NTK-aware scaling: the base becomes base factor^(width / (width - 2)).

    The slowest pair is then interpolated by `factor`, the fastest left as it is.
    bloc97 2023; stated in Peng et al. 2023 (YaRN), arXiv:2309.00071, section 3.1.

    >>> Ntk(4.0).frequencies(4, 10000.0)
    (1.0, 0.0025)
    """

    factor: float

    def __post_init__(self) -> None:
        errors.check_number("Ntk's factor", self.factor, least=1)

    def frequencies(self, width: int, base: float) -> Frequencies:
        if width < 4:
            raise errors.ShapeError(
                f"Ntk stretches the base by factor^(width / (width - 2)), so it needs a width of "
                f"at least 4, not {width}."
            )
        return super().frequencies(width, base * self.factor ** (width / (width - 2)))


@dataclass(frozen=True)
class DynamicNtk(Scaling):
    """NTK-aware scaling that grows with the length: factor' = factor n / L - (factor - 1), n >= L.

    length: n, of the sequence as it is now. Keys of a cache are rotated when they are compared, so
    it holds for all of them; give the new part a new length when the sequence grows.
    original_length: L, that the model was trained with
    emozilla 2023; in transformers: "dynamic".

    >>> DynamicNtk(4.0, length=2048, original_length=2048).frequencies(4, 10000.0)
    (1.0, 0.01)
    """

    factor: float
    length: int
    original_length: int

    def __post_init__(self) -> None:
        errors.check_number("DynamicNtk's factor", self.factor, least=1)
        _check_length("DynamicNtk's length", self.length)
        _check_length("DynamicNtk's original_length", self.original_length)

    def frequencies(self, width: int, base: float) -> Frequencies:
        stretch = self.factor * max(self.length / self.original_length, 1.0) - (self.factor - 1)
        return Ntk(stretch).frequencies(width, base)


@dataclass(frozen=True)
class Yarn(Scaling):
    """YaRN: fast pairs stay, slow ones are interpolated, and a ramp lies between.

    theta'_c = (1 - g) theta_c / factor + g theta_c,  magnitude = 0.1 ln(factor) + 1

    ramp "rotations", the paper's eq. 18: g is linear in r = L theta_c / 2 pi, the turns that a pair
        makes over the original length, from 0 at r = slow to 1 at r = fast
    ramp "channels", what transformers and most released models use: g is linear in c, between the
        channels where r is fast and slow, rounded outwards to whole numbers if `rounded`
    The two differ by up to a factor of 3 in theta' (width 128, base 1e4, L 4096, factor 16).

    factor, original_length: the stretch, and L
    attention_factor: the magnitude, if not the paper's
    Peng et al. 2023, arXiv:2309.00071, eq. 18 and section 3.4.

    >>> [round(theta, 5) for theta in Yarn(4.0, 64).frequencies(8, 100.0)]
    [1.0, 0.23717, 0.05, 0.00791]
    """

    factor: float
    original_length: int
    fast: float = 32.0
    slow: float = 1.0
    ramp: str = "channels"
    rounded: bool = True
    attention_factor: float | None = None

    def __post_init__(self) -> None:
        errors.check_number("Yarn's factor", self.factor, least=1)
        _check_length("Yarn's original_length", self.original_length)
        errors.check_number("Yarn's fast", self.fast)
        errors.check_number("Yarn's slow", self.slow)
        if not self.fast > self.slow > 0:
            raise ValueError(
                f"Yarn keeps pairs that turn more than `fast` times and interpolates those below "
                f"`slow`; fast must be above slow, and slow above 0, not {self.fast}, {self.slow}."
            )
        if self.ramp not in ("channels", "rotations"):
            raise ValueError(f"Yarn's ramp is 'channels' or 'rotations', not {self.ramp!r}.")
        if self.attention_factor is not None:
            errors.check_number("Yarn's attention_factor", self.attention_factor)

    def frequencies(self, width: int, base: float) -> Frequencies:
        plain = super().frequencies(width, base)
        if self.ramp == "rotations":
            kept = [
                (self.original_length * theta / (2 * math.pi) - self.slow) / (self.fast - self.slow)
                for theta in plain
            ]
        else:
            first, last = self._channels(width, base)
            kept = [1 - (c - first) / (last - first) for c in range(len(plain))]
        clipped = [min(max(g, 0.0), 1.0) for g in kept]
        return tuple(
            (1 - g) * theta / self.factor + g * theta
            for g, theta in zip(clipped, plain, strict=True)
        )

    def _channels(self, width: int, base: float) -> tuple[float, float]:
        """The channels between which the ramp falls: those that turn fast and slow times."""
        first, last = (
            width * math.log(self.original_length / (turns * 2 * math.pi)) / (2 * math.log(base))
            for turns in (self.fast, self.slow)
        )
        if self.rounded:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, width - 1)
        return first, last if last != first else first + 0.001  # as transformers does

    @property
    def magnitude(self) -> float:
        if self.attention_factor is not None:
            return float(self.attention_factor)
        return 0.1 * math.log(self.factor) + 1.0


@dataclass(frozen=True)
class Llama3(Scaling):
    """Llama 3.1's scaling: interpolate slow pairs, keep fast ones, blend between.

    theta'_c = (1 - g) theta_c / factor + g theta_c,  g = (r - slow) / (fast - slow) clipped to 0..1

    with r = L theta_c / 2 pi, the turns over the original length (slow, fast: "low_freq_factor" and
    "high_freq_factor" of its configuration).  Grattafiori et al. 2024, arXiv:2407.21783.

    >>> [round(theta, 6) for theta in Llama3(8.0, 8192).frequencies(4, 500000.0)]
    [1.0, 0.000525]
    """

    factor: float
    original_length: int
    slow: float = 1.0
    fast: float = 4.0

    def __post_init__(self) -> None:
        Yarn(self.factor, self.original_length, self.fast, self.slow)  # the same conditions

    def frequencies(self, width: int, base: float) -> Frequencies:
        # What the two papers write is one formula, YaRN's ramp over rotations.
        ramp = Yarn(self.factor, self.original_length, self.fast, self.slow, "rotations")
        return ramp.frequencies(width, base)


@dataclass(frozen=True)
class LongRope(Scaling):
    """LongRoPE: theta_c / factor_c, with factors found by search, others for long sequences.

    magnitude = sqrt(1 + ln(factor) / ln(L)) for factor > 1

    short, long: one factor for each pair of channels; long ones hold where length > L
    length: of the sequence as it is now; original_length: L
    factor: how many times L the model reaches
    Ding et al. 2024, arXiv:2402.13753; the magnitude as in Phi-3, arXiv:2404.14219.

    >>> LongRope((1.0, 1.0), (2.0, 4.0), length=8192, original_length=4096).frequencies(4, 1e4)
    (0.5, 0.0025)
    """

    short: tuple[float, ...]
    long: tuple[float, ...]
    length: int
    original_length: int
    factor: float = 1.0
    attention_factor: float | None = None

    def __post_init__(self) -> None:
        _check_length("LongRope's length", self.length)
        _check_length("LongRope's original_length", self.original_length)
        errors.check_number("LongRope's factor", self.factor)

    def frequencies(self, width: int, base: float) -> Frequencies:
        long = self.length > self.original_length
        factors = self.long if long else self.short
        if len(factors) != width // 2:
            raise errors.ShapeError(
                f"LongRope has {len(factors)} {'long' if long else 'short'} factors for "
                f"{width // 2} pairs of channels (width {width}); it needs one for each pair."
            )
        plain = super().frequencies(width, base)
        return tuple(theta / f for theta, f in zip(plain, factors, strict=True))

    @property
    def magnitude(self) -> float:
        if self.attention_factor is not None:
            return float(self.attention_factor)
        if self.factor <= 1:
            return 1.0
        return math.sqrt(1 + math.log(self.factor) / math.log(self.original_length))


@dataclass(frozen=True)
class Proportional(Scaling):
    """Only the fastest `fraction` of the pairs turn: theta_c = base^(-2 c / width), then zeros.

    Unlike `Rotary.of(..., fraction=...)`, pairs are those of the whole width and their exponents
    too. factor: theta_c / factor, as `Interpolation`. In transformers: "proportional".

    >>> Proportional(0.5).frequencies(8, 10000.0)
    (1.0, 0.1, 0.0, 0.0)
    """

    fraction: float
    factor: float = 1.0

    def __post_init__(self) -> None:
        errors.check_number("Proportional's fraction", self.fraction, least=0)
        errors.check_number("Proportional's factor", self.factor, least=1)

    def frequencies(self, width: int, base: float) -> Frequencies:
        turning = int(self.fraction * width // 2)
        plain = Interpolation(self.factor).frequencies(width, base)
        return tuple(theta if c < turning else 0.0 for c, theta in enumerate(plain))


def _check_length(name: str, length: int) -> None:
    errors.check_number(name, length, whole=True, least=1)
