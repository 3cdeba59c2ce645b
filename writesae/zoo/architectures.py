"""The tiny models, freshly initialised."""

import math
from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
    Qwen3_5ForCausalLM,
    Qwen3_5TextConfig,
)

from writesae.models.rwkv7 import RWKV7Config, RWKV7ForCausalLM

SHARED: dict[str, Any] = dict(hidden_size=192, tie_word_embeddings=True, bos_token_id=0, eos_token_id=0, pad_token_id=0)


def build_gdn(vocab_size: int) -> PreTrainedModel:
    """A 2.1M-parameter Qwen3.5: three Gated DeltaNet layers of four 32x32 heads, then one attention layer."""
    return _qwen3_5(vocab_size, n_layers=3, n_heads=4, d_head=32)


def build_gdn128(vocab_size: int) -> PreTrainedModel:
    """A 1.9M-parameter Qwen3.5 whose states have the size of the real ones: two layers of two 128x128 heads, then one
    attention layer. Not shipped; it is what benchmarks train SAEs on."""
    return _qwen3_5(vocab_size, n_layers=2, n_heads=2, d_head=128)


def _qwen3_5(vocab_size: int, n_layers: int, n_heads: int, d_head: int) -> PreTrainedModel:
    config = Qwen3_5TextConfig(
        vocab_size=vocab_size,
        **SHARED,
        intermediate_size=512,
        num_hidden_layers=n_layers + 1,
        layer_types=n_layers * ["linear_attention"] + ["full_attention"],
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=64,
        linear_num_key_heads=n_heads,
        linear_num_value_heads=n_heads,
        linear_key_head_dim=d_head,
        linear_value_head_dim=d_head,
        max_position_embeddings=4096,
    )
    model = Qwen3_5ForCausalLM(config)
    for layer in model.model.layers:
        if hasattr(layer, "linear_attn"):
            init_decays(layer.linear_attn)
    return model


def build_mamba2(vocab_size: int) -> PreTrainedModel:
    """A 2.1M-parameter Mamba-2: seven layers of twelve 32x32 heads, and nothing else."""
    config = Mamba2Config(
        vocab_size=vocab_size,
        **SHARED,
        num_hidden_layers=7,
        state_size=32,
        head_dim=32,
        num_heads=12,
        n_groups=1,
        chunk_size=64,
        initializer_range=0.02,
    )
    return Mamba2ForCausalLM(config)


def build_mamba1(vocab_size: int) -> PreTrainedModel:
    """A 1.0M-parameter Mamba: four layers of 256 channels of 16. Not shipped; see docs/results/mamba1.md."""
    size: dict[str, Any] = SHARED | {"hidden_size": 128}
    return MambaForCausalLM(MambaConfig(vocab_size=vocab_size, **size, num_hidden_layers=4, initializer_range=0.02))


def build_rwkv7(vocab_size: int) -> PreTrainedModel:
    """A 2.0M-parameter RWKV-7: four layers of six 32x32 heads, each with channel mixing."""
    config = RWKV7Config(
        vocab_size=vocab_size,
        **SHARED,
        num_hidden_layers=4,
        head_dim=32,
        intermediate_size=512,
        decay_low_rank_dim=32,
        a_low_rank_dim=32,
        v_low_rank_dim=16,
        gate_low_rank_dim=48,
    )
    return RWKV7ForCausalLM(config)


ARCHITECTURES: dict[str, Callable[[int], PreTrainedModel]] = {
    "gdn": build_gdn,
    "gdn128": build_gdn128,
    "mamba1": build_mamba1,
    "mamba2": build_mamba2,
    "rwkv7": build_rwkv7,
}


def build_model(arch: str, vocab_size: int, seed: int = 0) -> PreTrainedModel:
    """A tiny model of an architecture, freshly initialised."""
    torch.manual_seed(seed)
    return ARCHITECTURES[arch](vocab_size)


@torch.no_grad()
def init_decays(mixer: Any) -> None:
    """Let the heads start with decays spread from about 0.2 to 0.999 per token, as in Mamba-2.

    Transformers' own initialisation (dt_bias = 1, A up to 16) makes most heads forget everything within a token, and
    a short training run does not undo it. Here the step dt is log-uniform in 0.001..0.1, one stratum per head, and
    A uniform in 1..16; a head's decay per token starts near exp(-A dt).
    """
    heads = mixer.A_log.numel()
    stratum = (torch.arange(heads) + torch.rand(heads)) / heads
    dt = torch.exp(math.log(0.001) + stratum * math.log(0.1 / 0.001))
    mixer.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
    mixer.A_log.copy_(torch.empty(heads).uniform_(1, 16).log())
