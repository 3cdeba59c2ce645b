"""What a check ran on: versions, device, dtype, and the functions that ran the recurrences."""

from __future__ import annotations

import inspect
import platform
from collections import Counter
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from writesae.hooks.detached import functions_of, modeling_files
from writesae.model import HookedRecurrentModel

PACKAGES = (
    "writesae", "torch", "transformers", "flash-linear-attention", "fla-core", "mamba-ssm", "causal-conv1d", "triton",
    "kernels", "accelerate",
)  # fmt: skip


def environment(model: HookedRecurrentModel) -> dict[str, str]:
    """By name: packages, device, dtype, kernels."""
    devices = Counter(str(p.device) for p in model.hf_model.parameters())
    dtypes = Counter(str(p.dtype).removeprefix("torch.") for p in model.hf_model.parameters())
    return {
        "packages": ", ".join(f"{name} {_version(name)}" for name in PACKAGES)
        + f", Python {platform.python_version()}",
        "device": ", ".join(f"{device} ({_device_name(torch.device(device))})" for device in devices),
        "dtype": ", ".join(dtype for dtype, _ in dtypes.most_common()),
        "kernels": "; ".join(_kernels(model)),
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return f"{platform.machine()}, {torch.get_num_threads()} threads"
    return platform.machine()


def _kernels(model: HookedRecurrentModel) -> list[str]:
    """Each function that runs a recurrence, and whose code it is."""
    found = [] if model.kernels == "native" else ["writesae's, for several tokens at once in the place of these"]
    for module, family in modeling_files(model.hf_model):
        functions = functions_of(module, family, model.hf_model)
        found += [f"{name} = {_path(_implementation(functions[name]))}" for name in family.kernels]
    return found


def _implementation(function: Callable[..., Any]) -> Callable[..., Any]:
    """What transformers bound a function to when it was imported: a GPU package's function, if it is there."""
    return inspect.getclosurevars(inspect.unwrap(function, stop=_bound)).nonlocals.get("implementation", function)


def _bound(function: Callable[..., Any]) -> bool:
    return "implementation" in getattr(getattr(function, "__code__", None), "co_freevars", ())


def _path(function: Callable[..., Any]) -> str:
    return f"{getattr(function, '__module__', '?')}.{getattr(function, '__qualname__', type(function).__name__)}"
