"""Logits made where they are asked for, after the pass.

With a vocabulary of 248,320 the logits of a thousand tokens take a gigabyte, and as much time as the layers. What asks
about a few tokens (an experiment, a gradient) often knows which only when the pass is over, or wants other columns of
each sequence. `late_logits` keeps what the last layer gave instead, and runs the model's own head on some of it later.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from writesae.hooks.residual import giving
from writesae.hooks.scope import LOCK, owning
from writesae.models.wrappers import bare

if TYPE_CHECKING:
    from writesae.model.tokens import TokenModel


@dataclass(eq=False)
class LateLogits:
    """The end of a pass, before its logits.

    Attributes:
        model: the transformers model.
        output: what the stack of layers gave; ``last_hidden_state`` is normalised and ready for the head.
        logits: all of them, where torch.compile has made the pass one piece that does not stop before the head.
    """

    model: Any
    output: Any = None
    logits: Float[Tensor, "batch pos vocab"] | None = field(default=None, repr=False)

    @property
    def shape(self) -> tuple[int, int]:
        """Sequences and tokens of the pass."""
        return self.kept.shape[0], self.kept.shape[1]

    @property
    def kept(self) -> Float[Tensor, "batch pos _"]:
        """What logits are made of: the last hidden states, or all logits where there are those alone."""
        return self.output.last_hidden_state if self.logits is None else self.logits

    def at(self, rows: Int[Tensor, "*n"], columns: Int[Tensor, "*n"]) -> Float[Tensor, "*n vocab"]:
        """The logits of some tokens; a gradient goes through them as through those of the pass.

        Args:
            rows: the sequence of each.
            columns: its column in the pass, padding counted; negative ones count from the end.
        """
        if self.logits is not None:
            return self.logits[rows, columns]
        hidden = self.output.last_hidden_state[rows, columns]
        output = copy.copy(self.output)
        output.last_hidden_state = hidden.reshape(1, -1, hidden.shape[-1])
        tokens = torch.zeros(output.last_hidden_state.shape[:2], dtype=torch.long, device=hidden.device)
        with giving([self.model.base_model], output):
            made = self.model(input_ids=tokens, use_cache=False).logits
        return made.reshape(*hidden.shape[:-1], -1)

    def of_last(self) -> Float[Tensor, "batch 1 vocab"]:
        """The logits after the last token of each sequence."""
        rows = torch.arange(len(self.kept), device=self.kept.device)[:, None]
        return self.at(rows, torch.full_like(rows, -1))

    def detach(self) -> LateLogits:
        """The same without its graph."""
        return self._map(lambda x: x.detach())

    def apart(self) -> LateLogits:
        """The same as the beginning of a graph of its own: the backward pass can then go through the head in pieces,
        and through the model once, from ``apart.kept.grad``."""
        return self._map(lambda x: x.detach().requires_grad_())

    def last(self) -> LateLogits:
        """The last token of each sequence alone: what is kept of the others is let go."""
        return self._map(lambda x: x[:, -1:].clone())

    def _map(self, fn: Callable[[Tensor], Tensor]) -> LateLogits:
        if self.logits is not None:
            return LateLogits(self.model, None, fn(self.logits))
        return LateLogits(self.model, type(self.output)(last_hidden_state=fn(self.output.last_hidden_state)))


@contextmanager
def late_logits(model: TokenModel) -> Iterator[LateLogits]:
    """A pass in the block makes the logits of its last token alone; those of others can be had afterwards.

    >>> with late_logits(model) as end:
    ...     model(ids)
    >>> end.at(rows, columns)
    """
    end = LateLogits(bare(model.hf_model))
    whole: Any = model.hf_model
    stack = None if whole is not end.model and hasattr(whole, "_orig_mod") else end.model.base_model
    with owning(everywhere=False) as call:

        def stop(_stack: nn.Module, _args: Any, output: Any) -> Any:
            if not call.here:  # a pass of another thread
                return None
            end.output = type(output)(last_hidden_state=output.last_hidden_state)
            last = copy.copy(output)
            # A copy: where weights want no gradient, torch multiplies a view with one copy of the head per sequence
            piece = output.last_hidden_state[:, -1:]
            last.last_hidden_state = piece.clone(memory_format=torch.contiguous_format)
            return last

        def keep(_model: nn.Module, _args: Any, output: Any) -> None:
            if call.here:
                end.logits = output.logits

        with LOCK:
            handle = whole.register_forward_hook(keep) if stack is None else stack.register_forward_hook(stop)
        with handle:
            yield end
