"""Models of flash-linear-attention beyond those of `test_models.py`.

Against its loops; the rest is written from its layers' sources.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
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
RETNET = FLA_COMMON | dict(
    model_type="retnet", architectures=["RetNetForCausalLM"], elementwise_affine=True, expand_k=1.0, expand_v=2.0,
    feature_map=None, num_heads=2, num_kv_heads=None, use_output_gate=True, use_short_conv=False,
)  # fmt: skip
LINEAR_ATTN = FLA_COMMON | dict(
    model_type="linear_attn", architectures=["LinearAttentionForCausalLM"], elementwise_affine=True, expand_k=1.0,
    expand_v=1.0, feature_map="elementwise_product", norm_feature_map=False, norm_k=False, norm_q=False, num_heads=2,
    num_kv_heads=None, tie_feature_map_qk=False,
)  # fmt: skip
KDA = FLA_COMMON | dict(
    model_type="kda", architectures=["KDAForCausalLM"], allow_neg_eigval=False, expand_v=1.0, head_dim=16,
    lower_bound=None, num_heads=2, num_v_heads=None, safe_gate=False, use_short_conv=True,
)  # fmt: skip
COMBA = FLA_COMMON | dict(
    model_type="comba", architectures=["CombaForCausalLM"], correction_factor=1.0, expand_v=2.0, head_dim=16,
    num_heads=2, num_v_heads=None, use_inner_decay=True, use_output_correction=True, use_output_gate=True,
    use_short_conv=True,
)  # fmt: skip
DELTA_PRODUCT = FLA_COMMON | dict(
    model_type="gated_deltaproduct", architectures=["GatedDeltaProductForCausalLM"], allow_neg_eigval=False,
    expand_v=2.0, head_dim=16, num_heads=2, num_householder=2, num_v_heads=None, use_forget_gate=True,
    use_output_gate=True, use_short_conv=True,
)  # fmt: skip
# Its layer's arguments: there is no model of it.
GDN2 = FLA_COMMON | dict(
    model_type="gdn2", architectures=["GDN2ForCausalLM"], allow_neg_eigval=False, expand_v=1.0, head_dim=16,
    num_heads=2, num_v_heads=None, use_short_conv=True,
)  # fmt: skip
GSA = FLA_COMMON | dict(
    model_type="gsa", architectures=["GSAForCausalLM"], clamp_max=None, clamp_min=None, elementwise_affine=True,
    expand_k=1, feature_map="swish", gate_logit_normalizer=8, num_heads=2, num_kv_heads=None, num_slots=24,
    use_norm=True, use_output_gate=False, use_short_conv=False,
)  # fmt: skip
KINDS = {
    config["model_type"]: config
    for config in (DELTA_PRODUCT, GATED_DELTANET, HGRN2, RETNET, LINEAR_ATTN, KDA, COMBA, GDN2, GSA)
}


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
        if config["model_type"] in ("retnet", "linear_attn", "gsa"):
            made |= {f"{at}attn.{name}": x for name, x in _of_shared_keys(config, weight, around_one).items()}
            continue
        heads = config["num_v_heads"] or config["num_heads"]
        d_key, d_value = config["num_heads"] * config["head_dim"], int(heads * config["head_dim"] * config["expand_v"])
        steps = config.get("num_householder", 1)
        for name, n in {"q": d_key, "k": d_key * steps, "v": d_value * steps}.items():
            made[f"{at}attn.{name}_proj.weight"] = weight(n, d)
            if config["use_short_conv"]:
                made[f"{at}attn.{name}_conv1d.weight"] = weight(n, 1, config["conv_size"])
        rank, of_gate = d_value // heads, {"A_log": heads, "dt_bias": heads}
        made[f"{at}attn.b_proj.weight"] = weight(heads * steps, d)
        made[f"{at}attn.o_norm.weight"] = around_one(rank)
        if config["model_type"] in ("kda", "gdn2"):
            n = heads * config["head_dim"]
            if config["model_type"] == "gdn2":  # keys have no more decays than they have heads
                n, of_gate["A_log"] = d_key, config["num_heads"]
                made |= {f"{at}attn.b_proj.weight": weight(d_key, d), f"{at}attn.w_proj.weight": weight(d_value, d)}
            of_gate["dt_bias"] = n
            made |= {f"{at}attn.{x}_proj.0.weight": weight(rank, d) for x in "fg"}
            made |= {f"{at}attn.f_proj.1.weight": weight(n, rank), f"{at}attn.g_proj.1.weight": weight(d_value, rank)}
            made[f"{at}attn.g_proj.1.bias"] = around_one(d_value) - 1
        elif config.get("use_forget_gate", True):
            made[f"{at}attn.a_proj.weight"] = weight(heads, d)
        else:
            of_gate = {}
        if config["model_type"] == "comba":
            of_gate |= dict.fromkeys(("decay", "D"), config["num_heads"])
        made |= {f"{at}attn.{x}": torch.randn(n, generator=generator) for x, n in of_gate.items()}
        if config.get("use_gate") or config.get("use_output_gate"):
            made[f"{at}attn.g_proj.weight"] = weight(d_value, d)
        made[f"{at}attn.o_proj.weight"] = weight(d, d_value)
    return made


def _of_shared_keys(config: dict[str, Any], weight: Any, around_one: Any) -> dict[str, Tensor]:
    d, heads = config["hidden_size"], config["num_heads"]
    d_key, d_value = int(d * config["expand_k"]), int(d * config["expand_v"])
    served = heads // (config["num_kv_heads"] or heads)
    made = {"q_proj.weight": weight(d_key, d), "k_proj.weight": weight(d_key // served, d)}
    made |= {"v_proj.weight": weight(d_value // served, d), "o_proj.weight": weight(d, d_value)}
    if config["model_type"] == "retnet":
        gated = config["use_output_gate"]
        made |= {"g_proj.weight": weight(d_value, d)} if gated else {}
        norm = "g_norm_swish_gate" if gated and config["fuse_norm"] else "g_norm"
    elif config["model_type"] == "gsa":
        made["f_proj.weight"] = weight((config["num_slots"] or d_key // heads) * heads // served, d)
        if config["feature_map"] == "t2r":
            made["feature_map.layer.weight"] = weight(d_key // heads, d_key // heads)
        if config["use_short_conv"]:
            made |= {f"{x}_conv1d.weight": weight(len(made[f"{x}_proj.weight"]), 1, config["conv_size"]) for x in "qkv"}
        return made | ({"g_norm.weight": around_one(d)} if config["elementwise_affine"] else {})
    else:
        norm, d_head = "norm", d_key // heads
        for side in "qk":
            for layer in {"elementwise_product": ["layer1", "layer2"], "hedgehog": ["layer"], "t2r": ["layer"]}.get(
                config["feature_map"], []
            ):
                made[f"feature_map_{side}.{layer}.weight"] = weight(d_head, d_head)
                if config["feature_map"] != "t2r":
                    made[f"feature_map_{side}.{layer}.bias"] = around_one(d_head) - 1
        if config["tie_feature_map_qk"]:
            made |= {name.replace("map_q", "map_k"): x.clone() for name, x in made.items() if "map_q" in name}
    if config["elementwise_affine"]:
        made[f"{norm}.weight"] = around_one(d_value // heads)
    return made


def forward(config: dict[str, Any], w: dict[str, Tensor], ids: Tensor, broken: str = "") -> Tensor:
    """One unpadded pass, as flash-linear-attention's models compute it; or with one thing wrong."""
    rms = lambda x, by: x * (x.square().mean(-1, keepdim=True) + config["norm_eps"]).rsqrt() * by  # noqa: E731
    others = {"hgrn2": _hgrn2, "retnet": _retnet, "linear_attn": _linear_attn, "gsa": _gsa}
    mixer = others.get(config["model_type"], _gated_deltanet)
    x = w["model.embeddings.weight"][ids]
    for i in range(config["num_hidden_layers"]):
        p = lambda name, i=i: w.get(f"model.layers.{i}.{name}.weight", w.get(f"model.layers.{i}.{name}"))  # noqa: E731
        x = x + mixer(config, w, p, rms(x, p("attn_norm")), i, rms, broken) @ p("attn.o_proj").T
        h = rms(x, p("mlp_norm"))
        x = x + (F.silu(h @ p("mlp.gate_proj").T) * (h @ p("mlp.up_proj").T)) @ p("mlp.down_proj").T
    return rms(x, w["model.norm.weight"]) @ w["lm_head.weight"].T


def _projected(config: dict[str, Any], p: Any, h: Tensor) -> list[Tensor]:
    """q, k, v, after their convolutions if there are any."""
    of = [h @ p(f"attn.{c}_proj").T for c in "qkv"]
    if not config.get("use_short_conv"):
        return of
    return [
        F.conv1d(F.pad(y.mT, (config["conv_size"] - 1, 0)), p(f"attn.{c}_conv1d"), groups=y.shape[-1]).mT
        for y, c in zip(of, "qkv", strict=True)
    ]


def _gated_deltanet(config: dict[str, Any], w: Any, p: Any, h: Tensor, i: int, rms: Any, broken: str) -> Tensor:
    q, k, v = map(F.silu, _projected(config, p, h))
    if config["model_type"] == "gated_deltaproduct":
        return _delta_product(config, p, h, rms, broken, q, k, v)
    heads = config["num_v_heads"] or config["num_heads"]
    q, k = (y.unflatten(-1, (config["num_heads"], -1)) for y in (q, k))
    served = heads // config["num_heads"]
    if config["model_type"] == "comba":
        p_ = k * (1 if broken == "inner decay" else p("attn.decay").sigmoid()[:, None])
        q = q if broken == "correction" else q - p("attn.D")[:, None] * p_
    q, k = (y.repeat(1, 1, served, 1) if broken == "heads" else y.repeat_interleave(served, 2) for y in (q, k))
    if broken != "norm":
        q, k = (y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt() for y in (q, k))
    v = v.unflatten(-1, (heads, -1))
    if config["model_type"] == "gdn2":
        return _gdn2(config, p, h, rms, broken, q, k, v)
    beta = (h @ p("attn.b_proj").T).sigmoid() * (2 if config.get("allow_neg_eigval") and broken != "eigval" else 1)
    if config["model_type"] == "kda":
        return _kda(config, p, h, rms, broken, q, k, v, beta)
    g = -p("attn.A_log").exp() * F.softplus(h @ p("attn.a_proj").T + (0 if broken == "bias" else p("attn.dt_bias")))
    g = torch.zeros_like(g) if broken == "decay" else g
    if config["model_type"] == "comba":
        o = fla_naive("comba").naive_chunk_comba(q, k, v, k, g, beta)[0]  # p of length 1 is k of length 1
        o = rms(o, p("attn.o_norm"))
        if config["use_output_gate"]:
            z = (h @ p("attn.g_proj").T).unflatten(-1, (heads, -1))
            o = o * (F.silu(z) if broken == "silu gate" else z.sigmoid())
        return o.flatten(2)
    o = fla_naive("gated_delta_rule").naive_recurrent_gated_delta_rule(q, k, v, beta=beta, g=g)[0]
    o = rms(o, p("attn.o_norm"))
    if config["use_gate"]:
        o = o * F.silu((h @ p("attn.g_proj").T).unflatten(-1, (heads, -1)))
    return o.flatten(2)


def _delta_product(config: Any, p: Any, h: Tensor, rms: Any, broken: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Heads of values that share keys lie side by side; a token's steps come one after the other."""
    n, heads = config["num_householder"], config["num_v_heads"] or config["num_heads"]
    order = "b t (h n d) -> b (t n) h d" if broken == "order" else "b t (n h d) -> b (t n) h d"
    q = rearrange(q, "b t (h d) -> b t h d", d=config["head_dim"])
    k = rearrange(k, order, n=n, d=config["head_dim"])
    q, k = (y.repeat_interleave(heads // config["num_heads"], 2) for y in (q, k))
    q, k = (y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt() for y in (q, k))
    v = rearrange(v, "b t (n h d) -> b (t n) h d", n=n, h=heads)
    beta = (h @ p("attn.b_proj").T).sigmoid() * (2 if config["allow_neg_eigval"] else 1)
    beta = rearrange(beta, "b t (n h) -> b (t n) h", n=n)
    g = None
    if config["use_forget_gate"] and broken != "no decay":
        g = -p("attn.A_log").exp() * F.softplus(h @ p("attn.a_proj").T + p("attn.dt_bias"))
    if broken == "one step":
        beta = beta * (torch.arange(beta.shape[1]) % n == 0)[:, None]
    naive = fla_naive("gated_delta_product").naive_recurrent_gated_delta_product
    o = rms(naive(q, k, v, g, beta, q.shape[-1] ** -0.5, num_householder=n)[0], p("attn.o_norm"))
    if config["use_output_gate"]:
        o = o * F.silu((h @ p("attn.g_proj").T).unflatten(-1, (heads, -1)))
    return o.flatten(2)


def _kda(config: Any, p: Any, h: Tensor, rms: Any, broken: str, *qkv_beta: Tensor) -> Tensor:
    q, k, v, beta = qkv_beta
    f = h @ p("attn.f_proj.0").T @ p("attn.f_proj.1").T + (0 if broken == "bias of f" else p("attn.dt_bias"))
    rate = p("attn.A_log").exp()[:, None]
    f = f.unflatten(-1, (v.shape[2], -1))
    bound = config["lower_bound"]
    g = -rate * F.softplus(f) if bound is None or broken == "no bound" else bound * (rate * f).sigmoid()
    if broken == "one decay":
        g = g.mean(-1, keepdim=True).expand_as(g)
    o, _ = fla_naive("kda").naive_recurrent_kda(q, k, v, g, beta)
    z = (h @ p("attn.g_proj.0").T @ p("attn.g_proj.1").T + p("attn.g_proj.1.bias")).unflatten(-1, (v.shape[2], -1))
    return (rms(o, p("attn.o_norm")) * (F.silu(z) if broken == "silu" else z.sigmoid())).flatten(2)


def _gdn2(config: Any, p: Any, h: Tensor, rms: Any, broken: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Decays and erase gates are of key heads."""
    of_keys = lambda y: y.unflatten(-1, (config["num_heads"], -1))  # noqa: E731
    f = of_keys(h @ p("attn.f_proj.0").T @ p("attn.f_proj.1").T + p("attn.dt_bias"))
    g = -p("attn.A_log").exp()[:, None] * F.softplus(f)
    b, w = ((h @ p(f"attn.{name}_proj").T).sigmoid() for name in "bw")
    w = w.unflatten(-1, (v.shape[2], -1))
    b = of_keys(b) * (2 if config["allow_neg_eigval"] and broken != "erases once" else 1)
    if broken == "one gate":
        b = b.mean(-1, keepdim=True).expand_as(b)
    elif broken == "no write gate":
        w = torch.ones_like(w)
    g, b = (
        y.repeat(1, 1, v.shape[2] // y.shape[2], 1)
        if broken == "gates of the wrong head"
        else y.repeat_interleave(v.shape[2] // y.shape[2], 2)
        for y in (g, b)
    )
    o, _ = fla_naive("gdn2").naive_recurrent_gdn2(q, k, v, g, b, w)
    z = (h @ p("attn.g_proj.0").T @ p("attn.g_proj.1").T + p("attn.g_proj.1.bias")).unflatten(-1, (v.shape[2], -1))
    return (rms(o, p("attn.o_norm")) * z.sigmoid()).flatten(2)


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


def _shared_keys(config: dict[str, Any], p: Any, h: Tensor, broken: str) -> list[Tensor]:
    """q, k, v of each head."""
    heads, kv_heads = config["num_heads"], config["num_kv_heads"] or config["num_heads"]
    of = zip(_projected(config, p, h), (heads, kv_heads, kv_heads), strict=True)
    q, k, v = (y.unflatten(-1, (n, -1)) for y, n in of)
    head = torch.arange(heads)
    at = head % kv_heads if broken == "shared" else head * kv_heads // heads
    return [q, k[:, :, at], v[:, :, at]]


def _retnet(config: dict[str, Any], w: Any, p: Any, h: Tensor, i: int, rms: Any, broken: str) -> Tensor:
    """With keys and queries rotated as complex numbers, one pair of channels a number."""
    q, k, v = _shared_keys(config, p, h, broken)
    n_pos, half, heads = h.shape[1], q.shape[-1] // 2, config["num_heads"]
    turns = torch.arange(n_pos)[:, None] * 10_000.0 ** (-torch.arange(half) / half)
    turn = torch.polar(torch.ones_like(turns), torch.zeros_like(turns) if broken == "rotation" else turns)[:, None]

    def rotated(x: Tensor) -> Tensor:
        pairs = (x[..., 0::2], x[..., 1::2]) if broken == "pairs" else (x[..., :half], x[..., half:])
        y = torch.complex(*(part.contiguous() for part in pairs)) * turn
        return torch.cat([y.real, y.imag], -1)

    first = 1 if broken == "heads from 1" else 0
    g = (1 - 2.0 ** (-5.0 - first - torch.arange(heads))).log().expand(*h.shape[:2], heads)
    o, _ = fla_naive("simple_gla").naive_recurrent_simple_gla(rotated(q), rotated(k), v, g)
    o = rms(o, _affine(config, p, "g_norm_swish_gate", "g_norm"))
    if config["use_output_gate"]:
        o = o * F.silu((h @ p("attn.g_proj").T).unflatten(-1, (heads, -1)))
    return o.flatten(2)


def _affine(config: dict[str, Any], p: Any, *names: str) -> Any:
    found = [p(f"attn.{name}") for name in names]
    return next(x for x in found if x is not None) if config["elementwise_affine"] else 1


def _linear_attn(config: dict[str, Any], w: Any, p: Any, h: Tensor, i: int, rms: Any, broken: str) -> Tensor:
    q, k, v = _shared_keys(config, p, h, broken)

    def features(x: Tensor, side: str) -> Tensor:
        of = lambda layer: p(f"attn.feature_map_{side}.{layer}")  # noqa: E731
        name = f"layers.{i}.attn.feature_map_{side}"
        bias = lambda layer: w[f"model.{name}.{layer}.bias"]  # noqa: E731
        kind = "identity" if broken == "features" else config["feature_map"]
        if kind == "elementwise_product":
            x = (x @ of("layer1").T + bias("layer1")) * (x @ of("layer2").T + bias("layer2"))
        elif kind == "hedgehog":
            y = x @ of("layer").T + bias("layer")
            x = torch.cat([2 * y, -2 * y], -1).softmax(-1)
        elif kind == "t2r":
            x = (x @ of("layer").T).clamp_min(0)
        elif kind == "elu":
            x = torch.where(x > 0, x + 1, x.exp())
        elif kind == "relu":
            x = x.clamp_min(0)
        return x / (x.sum(-1, keepdim=True) + 1e-4) if config[f"norm_{side}"] and broken != "sum" else x

    naive = fla_naive("linear_attn").naive_recurrent_linear_attn
    o, _ = naive(features(q, "q"), features(k, "q" if broken == "sides" else "k"), v)
    return rms(o, _affine(config, p, "norm")).flatten(2)


def _gsa(config: dict[str, Any], w: Any, p: Any, h: Tensor, i: int, rms: Any, broken: str) -> Tensor:
    """Its output norm has an eps of its own, whatever the config says."""
    q, k, v = _shared_keys(config, p, h, broken)
    if config["use_short_conv"]:
        q, k, v = map(F.silu, (q, k, v))
    features = {"swish": F.silu, "relu": F.relu, "t2r": lambda x: F.relu(x @ p("attn.feature_map.layer").T)}
    q, k = map(features["relu" if broken == "features" else config["feature_map"]], (q, k))
    served = config["num_heads"] // (config["num_kv_heads"] or config["num_heads"])
    g = F.logsigmoid(h @ p("attn.f_proj").T).unflatten(-1, (config["num_heads"] // served, -1))
    g = g.repeat_interleave(served, 2) / (1 if broken == "normaliser" else config["gate_logit_normalizer"])
    s = torch.ones_like(g) if broken == "slots" else 1 - g.exp()
    q = torch.zeros_like(q) if broken == "no keys" else q
    o, _ = fla_naive("gsa").naive_recurrent_gsa(q, k, F.silu(v), s, g, scale=0.5 if broken == "scale" else 1.0)
    o = F.silu(o.flatten(2))
    eps = config["norm_eps"] if broken == "eps" else 1e-5
    o = o * (o.square().mean(-1, keepdim=True) + eps).rsqrt()
    return o * p("attn.g_norm") if config["elementwise_affine"] else o


CONFIGS = [
    GATED_DELTANET,
    GATED_DELTANET | dict(num_v_heads=4, allow_neg_eigval=True),
    GATED_DELTANET | dict(use_gate=False, use_short_conv=False, expand_v=0.5),
    HGRN2,
    HGRN2 | dict(use_lower_bound=False, elementwise_affine=False),
    RETNET,
    RETNET | dict(num_heads=4, num_kv_heads=2, fuse_norm=False, elementwise_affine=False, expand_v=1.0),
    RETNET | dict(use_output_gate=False, expand_k=0.5),
    LINEAR_ATTN,
    LINEAR_ATTN | dict(num_heads=4, num_kv_heads=2, feature_map="hedgehog", norm_q=True, norm_k=True),
    LINEAR_ATTN | dict(feature_map="t2r", tie_feature_map_qk=True, elementwise_affine=False),
    LINEAR_ATTN | dict(feature_map="elu", norm_k=True, norm_q=True),
    LINEAR_ATTN | dict(feature_map="relu", expand_k=2.0),
    LINEAR_ATTN | dict(feature_map="identity", expand_v=2.0),
    KDA,
    KDA | dict(num_v_heads=4, allow_neg_eigval=True, expand_v=0.5),
    KDA | dict(lower_bound=-5.0, safe_gate=True, use_short_conv=False),
    COMBA,
    COMBA | dict(use_output_gate=False, use_short_conv=False, expand_v=0.5),
    DELTA_PRODUCT,
    DELTA_PRODUCT | dict(num_v_heads=4, num_householder=3, use_forget_gate=False, allow_neg_eigval=True),
    DELTA_PRODUCT | dict(num_householder=1, use_output_gate=False, use_short_conv=False),
    GDN2,
    GDN2 | dict(num_v_heads=4, allow_neg_eigval=True, expand_v=0.5, use_short_conv=False),
    GSA,
    GSA | dict(num_heads=4, num_kv_heads=2, use_short_conv=True, feature_map="t2r", elementwise_affine=False),
    GSA | dict(expand_k=0.5, feature_map="relu", gate_logit_normalizer=1, num_slots=None),
]
TWINS = {
    **dict.fromkeys(("heads", "norm", "eigval", "bias", "decay"), CONFIGS[1]),
    **dict.fromkeys(("bound", "key", "forget"), HGRN2),
    **dict.fromkeys(("shared", "rotation", "pairs", "heads from 1"), CONFIGS[6]),
    **dict.fromkeys(("features", "sides"), LINEAR_ATTN),
    "sum": CONFIGS[11],
    **dict.fromkeys(("bias of f", "one decay", "silu"), KDA),
    "no bound": CONFIGS[16],
    **dict.fromkeys(("order", "no decay", "one step"), DELTA_PRODUCT),
    **dict.fromkeys(("erases once", "one gate", "no write gate", "gates of the wrong head"), CONFIGS[23]),
    **dict.fromkeys(("normaliser", "slots", "no keys", "scale"), GSA),
    "eps": GSA | dict(norm_eps=1e-2),
    **dict.fromkeys(("correction", "inner decay", "silu gate"), COMBA),
}


def _name(config: dict[str, Any]) -> str:
    common = KINDS[config["model_type"]]
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


@pytest.mark.parametrize("broken", TWINS)
@torch.no_grad()
def test_a_broken_one_is_not(broken: str, tmp_path: Path) -> None:
    config = TWINS[broken]
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
        (KDA, dict(safe_gate=True), "safe_gate=True needs a lower_bound"),
        (KDA, dict(lower_bound=1.0), "lower_bound=1.0: log decays lie below 0"),
        (KDA, dict(use_gate=False), "always has a gate"),
        (COMBA, dict(use_output_correction=False), "use_output_correction=True only"),
        (GDN2, dict(lower_bound=-5.0), "config has lower_bound=-5.0, which writesae does not know"),
        (GSA, dict(use_output_gate=True), "use_output_gate=False only"),
        (GSA, dict(expand_v=2), "expand_v=2: its norm is of hidden_size channels; allowed is 1"),
        (GSA, dict(feature_map="elu"), "feature_map='elu': allowed are swish, relu, t2r"),
        (DELTA_PRODUCT, dict(num_householder=0), "num_householder=0: 1 step or more"),
        (RETNET, dict(use_short_conv=True), "use_short_conv=True: flash-linear-attention's has no convolution either"),
        (RETNET, dict(num_heads=32), "each head needs an even number; got 1"),
        (RETNET, dict(num_kv_heads=3), "num_heads=2 is not a multiple of num_kv_heads=3"),
        (RETNET, dict(feature_map="relu"), "feature_map=None only"),
        (LINEAR_ATTN, dict(norm_feature_map=True), "norm_feature_map=False only"),
        (LINEAR_ATTN, dict(feature_map="dpfp"), "feature_map='dpfp': writesae has elementwise_product, elu, hedgehog"),
    ],
)
def test_what_is_not_supported_is_said(config: dict[str, Any], changes: dict[str, Any], said: str, tmp_path: Path):
    with pytest.raises(ValueError, match=said):
        load_model(folder(tmp_path, config | changes, tensors_of(config)))


def test_default_sizes_of_flash_linear_attention_are_taken():
    """Six heads of 256 in a model of 2,048: the hidden size times `expand_v` is no multiple of the heads."""
    config = GatedDeltaNetConfig()
    assert (config.hidden_size, config.num_heads, config.d_key, config.d_value) == (2048, 6, 1536, 3072)
