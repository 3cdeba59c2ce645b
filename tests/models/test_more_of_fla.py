"""Gated DeltaNet and HGRN2 of flash-linear-attention: its loops, the rest written from its layers' sources."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_models import FLA_COMMON, VOCAB, folder, in_pieces, tokens
from torch import Tensor

from oracles import fla_naive
from writesae.models.gated_delta_net import GatedDeltaNetConfig
from writesae.models.load import load_model

GATED_DELTANET = FLA_COMMON | dict(
    model_type="gated_deltanet", architectures=["GatedDeltaNetForCausalLM"], allow_neg_eigval=False, expand_v=2.0,
    head_dim=16, num_heads=2, num_v_heads=None, use_gate=True, use_short_conv=True,
)  # fmt: skip
HGRN2 = {name: value for name, value in FLA_COMMON.items() if name not in ("expand_v", "num_heads")} | dict(
    model_type="hgrn2", architectures=["HGRN2ForCausalLM"], expand_ratio=8, elementwise_affine=True,
    num_hidden_layers=3, use_lower_bound=True, use_short_conv=False,
)  # fmt: skip


def tensors_of(config: dict[str, Any]) -> dict[str, Tensor]:
    """Random weights under the names and of the shapes that flash-linear-attention's layers have."""
    d, generator = config["hidden_size"], torch.Generator().manual_seed(5)
    weight = lambda *shape: torch.randn(shape, generator=generator) / shape[-1] ** 0.5  # noqa: E731
    around_one = lambda n: 1 + 0.2 * torch.randn(n, generator=generator)  # noqa: E731
    made = {"model.embeddings.weight": weight(VOCAB, d) * d**0.5, "lm_head.weight": weight(VOCAB, d)}
    made["model.norm.weight"] = around_one(d)
    if config.get("use_lower_bound"):
        made["model.lower_bounds"] = torch.randn(config["num_hidden_layers"], d, generator=generator)
    for i in range(config["num_hidden_layers"]):
        at = f"model.layers.{i}."
        made |= {f"{at}{norm}_norm.weight": around_one(d) for norm in ("attn", "mlp")}
        made |= {f"{at}mlp.{x}_proj.weight": weight(256, d) for x in ("gate", "up")}
        made[f"{at}mlp.down_proj.weight"] = weight(d, 256)
        if config["model_type"] == "hgrn2":
            made |= {f"{at}attn.{x}_proj.weight": weight(d, d) for x in "qfio"}
            if config["elementwise_affine"]:
                made[f"{at}attn.g_norm.weight"] = around_one(d)
            continue
        heads = config["num_v_heads"] or config["num_heads"]
        d_key, d_value = config["num_heads"] * config["head_dim"], int(heads * config["head_dim"] * config["expand_v"])
        for name, n in {"q": d_key, "k": d_key, "v": d_value}.items():
            made[f"{at}attn.{name}_proj.weight"] = weight(n, d)
            if config["use_short_conv"]:
                made[f"{at}attn.{name}_conv1d.weight"] = weight(n, 1, config["conv_size"])
        made |= {f"{at}attn.{x}_proj.weight": weight(heads, d) for x in "ab"}
        made |= {f"{at}attn.{x}": torch.randn(heads, generator=generator) for x in ("A_log", "dt_bias")}
        made[f"{at}attn.o_norm.weight"] = around_one(d_value // heads)
        if config["use_gate"]:
            made[f"{at}attn.g_proj.weight"] = weight(d_value, d)
        made[f"{at}attn.o_proj.weight"] = weight(d, d_value)
    return made


def forward(config: dict[str, Any], w: dict[str, Tensor], ids: Tensor, broken: str = "") -> Tensor:
    """One unpadded pass, as flash-linear-attention's models compute it; or with one thing wrong."""
    rms = lambda x, by: x * (x.square().mean(-1, keepdim=True) + config["norm_eps"]).rsqrt() * by  # noqa: E731
    mixer = _hgrn2 if config["model_type"] == "hgrn2" else _gated_deltanet
    x = w["model.embeddings.weight"][ids]
    for i in range(config["num_hidden_layers"]):
        p = lambda name, i=i: w.get(f"model.layers.{i}.{name}.weight", w.get(f"model.layers.{i}.{name}"))  # noqa: E731
        x = x + mixer(config, w, p, rms(x, p("attn_norm")), i, rms, broken) @ p("attn.o_proj").T
        h = rms(x, p("mlp_norm"))
        x = x + (F.silu(h @ p("mlp.gate_proj").T) * (h @ p("mlp.up_proj").T)) @ p("mlp.down_proj").T
    return rms(x, w["model.norm.weight"]) @ w["lm_head.weight"].T


def _gated_deltanet(config: dict[str, Any], w: Any, p: Any, h: Tensor, i: int, rms: Any, broken: str) -> Tensor:
    q, k, v = (h @ p(f"attn.{c}_proj").T for c in "qkv")
    if config["use_short_conv"]:
        q, k, v = (
            F.conv1d(F.pad(y.mT, (config["conv_size"] - 1, 0)), p(f"attn.{c}_conv1d"), groups=y.shape[-1]).mT
            for y, c in ((q, "q"), (k, "k"), (v, "v"))
        )
    q, k, v = F.silu(q), F.silu(k), F.silu(v)
    heads = config["num_v_heads"] or config["num_heads"]
    q, k = (y.unflatten(-1, (config["num_heads"], -1)) for y in (q, k))
    served = heads // config["num_heads"]
    q, k = (y.repeat(1, 1, served, 1) if broken == "heads" else y.repeat_interleave(served, 2) for y in (q, k))
    if broken != "norm":
        q, k = (y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt() for y in (q, k))
    v = v.unflatten(-1, (heads, -1))
    beta = (h @ p("attn.b_proj").T).sigmoid() * (2 if config["allow_neg_eigval"] and broken != "eigval" else 1)
    g = -p("attn.A_log").exp() * F.softplus(h @ p("attn.a_proj").T + (0 if broken == "bias" else p("attn.dt_bias")))
    naive = fla_naive("gated_delta_rule").naive_recurrent_gated_delta_rule
    o = naive(q, k, v, beta=beta, g=torch.zeros_like(g) if broken == "decay" else g)[0]
    o = rms(o, p("attn.o_norm"))
    if config["use_gate"]:
        o = o * F.silu((h @ p("attn.g_proj").T).unflatten(-1, (heads, -1)))
    return o.flatten(2)


def _hgrn2(config: dict[str, Any], w: Any, p: Any, h: Tensor, i: int, rms: Any, broken: str) -> Tensor:
    q, f, v = F.silu(h @ p("attn.q_proj").T), (h @ p("attn.f_proj").T).sigmoid(), h @ p("attn.i_proj").T
    if config["use_lower_bound"] and i > 0:
        shares = w["model.lower_bounds"].softmax(0)
        least = shares[1 : i + 1].sum(0) if broken != "bound" else shares[: i + 1].sum(0)
        f = least + (1 - least) * f
    k = torch.ones_like(f) if broken == "key" else 1 - f
    q, k, v, g = (y.unflatten(-1, (-1, config["expand_ratio"])) for y in (q, k, v, f.log()))
    o, _ = fla_naive("gla").naive_recurrent_gla(q, k, v, torch.zeros_like(g) if broken == "forget" else g)
    return rms(o.flatten(2), p("attn.g_norm") if config["elementwise_affine"] else 1)


CONFIGS = [
    GATED_DELTANET,
    GATED_DELTANET | dict(num_v_heads=4, allow_neg_eigval=True),
    GATED_DELTANET | dict(use_gate=False, use_short_conv=False, expand_v=0.5),
    HGRN2,
    HGRN2 | dict(use_lower_bound=False, elementwise_affine=False),
]


def _name(config: dict[str, Any]) -> str:
    common = HGRN2 if config["model_type"] == "hgrn2" else GATED_DELTANET
    return "-".join([config["model_type"], *(f"{k}={v}" for k, v in config.items() if common.get(k) != v)])


@pytest.mark.parametrize("config", CONFIGS, ids=_name)
@torch.no_grad()
def test_it_computes_what_flas_layers_say(config: dict[str, Any], tmp_path: Path) -> None:
    tensors, ids = tensors_of(config), tokens(2, 40)
    model = load_model(folder(tmp_path, config, tensors))
    assert model.state_dict().keys() == tensors.keys()
    want = forward(config, tensors, ids)
    assert want.std() > 0.5 and (model(ids).logits - want).abs().max() < 1e-4
    assert (in_pieces(model, ids, [17, 22, 1]) - want).abs().max() < 1e-4


@pytest.mark.parametrize("broken", ["heads", "norm", "eigval", "bias", "decay", "bound", "key", "forget"])
@torch.no_grad()
def test_a_broken_one_is_not(broken: str, tmp_path: Path) -> None:
    config = HGRN2 if broken in ("bound", "key", "forget") else CONFIGS[1]
    tensors, ids = tensors_of(config), tokens(2, 40)
    logits = load_model(folder(tmp_path, config, tensors))(ids).logits
    assert (logits - forward(config, tensors, ids)).abs().max() < 1e-4
    assert (logits - forward(config, tensors, ids, broken)).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("config", "changes", "said"),
    [
        (GATED_DELTANET, dict(num_v_heads=3), "num_v_heads=3 is not a multiple of num_heads=2"),
        (GATED_DELTANET, dict(expand_v=0.3), "head_dim=16 and expand_v=0.3: their product must be a whole number"),
        (GATED_DELTANET, dict(output_gate_activation="sigmoid"), "output_gate_activation='swish' only"),
        (GATED_DELTANET, dict(attn={"layers": [1]}), "attn=None only"),
        (HGRN2, dict(use_short_conv=True), "use_short_conv=False only"),
        (HGRN2, dict(expand_ratio=5), "hidden_size=32 is not a multiple of 5"),
        (HGRN2, dict(expand_ratio=None), "hgrn2 needs expand_ratio or num_heads"),
    ],
)
def test_what_is_not_supported_is_said(config: dict[str, Any], changes: dict[str, Any], said: str, tmp_path: Path):
    with pytest.raises(ValueError, match=said):
        load_model(folder(tmp_path, config | changes, tensors_of(config)))


def test_default_sizes_of_flash_linear_attention_are_taken():
    """Six heads of 256 in a model of 2,048: the hidden size times `expand_v` is no multiple of the heads."""
    config = GatedDeltaNetConfig()
    assert (config.hidden_size, config.num_heads, config.d_key, config.d_value) == (2048, 6, 1536, 3072)
