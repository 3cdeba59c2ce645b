"""What other libraries put around a model and its modules: nnsight, TransformerLens, PEFT, accelerate, torch.compile.

Running a model needs none of this, but reading its weights does: PEFT's adapters stand beside the weights that they
change, weights that accelerate offloads are there only while their module runs, and quantised ones are codes
(`writesae.models.quantized`).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn

from writesae.jobs.processes import gathered
from writesae.models.quantized import dequantized


def unwrapped(model: Any) -> tuple[Any, Any]:
    """The transformers model inside another tool's wrapper, and that tool's tokenizer if it has one.

    Raises:
        ValueError: nnsight has not loaded the weights yet.
    """
    tools = {cls.__module__.partition(".")[0] for cls in type(model).__mro__}  # SAELens' bridge is TransformerLens'
    if "nnsight" in tools:
        if any(p.is_meta for p in model._module.parameters()):
            raise ValueError("nnsight has not loaded this model yet: call its .dispatch(), or load with dispatch=True")
        return model._module, vars(model).get("tokenizer")
    if "transformer_lens" in tools:
        return model.original_model, model.tokenizer
    return model, None


def bare(model: Any) -> Any:
    """The transformers model inside PEFT's and torch.compile's wrappers, whose ``forward`` passes any argument on.

    Raises:
        ValueError: PEFT puts virtual tokens before the text.
    """
    if hasattr(model, "_orig_mod"):
        return bare(model._orig_mod)
    if not hasattr(model, "peft_config") or not hasattr(model, "get_base_model"):
        return model  # or one with adapters of its own (``add_adapter``)
    if getattr(model.active_peft_config, "is_prompt_learning", False):
        raise ValueError(
            f"{type(model.active_peft_config).__name__} puts virtual tokens before the text, which would shift every "
            f"position and logit: wrap the model without it. (Adapters of weights, such as LoRA, work)"
        )
    return bare(model.get_base_model())


def in_half_precision(model: Any) -> bool:
    """Whether a model's weights are in bfloat16, float16 or less, so that its logits are rounded."""
    return bare(model).dtype.itemsize < 4


def device_of(model: nn.Module) -> torch.device:
    """Where a model takes its inputs: where its weights are, or where accelerate brings them to run."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if device.type != "meta":
        return device
    hooks = (getattr(module, "_hf_hook", None) for module in model.modules())
    places = (getattr(hook, "execution_device", None) for hook in hooks)
    return torch.device(next((place for place in places if place is not None), device))


def weight(module: nn.Module) -> Tensor:
    """``module.weight`` as it acts, see `weights`."""
    return dict(weights(module))["weight"]


def weights(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """``module.named_parameters()`` as they act: active adapters of PEFT are in them, offloaded ones are fetched,
    quantised ones are the numbers that the layer computes with, those sharded over processes are gathered (so that each
    process has to ask).

    Names are those of the module as it was before either, and as PEFT's ``merge_and_unload`` leaves it.
    """
    module = _as_it_acts(module)
    with align_module_device(module):
        computed = dequantized(module)
        own = module.named_parameters(recurse=False) if computed is None else computed.items()
        own = [(prefix + name, gathered(p)) for name, p in own]
    yield from own
    if computed is not None:
        return
    for name, child in module.named_children():
        yield from weights(child, f"{prefix}{name}.")


def _as_it_acts(module: Any) -> nn.Module:
    """The module that TransformerLens' or PEFT's in its place comes to, with the adapters that are active now."""
    if (inside := module._modules.get("_original_component")) is not None:
        return _as_it_acts(inside)
    if hasattr(module, "get_base_layer") and hasattr(module, "merge"):  # LoRA and the like, beside a base layer
        if module.disable_adapters or module.merged or not module.active_adapters:
            return module.get_base_layer()
        with align_module_device(module.get_base_layer()):
            module = copy.deepcopy(module)
        module.merge()
        return module.get_base_layer()
    if hasattr(module, "original_module") and hasattr(module, "active_adapters"):  # a copy that was trained itself
        if module.disable_adapters or not module.active_adapters:
            return module.original_module
        if not hasattr(module, "modules_to_save"):
            raise ValueError(f"the weights of a {type(module).__name__} are not known: call merge_and_unload() first")
        return module.modules_to_save[module.active_adapters[0]]
    return module
