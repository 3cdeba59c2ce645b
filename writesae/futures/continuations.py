"""Continuations of prompts with edits in the memory: greedy, or sampled with the same noise in all conditions."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import LogitsProcessor, LogitsProcessorList

from writesae.hooks import Add, short_chunks
from writesae.hooks.scope import owning
from writesae.model import HookedRecurrentModel, Text
from writesae.recurrence import Read

ENDED = -1  # in place of a token after the end of a text


class CommonRandomNumbers(LogitsProcessor):
    """Makes a greedy choice a sample: ``argmax(logits / temperature + g)`` with Gumbel noise ``g``.

    The noise depends on seed, prompt and step alone. So rows of one prompt differ only by what was done to the model,
    whichever rows are in the batch (as far as its sums round alike).

    Args:
        prompts: of each row, which prompt it continues.
        temperature: of the sampling, above 0.
        seed: of the noise.
    """

    def __init__(self, prompts: Int[Tensor, " batch"], temperature: float, seed: int):
        # Noise is made on the CPU: the same whatever the model's device.
        distinct, self.rows = prompts.cpu().unique(return_inverse=True)
        self.temperature = temperature
        self.noise = [torch.Generator().manual_seed(1_000_003 * seed + p) for p in distinct.tolist()]

    def __call__(
        self, input_ids: Int[Tensor, "batch pos"], scores: Float[Tensor, "batch vocab"]
    ) -> Float[Tensor, "batch vocab"]:
        n_vocab = scores.shape[1]
        uniform = torch.stack([torch.rand(n_vocab, generator=g, dtype=torch.float64) for g in self.noise])
        gumbel = -(-uniform.clamp_min(1e-300).log()).log()
        return scores.float() / self.temperature + gumbel.float()[self.rows].to(scores.device)


@torch.no_grad()
def go_on(
    model: HookedRecurrentModel,
    ids: Int[Tensor, "batch pos"],
    mask: Int[Tensor, "batch pos"] | None,
    n_new: int,
    edits: Sequence[Add] = (),
    positions: Int[Tensor, "batch n"] | None = None,
    read: Read = "same",
    chance: LogitsProcessor | None = None,
    whole: bool = False,
    first: list[Tensor] | None = None,
) -> Int[Tensor, "batch new"]:
    """Continue prompts, `ENDED` where a text has ended.

    Args:
        ids, mask: prompts, padded on the left.
        edits: interventions, all at ``positions``, seen first by the ``read``.
        positions: of each row, counted over prompt and continuation; None for all.
        read: see `HookedRecurrentModel.intervene`.
        chance: `CommonRandomNumbers` to sample; None: greedy.
        whole: no text ends before ``n_new`` tokens: the end-of-text token is never chosen.
        first: a list to which the logits of the first new token are added, ``[batch, vocab]``.
    """
    with owning(everywhere=False) as call, ExitStack() as stack:
        stack.enter_context(short_chunks())
        stack.enter_context(model.intervene(list(edits), positions=positions, read=read))
        if first is not None:

            def keep(_model: nn.Module, _args: Any, output: Any) -> None:
                if call.here and not first:
                    first.append(output.logits[:, -1].float())

            stack.enter_context(model.hf_model.register_forward_hook(keep))
        out = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=n_new,
            min_new_tokens=n_new if whole else 0,
            do_sample=False,
            logits_processor=LogitsProcessorList([] if chance is None else [chance]),
        )
    assert isinstance(out, Tensor)
    new = F.pad(out[:, ids.shape[1] :], (0, n_new - (out.shape[1] - ids.shape[1])), value=ENDED)
    ends = model.hf_model.generation_config.eos_token_id  # type: ignore[union-attr]
    ends = torch.tensor([] if ends is None else ends, dtype=new.dtype, device=new.device).reshape(-1)
    over = torch.isin(new, ends).int()
    return new.masked_fill(over.cumsum(-1) - over > 0, ENDED)


def text_of(model: HookedRecurrentModel, ids: Int[Tensor, " n"]) -> str:
    """A row of tokens as text, without what comes after its end; numbers where there is no tokenizer."""
    row = ids[ids != ENDED].tolist()
    return " ".join(map(str, row)) if model.tokenizer is None else model.tokenizer.decode(row, skip_special_tokens=True)


def prompts_of(
    model: HookedRecurrentModel, prompts: Text
) -> tuple[Int[Tensor, "batch pos"], Int[Tensor, "batch pos"] | None, Int[Tensor, " batch"], list[str]]:
    """Token ids, mask, lengths without padding, and the texts of prompts."""
    ids, mask = model.to_tokens(prompts)
    lengths = torch.full((len(ids),), ids.shape[1], device=ids.device) if mask is None else mask.sum(-1)
    rows = zip(ids.cpu(), lengths.tolist(), strict=True)
    return ids, mask, lengths, [text_of(model, row[len(row) - n :]) for row, n in rows]
