"""What a model remembers, made into a `Memory` and gone on from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import LinearAttentionLayer

from writesae.hooks.attachment import attach
from writesae.hooks.clock import Fed, cache_in
from writesae.hooks.scope import owning
from writesae.jobs.arguments import named_kinds
from writesae.model.attaching import HookedModel
from writesae.model.continuing import cache_argument
from writesae.model.memory import Memory
from writesae.model.origin import Origin
from writesae.model.tokens import Text
from writesae.models.arguments import CACHES
from writesae.models.wrappers import bare

RECURRENT = ".recurrent_states."  # what transformers calls states, by the names of `Memory.others`
STATE = f"{{}}{RECURRENT}0"  # that of a layer


@contextmanager
def starting_from(
    model: HookedModel, states: Mapping[int, Float[Tensor, "batch head d_key d_value"]]
) -> Iterator[None]:
    """Passes of the running thread begin with these states in the layers named, whatever their cache holds. Gradients
    go to them: a cache, which a pass changes in place, lets none through."""
    taps = {tap.site.layer: tap for tap in model.taps}
    with owning(everywhere=False) as call, ExitStack() as stack:
        for layer, S in states.items():
            stack.enter_context(taps[layer].initial.added(S, call))
        yield


class RememberingModel(HookedModel):
    """A transformers model with hook points that hands out what it remembers; its arguments are those of
    `HookedModel`."""

    @named_kinds
    @torch.inference_mode(False)  # it may be used where gradients are wanted
    @torch.no_grad()
    def memory(self, x: Text | None = None, *, memory: Memory | None = None) -> Memory:
        """Everything that the model remembers after a text: recurrent states, convolution states, keys and values of
        attention layers, and its place in the text. What is attached acts while it reads.

        Args:
            x: a text, several, or token ids; None for an empty memory, in which states can be set
                (`Memory.with_state`) before the first token.
            memory: what it remembers before that.

        >>> memory = model.memory("The state of the Union")
        >>> memory.state(2)                       # [batch, head, d_key, d_value]
        >>> model(" is strong", memory=memory)    # the logits of " is strong" after that text
        """
        if x is None:
            if memory is not None:
                raise ValueError("give the text that comes after memory=, or neither for an empty memory")
            return self._empty()
        if memory is not None:
            ids, given = self._going_on_from(memory, x, {})
            cache, mask = cache_in(given), given["attention_mask"]
            whole = torch.cat([memory.ids.to(ids.device).expand(len(ids), -1), ids], 1)
        else:
            ids, mask = self.to_tokens(x)
            if mask is not None and not bool(mask[:, -1].all()):
                raise ValueError("a memory needs padding on the left: the attention mask ends with padding")
            whole, cache = ids, self.new_cache()
            given = {cache_argument(self.hf_model): cache, "attention_mask": mask}
        self._check_can_remember()
        self(ids, **given, **self.logits_of_last(1))
        return self._memory_of(cache, whole, None if mask is None or bool(mask.all()) else mask.long())

    def _empty(self) -> Memory:
        """The memory before the first token."""
        if self.busy:
            raise ValueError(
                "an empty memory is made by a pass of its own, which hooks and edits would see: make it before "
                "anything is attached"
            )
        read, layers = self.memory([0]), self.new_cache().layers
        of_recurrence = vars(LinearAttentionLayer()).keys()

        def stays(name: str) -> bool:  # what attention layers note comes with their first token
            layer, part, *_ = name.split(".")
            return isinstance(layers[int(layer)], LinearAttentionLayer) and part in of_recurrence

        return replace(
            read._map(torch.zeros_like),
            others={name: torch.zeros_like(x) for name, x in read.others.items() if stays(name)},
            settings={name: value for name, value in read.settings.items() if stays(name)},
            ids=read.ids[:, :0],
        )

    def _going_on_from(self, memory: Memory, x: Text | None, kwargs: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """Token ids that come after a memory, and the arguments with which the model goes on from it.

        Raises:
            ValueError: texts of unequal length, or the memory of another model or of another number of texts.
            TypeError: no text, or an argument that the memory decides.
        """
        if not isinstance(memory, Memory):
            raise TypeError(f"memory= takes what model.memory(text) returns; got {type(memory).__name__}")
        for name in (*CACHES, "attention_mask", "inputs_embeds", "use_cache"):
            if kwargs.get(name) is not None:
                raise TypeError(f"memory= and {name}= both say what came before: leave {name} out")
        if x is None:
            raise TypeError("memory= goes with a text or token ids that come after it")
        ids, mask = self.to_tokens(x, prepend_bos=False, special_tokens=False) if memory.n_tokens else self.to_tokens(x)
        if mask is not None and not bool(mask.all()):
            raise ValueError(
                "texts of unequal length can't go on from a memory: the shorter ones would have padding between it and "
                "their tokens. Give them one by one"
            )
        self._check_can_remember()
        cache = self._cache_of(memory, len(ids))
        before = memory.mask if memory.mask is not None else torch.ones_like(memory.ids)
        before = before.to(ids.device).expand(len(ids), -1)
        whole = torch.cat([before, torch.ones_like(ids)], 1)
        return ids, {**kwargs, cache_argument(self.hf_model): cache, "attention_mask": whole}

    def _differentiable(self, memory: Memory | None, batch: int) -> AbstractContextManager[None]:
        """While the block runs, a pass that goes on from a memory leaves what its backward pass needs as it is."""
        if memory is None or not torch.is_grad_enabled():
            return nullcontext()
        states = {layer: S.to(self.layer_device(layer)) for layer, S in memory.states.items()}
        return starting_from(self, {layer: S.expand(batch, *S.shape[1:]) for layer, S in states.items()})

    def _whole_from(self, memory: Memory, x: Text | None, kwargs: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """The same for generation, which takes the whole text with a filled cache."""
        ids, kwargs = self._going_on_from(memory, x, kwargs)
        return torch.cat([memory.ids.to(ids.device).expand(len(ids), -1), ids], 1), kwargs

    def _memory_of(self, cache: Any, ids: Int[Tensor, "batch pos"], mask: Int[Tensor, "batch pos"] | None) -> Memory:
        """What a cache of transformers holds, which has been fed these tokens; it is taken over, not copied."""
        tensors: dict[str, Tensor] = {}
        settings: dict[str, Any] = {}
        for i, layer in enumerate(cache.layers):
            for name, value in _flat(f"{i}.", vars(layer)):
                if isinstance(value, Tensor):
                    tensors[name] = value.detach()
                elif value is None or isinstance(value, bool | int | float | str | torch.dtype | torch.device):
                    settings[name] = value
                else:
                    raise TypeError(f"the cache keeps {name} as a {type(value).__name__}, which a memory cannot hold")
        states = {}
        for tap in self.taps:
            state = tensors.pop(STATE.format(tap.site.layer), None)
            if state is None:
                raise ValueError(
                    f"{type(bare(self.hf_model)).__name__} leaves no state of layer {tap.site.layer} in its cache, so "
                    f"there is no memory to take from it"
                )
            states[tap.site.layer] = tap.family.from_model(state, tap.n_calls).contiguous()
        return Memory(Origin.of(self), states, tensors, settings, ids, mask, bare(self.hf_model).dtype)

    def _cache_of(self, memory: Memory, batch: int) -> DynamicCache:
        """A new cache of transformers that holds a memory, for a batch of texts that go on from it."""
        memory.origin.check_fits(self)
        if len(memory) not in (1, batch):
            raise ValueError(
                f"a memory of {len(memory)} texts, and {batch} to go on from it: give {len(memory)}, or choose one "
                f"memory, memory[0], which serves any number"
            )
        here, dtype = memory[range(batch) if len(memory) == batch else [0] * batch], bare(self.hf_model).dtype
        if here.dtype != dtype:
            cast = here.to(dtype=dtype)
            if not any(tap.family.rounds_within for tap in self.taps):  # most recurrences take any dtype
                others = {name: x if RECURRENT in name else cast.others[name] for name, x in here.others.items()}
                cast = replace(cast, states=here.states, others=others)
            here = cast
        states = {
            STATE.format(tap.site.layer): tap.family.to_model(here.states[tap.site.layer], tap.n_calls).contiguous()
            for tap in self.taps
        }
        cache = self.new_cache()
        for name, value in {**here.settings, **here.others, **states}.items():
            index, part, *key = name.split(".")
            layer, device = cache.layers[int(index)], self.layer_device(int(index))
            if isinstance(value, torch.device):
                value = device
            elif isinstance(value, Tensor):
                value = value.to(device)
            if key:
                getattr(layer, part)[int(key[0])] = value
            else:
                setattr(layer, part, value)
        mask = None if here.mask is None else here.mask.to(self.device)
        attach(cache, Fed(here.n_tokens, mask, ids=(here.ids.to(self.device),), sure=True))
        return cache

    def _check_can_remember(self) -> None:
        """Raise ValueError where a model in training would leave its cache out."""
        model = bare(self.hf_model)
        if model.training and any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
            raise ValueError(
                "a model in training with gradient checkpointing keeps no cache, so it would forget what came before: "
                "call model.eval()"
            )

    def _cache_renamed(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments, with a cache that the model takes, under its own name for it."""
        past, take = cache_in(kwargs), self.taps[0].family.takes_cache
        others = {name: value for name, value in kwargs.items() if name not in CACHES}
        if past is None:
            return others
        if take is not None:
            past = take(past, self._installed.text_model, None)
        return {**others, cache_argument(self.hf_model): past}

    def _tokens(self, x: Text | None, kwargs: dict[str, Any]) -> tuple[dict[str, Tensor], Tensor | None]:
        """``input_ids`` or ``inputs_embeds``, and the mask: that of texts, or the one in ``kwargs``, which loses it."""
        if x is None:
            embeds = kwargs.pop("inputs_embeds")
            if not isinstance(embeds, Tensor) or embeds.ndim != 3:
                raise ValueError("inputs_embeds must be a tensor [batch, pos, d_model]")
            return {"inputs_embeds": embeds.to(self.device)}, kwargs.pop("attention_mask", None)
        ids, mask = self.to_tokens(x)
        return {"input_ids": ids}, kwargs.pop("attention_mask", mask)


def _flat(prefix: str, values: Mapping[Any, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(f"{prefix}{name}.", value)
        else:
            yield f"{prefix}{name}", value
