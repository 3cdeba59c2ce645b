"""Devices and dtypes by name. What cannot be is an error that says what there is, before anything is loaded."""

from __future__ import annotations

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def device_named(name: torch.device | str) -> torch.device:
    """A device of this machine.

    Args:
        name: ``"cpu"``, ``"cuda"``, ``"cuda:1"``, ``"mps"``, ``"xpu"``, ...; ``"auto"`` for the accelerator that torch
            finds, or the CPU where there is none.

    Raises:
        ValueError: there is no such device here.
    """
    found = torch.accelerator.current_accelerator(check_available=True)
    if name == "auto":
        return torch.device("cpu") if found is None else found
    n = 0 if found is None else torch.accelerator.device_count()
    numbered = [] if found is None else [f"{found.type}:{i}" for i in range(n)]
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        device = None
    if device is not None and (
        device.type in ("cpu", "meta")
        or (found is not None and device.type == found.type and (device.index is None or device.index < n))
    ):
        return device
    there = ", ".join(["cpu", *([] if found is None else [found.type]), *numbered])
    why = "" if found else " (torch finds no accelerator: is this a build of torch for one, and has it a driver?)"
    raise ValueError(f"device={str(name)!r}: there is {there}{why}; 'auto' takes the accelerator, if there is one")


def dtype_named(name: torch.dtype | str, device: torch.device | None = None) -> torch.dtype | str:
    """A dtype of weights: itself, or by name; ``"auto"``, for that of the checkpoint, stays.

    Raises:
        ValueError: weights cannot have it, or not on that device.
    """
    found = DTYPES.get(str(name).removeprefix("torch."))
    if name == "auto":
        return "auto"
    if found is None:
        raise ValueError(f"dtype={str(name)!r}: allowed are {', '.join(DTYPES)}, and 'auto' for the checkpoint's own")
    if found == torch.float64 and device is not None and device.type == "mps":
        raise ValueError("dtype='float64': mps has no float64; take float32, or device='cpu'")
    return found
