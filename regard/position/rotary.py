"""Rotary encoding: pairs of channels turn by an angle that grows with the position."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from regard import errors
from regard.part import widest
from regard.position.base import Position
from regard.position.scaling import Scaling

LAYOUTS = ("halves", "interleaved")
UNSCALED = Scaling()


@dataclass(frozen=True, eq=False, repr=False)
class Rotary(Position):
    """Rotate channel pair c of queries and keys by position times theta_c.

    q'_i . k'_j = q_i^T R(p_j - p_i) k_j, so that relevance depends on relative positions alone, and
    lengths stay as they are.

    frequencies: theta_c in radians per position for each pair of channels, as floats or as a tensor
        (learned); for positions with several coordinates [axes][pairs], and the angle is the sum
        over axes of coordinate times frequency. Channels beyond 2 * pairs are left alone.
    layout: "halves" pairs channel c with c + pairs (GPT-NeoX, Llama); "interleaved" pairs 2 c with
        2 c + 1 (the paper, GPT-J). The same up to a permutation of channels.
    positions: of the tokens that the keys belong to, [*batch, 1, m] or [*batch, 1, m, axes], whole
        or not; default 0, 1, ... Row i of the matrix is token i + offset.
    magnitude: what rotated queries and keys are multiplied by
    offset: token of the first query, where queries continue a sequence of cached keys (which are
        kept as they were before rotation)
    Cost: O((n + m) d); angles in float64.  Su et al. 2021, arXiv:2104.09864, section 3.2.
    Raises ShapeError where the width is odd or positions are too few, DtypeError for other dtypes.

    >>> rotary = Rotary.of(2)
    >>> rotary.on_query(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.arange(2))
    tensor([[1.0000, 0.0000],
            [0.5403, 0.8415]])
    """

    frequencies: tuple[float, ...] | tuple[tuple[float, ...], ...] | Tensor
    layout: str = "halves"
    positions: Tensor | None = None
    magnitude: float = 1.0
    offset: int = 0

    def __post_init__(self) -> None:
        given = self.frequencies
        if isinstance(given, Tensor):
            errors.check_tensor("Rotary's frequencies", given, shape="[pairs]", dims=1)
            given = torch.atleast_2d(given)
        elif not given or not isinstance(given[0], tuple):
            given = (given,)  # type: ignore[assignment]
        object.__setattr__(self, "frequencies", given)
        if self.layout not in LAYOUTS:
            raise ValueError(f"Rotary's layout is 'halves' or 'interleaved', not {self.layout!r}.")
        errors.check_number("Rotary's magnitude", self.magnitude)
        errors.check_number("Rotary's offset", self.offset, whole=True)
        if self.positions is not None:
            self._check_positions(self.positions)

    @property
    def trailing(self) -> dict[str, int]:  # type: ignore[override]
        """Axes that are not [*batch, heads]: coordinates are one, where there are several."""
        return {"frequencies": 2, "positions": 1 if len(self.frequencies) == 1 else 2}

    def _check_positions(self, positions: Tensor) -> None:
        if not isinstance(positions, Tensor) or positions.is_complex() or _is_bool(positions):
            given = positions.dtype if isinstance(positions, Tensor) else type(positions).__name__
            raise errors.DtypeError(
                f"Rotary's positions must be a tensor of numbers, not {given}; whole numbers count "
                "tokens, fractions lie between them."
            )
        axes, shape = len(self.frequencies), positions.shape
        own = 1 if axes == 1 else 2
        wrong = len(shape) < own or (len(shape) > own and shape[-own - 1] != 1)
        if wrong or (own == 2 and shape[-1] != axes):
            wanted = "[*batch, 1, m]" if axes == 1 else f"[*batch, 1, m, {axes}]"
            raise errors.ShapeError(
                f"Rotary's positions have shape {errors.show(shape)}, but must be {wanted}, or "
                "without the axes before m: one position for each token, the same for all heads. "
                "Of [batch, m], positions[:, None] makes it."
            )

    # Seven parameters and the part's own: what released models differ in.
    @staticmethod
    def of(
        head_dim: int,
        *,
        base: float = 10000.0,
        scaling: Scaling = UNSCALED,
        fraction: float = 1.0,
        layout: str = "halves",
        positions: Tensor | None = None,
        offset: int = 0,
    ) -> Rotary:
        """Frequencies base^(-2 c / width), scaled, on the first `fraction` of the channels.

        >>> from regard.position import Yarn
        >>> Rotary.of(64, base=500000.0, scaling=Yarn(4.0, 8192), fraction=0.5)
        Rotary(16 pairs, magnitude=1.138629436111989)
        """
        width = _even("Rotary.of's head_dim", head_dim, fraction)
        frequencies = scaling.frequencies(width, float(base))
        return Rotary(frequencies, layout, positions, scaling.magnitude, offset)

    @staticmethod
    def axial(
        head_dim: int, positions: Tensor, *, base: float = 10000.0, layout: str = "halves"
    ) -> Rotary:
        """Positions with several coordinates, [m, axes]: each has its own share of the channels.

        The pairs of each coordinate have frequencies base^(-2 c / (head_dim / axes)), as a 1-D
        encoding of that many channels would.  Heo et al. 2024, arXiv:2403.13298.

        >>> grid = torch.cartesian_prod(torch.arange(4), torch.arange(6))  # y, x of 24 patches
        >>> Rotary.axial(64, grid)
        Rotary(32 pairs, 2 axes, positions=tensor(24, 2))
        """
        axes = positions.shape[-1]
        errors.check_number("Rotary.axial's head_dim", head_dim, whole=True, least=2)
        if axes < 1 or head_dim % (2 * axes):
            raise errors.ShapeError(
                f"{head_dim} channels cannot be shared by {axes} coordinates in pairs; head_dim "
                f"must be a multiple of {2 * axes}."
            )
        pairs = head_dim // (2 * axes)
        own = UNSCALED.frequencies(2 * pairs, float(base))
        frequencies = tuple(
            (0.0,) * (axis * pairs) + own + (0.0,) * ((axes - 1 - axis) * pairs)
            for axis in range(axes)
        )
        return Rotary(frequencies, layout, positions)

    @property
    def shift_invariant(self) -> bool:  # type: ignore[override]
        """True unless tokens have positions of their own."""
        return self.positions is None

    @property
    def pairs(self) -> int:
        """How many pairs of channels turn."""
        return len(self.frequencies[0])  # type: ignore[arg-type]

    def on_query(self, query: Tensor, i: Tensor) -> Tensor:
        return self._rotated(query, i + self.offset)

    def on_key(self, key: Tensor, j: Tensor) -> Tensor:
        return self._rotated(key, j)

    def check(self, query: Tensor, key: Tensor) -> None:
        for name, x in (("query", query), ("key", key)):
            if x.shape[-1] < 2 * self.pairs:
                raise errors.ShapeError(
                    f"{self} turns {self.pairs} pairs of channels, but {name} has width "
                    f"{x.shape[-1]}; make it with Rotary.of({x.shape[-1]})."
                )
        if self.positions is None:
            if len(self.frequencies) > 1:
                raise errors.ShapeError(
                    f"{self} has frequencies for {len(self.frequencies)} coordinates; give it "
                    "positions of as many: Rotary(..., positions=coordinates [m, axes])."
                )
            return
        tokens, last = (
            self.positions.shape[-self.trailing["positions"]],
            self.offset + query.shape[-2],
        )
        if tokens < max(last, key.shape[-2]) or self.offset < 0:
            raise errors.ShapeError(
                f"Rotary has positions for {tokens} tokens, but the matrix has {key.shape[-2]} "
                f"keys and queries {self.offset} to {last - 1}; give one position for each token."
            )

    def _rotated(self, x: Tensor, tokens: Tensor) -> Tensor:
        """[*batch, heads, n, d] turned by the angles of these tokens."""
        dtype, pairs = torch.promote_types(x.dtype, torch.float32), self.pairs
        cosine, sine = self._table(tokens, dtype)
        turning, rest = x[..., : 2 * pairs].to(dtype), x[..., 2 * pairs :]
        if self.layout == "halves":
            one, other = turning.chunk(2, -1)
            turned = torch.cat([one * cosine - other * sine, other * cosine + one * sine], -1)
        else:
            one, other = turning.unflatten(-1, (pairs, 2)).unbind(-1)
            both = [one * cosine - other * sine, other * cosine + one * sine]
            turned = torch.stack(both, -1).flatten(-2)
        if not rest.shape[-1]:
            return turned
        return torch.cat([turned, rest.to(dtype).expand(*turned.shape[:-1], -1)], -1)

    def _table(self, tokens: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the tokens' angles, times the magnitude, [..., n, pairs]."""
        exact = widest(tokens.device)
        where = tokens if self.positions is None else self.positions
        where = where if len(self.frequencies) > 1 else where[..., None]
        where = where if self.positions is None else where[..., tokens, :]
        frequencies = torch.as_tensor(self.frequencies, dtype=exact, device=tokens.device)
        # Not a matrix product: it would round angles to what autocast or the hardware likes.
        angle = (where.to(exact)[..., None] * frequencies).sum(-2)
        return (self.magnitude * angle.cos()).to(dtype), (self.magnitude * angle.sin()).to(dtype)

    def __repr__(self) -> str:
        axes = len(self.frequencies)
        shown = [f"{self.pairs} pairs"] + ([f"{axes} axes"] if axes > 1 else [])
        if isinstance(self.frequencies, Tensor):
            shown.append("learned")
        if self.positions is not None:
            shown.append(f"positions=tensor{errors.show(self.positions.shape)}")
        for name, default in (("layout", "halves"), ("magnitude", 1.0), ("offset", 0)):
            if getattr(self, name) != default:
                shown.append(f"{name}={getattr(self, name)!r}")
        return f"Rotary({', '.join(shown)})"


def _is_bool(tensor: Tensor) -> bool:
    return tensor.dtype == torch.bool


def _even(name: str, head_dim: int, fraction: float) -> int:
    """The channels that turn, which come in pairs."""
    errors.check_number(name, head_dim, whole=True, least=2)
    errors.check_number("fraction", fraction, least=0)
    width = int(head_dim * fraction)
    if width % 2 or not 2 <= width <= head_dim:
        raise errors.ShapeError(
            f"Rotary turns channels in pairs, but {fraction:g} of head_dim {head_dim} is {width}; "
            f"it must be an even number from 2 to {head_dim}."
        )
    return width
