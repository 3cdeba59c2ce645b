"""GPU kernels without a GPU: Triton's interpreter runs them on CPU tensors, slowly, one program after the other.

Import this before anything that imports triton. What the interpreter cannot do by itself is mended here:

* There is no device to try configurations on: the first is taken.
* Loop variables are tensors in compiled kernels (``i_t.to(tl.int64)``), and plain integers in the interpreter.
"""

from __future__ import annotations

import builtins
import importlib
import importlib.machinery
import os
import sys
import types
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
import triton.language as tl
from triton.runtime import autotuner, interpreter

autotuner.Autotuner._bench = lambda self, *args, config=None, **kwargs: [1.0, 1.0, 1.0]
autotuner.Autotuner.check_disk_cache = lambda self, key, configs, bench: (bench(), False)[1]


def kernel_range(*args: Any) -> Iterator[Any]:
    bounds = [int(a.handle.data.item()) if isinstance(a, tl.tensor) else int(a) for a in args]
    for i in builtins.range(*bounds):
        yield tl.tensor(interpreter.TensorHandle(np.array([i], dtype=np.int32), tl.int32), tl.int32)


def gather(*args: Any, **kwargs: Any) -> Any:
    return tl.gather(*args, **kwargs)  # looked up when it is called: the interpreter puts its own there


_builtin_gather = tl.gather
_call = interpreter.GridExecutor.__call__


def call(self: Any, *args: Any, **kwargs: Any) -> Any:
    for fn in (self.fn, getattr(self.fn, "fn", None)):
        if (names := getattr(fn, "__globals__", None)) is not None:
            names["range"] = kernel_range
            if names.get("gather") is _builtin_gather:
                names["gather"] = gather
    return _call(self, *args, **kwargs)


interpreter.GridExecutor.__call__ = call


def widened(x: Any) -> Any:
    """bfloat16 as float32: the interpreter keeps its bits as whole numbers, and would count with those."""
    if x.dtype.scalar != tl.bfloat16:
        return x
    return interpreter.TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def narrowed(x: Any) -> Any:
    """float32 rounded to bfloat16, ties to even."""
    bits = x.data.view(np.uint32)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return interpreter.TensorHandle(bits.astype(np.uint16), tl.bfloat16)


def in_float32(method: Any) -> Any:
    """A method of the interpreter on one or two tensors, for bfloat16 too."""

    def counted(self: Any, *args: Any) -> Any:
        handles = [x for x in args if isinstance(x, interpreter.TensorHandle)]
        if not any(x.dtype.scalar == tl.bfloat16 for x in handles):
            return method(self, *args)
        result = method(self, *(widened(x) if isinstance(x, interpreter.TensorHandle) else x for x in args))
        return (
            narrowed(result)
            if result.dtype.scalar == tl.float32 and all(x.dtype.scalar == tl.bfloat16 for x in handles)
            else result
        )

    return counted


for name in ("binary_op", "unary_op", "ternary_op", "create_dot"):
    setattr(interpreter.InterpreterBuilder, name, in_float32(getattr(interpreter.InterpreterBuilder, name)))


# Instructions of a GPU that kernels name themselves, rounding more than these.
INSTRUCTIONS = {"cos.approx.f32": np.cos, "sin.approx.f32": np.sin, "tanh.approx.f32": np.tanh}


class Called:
    """What an instruction gave, as the compiler would return it."""

    def __init__(self, *results: Any):
        self.results = results

    def get_result(self, i: int) -> Any:
        return self.results[i]


def run_instruction(self: Any, asm: str, constraints: str, values: list[Any], *_: Any) -> Called:
    (x,) = values
    return Called(interpreter.TensorHandle(INSTRUCTIONS[asm.split()[0]](x.data), x.dtype.scalar))


interpreter.InterpreterBuilder.create_inline_asm = run_instruction

# A GPU's number is asked for around a launch; tensors on a CPU have none.
torch.cuda.device = lambda _index: nullcontext()


def use_mamba_ssm(source: Path) -> None:
    """Take mamba-ssm's Triton kernels from its source: importing the package itself wants its compiled parts, which the
    kernels do without."""
    package = types.ModuleType("mamba_ssm")
    package.__path__ = [str(source / "mamba_ssm")]
    package.__spec__ = importlib.machinery.ModuleSpec("mamba_ssm", None, is_package=True)
    sys.modules["mamba_ssm"] = package
    for name in ("ssd_combined", "selective_state_update"):
        importlib.import_module(f"mamba_ssm.ops.triton.{name}")
