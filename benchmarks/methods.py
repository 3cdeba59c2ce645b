"""Methods against the plain way to do the same, on the shipped models, one thread.

    python benchmarks/methods.py

A round times every contestant once, by the CPU time of the thread; ratios are medians over rounds. Rivals: one edited
pass for each cell of a patching grid; a loop over tokens for the pattern of a head; an unwrapped pass beside one with a
knockout, and beside one that goes on from a memory.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import torch
import typer
from cost import native
from measure import median, peak_memory, race
from rich.console import Console
from rich.table import Table

import writesae as ws
from writesae.models.load import load_model
from writesae.zoo import heldout_documents, shipped_model, shipped_models

N = 1024


def patched_one_by_one(model: ws.HookedRecurrentModel, clean: Any, corrupted: Any, metric: ws.Logit) -> float:
    """A grid of writes, each cell a pass of its own."""
    total = 0.0
    _, cache = model.run_with_cache(clean)
    for site in model.sites:
        writes = cache.write(site.layer)
        for head in range(site.n_heads):
            for t in range(corrupted.shape[1]):
                with model.intervene(ws.Replace(site.layer, head, write=writes[0, t, head]), positions=t):
                    total += float(metric(model(corrupted, logits_to_keep=1)))
    return total


def pattern_by_loop(model: ws.HookedRecurrentModel, cache: ws.ActivationCache, layer: int, head: int) -> torch.Tensor:
    """Who reads whom, token by token: what is in the state of each write, as a matrix ``[d_key, token]``."""
    rec, write, q = cache.dynamics(layer).recurrence, cache.write(layer), cache["q", layer]
    n_pos, d_key = write.key.shape[1], write.d_key
    held = torch.zeros(d_key, n_pos)
    rows = []
    for t in range(n_pos):
        decay, before = rec.log_decay[0, t, head].exp(), held
        held = held * (decay if decay.ndim == 0 else decay[:, None])
        if rec.a is not None and rec.b is not None:
            held = held + torch.outer(rec.a[0, t, head], rec.b[0, t, head] @ before)
        held[:, t] += write.key[0, t, head]
        rows.append(q[0, t, head] @ held)
    return torch.stack(rows)


def contests(model: ws.HookedRecurrentModel) -> Iterator[tuple[str, str, dict[str, Callable[[], Any]], int]]:
    """What is compared: name, rival, ``{rival, ours}`` and how many rounds."""
    text, other = (model.to_tokens(document)[0][:, :40] for document in heldout_documents()[:2])
    metric = ws.Logit(5, minus=11)
    yield (
        f"patching grid of writes, 40 tokens, {sum(s.n_heads for s in model.sites) * 40} cells",
        "a pass for each cell",
        {
            "rival": lambda: patched_one_by_one(model, text, other, metric),
            "ours": lambda: ws.patching(model, text, other, metric, "write", estimate=False),
        },
        1,
    )
    ids = torch.cat([model.to_tokens(document)[0][0] for document in heldout_documents()[:8]])[None, :N]
    layer = model.sites[-1].layer
    _, cache = model.run_with_cache(ids)
    yield (
        f"pattern of one head, {N} tokens",
        "a loop over tokens",
        {"rival": lambda: pattern_by_loop(model, cache, layer, 0), "ours": lambda: cache.pattern(layer, 0)},
        5,
    )
    hf_model = load_model(str(shipped_model(model.model_id)), dtype=torch.float32).eval()
    unwrapped = native(lambda: hf_model(ids, use_cache=False))
    torch.testing.assert_close(
        cache.pattern(layer, 0)[0], pattern_by_loop(model, cache, layer, 0), atol=1e-4, rtol=1e-3
    )

    def cut() -> None:
        with model.intervene(ws.Knockout(layer, sources=slice(10, 20), targets=slice(20, None))):
            model(ids)

    yield (
        f"a knockout of ten tokens in one layer, {N} tokens",
        "the unwrapped pass",
        {"rival": unwrapped, "ours": cut},
        7,
    )
    memory = model.memory(ids[:, : N // 2])
    yield (
        f"the last {N // 2} of {N} tokens from a memory",
        "the unwrapped pass over all",
        {"rival": unwrapped, "ours": lambda: model(ids[:, N // 2 :], memory=memory)},
        7,
    )


@torch.no_grad()
def main(models: Annotated[list[str] | None, typer.Argument(help="Shipped models; all without.")] = None) -> None:
    torch.set_num_threads(1)
    table = Table("model", "what", "rival", "s rival", "s ours", "rival / ours", "MiB rival", "MiB ours")
    for name in models or shipped_models():
        model = ws.HookedRecurrentModel.from_pretrained(name)
        for what, rival, runs, rounds in contests(model):
            seconds = race(runs, rounds, clock=time.thread_time)
            ratio = median([a / b for a, b in zip(seconds["rival"], seconds["ours"], strict=True)])
            memory = [f"{peak_memory(runs[who]):.0f}" for who in ("rival", "ours")]
            times = [f"{median(seconds[who]):.3g}" for who in ("rival", "ours")]
            table.add_row(name, what, rival, *times, f"{ratio:.2f}", *memory)
    Console(width=160).print(table)


if __name__ == "__main__":
    typer.run(main)
