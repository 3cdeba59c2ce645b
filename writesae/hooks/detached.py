"""A wrapped model as it was before it was wrapped, to compare with."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from torch import nn

from writesae.hooks.dispatch import native, place_of
from writesae.hooks.families.base import Family
from writesae.hooks.installing import find_mixers
from writesae.models.gpu import plays_gpu
from writesae.models.wrappers import device_of


@contextmanager
def detached(model: nn.Module) -> Iterator[None]:
    """While the block runs, a transformers model computes as if nobody had wrapped it: its modeling files have their
    own functions back, and no module has a hook of ours.

    It is for one thread: modeling files are changed for the whole process. On a CPU the functions are the torch ones,
    as in a transformers without GPU packages.
    """
    own_functions = [
        (*place_of(module, name), function)
        for module, family in modeling_files(model)
        for name, function in functions_of(module, family, model).items()
    ]
    before = [(*place, getattr(*place)) for *place, _ in own_functions]
    places: list[dict[int, Any]] = [
        hooks for module in model.modules() for hooks in (module._forward_pre_hooks, module._forward_hooks)
    ]
    kept = [dict(hooks) for hooks in places]
    try:
        for owner, name, function in own_functions:
            setattr(owner, name, function)
        for hooks in places:
            for number in [number for number, hook in hooks.items() if _is_ours(hook)]:
                del hooks[number]
        yield
    finally:
        for hooks, all_of_them in zip(places, kept, strict=True):
            hooks.clear()
            hooks.update(all_of_them)
        for owner, name, function in before:
            setattr(owner, name, function)


def modeling_files(model: nn.Module) -> list[tuple[ModuleType, Family]]:
    """The modeling files of a model's recurrent mixers, each once, and the adapter of each."""
    found = {type(mixer).__module__: family for _, mixer, family in find_mixers(model)}
    return [(sys.modules[name], family) for name, family in found.items()]


def functions_of(module: ModuleType, family: Family, model: nn.Module) -> dict[str, Callable[..., Any]]:
    """What a modeling file itself would run for a model, for each name that we put a stand-in in the place of."""
    on_cpu = device_of(model).type == "cpu" and not plays_gpu()
    own = {
        name: native(getattr(*place_of(module, name)))
        for name in family.kernels + family.fused + family.helpers
        if getattr(*place_of(module, name), None) is not None
    }
    return {name: inspect.unwrap(function) for name, function in own.items()} if on_cpu else own


def _is_ours(hook: Any) -> bool:
    """Hooks of ours on modules are methods of our objects."""
    owner = getattr(hook, "__self__", None)
    return type(owner).__module__.partition(".")[0] == __name__.partition(".")[0]
