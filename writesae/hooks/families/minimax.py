"""MiniMax: lightning attention, linear attention with one fixed decay per head.

    S_t = exp(-s) S_{t-1} + k_t v_t^T          o_t = S_t^T q_t

No function of the modeling file runs this recurrence: it is in the midst of the mixer's ``forward``, between
projections and a norm. So ``forward`` itself is what is intercepted. Where something is attached, what comes before the
recurrence and after it is called from here, and the recurrence is the native ``forward`` of a mixer whose projections
let everything through (`Bare`): the same code in the same order, bit for bit.

MiniMax has a cache class of its own, which does not know how many tokens it has been fed where the first layer is not
attention. `LightningCache` is one that keeps each layer's state where all others of transformers do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import Cache
from transformers.models.minimax import modeling_minimax
from transformers.models.minimax.modeling_minimax import MiniMaxCache

from writesae.hooks.clock import cache_in
from writesae.hooks.families.base import Family
from writesae.hooks.families.gdn import modeling
from writesae.hooks.families.ours import CanonicalCall
from writesae.hooks.families.registry import register
from writesae.models.arguments import CACHES
from writesae.recurrence import rules
from writesae.recurrence.kernels import chunked


class LightningCache(MiniMaxCache):
    """A `MiniMaxCache` that is like a `DynamicCache` of a model's config in everything else."""

    is_croppable = Cache.is_croppable
    crop = DynamicCache.crop
    batch_repeat_interleave = DynamicCache.batch_repeat_interleave
    batch_select_indices = DynamicCache.batch_select_indices
    __len__ = Cache.__len__

    def __init__(self, config: PreTrainedConfig):
        DynamicCache.__init__(self, config=config)

    def get_linear_cache(self, layer_idx: int) -> Tensor | None:
        kept: Any = self.layers[layer_idx]
        return kept.recurrent_states[0] if kept.is_recurrent_states_initialized[0] else None

    def set_linear_cache(self, layer_idx: int, linear_cache: Tensor) -> None:
        self.update_recurrent_state(linear_cache, layer_idx)  # type: ignore[arg-type]


def lightning_cache(cache: Any, text_model: Any, _tokens: Tensor | None = None) -> LightningCache:
    """The cache that a model is given, as one that it takes: None and an empty one are new, and a `DynamicCache` of the
    model's config stays the object that it is.

    Raises:
        ValueError: a cache of transformers' own class for this model that has been fed, or one of another class.
    """
    config = text_model.config
    if cache is None:
        return LightningCache(config)
    if isinstance(cache, LightningCache):
        return cache
    if type(cache) not in (MiniMaxCache, DynamicCache):
        raise ValueError(
            f"a cache of the class {type(cache).__name__}: MiniMax takes a DynamicCache(config=...) or none"
        )
    if isinstance(cache, MiniMaxCache) and len(cache):
        raise ValueError(
            "this MiniMaxCache was filled where writesae did not see it, and does not know how many tokens are in it: "
            "begin with a new one, or with DynamicCache(config=model.config)"
        )
    if not cache.layers:
        cache.layers, cache.layer_class_to_replicate = DynamicCache(config=config).layers, None
    cache.__class__ = LightningCache
    return cache  # type: ignore[return-value]


@dataclass
class Kept:
    """What stands for a cache in a native call: one state."""

    state: Tensor | None

    def get_linear_cache(self, _layer: int) -> Tensor | None:
        return self.state

    def set_linear_cache(self, _layer: int, state: Tensor) -> None:
        self.state = state


@dataclass
class Bare:
    """A mixer that is its recurrence alone: all else in it lets through what it is given."""

    mixer: Any

    def __getattr__(self, name: str) -> Any:
        return getattr(self.mixer, name)

    @staticmethod
    def qkv_proj(x: Tensor) -> Tensor:
        return x

    act_fn = norm = out_proj = qkv_proj

    def output_gate(self, x: Tensor) -> Tensor:
        """A gate is a sigmoid, of infinity 1."""
        return torch.full_like(x[..., : x.shape[-1] // 3], torch.inf)


class LightningCall(CanonicalCall):
    """A call of ``MiniMaxLightningAttention.forward(self, hidden_states, position_embeddings, attention_mask,
    past_key_values)``, which returns the mixer's output and the state."""

    def __init__(self, family: Family, arguments: dict[str, Any]):
        mixer, x, self.cache = arguments["self"], arguments["hidden_states"], cache_in(arguments)
        qkv = mixer.act_fn(mixer.qkv_proj(x))
        qkv = modeling_minimax.apply_mask_to_padding_states(qkv, arguments.get("attention_mask"))
        q, k, v = qkv.unflatten(-1, (mixer.num_attention_heads, -1)).split(mixer.head_dim, -1)
        values = dict(q=q, k=k, v=v, log_decay=-mixer.slope_rate[:, 0, 0].expand(q.shape[:3]))
        state = None if self.cache is None else self.cache.get_linear_cache(mixer.layer_idx)
        super().__init__(family, {**values, self.state_argument: state})
        self.mixer, self.gate = mixer, mixer.output_gate(x)

    def run(self, native: Callable[..., Any]) -> tuple[Tensor, Tensor | None]:
        state, dtype = self.initial_state, self.dtype
        if "log_decay" in self.changed:  # the native function has one for all tokens
            o, state = chunked(self.recurrence(), self.write(), state)
            return o.to(dtype), state
        qkv = torch.cat([(self.arguments | self.changed)[name].to(dtype) for name in "qkv"], -1)
        kept = Kept(None if state is None else state.to(dtype))
        o, state = native(
            self=Bare(self.mixer), hidden_states=qkv.flatten(2), position_embeddings=None, attention_mask=None,
            **{CACHES[0]: kept},
        )  # fmt: skip
        return o.unflatten(-1, (self.mixer.num_attention_heads, -1)), state

    def result(self, o: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor | None]:
        read = self.mixer.norm(o.flatten(2))
        if self.cache is not None and state is not None:
            self.cache.set_linear_cache(self.mixer.layer_idx, state.to(self.dtype))
        return self.mixer.out_proj(self.gate.sigmoid() * read), state


MINIMAX = Family(
    name="Lightning attention",
    rule=rules.SIMPLE_GLA,
    mixers={modeling("minimax"): "MiniMaxLightningAttention"},
    kernels=("MiniMaxLightningAttention.forward",),
    sizes=("num_attention_heads", "head_dim", "head_dim"),
    norms=("norm",),
    seen_at={"z": "output_gate"},
    call=LightningCall,
    takes_cache=lightning_cache,
    stream_norms=("input_layernorm", "post_attention_layernorm"),
    rounds_within=8,
    letters={"log_decay": "fixed", "z": "before its sigmoid"},
)
register(MINIMAX)
