"""One small adapter a family of architectures: where its recurrence is called, and what the arguments mean.

An adapter is a `Family`: a table of the modeling files and mixer classes it covers and of the functions in them to
intercept, and a `KernelCall` that turns the arguments of such a call into the canonical quantities and back. All else
(hook points, edits, positions, caches) is written once, for every family.
"""

from writesae.hooks.families.base import Family, KernelCall, Site
from writesae.hooks.families.gdn import GATED_DELTANET

FAMILIES: tuple[Family, ...] = (GATED_DELTANET,)

__all__ = ["FAMILIES", "GATED_DELTANET", "Family", "KernelCall", "Site"]
