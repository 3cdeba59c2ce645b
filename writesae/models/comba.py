"""Comba in plain PyTorch: loads flash-linear-attention's checkpoints.

Gated DeltaNet that erases along a key of its own, and reads the state before its decay to do so (Hu et al. 2025, arXiv
2506.02475)::

    S_t = exp(g_t) S_{t-1} + beta_t k_t (v_t - S_{t-1}^T p_t)^T          o_t = S_t^T (q_t - D p_t)

with ``p = sigmoid(decay) k``, one number ``decay`` and one ``D`` per head. flash-linear-attention gives ``p`` and
``q - D p`` length 1 afterwards, as it does ``k``, so there ``decay`` acts through the reads alone; and so it is here.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from huggingface_hub.dataclasses import strict
from jaxtyping import Float
from torch import Tensor, nn
from transformers import initialization as init

from writesae.models.common import RecurrentForCausalLM, RecurrentModel, recur
from writesae.models.gated_delta_net import GatedDeltaNet
from writesae.models.gpu import fla_kernel
from writesae.models.layers import GatedRMSNorm, HeadSizeConfig, MixerBlock
from writesae.recurrence.rules import COMBA


@strict
class CombaConfig(HeadSizeConfig):
    model_type = "comba"
    # flash-linear-attention's model does not tell its layers of these two: they always have both.
    only: ClassVar[dict[str, Any]] = {**HeadSizeConfig.only, "use_inner_decay": True, "use_output_correction": True}

    use_output_gate: bool = True
    correction_factor: float | int = 1.0  # D of a new model

    @property
    def gated(self) -> bool:
        return self.use_output_gate


def comba_recurrence(
    q: Float[Tensor, "batch pos head d_key"],
    k: Float[Tensor, "batch pos head d_key"],
    v: Float[Tensor, "batch pos head d_value"],
    beta: Float[Tensor, "batch pos head"],
    log_decay: Float[Tensor, "batch pos head"],
    kappa: Float[Tensor, "batch pos head d_key"],
    initial_state: Float[Tensor, "batch head d_key d_value"] | None = None,
    output_final_state: bool = False,
) -> tuple[Float[Tensor, "batch pos head d_value"], Float[Tensor, "batch head d_key d_value"] | None]:
    """The recurrence at the top of this file; `kappa` is its ``p``, `q` is corrected and scaled, all are normalised."""
    if kernel := fla_kernel("comba", "chunk_comba", q):
        return kernel(
            q=q, k=k, v=v, p=kappa, g=log_decay, beta=beta, scale=1.0, initial_state=initial_state,
            output_final_state=output_final_state,
        )  # fmt: skip
    values = dict(q=q, k=k, v=v, beta=beta, log_decay=log_decay, kappa=kappa)
    return recur(COMBA, values, initial_state, output_final_state)


class Comba(GatedDeltaNet):
    def __init__(self, config: CombaConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.correction_factor = config.correction_factor
        if config.use_output_gate:
            self.o_norm = GatedRMSNorm(self.head_v_dim, config.norm_eps, gate=torch.sigmoid)

    def make_gates(self, config: Any) -> None:
        super().make_gates(config)
        self.decay, self.D = (nn.Parameter(torch.ones(config.num_heads)) for _ in range(2))

    def init_weights_(self) -> None:
        super().init_weights_()
        init.ones_(self.decay)  # type: ignore[arg-type]
        init.constant_(self.D, self.correction_factor)  # type: ignore[arg-type]

    def keys(
        self, q: Float[Tensor, "batch pos key_head d_key"], k: Float[Tensor, "batch pos key_head d_key"]
    ) -> dict[str, Tensor]:
        p = self.decay.sigmoid()[:, None] * k
        return dict(q=q - self.D[:, None] * p, k=k, kappa=p)

    def recurrence(self, **values: Any) -> tuple[Tensor, Tensor | None]:
        return comba_recurrence(**values)


class CombaBlock(MixerBlock):
    mixer = Comba


class CombaModel(RecurrentModel):
    config_class = CombaConfig
    block = CombaBlock


class CombaForCausalLM(RecurrentForCausalLM):
    config_class = CombaConfig
    stack = CombaModel


__all__ = ["CombaConfig", "CombaForCausalLM", "CombaModel", "comba_recurrence"]
