"""Model types that cannot be wrapped, and why: one sentence each, for errors and for docs/model_types.md.

What can be wrapped is in `writesae.hooks.families`.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from pathlib import Path

from torch import nn

_TRANSFORMERS = "transformers.models."

_ATTENTION = "it is attention: it remembers keys and values of every token, and no state"
_CONVOLUTION = (
    "it has attention and short convolutions: it remembers the last few tokens beside keys and values, no state"
)
_NOT_YET = "it keeps a matrix per head that writesae's recurrence could follow, but there is no model for it yet"

OF_TRANSFORMERS: dict[str, str] = {
    "inkling": _CONVOLUTION,
    "inkling2": _CONVOLUTION,
    "lfm2": _CONVOLUTION,
    "lfm2_moe": _CONVOLUTION,
    "lfm3": _CONVOLUTION,
    "recurrent_gemma": "RecurrentGemma (RG-LRU) keeps a vector per layer, not a matrix",
    "rwkv": "RWKV-4 keeps vectors per layer, a weighted mean of each channel and its weight, not a matrix",
    "zaya": "it has attention behind short convolutions: it remembers keys and values of every token, and no state",
}
"""Folders of ``transformers.models`` with a memory beside keys and values, if we have no adapter for it."""

OF_FLA: dict[str, str] = {
    "abc": "it keeps slots of keys and of values as Gated Slot Attention does, but its gates are shares of a running "
    "sum of exponentials, and there is no model for it yet",
    "cat": "it is attention to chunks of tokens, compressed: it keeps no state",
    "cyclic_flow_attention": "it keeps aligned keys and values in slots of time, and moves them from slot to slot",
    "deltaformer": _ATTENTION,
    "forgetting_transformer": _ATTENTION,
    "hgrn": "HGRN keeps a vector per layer, not a matrix (HGRN2 keeps matrices)",
    "lightnet": "it keeps a matrix per head, and decays that depend on a running sum of the keys' exponentials",
    "log_linear_mamba2": "it keeps a number of matrices per head that grows with the logarithm of the text's length",
    "mesa_net": "it keeps two matrices per head, and reads by solving a linear system with one of them",
    "mla": _ATTENTION,
    "moba": _ATTENTION,
    "mom": "it routes each token to some of several matrices per head, and mixes what it reads from them",
    "nsa": _ATTENTION,
    "parallax": _ATTENTION,
    "path_attn": _ATTENTION,
    "precond_gated_deltanet": "beside its matrix it keeps a preconditioner, which its erase and write depend on",
    "precond_kda": "beside its matrix it keeps a preconditioner, which its erase and write depend on",
    "raven": "it keeps slots of keys and of values as Gated Slot Attention does, but routes each token to some of "
    "them, and there is no model for it yet",
    "rodimus": _NOT_YET,
    "samba": "its recurrent layers are those of Mamba, but there is no model for this mix with attention yet",
    "stickbreaking_attn": _ATTENTION,
    "transformer": _ATTENTION,
    "wall_transformer": _ATTENTION,
    "yoco": "its first half keeps a matrix per head, but there is no model for it yet; its second half is attention",
}
"""Model types of flash-linear-attention that it alone has."""

# What the modeling file of a model with any memory but keys and values has, of all those of transformers.
_MARKS = re.compile(r"update_(conv|recurrent)_state|recurrent_states?\b|linear_cache|rwkv_linear|mlstm")


def has_recurrence(modeling_file: Path) -> bool:
    """Whether a modeling file of transformers keeps more of past tokens than keys and values, by its source."""
    return _MARKS.search(modeling_file.read_text("utf-8")) is not None


def why_not(model: nn.Module, known_mixers: Iterable[str]) -> str:
    """Why a model without a mixer that we know cannot be wrapped; ``known_mixers`` for where the model is not known."""
    name = type(model).__name__
    modules = {type(module).__module__ for module in model.modules()}
    if any(module.startswith("xlstm.") for module in modules):
        return (
            f"{name} cannot be wrapped: its layers are those of the package xlstm, which transformers takes in the "
            f"place of its own wherever it is installed. Uninstall xlstm, and load the model again"
        )
    files = {module.split(".")[2]: sys.modules[module] for module in modules if module.startswith(_TRANSFORMERS)}
    for folder in files:
        if reason := OF_TRANSFORMERS.get(folder):
            return f"{name} cannot be wrapped: {reason}"
    if files and not any(has_recurrence(Path(str(file.__file__))) for file in files.values()):
        return f"{name} has no recurrent layer: {_ATTENTION}. Look into it with TransformerLens"
    return (
        f"{name} has no recurrent layer that writesae knows; known mixers: {', '.join(sorted(known_mixers))}. Make one "
        f"of yours known with writesae.hooks.register"
    )
