"""The one list of architectures: a tiny random model of every family, for each test that holds for all of them."""

from __future__ import annotations

import copy
import functools
import importlib
import math
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

import brute_force as bf
from writesae.hooks.families.minimax import LightningCache
from writesae.hooks.families.xlstm import MatrixCache, matrix_cache

N_VOCAB = 97
# Every model has recurrent layers 0, 1 and 3 with four heads, whatever its layer 2 is: tests may name those.
N_HEADS, N_KEY_HEADS, D_KEY, D_VALUE = 4, 2, 16, 12
HYBRID, PURE = (0, 1, 3), (0, 1, 2, 3)
LAYERS = ["linear_attention", "linear_attention", "full_attention", "linear_attention"]
# At rest, each head forgets at its own pace; the tokens move that by much (see `set_gates`).
DECAYS = torch.tensor([0.2, 0.7, 0.96, 0.999])


@dataclass(frozen=True, eq=False)
class Architecture:
    """A family and how to make a tiny model of it.

    Attributes:
        name: for test ids.
        rule: of its recurrence, which says what is intercepted and which quantities there are.
        modeling_name: the modeling file.
        model, config: classes of the model and of its configuration.
        mixer: class of the recurrent mixers.
        values: arguments of the (text) configuration.
        layers: those with a recurrent mixer.
        gate: what the mixer calls its gated norm, ``norm(o, z)``; None if it has none.
        outputs: ``{quantity: submodule}`` for what can be seen and changed only as the output of one, before the
            recurrence. (RWKV-7's first layer, whose values the others mix in, has no ``v_mix``.)
        vision: arguments of the vision configuration: the text model lies one level deeper, beside a vision model.
        cache_argument: what the model calls its cache.
        mlp: its layers have an MLP of their own, a single module.
        forgets_positions: its attention layers count from 0 in every piece, unless told (transformers 5.23).
        n_heads, d_value: heads, and columns of the state (the rows are `D_KEY` in every model).
        steps: steps per token, for keys, values and strengths that have a dimension of them.
        reads: reads per token, for queries and weights of reads that have a dimension of them.
    """

    name: str
    rule: bf.Rule
    modeling_name: str
    model: str
    config: str
    mixer: str
    values: dict[str, Any]
    layers: tuple[int, ...] = HYBRID
    gate: str | None = "norm"
    outputs: dict[str, str] = field(default_factory=dict)
    vision: dict[str, Any] = field(default_factory=dict)
    cache_argument: str = "past_key_values"
    mlp: bool = True
    forgets_positions: bool = False
    n_heads: int = N_HEADS
    d_value: int = D_VALUE
    steps: tuple[int, ...] = ()
    reads: tuple[int, ...] = ()

    @property
    def modeling(self) -> ModuleType:
        return importlib.import_module(self.modeling_name)

    def quantities(self, layer: int) -> list[str]:
        """Its hook points, in firing order."""
        before = [quantity for quantity in self.outputs if quantity != "v_mix" or layer > 0]
        return [*before, *self.rule.raw, *self.rule.inputs, "write", "state", "o", *(["z"] if self.gate else [])]

    def points(self, layer: int) -> list[str]:
        """Those, and the points of the residual stream that the layer has, in firing order."""
        recurrent = self.quantities(layer) if layer in self.layers else []
        return ["resid_pre", *recurrent, "mixer_out", *(["mlp_out"] if self.mlp else []), "resid_post"]

    @property
    def is_first_of_its_rule(self) -> bool:
        """The one that gets the full grid of tests; the others share its adapter, and get a sample. So do those of a
        rule that shares another's (`brute_force.Rule.shares`)."""
        return self.rule.shares is None and self is next(a for a in ARCHITECTURES if a.rule is self.rule)

    def shape(self, quantity: str) -> tuple[int, ...]:
        """Of a tensor quantity of one head at one token."""
        if quantity == "log_decay" and self.rule.decay_per_key:
            return (D_KEY,)
        of_values = dict.fromkeys(("v", "v_mix", "write_gate", "o", "z", "read_weights"), (self.d_value,))
        of_gates = dict.fromkeys(("beta", "log_decay", "igate", "fgate", "denominator"), ())
        shape = {**of_gates, **of_values}.get(quantity, (D_KEY,))
        several = self.steps if quantity in ("k", "v", "beta") else self.reads if quantity in bf.READS else ()
        return (*several, *shape)

    def build(self) -> PreTrainedModel:
        """A new model, always with the same weights, in float32, nothing attached."""
        return copy.deepcopy(_build(self))

    def mixers(self, model: nn.Module) -> dict[int, nn.Module]:
        found = [m for m in model.modules() if type(m).__name__ == self.mixer]  # xLSTM does not number them
        return {int(getattr(mixer, "layer_idx", i)): mixer for i, mixer in enumerate(found)}  # type: ignore[arg-type]

    def new_cache(self, model: Any) -> dict[str, DynamicCache]:
        """An empty cache, as the keyword argument that the transformers model takes."""
        if self.ignores_padding:
            return {self.cache_argument: _matrix_cache(model)}
        made: Any = LightningCache if self.own_cache else DynamicCache
        return {self.cache_argument: made(config=model.config)}

    @property
    def own_cache(self) -> bool:
        """transformers has a class of caches for it alone, in which generation loses padding."""
        return self.rule in (bf.LIGHTNING, bf.MLSTM)

    @property
    def stack(self) -> str:
        """What its text model calls the list of its layers."""
        return "blocks" if self.rule is bf.MLSTM else "layers"

    @property
    def ignores_padding(self) -> bool:
        """In transformers it takes padding for tokens."""
        return self.rule is bf.MLSTM

    def place(self, start: int, n_pos: int) -> dict[str, Tensor]:
        """What else to tell the model of a piece that begins at ``start``."""
        return {"position_ids": torch.arange(start, start + n_pos)[None]} if self.forgets_positions else {}

    def slot(self, cache: Any, layer: int) -> Tensor:
        """The cached state of a layer, a view ``[batch, head, d_key, d_value]``."""
        state = cache.layers[layer].recurrent_states[0]
        if self.rule.columns:
            return state.view(state.shape[0], self.n_heads, -1, 1)
        return state.mT if self.rule.transposed else state

    def __str__(self) -> str:
        return self.name


# Configurations ------------------------------------------------------------------------------------------------------

_NO_SPECIAL_TOKENS = dict(bos_token_id=None, eos_token_id=None, pad_token_id=None)
_TEXT = dict(
    vocab_size=N_VOCAB,
    hidden_size=64,
    num_hidden_layers=len(LAYERS),
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=512,
    layer_types=LAYERS,
    **_NO_SPECIAL_TOKENS,
)
_DENSE = dict(intermediate_size=96)
_VISION = dict(
    depth=1, hidden_size=32, intermediate_size=32, num_heads=2, out_hidden_size=64, num_position_embeddings=16
)

_GDN = _TEXT | dict(
    linear_num_key_heads=N_KEY_HEADS,
    linear_num_value_heads=N_HEADS,
    linear_key_head_dim=D_KEY,
    linear_value_head_dim=D_VALUE,
)
# Every expert is chosen, or a rounding error could choose another one and change the logits by much.
_EXPERTS = dict(moe_intermediate_size=32, shared_expert_intermediate_size=32, num_experts=4, num_experts_per_tok=4)
# Likewise its budget holds every token.
_INDEXER = dict(
    indexer_n_heads=1, indexer_kv_heads=1, indexer_head_dim=32, indexer_budget=256, indexer_compress_ratio=4
)

_KDA = _TEXT | dict(
    num_attention_heads=N_HEADS,
    num_key_value_heads=N_HEADS,
    linear_num_heads=N_HEADS,
    linear_head_dim=D_KEY,
    kv_lora_rank=24,
    qk_nope_head_dim=16,
    v_head_dim=16,
    mlp_layer_types=["dense", "sparse", "sparse", "dense"],
    intermediate_size=96,
    moe_intermediate_size=32,
    num_experts_per_tok=4,
    n_shared_experts=1,
)

# The same heads under other names; four heads share two groups of B and C.
_MAMBA2 = dict(vocab_size=N_VOCAB, hidden_size=N_HEADS * D_VALUE, **_NO_SPECIAL_TOKENS)


class _Share(int):
    """How many channels there are for each number of the residual stream, where transformers takes whole numbers only
    and our four heads are four channels: 1/16."""

    def __mul__(self, hidden_size: int) -> int:
        return hidden_size // 16


_MAMBA1 = dict(vocab_size=N_VOCAB, hidden_size=16 * N_HEADS, num_hidden_layers=4, **_NO_SPECIAL_TOKENS)
_IN_MAMBA1 = dict(
    intermediate_size=96, num_attention_heads=2, num_key_value_heads=1, mamba_d_state=D_KEY, mamba_expand=_Share(1)
)
_BAMBA = _MAMBA2 | dict(
    intermediate_size=96,
    num_hidden_layers=len(LAYERS),
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=512,
    mamba_n_heads=N_HEADS,
    mamba_n_groups=N_KEY_HEADS,
    mamba_d_state=D_KEY,
    mamba_expand=1,
    mamba_chunk_size=32,
)


def _transformers(name: str) -> str:
    return f"transformers.models.{name}.modeling_{name}"


def _gdn(file: str, classes: str, values: dict[str, Any], **more: Any) -> Architecture:
    return Architecture(
        file, bf.GATED_DELTA, _transformers(file), f"{classes}ForCausalLM", f"{classes}TextConfig",
        f"{classes}GatedDeltaNet", _GDN | values, **more,
    )  # fmt: skip


def _kda(file: str, model: str, config: str, mixer: str, values: dict[str, Any], **more: Any) -> Architecture:
    return Architecture(
        file, bf.KDA, _transformers(file), model, config, mixer, _KDA | values, gate="o_norm", d_value=D_KEY, **more
    )


def _mamba2(file: str, classes: str, mixer: str, values: dict[str, Any], **more: Any) -> Architecture:
    return Architecture(
        more.pop("variant", file), bf.MAMBA2, _transformers(file), f"{classes}ForCausalLM", f"{classes}Config",
        classes + mixer, values, **more,
    )  # fmt: skip


def _mamba1(file: str, classes: str, mixer: str, values: dict[str, Any], **more: Any) -> Architecture:
    return Architecture(
        more.pop("variant", file), bf.MAMBA1, _transformers(file), f"{classes}ForCausalLM", f"{classes}Config",
        classes + mixer, _MAMBA1 | values, gate=None, d_value=1, **more,
    )  # fmt: skip


_QWEN = _DENSE | {"head_dim": 32}
_FALCON = _BAMBA | dict(hidden_size=64, mamba_d_ssm=N_HEADS * D_VALUE, mamba_d_head=D_VALUE)

_MIXER = dict(num_heads=N_HEADS, expand_k=1.0, expand_v=D_VALUE / D_KEY, intermediate_size=96)
_OURS = dict(vocab_size=N_VOCAB, hidden_size=64, num_hidden_layers=4, **_NO_SPECIAL_TOKENS)


def _ours(name: str, rule: bf.Rule, classes: str, mixer: str, values: dict[str, Any], **more: Any) -> Architecture:
    return Architecture(
        more.pop("variant", name), rule, f"writesae.models.{name}", f"{classes}ForCausalLM", f"{classes}Config",
        mixer, _OURS | values, layers=PURE, **more,
    )  # fmt: skip


# The first of each rule gets the full grid.
ARCHITECTURES = [
    _gdn("qwen3_5", "Qwen3_5", _QWEN),
    Architecture(
        "qwen3_5_multimodal", bf.GATED_DELTA, _transformers("qwen3_5"), "Qwen3_5ForConditionalGeneration",
        "Qwen3_5Config", "Qwen3_5GatedDeltaNet", _GDN | _QWEN, vision=_VISION,
    ),
    _gdn("qwen3_5_moe", "Qwen3_5Moe", _EXPERTS | {"head_dim": 32}),
    Architecture(
        "qwen3_next", bf.GATED_DELTA, _transformers("qwen3_next"), "Qwen3NextForCausalLM", "Qwen3NextConfig",
        "Qwen3NextGatedDeltaNet", _GDN | _QWEN | _EXPERTS,
    ),
    Architecture(
        "olmo_hybrid", bf.GATED_DELTA, _transformers("olmo_hybrid"), "OlmoHybridForCausalLM", "OlmoHybridConfig",
        "OlmoHybridGatedDeltaNet", _GDN | _DENSE | {"linear_allow_neg_eigval": True}, gate="o_norm",
    ),
    Architecture(
        "qwen4_exp", bf.GATED_DELTA, _transformers("qwen4_exp"), "Qwen4ExpForCausalLM", "Qwen4ExpTextConfig",
        "Qwen4ExpTextGatedDeltaNet",
        _GDN | _EXPERTS | _INDEXER | {"head_dim": 32, "hc_count": 2, "hc_lowrank": 16},
    ),
    _kda("kimi_linear", "KimiLinearForCausalLM", "KimiLinearConfig", "KimiLinearDeltaAttention",
         dict(qk_rope_head_dim=8, num_local_experts=4)),
    _kda("bailing_hybrid", "BailingHybridForCausalLM", "BailingHybridConfig", "BailingHybridDeltaAttention",
         dict(qk_rope_head_dim=8, num_local_experts=4, head_dim=D_KEY, n_group=1, topk_group=1)),
    _kda("glm5_next", "Glm5NextForConditionalGeneration", "Glm5NextConfig", "Glm5NextTextLinearAttention",
         dict(q_lora_rank=24, qk_rope_head_dim=0, n_routed_experts=4, index_topk=256, index_kpool=4,
              index_head_dim=16, index_n_heads=2, hc_mult=2),
         vision=dict(depth=1, hidden_size=32, intermediate_size=32, num_heads=2, out_hidden_size=64, image_size=28,
                     projection_intermediate_size=32)),
    Architecture(
        "minimax", bf.LIGHTNING, _transformers("minimax"), "MiniMaxForCausalLM", "MiniMaxConfig",
        "MiniMaxLightningAttention",
        _TEXT | dict(num_attention_heads=N_HEADS, num_key_value_heads=N_KEY_HEADS, head_dim=D_KEY,
                     intermediate_size=32, num_local_experts=4, num_experts_per_tok=4, block_size=32),
        gate=None, outputs={"z": "output_gate"}, d_value=D_KEY,
    ),
    # Reads that nearly cancel are not blown up. A cap so wide that logits are linear in the residual stream, as direct
    # paths want it.
    Architecture(
        "xlstm", bf.MLSTM, _transformers("xlstm"), "xLSTMForCausalLM", "xLSTMConfig", "xLSTMLayer",
        dict(vocab_size=N_VOCAB, hidden_size=64, num_hidden_layers=4, num_heads=N_HEADS, qk_dim_factor=1.0,
             norm_eps=1e-3, output_logit_soft_cap=1e6, **_NO_SPECIAL_TOKENS),
        layers=PURE, gate=None, outputs={"z": "ogate_preact"}, cache_argument="cache_params", d_value=D_KEY,
    ),
    _mamba2("mamba2", "Mamba2", "Mixer",
            _MAMBA2 | dict(num_hidden_layers=4, num_heads=N_HEADS, head_dim=D_VALUE, n_groups=N_KEY_HEADS,
                           state_size=D_KEY, expand=1, chunk_size=64),
            layers=PURE, cache_argument="cache_params", mlp=False),
    _mamba2("bamba", "Bamba", "Mixer", _BAMBA | dict(attn_layer_indices=[2]), forgets_positions=True),
    _mamba2("zamba2", "Zamba2", "MambaMixer",
            _MAMBA2 | dict(intermediate_size=96, num_hidden_layers=4, num_attention_heads=2, n_mamba_heads=N_HEADS,
                           max_position_embeddings=512, mamba_ngroups=N_KEY_HEADS, mamba_d_state=D_KEY,
                           mamba_expand=1, chunk_size=32, num_mem_blocks=1, tie_word_embeddings=False,
                           layers_block_type=["linear_attention", "linear_attention", "hybrid", "linear_attention"]),
            layers=PURE, mlp=False),
    _mamba2("falcon_h1", "FalconH1", "Mixer", _FALCON | dict(mamba_rms_norm=True, mamba_norm_before_gate=False),
            layers=PURE),
    # Gates by a product beside the norm, or inside the kernel: nothing is called with o and z.
    _mamba2("falcon_h1", "FalconH1", "Mixer", _FALCON | dict(mamba_rms_norm=False), layers=PURE, gate=None,
            variant="falcon_h1_no_norm"),
    _mamba2("nemotron_h", "NemotronH", "Mamba2Mixer",
            _MAMBA2 | dict(hidden_size=64, layers_block_type=[*LAYERS, "moe", "mlp"], mamba_num_heads=N_HEADS,
                           mamba_head_dim=D_VALUE, n_groups=N_KEY_HEADS, ssm_state_size=D_KEY, chunk_size=32,
                           num_attention_heads=2, num_key_value_heads=1, head_dim=32, intermediate_size=96,
                           max_position_embeddings=512, n_routed_experts=4, num_experts_per_tok=4,
                           moe_intermediate_size=32, moe_shared_expert_intermediate_size=32),
            mlp=False),
    _mamba2("granitemoehybrid", "GraniteMoeHybrid", "MambaLayer",
            _BAMBA | dict(layer_types=LAYERS, num_local_experts=4, num_experts_per_tok=4, shared_intermediate_size=32,
                          attention_multiplier=0.2),
            mlp=False),
    _mamba1("mamba", "Mamba", "Mixer", dict(state_size=D_KEY, expand=_Share(1), tie_word_embeddings=False),
            layers=PURE, cache_argument="cache_params", mlp=False),
    _mamba1("falcon_mamba", "FalconMamba", "Mixer", dict(state_size=D_KEY, expand=_Share(1), tie_word_embeddings=False),
            layers=PURE, cache_argument="cache_params", mlp=False),
    _mamba1("jamba", "Jamba", "MambaMixer",
            _IN_MAMBA1 | dict(num_experts=1, num_experts_per_tok=1, attn_layer_period=4, attn_layer_offset=2)),
    # Two groups of channels, each with reads and keys of its own and a call of its own.
    _mamba1("zamba", "Zamba", "MambaMixer",
            _IN_MAMBA1 | dict(n_mamba_heads=2, tie_word_embeddings=False,
                              layers_block_type=["linear_attention", "linear_attention", "hybrid", "hybrid"]),
            layers=PURE, mlp=False),
    _ours("rwkv7", bf.RWKV7, "RWKV7", "RWKV7Attention",
          dict(head_dim=D_KEY, value_dim=N_HEADS * D_VALUE, decay_low_rank_dim=16, gate_low_rank_dim=16,
               a_low_rank_dim=16, v_low_rank_dim=8, intermediate_size=96),
          gate=None, outputs={"z": "gate", "v_mix": "v_mix"}),
    _ours("rwkv6", bf.RWKV6, "RWKV6", "RWKV6Attention", _MIXER | dict(proj_low_rank_dim=8, gate_low_rank_dim=16),
          gate=None, outputs={"z": "gate"}),
    _ours("delta_net", bf.DELTA_NET, "DeltaNet", "DeltaNet", _MIXER | dict(use_gate=True), gate="o_norm"),
    _ours("delta_net", bf.DELTA_NET, "DeltaNet", "DeltaNet",
          _MIXER | dict(qk_activation="relu", qk_norm="sum", allow_neg_eigval=True), gate=None,
          variant="delta_net_no_gate"),
    # Two heads of values share queries and keys.
    _ours("gated_delta_net", bf.FLA_GATED_DELTA, "GatedDeltaNet", "GatedDeltaNet",
          dict(num_heads=N_KEY_HEADS, num_v_heads=N_HEADS, head_dim=D_KEY, expand_v=D_VALUE / D_KEY,
               intermediate_size=96, allow_neg_eigval=True),
          gate="o_norm"),
    _ours("kda", bf.FLA_KDA, "KDA", "KimiDeltaAttention",
          dict(num_heads=N_KEY_HEADS, num_v_heads=N_HEADS, head_dim=D_KEY, expand_v=D_VALUE / D_KEY,
               intermediate_size=96),
          gate="o_norm"),
    _ours("comba", bf.COMBA, "Comba", "Comba",
          dict(num_heads=N_HEADS, head_dim=D_KEY, expand_v=D_VALUE / D_KEY, intermediate_size=96), gate="o_norm"),
    _ours("gdn2", bf.GDN2, "GDN2", "GatedDeltaNet2",
          dict(num_heads=N_HEADS, head_dim=D_KEY, expand_v=D_VALUE / D_KEY, intermediate_size=96), gate="o_norm"),
    # Two heads of values share queries and keys.
    _ours("gated_delta_product", bf.DELTA_PRODUCT, "GatedDeltaProduct", "GatedDeltaProduct",
          dict(num_heads=N_KEY_HEADS, num_v_heads=N_HEADS, head_dim=D_KEY, expand_v=D_VALUE / D_KEY,
               intermediate_size=96, use_forget_gate=True, num_householder=2),
          gate="o_norm", steps=(2,)),
    # Two heads share B and C; with a norm behind the reads, which few tests would otherwise see beside a skip.
    _ours("mamba3", bf.MAMBA3, "Mamba3", "Mamba3",
          dict(hidden_size=N_HEADS * D_VALUE, expand=1, head_dim=D_VALUE, state_size=D_KEY, n_groups=N_KEY_HEADS,
               is_outproj_norm=True),
          gate=None, outputs={"z": "gate"}, mlp=False, steps=(2,)),
    # Two keys and two queries per token; its gates are weights of the reads.
    _ours("mamba3", bf.MAMBA3_MIMO, "Mamba3", "Mamba3MIMO",
          dict(hidden_size=N_HEADS * D_VALUE, expand=1, head_dim=D_VALUE, state_size=D_KEY, n_groups=N_KEY_HEADS,
               is_mimo=True, mimo_rank=2),
          gate=None, mlp=False, steps=(4,), reads=(2,), variant="mamba3_mimo"),
    _ours("gla", bf.GLA, "GLA", "GatedLinearAttention", _MIXER, gate="g_norm_swish_gate"),
    _ours("hgrn2", bf.GLA, "HGRN2", "HGRN2Attention",
          dict(hidden_size=N_HEADS * D_KEY, expand_ratio=D_KEY, intermediate_size=96), gate=None, d_value=D_KEY),
    # Two heads share keys, values and decays.
    _ours("gla", bf.GLA, "GLA", "GatedLinearAttention",
          _MIXER | dict(num_kv_heads=N_KEY_HEADS, use_short_conv=True, fuse_norm=False), gate="g_norm",
          variant="gla_grouped"),
    # Two heads share keys, values and decays; slots, keys and values are of three sizes.
    _ours("gsa", bf.GLA, "GSA", "GatedSlotAttention",
          _MIXER | dict(hidden_size=N_HEADS * D_VALUE, num_kv_heads=N_KEY_HEADS, expand_k=0.5, expand_v=1.0,
                        num_slots=D_KEY, gate_logit_normalizer=4, use_short_conv=True),
          gate=None, outputs={"scores": "scores"}),
    # Two heads share keys and values.
    _ours("retnet", bf.SIMPLE_GLA, "RetNet", "MultiScaleRetention", _MIXER | dict(num_kv_heads=N_KEY_HEADS),
          gate="g_norm_swish_gate"),
    # Features above zero, or reads that nearly cancel turn rounding into logits; small, since nothing is forgotten.
    _ours("linear_attn", bf.LINEAR_ATTENTION, "LinearAttention", "LinearAttention",
          _MIXER | dict(feature_map="t2r", norm_k=True), gate=None),
]  # fmt: skip

each_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES, ids=str)
each_rule = pytest.mark.parametrize("architecture", [a for a in ARCHITECTURES if a.is_first_of_its_rule], ids=str)


def architecture_named(name: str) -> Architecture:
    return next(a for a in ARCHITECTURES if a.name == name)


def _matrix_cache(model: Any) -> MatrixCache:
    """An empty cache for xLSTM, whose own code takes none without a batch; filled with zeros in the first pass, where
    the model is not wrapped and so does not do that itself."""
    text_model = getattr(model, "hf_model", model).base_model
    cache = matrix_cache(None, text_model, None)

    def fill(_model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if given := kwargs.get("cache_params") is cache:
            matrix_cache(cache, text_model, args[0] if args else kwargs["input_ids"])
        if given or cache.layers[0].recurrent_states[0] is not None:
            handle.remove()

    handle = text_model.register_forward_pre_hook(fill, with_kwargs=True)
    return cache


# Weights -------------------------------------------------------------------------------------------------------------


@functools.cache
def _build(a: Architecture) -> PreTrainedModel:
    """Random weights of a size at which every layer, the recurrent ones above all, moves the logits."""
    if a.vision:
        config = getattr(a.modeling, a.config)(text_config=dict(a.values), vision_config=dict(a.vision))
        for token in ("image", "video", "vision_start", "vision_end", "image_start", "image_end", "video_start"):
            setattr(config, f"{token}_token_id", -1)
    else:
        config = getattr(a.modeling, a.config)(**copy.deepcopy(a.values))
    model = getattr(a.modeling, a.model)(config).float().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter_name, p in model.named_parameters():
            # RWKV: a share of the token before; and Mamba's projection of the same name, so that it tells tokens apart
            if (".x_" in parameter_name and "attn.x_proj" not in parameter_name) or parameter_name.endswith(".mu"):
                p.copy_(torch.rand(p.shape, generator=generator))
            elif p.ndim > 1:
                fan_in = 1 if "embed" in parameter_name else p.shape[-1]
                p.copy_(torch.randn(p.shape, generator=generator) / math.sqrt(fan_in))
            elif parameter_name.endswith("conv1d.bias"):
                p.copy_(torch.randn(p.shape, generator=generator) / 4)
        for module in model.modules():
            if hasattr(module, "A_log"):
                set_gates(module)
            if hasattr(module, "B_bias"):  # Mamba-3: dt is also how much is written, and A has no bias
                module.dt_bias.copy_(torch.tensor([1.0, 0.3, 0.15, 0.1]).expm1().log())
                module.D.copy_(torch.tensor([0.7, -0.4, 1.5, 1.0]))
                module.B_norm.weight.fill_(0.25)  # so that states and reads are about as large as the others'
                module.B_bias.mul_(0.25)
            for name, size in {"mimo_x": 0.5, "mimo_z": 1.0, "mimo_o": 1.0}.items():
                getattr(module, name, torch.ones(())).mul_(size * math.sqrt(D_VALUE))
            if hasattr(module, "gk_proj"):
                bias = module.gk_proj[1].bias
                kept = -torch.linspace(0.3, 0.999, len(bias)).log() * 16  # log decay = log sigmoid(input + bias) / 16
                bias.copy_(-kept - (-(-kept).expm1()).log())
            if hasattr(module, "slope_rate"):  # lightning attention: fixed, and kept in several forms
                slopes = -DECAYS.log()[:, None, None]
                module.slope_rate.copy_(slopes)
                buffers = module.query_decay, module.key_decay, module.diagonal_decay
                for buffer, factors in zip(buffers, module.decay_factors(slopes), strict=True):
                    buffer.copy_(factors)
                module.qkv_proj.weight.unflatten(0, (N_HEADS, 3, -1))[:, 1].mul_(0.25)
            if hasattr(module, "fgate_preact"):
                # None forgets fast: transformers sums 64 log gates in the model's dtype, and half precision loses them.
                module.fgate_preact.bias.copy_(torch.tensor([0.9, 0.95, 0.98, 0.999]).logit())
                module.igate_preact.bias.copy_(torch.tensor([0.5, 0.0, -1.0, -2.0]))
            if type(module).__name__ == "RWKV6Attention":
                bias = module.w_proj.linear.lora[2].bias  # log decay = -exp(input + bias)
                bias.copy_((-torch.linspace(0.3, 0.999, len(bias)).log()).log())
            if type(module).__name__ in ("RWKV7Attention", "GatedLinearAttention", "MultiScaleRetention"):
                module.k_proj.weight.mul_(0.25)  # keys without a norm: so that they write about as much as the others
    return model


def set_gates(module: Any) -> None:
    """So that the heads forget at the paces of `DECAYS`, and each channel of a head somewhat faster or slower."""
    if not hasattr(module, "dt_bias"):  # Mamba-1: likewise, and one number for each head
        apart = hasattr(module, "dt_proj")
        bias = module.dt_proj.bias if apart else module.dt_proj_bias
        # Reads are of third order in what comes of the convolution: so that they have no heavy tails.
        module.conv1d.weight.mul_(0.5)
        (module.x_proj.weight if apart else module.x_proj_weight).mul_(2)
        (module.dt_proj.weight if apart else module.dt_proj_weight).mul_(0.3)
        dt = torch.tensor([1.0, 0.3, 0.15, 0.1])  # what forgets slowly writes little, so that all read about as much
        bias.copy_(dt.expm1().log().reshape(bias.shape))
        a_log = (-DECAYS.log() / dt).log()[:, None] + torch.linspace(-1.5, 1.5, D_KEY)
        module.A_log.copy_(a_log.reshape(module.A_log.shape))
        module.D.copy_(torch.tensor([0.7, -0.4, 1.5, 1.0]).reshape(module.D.shape))
        return
    n_channels = module.dt_bias.numel() // N_HEADS
    spread = torch.linspace(-1.5, 1.5, n_channels) if n_channels > 1 else torch.zeros(1)
    rate = -DECAYS.log()
    if hasattr(module, "D"):  # Mamba-2: dt is also how much is written
        dt = torch.tensor([1.0, 0.2, 0.5, 0.8])
        bias, a_log = dt.expm1().log(), (rate / dt).log()
        module.D.copy_(torch.tensor([0.7, -0.4, 1.5, 1.0]))
    elif bound := getattr(module, "safe_gate_lower_bound", None) or getattr(module, "lower_bound", None):
        bias, a_log = (rate / -bound).logit(), torch.zeros(N_HEADS)  # log decay = bound sigmoid(input + dt_bias)
    else:
        bias, a_log = torch.zeros(N_HEADS), (rate / math.log(2)).log()  # -A softplus(input + dt_bias)
    module.dt_bias.copy_((bias[:, None] + spread).reshape(module.dt_bias.shape))
    module.A_log.copy_(a_log.reshape(module.A_log.shape))
