"""Hook points, interventions, and what stands between them and the model."""

from writesae.hooks.attachable import AttachableSAE
from writesae.hooks.cache import ActivationCache
from writesae.hooks.dispatch import short_chunks
from writesae.hooks.families import FAMILIES, Family, KernelCall, as_given, of_heads, register
from writesae.hooks.installing import find_mixers, install
from writesae.hooks.interventions import Add, Attached, Delete, Intervention, Moment, Replace
from writesae.hooks.knockout import Knockout
from writesae.hooks.names import name_of, resolve
from writesae.hooks.patches import Patch
from writesae.hooks.points import HookPoint
from writesae.hooks.positions import PositionSet
from writesae.hooks.quantities import Quantity
from writesae.hooks.residual_edits import AddVector, PointEdit, Reconstruct, ResidualEdit, Steer
from writesae.hooks.sites import Head, Site
from writesae.hooks.tap import Tap

__all__ = [
    "FAMILIES", "ActivationCache", "Add", "AddVector", "AttachableSAE", "Attached", "Delete", "Family", "Head",
    "HookPoint", "Intervention", "KernelCall", "Knockout", "Moment", "Patch", "PointEdit", "PositionSet", "Quantity",
    "Reconstruct", "Replace", "ResidualEdit", "Site", "Steer", "Tap", "as_given", "find_mixers", "install", "name_of",
    "of_heads", "register", "resolve", "short_chunks",
]  # fmt: skip
