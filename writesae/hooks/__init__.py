"""Hook points, interventions, and what stands between them and the model."""

from writesae.hooks.cache import ActivationCache
from writesae.hooks.families import FAMILIES, Family, Site
from writesae.hooks.intercept import Attached, Tap, install
from writesae.hooks.interventions import Add, Delete, Intervention, Moment, Replace, Substitute
from writesae.hooks.points import HookPoint, unknown_name
from writesae.hooks.positions import PositionSet

__all__ = [
    "FAMILIES", "ActivationCache", "Add", "Attached", "Delete", "Family", "HookPoint", "Intervention", "Moment",
    "PositionSet", "Replace", "Site", "Substitute", "Tap", "install", "unknown_name",
]  # fmt: skip
