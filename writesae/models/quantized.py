"""Weights of quantised layers: codes and scales on the outside, one matrix in what the layer computes.

Libraries keep the codes where the matrix was (bitsandbytes, compressed float8), in a tensor of a class of their own
(torchao, quanto), behind a method (torch's dynamic quantisation) or under other names (GPTQ, AWQ). Each that has a
function for it is asked; any other linear layer is applied to the identity.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from writesae.jobs.processes import is_sharded

PLAIN = {torch.float64, torch.float32, torch.float16, torch.bfloat16}
ORDINARY = (Tensor, nn.Parameter)  # other classes of tensors hold codes


def holds_codes(module: Any) -> bool:
    """Whether it computes with other numbers than those of its own parameters."""
    if not all(map(_plain, module.parameters(recurse=False))):
        return True
    return _is_linear(module) and not isinstance(getattr(module, "weight", None), Tensor)


@torch.no_grad()
def dequantized(module: Any) -> dict[str, Tensor] | None:
    """``weight [d_out, d_in]`` and, if there is one, ``bias`` that a quantised layer computes with.

    None for a module that holds plain numbers, or none of its own.

    Raises:
        TypeError: codes that nobody here knows how to read.
    """
    if not holds_codes(module):
        return None
    weight: Any = getattr(module, "weight", None)
    linear = _is_linear(module)
    if callable(weight) and linear:  # torch's own, whose packed weights have a method for it
        codes: Any = weight()
        found = codes.dequantize()
    elif type(weight).__name__ in ("Params4bit", "Int8Params"):
        from transformers.integrations.bitsandbytes import dequantize_bnb_weight  # imports bitsandbytes: only if used

        found = dequantize_bnb_weight(weight, getattr(module, "state", None))  # type: ignore[arg-type]
    elif isinstance(weight, Tensor) and type(weight) not in ORDINARY:
        found = weight.dequantize()
    elif linear:
        found = _of_identity(module)
    else:
        raise _unreadable(module)
    bias: Any = getattr(module, "bias", None)
    bias = bias() if callable(bias) else bias
    return {"weight": found} | ({} if bias is None else {"bias": bias})


def check_finite(model: nn.Module) -> None:
    """Raise ValueError for weights that are NaN or infinite; codes, and what is offloaded, are not looked at.

    Nor are embeddings: a row is of one token, plays no part where that does not occur, and shows where it does.
    """
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding)] + [model.get_output_embeddings()]  # type: ignore[operator]
    of_tokens = {id(x) for table in tables if table is not None for x in table.parameters()}
    looked_at = [(name, x) for name, x in model.named_parameters() if id(x) not in of_tokens and _plain(x)]
    # Of weights that are spread over processes, each looks at its own part.
    looked_at = [(name, x.to_local() if is_sharded(x) else x) for name, x in looked_at if not x.is_meta]  # type: ignore[operator]
    for device in {x.device for _, x in looked_at}:  # each is waited for once
        here = [(name, x) for name, x in looked_at if x.device == device]
        finite = torch.stack([x.isfinite().all() for _, x in here]).tolist()
        for name, x in (one for one, fine in zip(here, finite, strict=True) if not fine):
            raise ValueError(
                f"{name}: {int((~x.isfinite()).sum())} of its {x.numel()} weights are NaN or infinite, so what the "
                f"model computes is too. Load the checkpoint again, or look at the training that made it"
            )


def _is_linear(module: Any) -> bool:
    return hasattr(module, "in_features") and hasattr(module, "out_features")


def _plain(x: Tensor) -> bool:
    return (type(x) in ORDINARY or is_sharded(x)) and x.dtype in PLAIN


def _of_identity(module: Any) -> Tensor:
    """The matrix of a linear layer, from what it makes of the identity. (``forward`` itself: no hooks see it.)"""
    device = next((x.device for x in (*module.parameters(), *module.buffers())), None)
    x = torch.eye(module.in_features, device=device)
    try:
        return (module.forward(x) - module.forward(torch.zeros_like(x[:1]))).T
    except Exception as error:
        raise _unreadable(module) from error


def _unreadable(module: Any) -> TypeError:
    return TypeError(
        f"the weights of a {type(module).__module__}.{type(module).__qualname__} are codes that writesae cannot read. "
        f"Running the model, hooks and edits work; for W_O, fingerprints and directions load it without quantisation, "
        f"and give check_model=False where an SAE is attached"
    )
