"""Stand-ins for the functions of a modeling file that run a recurrence.

Mixers call functions of their modeling file (``torch_chunk_gated_delta_rule``, ...). `intercept` puts a stand-in in the
place of each, which asks one question: is a tapped mixer running, with anything attached, or on our kernels? If not,
the native function runs as before. If so, the mixer's `Tap` does the call.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import transformers

from writesae.hooks.attachment import attach, attached_to
from writesae.hooks.families.base import Family
from writesae.hooks.graphs import outside_graphs
from writesae.hooks.tap import device_of_call, running
from writesae.models.gpu import plays_gpu

_short: ContextVar[bool] = ContextVar("short_chunks", default=False)

SHORT = 32  # tokens


@contextmanager
def short_chunks() -> Iterator[None]:
    """Torch functions that work in chunks (mostly of 64 tokens) take chunks of at most `SHORT` tokens while the block
    runs, as few and as short as a call needs.

    They fill every call up to whole chunks with nothing, which is most of the work for short pieces of many sequences.
    Results move by rounding alone.
    """
    token = _short.set(True)
    try:
        yield
    finally:
        _short.reset(token)


@dataclass(frozen=True)
class Native:
    """Kept on a stand-in: the function in whose place it stands."""

    function: Callable[..., Any]


def native(function: Callable[..., Any]) -> Callable[..., Any]:
    """The modeling file's own function behind a stand-in; ``function`` itself where it is none."""
    found = attached_to(function, Native)
    return function if found is None else found.function


def place_of(module: ModuleType, name: str) -> tuple[Any, str]:
    """What has a function of a modeling file, the file or a class in it (``Class.method``), and its name there."""
    owner, _, last = name.rpartition(".")
    return getattr(module, owner) if owner else module, last


def intercept(module_name: str, family: Family) -> None:
    """Put stand-ins in the place of a modeling file's functions, once.

    Raises:
        RuntimeError: the module lacks a function that the family names in ``kernels``.
    """
    module = importlib.import_module(module_name)
    for name in family.kernels + family.fused + family.helpers:
        owner, last = place_of(module, name)
        function = getattr(owner, last, None)
        if function is None:
            if name not in family.kernels:
                continue
            raise RuntimeError(
                f"transformers {transformers.__version__} has no {name} in {module_name}, which writesae intercepts; "
                f"install transformers>=5.15 (tested with the version in constraints.txt)"
                if module_name.startswith("transformers.")
                else f"{module_name} has no function {name}, which {family.name} names in kernels"
            )
        if attached_to(function, Native) is None:
            tapped, fused, forgets = (name in names for names in (family.kernels, family.fused, family.forgets))
            setattr(owner, last, _stand_in(function, tapped, fused, forgets))


def _stand_in(function: Callable[..., Any], tapped: bool, fused: bool, forgets: bool) -> Callable[..., Any]:
    """What is called in the place of a function of a modeling file. See `Family` for what these are.

    transformers binds these at import to whatever GPU package is installed, also for models on a CPU, where such
    kernels crash. Here the tensors' device decides: on a CPU the torch function runs.
    """
    torch_function = inspect.unwrap(function)
    signature = inspect.signature(torch_function)
    takes_any = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())

    def on_cpu(*args: Any, **kwargs: Any) -> Any:
        packed = [name for name in ("cu_seqlens", "seq_idx") if kwargs.get(name) is not None]
        if packed:
            raise ValueError(f"{torch_function.__name__} cannot keep packed sequences ({packed[0]}) apart on a CPU")
        if not takes_any:
            kwargs = {name: value for name, value in kwargs.items() if name in signature.parameters}
        if _short.get() and "chunk_size" in signature.parameters:
            call = signature.bind_partial(*args, **kwargs)
            call.apply_defaults()
            n_pos = next(iter(call.arguments.values())).shape[1]
            n_chunks = -(-n_pos // min(call.arguments["chunk_size"], SHORT))
            call.arguments["chunk_size"] = -(-n_pos // n_chunks)
            return torch_function(*call.args, **call.kwargs)
        return torch_function(*args, **kwargs)

    def by_device(*args: Any, **kwargs: Any) -> Callable[..., Any]:
        cpu = device_of_call((*args, *kwargs.values())).type == "cpu" and not plays_gpu()
        return on_cpu if cpu else function

    def untapped(*args: Any, **kwargs: Any) -> Any:
        return by_device(*args, **kwargs)(*args, **kwargs)

    def dispatch(*args: Any, **kwargs: Any) -> Any:
        own = by_device(*args, **kwargs)
        here = running.get()
        begin = here.remembered() if forgets and here is not None else None
        if here is None or (begin is None and not here.tap.takes(kwargs.values())):
            return own(*args, **kwargs)
        if fused:
            return None
        given = signature.bind_partial(*args).arguments

        def by_place(**arguments: Any) -> Any:  # as they came: GPU packages have other names for the first arguments
            first = [arguments.pop(name) for name in given]
            return own(*first, **arguments)

        running.set(None)  # a hook may run functions of another model, which are not this mixer's
        result = here.run(by_place, {**given, **kwargs}, begin)
        running.set(here)
        return result

    stand_in = outside_graphs(dispatch, untapped) if tapped or fused else untapped
    functools.update_wrapper(stand_in, function)
    attach(stand_in, Native(function))
    return stand_in
