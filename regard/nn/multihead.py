"""The layer that takes the place of torch.nn.MultiheadAttention."""

from __future__ import annotations

import math
from functools import reduce
from operator import and_
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard import errors
from regard.custom import PairFunction
from regard.mask import Causal, Dense, Mask, Padding, Prefix
from regard.matrix import Attention
from regard.nn.attention import Heads, check_input
from regard.normalizer import Normalizer, Softmax
from regard.position import Bias, Position
from regard.score import Dot, Score


class MultiHeadAttention(Heads):
    """Multi-head attention in the place of `torch.nn.MultiheadAttention`, with any parts.

    head_h = A_h V_h,  A_h = attention(query W^q_h, key W^k_h);  output = concat(head_1..h) W^o

    Constructor, forward arguments, `state_dict`, initial values and, with the default parts,
    results are torch's; `regard.convert.swap(model)` puts it into a model that exists. It differs
    where torch's layer has traps: a row that may attend to nothing gives zeros (not NaN),
    `is_causal=True` is a mask of its own and no hint about `attn_mask`,
    `nn.TransformerEncoderLayer` calls it in evaluation too, and the weights need not be stored to
    be looked at: `need_weights="lazy"`.
    Vaswani et al. 2017, arXiv:1706.03762, section 3.2.2.

    embed_dim: channels of the query and the output; kdim, vdim: of key and value, default the same
    dropout: probability, on the weights, in training
    add_bias_kv: a learned key and value behind the others, that everyone may attend to
    add_zero_attn: a key and value of zeros behind them
    batch_first: inputs are [batch, length, channels]; otherwise [length, batch, channels], which is
        torch's default and so the default here
    score, position, normalizer: parts of `regard.attention`; their tensors that require gradients
        become parameters of the layer
    Raises ShapeError where num_heads does not divide embed_dim.

    >>> layer = MultiHeadAttention(64, 8, batch_first=True)
    >>> x = torch.randn(2, 10, 64)
    >>> output, weights = layer(x, x, x)
    >>> output.shape, weights.shape
    (torch.Size([2, 10, 64]), torch.Size([2, 10, 10]))
    >>> layer(x, x, x, need_weights="lazy")[1]
    Attention(2, 8, 10, 10): Dot(), Softmax(); float32, lazy
    """

    # nn.TransformerEncoderLayer looks at this in evaluation: where it is True, the layer's forward
    # is never called, and torch's own kernel computes plain attention from the weights.
    _qkv_same_embed_dim = False

    in_proj_weight: nn.Parameter | None
    q_proj_weight: nn.Parameter | None
    k_proj_weight: nn.Parameter | None
    v_proj_weight: nn.Parameter | None
    in_proj_bias: nn.Parameter | None
    bias_k: nn.Parameter | None
    bias_v: nn.Parameter | None

    # More than seven parameters: the first ones are torch's constructor, which this class repeats.
    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        score: Score | PairFunction = Dot(),
        position: Position | None = None,
        normalizer: Normalizer = Softmax(),
    ) -> None:
        super().__init__(embed_dim, num_heads, dropout, score, position, normalizer)
        self.kdim, self.vdim = kdim or embed_dim, vdim or embed_dim
        self.batch_first, self.add_zero_attn = batch_first, add_zero_attn
        packed = self.kdim == self.vdim == embed_dim
        for name, wanted, shape in (
            ("in_proj_weight", packed, (3 * embed_dim, embed_dim)),
            ("q_proj_weight", not packed, (embed_dim, embed_dim)),
            ("k_proj_weight", not packed, (embed_dim, self.kdim)),
            ("v_proj_weight", not packed, (embed_dim, self.vdim)),
            ("in_proj_bias", bias, (3 * embed_dim,)),
            ("bias_k", add_bias_kv, (1, 1, embed_dim)),
            ("bias_v", add_bias_kv, (1, 1, embed_dim)),
        ):
            empty = torch.zeros(shape, device=device, dtype=dtype) if wanted else None
            self.register_parameter(name, None if empty is None else nn.Parameter(empty))
        self._make_output(bias, device, dtype)
        for learned in (self.bias_k, self.bias_v):
            if learned is not None:
                nn.init.xavier_normal_(learned)

    # Torch's arguments in torch's order.
    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        need_weights: bool | Literal["lazy"] = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        *,
        mask: Mask | Tensor | None = None,
    ) -> tuple[Tensor, Tensor | Attention | None]:
        """Return the output, and the weights if wanted.

        query: [batch, n, embed_dim] (or as `batch_first` says; [n, embed_dim] without a batch)
        key, value: [batch, m, kdim], [batch, m, vdim]; key default query, value default key
        key_padding_mask: [batch, m] or [m]; bool, **True = ignored**, or float, added to the logits
        need_weights: True for the tensor, torch's default, which stores n x m numbers; "lazy" for
            the matrix of all heads, which stores none; False for None
        attn_mask: [n, m] or [batch * heads, n, m]; bool, **True = ignored**, or float, added
        average_attn_weights: the mean over heads, [batch, n, m]; else [batch, heads, n, m]
        is_causal: key j is ignored by query i < j, whatever attn_mask says besides
        mask: as in `regard.attention`, **True = may attend**, of all keys with those added
        Raises ShapeError, DtypeError, ValueError where these do not fit together.
        """
        key = query if key is None else key
        value = key if value is None else value
        query, key, value = inputs = self._batch_first(query, key, value)
        heads = [self._split(x) for x in self._project(inputs)]
        heads[1], heads[2] = self._with_added(heads[1], heads[2])
        sizes = (*heads[0].shape[:-1], key.shape[-2])
        added = heads[1].shape[-2] - sizes[-1]
        masks, bias = _translate(key_padding_mask, attn_mask, is_causal, sizes, added)
        if mask is not None:
            masks.append(Dense(mask) if isinstance(mask, Tensor) else mask)
        both = reduce(and_, masks) if masks else None
        mixed, matrix = self._attend(heads[0], heads[1], heads[2], both, bias=bias)
        output = self.out_proj(mixed)
        output = output if self.batch_first or output.dim() < 3 else output.transpose(0, 1)
        return output, _weights(matrix, need_weights, average_attn_weights)

    def _batch_first(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The inputs as [*batch, length, channels]."""
        widths = (self.embed_dim, self.kdim, self.vdim)
        for name, x, width in zip(("query", "key", "value"), inputs, widths, strict=True):
            check_input(name, x, width)
            if not self.batch_first and x.dim() > 3:
                raise errors.ShapeError(
                    f"{name} has shape {errors.show(x.shape)}; with batch_first=False it must be "
                    "[length, batch, channels] or [length, channels]. batch_first=True takes any "
                    "number of batch axes."
                )
        if self.batch_first:
            return inputs
        moved = {id(x): x.transpose(0, 1) if x.dim() == 3 else x for x in inputs}
        return tuple(moved[id(x)] for x in inputs)  # one tensor stays one

    def _project(self, inputs: tuple[Tensor, ...]) -> list[Tensor]:
        """Query, key and value; in one product where they are one tensor."""
        query, key, value = inputs
        packed, bias = self.in_proj_weight, self.in_proj_bias
        if packed is not None and query is key is value:
            return list(F.linear(query, packed, bias).chunk(3, dim=-1))
        apart = self.q_proj_weight, self.k_proj_weight, self.v_proj_weight
        weights: tuple[Any, ...] = apart if packed is None else packed.chunk(3)
        biases: tuple[Any, ...] = (None,) * 3 if bias is None else bias.chunk(3)
        return [F.linear(*operands) for operands in zip(inputs, weights, biases, strict=True)]

    def _split(self, x: Tensor) -> Tensor:
        """[*batch, length, embed_dim] -> [*batch, heads, length, head_dim]."""
        heads: Tensor = x.unflatten(-1, (self.num_heads, -1)).transpose(-3, -2)
        return heads

    def _with_added(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values of `add_bias_kv` and `add_zero_attn` behind the others."""
        found = []
        for x, learned in ((key, self.bias_k), (value, self.bias_v)):
            rows = [] if learned is None else [self._split(learned[0])]
            rows += [x.new_zeros(x.shape[-3], 1, x.shape[-1])] if self.add_zero_attn else []
            rows = [row.expand(*x.shape[:-2], 1, -1) for row in rows]
            found.append(torch.cat([x, *rows], dim=-2) if rows else x)
        return found[0], found[1]


def _translate(
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
    is_causal: bool,
    sizes: tuple[int, ...],
    added: int,
) -> tuple[list[Mask], Bias | None]:
    """Torch's masks, True = ignored, as ours, for [*batch, heads, n, m] and keys behind the m."""
    *batch, heads, rows, columns = sizes
    masks: list[Mask] = []
    biases = []
    if is_causal:
        masks.append(Causal() | ~Prefix(columns) if added else Causal())
    if key_padding_mask is not None:
        _check("key_padding_mask", key_padding_mask, [(*batch, columns)])
        keep, bias = _meaning(key_padding_mask, added)
        masks += [] if keep is None else [Padding(keep)]
        biases += [] if bias is None else [bias[..., None, None, :]]
    if attn_mask is not None:
        shapes = [(rows, columns), (math.prod(batch) * heads, rows, columns)]
        _check("attn_mask", attn_mask, shapes)
        if attn_mask.dim() > 2:
            attn_mask = attn_mask.reshape(*batch, heads, rows, columns)
        keep, bias = _meaning(attn_mask, added)
        if is_causal and keep is not None and _is_triangle(keep[..., :columns]):
            keep = None  # as nn.TransformerEncoder gives both: the rule alone skips tiles
        masks += [] if keep is None else [Dense(keep)]
        biases += [] if bias is None else [bias]
    return masks, Bias(sum(biases[1:], biases[0])) if biases else None


def _check(name: str, mask: Tensor, shapes: list[tuple[int, ...]]) -> None:
    known = isinstance(mask, Tensor) and (mask.dtype == torch.bool or mask.is_floating_point())
    if not known:
        given = f"dtype {mask.dtype}" if isinstance(mask, Tensor) else type(mask).__name__
        raise errors.DtypeError(
            f"{name} is a tensor of bool (True = ignored) or of floats that are added to the "
            f"logits, not {given}; a 0/1 mask converts with .bool(), and parts of regard.mask "
            "(True = may attend) are given as mask=."
        )
    if not any(tuple(mask.shape) == shape for shape in shapes):
        wanted = " or ".join(errors.show(shape) for shape in shapes)
        raise errors.ShapeError(
            f"{name} has shape {errors.show(mask.shape)}; for these inputs it must be {wanted}."
        )


def _meaning(mask: Tensor, added: int) -> tuple[Tensor | None, Tensor | None]:
    """What may be attended to, or what is added; the keys behind the others always are, by 0.

    Torch's own layers turn bool masks into floats of 0 and -inf before they pass them on.
    """
    if mask.dtype == torch.bool:
        return F.pad(~mask, (0, added), value=True), None
    if not mask.requires_grad and not torch.compiler.is_compiling():
        keep = mask == 0
        if bool((keep | (mask == -torch.inf)).all()):
            return F.pad(keep, (0, added), value=True), None
    return None, F.pad(mask, (0, added))


def _is_triangle(keep: Tensor) -> bool:
    """Whether a mask is the causal one; a graph cannot ask."""
    if torch.compiler.is_compiling() or keep.dim() > 2:
        return False
    return torch.equal(keep, torch.ones_like(keep).tril())


def _weights(matrix: Attention, wanted: bool | str, average: bool) -> Tensor | Attention | None:
    if wanted == "lazy":
        return matrix
    if isinstance(wanted, str):
        raise ValueError(f'need_weights is True, False or "lazy", not {wanted!r}.')
    if not wanted:
        return None
    if torch.compiler.is_compiling():  # looking breaks a graph; the product with ones does not
        eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
        weights = matrix.matmul(eye)
    else:
        weights = matrix.dense(limit=matrix.shape.numel())
    return weights.mean(-3) if average else weights
