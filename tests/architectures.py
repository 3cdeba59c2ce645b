"""The one list of architectures: a tiny random model of every family, for each test that holds for all of them."""

from __future__ import annotations

import copy
import functools
import importlib
import math
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedModel

N_VOCAB = 97
LAYERS = ["linear_attention", "linear_attention", "full_attention", "linear_attention"]
RECURRENT = [0, 1, 3]
N_HEADS, N_KEY_HEADS, D_KEY, D_VALUE = 4, 2, 16, 12
# At rest, each head forgets at its own pace; the tokens move that by much (see `build`).
DECAYS = [0.2, 0.7, 0.96, 0.999]

_TEXT = dict(
    vocab_size=N_VOCAB,
    hidden_size=64,
    num_hidden_layers=len(LAYERS),
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=512,
    layer_types=LAYERS,
    linear_num_key_heads=N_KEY_HEADS,
    linear_num_value_heads=N_HEADS,
    linear_key_head_dim=D_KEY,
    linear_value_head_dim=D_VALUE,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=None,
)
_DENSE = dict(intermediate_size=96)
# Every expert is chosen, or a rounding error could choose another one and change the logits by much.
_EXPERTS = dict(moe_intermediate_size=32, shared_expert_intermediate_size=32, num_experts=4, num_experts_per_tok=4)
# Likewise its budget holds every token.
_INDEXER = dict(
    indexer_n_heads=1, indexer_kv_heads=1, indexer_head_dim=32, indexer_budget=256, indexer_compress_ratio=4
)
_VISION = dict(
    depth=1, hidden_size=32, intermediate_size=32, num_heads=2, out_hidden_size=64, num_position_embeddings=16
)


@dataclass(frozen=True)
class Architecture:
    """A family and how to make a tiny model of it.

    Attributes:
        name: for test ids.
        file: the modeling file's short name, ``transformers.models.{file}.modeling_{file}``.
        model: class of the model.
        config: class of its configuration.
        text: arguments of the text configuration.
        multimodal: the text model lies one level deeper, beside a vision model.
    """

    name: str
    file: str
    model: str
    config: str
    text: dict[str, Any] = field(default_factory=dict)
    multimodal: bool = False

    @property
    def modeling(self) -> ModuleType:
        return importlib.import_module(f"transformers.models.{self.file}.modeling_{self.file}")

    def build(self) -> PreTrainedModel:
        """A new model, always with the same weights, in float32, nothing attached."""
        return copy.deepcopy(_build(self.name))

    def __str__(self) -> str:
        return self.name


ARCHITECTURES = [
    Architecture("qwen3_5", "qwen3_5", "Qwen3_5ForCausalLM", "Qwen3_5TextConfig", _TEXT | _DENSE | {"head_dim": 32}),
    Architecture(
        "qwen3_5_multimodal", "qwen3_5", "Qwen3_5ForConditionalGeneration", "Qwen3_5Config",
        _TEXT | _DENSE | {"head_dim": 32}, multimodal=True,
    ),
    Architecture(
        "qwen3_5_moe", "qwen3_5_moe", "Qwen3_5MoeForCausalLM", "Qwen3_5MoeTextConfig",
        _TEXT | _EXPERTS | {"head_dim": 32},
    ),
    Architecture(
        "qwen3_next", "qwen3_next", "Qwen3NextForCausalLM", "Qwen3NextConfig",
        _TEXT | _DENSE | _EXPERTS | {"head_dim": 32},
    ),
    Architecture(
        "olmo_hybrid", "olmo_hybrid", "OlmoHybridForCausalLM", "OlmoHybridConfig",
        _TEXT | _DENSE | {"linear_allow_neg_eigval": True},
    ),
    Architecture(
        "qwen4_exp", "qwen4_exp", "Qwen4ExpForCausalLM", "Qwen4ExpTextConfig",
        _TEXT | _EXPERTS | _INDEXER | {"head_dim": 32, "hc_count": 2, "hc_lowrank": 16},
    ),
]  # fmt: skip

each_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES, ids=str)


@functools.cache
def _build(name: str) -> PreTrainedModel:
    """Random weights of a size at which every layer, the recurrent ones above all, moves the logits."""
    a = next(a for a in ARCHITECTURES if a.name == name)
    text = dict(a.text)
    if a.multimodal:
        config = getattr(transformers, a.config)(text_config=text, vision_config=dict(_VISION))
        config.image_token_id = config.video_token_id = config.vision_start_token_id = config.vision_end_token_id = -1
    else:
        config = getattr(transformers, a.config)(**text)
    model = getattr(transformers, a.model)(config).float().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter_name, p in model.named_parameters():
            if parameter_name.endswith("A_log"):  # decay = exp(-A softplus(input + dt_bias)), softplus(0) = log 2
                p.copy_((-torch.tensor(DECAYS).log() / math.log(2)).log())
            elif parameter_name.endswith("dt_bias"):
                p.zero_()
            elif p.ndim > 1:
                fan_in = 1 if "embed_tokens" in parameter_name else p.shape[-1]
                p.copy_(torch.randn(p.shape, generator=generator) / math.sqrt(fan_in))
    return model
