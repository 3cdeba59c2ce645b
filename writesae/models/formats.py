"""Checkpoints in their authors' formats: names, shapes and configs, turned into those of the classes that we load.

Nothing here reads a file: `writesae.models.load` does, and checks that every tensor found its place.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import Mamba2Config, MambaConfig

from writesae.models.rwkv6 import RWKV6Config
from writesae.models.rwkv7 import RWKV7Config

Tensors = dict[str, Tensor]

# RWKV, the authors' names: those of a block, then the others. A second entry says what to do to the tensor.
_FLAT, _TURNED = Tensor.flatten, lambda x: x.t()  # [1, 1, d] -> [d]; x @ w1 -> nn.Linear
_BLOCK7 = {
    "ln0": "pre_norm",
    "ln1": "attn_norm",
    "ln2": "ffn_norm",
    "att.ln_x": "attn.g_norm",
    "att.receptance": "attn.r_proj",
    "att.key": "attn.k_proj",
    "att.value": "attn.v_proj",
    "att.output": "attn.o_proj",
    "ffn.key": "ffn.key",
    "ffn.value": "ffn.value",
    **{f"att.x_{c}": f"attn.x_{c}" for c in "rwkvag"},
    "att.r_k": "attn.r_k",
    "att.k_k": ("attn.k_k", _FLAT),
    "att.k_a": ("attn.k_a", _FLAT),
    "ffn.x_k": ("ffn.x_k", _FLAT),
    **{f"att.{c}0": (f"attn.{c}_lora.lora.2.bias", _FLAT) for c in "wav"},
    **{f"att.{c}1": (f"attn.{c}_lora.lora.0.weight", _TURNED) for c in "wavg"},
    **{f"att.{c}2": (f"attn.{c}_lora.lora.2.weight", _TURNED) for c in "wavg"},
}
_BLOCK6 = {
    **{name: _BLOCK7[name] for name in ("ln0", "ln1", "ln2", "att.ln_x", "att.output", "ffn.value")},
    "att.receptance": "attn.r_proj.linear",
    "att.key": "attn.k_proj.linear",
    "att.value": "attn.v_proj.linear",
    "att.gate": "attn.g_proj.linear",
    "att.time_faaaa": "attn.bonus",
    "att.time_decay": ("attn.w_proj.linear.lora.2.bias", _FLAT),
    "att.time_decay_w1": ("attn.w_proj.linear.lora.0.weight", _TURNED),
    "att.time_decay_w2": ("attn.w_proj.linear.lora.2.weight", _TURNED),
    "att.time_maa_x": ("attn.x_proj.0.mu", _FLAT),
    "ffn.key": "ffn.key.linear",
    "ffn.receptance": "ffn.receptance.linear",
    "ffn.time_maa_k": ("ffn.key.mu", _FLAT),
    "ffn.time_maa_r": ("ffn.receptance.mu", _FLAT),
}
_THEIR_ORDER, _OUR_ORDER = "wkvrg", "rwkvg"  # of what time mixing makes of the token and the one before, in RWKV-6
_OUTSIDE = {"emb": "model.embeddings", "ln_out": "model.norm", "head": "lm_head"}


def rwkv_of_authors(theirs: Mapping[str, Tensor]) -> tuple[RWKV6Config | RWKV7Config, Tensors]:
    """Config and tensors of `RWKV7ForCausalLM` or `RWKV6ForCausalLM`, for the tensors of a ``.pth`` file of RWKV-LM.

    Raises:
        ValueError: another model than these.
    """
    return _rwkv6(theirs) if "blocks.0.att.time_maa_x" in theirs else _rwkv7(theirs)


def _rwkv_sizes(theirs: Mapping[str, Tensor], needed: str) -> dict[str, Any]:
    """The fields of both configs; ValueError unless the first block has the tensors that are needed."""
    names = ["emb.weight", "blocks.0.ffn.key.weight", *(f"blocks.0.att.{x}" for x in needed.split())]
    if absent := [name for name in names if name not in theirs]:
        raise ValueError(
            f"these are not the weights of RWKV-7 or RWKV-6, which alone of all RWKV are supported: no {absent[0]}"
        )
    vocab, d = theirs["emb.weight"].shape
    return dict(
        vocab_size=vocab,
        hidden_size=d,
        num_hidden_layers=1 + max(int(name.split(".")[1]) for name in theirs if name.startswith("blocks.")),
        intermediate_size=theirs["blocks.0.ffn.key.weight"].shape[0],
        group_norm_eps=64e-5,  # whatever the head's size
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )


def _rwkv7(theirs: Mapping[str, Tensor]) -> tuple[RWKV7Config, Tensors]:
    sizes = _rwkv_sizes(theirs, "r_k w1 a1 g1")
    rank = lambda name, block=0: theirs[f"blocks.{block}.att.{name}"].shape[1]  # noqa: E731
    config = RWKV7Config(
        **sizes,
        head_dim=theirs["blocks.0.att.r_k"].shape[1],
        decay_low_rank_dim=rank("w1"),
        a_low_rank_dim=rank("a1"),
        gate_low_rank_dim=rank("g1"),
        v_low_rank_dim=rank("v1", 1) if "blocks.1.att.v1" in theirs else None,
    )
    # Values of the first layer are there, but unused: it has no earlier ones to mix them with.
    used = {name: x for name, x in theirs.items() if not re.fullmatch(r"blocks\.0\.att\.v[012]", name)}
    return config, _all_renamed(used, _BLOCK7)


def _rwkv6(theirs: Mapping[str, Tensor]) -> tuple[RWKV6Config, Tensors]:
    sizes = _rwkv_sizes(theirs, "time_faaaa time_decay_w1 time_maa_w1 time_maa_w2 gate.weight")
    heads, d_key = theirs["blocks.0.att.time_faaaa"].shape
    config = RWKV6Config(
        **sizes,
        num_heads=heads,
        expand_k=heads * d_key / sizes["hidden_size"],
        expand_v=theirs["blocks.0.att.value.weight"].shape[0] / sizes["hidden_size"],
        proj_low_rank_dim=theirs["blocks.0.att.time_maa_w2"].shape[1],
        gate_low_rank_dim=theirs["blocks.0.att.time_decay_w1"].shape[1],
    )
    rest, ours, order = dict(theirs), Tensors(), [_THEIR_ORDER.index(c) for c in _OUR_ORDER]
    for i in range(config.num_hidden_layers):
        his, mine = f"blocks.{i}.att.time_maa_", f"model.layers.{i}.attn.x_"
        if all(his + x in rest for x in (*_OUR_ORDER, "w1", "w2")):  # what is missing is said later
            ours[f"{mine}bias"] = torch.stack([rest.pop(his + x).flatten() for x in _OUR_ORDER])
            w1, w2 = rest.pop(f"{his}w1"), rest.pop(f"{his}w2")  # [d, 5 rank], [5, rank, d]
            ours[f"{mine}proj.0.linear.weight"] = w1.unflatten(1, (5, -1))[:, order].flatten(1).t()
            ours[f"{mine}proj.2.weight"] = w2[order].flatten(0, 1).t()
    return config, ours | _all_renamed(rest, _BLOCK6)


def _all_renamed(theirs: Mapping[str, Tensor], names: Mapping[str, Any]) -> Tensors:
    """The tensors under our names."""
    found = {name: _renamed(name, names) for name in theirs}
    return {new: change(theirs[name]) if change else theirs[name] for name, (new, change) in found.items()}


def _renamed(name: str, names: Mapping[str, Any]) -> tuple[str, Any]:
    """Our name of one of the authors' tensors and what to do to it. An unknown name stays, and is refused later."""
    stem, dot, kind = name.rpartition(".")
    stem, suffix = (stem, dot + kind) if kind in ("weight", "bias") else (name, "")
    if stem in _OUTSIDE:
        return _OUTSIDE[stem] + suffix, None
    block = re.fullmatch(r"blocks\.(\d+)\.(.*)", stem)
    entry = block and names.get(block[2])
    if not block or not entry:
        return name, None
    new, change = (entry, None) if isinstance(entry, str) else entry
    return f"model.layers.{block[1]}.{new}{suffix}", change


def rwkv7_of_early_fla(tensors: Mapping[str, Tensor]) -> Tensors:
    """flash-linear-attention once kept the six token-shift vectors in one tensor ``x_x [6, d]``."""
    new: Tensors = {}
    for name, tensor in tensors.items():
        if name.endswith(".attn.x_x"):
            new |= {f"{name[:-1]}{c}": row[None, None] for c, row in zip("rwkvag", tensor, strict=True)}
        else:
            new[name] = tensor
    return new


# Mamba: the authors' defaults (mamba_ssm), and what they call the fields of transformers' config.
_MAMBA_FIELDS = {
    "d_state": ("state_size", 16),
    "d_conv": ("conv_kernel", 4),
    "expand": ("expand", 2),
    "dt_rank": ("time_step_rank", "auto"),
    "bias": ("use_bias", False),
    "conv_bias": ("use_conv_bias", True),
}
_MAMBA2_FIELDS = {
    "d_state": ("state_size", 128),
    "d_conv": ("conv_kernel", 4),
    "expand": ("expand", 2),
    "headdim": ("head_dim", 64),
    "ngroups": ("n_groups", 1),
    "bias": ("use_bias", False),
    "conv_bias": ("use_conv_bias", True),
    "chunk_size": ("chunk_size", 256),
    "dt_limit": ("time_step_limit", (0.0, float("inf"))),
}
_MAMBA2_ONLY = {"layer": "Mamba2", "d_ssm": None, "D_has_hdim": False, "rmsnorm": True, "norm_before_gate": False}
_START = {"conv_init", "dt_init_floor", "dt_max", "dt_min"}  # of weights
_MAMBA_NO_EFFECT = _START | {"dt_init", "dt_scale", "use_fast_path"}
_MAMBA2_NO_EFFECT = _START | {"A_init_range", "use_mem_eff_path"}
_MODEL_ONLY = {"attn_cfg": {}, "attn_layer_idx": [], "d_intermediate": 0, "rms_norm": True}
_MODEL_FIELDS = {
    "d_model", "fused_add_norm", "n_layer", "pad_vocab_size_multiple", "residual_in_fp32", "ssm_cfg", "tie_embeddings",
    "vocab_size",
}  # fmt: skip


def mamba_of_authors(theirs: Mapping[str, Any]) -> MambaConfig | Mamba2Config:
    """transformers' config for the ``config.json`` of a checkpoint of mamba_ssm (``state-spaces/mamba-...`` and
    ``mamba2-...``).

    Raises:
        ValueError: it asks for something that transformers' Mamba or Mamba-2 does not compute.
    """
    ssm = {"layer": "Mamba1"} | dict(theirs.get("ssm_cfg") or {})
    two = ssm["layer"] != "Mamba1"
    name = "Mamba-2" if two else "Mamba"
    fields, no_effect = (_MAMBA2_FIELDS, _MAMBA2_NO_EFFECT) if two else (_MAMBA_FIELDS, _MAMBA_NO_EFFECT)
    ssm_only = _MAMBA2_ONLY if two else {"layer": "Mamba1"}
    for given, only, known in ((theirs, _MODEL_ONLY, _MODEL_FIELDS), (ssm, ssm_only, fields.keys() | no_effect)):
        for field, value in given.items():
            if field in only and value != only[field]:
                raise ValueError(
                    f"a {name} checkpoint with {field}={value!r}: supported is {field}={only[field]!r} only"
                )
            if field not in only and field not in known:
                raise ValueError(f"a {name} checkpoint with {field}={value!r}, which writesae does not know")
    values: dict[str, Any] = {new: ssm.get(field, default) for field, (new, default) in fields.items()}
    d, multiple = theirs["d_model"], theirs.get("pad_vocab_size_multiple", 8)
    values |= dict(
        vocab_size=-(-theirs["vocab_size"] // multiple) * multiple,
        hidden_size=d,
        num_hidden_layers=theirs["n_layer"],
        residual_in_fp32=theirs.get("residual_in_fp32", True),
        tie_word_embeddings=theirs.get("tie_embeddings", True),
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    if not two:
        return MambaConfig(**values)
    values["time_step_limit"] = tuple(float(x) for x in values["time_step_limit"])
    return Mamba2Config(num_heads=values["expand"] * d // values["head_dim"], **values)


def mamba_tensors_of_authors(theirs: Mapping[str, Tensor]) -> Tensors:
    """Names as transformers has them: only the embedding's differs."""
    return {name.replace("backbone.embedding.", "backbone.embeddings."): tensor for name, tensor in theirs.items()}
