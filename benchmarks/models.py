"""Our own models against the plain loop and the official RWKV-7; long sequences through one layer of every kind.

    python benchmarks/models.py                     # both
    python benchmarks/models.py --no-long

Speed: four layers of eight 64 x 64 heads, hidden size 512, random weights, one sequence. ``step loop`` is the same
model with the recurrence computed token by token. The official RWKV-7 is the package ``rwkv`` on its CPU fp32 strategy,
with the same weights; it too goes token by token.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import tempfile
import time
from collections.abc import Callable
from itertools import product
from typing import Annotated, Any

import torch
import transformers
import typer
from measure import in_fresh_process, median, peak_memory, race
from rich.console import Console
from rich.table import Table

import writesae as ws
from writesae.models import formats
from writesae.recurrence import decay, rules, step_loop

OURS = {
    "rwkv7": ("RWKV7", dict(head_dim=64, intermediate_size=1024)),
    "delta_net": ("DeltaNet", dict(num_heads=8, intermediate_size=1024)),
    "gla": ("GLA", dict(num_heads=8, expand_k=1.0, intermediate_size=1024)),
}
THEIRS = {
    "gated_delta": ("Qwen3_5TextConfig", "Qwen3_5ForCausalLM", dict(
        layer_types=["linear_attention"], num_attention_heads=8, num_key_value_heads=2, head_dim=64,
        linear_num_key_heads=8, linear_num_value_heads=8, linear_key_head_dim=64, linear_value_head_dim=64,
        intermediate_size=1024,
    )),
    "mamba2": ("Mamba2Config", "Mamba2ForCausalLM", dict(
        state_size=64, head_dim=64, num_heads=16, n_groups=1, chunk_size=64,
    )),
    "kda": ("KimiLinearConfig", "KimiLinearForCausalLM", dict(
        layer_types=["linear_attention"], mlp_layer_types=["dense"], num_attention_heads=8, num_key_value_heads=8,
        linear_num_heads=8, linear_head_dim=64, kv_lora_rank=64, qk_nope_head_dim=64, v_head_dim=64,
        intermediate_size=1024,
    )),
}  # fmt: skip
COMMON = dict(vocab_size=1024, hidden_size=512, bos_token_id=0, eos_token_id=0, pad_token_id=0)


def build(kind: str, n_layers: int) -> Any:
    torch.manual_seed(0)
    size = COMMON | dict(num_hidden_layers=n_layers)
    if kind in OURS:
        name, values = OURS[kind]
        module = importlib.import_module(f"writesae.models.{kind}")
        return getattr(module, f"{name}ForCausalLM")(getattr(module, f"{name}Config")(**size, **values)).eval()
    config, model, values = THEIRS[kind]
    return getattr(transformers, model)(getattr(transformers, config)(**size, **values)).eval()


def by_steps(run: Callable[[], Any]) -> Callable[[], Any]:
    """``run`` with the recurrence of our models computed token by token."""

    def timed() -> Any:
        chunked, rules.chunked = rules.chunked, lambda *args, strength: step_loop(*args)  # type: ignore[assignment]
        try:
            return run()
        finally:
            rules.chunked = chunked  # type: ignore[assignment]

    return timed


def not_factored(run: Callable[[], Any]) -> Callable[[], Any]:
    """``run`` with a number for two tokens and a channel where a decay per key channel is mild (`decay`)."""

    def timed() -> Any:
        mild, decay.MILD = decay.MILD, -1.0
        try:
            return run()
        finally:
            decay.MILD = mild

    return timed


def of_authors(model: Any) -> dict[str, torch.Tensor]:
    """A RWKV-7 of ours under its authors' names and shapes."""
    tensors, theirs = model.state_dict(), {}
    blocks = [f"blocks.{i}.{name}" for i in range(model.config.num_hidden_layers) for name in formats._BLOCK]
    for name in (f"{stem}{suffix}" for stem in (*blocks, *formats._OUTSIDE) for suffix in ("", ".weight", ".bias")):
        ours, change = formats._renamed(name)
        if ours in tensors:
            x = tensors[ours]
            theirs[name] = x.t().contiguous() if change is formats._TURNED else x[None, None] if change else x
    return theirs


def official(model: Any, ids: torch.Tensor) -> dict[str, Callable[[], Any]]:
    """The authors' package with the same weights; refused if its logits are not ours."""
    os.environ |= {"RWKV_V7_ON": "1", "RWKV_JIT_ON": "1", "RWKV_CUDA_ON": "0"}
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        torch.save(of_authors(model), f"{folder}/x.pth")
        from rwkv.model import RWKV

        theirs = RWKV(model=f"{folder}/x", strategy="cpu fp32")
    run = lambda: theirs.forward(ids[0].tolist(), None, full_output=True)[0]  # noqa: E731
    difference = (run() - model(input_ids=ids).logits[0]).abs().max()
    assert difference < 1e-4, difference
    return {"rwkv package": run}


def speed(console: Console, pos: int, rounds: int) -> None:
    table = Table(title=f"1 x {pos} tokens, {torch.get_num_threads()} threads, {rounds} rounds")
    for column in ("", "tokens per second", "times the step loop"):
        table.add_column(column, justify="left" if not column else "right")
    for kind in OURS:
        model = build(kind, 4)
        ids = torch.randint(0, COMMON["vocab_size"], (1, pos), generator=torch.Generator().manual_seed(0))
        run = lambda model=model, ids=ids: model(input_ids=ids, use_cache=False).logits  # noqa: E731
        runs = {kind: run, f"{kind}, step loop": by_steps(run)}
        if kind != "delta_net":
            runs[f"{kind}, decays not factored"] = not_factored(run)
        if kind == "rwkv7":
            runs |= official(model, ids)
        seconds = race(runs, rounds)
        loop = seconds[f"{kind}, step loop"]
        for name, own in seconds.items():
            ratio = median([b / a for a, b in zip(own, loop, strict=True)])
            table.add_row(name, f"{pos / median(own):,.0f}", f"{ratio:.1f}")
    console.print(table)


def child(spec: str) -> None:
    """Seconds and peak memory of one layer over a long sequence, an edit at one head, in this fresh process."""
    kind, n_pos, kernels = json.loads(spec)
    torch.set_num_threads(1)
    model = ws.HookedRecurrentModel(build(kind, 1), kernels=kernels)
    write = ws.Write(torch.ones(model.sites[0].d_key), torch.ones(model.sites[0].d_value)) * 0.01

    def run(n: int) -> None:
        with torch.no_grad(), model.intervene(ws.Add(0, 0, write=write)):
            model.hf_model.base_model(input_ids=torch.zeros(1, n, dtype=torch.long), use_cache=False)

    run(64)  # what is allocated once, whatever the length
    start = time.thread_time()
    peak = peak_memory(lambda: run(n_pos))
    print(time.thread_time() - start, peak)


def long(console: Console) -> None:
    short, far = 4096, 16384
    table = Table(title="One wrapped layer, an edit at every token of one head, one sequence, one thread")
    for column in ("", f"s, {short:,}", f"s, {far:,}", "times", f"MiB, {short:,}", f"MiB, {far:,}", "times"):
        table.add_column(column, justify="left" if not column else "right")
    for kind, kernels in (*product(THEIRS, ("native", "writesae")), *((kind, "writesae") for kind in OURS)):
        (t1, m1), (t2, m2) = (in_fresh_process(__file__, kind, n, kernels) for n in (short, far))
        table.add_row(
            f"{kind}, {kernels}", f"{t1:.2f}", f"{t2:.2f}", f"{t2 / t1:.1f}", f"{m1:.0f}", f"{m2:.0f}", f"{m2 / m1:.1f}"
        )
    console.print(table)


def main(
    pos: Annotated[int, typer.Option(help="Tokens of the speed table.")] = 1024,
    rounds: Annotated[int, typer.Option(help="Rounds.")] = 7,
    long_: Annotated[bool, typer.Option("--long/--no-long", help="Also long sequences.")] = True,
    child_spec: Annotated[str | None, typer.Option("--child", hidden=True)] = None,
) -> None:
    """Tokens per second of our own models; time and memory over long sequences."""
    transformers.logging.set_verbosity_error()
    if child_spec is not None:
        return child(child_spec)
    console = Console()
    with torch.no_grad():
        speed(console, pos, rounds)
    if long_:
        long(console)


if __name__ == "__main__":
    typer.run(main)
