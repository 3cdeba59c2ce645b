"""What hooks, caches, edits and SAEs cost on a GPU, against the same model unwrapped, once `writesae check` is content.

    python benchmarks/gpu.py                        # bfloat16, a model of Qwen3.5-0.8B's shape, 2,048 tokens
    python benchmarks/gpu.py --model tiny-gdn       # a shipped model, a hub id or a folder
    python benchmarks/gpu.py --device cpu --small   # try the script itself on a CPU

The model has random weights, so that nothing is downloaded. Where there is no accelerator, it says so and ends.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from measure import median, race
from rich.console import Console
from rich.table import Table

import writesae as ws
from writesae.hooks import name_of
from writesae.hooks.detached import detached
from writesae.models.load import load_model
from writesae.zoo import shipped_model

REAL = dict(
    vocab_size=248_320, hidden_size=1024, intermediate_size=3584, num_hidden_layers=24, num_attention_heads=8,
    num_key_value_heads=2, head_dim=256, linear_num_key_heads=16, linear_num_value_heads=16, linear_key_head_dim=128,
    linear_value_head_dim=128, tie_word_embeddings=True,
)  # fmt: skip
SMALL = REAL | dict(vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=4)
NEW_TOKENS = 32
N_ATOMS = 2048
UNWRAPPED, GENERATED = "unwrapped", f"{NEW_TOKENS} tokens generated, unwrapped"


def load(name: str | None, small: bool, dtype: torch.dtype, device: torch.device) -> Any:
    """A transformers model, not wrapped yet."""
    if name is not None:
        return load_model(shipped_model(name) or name, dtype=dtype).eval().to(device)
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            return transformers.Qwen3_5ForCausalLM(transformers.Qwen3_5TextConfig(**(SMALL if small else REAL))).eval()
    finally:
        torch.set_default_dtype(before)


def contestants(model: ws.HookedRecurrentModel, ids: torch.Tensor) -> dict[str, Callable[[], Any]]:
    """Ways of running the model over the same tokens, logits of the last one only; two of them run `detached`."""
    site = model.sites[len(model.sites) // 2]
    of_last = model.logits_of_last(1)
    write = ws.Write(torch.randn(site.d_key), torch.randn(site.d_value))
    cfg = ws.SAEConfig(site.d_key, site.d_value, n_atoms=N_ATOMS, k=1, encoder="tied", layer=site.layer, head=0)
    sae = ws.WriteSAE(cfg).to(model.device)
    of_layer = [name_of(q, site.layer) for q in model.family(site.layer).rule.inputs]
    of_all = [name_of(q, s.layer) for s in model.sites for q in model.family(s.layer).rule.inputs]

    def edited(what: Any) -> Callable[[], Any]:
        def run() -> Any:
            with model.intervene(what, check_model=False):
                return model(ids, **of_last)

        return run

    options: dict[str, Any] = dict(max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False)

    def generating(what: Any = None) -> Callable[[], Any]:
        def run() -> Any:
            with nullcontext() if what is None else model.intervene(what):
                return model.generate(ids, **options)

        return run

    edit = ws.Add(site.layer, 0, write=write, relative=True)
    return {
        UNWRAPPED: lambda: model.hf_model(input_ids=ids, use_cache=False, **of_last).logits,
        "nothing attached": lambda: model(ids, **of_last),
        "inputs of one layer cached": lambda: model.run_with_cache(ids, of_layer, **of_last),
        "inputs of every layer cached": lambda: model.run_with_cache(ids, of_all, **of_last),
        "an edit of one head": edited(edit),
        "an edit of every head of a layer": edited(ws.Add(site.layer, write=write, relative=True)),
        f"an SAE of {N_ATOMS} atoms in the place of writes": edited(ws.Substitute(sae)),
        GENERATED: lambda: model.hf_model.generate(ids, **options),
        f"{NEW_TOKENS} tokens generated": generating(),
        f"{NEW_TOKENS} tokens generated, one head edited": generating(edit),
    }


def waiting(run: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """``run``, over only when the device has done it."""

    def timed() -> Any:
        found = run()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        return found

    return timed


def peak(run: Callable[[], Any], device: torch.device) -> str:
    """MiB above what is there before, on CUDA."""
    if device.type != "cuda":
        return ""
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    return f"{(torch.cuda.max_memory_allocated(device) - before) / 2**20:.0f}"


def extraction(model: ws.HookedRecurrentModel, ids: torch.Tensor, n: int) -> float:
    """Tokens per second into a store, two heads."""
    tokens = torch.randint(0, int(ids.max()) + 1, (n, ids.shape[1]))
    heads = [(model.sites[0].layer, 0), (model.sites[-1].layer, 0)]
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        ws.extract(model, tokens, heads, Path(folder, "store"), batch_size=4, progress=False)
        return tokens.numel() / (time.perf_counter() - start)


def main(
    model: Annotated[
        str | None, typer.Option(help="A shipped model, a hub id or a folder; else random weights.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="Where; without it, the accelerator that is there.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "bfloat16",
    pos: Annotated[int, typer.Option(help="Tokens.")] = 2048,
    rounds: Annotated[int, typer.Option(help="Rounds.")] = 10,
    small: Annotated[bool, typer.Option("--small", help="A small model of the same heads.")] = False,
    check: Annotated[bool, typer.Option(help="Run `writesae check` on the model first.")] = True,
) -> None:
    """Time and memory on a GPU, beside the unwrapped model."""
    console = Console()
    if device is None and not torch.accelerator.is_available():
        console.print("no accelerator here: nothing to measure (--device cpu tries the script)")
        return
    where = torch.device(device) if device else torch.accelerator.current_accelerator()
    assert where is not None
    transformers.logging.set_verbosity_error()
    hooked = ws.HookedRecurrentModel(
        load(model, small, getattr(torch, dtype), where), model_id=model or "random weights"
    )
    if check:
        console.print(ws.check(hooked, costs=False).table())
    n_vocab = hooked.hf_model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(0, n_vocab, (1, pos), generator=torch.Generator().manual_seed(0)).to(where)
    with torch.no_grad():
        runs = {name: waiting(run, where) for name, run in contestants(hooked, ids).items()}
        seconds = race(runs, rounds, dict.fromkeys((UNWRAPPED, GENERATED), partial(detached, hooked.hf_model)))
        memory = {name: peak(run, where) for name, run in runs.items()}
    table = Table(title=f"{hooked.model_id}, 1 x {pos} tokens, {dtype}, {where}, {rounds} rounds")
    for column in ("", "ms, median", "times unwrapped", "MiB above the weights"):
        table.add_column(column, justify="right" if column else "left")
    for name, own in seconds.items():
        base = seconds[GENERATED if "generated" in name else UNWRAPPED]
        ratio = median([a / b for a, b in zip(own, base, strict=True)])
        table.add_row(name, f"{1000 * median(own):.1f}", f"{ratio:.3f}", memory[name])
    console.print(table)
    rate = extraction(hooked, ids, 8)
    console.print(f"extraction: {rate:,.0f} tokens per second; unwrapped: {pos / median(seconds[UNWRAPPED]):,.0f}")


if __name__ == "__main__":
    typer.run(main)
