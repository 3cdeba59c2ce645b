"""flash-linear-attention's GPU kernels for our own models, where they apply. **Not yet run on a GPU.**

They run for CUDA tensors in bfloat16 or float16, several tokens at once, if flash-linear-attention can be imported.
Everything else is the plain PyTorch of `writesae.recurrence.kernels`: a CPU (fla is not even imported then), a single
token, and float32, where the kernels would multiply in TF32.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

_wanted = True


def use_fla_kernels(wanted: bool) -> None:
    """Whether our models may use flash-linear-attention's GPU kernels (they may, unless told otherwise)."""
    global _wanted
    _wanted = wanted


def fla_kernel(module: str, name: str, q: Tensor) -> Callable[..., Any] | None:
    """The kernel ``fla.ops.{module}.{name}`` if it should run for these reads, otherwise None."""
    half = q.dtype in (torch.bfloat16, torch.float16)
    return _find(module, name) if _wanted and half and q.shape[1] > 1 and (q.is_cuda or plays_gpu()) else None


_as_if_on_gpu: ContextVar[bool] = ContextVar("as_if_on_gpu", default=False)


@contextmanager
def as_if_on_gpu() -> Iterator[None]:
    """Tensors on a CPU go where those on a GPU would while the block runs: to the kernels of installed GPU packages.

    On a CPU these crash, except under Triton's interpreter, which is slow and good enough to see that they are called
    right (``tests/kernels``).
    """
    token = _as_if_on_gpu.set(True)
    try:
        yield
    finally:
        _as_if_on_gpu.reset(token)


def plays_gpu() -> bool:
    """Whether the running code is inside `as_if_on_gpu`."""
    return _as_if_on_gpu.get()


@functools.cache
def _find(module: str, name: str) -> Callable[..., Any] | None:
    try:
        return getattr(importlib.import_module(f"fla.ops.{module}"), name)
    except Exception:  # besides not being installed, triton raises its own where it finds no driver
        return None
