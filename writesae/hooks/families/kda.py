"""Kimi Delta Attention: Kimi-Linear, Bailing-Hybrid, GLM-5-Next.

Gated DeltaNet with one decay a key channel, called with the same arguments; a key head a value head.
"""

from __future__ import annotations

from dataclasses import replace

from writesae.hooks.families.gdn import GATED_DELTANET, modeling

KIMI_DELTA = replace(
    GATED_DELTANET,
    name="Kimi Delta Attention",
    rule="kimi_delta",
    mixers={
        modeling("kimi_linear"): "KimiLinearDeltaAttention",
        modeling("bailing_hybrid"): "BailingHybridDeltaAttention",
        modeling("glm5_next"): "Glm5NextTextLinearAttention",
    },
    kernels=("chunk_kimi_delta_attention", "recurrent_kimi_delta_attention"),
    sizes=("num_heads", "head_dim", "head_dim"),
    decay_per_key=True,
)
