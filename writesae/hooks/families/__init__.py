"""One small adapter a family of architectures: where its recurrence is called, and what the arguments mean.

An adapter is a `Family`: a table of the modeling files and mixer classes it covers and of the functions in them to
intercept, and a `KernelCall` that turns the arguments of such a call into the canonical quantities and back. All else
(hook points, edits, positions, caches) is written once, for every family.
"""

from writesae.hooks.families.base import Family, KernelCall
from writesae.hooks.families.gdn import GATED_DELTANET
from writesae.hooks.families.kda import KIMI_DELTA
from writesae.hooks.families.mamba2 import MAMBA2
from writesae.hooks.families.ours import DELTANET, GLA, RWKV7

FAMILIES: tuple[Family, ...] = (GATED_DELTANET, KIMI_DELTA, MAMBA2, RWKV7, DELTANET, GLA)

__all__ = [
    "DELTANET", "FAMILIES", "GATED_DELTANET", "GLA", "KIMI_DELTA", "MAMBA2", "RWKV7", "Family", "KernelCall",
]  # fmt: skip
