"""Models of our own and every checkpoint format: against other people's code, in every mode, and what an error says."""

from __future__ import annotations

import ast
import copy
import dataclasses
import importlib.util
import json
import pickle
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from architectures import architecture_named
from oracles import by_rwkv, dplr_recurrence, fla_naive
from writesae import HookedRecurrentModel
from writesae.models import gpu, load, rwkv7, use_fla_kernels
from writesae.models.delta_net import DeltaNetConfig, DeltaNetForCausalLM
from writesae.models.gla import GLAConfig, GLAForCausalLM
from writesae.models.kinds import OF_FLA
from writesae.models.linear_attn import LinearAttentionConfig, LinearAttentionForCausalLM
from writesae.models.load import OURS, load_model
from writesae.models.retnet import RetNetConfig, RetNetForCausalLM
from writesae.models.rwkv6 import RWKV6Config, RWKV6ForCausalLM
from writesae.models.rwkv7 import RWKV7Config, RWKV7ForCausalLM
from writesae.models.tokenizers import WorldTokenizer, load_tokenizer
from writesae.recurrence import Recurrence

VOCAB = 97
SIZES: dict[str, Any] = dict(vocab_size=VOCAB, hidden_size=64, num_hidden_layers=2)
HEADS: dict[str, Any] = SIZES | dict(num_heads=4)
MODELS: dict[str, tuple[type[PreTrainedModel], Any]] = {
    "rwkv6": (RWKV6ForCausalLM, RWKV6Config(**HEADS)),
    "rwkv7": (RWKV7ForCausalLM, RWKV7Config(**SIZES, head_dim=16)),
    "delta_net": (DeltaNetForCausalLM, DeltaNetConfig(**HEADS)),
    "delta_net_gated": (DeltaNetForCausalLM, DeltaNetConfig(**HEADS, use_gate=True, allow_neg_eigval=True)),
    "delta_net_plain": (
        DeltaNetForCausalLM,
        DeltaNetConfig(**HEADS, use_short_conv=False, use_beta=False, qk_activation="elu", qk_norm="sum", expand_v=2),
    ),
    "gla": (GLAForCausalLM, GLAConfig(**HEADS)),
    "gla_conv": (GLAForCausalLM, GLAConfig(**HEADS, use_short_conv=True, num_kv_heads=2, clamp_min=-0.05)),
    "retnet": (RetNetForCausalLM, RetNetConfig(**HEADS)),
    "linear_attn": (LinearAttentionForCausalLM, LinearAttentionConfig(**HEADS, feature_map="elu")),
    "gla_plain": (GLAForCausalLM, GLAConfig(**HEADS, use_output_gate=False, elementwise_affine=False)),
}
each_model = pytest.mark.parametrize("name", MODELS)
each_kind = pytest.mark.parametrize("name", ["rwkv7", "delta_net", "gla_conv"])


def randomise(model: nn.Module) -> Any:
    """Weights of a size at which every layer moves the logits; biases and the like a bit off where they begin."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator, dtype=torch.float32)
            if p.ndim == 2 and not name.endswith("r_k"):
                p.copy_(noise if "embeddings" in name else noise / p.shape[-1] ** 0.5)
            else:
                p.add_(noise * 0.2)
    return model.eval()


def build(name: str) -> Any:
    cls, config = MODELS[name]
    return randomise(cls(config))


def tokens(*shape: int) -> Tensor:
    return torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def in_pieces(model: Any, ids: Tensor, sizes: list[int]) -> Tensor:
    cache = DynamicCache(config=model.config)
    return torch.cat([model(piece, past_key_values=cache).logits for piece in ids.split(sizes, 1)], 1)


# Every mode ----------------------------------------------------------------------------------------------------------


@each_model
def test_in_pieces_and_token_by_token(name: str) -> None:
    model, ids = build(name), tokens(2, 30)
    for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 3e-5)):
        model = model.to(dtype)
        with torch.no_grad():
            whole = model(ids, use_cache=False).logits
        assert whole.std() > 0.5
        for sizes in ([1] * 30, [1, 2, 20, 1, 6], [29, 1]):
            assert (in_pieces(model, ids, sizes) - whole).abs().max() < tolerance


@each_model
@torch.no_grad()
def test_padding(name: str) -> None:
    model, ids = build(name).double(), tokens(1, 20)
    alone = model(ids, use_cache=False).logits
    for left, right in ((5, 0), (0, 5)):
        padded = torch.cat([tokens(1, left), ids, tokens(1, right)], 1)
        mask = torch.tensor([[0] * left + [1] * 20 + [0] * right])
        both = model(padded.repeat(2, 1), attention_mask=torch.cat([mask, torch.ones_like(mask)])).logits
        assert (both[0, left : left + 20] - alone[0]).abs().max() < 1e-11
        assert left == 0 or (both[1, left : left + 20] - alone[0]).abs().max() > 1e-3

    padded, mask = torch.cat([tokens(1, 7), ids], 1), torch.tensor([[0] * 7 + [1] * 20])
    cache = DynamicCache(config=model.config)  # the first piece ends inside the padding, and the third is one token
    pieces, seen = [], 0
    for piece in padded.split([4, 13, 1, 9], 1):
        seen += piece.shape[1]
        pieces.append(model(piece, attention_mask=mask[:, :seen], past_key_values=cache).logits)
    assert (torch.cat(pieces, 1)[:, 7:] - alone).abs().max() < 1e-11


@each_model
@torch.no_grad()
def test_generation(name: str) -> None:
    model, ids = build(name), tokens(2, 6)
    options = dict(max_new_tokens=6, pad_token_id=0, eos_token_id=None)
    made = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **options)
    want = ids
    for _ in range(6):
        want = torch.cat([want, model(want).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(made, want)
    for more in (dict(do_sample=True, top_k=5), dict(do_sample=False, num_beams=3)):
        found = []
        for use_cache in (True, False):
            torch.manual_seed(3)
            mask = torch.ones_like(ids)
            found.append(model.generate(ids, attention_mask=mask, use_cache=use_cache, **more, **options))
        assert torch.equal(*found)


@each_kind
def test_gradient_checkpointing_changes_no_gradient(name: str) -> None:
    model, ids = build(name).double().train(), tokens(2, 9)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable()
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert gradients[0].norm() > 0.1 and torch.allclose(*gradients, atol=1e-12)


@each_model
@torch.no_grad()
def test_saved_and_loaded(name: str, tmp_path: Path) -> None:
    model, ids = build(name), tokens(2, 9)
    model.generation_config.repetition_penalty = 1.5
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    for loaded in (load_model(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)):
        assert type(loaded) is type(model) and not loaded.training
        assert loaded.generation_config.repetition_penalty == 1.5
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    hooked = HookedRecurrentModel.from_pretrained(tmp_path, tokenizer=False)
    assert torch.equal(hooked(ids), model(ids).logits) and hooked.model_id == str(tmp_path)

    half = load_model(tmp_path, dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / "half")
    assert half.dtype == load_model(tmp_path / "half", dtype="auto").dtype == torch.bfloat16
    assert (half(ids).logits - model(ids).logits).abs().mean() < 0.1
    assert half.generate(ids, max_new_tokens=2, attention_mask=torch.ones_like(ids), pad_token_id=0).shape == (2, 11)


@each_kind
@torch.no_grad()
def test_tied_embeddings_and_shards(name: str, tmp_path: Path) -> None:
    cls, config = MODELS[name]
    config = copy.deepcopy(config)
    config.tie_word_embeddings = True
    model = randomise(cls(config))
    assert model.lm_head.weight is model.model.embeddings.weight
    model.save_pretrained(tmp_path, max_shard_size="60kB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    loaded = load_model(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embeddings.weight
    assert torch.equal(loaded(tokens(1, 9)).logits, model(tokens(1, 9)).logits)


# RWKV-7 against the authors' package ---------------------------------------------------------------------------------

D, N_HEADS, N_LAYERS, D_FFN, RANKS = 128, 2, 3, 256, dict(w=16, a=24, v=8, g=32)


def rwkv7_of_authors(**changes: Any) -> dict[str, Tensor]:
    """Random weights as RWKV-LM saves them, gates as of a trained model."""
    g = torch.Generator().manual_seed(4)
    n = lambda *shape: torch.randn(shape, generator=g)  # noqa: E731
    u = lambda *shape: torch.rand(shape, generator=g)  # noqa: E731
    w: dict[str, Tensor] = {"emb.weight": n(300, D), "head.weight": n(300, D) / D**0.5}
    for norm in ("ln_out", *(f"blocks.{i}.ln{j}" for i in range(N_LAYERS) for j in ((0, 1, 2) if i == 0 else (1, 2)))):
        w |= {f"{norm}.weight": 1 + 0.2 * n(D), f"{norm}.bias": 0.1 * n(D)}
    for i in range(N_LAYERS):
        att, ffn = f"blocks.{i}.att.", f"blocks.{i}.ffn."
        w |= {f"{att}x_{c}": u(1, 1, D) for c in "rwkvag"}
        w |= {f"{att}w0": -5 + 6 * u(1, 1, D), f"{att}a0": n(1, 1, D), f"{att}v0": n(1, 1, D)}
        for c, rank in RANKS.items():
            w |= {f"{att}{c}1": n(D, rank) / D**0.5, f"{att}{c}2": n(rank, D) / rank**0.5}
        w |= {f"{att}k_k": 0.7 + 0.3 * n(1, 1, D), f"{att}k_a": 1 + 0.2 * n(1, 1, D), f"{att}r_k": 0.3 * n(N_HEADS, 64)}
        w |= {f"{att}{m}.weight": n(D, D) / D**0.5 for m in ("receptance", "key", "value", "output")}
        w |= {f"{att}ln_x.weight": 1 + 0.2 * n(D), f"{att}ln_x.bias": 0.1 * n(D), f"{ffn}x_k": u(1, 1, D)}
        w |= {f"{ffn}key.weight": n(D_FFN, D) / D**0.5, f"{ffn}value.weight": n(D, D_FFN) / D_FFN**0.5}
    return w | changes


@pytest.fixture(scope="module")
def pth(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rwkv") / "tiny.pth"
    torch.save(rwkv7_of_authors(), path)
    return path


@pytest.fixture(scope="module")
def their_logits(pth: Path) -> Tensor:
    """Of the authors' package, for `tokens(1, 40)`: all at once, which must be what it says token by token."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RWKV_V7_ON", "1")  # read when it is imported
        patch.setattr(torch.jit, "ScriptModule", nn.Module)  # torch.jit is deprecated, and slow to start
        patch.setattr(torch.jit, "script_method", lambda function: function)
        patch.setattr(torch.jit, "script", lambda function: function)
        from rwkv.model import RWKV

    return by_rwkv(RWKV(model=str(pth.with_suffix("")), strategy="cpu fp32"), tokens(1, 40))


@torch.no_grad()
def test_rwkv7_is_the_authors(pth: Path, their_logits: Tensor) -> None:
    model, ids = load_model(pth), tokens(1, 40)
    assert isinstance(model, RWKV7ForCausalLM) and model.dtype == torch.float32
    assert their_logits.std() > 0.5
    assert (model(ids).logits - their_logits).abs().max() < 1e-4
    assert (in_pieces(model, ids, [1] * 40) - their_logits).abs().max() < 1e-4


def _erase_swapped(initial_state: Tensor | None, output_final_state: bool, **values: Tensor) -> Any:
    def recurrence(get: Any) -> Recurrence:
        return Recurrence(get("q"), get("log_decay"), a=get("kappa"), b=-get("kappa") * get("iclr"))

    swapped = dataclasses.replace(rwkv7.RWKV7, recurrence=recurrence)
    return rwkv7.recur(swapped, values, initial_state, output_final_state)


@pytest.mark.parametrize("broken", ["erase", "erase swapped", "v_first", "eps"])
@torch.no_grad()
def test_a_broken_rwkv7_is_not(broken: str, pth: Path, their_logits: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = load_model(pth)
    if broken == "v_first":
        for layer in model.model.layers[1:]:
            layer.attn.v_mix.register_forward_hook(lambda module, args, out: torch.zeros_like(out))
    elif broken == "eps":
        for layer in model.model.layers:
            layer.attn.g_norm.eps = 1e-5
    elif broken == "erase":  # with keys of zero to erase along, nothing is erased
        for layer in model.model.layers:
            layer.attn.k_k.zero_()
    else:  # no weight exchanges the two: the function is where hooks stand in for it, too
        monkeypatch.setattr(rwkv7, "rwkv7_recurrence", _erase_swapped)
    assert (model(tokens(1, 40)).logits - their_logits).abs().max() > 1e-3


@torch.no_grad()
def test_rwkv7_of_fla_old_and_new(pth: Path, tmp_path: Path, their_logits: Tensor) -> None:
    ours: Any = load_model(pth)
    tensors = ours.state_dict()
    mixer = [*(f"x_{c}" for c in "rwkvag"), "k_k", "k_a", "r_k", "g_norm.bias", "g_norm.weight"]
    mixer += [f"{c}_proj.weight" for c in "rkvo"] + [f"{c}_lora.lora.{i}.weight" for c in "wavg" for i in (0, 2)]
    mixer += [f"{c}_lora.lora.2.bias" for c in "wav"]
    layer = [f"{norm}.{kind}" for norm in ("attn_norm", "ffn_norm") for kind in ("weight", "bias")]
    layer += [f"attn.{name}" for name in mixer] + [f"ffn.{name}" for name in ("x_k", "key.weight", "value.weight")]
    want = {f"model.layers.{i}.{name}" for i in range(N_LAYERS) for name in layer if i or "v_lora" not in name}
    want |= {f"model.layers.0.pre_norm.{kind}" for kind in ("weight", "bias")}
    want |= {"model.embeddings.weight", "model.norm.weight", "model.norm.bias", "lm_head.weight"}
    assert tensors.keys() == want  # the names of fla/models/rwkv7/modeling_rwkv7.py and fla/layers/rwkv7.py

    fields = dict(
        model_type="rwkv7", architectures=["RWKV7ForCausalLM"], auto_map={"AutoConfig": "x--y.Z"}, attn=None,
        attn_mode="chunk", fuse_norm=False, fuse_cross_entropy=True, hidden_act="sqrelu", hidden_ratio=4.0,
        max_position_embeddings=2048, vocab_size=300, hidden_size=D, num_hidden_layers=N_LAYERS, head_dim=64,
        intermediate_size=D_FFN, decay_low_rank_dim=RANKS["w"], a_low_rank_dim=RANKS["a"],
        v_low_rank_dim=RANKS["v"], gate_low_rank_dim=RANKS["g"], norm_bias=True, norm_eps=1e-5, norm_first=True,
        bos_token_id=0, eos_token_id=0, tie_word_embeddings=False, torch_dtype="bfloat16", use_cache=True,
        transformers_version="4.50.0",
    )  # fmt: skip
    early = dict(fields) | {"num_heads": 32}  # some have this default in them, though head_dim decides
    late = dict(fields) | {"num_heads": N_HEADS, "value_dim": [D] * N_LAYERS, "use_l2warp": True, "fuse_norm": True}
    for name, config in (("early", early), ("late", late)):
        saved = {k: v.contiguous() for k, v in tensors.items()}
        if name == "early":
            for i in range(N_LAYERS):
                rows = [saved.pop(f"model.layers.{i}.attn.x_{c}").flatten() for c in "rwkvag"]
                saved[f"model.layers.{i}.attn.x_x"] = torch.stack(rows)
        loaded = load_model(folder(tmp_path / name, config, saved))
        assert (loaded(tokens(1, 40)).logits - their_logits).abs().max() < 1e-4


def folder(path: Path, config: dict[str, Any], tensors: dict[str, Tensor] | None = None) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    if tensors is not None:
        save_file(tensors, path / "model.safetensors")
    return path


# DeltaNet and GLA against flash-linear-attention's loops, the rest as its layers have it ------------------------------


def fla_file(*path: str) -> Path:
    found = importlib.util.find_spec("fla")
    assert found and found.submodule_search_locations, 'fla-core is missing: pip install -e ".[test]"'
    return Path(found.submodule_search_locations[0], *path)


FLA_COMMON = dict(
    attn=None, attn_mode="chunk", bos_token_id=1, conv_size=4, eos_token_id=2, expand_v=1, fuse_cross_entropy=True,
    fuse_norm=True, fuse_swiglu=True, hidden_act="swish", hidden_ratio=4, hidden_size=32, initializer_range=0.02,
    intermediate_size=None, max_position_embeddings=2048, norm_eps=1e-6, num_heads=4, num_hidden_layers=2,
    tie_word_embeddings=False, torch_dtype="bfloat16", transformers_version="4.40.0", use_cache=True, vocab_size=VOCAB,
)  # fmt: skip
# As in the config.json of fla-hub/delta_net-1.3B-100B and fla-hub/gla-1.3B-100B, but for the sizes.
FLA_DELTANET = FLA_COMMON | dict(
    model_type="delta_net", architectures=["DeltaNetForCausalLM"], expand_k=1, norm_first=False, qk_activation="silu",
    qk_norm="l2", share_conv_kernel=False, use_beta=True, use_gate=False, use_output_norm=True, use_short_conv=True,
)  # fmt: skip
FLA_GLA = FLA_COMMON | dict(
    model_type="gla", architectures=["GLAForCausalLM"], clamp_min=None, elementwise_affine=True, expand_k=0.5,
    feature_map=None, num_kv_heads=None, share_conv_kernel=True, use_gk=True, use_gv=False, use_output_gate=True,
    use_short_conv=False,
)  # fmt: skip


def fla_tensors(config: dict[str, Any]) -> dict[str, Tensor]:
    """Random weights under the names and of the shapes that flash-linear-attention's layers have."""
    d, heads = config["hidden_size"], config["num_heads"]
    d_key, d_value = int(d * config["expand_k"]), int(d * config["expand_v"])
    is_gla = config["model_type"] == "gla"
    served = heads // (config.get("num_kv_heads") or heads)
    shapes = {"q_proj": [d_key, d], "k_proj": [d_key // served, d], "v_proj": [d_value // served, d]}
    shapes |= {"o_proj": [d, d_value]}
    if config["use_short_conv"]:
        shapes |= {f"{c}_conv1d": [shapes[f"{c}_proj"][0], 1, config["conv_size"]] for c in "qkv"}
    if is_gla:
        shapes |= {"gk_proj.0": [16, d], "gk_proj.1": [d_key // served, 16]}
    elif config["use_beta"]:
        shapes["b_proj"] = [heads, d]
    if gated := config["use_output_gate" if is_gla else "use_gate"]:
        shapes["g_proj"] = [d_value, d]
    norm = ("g_norm_swish_gate" if gated and config["fuse_norm"] else "g_norm") if is_gla else "o_norm"
    if config.get("elementwise_affine", True):
        shapes[norm] = [d_value // heads]
    generator = torch.Generator().manual_seed(5)
    weight = lambda *shape: torch.randn(shape, generator=generator) / shape[-1] ** 0.5  # noqa: E731
    around_one = lambda n: 1 + 0.2 * torch.randn(n, generator=generator)  # noqa: E731
    tensors = {"model.embeddings.weight": weight(VOCAB, d) * d**0.5, "lm_head.weight": weight(VOCAB, d)}
    tensors["model.norm.weight"] = around_one(d)
    for i in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{i}."
        for name, shape in shapes.items():
            tensors[f"{prefix}attn.{name}.weight"] = around_one(*shape) if len(shape) == 1 else weight(*shape)
        if is_gla:
            tensors[f"{prefix}attn.gk_proj.1.bias"] = torch.randn(d_key // served, generator=generator)
        tensors |= {f"{prefix}{norm}_norm.weight": around_one(d) for norm in ("attn", "mlp")}
        tensors |= {f"{prefix}mlp.{x}_proj.weight": weight(256, d) for x in ("gate", "up")}
        tensors[f"{prefix}mlp.down_proj.weight"] = weight(d, 256)
    return tensors


def fla_forward(config: dict[str, Any], w: dict[str, Tensor], ids: Tensor, broken: str = "") -> Tensor:
    """One unpadded pass, as fla's models compute it, written from its layers' sources; or with one thing wrong."""
    heads, eps = config["num_heads"], config["norm_eps"]
    is_gla = config["model_type"] == "gla"
    rms = lambda x, weight: x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight  # noqa: E731
    x = w["model.embeddings.weight"][ids]
    for i in range(config["num_hidden_layers"]):
        p = lambda name, i=i: w.get(f"model.layers.{i}.{name}.weight")  # noqa: E731
        h = rms(x, p("attn_norm"))
        q, k, v = (h @ p(f"attn.{c}_proj").T for c in "qkv")
        swish = config.get("qk_activation", "silu") == "silu"
        if config["use_short_conv"]:
            before = config["conv_size"] - 1
            q, k, v = (
                F.conv1d(F.pad(y.mT, (before, 0)), p(f"attn.{c}_conv1d"), groups=y.shape[-1]).mT
                for y, c in ((q, "q"), (k, "k"), (v, "v"))
            )
            v = F.silu(v)
            q, k = (F.silu(q), F.silu(k)) if swish else (q, k)
        elif not is_gla:
            q, k, v = (F.silu(q), F.silu(k), F.silu(v)) if swish else (q, k, F.silu(v))
        if is_gla:
            gk = (h @ p("attn.gk_proj.0").T) @ p("attn.gk_proj.1").T + w[f"model.layers.{i}.attn.gk_proj.1.bias"]
            groups = heads // (config["num_kv_heads"] or heads)
            q = q.unflatten(-1, (heads, -1))
            k, v, gk = (y.unflatten(-1, (heads // groups, -1)).repeat_interleave(groups, 2) for y in (k, v, gk))
            if broken == "heads":  # repeated, not each head's copies side by side
                k = k[:, :, [0, 2, 1, 3]]
            gk = F.logsigmoid(gk) / (8 if broken == "gate" else 16)
            if config["clamp_min"] is not None:
                gk = gk.clamp_min(config["clamp_min"])
            gk = torch.zeros_like(gk) if broken == "decay" else gk
            o, _ = fla_naive("gla").naive_recurrent_gla(q, k, v, gk)
        else:
            q, k, v = (y.unflatten(-1, (heads, -1)) for y in (q, k, v))
            extra = {"relu": F.relu, "elu": lambda y: F.elu(y) + 1}.get(config["qk_activation"], lambda y: y)
            q, k = extra(q), extra(k)
            if broken == "eps":
                q, k = (y / (y.norm(dim=-1, keepdim=True) + 0.1) for y in (q, k))
            elif config["qk_norm"] == "l2":
                q, k = (y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt() for y in (q, k))
            else:
                q, k = (y / y.abs().sum(-1, keepdim=True).clamp_min(1e-6) for y in (q, k))
            beta = (h @ p("attn.b_proj").T).sigmoid() if config["use_beta"] else torch.ones_like(q[..., 0])
            beta = beta * 2 if config.get("allow_neg_eigval") else beta
            v = v * beta[..., None] if broken in ("beta", "erase") else v  # beta: once in the write, and once more
            o, _ = fla_naive("delta_rule").delta_rule_recurrence(*(y.transpose(1, 2) for y in (q, k, v, beta)))
            o = o.transpose(1, 2)
            if broken == "erase":
                o, _ = fla_naive("gla").naive_recurrent_gla(q, k, v, torch.zeros_like(k))
        norm = p("attn.o_norm") if not is_gla else p("attn.g_norm_swish_gate")
        norm = p("attn.g_norm") if norm is None else norm
        o = rms(o, 1 if norm is None else norm)
        if p("attn.g_proj") is not None:
            o = o * F.silu((h @ p("attn.g_proj").T).unflatten(-1, (heads, -1)))
        x = x + o.flatten(2) @ p("attn.o_proj").T
        h = rms(x, p("mlp_norm"))
        x = x + (F.silu(h @ p("mlp.gate_proj").T) * (h @ p("mlp.up_proj").T)) @ p("mlp.down_proj").T
    return rms(x, w["model.norm.weight"]) @ w["lm_head.weight"].T


FLA_CONFIGS = [
    FLA_DELTANET,
    FLA_DELTANET | dict(use_gate=True, allow_neg_eigval=True, expand_v=2),
    FLA_DELTANET | dict(use_beta=False, qk_activation="relu", qk_norm="sum"),
    FLA_DELTANET | dict(use_short_conv=False),
    FLA_DELTANET | dict(use_short_conv=False, qk_activation="elu"),
    FLA_DELTANET | dict(qk_activation="identity"),
    FLA_GLA,
    FLA_GLA | dict(num_kv_heads=2, expand_v=2),
    FLA_GLA | dict(use_short_conv=True, share_conv_kernel=False, clamp_min=-0.03),
    FLA_GLA | dict(fuse_norm=False),
    FLA_GLA | dict(use_output_gate=False, elementwise_affine=False),
]


def _differences(config: dict[str, Any]) -> str:
    common = FLA_GLA if config["model_type"] == "gla" else FLA_DELTANET
    return "-".join([config["model_type"], *(f"{k}={v}" for k, v in config.items() if common.get(k) != v)])


@pytest.mark.parametrize("config", FLA_CONFIGS, ids=_differences)
@torch.no_grad()
def test_flas_delta_net_and_gla(config: dict[str, Any], tmp_path: Path) -> None:
    tensors, ids = fla_tensors(config), tokens(2, 40)
    model = load_model(folder(tmp_path, config, tensors))
    assert model.state_dict().keys() == tensors.keys()
    want = fla_forward(config, tensors, ids)
    assert want.std() > 0.5 and (model(ids).logits - want).abs().max() < 1e-4


@pytest.mark.parametrize("broken", ["erase", "beta", "eps", "gate", "decay", "heads"])
@torch.no_grad()
def test_a_broken_delta_net_or_gla_is_not(broken: str, tmp_path: Path) -> None:
    config = FLA_GLA | dict(num_kv_heads=2) if broken in ("gate", "decay", "heads") else FLA_DELTANET
    tensors, ids = fla_tensors(config), tokens(2, 40)
    logits = load_model(folder(tmp_path, config, tensors))(ids).logits
    assert (logits - fla_forward(config, tensors, ids)).abs().max() < 1e-4
    assert (logits - fla_forward(config, tensors, ids, broken)).abs().max() > 1e-3


# Mamba-2 in its authors' format --------------------------------------------------------------------------------------

MAMBA2 = dict(
    d_model=64, d_intermediate=0, n_layer=2, vocab_size=50, ssm_cfg={"layer": "Mamba2"}, attn_layer_idx=[], attn_cfg={},
    rms_norm=True, residual_in_fp32=True, fused_add_norm=True, pad_vocab_size_multiple=16, tie_embeddings=True,
)  # fmt: skip


def mamba2(**changes: Any) -> tuple[Any, dict[str, Tensor]]:
    """A model of transformers, and its tensors under the authors' names."""
    sizes = dict(hidden_size=64, num_hidden_layers=2, vocab_size=64, num_heads=2, head_dim=64, state_size=128)
    more = dict(n_groups=1, expand=2, conv_kernel=4, chunk_size=256, tie_word_embeddings=True)
    model = randomise(Mamba2ForCausalLM(Mamba2Config(**sizes | more | changes)))
    return model, {k.replace("embeddings", "embedding"): v.clone() for k, v in model.state_dict().items()}


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.safetensors", "shards"])
@torch.no_grad()
def test_mamba2_of_its_authors(file: str, tmp_path: Path) -> None:
    model, tensors = mamba2()
    folder(tmp_path, MAMBA2, tensors if file == "model.safetensors" else None)
    if file == "pytorch_model.bin":
        torch.save(tensors, tmp_path / file)
    elif file == "shards":
        names = sorted(tensors)
        parts = {"a.bin": names[::2], "b.bin": names[1::2]}
        for part, held in parts.items():
            torch.save({name: tensors[name] for name in held}, tmp_path / part)
        index = {"weight_map": {name: part for part, held in parts.items() for name in held}}
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    loaded: Any = load_model(tmp_path)
    assert type(loaded) is Mamba2ForCausalLM and loaded.lm_head.weight is loaded.get_input_embeddings().weight
    assert torch.equal(loaded(tokens(1, 20) % 50).logits, model(tokens(1, 20) % 50).logits)
    assert len(HookedRecurrentModel.from_pretrained(tmp_path, tokenizer=False).sites) == 2


@torch.no_grad()
def test_mamba2_of_other_sizes(tmp_path: Path) -> None:
    model, tensors = mamba2(
        num_heads=8, head_dim=24, state_size=16, n_groups=2, expand=3, conv_kernel=3, tie_word_embeddings=False,
        use_bias=True, use_conv_bias=False, time_step_limit=(0.01, 0.5),
    )  # fmt: skip
    sizes = dict(layer="Mamba2", headdim=24, d_state=16, ngroups=2, expand=3, d_conv=3, bias=True, conv_bias=False)
    ssm = sizes | dict(dt_limit=[0.01, 0.5], dt_min=0.01, chunk_size=64)
    config = MAMBA2 | dict(ssm_cfg=ssm, tie_embeddings=False)
    loaded = load_model(folder(tmp_path, config, tensors))
    assert (loaded(tokens(1, 20) % 50).logits - model(tokens(1, 20) % 50).logits).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (dict(ssm_cfg={"layer": "Mamba3"}), "layer='Mamba3': supported is layer='Mamba2' only"),
        (dict(ssm_cfg={}), "the weights of .* do not fit its config"),  # Mamba-1's
        (dict(ssm_cfg={"d_state": 16, "headdim": 64}), "a Mamba checkpoint with headdim=64"),
        (dict(ssm_cfg={}, d_intermediate=128), "a Mamba checkpoint with d_intermediate=128"),
        (dict(ssm_cfg={"layer": "Mamba2", "D_has_hdim": True}), "D_has_hdim=True"),
        (dict(ssm_cfg={"layer": "Mamba2", "rmsnorm": False}), "rmsnorm=False"),
        (dict(ssm_cfg={"layer": "Mamba2", "new": 3}), "new=3, which writesae does not know"),
        (dict(attn_layer_idx=[1], attn_cfg={"num_heads": 2}), r"attn_layer_idx=\[1\]|attn_cfg="),
        (dict(d_intermediate=128), "d_intermediate=128: supported is d_intermediate=0 only"),
        (dict(rms_norm=False), "rms_norm=False"),
        (dict(mystery=1), "mystery=1"),
    ],
)
def test_a_mamba2_that_transformers_does_not_compute(changes: dict[str, Any], text: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=text):
        load_model(folder(tmp_path, MAMBA2 | changes, mamba2()[1]))


@pytest.mark.parametrize("sizes", [{}, dict(d_state=8, expand=3, d_conv=3, dt_rank=5, bias=True, conv_bias=False)])
@torch.no_grad()
def test_mamba_of_its_authors(sizes: dict[str, Any], tmp_path: Path) -> None:
    """With a pickle, and with the fields that ``state-spaces/mamba-130m`` has."""
    names = dict(d_state="state_size", d_conv="conv_kernel", dt_rank="time_step_rank", bias="use_bias")
    ours = {{**names, "conv_bias": "use_conv_bias"}.get(name, name): value for name, value in sizes.items()}
    model = randomise(MambaForCausalLM(MambaConfig(hidden_size=64, num_hidden_layers=2, vocab_size=56, **ours)))
    theirs = {k.replace("embeddings", "embedding"): v.clone() for k, v in model.state_dict().items()}
    config = dict(
        d_model=64, n_layer=2, vocab_size=50, ssm_cfg={**sizes, "dt_min": 0.01}, rms_norm=True, residual_in_fp32=True,
        fused_add_norm=True, pad_vocab_size_multiple=8,
    )  # fmt: skip
    folder(tmp_path, config, None)
    torch.save(theirs, tmp_path / "pytorch_model.bin")
    loaded: Any = load_model(tmp_path)
    assert type(loaded) is MambaForCausalLM and loaded.lm_head.weight is loaded.get_input_embeddings().weight
    assert torch.equal(loaded(tokens(1, 20) % 50).logits, model(tokens(1, 20) % 50).logits)
    site = HookedRecurrentModel.from_pretrained(tmp_path, tokenizer=False).site(1)
    assert (site.n_heads, site.d_key, site.d_value) == (64 * sizes.get("expand", 2), sizes.get("d_state", 16), 1)


# Where files are -----------------------------------------------------------------------------------------------------


def hub_cache(path: Path, repo: str, files: Path, revision: str = "main") -> Path:
    """A cache of the hub as it is after a download."""
    sha = "0123456789abcdef0123456789abcdef01234567"
    kept = path / f"models--{repo.replace('/', '--')}"
    (kept / "refs").mkdir(parents=True)
    (kept / "refs" / revision).write_text(sha)
    (kept / "snapshots").mkdir()
    (kept / "snapshots" / sha).symlink_to(files)
    return path


@torch.no_grad()
def test_a_hub_id_is_taken_from_the_cache(pth: Path, tmp_path: Path) -> None:
    files = folder(tmp_path / "files", FLA_GLA, fla_tensors(FLA_GLA))
    cache = hub_cache(tmp_path / "hub", "fla-hub/tiny", files)
    ids = tokens(1, 9)
    loaded = HookedRecurrentModel.from_pretrained("fla-hub/tiny", cache_dir=cache, tokenizer=False)
    assert loaded.hf_model.dtype == torch.bfloat16  # as it lies
    assert torch.equal(loaded(ids), load_model(files, dtype="auto")(ids).logits) and loaded.model_id == "fla-hub/tiny"
    cache = hub_cache(tmp_path / "other", "fla-hub/tiny", files, revision="v2")
    load_model("fla-hub/tiny", cache_dir=cache, revision="v2", local_files_only=True)
    with pytest.raises(OSError, match="couldn't find them in the cached files"):  # main was never downloaded
        load_model("fla-hub/tiny", cache_dir=cache, local_files_only=True)

    cache = hub_cache(tmp_path / "authors", "BlinkDL/rwkv", pth.parent)
    loaded = load_model("BlinkDL/rwkv/tiny.pth", cache_dir=cache)
    assert torch.equal(loaded(ids).logits, load_model(pth)(ids).logits)


def test_where_nothing_is(tmp_path: Path) -> None:
    for source in (tmp_path / "gone.pth", "gone.pth", "owner/gone.pth"):
        with pytest.raises(OSError, match=r"gone\.pth \(on the hub, name it as owner/name/file\.pth\)"):
            load_model(source)
    with pytest.raises(OSError, match=r"nowhere is not shipped \(that is: tiny-gdn.*\.pth"):
        HookedRecurrentModel.from_pretrained("nowhere")
    with pytest.raises(ValueError, match=r"format that writesae reads itself, without variant="):
        load_model(folder(tmp_path / "v", FLA_GLA, fla_tensors(FLA_GLA)), variant="fp16")
    with pytest.raises(FileNotFoundError, match=r"has no weights: none of model\.safetensors, "):
        load_model(folder(tmp_path, FLA_GLA))


def test_a_shipped_name_spelt_wrong_is_said_without_asking_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr("writesae.model.hooked.load_model", lambda name, **_: asked.append(name) or 1 / 0)
    with pytest.raises(OSError, match=r"did you mean 'tiny-gdn'\?\), and there is no such folder"):
        HookedRecurrentModel.from_pretrained("tiny-gnd")
    assert asked == []
    for name in ("gpt2", "someone/tiny-gnd"):  # may be on the hub
        with pytest.raises(ZeroDivisionError):
            HookedRecurrentModel.from_pretrained(name)
    assert asked == ["gpt2", "someone/tiny-gnd"]


# Errors --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", sorted(OF_FLA))
def test_a_kind_of_fla_that_is_not_ours(kind: str, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError,
        match=rf"is a '{kind}' of flash-linear-attention.*delta_net, gated_deltanet, .*gla, .*, rwkv7 are supp",
    ):
        load_model(folder(tmp_path, {"model_type": kind}))


@pytest.mark.parametrize(
    ("config", "changes", "text"),
    [
        (FLA_GLA, dict(use_gv=True), "gla with use_gv=True: writesae supports use_gv=False only"),
        (FLA_GLA, dict(attn={"layers": [1], "num_heads": 2}), r"gla with attn=\{.*attn=None only"),
        (FLA_GLA, dict(feature_map="relu"), "gla with feature_map='relu'"),
        (FLA_GLA, dict(attnres_block_size=4), "gla with attnres_block_size=4"),
        (FLA_GLA, dict(hidden_act="powlu"), "gla with hidden_act='powlu'"),
        (FLA_GLA, dict(use_short_conv=True), "gla with share_conv_kernel=True"),
        (FLA_GLA, dict(num_kv_heads=3), "num_heads=4 is not a multiple of num_kv_heads=3"),
        (FLA_GLA, dict(expand_k=0.3), "expand_k=0.3: their product must be a multiple of num_heads=4"),
        (FLA_GLA, dict(novelty=3, _name_or_path="x"), "gla config has novelty=3, which writesae does not know"),
        (FLA_DELTANET, dict(norm_first=True), "delta_net with norm_first=True"),
        (FLA_DELTANET, dict(use_output_norm=False), "delta_net with use_output_norm=False"),
        (FLA_DELTANET, dict(qk_norm="max"), "delta_net with qk_norm='max': allowed are l2, sum"),
        (FLA_DELTANET, dict(qk_activation="tanh"), "qk_activation='tanh': allowed are silu, relu, elu, identity"),
        (FLA_DELTANET, dict(conv_size=1), r"conv_size=1: 2 or more is needed \(or use_short_conv=False\)"),
    ],
)
def test_a_config_that_is_not_supported(
    config: dict[str, Any], changes: dict[str, Any], text: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=text):
        load_model(folder(tmp_path, config | changes, {"x": torch.zeros(1)}))


def _drop(tensors: dict[str, Tensor], name: str) -> None:
    del tensors[name]


def _add(tensors: dict[str, Tensor], name: str) -> None:
    tensors[name] = torch.zeros(3)


def _cut(tensors: dict[str, Tensor], name: str) -> None:
    tensors[name] = tensors[name][1:].clone()


WRONG = [
    (_drop, "model.layers.1.attn.q_proj.weight", r"missing: model\.layers\.1\.attn\.q_proj\.weight$"),
    (_add, "model.layers.1.attn.extra", r"not part of this model: model\.layers\.1\.attn\.extra$"),
    (_cut, "lm_head.weight", r"of another shape: lm_head\.weight is \[96, 32\], should be \[97, 32\]$"),
]


@pytest.mark.parametrize("config", [FLA_GLA, FLA_DELTANET], ids=["gla", "delta_net"])
@pytest.mark.parametrize(("change", "name", "text"), WRONG)
def test_weights_that_do_not_fit(
    config: dict[str, Any], change: Callable[..., None], name: str, text: str, tmp_path: Path
) -> None:
    tensors = fla_tensors(config)
    change(tensors, name)
    with pytest.raises(ValueError, match=rf"the weights of .* do not fit its config; {text}"):
        load_model(folder(tmp_path, config, tensors))


def test_weights_of_other_formats_that_do_not_fit(tmp_path: Path) -> None:
    def saved(tensors: dict[str, Tensor], name: str) -> Path:
        torch.save(tensors, tmp_path / name)
        return tmp_path / name

    with pytest.raises(ValueError, match=r"not part of this model: blocks\.0\.ffn\.s_emb\.weight"):  # DeepEmbed
        load_model(saved(rwkv7_of_authors() | {"blocks.0.ffn.s_emb.weight": torch.zeros(3, 3)}, "a.pth"))
    with pytest.raises(ValueError, match=r"model\.layers\.1\.attn\.x_g is \[1, 1, 5\], should be \[1, 1, 128\]"):
        load_model(saved(rwkv7_of_authors() | {"blocks.1.att.x_g": torch.zeros(1, 1, 5)}, "b.pth"))
    tensors = rwkv7_of_authors()
    del tensors["blocks.2.att.w2"]
    with pytest.raises(ValueError, match=r"missing: model\.layers\.2\.attn\.w_lora\.lora\.2\.weight"):
        load_model(saved(tensors, "c.pth"))
    with pytest.raises(ValueError, match=r"not the weights of RWKV-7 or RWKV-6, .*no blocks\.0\.att\.r_k"):
        load_model(saved({"emb.weight": torch.zeros(3, 3), "blocks.0.ffn.key.weight": torch.zeros(3, 3)}, "d.pth"))
    with pytest.raises(ValueError, match="holds something else than a model's weights"):
        load_model(saved({"model": {}}, "e.pth"))

    _, tensors = mamba2()
    _drop(tensors, "backbone.layers.0.mixer.A_log")
    with pytest.raises(ValueError, match=r"missing: backbone\.layers\.0\.mixer\.A_log$"):
        load_model(folder(tmp_path / "m", MAMBA2, tensors))

    model = Mamba2ForCausalLM(Mamba2Config(**{k: v for k, v in mamba2()[0].config.to_dict().items() if v is not None}))
    model.save_pretrained(tmp_path / "t")  # of transformers' own classes, too
    tensors = load_file(tmp_path / "t" / "model.safetensors")
    _drop(tensors, "backbone.layers.1.mixer.dt_bias")
    save_file(tensors, tmp_path / "t" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"missing: backbone\.layers\.1\.mixer\.dt_bias$"):
        load_model(tmp_path / "t")


class RunsCode:
    ran = False

    def __reduce__(self) -> Any:
        return setattr, (RunsCode, "ran", True)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_does_not_get_to_run_code(legacy: bool, tmp_path: Path) -> None:
    for path in (tmp_path / "evil.pth", tmp_path / "pytorch_model.bin"):
        if legacy:
            path.write_bytes(pickle.dumps({"emb.weight": RunsCode()}, protocol=2))
        else:
            torch.save({"emb.weight": RunsCode()}, path)
        folder(tmp_path, FLA_GLA)
        with pytest.raises(ValueError, match=r"wants to run code when it is loaded, which is refused; .* safetensors"):
            load_model(path if path.suffix == ".pth" else tmp_path)
    assert not RunsCode.ran


# Tokenizers ----------------------------------------------------------------------------------------------------------

TEXTS = ["", "The state of the Union.\n\n\tis  strong", "Hello wörld 你好 🦢 e\u0301", "a" * 300 + " " * 70, "<|x|>"]


@pytest.mark.slow
def test_the_world_tokenizer_is_the_authors() -> None:
    from rwkv.rwkv_tokenizer import TRIE_TOKENIZER

    package = importlib.util.find_spec("rwkv")
    assert package and package.submodule_search_locations
    theirs = TRIE_TOKENIZER(str(Path(package.submodule_search_locations[0], "rwkv_vocab_v20230424.txt")))
    ours = WorldTokenizer()
    texts = [*TEXTS, Path(__file__).read_text()[:20_000]]
    generator = torch.Generator().manual_seed(6)
    texts += ["".join(map(chr, torch.randint(1, 0xD800, (50,), generator=generator).tolist())) for _ in range(20)]
    for text in texts:
        ids = theirs.encode(text)
        assert ours(text, verbose=False)["input_ids"] == ids
        assert ours.decode(ids) == text
    assert len(ours) == 1 + max(theirs.idx2token)
    swan = theirs.encode("🦢")
    assert ours.decode(swan[:1]) == "\ufffd" and ours.decode(torch.tensor(swan)) == "🦢"
    assert ours.decode([0, 65]) == "<|endoftext|>@" and ours.decode([0, 65], skip_special_tokens=True) == "@"


def test_the_world_tokenizer_does_what_others_do(tmp_path: Path) -> None:
    tokenizer = WorldTokenizer(chat_template="{% for m in messages %}{{ m.role }}: {{ m.content }}\n\n{% endfor %}")
    texts = ["The state of the Union", "Hello wörld"]
    alone = [tokenizer(text)["input_ids"] for text in texts]
    assert tokenizer(texts)["input_ids"] == alone
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (2, max(map(len, alone)))
    for row, mask, ids in zip(batch["input_ids"], batch["attention_mask"], alone, strict=True):
        assert row[mask.bool()].tolist() == ids and bool(mask[-1])  # padded on the left
    assert tokenizer(texts[0], truncation=True, max_length=2)["input_ids"] == alone[0][:2]
    assert tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True) == texts
    assert tokenizer.decode(batch["input_ids"][0], skip_special_tokens=True) == texts[0]
    chat = tokenizer.apply_chat_template([{"role": "user", "content": texts[1]}], tokenize=False)
    assert chat == "user: Hello wörld\n\n"
    assert tokenizer("<|endoftext|>")["input_ids"] != [0]  # text is text
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path)(texts)["input_ids"] == alone


def test_text_in_and_out(pth: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"ids up to 65529, but the model's vocabulary ends at 299: it is not this"):
        HookedRecurrentModel.from_pretrained(pth)
    wide = rwkv7_of_authors() | {"emb.weight": torch.randn(65536, D), "head.weight": torch.randn(65536, D)}
    torch.save(wide, tmp_path / "wide.pth")
    model = HookedRecurrentModel.from_pretrained(tmp_path / "wide.pth")
    text = model.generate("The swan", max_new_tokens=3, do_sample=False)
    assert isinstance(text, str) and text.startswith("The swan")
    pair = model.generate(["The swan", "A"], max_new_tokens=3, do_sample=False)
    assert pair[0] == text
    assert model.to_str_tokens("The swan") == ["The", " sw", "an"]
    write = transformers.pipeline("text-generation", model=model.hf_model, tokenizer=model.tokenizer)
    assert write("The swan", max_new_tokens=3, do_sample=False)[0]["generated_text"] == text

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r'authors\' package: pip install "writesae\[rwkv\]", or pass tok'):
        HookedRecurrentModel.from_pretrained(tmp_path / "wide.pth")


def test_the_vocabulary_beside_a_model(tmp_path: Path) -> None:
    bytes_alone = "\n".join(f"{i + 1} {bytes([i])!r} 1" for i in range(256))
    (tmp_path / "rwkv_vocab_v20230424.txt").write_text(bytes_alone + "\n257 'swan' 4\n")
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer("a swan")["input_ids"] == [98, 33, 257] and len(tokenizer) == 258


def test_no_tokenizer(tmp_path: Path) -> None:
    folder(tmp_path, FLA_GLA, fla_tensors(FLA_GLA))
    with pytest.raises(ValueError, match=r"no tokenizer could be loaded for .*tokenizer=False to work with token ids"):
        HookedRecurrentModel.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="text needs a tokenizer"):
        HookedRecurrentModel.from_pretrained(tmp_path, tokenizer=False)("text")
    folder(tmp_path / "m", MAMBA2, mamba2()[1])
    with pytest.raises(ValueError, match=r"\(they use that of EleutherAI/gpt-neox-20b\): pass tokenizer="):
        HookedRecurrentModel.from_pretrained(tmp_path / "m")


# GPU kernels, or rather stand-ins for them ----------------------------------------------------------------------------


def _parameters(path: Path, function: str) -> set[str]:
    tree = ast.parse(path.read_text())
    found = next(n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == function)
    return {a.arg for a in found.args.args}


def _dplr(r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, scale: float, **rest: Any) -> Any:
    q = r * scale * r.shape[-1] ** 0.5
    o, state = dplr_recurrence()(*(x.transpose(1, 2).float() for x in (q, k, v, a, b, w)), **rest)
    return o.transpose(1, 2).to(r.dtype), state


def _rwkv6(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, **rest: Any) -> Any:
    naive = fla_naive("rwkv6", "recurrent_naive").naive_recurrent_rwkv6
    o, state = naive(*(x.transpose(1, 2) for x in (r, k, v, w)), u, **rest)
    return o.transpose(1, 2), state


def _delta(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, scale: float, **rest: Any) -> Any:
    q = q * scale * q.shape[-1] ** 0.5
    o, state = fla_naive("delta_rule").delta_rule_recurrence(*(x.transpose(1, 2) for x in (q, k, v, beta)), **rest)
    return o.transpose(1, 2), state


def _gla(q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: float, **rest: Any) -> Any:
    return fla_naive("gla").naive_recurrent_gla(q * scale * q.shape[-1] ** 0.5, k, v, g, **rest)


def _simple_gla(q: Tensor, k: Tensor, v: Tensor, g: Tensor, **rest: Any) -> Any:
    return fla_naive("simple_gla").naive_recurrent_simple_gla(q, k, v, g, **rest)


def _linear_attn(q: Tensor, k: Tensor, v: Tensor, **rest: Any) -> Any:
    return fla_naive("linear_attn").naive_recurrent_linear_attn(q, k, v, **rest)


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """fla's kernels, played by its loops; the list fills with the names of those that were called."""
    called: list[str] = []

    def kernel(op: str, function: str, plays: Callable[..., Any]) -> Callable[..., Any]:
        allowed = _parameters(fla_file("ops", op, "chunk.py"), function)

        def played(**arguments: Any) -> Any:
            assert arguments.keys() <= allowed
            called.append(function)
            return plays(**arguments)

        return played

    for op, function, plays in (
        ("rwkv6", "chunk_rwkv6", _rwkv6), ("rwkv7", "chunk_rwkv7", _dplr), ("delta_rule", "chunk_delta_rule", _delta),
        ("gla", "chunk_gla", _gla), ("simple_gla", "chunk_simple_gla", _simple_gla),
        ("linear_attn", "chunk_linear_attn", _linear_attn),
    ):  # fmt: skip
        module = types.ModuleType(f"fla.ops.{op}")
        setattr(module, function, kernel(op, function, plays))
        monkeypatch.setitem(sys.modules, f"fla.ops.{op}", module)
    for parent in ("fla", "fla.ops"):
        fake = types.ModuleType(parent)
        fake.__spec__ = importlib.util.find_spec("fla")  # where `oracles` finds the loops
        monkeypatch.setitem(sys.modules, parent, fake)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    gpu._find.cache_clear()
    yield called
    gpu._find.cache_clear()
    use_fla_kernels(True)


@pytest.mark.parametrize("name", ["rwkv6", "rwkv7", "delta_net", "gla_conv"])
@torch.no_grad()
def test_flas_kernels_are_called_as_they_want(name: str, as_on_a_gpu: list[str]) -> None:
    model, ids = build(name), tokens(2, 20)
    model(ids)
    assert not as_on_a_gpu  # float32
    model = model.bfloat16()
    cache = DynamicCache(config=model.config)
    theirs = [model(piece, past_key_values=cache).logits for piece in ids.split([8, 11, 1], 1)]
    assert len(as_on_a_gpu) == 4 and len(set(as_on_a_gpu)) == 1  # two layers, two pieces of several tokens
    use_fla_kernels(False)
    difference = torch.cat(theirs, 1) - in_pieces(model, ids, [8, 11, 1])
    assert len(as_on_a_gpu) == 4 and difference.abs().mean() < 0.05


def test_on_a_cpu_fla_is_not_imported() -> None:
    gpu._find.cache_clear()
    of_fla = lambda: {name for name in sys.modules if name.split(".")[0] == "fla"}  # noqa: E731
    before = of_fla()  # transformers may have imported some of it
    for name in ("rwkv7", "delta_net", "gla"):
        build(name).bfloat16()(tokens(1, 5))
    assert of_fla() == before and not gpu._find.cache_info().misses, "no kernel was looked for"


def test_fla_that_cannot_be_imported_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setitem(sys.modules, "fla.ops.gla", None)
    gpu._find.cache_clear()
    build("gla").bfloat16()(tokens(1, 5))
    gpu._find.cache_clear()


@torch.no_grad()
def test_beside_flash_linear_attention(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It registers its own classes for the same kinds, before or after: `load_model` takes ours."""

    class Theirs(PreTrainedConfig):
        model_type = "gla"

    monkeypatch.setattr(CONFIG_MAPPING, "_extra_content", dict(CONFIG_MAPPING._extra_content))
    AutoConfig.register("gla", Theirs, exist_ok=True)  # as fla/models/gla/__init__.py does
    folder(tmp_path, FLA_GLA, fla_tensors(FLA_GLA))
    assert type(AutoConfig.from_pretrained(tmp_path)) is Theirs
    assert isinstance(load_model(tmp_path), GLAForCausalLM)
    importlib.reload(load)  # ours, imported after
    assert type(AutoConfig.from_pretrained(tmp_path)) is Theirs
    assert OURS.keys() == {
        "rwkv6", "rwkv7", "delta_net", "gated_deltanet", "gla", "hgrn2", "retnet", "linear_attn", "kda", "comba",
        "gated_deltaproduct", "mamba3", "gdn2", "gsa",
    }  # fmt: skip
    assert not OURS.keys() & OF_FLA


def test_rwkv7_with_padding_in_float16() -> None:
    """The removal key of padding is a vector of zeros, which float16 could not normalise."""
    model = architecture_named("rwkv7").build().half()
    ids, mask = torch.arange(8)[None], torch.ones(1, 8, dtype=torch.long)
    mask[0, :3] = 0
    with torch.no_grad():
        assert model(input_ids=ids, attention_mask=mask).logits[:, 3:].isfinite().all()
