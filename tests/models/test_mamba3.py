"""Mamba-3 against a pass that goes token by token, as the layer of mamba-ssm 2.3.2 and flash-linear-attention 0.6
decodes (`step`): the state transposed, and key, value and angles of the token before kept beside it.

tests/kernels/test_mamba3.py has the layer itself, on its own kernels.
"""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_models import VOCAB, folder, in_pieces, tokens
from torch import Tensor
from transformers import DynamicCache

from writesae.models import mamba3
from writesae.models.load import load_model
from writesae.models.mamba3 import Mamba3Config, Mamba3ForCausalLM

# Every field that flash-linear-attention saves.
CONFIG: dict[str, Any] = dict(
    model_type="mamba3", architectures=["Mamba3ForCausalLM"], A_floor=1e-4, bos_token_id=1, chunk_size=64,
    dt_init_floor=1e-4, dt_max=0.1, dt_min=0.001, eos_token_id=2, expand=2, fuse_cross_entropy=True,
    fuse_linear_cross_entropy=False, fuse_norm=True, head_dim=16, hidden_act="silu", hidden_size=32,
    initializer_range=0.02, is_mimo=False, is_outproj_norm=False, mimo_rank=4, n_groups=1, norm_eps=1e-5, num_heads=4,
    num_hidden_layers=2, pad_token_id=0,
    rescale_prenorm_residual=True, residual_in_fp32=True, rope_fraction=0.5, state_size=8, tie_word_embeddings=False,
    torch_dtype="bfloat16", transformers_version="5.0.0", use_bias=False, use_cache=True, use_l2warp=False,
    vocab_size=VOCAB,
)  # fmt: skip
CONFIGS = [
    CONFIG,
    CONFIG | dict(n_groups=2, is_outproj_norm=True, use_bias=True),
    CONFIG | dict(rope_fraction=1.0, expand=1.5, num_heads=3, state_size=6),
    CONFIG | dict(is_mimo=True, mimo_rank=3, n_groups=2, use_bias=True),
    CONFIG | dict(is_mimo=True, mimo_rank=1, rope_fraction=1.0, state_size=6),
]
MIMO = CONFIGS[3]


def tensors_of(config: dict[str, Any]) -> dict[str, Tensor]:
    """Random weights under the names and of the shapes that flash-linear-attention's model has."""
    g = torch.Generator().manual_seed(6)
    n = lambda *shape: torch.randn(shape, generator=g)  # noqa: E731
    d, d_key, heads = config["hidden_size"], config["state_size"], config["num_heads"]
    d_inner, rank = heads * config["head_dim"], config["mimo_rank"] if config["is_mimo"] else 1
    groups = config["n_groups"] * rank
    n_in = 2 * d_inner + 2 * groups * d_key + 3 * heads + int(d_key * config["rope_fraction"]) // 2
    made = {"backbone.embeddings.weight": n(VOCAB, d), "lm_head.weight": n(VOCAB, d) / d**0.5}
    made["backbone.norm_f.weight"] = 1 + 0.2 * n(d)
    for i in range(config["num_hidden_layers"]):
        at = f"backbone.layers.{i}."
        made |= {f"{at}norm.weight": 1 + 0.2 * n(d), f"{at}mixer.dt_bias": n(heads) - 1, f"{at}mixer.D": n(heads)}
        made |= {f"{at}mixer.{x}_norm.weight": 1 + 0.2 * n(d_key) for x in "BC"}
        made |= {f"{at}mixer.{x}_bias": 1 + 0.5 * n(heads, rank, d_key) for x in "BC"}
        made |= {
            f"{at}mixer.in_proj.weight": n(n_in, d) / d**0.5,
            f"{at}mixer.out_proj.weight": n(d, d_inner) / d_inner**0.5,
        }
        if config["use_bias"]:
            made |= {f"{at}mixer.in_proj.bias": 0.3 * n(n_in), f"{at}mixer.out_proj.bias": 0.3 * n(d)}
        if config["is_outproj_norm"]:
            made[f"{at}mixer.norm.weight"] = 1 + 0.2 * n(d_inner)
        if config["is_mimo"]:
            made |= {f"{at}mixer.mimo_{x}": n(heads, rank, config["head_dim"]) for x in "xzo"}
    return made


def forward(config: dict[str, Any], w: dict[str, Tensor], ids: Tensor, broken: str = "") -> Tensor:
    """One unpadded pass, or with one thing wrong."""
    x = w["backbone.embeddings.weight"][ids]
    for i in range(config["num_hidden_layers"]):
        p = lambda name, i=i: w.get(f"backbone.layers.{i}.{name}")  # noqa: E731
        h, memory, outputs = rms(x, config) * p("norm.weight"), None, []
        for t in range(ids.shape[1]):
            y, memory = step(config, lambda name, p=p: p(f"mixer.{name}"), h[:, t], memory, broken)
            outputs.append(y)
        x = x + torch.stack(outputs, 1)
    return rms(x, config) * w["backbone.norm_f.weight"] @ w["lm_head.weight"].T


def rms(x: Tensor, config: dict[str, Any]) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + config["norm_eps"]).rsqrt()


def step(config: dict[str, Any], p: Any, u: Tensor, memory: Any, broken: str) -> tuple[Tensor, Any]:
    """One token of one layer, ``[batch, rank, head, ...]``; without MIMO the rank is 1."""
    mimo, rank = config["is_mimo"], config["mimo_rank"] if config["is_mimo"] else 1
    d_key, d_head, heads, groups = (config[name] for name in ("state_size", "head_dim", "num_heads", "n_groups"))
    d_inner, n_angles = heads * d_head, int(d_key * config["rope_fraction"]) // 2
    sizes = [d_inner, d_inner, rank * groups * d_key, rank * groups * d_key, heads, heads, heads, n_angles]
    z, x, B, C, dd_dt, dd_A, trap, angles = F.linear(u, p("in_proj.weight"), p("in_proj.bias")).split(sizes, -1)
    if memory is None:
        sizes = (heads, n_angles), (heads, d_head, d_key), (rank, heads, d_key), (heads, d_head)
        memory = [u.new_zeros(len(u), *size) for size in sizes]
    angle, h, k_before, x_before = memory

    A = (-F.softplus(dd_A)).clamp(max=-config["A_floor"])
    dt = F.softplus(dd_dt + (0 if broken == "bias of dt" else p("dt_bias")))
    share = torch.ones_like(trap) if broken == "no trapezoid" else trap.sigmoid()
    x, z = x.unflatten(-1, (heads, d_head)), z.unflatten(-1, (heads, d_head))
    angle = angle + angles.tanh()[:, None] * dt[..., None] * (1 if broken == "pi" else math.pi)

    def turned(y: Tensor, side: str) -> Tensor:
        y = y.unflatten(-1, (rank, groups, d_key))
        y = y.reshape(-1, groups, rank, d_key).transpose(1, 2) if broken == "ranks" else y
        y = rms(y, config) * p(f"{side}_norm.weight")
        of_head = torch.arange(heads) % groups if broken == "groups" else torch.arange(heads) * groups // heads
        y = y[:, :, of_head] + (0 if broken == "bias" else p(f"{side}_bias").transpose(0, 1))
        pairs = [(2 * j, 2 * j + 1) for j in range(n_angles)]
        if mimo != (broken == "halves"):
            pairs = [(j, j + d_key // 2) for j in range(n_angles)]
        y0, y1 = (y[..., list(which)] for which in zip(*pairs, strict=True))
        numbers = torch.complex(y0, y1) * torch.polar(torch.ones_like(angle), angle)[:, None]
        made = y.clone()
        for (i, j), number in zip(pairs, numbers.unbind(-1), strict=True):
            made[..., i], made[..., j] = number.real, number.imag
        return made

    k, q = turned(B, "B"), turned(C, "C")
    alpha = (A * dt).exp()
    beta = (1 - share) * dt * (1 if broken == "undecayed" else alpha)
    psi, zeta, phi = (
        p(f"mimo_{c}").transpose(0, 1) if mimo and broken != f"mimo_{c}" else x.new_ones(rank, heads, d_head)
        for c in "xzo"
    )
    into = lambda x, k: torch.einsum("brhp,brhs->bhps", x[:, None] * psi, k)  # noqa: E731
    h = alpha[..., None, None] * h + into(beta[..., None] * x_before, k_before) + into((share * dt)[..., None] * x, k)
    skip = p("D")[:, None] * x[:, None] * (1 if broken == "skip of x" else psi)
    y = torch.einsum("bhps,brhs->brhp", h, q) + (0 if broken == "skip" else skip)
    if config["is_outproj_norm"] and broken != "norm":
        y = rms(y, config) * p("norm.weight").unflatten(-1, (heads, d_head))
    z = z[:, None] * zeta
    y = (phi * y * (z.sigmoid() if broken == "gate" else F.silu(z))).sum(1)
    return F.linear(y.flatten(1), p("out_proj.weight"), p("out_proj.bias")), (angle, h, k, x)


BROKEN = ["bias of dt", "no trapezoid", "pi", "groups", "bias", "halves", "undecayed", "skip", "gate"]
OF_MIMO = ["ranks", "mimo_x", "mimo_z", "mimo_o", "skip of x"]
TWINS = [(CONFIGS[1], broken) for broken in [*BROKEN, "norm"]] + [(MIMO, broken) for broken in BROKEN + OF_MIMO]


@pytest.mark.parametrize("config", CONFIGS, ids=["plain", "norm, groups, biases", "all turned", "MIMO", "rank 1"])
@torch.no_grad()
def test_it_computes_what_the_layer_says(config: dict[str, Any], tmp_path: Path) -> None:
    tensors, ids = tensors_of(config), tokens(2, 80)
    model = load_model(folder(tmp_path, config, tensors))
    assert isinstance(model, Mamba3ForCausalLM) and model.state_dict().keys() == tensors.keys()
    model, want = model.double(), forward(config, {name: x.double() for name, x in tensors.items()}, ids)
    assert want.std() > 0.5 and (model(ids).logits - want).abs().max() < 1e-9
    assert (in_pieces(model, ids, [37, 2, 1, 40]) - want).abs().max() < 1e-9
    assert (model.float()(ids).logits - want).abs().max() < 1e-3


@pytest.mark.parametrize(("config", "broken"), TWINS)
@torch.no_grad()
def test_a_broken_one_is_not(config: dict[str, Any], broken: str, tmp_path: Path) -> None:
    tensors, ids = tensors_of(config), tokens(1, 20)
    logits = load_model(folder(tmp_path, config, tensors))(ids).logits
    assert (logits - forward(config, tensors, ids)).abs().max() < 1e-3
    assert (logits - forward(config, tensors, ids, broken)).abs().max() > 1e-2


@pytest.mark.parametrize("config", [CONFIGS[1], MIMO], ids=["one read", "MIMO"])
@torch.no_grad()
def test_padding_leaves_no_key_and_no_angle(config: dict[str, Any], tmp_path: Path) -> None:
    """With biases, so that padding would have both; and what a cache keeps is as without it."""
    model = load_model(folder(tmp_path, config, tensors_of(config))).double()
    ids = tokens(1, 12)
    padded, mask = F.pad(ids, (5, 0), value=3), F.pad(torch.ones_like(ids), (5, 0))
    caches = [DynamicCache(config=model.config) for _ in range(2)]
    plain = model(ids, past_key_values=caches[0]).logits
    found = model(padded, attention_mask=mask, past_key_values=caches[1]).logits[:, 5:]
    assert (found - plain).abs().max() < 1e-12
    assert (model(padded).logits[:, 5:] - plain).abs().max() > 1e-3, "padding has to matter where it is not masked"
    for kept, as_kept in zip(caches[0].layers, caches[1].layers, strict=True):
        for x, y in zip(kept.conv_states.values(), as_kept.conv_states.values(), strict=True):
            assert (x - y).abs().max() < 1e-12
    for masked in (True, False):  # padding behind changes no state
        right, mask = DynamicCache(config=model.config), F.pad(torch.ones_like(ids), (0, 5))
        model(F.pad(ids, (0, 5), value=3), attention_mask=mask if masked else None, past_key_values=right)
        for kept, as_kept in zip(caches[0].layers, right.layers, strict=True):
            off = (kept.recurrent_states[0] - as_kept.recurrent_states[0]).abs().max()
            assert off < 1e-12 if masked else off > 1e-3


@torch.no_grad()
def test_angles_stay_exact_far_into_a_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sum of 20,000 turns of several times half a circle, in float32 as in float64."""
    config = CONFIG | dict(num_hidden_layers=1)
    mixer: Any = load_model(folder(tmp_path, config, tensors_of(config))).get_submodule("backbone.layers.0.mixer")
    mixer.dt_bias.fill_(3)
    x = torch.randn(1, 20_000, 32, generator=torch.Generator().manual_seed(0)) + 1
    exact = mixer.double()(x.double(), None, None)[:, -50:]
    off = lambda: (mixer.float()(x, None, None)[:, -50:] - exact).abs().max() / exact.abs().max()  # noqa: E731
    assert off() < 1e-5
    monkeypatch.setattr(mamba3, "wide", lambda x: x)
    assert off() > 1e-4, "added up in float32"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(is_mimo=True, is_outproj_norm=True), "is_mimo=True, mimo_rank=4 and is_outproj_norm=True: supported are"),
        (dict(is_mimo=True, mimo_rank=0), "mimo_rank=0 and is_outproj_norm=False: supported are a rank of 1 or more"),
        (dict(num_heads=5), "expand=2: their product must be num_heads=5 times head_dim=16"),
        (dict(head_dim=24, num_heads=None), "their product must be num_heads=2 times head_dim=24"),
        (dict(n_groups=3), "n_groups=3: it must divide the number of heads, 4"),
        (dict(rope_fraction=0.25), "rope_fraction=0.25 and state_size=8: half or all"),
        (dict(state_size=7), "state_size=7"),
        (dict(hidden_act="gelu"), "hidden_act='silu' only"),
    ],
)
def test_what_is_not_supported_is_said(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=said):
        load_model(folder(tmp_path, CONFIG | changes, tensors_of(CONFIG)))


@pytest.mark.parametrize("config", [CONFIG, MIMO], ids=["one read", "MIMO"])
def test_saved_and_loaded(config: dict[str, Any], tmp_path: Path) -> None:
    model = load_model(folder(tmp_path / "theirs", config, tensors_of(config)))
    model.save_pretrained(tmp_path / "ours")
    again = load_model(tmp_path / "ours")
    fields = again.config.to_dict()
    same = config.keys() - {"hidden_act", "torch_dtype", "transformers_version"}  # what it may be only is not kept
    assert {name: fields[name] for name in same} == {name: config[name] for name in same}
    assert all(torch.equal(x, again.state_dict()[name]) for name, x in model.state_dict().items())


def test_default_sizes_of_flash_linear_attention_are_taken() -> None:
    config = Mamba3Config()
    assert (config.hidden_size, config.num_heads, config.head_dim, config.state_size) == (2048, 64, 64, 128)


def test_a_new_one_of_several_reads_begins_as_flash_linear_attentions() -> None:
    model = Mamba3ForCausalLM(
        Mamba3Config(**{name: MIMO[name] for name in MIMO.keys() - {"model_type", "torch_dtype"}})
    )
    for name, value in {"mimo_x": 1 / 3, "mimo_z": 1.0, "mimo_o": 1 / 3}.items():
        found = model.get_parameter(f"backbone.layers.0.mixer.{name}")
        assert found.shape == (4, 3, 16) and bool((found == torch.tensor(value)).all()), name
