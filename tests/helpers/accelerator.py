"""An accelerator without one: tensors that say they live on a device, and refuse what such a device would refuse.

`Elsewhere` is a tensor whose numbers lie in a CPU tensor inside of it. Torch sees a tensor of a CUDA device, so code
that asks for ``x.device`` gets an accelerator's, and no operation reaches the
numbers but through `__torch_dispatch__`, where devices are compared. While an `Accelerator` is in force,

* an operation on tensors of two devices raises (a CPU tensor without dimensions may mix, and a CPU index, as in torch);
* what reads memory of the device in silence raises: ``.numpy()``, ``np.asarray``, ``.data_ptr()``;
* on ``mps``, float64 raises;
* everything that makes the CPU wait (``.item()``, ``bool(x)``, ``.tolist()``, ``.cpu()``, ``nonzero``) is counted,
  with the line of ours that asked for it.

The number is right but the time is not: nothing here says how fast anything would be.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

import writesae

OURS = str(Path(writesae.__file__).parent)
KINDS = ("cuda", "mps")
TORCH = str(Path(torch.__file__).parent)
CPU = torch.device("cpu")
TORCH_SEES = torch.device("lazy:0")
aten = torch.ops.aten

WAITS = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten.unique_consecutive, aten._unique2}
WAITS |= {aten.unique_dim, aten.bincount, aten.repeat_interleave, aten.is_nonzero}
MAY_MIX = {aten.copy_, aten._to_copy}  # they move


class Elsewhere(torch.Tensor):
    """A tensor of a device that is not there."""

    inside: Tensor
    where: torch.device

    @staticmethod
    def __new__(cls, inside: Tensor, where: torch.device, requires_grad: bool = False) -> Elsewhere:
        made = torch.Tensor._make_wrapper_subclass(
            cls, inside.shape, strides=inside.stride(), storage_offset=inside.storage_offset(), dtype=inside.dtype,
            layout=inside.layout, device=TORCH_SEES, requires_grad=requires_grad,
        )  # fmt: skip
        made.inside, made.where = inside, where
        return made

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self.where

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return self.where.type == "cuda"

    def get_device(self) -> int:
        return self.where.index

    def to(self, *args: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        """Torch would take every device of its kind for the same."""
        if args and isinstance(args[0], Tensor):
            args = (args[0].device, args[0].dtype, *args[1:])
        copy = kwargs.pop("copy", False)
        if len(args) > 3 or (len(args) == 3 and isinstance(args[1], torch.dtype)):
            args, copy = args[:3], args[3] if len(args) > 3 else copy
        device, dtype, *_ = torch._C._nn._parse_to(*args[:3], **kwargs)  # type: ignore[attr-defined]
        device, dtype = _full(device or self.where), dtype or self.dtype
        if not copy and device == self.where and dtype == self.dtype:
            return self
        return _Moved.apply(self, device, dtype)  # type: ignore[return-value]

    def cpu(self, *_: Any, **__: Any) -> Tensor:  # type: ignore[override]
        return self.to("cpu")

    def cuda(self, device: Any = None, **_: Any) -> Tensor:  # type: ignore[override]
        return self.to("cuda" if device is None else device)

    def tolist(self) -> Any:
        _waiting("tolist")
        return self.inside.tolist()

    def numpy(self, *_: Any, **__: Any) -> Any:  # type: ignore[override]
        raise TypeError(f"can't convert {self.where} device type tensor to numpy. Use Tensor.cpu() first")

    def __array__(self, *_: Any, **__: Any) -> Any:  # type: ignore[override]
        return self.numpy()

    def data_ptr(self) -> int:
        raise RuntimeError(f"the memory of a tensor of {self.where} was asked for")

    def __deepcopy__(self, memo: dict) -> Tensor:
        made = self.detach().clone().requires_grad_(self.requires_grad)
        if isinstance(self, nn.Parameter):
            made = nn.Parameter(made, self.requires_grad)
        memo[id(self)] = made
        return made

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Elsewhere({self.inside!r}, {self.where})"

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return run(func, args, kwargs or {})


class _Moved(torch.autograd.Function):
    """From device to device, and its gradient back; torch would see one device."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
        ctx.was = x.device, x.dtype
        return aten._to_copy.default(x, device=device, dtype=dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return grad.to(*ctx.was), None, None


class Mode(TorchDispatchMode):
    """Sees operations without such a tensor too: those that make or move one."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return run(func, args, kwargs or {})


class WithNumbers(TorchFunctionMode):
    """``"cuda"`` is the first device of its kind; torch would ask a driver which."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        args, kwargs = tuple(_numbered(x) for x in args), {k: _numbered(x) for k, x in (kwargs or {}).items()}
        device = kwargs.get("device")
        if func in (torch.tensor, torch.as_tensor) and device is not None and device.type in KINDS:
            kwargs.pop("device")  # torch would fill memory of the device without an operation that a mode could see
            return func(*args, **kwargs).to(device)
        if func in (Tensor.__getitem__, Tensor.__setitem__):  # likewise of a list
            args = (args[0], _index(args[1]), *args[2:])
        return func(*args, **kwargs)


def _index(index: Any) -> Any:
    if isinstance(index, tuple):
        return tuple(_index(i) for i in index)
    return torch.tensor(index) if isinstance(index, list) else index


def _numbered(x: Any) -> Any:
    named = isinstance(x, torch.device) or (isinstance(x, str) and x.partition(":")[0] in (*KINDS, "cpu"))
    return _full(x) if named else x


_in_force: list[Accelerator] = []


def run(func: Any, args: tuple, kwargs: dict) -> Any:
    """An operation as a machine with such devices would do it."""
    flat, spec = tree_flatten((args, kwargs))
    there = [x for x in flat if isinstance(x, Elsewhere)]
    asked = kwargs.get("device")
    if not there and (asked is None or torch.device(asked).type in ("cpu", "meta")):
        return func(*args, **kwargs)
    packet = func.overloadpacket
    known = [x.where for x in there if x.where != TORCH_SEES] or [TORCH_SEES]
    where = known[0] if asked is None or torch.device(asked) == TORCH_SEES else _full(asked)
    if packet not in MAY_MIX:
        _check_devices(func, packet, flat, there)
    if packet in WAITS or (packet is aten.copy_ and not isinstance(args[0], Elsewhere)):
        _waiting(packet.__name__)
    elif packet is aten._to_copy and there and where == CPU:
        _waiting("cpu")
    elif packet in (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_):
        if any(isinstance(i, Tensor) and i.dtype == torch.bool for i in args[1]):
            _waiting("index by a mask")
        if any(isinstance(i, Tensor) and not isinstance(i, Elsewhere) and i.ndim for i in args[1]):
            _waiting("index from the CPU")
    own: dict[int, Elsewhere] = {}
    for x in there:
        own[id(x.inside)] = x
    inner_args, inner_kwargs = tree_unflatten([x.inside if isinstance(x, Elsewhere) else x for x in flat], spec)
    if asked is not None:
        inner_kwargs["device"] = CPU if where.type != "meta" else where
    if packet is aten.is_pinned:
        return False
    if packet is aten.histc and not inner_args[0].is_floating_point():  # which a CPU has only for floats
        found = func(inner_args[0].float(), *inner_args[1:], **inner_kwargs).to(inner_args[0].dtype)
    else:
        found = func(*inner_args, **inner_kwargs)
    if where == CPU or where.type == "meta":
        return tree_map_only(Tensor, lambda x: x.clone() if id(x) in own else x, found)
    first = args[0] if args else None
    if func._schema.is_mutable and isinstance(first, Tensor) and not isinstance(first, Elsewhere):
        return found  # into a tensor of the CPU

    def outside(x: Tensor) -> Tensor:
        if where.type == "mps" and x.dtype == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64")
        return own[id(x)] if id(x) in own else Elsewhere(x, where)

    return tree_map_only(Tensor, outside, found)


def _check_devices(func: Any, packet: Any, flat: list, there: list[Elsewhere]) -> None:
    if not there:
        return
    beside = [x for x in flat if isinstance(x, Tensor) and not isinstance(x, Elsewhere) and x.device.type != "meta"]
    if packet in (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_) and isinstance(
        flat[0], Elsewhere
    ):
        beside = [x for x in beside if x.dtype not in (torch.long, torch.int32, torch.bool, torch.uint8)]
    devices = {x.where for x in there if x.where != TORCH_SEES} | {x.device for x in beside if x.ndim}
    if len(devices) > 1:
        names = " and ".join(sorted(map(str, devices)))
        raise RuntimeError(f"Expected all tensors to be on the same device, but found at least two devices, {names}! "
                           f"(in {func})")  # fmt: skip


def _full(device: Any) -> torch.device:
    device = torch.device(device)
    return torch.device(device.type, 0) if device.type in KINDS and device.index is None else device


def _waiting(what: str) -> None:
    for accelerator in _in_force:
        if (place := _place()) is not None:
            accelerator.waits[f"{place} {what}"] += 1


def _place() -> str | None:
    """The line of ours that asked for it; None if another library did, transformers for instance."""
    frame = sys._getframe(2)
    while frame is not None and frame.f_code.co_filename.startswith((TORCH, __file__)):
        frame = frame.f_back
    if frame is None or not frame.f_code.co_filename.startswith(OURS):
        return None
    return f"{Path(frame.f_code.co_filename).relative_to(OURS)}:{frame.f_lineno}"


class Accelerator:
    """The device while it is in force. ``waits`` counts what made the CPU wait for it, by the line of ours."""

    def __init__(self, kind: str = "cuda"):
        self.device = torch.device(kind, 0)
        self.waits: Counter[str] = Counter()

    @property
    def n_waits(self) -> int:
        return self.waits.total()


class _Event:
    """Work of such a device is done when the call returns."""

    def __init__(self, *_: Any, **__: Any):
        self.record = self.synchronize = self.wait = lambda *_, **__: None
        self.query = lambda: True


@contextmanager
def accelerator(kind: str = "cuda") -> Iterator[Accelerator]:
    """Let there be an accelerator of a kind, ``"cuda"`` or ``"mps"``, while the block runs."""
    found = Accelerator(kind)
    with (
        patch("torch.cuda._lazy_init", lambda: None),
        patch("torch.optim.Optimizer._accelerator_graph_capture_health_check", lambda _self: None),
        patch("torch.accelerator.device_count", lambda: 2),
        patch("torch.Event", _Event),
        patch("writesae.models.quantized.ORDINARY", (Tensor, nn.Parameter, Elsewhere)),
        patch("torch.cuda.get_device_capability", lambda _device=None: (8, 0)),
        patch("torch.accelerator.current_accelerator", lambda check_available=False: torch.device(kind)),
        WithNumbers(),
        Mode(),
    ):
        _in_force.append(found)
        overwrites = torch.__future__.get_overwrite_module_params_on_conversion()
        torch.__future__.set_overwrite_module_params_on_conversion(True)  # what is in `Elsewhere` is not in its memory
        try:
            yield found
        finally:
            torch.__future__.set_overwrite_module_params_on_conversion(overwrites)
            _in_force.remove(found)
