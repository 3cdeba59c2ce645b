"""Kimi Delta Attention: Kimi-Linear, Bailing-Hybrid, GLM-5-Next.

Gated DeltaNet with one decay per key channel, called with the same arguments; as many key heads as value heads.
"""

from __future__ import annotations

from dataclasses import replace

from writesae.hooks.families.gdn import GATED_DELTANET, modeling
from writesae.hooks.families.registry import register
from writesae.recurrence import rules

KIMI_DELTA = replace(
    GATED_DELTANET,
    name="Kimi Delta Attention",
    rule=rules.KIMI_DELTA,
    mixers={
        modeling("kimi_linear"): "KimiLinearDeltaAttention",
        modeling("bailing_hybrid"): "BailingHybridDeltaAttention",
        modeling("glm5_next"): "Glm5NextTextLinearAttention",
    },
    kernels=("chunk_kimi_delta_attention", "recurrent_kimi_delta_attention"),
    sizes=("num_heads", "head_dim", "head_dim"),
)
register(KIMI_DELTA)
