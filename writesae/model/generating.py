"""Generation: texts continued by transformers' own ``generate``, with whatever is attached."""

from __future__ import annotations

import copy
from contextlib import ExitStack
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from writesae.hooks.clock import cache_in
from writesae.hooks.positions import several_of_each
from writesae.model.continuing import (
    cache_argument,
    check_continues,
    feed_in_pieces,
    generation_keeps,
    going_on,
    knows_its_length,
)
from writesae.model.memory import Memory
from writesae.model.remembering import RememberingModel
from writesae.model.tokens import Text, is_text
from writesae.models.arguments import CACHES, arguments_of
from writesae.models.wrappers import bare


class GeneratingModel(RememberingModel):
    """A transformers model with hook points that writes texts; its arguments are those of `HookedModel`."""

    @torch.no_grad()
    def generate(self, x: Text | None = None, *, memory: Memory | None = None, **kwargs: Any) -> Any:
        """Continue a text. What is attached acts on every token, in the prompt and generated.

        Args:
            x: a text, several, or token ids.
            memory: what the model remembers (`memory`): ``x`` is what comes after that. It stays as it is.
            **kwargs: for ``transformers`` generation: ``max_new_tokens``, ``do_sample``, ``temperature``, ... With a
                filled cache, ``past_key_values=``, ``x`` is the whole text all the same, and only what the cache has
                not been fed is run.

        Returns:
            Prompt and continuation: a text for a text, a list for several, token ids for token ids.
        """
        given, before = x, 0
        if memory is not None:
            x, kwargs = self._whole_from(memory, x, kwargs)
            before = memory.n_tokens
        x, kwargs = self._read_for_generation(x, kwargs)
        tokens, mask = self._tokens(x, kwargs)
        size = next(iter(tokens.values())).shape[:2]
        if mask is not None and not bool(mask[:, -1].all()):
            raise ValueError("generation needs padding on the left: the attention mask ends with padding")
        past = cache_in(kwargs)
        beams = max(self._setting("num_beams", kwargs) or 1, self._setting("num_return_sequences", kwargs) or 1)
        if memory is not None and beams > 1:
            raise ValueError(
                f"memory= with {beams} beams or returned sequences: a memory goes on once for each text that is given; "
                f"give the text {beams} times"
            )
        if past is not None:
            check_continues(past, tokens, size[1] if mask is None else mask.shape[-1], beams)
        if mask is not None:
            whole = mask.shape[-1] == size[1]  # then the tokens are, too: what is cached is among them
            self._installed.clock.check({**tokens, "attention_mask": mask, CACHES[0]: None if whole else past})
        mask = torch.ones(size, dtype=torch.long, device=self.device) if mask is None else mask
        most = self._most_new_tokens(kwargs, 0 if x is None else size[1])
        if most is not None:
            self._check_within(mask.sum(-1) + most - 1)  # the last token is never fed
        self._check_guidance(kwargs)
        with several_of_each(beams), ExitStack() as stack:
            if (size_of_piece := self._pieces(kwargs, past, beams)) is not None:
                past = feed_in_pieces(
                    self.hf_model, self.new_cache(), tokens, mask, size_of_piece, **self.logits_of_last(1)
                )
                kwargs[cache_argument(self.hf_model)] = past
            if past is not None:
                stack.enter_context(going_on(self.hf_model, past, size[1]))
            elif self.taps[0].family.takes_cache and self._setting("use_cache", kwargs) is not False:
                kwargs[cache_argument(self.hf_model)] = self.new_cache()  # transformers makes none
            out = self.hf_model.generate(**tokens, attention_mask=mask, **kwargs)  # type: ignore[operator]
        if most is not None:  # positions past an early end of the text are no mistake
            for positions in self._asked():
                positions.vouch()
        out = _without(out, before)
        if not is_text(given) or not isinstance(out, Tensor):
            return out
        texts = [given] if isinstance(given, str) else list(given or ())
        n_prompt, lengths = size[1] - before, mask[:, before:].sum(-1).tolist()
        per_text, ends = out.shape[0] // len(texts), self._ends(kwargs)
        rows, ends = [], ends.cpu()
        for i, row in enumerate(out.cpu()):
            old, new = row[n_prompt - lengths[i // per_text] : n_prompt], row[n_prompt:]
            over = torch.isin(new, ends).nonzero()[:1, 0]  # what follows the end of one text is filling
            new = new[: int(over) + 1] if len(over) else new
            rows.append(self._tokenizer().decode(torch.cat([old, new]), skip_special_tokens=True))
        return rows[0] if isinstance(given, str) and len(rows) == 1 else rows

    def _read_for_generation(self, x: Text | None, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """`read`, where only some arguments are the model's; transformers refuses those that it does not know."""
        takes = {*arguments_of(self.hf_model), "attention_mask", *CACHES}
        of_model = {name: value for name, value in kwargs.items() if name in takes}
        x, given = self.read(x, self._cache_renamed(of_model))
        return x, {name: value for name, value in kwargs.items() if name not in of_model} | given

    def _check_guidance(self, kwargs: dict[str, Any]) -> None:
        """Generation keeps the memory of the unconditional text under one name: a model that calls it otherwise would
        read each of its tokens by itself."""
        scale, name = self._setting("guidance_scale", kwargs), cache_argument(self.hf_model)
        if scale in (None, 1) or generation_keeps(name) or self._setting("use_cache", kwargs) is False:
            return
        raise ValueError(
            f"guidance_scale={scale}: generation would forget the unconditional text after each token, since "
            f"{type(bare(self.hf_model)).__name__} calls its cache {name}: add use_cache=False"
        )

    def _pieces(self, kwargs: dict[str, Any], past: Any, beams: int) -> int | None:
        """Tokens per piece of the prompt, taken out of ``kwargs``, where generation of transformers has no way to feed
        the prompt in pieces; None where it has, or none are asked for."""
        size = self._setting("prefill_chunk_size", kwargs)
        if size is None:
            return None
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ValueError(f"prefill_chunk_size={size!r}: give a whole number of tokens, 1 or more")
        if knows_its_length(self.hf_model, self.new_cache()):
            return None
        for given, why in (
            (past is not None, "with past_key_values, which are filled"),
            (beams > 1, f"with {beams} beams or returned sequences"),
            (self._setting("use_cache", kwargs) is False, "with use_cache=False"),
        ):
            if given:
                raise ValueError(f"prefill_chunk_size={size} {why}, is not possible with this model: leave one out")
        if kwargs.pop("prefill_chunk_size", None) is None:  # a config has it
            config = copy.copy(kwargs.get("generation_config") or self.hf_model.generation_config)
            config.prefill_chunk_size = None
            kwargs["generation_config"] = config
        return size

    def _setting(self, name: str, kwargs: dict[str, Any]) -> Any:
        """A setting of generation: as given, or the model's own."""
        return next((said[name] for said in self._settings(kwargs) if said.get(name) is not None), None)

    def _settings(self, kwargs: dict[str, Any]) -> list[dict[str, Any]]:
        """All settings of generation, those that count first."""
        configs = (kwargs.get("generation_config"), getattr(self.hf_model, "generation_config", None))
        return [kwargs, *(vars(config) for config in configs if config is not None)]

    def _most_new_tokens(self, kwargs: dict[str, Any], n_prompt: int) -> int | None:
        """How many tokens may be generated; None if nothing limits them."""
        for said in self._settings(kwargs):
            if (n_new := said.get("max_new_tokens")) is not None:
                return n_new
            if (n_all := said.get("max_length")) is not None:
                return max(n_all - n_prompt, 1)
        return None

    def _ends(self, kwargs: dict[str, Any]) -> Int[Tensor, " n"]:
        """Token ids at which generation of a text ends."""
        found = self._setting("eos_token_id", kwargs)
        return torch.as_tensor([] if found is None else found, device=self.device).reshape(-1).long()


def _without(out: Any, n: int) -> Any:
    """What generation returned, without its first tokens."""
    if not n:
        return out
    if isinstance(out, Tensor):
        return out[:, n:]
    out.sequences = out.sequences[:, n:]
    return out
