"""One small adapter per family of architectures: where its recurrence is called, and what the arguments mean.

An adapter is a `Family`: a table of the modeling files and mixer classes it covers and of the functions in them to
intercept, and a `KernelCall` that turns the arguments of such a call into the canonical quantities and back. All else
(hook points, edits, positions, caches) is written once, for every family.

Every module of this folder is imported here and registers its families; one of yours does so from outside.
"""

import importlib
import pkgutil

from writesae.hooks.families.base import Family, KernelCall, as_given, of_heads
from writesae.hooks.families.registry import FAMILIES, register

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["FAMILIES", "Family", "KernelCall", "as_given", "of_heads", "register"]
