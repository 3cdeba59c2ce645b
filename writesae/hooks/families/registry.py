"""The families that are known, and how one is added, from inside the package or from outside."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from writesae.hooks.families.base import Family
from writesae.hooks.quantities import RESIDUAL
from writesae.recurrence.rules import RULES, Rule

FAMILIES: list[Family] = []
"""Every family that is known; `register` adds one."""

NEEDED = ("q", "k", "v")  # every recurrence reads, and writes a value at a key
GIVEN = ("write", "state", "o")  # hook points that every mixer has


def register(family: Family) -> Family:
    """Make a family of architectures known: models with its mixers can be wrapped, and stores find its rule by name.

    Registering the same family twice changes nothing.

    Raises:
        TypeError: not a `Family`, or a field of it has another type.
        ValueError: a field is missing, or a mixer, a rule's name or the family's name belongs to another family.

    Returns:
        The family itself.
    """
    _check(family)
    if family in FAMILIES:
        return family
    for known in FAMILIES:
        if known.name == family.name:
            raise ValueError(f"a family named {family.name!r} is registered already: give yours another name")
        taken = [f"{module}.{mixer}" for module, mixer in family.mixers.items() if known.mixers.get(module) == mixer]
        if taken:
            raise ValueError(
                f"mixer {taken[0]} belongs to the family {known.name!r} already: leave it out of mixers={{...}}"
            )
    rule = RULES.setdefault(family.rule.name, family.rule)
    if rule != family.rule:
        raise ValueError(
            f"another rule is named {rule.name!r} already, and stores find rules by name: give yours another name"
        )
    FAMILIES.append(family)
    return family


def _check(family: Family) -> None:
    """Raise TypeError or ValueError unless every field can be used."""
    if not isinstance(family, Family):
        raise TypeError(f"register takes a Family; got {_kind(family)}. Make one with writesae.hooks.Family(...)")
    if not isinstance(family.rule, Rule):
        raise TypeError(f"rule={family.rule!r} of the family {family.name!r}: give a writesae.recurrence.rules.Rule")
    if not isinstance(family.mixers, Mapping) or not family.mixers:
        raise TypeError(
            f"mixers={family.mixers!r} of the family {family.name!r}: give {{modeling module: name of its mixer class}}"
        )
    for field in ("kernels", "raw", "helpers", "fused", "projections", "norms", "stream_norms"):
        names = getattr(family, field)
        if isinstance(names, str) or not all(isinstance(name, str) for name in names):
            raise TypeError(f'{field}={names!r} of the family {family.name!r}: give a tuple of names, ("name",)')
    if not family.kernels:
        raise ValueError(
            f"kernels=() of the family {family.name!r}: name at least one function that runs its recurrence"
        )
    if not callable(family.sizes) and len(family.sizes) != 3:
        raise ValueError(
            f"sizes={family.sizes!r} of the family {family.name!r}: name the three attributes of the mixer that hold "
            f"n_heads, d_key and d_value, or give a function of it"
        )
    if not callable(family.call):
        raise TypeError(f"call={family.call!r} of the family {family.name!r}: give a KernelCall class")
    if family.takes_cache is not None and not callable(family.takes_cache):
        raise TypeError(
            f"takes_cache={family.takes_cache!r} of the family {family.name!r}: give a function "
            f"(cache, text model, tokens) -> cache"
        )
    if not family.layers or not isinstance(family.layers, str):
        raise TypeError(
            f"layers={family.layers!r} of the family {family.name!r}: name the list of a text model's layers"
        )
    if not isinstance(family.needs_memory, tuple) or not all(isinstance(x, torch.dtype) for x in family.needs_memory):
        raise TypeError(f"needs_memory={family.needs_memory!r} of the family {family.name!r}: give a tuple of dtypes")
    inputs = family.rule.inputs
    if missing := [quantity for quantity in NEEDED if quantity not in inputs]:
        raise ValueError(f"rule {family.rule.name!r} has inputs {inputs}: {', '.join(missing)} must be among them")
    own = (*family.seen_at, *family.raw, *inputs)
    for quantity in own:
        if not quantity.isidentifier() or quantity in (*RESIDUAL, *GIVEN) or own.count(quantity) > 1:
            raise ValueError(
                f"quantity {quantity!r} of the family {family.name!r}: name each once, as a Python identifier, and not "
                f"{', '.join((*RESIDUAL, *GIVEN))}"
            )


def _kind(thing: object) -> str:
    return f"the class {thing.__name__}" if isinstance(thing, type) else type(thing).__name__
