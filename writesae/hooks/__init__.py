"""Hook points, interventions, and what stands between them and the model."""

from writesae.hooks.attachable import AttachableSAE
from writesae.hooks.cache import ActivationCache
from writesae.hooks.families import FAMILIES, Family
from writesae.hooks.intercept import Attached, Tap, install
from writesae.hooks.interventions import Add, Delete, Intervention, Moment, Replace
from writesae.hooks.names import name_of, resolve
from writesae.hooks.points import HookPoint
from writesae.hooks.positions import PositionSet
from writesae.hooks.residual_edits import Reconstruct, ResidualEdit, Steer
from writesae.hooks.sites import Head, Site

__all__ = [
    "FAMILIES", "ActivationCache", "Add", "AttachableSAE", "Attached", "Delete", "Family", "Head", "HookPoint",
    "Intervention", "Moment", "PositionSet", "Reconstruct", "Replace", "ResidualEdit", "Site", "Steer", "Tap",
    "install", "name_of", "resolve",
]  # fmt: skip
