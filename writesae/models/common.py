"""What our own recurrent models share: config rules, the past in a cache, the stack of blocks, the language model.

Each model is one file with a config, a mixer (whose recurrence is one module-level function, intercepted like those of
transformers) and a block. Their module and field names are flash-linear-attention's, so that its checkpoints load; what
they compute is plain PyTorch on any device.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.masking_utils import create_recurrent_attention_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep

from writesae.models.arguments import CACHES, check_arguments
from writesae.recurrence.rules import Rule

# Fields of flash-linear-attention's configs that choose between equal computations, or concern training alone.
NO_EFFECT = {
    "attn_mode",
    "chunk_size",
    "dt_init_floor",
    "dt_max",
    "dt_min",
    "fuse_cross_entropy",
    "fuse_linear_cross_entropy",
    "fuse_norm",
    "fuse_swiglu",
    "max_position_embeddings",
    "rescale_prenorm_residual",
    "residual_in_fp32",
    "use_l2warp",
}
# Fields of any transformers config.json that say where it comes from.
HOUSEKEEPING = {"_name_or_path", "architectures", "auto_map", "model_type", "name_or_path", "transformers_version"}


@strict
class RecurrentConfig(PreTrainedConfig):
    """Config of a model of ours. What a checkpoint asks for and we do not compute is an error, not a surprise.

    Subclasses list every further field they handle as an annotation, and in ``only`` the one value that we support of
    fields that have others.
    """

    only: ClassVar[dict[str, Any]] = {}
    number_of_conv_states: ClassVar[int] = 1  # short-term memories of a layer, for transformers' cache
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
    # Fields are checked by huggingface_hub's `strict`; jaxtyping would refuse those that only config.json has.
    __no_type_check__ = True

    vocab_size: int = 32000
    hidden_size: int = 2048
    num_hidden_layers: int = 24
    hidden_ratio: float | int | None = 4
    intermediate_size: int | None = None
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        for name, value in self.only.items():
            got = kwargs.pop(name, value)
            if got != value:
                raise ValueError(f"{self.model_type} with {name}={got!r}: writesae supports {name}={value!r} only")
        base = {**PreTrainedConfig().to_dict(), **dict.fromkeys(NO_EFFECT | HOUSEKEEPING)}
        for name, value in kwargs.items():
            known = name in base or name.startswith("_") or name in ("dtype", "torch_dtype", "output_attentions")
            if not known and value not in (None, False):
                raise ValueError(
                    f"{self.model_type} config has {name}={value!r}, which writesae does not know: its model would not "
                    f"be the one that was trained"
                )
        super().__post_init__(**kwargs)

    @property
    def layer_types(self) -> list[str]:
        return ["linear_attention"] * self.num_hidden_layers


# --- the past ---------------------------------------------------------------------------------------------------------


def past_state(cache: Cache | None, layer: int, state_idx: int = 0) -> Float[Tensor, "batch head d_key d_value"] | None:
    """A state that a cache holds for a layer, 0 for that which hooks see; None if nothing has been fed."""
    if cache is None:
        return None
    kept: Any = cache.layers[layer]  # get_recurrent_state knows nothing of layers without a convolution
    return kept.recurrent_states[state_idx] if kept.is_recurrent_states_initialized[state_idx] else None


def with_past(
    x: Float[Tensor, "batch pos feature"], n_past: int, cache: Cache | None, layer: int, state_idx: int = 0
) -> Float[Tensor, "batch past_and_pos feature"]:
    """``x`` with the ``n_past`` tokens before it, which the cache remembers; zeros before the first."""
    n_pos = x.shape[1]
    if cache is not None:
        x = cache.update_conv_state(x.mT, layer, state_idx=state_idx, conv_kernel_size=n_past).mT
    return F.pad(x, (0, 0, max(0, n_past + n_pos - x.shape[1]), 0))[:, -n_past - n_pos :]


def running_total(
    x: Shaped[Tensor, "batch pos feature"], cache: Cache | None, layer: int, state_idx: int = 0
) -> Shaped[Tensor, "batch pos feature"]:
    """The sum of ``x`` over all tokens up to each one; the cache remembers that of the tokens before."""
    total = x.cumsum(1)
    if cache is not None:
        kept: Any = cache.layers[layer]
        if kept.has_previous_state[state_idx]:
            total = total + kept.conv_states[state_idx][..., -1:].mT
        cache.update_conv_state(total.mT, layer, state_idx=state_idx, conv_kernel_size=1)
    return total


def places(
    x: Float[Tensor, "batch pos feature"], mask: Tensor | None, cache: Cache | None, layer: int
) -> Int[Tensor, "batch pos"]:
    """The place of each token in its text, 0 for the first. Padding does not count; the cache remembers how many there
    were before."""
    counts = torch.ones_like(x[..., :1]) if mask is None else mask
    return running_total(counts.long(), cache, layer)[..., 0] - 1


def recur(
    rule: Rule, values: Mapping[str, Tensor], initial_state: Tensor | None, output_final_state: bool
) -> tuple[Float[Tensor, "batch pos head d_value"], Float[Tensor, "batch head d_key d_value"] | None]:
    """A rule's recurrence of canonical quantities, as models use it: outputs in the dtype of the reads, and the final
    state if asked for."""
    o, state = rule.run(values.__getitem__, initial_state)
    return o.to(values["q"].dtype), state if output_final_state else None


# --- the model --------------------------------------------------------------------------------------------------------


class RecurrentPreTrainedModel(PreTrainedModel):
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _is_stateful = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding | nn.Conv1d):
            init.normal_(module.weight, std=self.config.initializer_range)
            if getattr(module, "bias", None) is not None:
                init.zeros_(module.bias)  # type: ignore[arg-type]
        elif hasattr(module, "init_weights_"):
            module.init_weights_()  # type: ignore[operator]


class Block(GradientCheckpointingLayer):
    """One layer. ``forward(x, mask, cache, first)`` returns ``(x, first)``; the first layer makes ``first`` for all."""


class RecurrentModel(RecurrentPreTrainedModel):
    """Embeddings, blocks, final norm."""

    block: ClassVar[type[Block]]
    final_norm: ClassVar[str] = "norm"  # its name

    def __init__(self, config: Any):
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(self.block(config, i) for i in range(config.num_hidden_layers))  # type: ignore[call-arg]
        self.add_module(self.final_norm, self.make_norm(config))
        self.gradient_checkpointing = False
        self.post_init()

    @staticmethod
    def make_norm(config: Any) -> nn.Module:
        return nn.RMSNorm(config.hidden_size, eps=config.norm_eps)

    def before_layers(self) -> Any:
        """What the first layer is given as ``first``."""
        return None

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embeddings = value  # type: ignore[assignment]

    def forward(
        self,
        input_ids: Int[Tensor, "batch pos"] | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Float[Tensor, "batch pos hidden"] | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        cache: Cache | None = None,  # what transformers from 5.24 on calls past_key_values
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        check_arguments(self, kwargs)
        past_key_values = past_key_values if cache is None else cache
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        x = self.embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if past_key_values is None and use_cache:
            past_key_values = DynamicCache(config=self.config)
        mask = create_recurrent_attention_mask(self.config, x, attention_mask, past_key_values)
        if attention_mask is not None and attention_mask.ndim != 2:
            raise ValueError(
                f"a recurrent model takes an attention mask [batch, pos]; got {list(attention_mask.shape)}"
            )
        mask = None if mask is None else mask[..., None].to(x.dtype)
        seen, first = [x], self.before_layers()
        for layer in self.layers:
            x, first = layer(x, mask, past_key_values, first)
            seen.append(x)
        x = self.get_submodule(self.final_norm)(x)
        return BaseModelOutputWithPast(
            last_hidden_state=x,  # type: ignore[arg-type]
            **{CACHES[0]: past_key_values},  # type: ignore[arg-type]
            hidden_states=(*seen[:-1], x) if output_hidden_states else None,  # type: ignore[arg-type]
        )


class RecurrentForCausalLM(RecurrentPreTrainedModel, GenerationMixin):
    """A `RecurrentModel` with a language-model head."""

    stack: ClassVar[type[RecurrentModel]]
    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embeddings.weight"}

    def __init__(self, config: Any):
        super().__init__(config)
        self.add_module(self.base_model_prefix, self.stack(config))
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.inner.embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.inner.set_input_embeddings(value)

    @property
    def inner(self) -> RecurrentModel:
        """The stack, under the name that checkpoints give it."""
        return getattr(self, self.base_model_prefix)

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # generation asks such a cache for its length, which only attention layers know: forward makes one

    @staticmethod
    def create_masks_for_generate(attention_mask: Tensor | None = None, **_: Any) -> Tensor | None:
        return attention_mask  # a recurrent layer needs to know only which tokens are padding

    def forward(
        self,
        input_ids: Int[Tensor, "batch pos"] | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Float[Tensor, "batch pos hidden"] | None = None,
        past_key_values: Cache | None = None,
        labels: Int[Tensor, "batch pos"] | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        check_arguments(self, kwargs)
        out = self.inner(
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            past_key_values=past_key_values,
            cache=cache,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
        )
        logits = self.lm_head(slice_logits_to_keep(out.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, hidden_states=out.hidden_states, **{CACHES[0]: getattr(out, CACHES[0])}
        )
