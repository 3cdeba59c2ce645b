"""How well a language model predicts text, and how long its recurrent heads remember."""

import lzma
import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F

from writesae.model import HookedRecurrentModel


def windows(length: int, window: int, stride: int) -> Iterable[tuple[int, int, int]]:
    """(start, stop, first scored target) such that the windows' scored targets cover 1..length-1 once each."""
    scored = 1
    for start in range(0, max(length - 1 - window, 0) + stride, stride):
        stop = min(start + window + 1, length)
        if scored < stop:
            yield start, stop, scored
        scored = stop


@torch.no_grad()
def bits_per_byte(
    model: Any, tokenizer, text: str | list[str], window: int = 1024, stride: int = 512, batch: int = 8
) -> float:
    """Mean bits the model needs per UTF-8 byte of `text` (one text, or separate documents).

    Each document starts from a fresh state after one <|endoftext|>, and every token of it is scored exactly once.
    The model reads windows of `window` tokens that advance by `stride` tokens, so that beyond a document's first
    window a token is predicted from at least `window - stride` tokens before it.
    """
    documents = [text] if isinstance(text, str) else text
    start_token = tokenizer.eos_token_id
    jobs = []
    for document in documents:
        ids = torch.tensor([start_token, *tokenizer(document, add_special_tokens=False)["input_ids"]])
        for start, stop, scored in windows(len(ids), window, stride):
            targets = ids[start + 1 : stop].clone()
            targets[: scored - start - 1] = -100  # scored by an earlier window
            jobs.append((ids[start : stop - 1], targets))
    jobs.sort(key=lambda job: len(job[0]))  # windows of like length share a batch, so that little is padding

    nats = 0.0
    for i in range(0, len(jobs), batch):
        batch_inputs, batch_targets = (list(x) for x in zip(*jobs[i : i + batch], strict=True))
        # Padding goes on the right, where a causal model's earlier outputs cannot see it.
        inputs = torch.nn.utils.rnn.pad_sequence(batch_inputs, batch_first=True, padding_value=start_token)
        targets = torch.nn.utils.rnn.pad_sequence(batch_targets, batch_first=True, padding_value=-100)
        logits = model(input_ids=inputs.to(model.device), use_cache=False).logits.float()
        nats += F.cross_entropy(logits.flatten(0, 1), targets.flatten().to(model.device), reduction="sum").item()
    return nats / math.log(2) / sum(len(d.encode()) for d in documents)


def xz_bits_per_byte(text: str | list[str]) -> float:
    """Bits per byte that `xz -9` needs for the same text (documents joined by newlines)."""
    raw = (text if isinstance(text, str) else "\n".join(text)).encode()
    return 8 * len(lzma.compress(raw, preset=9)) / len(raw)


@torch.no_grad()
def head_memory(model: Any, tokenizer, text: str | list[str], length: int = 512) -> list[dict]:
    """How fast each head forgets, over the first `length` tokens of each document of `text`.

    At each token a head multiplies its state by a decay in (0, 1), or each key channel by its own; it depends on the
    token. Reported per (layer, head): the mean and the 10th, 50th and 90th percentile of the decay (over channels too),
    and two lengths in tokens: `memory_tokens`, 1 / mean(-log decay), after which the gate has on average shrunk the
    state to 1/e, and `median_memory_tokens`, 1 / median(-log decay), the same at the token in the middle, which rare
    resets do not move. Both count the gate only: a delta rule also overwrites what it writes anew under the same key.
    """
    hooked = HookedRecurrentModel(model, tokenizer)
    seen: dict[int, list[torch.Tensor]] = {site.layer: [] for site in hooked.sites}
    for document in [text] if isinstance(text, str) else text:
        ids = tokenizer(document, add_special_tokens=False, return_tensors="pt")["input_ids"][:, :length]
        _, cache = hooked.run_with_cache(ids, names=lambda name: name.endswith("hook_log_decay"))
        for layer, parts in seen.items():
            parts.append(cache["log_decay", layer][0].cpu())
    rows = []
    for layer, parts in seen.items():
        for head, log_decay in enumerate(torch.cat(parts).unbind(1)):
            decay = log_decay.exp()
            p10, p50, p90 = (decay.flatten().kthvalue(max(1, round(q * decay.numel()))).values for q in (0.1, 0.5, 0.9))
            rows.append(
                {
                    "layer": layer,
                    "head": head,
                    "mean_decay": round(decay.mean().item(), 4),
                    "p10_decay": round(p10.item(), 4),
                    "p50_decay": round(p50.item(), 4),
                    "p90_decay": round(p90.item(), 4),
                    "memory_tokens": round(1 / -log_decay.mean().item(), 1),
                    "median_memory_tokens": round(1 / -log_decay.median().item(), 1),
                }
            )
    return rows
