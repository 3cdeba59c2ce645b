"""Linear attention in plain PyTorch: loads flash-linear-attention's checkpoints.

Per head, with feature maps ``phi`` (Katharopoulos et al. 2020, arXiv 2006.16236, eq. 18 and 20, without a normaliser)::

    S_t = S_{t-1} + phi_k(k_t) v_t^T          o_t = S_t^T phi_q(q_t)

Nothing is ever forgotten.
"""

from __future__ import annotations

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from jaxtyping import Float
from torch import Tensor
from transformers.cache_utils import Cache

from writesae.models.common import RecurrentForCausalLM, RecurrentModel, past_state, recur
from writesae.models.feature_maps import FEATURES
from writesae.models.gpu import fla_kernel
from writesae.models.layers import Mixer, MixerBlock, SharedKeysConfig
from writesae.recurrence.rules import LINEAR_ATTENTION


@strict
class LinearAttentionConfig(SharedKeysConfig):
    model_type = "linear_attn"
    only: ClassVar[dict[str, Any]] = {
        "attn": None,
        "attnres_block_size": None,
        "hidden_act": "swish",
        "norm_feature_map": False,
    }

    feature_map: str = "elementwise_product"
    tie_feature_map_qk: bool = False
    norm_q: bool = False
    norm_k: bool = False

    def check_widths(self) -> None:
        super().check_widths()
        if self.use_short_conv:
            raise ValueError("linear_attn with use_short_conv=True: flash-linear-attention's has no convolution either")
        if self.feature_map not in FEATURES:
            raise ValueError(f"linear_attn with feature_map={self.feature_map!r}: writesae has {', '.join(FEATURES)}")


def linear_attn_recurrence(
    q: Float[Tensor, "batch pos head d_key"],
    k: Float[Tensor, "batch pos head d_key"],
    v: Float[Tensor, "batch pos head d_value"],
    initial_state: Float[Tensor, "batch head d_key d_value"] | None = None,
    output_final_state: bool = False,
) -> tuple[Float[Tensor, "batch pos head d_value"], Float[Tensor, "batch head d_key d_value"] | None]:
    """The recurrence at the top of this file, of features; `q` is scaled."""
    values = dict(q=q, k=k, v=v)
    if kernel := fla_kernel("linear_attn", "chunk_linear_attn", q):
        more = dict(scale=1.0, initial_state=initial_state, output_final_state=output_final_state, normalize=False)
        return kernel(**values, **more)
    return recur(LINEAR_ATTENTION, values, initial_state, output_final_state)


class LinearAttention(Mixer):
    def __init__(self, config: LinearAttentionConfig, layer_idx: int):
        super().__init__(config, layer_idx, gated=False, n_served=config.n_served)
        make, per_channel = FEATURES[config.feature_map]
        self.feature_map_q = make(self.head_k_dim)
        self.feature_map_k = self.feature_map_q if config.tie_feature_map_qk else make(self.head_k_dim)
        self.head_k_dim = self.head_k_dim * per_channel
        self.norm_q, self.norm_k = config.norm_q, config.norm_k
        self.norm = self.make_norm(config.norm_eps, bool(config.elementwise_affine))

    def make_gates(self, config: LinearAttentionConfig) -> None:
        """None: nothing is forgotten."""

    def forward(
        self, x: Float[Tensor, "batch pos hidden"], mask: Tensor | None, cache: Cache | None
    ) -> Float[Tensor, "batch pos hidden"]:
        q, k, v = self.project(x, cache)
        q, k = self.feature_map_q(q.unflatten(-1, (self.num_heads, -1))), self.feature_map_k(self.for_each_head(k))
        q = q / (q.sum(-1, keepdim=True) + 1e-4) if self.norm_q else q
        k = k / (k.sum(-1, keepdim=True) + 1e-4) if self.norm_k else k
        if mask is not None:  # padding changes no state
            k = k * mask[..., None]
        o, state = linear_attn_recurrence(
            q=q * self.head_k_dim**-0.5,
            k=k,
            v=self.for_each_head(v),
            initial_state=past_state(cache, self.layer_idx),
            output_final_state=cache is not None,
        )
        if cache is not None:
            cache.update_recurrent_state(state, self.layer_idx)  # type: ignore[arg-type]
        return self.read_out(o, x, self.norm)


class LinearAttentionBlock(MixerBlock):
    mixer = LinearAttention


class LinearAttentionModel(RecurrentModel):
    config_class = LinearAttentionConfig
    block = LinearAttentionBlock


class LinearAttentionForCausalLM(RecurrentForCausalLM):
    config_class = LinearAttentionConfig
    stack = LinearAttentionModel


__all__ = ["LinearAttentionConfig", "LinearAttentionForCausalLM", "LinearAttentionModel", "linear_attn_recurrence"]
