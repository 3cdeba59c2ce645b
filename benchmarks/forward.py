"""Whole forward passes on our kernels (``kernels="writesae"``) against the same model unwrapped, in time and memory.

    python benchmarks/forward.py
    python benchmarks/forward.py gdn kda --tokens 1024 --rounds 15

Two layers with the head sizes of published models, random weights, a vocabulary of 1,024, one sequence, one thread. A
round times every contestant once, by the CPU time of the thread, so that other work on the machine counts little; the
ratio is the median over rounds. The edit adds a write at every token of one head. Our own models (RWKV-7, DeltaNet,
GLA) run on these kernels anyway, so of theirs it is the edit that is measured.
"""

from __future__ import annotations

import copy
import functools
import importlib
import json
import time
from collections.abc import Callable
from typing import Annotated, Any

import torch
import transformers
import typer
from cost import native
from measure import in_fresh_process, median, peak_memory, race
from rich.console import Console
from rich.table import Table

import writesae as ws

COMMON = dict(vocab_size=1024, num_hidden_layers=2, bos_token_id=0, eos_token_id=0, pad_token_id=0)
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {  # what it is called, config and model, sizes
    "gdn": ("Qwen3.5-0.8B, 16 heads of 128 x 128", "transformers.Qwen3_5Text", dict(
        hidden_size=1024, intermediate_size=3584, layer_types=["linear_attention"] * 2, num_attention_heads=8,
        num_key_value_heads=2, head_dim=256, linear_num_key_heads=16, linear_num_value_heads=16,
        linear_key_head_dim=128, linear_value_head_dim=128,
    )),
    "gdn_grouped": ("Qwen3.5-4B's heads, 32 of 128 x 128 with 16 keys", "transformers.Qwen3_5Text", dict(
        hidden_size=1024, intermediate_size=3584, layer_types=["linear_attention"] * 2, num_attention_heads=8,
        num_key_value_heads=2, head_dim=256, linear_num_key_heads=16, linear_num_value_heads=32,
        linear_key_head_dim=128, linear_value_head_dim=128,
    )),
    "mamba2": ("Mamba-2 370M, 32 heads of 128 x 64", "transformers.Mamba2", dict(
        hidden_size=1024, state_size=128, head_dim=64, num_heads=32, n_groups=1, chunk_size=256,
    )),
    "kda": ("Kimi-Linear's heads, 4 of 128 x 128", "transformers.KimiLinear", dict(
        hidden_size=512, intermediate_size=2048, layer_types=["linear_attention"] * 2, mlp_layer_types=["dense"] * 2,
        num_attention_heads=4, num_key_value_heads=4, linear_num_heads=4, linear_head_dim=128, kv_lora_rank=64,
        qk_nope_head_dim=64, v_head_dim=64,
    )),
    "rwkv7": ("RWKV-7 0.1B, 12 heads of 64 x 64", "writesae.models.rwkv7.RWKV7", dict(
        hidden_size=768, head_dim=64, intermediate_size=3072,
    )),
    "delta_net": ("DeltaNet's heads, 8 of 128 x 128", "writesae.models.delta_net.DeltaNet", dict(
        hidden_size=1024, num_heads=8, intermediate_size=2816,
    )),
    "gla": ("GLA 340M, 4 heads of 128 x 256", "writesae.models.gla.GLA", dict(
        hidden_size=1024, num_heads=4, intermediate_size=2816,
    )),
}  # fmt: skip
MODES = ("unwrapped", "our kernels", "our kernels, edit")


def build(name: str) -> Any:
    torch.manual_seed(0)
    module, _, stem = MODELS[name][1].rpartition(".")
    place = importlib.import_module(module)
    config = getattr(place, f"{stem}Config")(**COMMON, **MODELS[name][2])
    return getattr(place, f"{stem.removesuffix('Text')}ForCausalLM")(config).eval()


def token_ids(n_pos: int) -> torch.Tensor:
    return torch.randint(0, COMMON["vocab_size"], (1, n_pos), generator=torch.Generator().manual_seed(0))


def contestants(name: str) -> dict[str, Callable[[torch.Tensor], Any]]:
    bare = build(name)
    model = ws.HookedRecurrentModel(copy.deepcopy(bare), kernels="writesae")
    write = ws.Write(torch.ones(model.sites[0].d_key), torch.ones(model.sites[0].d_value)) * 0.01

    def edited(ids: torch.Tensor) -> Any:
        with model.intervene(ws.Add(0, 0, write=write)):
            return model(ids)

    return {
        "unwrapped": lambda ids: native(lambda: bare(input_ids=ids, use_cache=False).logits)(),
        "our kernels": model,
        "our kernels, edit": edited,
    }


def child(spec: str) -> None:
    """Peak memory of one run, in this fresh process."""
    name, n_pos, mode = json.loads(spec)
    torch.set_num_threads(1)
    with torch.no_grad():
        run = contestants(name)[mode]
        run(token_ids(64))  # what is allocated once, whatever the length
        print(peak_memory(lambda: run(token_ids(n_pos))))


def main(
    models: Annotated[list[str] | None, typer.Argument(help=f"Some of {', '.join(MODELS)}; all if none.")] = None,
    tokens: Annotated[list[int] | None, typer.Option(help="Lengths; 1,024 and 8,192 if none.")] = None,
    rounds: Annotated[int, typer.Option(help="Rounds with 1,024 tokens; a third of them with more.")] = 9,
    memory: Annotated[bool, typer.Option(help="Also peak memory.")] = True,
    child_spec: Annotated[str | None, typer.Option("--child", hidden=True)] = None,
) -> None:
    """Forward passes on our kernels against the unwrapped model."""
    transformers.logging.set_verbosity_error()
    if child_spec is not None:
        return child(child_spec)
    torch.set_num_threads(1)
    console = Console(width=160)
    for n_pos in tokens or [1024, 8192]:
        table = Table(title=f"1 x {n_pos:,} tokens, one thread, relative to unwrapped")
        for column in ("", "s unwrapped", "time", "time, edit", "MiB unwrapped", "memory", "memory, edit", "logits"):
            table.add_column(column, justify="left" if not column else "right")
        for name in models or list(MODELS):
            with torch.no_grad():
                ids = token_ids(n_pos)
                runs = {mode: functools.partial(run, ids) for mode, run in contestants(name).items()}
                difference = (runs["unwrapped"]() - runs["our kernels"]()).abs().max().item()
                seconds = race(runs, rounds if n_pos <= 1024 else max(3, rounds // 3), time.thread_time)
            base = seconds["unwrapped"]
            ratios = [median([b / a for a, b in zip(base, seconds[mode], strict=True)]) for mode in MODES[1:]]
            row = [MODELS[name][0], f"{median(base):.2f}", *(f"{ratio:.2f}" for ratio in ratios)]
            peaks = [in_fresh_process(__file__, name, n_pos, mode)[0] for mode in MODES] if memory else []
            row += [f"{peaks[0]:,.0f}", *(f"{peak / peaks[0]:.2f}" for peak in peaks[1:])] if memory else ["", "", ""]
            table.add_row(*row, f"{difference:.0e}")
        console.print(table)


if __name__ == "__main__":
    typer.run(main)
