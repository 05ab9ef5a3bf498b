"""Tiny Hugging Face models with random weights, their inputs, and what they compute."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

t = pytest.importorskip("transformers", reason="the package transformers is not installed")

NARROW = {
    "vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 48, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GROUPED = {**NARROW, "num_key_value_heads": 2}
CODEC = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip
PICTURE = {"image_size": 16, "patch_size": 4, "hidden_size": 32, "num_hidden_layers": 2,
           "num_attention_heads": 4, "intermediate_size": 48}  # fmt: skip
TOKENS = 9


@dataclass(frozen=True)
class Family:
    """A kind of model.

    reads: "text", "both" (an encoder and a decoder of text), "sound", "picture" or "pair"
    """

    model: type[nn.Module]
    config: Callable[[], Any]
    reads: str = "text"


FAMILIES = {
    "bert": Family(t.BertForMaskedLM, partial(t.BertConfig, **NARROW)),
    "roberta": Family(t.RobertaForMaskedLM, partial(t.RobertaConfig, **NARROW)),
    "modernbert": Family(
        t.ModernBertForMaskedLM,
        partial(
            t.ModernBertConfig, **NARROW, local_attention=4, global_attn_every_n_layers=2,
            cls_token_id=1, sep_token_id=2,
        ),
    ),
    "gpt2": Family(
        t.GPT2LMHeadModel,
        partial(
            t.GPT2Config, vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=40,
            pad_token_id=0, bos_token_id=1, eos_token_id=2,
        ),
    ),
    "llama": Family(t.LlamaForCausalLM, partial(t.LlamaConfig, **GROUPED)),
    "mistral": Family(t.MistralForCausalLM, partial(t.MistralConfig, **GROUPED, sliding_window=4)),
    "qwen2": Family(
        t.Qwen2ForCausalLM,
        partial(
            t.Qwen2Config, **GROUPED, use_sliding_window=True, sliding_window=4,
            max_window_layers=1,
        ),
    ),
    "qwen3": Family(t.Qwen3ForCausalLM, partial(t.Qwen3Config, **GROUPED, head_dim=8)),
    "gemma2": Family(
        t.Gemma2ForCausalLM,
        partial(
            t.Gemma2Config, **GROUPED, head_dim=8, attn_logit_softcapping=0.5, sliding_window=4
        ),
    ),
    "gpt-oss": Family(
        t.GptOssForCausalLM,
        partial(
            t.GptOssConfig, **GROUPED, head_dim=8, num_local_experts=2, num_experts_per_tok=1,
            experts_implementation="eager",
            sliding_window=4,
        ),
    ),
    "bart": Family(
        t.BartForConditionalGeneration,
        partial(
            t.BartConfig, **CODEC, vocab_size=50, max_position_embeddings=40,
            forced_eos_token_id=None,
        ),
        "both",
    ),
    "t5": Family(
        t.T5ForConditionalGeneration,
        partial(
            t.T5Config, vocab_size=50, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4,
            pad_token_id=0, eos_token_id=2, decoder_start_token_id=0,
        ),
        "both",
    ),
    "whisper": Family(
        t.WhisperForConditionalGeneration,
        partial(
            t.WhisperConfig, **CODEC, vocab_size=50, num_mel_bins=8, max_source_positions=10,
            max_target_positions=40, begin_suppress_tokens=None,
        ),
        "sound",
    ),
    "vit": Family(t.ViTForImageClassification, partial(t.ViTConfig, **PICTURE), "picture"),
    "clip": Family(
        t.CLIPModel,
        lambda: t.CLIPConfig(
            text_config={**NARROW, "max_position_embeddings": 40}, vision_config=PICTURE,
            projection_dim=8,
        ),
        "pair",
    ),
}  # fmt: skip
TEXT = [name for name, family in FAMILIES.items() if family.reads == "text"]
WRITERS = [
    name
    for name, family in FAMILIES.items()
    if "CausalLM" in family.model.__name__ or family.reads in ("both", "sound") or name == "gpt2"
]


def build(name: str, dtype: torch.dtype = torch.float64) -> Any:
    """A model in eval mode; its weights are large enough for uneven attention."""
    torch.manual_seed(0)
    model = FAMILIES[name].model(FAMILIES[name].config()).to(dtype).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(0.0, 0.3)
    return model


def padded(side: str) -> Tensor:
    """Which tokens of two sequences are real: of the second, three are missing on one side."""
    real = torch.ones(2, TOKENS, dtype=torch.long)
    if side != "none":
        real[1, slice(0, 3) if side == "left" else slice(-3, None)] = 0
    return real


def inputs(name: str, side: str = "none", dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """What a model is called with, targets included."""
    torch.manual_seed(1)
    ids, real = torch.randint(3, 50, (2, TOKENS)), padded(side)
    text = {"input_ids": ids * real, "attention_mask": real}
    # What stands before the first real token has seen nothing, and predicts nothing.
    targets = torch.where((real == 1) & (real.roll(1, -1) == 1), ids, -100)
    picture = torch.randn(2, 3, 16, 16, dtype=dtype)
    sound = torch.randn(2, 8, 20, dtype=dtype)
    match FAMILIES[name].reads:
        case "text":
            return {**text, "labels": targets}
        case "both":
            return {**text, "labels": ids[:, :6].contiguous()}
        case "sound":
            return {"input_features": sound, "labels": ids[:, :6].contiguous()}
        case "picture":
            return {"pixel_values": picture, "labels": torch.tensor([0, 1])}
    return {**text, "pixel_values": picture, "return_loss": True}


@dataclass(frozen=True)
class Run:
    """What one forward and backward pass gave."""

    output: Any
    gradients: dict[str, Tensor]

    @property
    def logits(self) -> Tensor:
        return (
            self.output.logits_per_text if "logits_per_text" in self.output else self.output.logits
        )

    @property
    def attentions(self) -> list[Any]:
        """All attention weights that the model reports."""
        names = ["attentions", "encoder_attentions", "decoder_attentions", "cross_attentions"]
        outputs = [self.output]
        if "logits_per_text" in self.output:
            outputs = [self.output.text_model_output, self.output.vision_model_output]
        return [a for o in outputs for n in names for a in (getattr(o, n, None) or ())]


def run(model: Any, implementation: str, **given: Any) -> Run:
    """Call a model under an implementation and take the gradients of its loss."""
    model.set_attn_implementation(implementation)
    model.zero_grad()
    output = model(**given, output_attentions=True)
    output.loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return Run(output, found)


@contextmanager
def exact_eager() -> Iterator[None]:
    """Eager code asks softmax for float32; of float64 it then gets float64.

    In float32 its lowest number of float64 would be -inf, and rows without keys NaN.
    """
    softmax = F.softmax

    def exact(*args: Any, dtype: torch.dtype | None = None, **kwargs: Any) -> Tensor:
        return softmax(*args, dtype=None if args[0].dtype == torch.float64 else dtype, **kwargs)

    F.softmax = exact
    try:
        yield
    finally:
        F.softmax = softmax


@cache
def both(name: str, side: str) -> tuple[Run, Run]:
    """(eager, regard) of one family in float64."""
    model, given = build(name), inputs(name, side)
    with exact_eager():
        return run(model, "eager", **given), run(model, "regard", **given)
