"""What hooks, caches and edits cost, against the same model unwrapped, in time and in memory.

    python benchmarks/cost.py                       # both models, 1,024 tokens; memory at 1,024 and 4,096
    python benchmarks/cost.py --model tiny-gdn --rounds 30
    python benchmarks/cost.py --model mamba-130m --pos 256 --rounds 5 --processor-time --one-layer

Models: the shipped ones; ``wide``, four layers of eight 128 x 128 heads as in Qwen3.5, hidden size 512, random weights;
``mamba-130m``, 24 layers of 1,536 channels of 16, random weights, a small vocabulary.
TransformerLens 4 takes part if it is installed; both run without the model's cache, which its hooks need.
"""

from __future__ import annotations

import copy
import json
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Annotated, Any

import torch
import transformers
import typer
from measure import in_fresh_process, median, peak_memory, race
from rich.console import Console
from rich.table import Table

import writesae as ws
from writesae.hooks import name_of
from writesae.hooks.dispatch import native as native_of
from writesae.hooks.families import FAMILIES
from writesae.models.load import load_model
from writesae.zoo import shipped_model

MODELS = ("tiny-gdn", "wide")
LAYER = 1  # the recurrent layer that is edited
MEMORY_MODES = ("unwrapped", "cached", "edit, one head", "edit, every head", "states, dense")


def load(name: str) -> Any:
    """A transformers model, not wrapped yet."""
    folder = shipped_model(name)
    if folder is not None:
        return load_model(folder, dtype=torch.float32).eval()
    torch.manual_seed(0)
    if name == "mamba-130m":
        return transformers.MambaForCausalLM(transformers.MambaConfig(vocab_size=1024)).eval()
    config = transformers.Qwen3_5TextConfig(
        vocab_size=1024, hidden_size=512, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=2, head_dim=64, linear_num_key_heads=8, linear_num_value_heads=8,
        linear_key_head_dim=128, linear_value_head_dim=128,
    )  # fmt: skip
    return transformers.Qwen3_5ForCausalLM(config).eval()


def native(run: Callable[[], Any]) -> Callable[[], Any]:
    """``run`` with transformers' own functions back in place: what the model costs without us in the process."""

    def timed() -> Any:
        swapped = []
        places = [(sys.modules.get(name), f) for f in FAMILIES for name in f.mixers]
        for module, family in places:
            for function in family.kernels + family.fused + family.helpers:
                ours = getattr(module, function, None)
                if ours is not None and native_of(ours) is not ours:
                    swapped.append((module, function, ours))
                    setattr(module, function, native_of(ours))
        try:
            return run()
        finally:
            for module, function, ours in swapped:
                setattr(module, function, ours)

    return timed


def contestants(name: str, n_pos: int, one_layer: bool = False) -> dict[str, Callable[[], Any]]:
    """What is timed; ``one_layer``: inputs of one layer are cached, not of all."""
    hf_model = load(name)
    bare = copy.deepcopy(hf_model)
    model = ws.HookedRecurrentModel(hf_model, model_id=name)
    ids = torch.randint(0, hf_model.config.vocab_size, (1, n_pos), generator=torch.Generator().manual_seed(0))
    site = model.site(LAYER)
    generator = torch.Generator().manual_seed(1)
    write = ws.Write(*(torch.randn(d, generator=generator) for d in (site.d_key, site.d_value))) * 0.01
    sites = [site] if one_layer else model.sites
    inputs = [name_of(q, s.layer) for s in sites for q in model.family(s.layer).rule.inputs]

    def edit(head: int | None) -> Callable[[], Any]:
        def run() -> Any:
            with model.intervene(ws.Add(LAYER, head, write=write)):
                return model(ids)

        return run

    def dense() -> Any:
        _, cache = model.run_with_cache(ids, names=inputs)
        return cache.state(LAYER, range(n_pos))

    return {
        "unwrapped": native(lambda: bare(input_ids=ids, use_cache=False).logits),
        "nothing attached": lambda: model(ids),
        "cached": lambda: model.run_with_cache(ids, names=inputs),
        "edit, one head": edit(0),
        "edit, every head": edit(None),
        "states, dense": dense,
    }


def rivals(name: str, n_pos: int) -> dict[str, Callable[[], Any]]:
    """TransformerLens on the same weights, if it is there; it has these quantities of Gated DeltaNet alone."""
    folder = shipped_model(name)
    try:
        from transformer_lens.model_bridge import TransformerBridge
    except ImportError:
        return {}
    if name != "tiny-gdn" or version("transformer-lens") < "4":  # 3 does not run it with today's transformers
        return {}
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = torch.randint(0, len(tokenizer), (1, n_pos), generator=torch.Generator().manual_seed(0))
    bridge = TransformerBridge.boot_transformers(
        str(folder), hf_model=load(name), tokenizer=tokenizer, device="cpu", dtype=torch.float32
    )
    names = [f"blocks.{s}.linear_attn.hook_{q}" for s in range(3) for q in ("q", "k", "v", "beta", "log_decay")]
    mixers = [block.linear_attn for block in bridge.blocks if hasattr(block, "linear_attn")]

    def eager_scan() -> Any:
        for mixer in mixers:
            mixer.eager_scan = True
        try:
            return bridge(ids, use_cache=False)
        finally:
            for mixer in mixers:
                mixer.eager_scan = False

    return {
        "TransformerLens, nothing attached": lambda: bridge(ids, use_cache=False),
        "TransformerLens, run_with_cache": lambda: bridge.run_with_cache(ids, names_filter=names, use_cache=False),
        "TransformerLens, eager_scan": eager_scan,
    }


def child(spec: str) -> None:
    """Peak memory of one run, in this fresh process."""
    model, n_pos, mode, one_layer = json.loads(spec)
    torch.set_num_threads(1)
    with torch.no_grad():
        contestants(model, 64, one_layer)[mode]()  # what is allocated once, whatever the length
        print(peak_memory(contestants(model, n_pos, one_layer)[mode]))


def main(
    model: Annotated[str | None, typer.Option(help="A shipped model or wide; tiny-gdn and wide if not given.")] = None,
    pos: Annotated[int, typer.Option(help="Tokens.")] = 1024,
    rounds: Annotated[int, typer.Option(help="Rounds.")] = 20,
    memory: Annotated[bool, typer.Option(help="Also measure peak memory, at --pos and four times that.")] = True,
    processor_time: Annotated[bool, typer.Option("--processor-time", help="For a busy machine.")] = False,
    one_layer: Annotated[bool, typer.Option("--one-layer", help="Cache the inputs of one layer, not of all.")] = False,
    child_spec: Annotated[str | None, typer.Option("--child", hidden=True)] = None,
) -> None:
    """Time and memory of hooks, caches and edits."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if child_spec is not None:
        return child(child_spec)
    console = Console()
    for name in [model] if model else MODELS:
        with torch.no_grad():
            runs = contestants(name, pos, one_layer) | rivals(name, pos)
            del runs["states, dense"]  # only for the memory table: it leaves the allocator in no state to race in
            seconds = race(runs, rounds, clock=time.process_time if processor_time else time.perf_counter)
        base = seconds["unwrapped"]
        table = Table(title=f"{name}, 1 x {pos} tokens, {torch.get_num_threads()} threads, {rounds} rounds")
        for column in ("", "ms, median", "times unwrapped"):
            table.add_column(column, justify="left" if not column else "right")
        for mode, own in seconds.items():
            ratio = median([a / b for a, b in zip(own, base, strict=True)])
            table.add_row(mode, f"{1000 * median(own):.1f}", f"{ratio:.3f}")
        console.print(table)
        if not memory:
            continue
        table = Table(title=f"{name}: peak memory of one run, MiB above the loaded model")
        for column in ("", f"{pos} tokens", f"{4 * pos} tokens"):
            table.add_column(column, justify="left" if not column else "right")
        for mode in MEMORY_MODES:
            table.add_row(
                mode, *(f"{in_fresh_process(__file__, name, n, mode, one_layer)[0]:.0f}" for n in (pos, 4 * pos))
            )
        console.print(table)


if __name__ == "__main__":
    typer.run(main)
