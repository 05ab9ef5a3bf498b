"""Position on the input: layers that add to each vector what says where it stands."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from regard import errors
from regard.position.sinusoid import sinusoid

Field = Callable[[Tensor, Tensor], Tensor]


class _OnInput(nn.Module):
    """x + encoding of its positions."""

    shift_invariant = False
    toeplitz = False

    def __init__(self, d_model: int) -> None:
        super().__init__()
        errors.check_number(f"{type(self).__name__}'s d_model", d_model, whole=True, least=1)
        self.d_model = d_model

    def encoding(self, positions: Tensor) -> Tensor:
        """The vectors of positions [*x]: [*x, d_model]."""
        raise NotImplementedError

    def forward(self, x: Tensor, *, offset: int = 0, positions: Tensor | None = None) -> Tensor:
        """Add the encoding to x [*batch, n, d_model].

        offset: position of the first vector, where a sequence is continued
        positions: of each vector, [*batch, n], instead of offset, offset + 1, ...
        """
        errors.check_tensor("x", x)
        if x.shape[-1] != self.d_model:
            raise errors.ShapeError(
                f"x has shape {errors.show(x.shape)}, but this layer encodes {self.d_model} "
                "channels on the last axis."
            )
        errors.check_number("offset", offset, whole=True, least=0)
        if positions is None:
            positions = torch.arange(offset, offset + x.shape[-2], device=x.device)
        else:
            if offset:
                raise ValueError("give offset or positions; positions already say where x begins.")
            if not isinstance(positions, Tensor) or positions.dtype == torch.bool:
                given = getattr(positions, "dtype", type(positions).__name__)
                raise errors.DtypeError(f"positions must be a tensor of numbers, not {given}.")
            errors.check_length("positions", positions, x.shape[-2], "vectors")
        return x + self.encoding(positions).to(x.dtype)


class Sinusoidal(_OnInput):
    """Sines and cosines of the position, nothing learned; any length.

    Equation and layouts: `regard.position.sinusoid`. Vaswani et al. 2017, arXiv:1706.03762, 3.5.

    >>> Sinusoidal(4)(torch.zeros(2, 4))
    tensor([[0.0000, 1.0000, 0.0000, 1.0000],
            [0.8415, 0.5403, 0.0100, 0.9999]])
    """

    def __init__(self, d_model: int, *, layout: str = "interleaved", base: float = 10000.0) -> None:
        super().__init__(d_model)
        self.layout, self.base = layout, base
        sinusoid(torch.zeros(1), d_model, layout=layout, base=base)  # raises for wrong layouts

    def encoding(self, positions: Tensor) -> Tensor:
        return sinusoid(positions, self.d_model, layout=self.layout, base=self.base)

    def extra_repr(self) -> str:
        """What torch prints between the brackets."""
        return f"{self.d_model}, layout={self.layout!r}"


class Learned(_OnInput):
    """One learned vector for each position, as in BERT and GPT-2: weight[position].

    max_length: positions 0 to max_length - 1 have vectors; others raise ShapeError, for there is
        nothing to say about them
    weight: [max_length, d_model], drawn from a normal distribution of standard deviation 0.02

    >>> Learned(128, 16)(torch.zeros(1, 129, 16))
    Traceback (most recent call last):
    regard.errors.ShapeError: Learned has vectors for positions 0 to 127, but was asked for 128; \
make it longer, Learned(129, 16), and train that, or use an encoding without a last position \
(Sinusoidal, Rotary, Alibi).
    """

    def __init__(self, max_length: int, d_model: int) -> None:
        super().__init__(d_model)
        errors.check_number("Learned's max_length", max_length, whole=True, least=1)
        self.max_length = max_length
        self.weight = nn.Parameter(torch.empty(max_length, d_model).normal_(std=0.02))

    def encoding(self, positions: Tensor) -> Tensor:
        errors.check_integers("Learned's positions", positions)
        if positions.numel():
            low, high = int(positions.min()), int(positions.max())
            has = f"Learned has vectors for positions 0 to {self.max_length - 1}, but was asked for"
            if low < 0:
                raise errors.ShapeError(f"{has} {low}; the first position is 0.")
            if high >= self.max_length:
                raise errors.ShapeError(
                    f"{has} {high}; make it longer, Learned({high + 1}, {self.d_model}), and train "
                    "that, or use an encoding without a last position (Sinusoidal, Rotary, Alibi)."
                )
        return self.weight[positions]

    def extra_repr(self) -> str:
        """What torch prints between the brackets."""
        return f"{self.max_length}, {self.d_model}"


class Continuous(_OnInput):
    """A path through the vectors that a learned field moves along: FLOATER.

    p(0) = start,  dp/dt = field(t, p),  encoding of position t = p(t spacing)

    Any length, with as many parameters as the field has; blocks of a model may share the field and
    have their own starts. Solved by the classical Runge-Kutta method of fourth order, so that the
    error falls 16 times when `steps` doubles.

    field: function or module (t, p [d_model]) -> [d_model], t a tensor without axes
    start: [d_model]; a learned one if None
    spacing: time from one position to the next; steps: of the solver, in that time
    Cost: 4 steps calls of the field for each position up to the largest.
    Liu, Yu, Dhillon, Hsieh 2020, arXiv:2003.09229, section 3.
    Raises ShapeError or DtypeError for positions that are negative or no whole numbers.

    >>> turn = lambda t, p: torch.stack([p[1], -p[0]])  # a rotation gives the sinusoid
    >>> start = torch.tensor([0.0, 1.0])
    >>> Continuous(2, turn, start=start, spacing=1.0, steps=20).encoding(torch.arange(2))
    tensor([[0.0000, 1.0000],
            [0.8415, 0.5403]])
    """

    start: Tensor

    def __init__(
        self,
        d_model: int,
        field: Field,
        *,
        start: Tensor | None = None,
        spacing: float = 0.1,
        steps: int = 1,
    ) -> None:
        super().__init__(d_model)
        errors.check_number("Continuous's spacing", spacing)
        errors.check_number("Continuous's steps", steps, whole=True, least=1)
        if start is not None and start.shape != (d_model,):
            raise errors.ShapeError(
                f"Continuous's start has shape {errors.show(start.shape)}; it must be ({d_model},)."
            )
        self.field, self.spacing, self.steps = field, spacing, steps
        if start is None:
            self.start = nn.Parameter(torch.empty(d_model).normal_(std=0.02))
        else:
            self.register_buffer("start", start)

    def encoding(self, positions: Tensor) -> Tensor:
        errors.check_integers("Continuous's positions", positions)
        if positions.numel() and int(positions.min()) < 0:
            raise errors.ShapeError(
                f"Continuous begins at position 0, but was asked for {int(positions.min())}."
            )
        last = int(positions.max()) if positions.numel() else 0
        path: list[Tensor] = [self.start]
        step = self.spacing / self.steps
        for k in range(last * self.steps):
            time = torch.as_tensor(k * step, dtype=self.start.dtype, device=self.start.device)
            path.append(_runge_kutta(self.field, time, path[-1], step))
        return torch.stack(path[:: self.steps])[positions]

    def extra_repr(self) -> str:
        """What torch prints between the brackets."""
        return f"{self.d_model}, spacing={self.spacing}, steps={self.steps}"


def _runge_kutta(field: Field, t: Tensor, p: Tensor, h: float) -> Tensor:
    """One step of the classical method (Kutta 1901)."""
    k1 = field(t, p)
    k2 = field(t + h / 2, p + h / 2 * k1)
    k3 = field(t + h / 2, p + h / 2 * k2)
    k4 = field(t + h, p + h * k3)
    return p + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
