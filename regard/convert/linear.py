"""Softmax attention made linear: feature maps are fitted to its rows, and the loss is measured.

No feature map of finite size gives e^(q . k) for all q and k. For the queries and keys that a layer
meets, phi(q_i) . phi(k_j) / sum_j phi(q_i) . phi(k_j) can come near its rows: the maps minimise
    - mean_i sum_j A_ij log B_ij,  A the rows of softmax, B those of the maps,
which is the divergence KL(A_i || B_i) but for a constant.
Zhang et al. 2024 (Hedgehog), arXiv:2402.04347, section 4.2; Zhang et al. 2024
(LoLCATs), arXiv:2410.10254, do it for large models, and train them on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from regard import errors
from regard.convert.recurrent import check_layer
from regard.feature_map import Affine, FeatureMap, Hedgehog
from regard.features import Features
from regard.mask import Causal, Mask
from regard.matrix import Attention, attention
from regard.nn import SelfAttention
from regard.normalizer import RowSum, Softmax
from regard.position import Alibi, Position, Rotary
from regard.position.base import terms

CAUSAL = Causal()
FLOOR = 1e-6
"""Weights below this one count as it: a map with zeros (relu) would otherwise be infinitely far."""

MapOf = Callable[[int, int], FeatureMap]


def hedgehog(heads: int, width: int) -> Hedgehog:
    """[e^(x W), e^(-x W)] for each head, W the identity to begin: 2 width features.

    >>> hedgehog(4, 16)
    Hedgehog(tensor(4, 16, 16))
    """
    return Hedgehog(torch.eye(width).repeat(heads, 1, 1).requires_grad_())


def affine(heads: int, width: int) -> Affine:
    """relu(x W + b) for each head (T2R): 2 width features, of which W begins as [I, -I].

    >>> affine(4, 16)
    Affine(tensor(4, 16, 32), tensor(4, 32))
    """
    both = torch.cat([torch.eye(width), -torch.eye(width)], -1).repeat(heads, 1, 1)
    return Affine(both.requires_grad_(), torch.zeros(heads, 2 * width).requires_grad_())


@dataclass(frozen=True, repr=False)
class Lost:
    """What a linear layer misses of the softmax layer that it was made of, on some inputs.

    kl: for each head, the mean over rows of sum_j A_ij log(A_ij / B_ij), in nats; weights of B
        below 1e-6 count as 1e-6
    entropy: for each head, the mean entropy of the rows of A: what there was to be missed
    output: |y - y'| / |y| of the layers' outputs, norms over all inputs

    >>> Lost((0.02, 0.5), (1.5, 2.0), 0.1)
    Lost(output 10.0% off; KL of heads 0.020, 0.500 nats, where entropies are 1.50, 2.00)
    """

    kl: tuple[float, ...]
    entropy: tuple[float, ...]
    output: float

    def __repr__(self) -> str:
        kl = ", ".join(f"{each:.3f}" for each in self.kl)
        entropy = ", ".join(f"{each:.2f}" for each in self.entropy)
        return (
            f"Lost(output {self.output:.1%} off; KL of heads {kl} nats, where entropies are "
            f"{entropy})"
        )


def linearize(
    layer: SelfAttention,
    inputs: Tensor,
    *,
    map: MapOf = hedgehog,
    mask: Mask | None = CAUSAL,
    steps: int = 300,
    rate: float = 0.01,
    batch: int = 32,
) -> tuple[SelfAttention, Lost]:
    """A linear layer whose rows are fitted to those of a softmax layer, and what it misses.

    layer: `SelfAttention` with any score under Softmax(), with `Rotary`, `Alibi` or no position;
        it stays as it is. `Alibi` becomes a decay, e^(-slope) for each token, which is exact.
    inputs: what the layer meets, [count, n, d_model]; the more and the more typical, the better
    map: from (heads, width) to a feature map, called for queries and for keys (which each head
        maps for itself, also where heads share them); `hedgehog`,
        `affine`, or your own, such as `lambda heads, width: elu_plus_one`. Positive features, or
        sums of rows may cross zero. A module, or a part with tensors that require gradients,
        is fitted.
    mask: the one that the layer has when it is used; `to_recurrent` needs the causal one
    steps, rate, batch: of Adam, each step on so many of the inputs
    Returns the linear layer, with copies of the projections and the fitted maps, and `Lost` on
    these inputs; `lost` measures it on others, where it may be larger.
    Cost: a step takes O(batch heads n^2) time and memory, since whole rows are compared.
    Raises FormError for a layer whose rows are none of softmax or whose bias no decay can be.

    >>> _ = torch.manual_seed(0)
    >>> layer, x = SelfAttention(16, 2), torch.randn(64, 12, 16)
    >>> linear, missed = linearize(layer, x, steps=50)
    >>> missed
    Lost(output ...% off; KL of heads ... nats, where entropies are ...)
    >>> from regard.convert import to_recurrent
    >>> output, state = to_recurrent(linear)(x[:, 0])
    """
    _check(layer, inputs, mask)
    with torch.no_grad():
        linear = _linear(layer, map)
    held: Any = linear.score
    learns = [p for p in held.parameters() if p.requires_grad]
    if learns and steps:
        optimizer = torch.optim.Adam(learns, lr=rate)
        for _ in range(steps):
            some = inputs[torch.randint(len(inputs), (batch,))] if batch < len(inputs) else inputs
            optimizer.zero_grad()
            with torch.enable_grad():
                target, rows = (_rows(each, some, mask) for each in (layer, linear))
                missed = -(target.detach() * rows.clamp(min=FLOOR).log()).sum(-1).mean()
                missed.backward(inputs=learns)
            optimizer.step()
    return linear, lost(layer, linear, inputs, mask=mask)


@torch.no_grad()
def lost(
    layer: SelfAttention, linear: SelfAttention, inputs: Tensor, *, mask: Mask | None = CAUSAL
) -> Lost:
    """What `linear` misses of `layer` on inputs [count, n, d_model].

    Cost: O(heads n^2) memory for one input at a time.

    >>> _ = torch.manual_seed(0)
    >>> layer, x = SelfAttention(16, 2), torch.randn(4, 12, 16)
    >>> lost(layer, layer, x).kl
    (0.0, 0.0)
    """
    check_layer(linear, "lost")
    _check(layer, inputs, mask)
    kl, entropy, far, size = [], [], 0.0, 0.0
    for one in inputs:
        target, rows = (_rows(each, one, mask).double() for each in (layer, linear))
        logs = target.clamp(min=FLOOR).log()
        entropy.append(-(target * logs).sum(-1).mean(-1))
        kl.append((target * (logs - rows.clamp(min=FLOOR).log())).sum(-1).mean(-1))
        output, other = (each(one, mask=mask)[0].double() for each in (layer, linear))
        far += float((output - other).square().sum())
        size += float(output.square().sum())
    of_heads, spread = (tuple(torch.stack(each).mean(0).tolist()) for each in (kl, entropy))
    return Lost(of_heads, spread, (far / size) ** 0.5 if size else 0.0)


def _rows(layer: SelfAttention, x: Tensor, mask: Mask | None) -> Tensor:
    """The weights of all heads, [*batch, heads, n, n], with gradients to what the score holds."""
    query, key, _ = (each.detach() for each in layer.project(x))
    rule = layer.rule(x)
    parts: dict[str, Any] = {"score": rule.score, "position": rule.position}
    matrix: Attention = attention(query, key, mask=mask, normalizer=rule.normalizer, **parts)
    return rule.normalizer.whole(matrix.logits())


def _linear(layer: SelfAttention, map: MapOf) -> SelfAttention:
    """The same projections, and maps as they begin."""
    position, decay = _parted(layer)
    heads, shared = layer.num_heads, layer.num_kv_heads
    maps = map(heads, layer.head_dim), map(heads, layer.head_dim)
    linear = SelfAttention(
        layer.embed_dim,
        heads,
        num_kv_heads=shared,
        bias=layer.in_proj_bias is not None,
        score=Features(*maps, log_decay=decay),
        position=position,
        normalizer=RowSum(),
    ).to(layer.in_proj_weight)
    same = {name: x for name, x in layer.state_dict().items() if "proj" in name}
    linear.load_state_dict(same, strict=False)
    return linear.train(layer.training)


def _parted(layer: SelfAttention) -> tuple[Position | None, Tensor | None]:
    """Rotations, and slopes as a decay."""
    position = layer.rule(layer.in_proj_weight.new_zeros(1, layer.embed_dim)).position
    rotations = [part for part in terms(position) if isinstance(part, Rotary)]
    slopes = [part.slopes for part in terms(position) if isinstance(part, Alibi)]
    decay = -sum(slopes)[..., None, None].detach() if slopes else None  # type: ignore[index]
    return (rotations[0] if rotations else None), decay


def _check(layer: SelfAttention, inputs: Tensor, mask: Mask | None) -> None:
    check_layer(layer, "linearize")
    if type(layer) is not SelfAttention:
        raise errors.FormError(f"linearize takes a softmax layer, and this is no such: {layer}")
    errors.check_tensor("inputs", inputs, shape="[count, n, d_model]", dims=3)
    rule = layer.rule(inputs)
    if type(rule.normalizer) is not Softmax or rule.normalizer.sink is not None:
        raise errors.FormError(
            f"linearize fits maps to rows of Softmax() without a sink, which sum to 1; this layer "
            f"has {rule.normalizer}. A layer whose scores factorise already needs no fit: "
            "regard.convert.to_recurrent(layer)."
        )
    if layer.training and layer.dropout > 0:
        raise errors.FormError(
            f"{layer} drops weights in training, so that its rows differ from call to call; "
            "convert it in evaluation, layer.eval()."
        )
    for part in terms(rule.position):
        if not isinstance(part, Rotary | Alibi):
            raise errors.FormError(
                f"a linear layer has no place for {part}, which is added to each score: a state "
                "can fade, as e^(-slope distance) of Alibi does, and keys can be rotated (Rotary)."
            )
        if isinstance(part, Alibi) and not isinstance(mask, Causal):
            raise errors.FormError(
                f"{part} becomes a decay, with which no token sees later ones; give mask=Causal(), "
                f"not {mask}."
            )
