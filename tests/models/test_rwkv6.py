"""RWKV-6 against its authors' package (x060), and against flash-linear-attention's loop within its layers as written.

What the package computes differs from flash-linear-attention's models in the epsilon of a norm alone, so one set of
random weights, in both formats, serves for both.
"""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_models import FLA_COMMON, VOCAB, folder, in_pieces, tokens
from torch import Tensor

from oracles import by_rwkv, fla_naive
from writesae.models.load import load_model
from writesae.models.rwkv6 import RWKV6ForCausalLM

D, N_HEADS, N_LAYERS, D_FFN, RANK, DECAY_RANK = 64, 2, 3, 96, 8, 12
FLA = {name: value for name, value in FLA_COMMON.items() if name not in ("conv_size", "fuse_swiglu")} | dict(
    model_type="rwkv6", architectures=["RWKV6ForCausalLM"], hidden_act="sqrelu", hidden_ratio=3.5, hidden_size=D,
    intermediate_size=D_FFN, num_heads=N_HEADS, num_hidden_layers=N_LAYERS, expand_k=1.0, expand_v=1.0, norm_bias=True,
    norm_eps=1e-5, norm_first=True, proj_low_rank_dim=RANK, gate_low_rank_dim=DECAY_RANK, use_l2warp=False,
)  # fmt: skip


def of_authors(**changes: Tensor) -> dict[str, Tensor]:
    """Random weights as RWKV-LM saves them, decays as of a trained model."""
    g = torch.Generator().manual_seed(4)
    n = lambda *shape: torch.randn(shape, generator=g)  # noqa: E731
    u = lambda *shape: torch.rand(shape, generator=g)  # noqa: E731
    w = {"emb.weight": n(VOCAB, D), "head.weight": n(VOCAB, D) / D**0.5}
    for norm in ("ln_out", *(f"blocks.{i}.ln{j}" for i in range(N_LAYERS) for j in ((0, 1, 2) if i == 0 else (1, 2)))):
        w |= {f"{norm}.weight": 1 + 0.2 * n(D), f"{norm}.bias": 0.1 * n(D)}
    for i in range(N_LAYERS):
        att, ffn = f"blocks.{i}.att.", f"blocks.{i}.ffn."
        w |= {f"{att}time_maa_{c}": u(1, 1, D) for c in "xwkvrg"}
        w |= {f"{att}time_maa_w1": n(D, 5 * RANK) / D**0.5, f"{att}time_maa_w2": n(5, RANK, D) / RANK**0.5}
        w |= {f"{att}time_decay": -5 + 5 * u(1, 1, D), f"{att}time_faaaa": n(N_HEADS, D // N_HEADS)}
        w |= {f"{att}time_decay_w1": n(D, DECAY_RANK) / D**0.5, f"{att}time_decay_w2": n(DECAY_RANK, D) / DECAY_RANK}
        w |= {f"{att}{m}.weight": n(D, D) / D**0.5 for m in ("receptance", "key", "value", "gate", "output")}
        w |= {f"{att}ln_x.weight": 1 + 0.2 * n(D), f"{att}ln_x.bias": 0.1 * n(D)}
        w |= {f"{ffn}time_maa_{c}": u(1, 1, D) for c in "kr"}
        w |= {f"{ffn}key.weight": n(D_FFN, D) / D**0.5, f"{ffn}value.weight": n(D, D_FFN) / D_FFN**0.5}
        w |= {f"{ffn}receptance.weight": n(D, D) / D**0.5}
    return w | changes


@pytest.fixture(scope="module")
def pth(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rwkv") / "tiny.pth"
    torch.save(of_authors(), path)
    return path


@pytest.fixture(scope="module")
def their_logits(pth: Path) -> Tensor:
    """Of the authors' package, for `tokens(1, 40)`: all at once, which must be what it says token by token."""
    found = importlib.util.find_spec("rwkv")
    assert found is not None and found.submodule_search_locations
    file = Path(found.submodule_search_locations[0], "model.py")
    spec = importlib.util.spec_from_file_location("rwkv_before_7", file)  # which other models it is for, is said by ...
    assert spec is not None and spec.loader is not None
    package = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("RWKV_V7_ON", "0"), ("RWKV_JIT_ON", "0"), ("RWKV_CUDA_ON", "0")):
            patch.setenv(name, value)  # ... these, when it is imported
        spec.loader.exec_module(package)
        theirs = package.RWKV(model=str(pth.with_suffix("")), strategy="cpu fp32", verbose=False)
        return by_rwkv(theirs, tokens(1, 40))


@torch.no_grad()
def test_it_is_the_authors(pth: Path, their_logits: Tensor) -> None:
    model, ids = load_model(pth), tokens(1, 40)
    assert isinstance(model, RWKV6ForCausalLM) and model.dtype == torch.float32
    assert their_logits.std() > 0.5
    assert (model(ids).logits - their_logits).abs().max() < 1e-4
    assert (in_pieces(model, ids, [1] * 40) - their_logits).abs().max() < 1e-4


@pytest.mark.parametrize("broken", ["bonus", "order", "eps", "state"])
@torch.no_grad()
def test_a_broken_one_is_not(broken: str, pth: Path, their_logits: Tensor) -> None:
    model: Any = load_model(pth)
    for layer in model.model.layers:
        if broken == "bonus":
            layer.attn.bonus.zero_()
        elif broken == "order":  # the authors' order of what is mixed, where ours is another
            layer.attn.x_bias.copy_(layer.attn.x_bias[[1, 2, 3, 0, 4]])
        elif broken == "eps":
            layer.attn.g_norm.eps = 1e-5
        else:  # a state that is forgotten at once leaves the bonus alone
            layer.attn.w_proj.linear.lora[2].bias.add_(5)
    assert (model(tokens(1, 40)).logits - their_logits).abs().max() > 1e-3


def test_what_is_not_the_authors_is_said(tmp_path: Path) -> None:
    for at, changes, said in (
        ("a", {"blocks.1.att.time_maa_w3": torch.zeros(3)}, r"not part of this model: blocks\.1\.att\.time_maa_w3"),
        ("b", {"blocks.1.att.time_decay_w1": torch.zeros(D, 5)}, "of another shape"),
    ):
        torch.save(of_authors(**changes), tmp_path / f"{at}.pth")
        with pytest.raises(ValueError, match=said):
            load_model(tmp_path / f"{at}.pth")
    for missing, said in (("time_maa_k", r"missing: .*attn\.x_bias"), ("time_faaaa", "weights of RWKV-7 or RWKV-6")):
        torch.save({k: v for k, v in of_authors().items() if k != f"blocks.0.att.{missing}"}, tmp_path / "c.pth")
        with pytest.raises(ValueError, match=said):
            load_model(tmp_path / "c.pth")


# flash-linear-attention ----------------------------------------------------------------------------------------------


def tensors_of(config: dict[str, Any]) -> dict[str, Tensor]:
    """Random weights under the names and of the shapes that flash-linear-attention's layers have."""
    g = torch.Generator().manual_seed(5)
    weight = lambda *shape: torch.randn(shape, generator=g) / shape[-1] ** 0.5  # noqa: E731
    share = lambda *shape: torch.rand(shape, generator=g)  # noqa: E731
    d_key, d_value = int(D * config["expand_k"]), int(D * config["expand_v"])
    made = {"model.embeddings.weight": weight(VOCAB, D) * D**0.5, "lm_head.weight": weight(VOCAB, D)}

    def norm(name: str, n: int, bias: bool = config["norm_bias"]) -> None:
        made[f"{name}.weight"] = 1 + 0.2 * torch.randn(n, generator=g)
        if bias:
            made[f"{name}.bias"] = 0.2 * torch.randn(n, generator=g)

    norm("model.norm", D)
    for i in range(N_LAYERS):
        at = f"model.layers.{i}."
        for name in ["attn_norm", "ffn_norm"] + ["pre_norm"] * (config["norm_first"] and i == 0):
            norm(at + name, D)
        norm(f"{at}attn.g_norm", d_value, True)
        for x, n in zip("rkvg", (d_key, d_key, d_value, d_value), strict=True):
            made[f"{at}attn.{x}_proj.linear.weight"] = weight(n, D)
        made |= {f"{at}attn.x_proj.0.mu": share(D), f"{at}attn.x_bias": share(5, D)}
        made[f"{at}attn.x_proj.0.linear.weight"] = weight(5 * RANK, D)
        made[f"{at}attn.x_proj.2.weight"] = weight(D, 5 * RANK)
        lora = f"{at}attn.w_proj.linear.lora."
        made |= {f"{lora}0.weight": weight(DECAY_RANK, D), f"{lora}2.weight": weight(d_key, DECAY_RANK)}
        made |= {f"{lora}2.bias": -5 + 5 * share(d_key), f"{at}attn.bonus": weight(N_HEADS, d_key // N_HEADS) * 3}
        made |= {f"{at}attn.o_proj.weight": weight(D, d_value), f"{at}ffn.value.weight": weight(D, D_FFN)}
        for name, n in (("key", D_FFN), ("receptance", D)):
            made |= {f"{at}ffn.{name}.linear.weight": weight(n, D), f"{at}ffn.{name}.mu": share(D)}
    return made


def forward(config: dict[str, Any], w: dict[str, Tensor], ids: Tensor) -> Tensor:
    """One unpadded pass, as flash-linear-attention's models compute it."""
    eps, of_bias = config["norm_eps"], lambda name: w.get(f"{name}.bias")
    norm = lambda x, name: F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], of_bias(name), eps)  # noqa: E731
    before = lambda x: F.pad(x, (0, 0, 1, 0))[:, :-1] - x  # noqa: E731
    heads_first = lambda x: x.unflatten(-1, (N_HEADS, -1)).transpose(1, 2)  # noqa: E731
    x = w["model.embeddings.weight"][ids]
    for i in range(N_LAYERS):
        at = f"model.layers.{i}."
        p: Callable[[str], Tensor] = lambda name, at=at: w[at + name]  # noqa: E731
        if f"{at}pre_norm.weight" in w:
            x = norm(x, f"{at}pre_norm")
        h = norm(x, f"{at}attn_norm")
        delta = before(h)
        y = (h + delta * p("attn.x_proj.0.mu")) @ p("attn.x_proj.0.linear.weight").T
        y = torch.einsum("btnr,hnr->btnh", y.tanh().view(*ids.shape, 5, RANK), p("attn.x_proj.2.weight").view(D, 5, -1))
        mixed = [h + delta * mu for mu in (y + p("attn.x_bias")).unbind(-2)]
        lora = "attn.w_proj.linear.lora."
        decay = (mixed[1] @ p(f"{lora}0.weight").T).tanh() @ p(f"{lora}2.weight").T + p(f"{lora}2.bias")
        r, k, v, g = (
            mixed[n] @ p(f"attn.{c}_proj.linear.weight").T for n, c in ((0, "r"), (2, "k"), (3, "v"), (4, "g"))
        )
        naive = fla_naive("rwkv6", "recurrent_naive").naive_recurrent_rwkv6
        o, _ = naive(*map(heads_first, (r, k, v, -decay.exp())), p("attn.bonus"), scale=1.0)
        o = o.transpose(1, 2).flatten(2)
        o = F.group_norm(o.flatten(0, 1), N_HEADS, p("attn.g_norm.weight"), p("attn.g_norm.bias"), config["norm_eps"])
        x = x + (o.view(*ids.shape, -1) * F.silu(g)) @ p("attn.o_proj.weight").T
        h = norm(x, f"{at}ffn_norm")
        key, receptance = (
            (h + before(h) * p(f"ffn.{c}.mu")) @ p(f"ffn.{c}.linear.weight").T for c in ("key", "receptance")
        )
        x = x + receptance.sigmoid() * (key.relu().square() @ p("ffn.value.weight").T)
    return norm(x, "model.norm") @ w["lm_head.weight"].T


@pytest.mark.parametrize(
    "changes", [{}, dict(expand_k=0.5), dict(expand_v=1.5, norm_bias=False), dict(norm_first=False)], ids=str
)
@torch.no_grad()
def test_it_computes_what_flas_layers_say(changes: dict[str, Any], tmp_path: Path) -> None:
    config, ids = FLA | changes, tokens(2, 40)
    tensors = tensors_of(config)
    model = load_model(folder(tmp_path, config, tensors))
    assert model.state_dict().keys() == tensors.keys()
    want = forward(config, tensors, ids)
    assert want.std() > 0.5 and (model(ids).logits - want).abs().max() < 1e-4
    assert (in_pieces(model, ids, [17, 22, 1]) - want).abs().max() < 1e-4
    for name in ("bonus", "x_bias", "x_proj.0.mu", "w_proj.linear.lora.2.bias"):  # twins: weights that have no say
        spoiled = {key: torch.zeros_like(x) if key.endswith(f"attn.{name}") else x for key, x in tensors.items()}
        assert (forward(config, spoiled, ids) - want).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(expand_k=0.3), "hidden_size=64 and expand_k=0.3: their product must be a multiple of num_heads=2"),
        (dict(hidden_act="relu"), "hidden_act='sqrelu' only"),
        (dict(attn={"layers": [1]}), "attn=None only"),
    ],
)
def test_what_is_not_supported_is_said(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=said):
        load_model(folder(tmp_path, FLA | changes, tensors_of(FLA)))
