"""The replacement test against a naive replay, in one run: firings per second of both, the same firings and conditions.

    python benchmarks/replacement.py                                 # the shipped models
    python benchmarks/replacement.py --site tiny-gdn/L0H0 --horizon 1

The naive replay feeds the tokens up to the firing, copies the cache for each condition and for none, adds the edit to
the state in the copy and feeds the tokens that follow: one by one, as when a model is decoded (the cache-slot
protocol), or all at once. Ours is all that `replacement_test` does from the native pass on, divergence of states
included. Both give the same KL: the largest difference is shown.
"""

from __future__ import annotations

import copy
import time
from typing import Annotated, Any

import torch
import transformers
import typer
from measure import median, race
from rich.console import Console
from rich.table import Table
from transformers import DynamicCache

import writesae as ws
from writesae.experiments.engine.conditions import DEFAULT, Generators, put_in, top_atoms, windows_of
from writesae.experiments.protocol import Run
from writesae.futures.divergence import divergence
from writesae.futures.replay import Replayer, kl_from, stacked
from writesae.zoo import heldout_documents, shipped_models, shipped_saes


def naive(
    hf: Any, ids: torch.Tensor, t: int, place: tuple[int, int], edits: torch.Tensor, horizon: int, steps: int
) -> Any:
    """KL of each condition at the tokens after the firing; ``edits [condition, d_key, d_value]``."""
    layer, head = place
    transposed = "mamba2" in hf.config.model_type
    name = "cache_params" if transposed else "past_key_values"
    past = DynamicCache(config=hf.config)
    hf(input_ids=ids[:, : t + 1], use_cache=True, **{name: past})
    futures = []
    for edit in (None, *edits):
        cache = copy.deepcopy(past)
        if edit is not None:
            cache.layers[layer].recurrent_states[0][0, head] += edit.T if transposed else edit
        pieces = ids[:, t + 1 : t + 1 + horizon].split(steps, 1)
        futures.append(torch.cat([hf(input_ids=x, use_cache=True, **{name: cache}).logits[0] for x in pieces]))
    return kl_from(torch.stack(futures[1:]), futures[0][None])


@torch.no_grad()
def main(
    site: Annotated[list[str] | None, typer.Option(help="MODEL/SAE; repeat for several.")] = None,
    firings: Annotated[int, typer.Option(help="Ours, a round.")] = 256,
    plain: Annotated[int, typer.Option(help="Of these, the naive replay's, a round.")] = 4,
    horizon: Annotated[int, typer.Option(min=1, help="Tokens after the firing.")] = 16,
    rounds: Annotated[int, typer.Option(help="Interleaved rounds; medians are shown.")] = 5,
    context: Annotated[int, typer.Option(help="Tokens a window.")] = 96,
    thousand: Annotated[bool, typer.Option(help="Time 1,000 firings of the whole test, too.")] = True,
) -> None:
    """Race the replacement test against a naive replay."""
    transformers.logging.set_verbosity_error()
    table = Table(
        title=f"{len(DEFAULT)} conditions, {horizon} tokens after the firing, {torch.get_num_threads()} thread(s)"
    )
    columns = ("site", "ours, firings/s", "naive, token by token", "ratio", "naive, at once", "ratio", "KL differs by")
    for column in (*columns, "1,000 firings, s"):
        table.add_column(column, justify="right")
    for name in site or [f"{m}/{sae.name}" for m in shipped_models() for sae in shipped_saes(m)]:
        model, sae = ws.HookedRecurrentModel.from_pretrained(name.split("/")[0]), ws.WriteSAE.from_pretrained(name)
        place, text = sae.place, heldout_documents()
        windows = windows_of(Run(model, text), context, horizon).tokens
        n = -(-firings // 8)
        ids, window = windows[:: len(windows) // n][:n], torch.arange(n).repeat_interleave(8)
        position = torch.randint(context // 4, context - horizon, (len(window),))
        results: dict[str, Any] = {}

        def ours(place=place, model=model, sae=sae, ids=ids, window=window, position=position, results=results) -> None:
            replayer = Replayer(model, [place], horizon=horizon, read="next")
            native = replayer.native(ids)
            own = native.write(place, window, position)
            activation, atom = (x[window, position] for x in top_atoms(native, sae))
            generators = Generators(0)
            writes = stacked([put_in(c, sae, own, atom, activation, generators) for c in DEFAULT])
            results["kl"] = replayer.futures(native, window, position, {place: writes}).kl
            divergence(native, window, position, {place: writes}, horizon)
            results["edits"] = (writes - own[:, None])[:plain].dense()

        def slow(
            steps: int, place=place, model=model, ids=ids, window=window, position=position, results=results
        ) -> None:
            for i in range(plain):
                row, t = ids[window[i]][None], int(position[i])
                found = naive(model.hf_model, row, t, place, results["edits"][i], horizon, steps)
                results["error"] = max(results.get("error", 0.0), float((found - results["kl"][i]).abs().max()))

        ours()
        runs = {"ours": ours, "steps": lambda slow=slow: slow(1), "once": lambda slow=slow: slow(horizon)}
        seconds = race(runs, rounds)
        mine, steps, once = (median(seconds[name]) for name in runs)
        rate, by_steps, at_once = len(window) / mine, plain / steps, plain / once
        took = float("nan")
        if thousand:
            start = time.perf_counter()
            ws.replacement_test(model, sae, text, n_firings=1000, horizon=horizon, context=context)
            took = time.perf_counter() - start
        row = (
            name,
            f"{rate:.0f}",
            f"{by_steps:.2f}",
            f"{rate / by_steps:.0f}",
            f"{at_once:.1f}",
            f"{rate / at_once:.1f}",
        )
        row = (*row, f"{results['error']:.1e}", f"{took:.1f}")
        table.add_row(*row)
        print(*row, sep=" | ", flush=True)
    Console(width=200).print(table)


if __name__ == "__main__":
    typer.run(main)
