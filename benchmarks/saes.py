"""SAEs against the paper's own code (a checkout of github.com/JackYoung27/writesae): training, encoding, extraction.

    python -m writesae.zoo.train_lm train runs/gdn128 --arch gdn128 --steps 500 --length 512 --batch 8   # 12 minutes
    python benchmarks/saes.py race runs/gdn128/model REFERENCE         # a training step, and loss against wall time
    python benchmarks/saes.py encode runs/gdn128/model REFERENCE       # codes of every state
    python benchmarks/saes.py extraction runs/gdn128/model tiny-gdn    # bytes per token, time against a forward pass
    python benchmarks/saes.py kill                                     # kill -9 at random moments

The states are those of a trained model with 128 x 128 heads on real text; SAEs have 2,048 atoms, 32 active, as the
paper's. The reference gets its states ready-made, and its recipe is that of its ``core/train.py``.
"""

from __future__ import annotations

import itertools
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import safetensors.torch
import torch
import transformers
import typer
from measure import median
from measure import race as timed_race
from rich.console import Console
from rich.table import Table
from torch import Tensor

from writesae import HookedRecurrentModel
from writesae.recurrence.dynamics import States
from writesae.saes import SAEConfig, Settings, WriteSAE, evaluate
from writesae.saes.training.collect import RECIPES
from writesae.saes.training.data import InMemory
from writesae.saes.training.run import Run
from writesae.stores.extraction import extract, record
from writesae.stores.texts import from_files
from writesae.zoo import corpus

app = typer.Typer(add_completion=False, help=__doc__)
console = Console(width=140)
SIZES = dict(d_key=128, d_value=128, n_atoms=2048, k=32)
Reference = Annotated[Path, typer.Argument(help="A checkout of the paper's code.")]
Model = Annotated[str, typer.Argument(help="A model with 128 x 128 heads.")]
Cache = Annotated[Path | None, typer.Option(help="Where the corpus is kept.")]


def states_of(model: str, layer: int, head: int, n_tokens: int, context: int, cache: Path | None) -> States:
    """The states of one head over a part of the corpus."""
    hooked = HookedRecurrentModel.from_pretrained(model)
    tokens = from_files(hooked, corpus.fetch(cache), context, n_tokens)
    store = record(hooked, tokens, [(layer, head)], progress=False)
    states = store.states(layer, head, slice(None))
    states.norm2  # noqa: B018  (known from here on)
    return states


class Theirs:
    """The step of the reference's ``core/train.py``, ``sae_type bilinear``, on states that are there already."""

    def __init__(self, reference: Path, states: States, steps: int, batch_size: int) -> None:
        sys.path.insert(0, str(reference))
        from core import train  # type: ignore[import-not-found]

        self.train, self.states, self.steps, self.batch_size = train, states, steps, batch_size
        torch.manual_seed(0)
        self.sae = train.BilinearMatrixSAE(d_k=128, d_v=128, n_features=2048, k=32)
        self.adam = torch.optim.Adam(self.sae.parameters(), lr=3e-4)
        self.order = torch.randperm(states.shape.numel())
        self.step, self.seconds = 0, 0.0

    def advance(self) -> None:
        chosen = self.order[self.step * self.batch_size :][: self.batch_size]
        batch = self.states.at(chosen // self.states.shape[1], chosen % self.states.shape[1])
        started = time.perf_counter()
        out = self.sae(batch)
        self.adam.zero_grad(set_to_none=True)
        out.loss.backward()
        for group in self.adam.param_groups:
            group["lr"] = self.train.get_lr(self.step, min(50, self.steps // 4), self.steps, 3e-4, 3e-5)
        self.adam.step()
        if self.step % 100 == 0:
            self.sae.normalize_decoder()
        if self.step > 0 and self.step % min(250, max(self.steps // 4, 1)) == 0:
            found = self.sae.resample_dead_features(batch)
            self.train._clear_resampled_optimizer_state(self.sae, self.adam, found)
        self.step += 1
        self.seconds += time.perf_counter() - started

    @torch.no_grad()
    def mse(self, held_out: Tensor) -> float:
        self.sae.eval()
        dead = self.sae.steps_since_active.clone()
        found = [float((self.sae(x).reconstruction - x).square().mean()) for x in held_out.split(256)]
        self.sae.steps_since_active.copy_(dead)
        self.sae.train()
        return sum(found) / len(found)


@app.command()
def race(
    model: Model,
    reference: Reference,
    layer: int = 1,
    head: int = 0,
    n_states: Annotated[int, typer.Option(help="States that each may see.")] = 102_400,
    context: Annotated[int, typer.Option(help="Tokens of a sequence.")] = 512,
    batch: Annotated[int, typer.Option(help="Our states a step; theirs are 256.")] = 512,
    cache: Cache = None,
    out: Annotated[Path | None, typer.Option(help="Write the curves there, as JSON; and a picture beside it.")] = None,
) -> None:
    """Loss against states and wall time, on the same states; the two take turns."""
    n_held_out = 8
    states = states_of(model, layer, head, n_states + n_held_out * context, context, cache)[
        : n_states // context + n_held_out
    ]
    every = len(states.log_decay) // n_held_out
    aside = torch.arange(n_held_out) * every + every // 2
    keep = torch.ones(len(states.log_decay), dtype=torch.bool)
    keep[aside] = False
    train, held_out = states[keep.nonzero()[:, 0]], states[aside].dense()[:, 3::4].flatten(0, 1)
    power = float(held_out.square().mean())
    n_states = train.shape.numel()
    recipe = {name: value for name, value in RECIPES["state"].items() if name in ("lr", "aux_weight")}
    steps = n_states // batch
    settings = Settings(steps=steps, batch_size=batch, resample_every=max(1, min(250, steps // 4)), **recipe)
    began = time.perf_counter()
    ours = Run(SAEConfig.variant("WriteSAE", **SIZES, target="state"), InMemory(train), settings)
    our_seconds = started = time.perf_counter() - began
    theirs = Theirs(reference, train, n_states // 256, 256)
    curves: dict[str, list[tuple[int, float, float]]] = {"ours": [], "theirs": []}
    per_step: dict[str, list[float]] = {"ours": [], "theirs": []}
    marks = sorted({int(n_states * 2**-i) for i in range(8)})
    while theirs.step * 256 < n_states - 255:
        before = theirs.seconds
        theirs.advance()
        per_step["theirs"].append((theirs.seconds - before) / 256)
        if any((theirs.step - 1) * 256 < mark <= theirs.step * 256 for mark in marks):
            curves["theirs"].append((theirs.step * 256, theirs.seconds, theirs.mse(held_out)))
            print("theirs", *curves["theirs"][-1], flush=True)
        while ours.left and ours.step * batch < theirs.step * 256:
            before = time.perf_counter()
            ours.one_step()
            per_step["ours"].append((time.perf_counter() - before) / batch)
            our_seconds += time.perf_counter() - before
            if any((ours.step - 1) * batch < mark <= ours.step * batch for mark in marks):
                curves["ours"].append((ours.step * batch, our_seconds, evaluate(ours.sae, held_out)["mse"]))
                print("ours", *curves["ours"][-1], flush=True)
    table = Table(title=f"Validation MSE as a share of the states' power, {torch.get_num_threads()} threads")
    for column in ("states seen", "ours", "after s", "reference", "after s"):
        table.add_column(column, justify="right")
    for (n, s, mse), (_, their_s, their_mse) in zip(curves["ours"], curves["theirs"], strict=False):
        table.add_row(f"{n:,}", f"{mse / power:.4f}", f"{s:.1f}", f"{their_mse / power:.4f}", f"{their_s:.1f}")
    console.print(table)
    # A step of ours beside the steps of theirs for as many states: the machine was as fast for both.
    beside = [median(per_step["theirs"][i * batch // 256 : (i + 1) * batch // 256]) for i in range(ours.step)]
    ratios = sorted(b / a for a, b in zip(per_step["ours"], beside, strict=True))
    rates = {name: 1 / median(seconds) for name, seconds in per_step.items()}
    quartiles = [ratios[len(ratios) * q // 4] for q in (1, 2, 3)]
    print(f"states/s, median step: ours {rates['ours']:.0f}, reference {rates['theirs']:.0f}")
    print(f"ratio of neighbouring steps: median {quartiles[1]:.1f}, quartiles {quartiles[0]:.1f} to {quartiles[2]:.1f}")
    ratio = (theirs.seconds / theirs.step / 256) / (our_seconds / ours.step / batch)
    print(f"over the whole training, our start ({started:.1f} s) and all revivals included: ratio {ratio:.1f}")
    print("atoms used on held-out states:", evaluate(ours.sae, held_out))
    if out is not None:
        out.write_text(json.dumps({"power": power, "curves": curves, "states_per_second": rates}, indent=1))
        draw(curves, power, out.with_suffix(".png"))


def draw(curves: dict[str, list[tuple[int, float, float]]], power: float, path: Path) -> None:
    """Loss against wall time."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 3.5), layout="constrained")
    for name, label in (("ours", "writesae, streaming"), ("theirs", "the paper's code")):
        _, seconds, mse = zip(*curves[name], strict=True)
        axis.plot(seconds, [m / power for m in mse], "o-", label=label)
    axis.set(
        xscale="log", xlabel="seconds", ylabel="validation MSE / power", title="128 x 128 states, 2,048 atoms, k=32"
    )
    axis.legend(frameon=False)
    figure.savefig(path, dpi=150)


@app.command()
def encode(
    model: Model, reference: Reference, layer: int = 1, head: int = 0, rounds: int = 7, cache: Cache = None
) -> None:
    """Codes of all atoms at every position: streaming, against dense encoders given the states."""
    states = states_of(model, layer, head, 8 * 512, 512, cache)
    one = states[:1]
    few = states.at(torch.zeros(256, dtype=torch.long), torch.arange(256, 512))
    torch.manual_seed(0)
    sae = WriteSAE(SAEConfig.variant("WriteSAE", **SIZES, target="state"))
    theirs = Theirs(reference, states, 1, 256).sae
    theirs.load_state_dict(
        {name: t for name, t in sae.state_dict().items() if name in theirs.state_dict()}, strict=False
    )
    with torch.no_grad():
        difference = float((sae.encode(one)[0, 256:] - sae.encode(few)).abs().max() / sae.encode(few).abs().max())
        runs: dict[str, tuple[int, Any]] = {
            "streaming, pre-activations": (512, lambda: sae.pre(one)),
            "streaming, the 32 active": (512, lambda: sae.topk(one)),
            "our dense encoder": (256, lambda: sae.pre(few)),
            "the reference's dense encoder": (256, lambda: theirs.encode(few)),
        }
        seconds = timed_race({name: run for name, (_, run) in runs.items()}, rounds)
    rate = {name: runs[name][0] / median(seconds[name]) for name in runs}
    table = Table(
        title=f"States encoded per second, {torch.get_num_threads()} threads; largest difference {difference:.1e}"
    )
    for column in ("", "states/s", "times the reference"):
        table.add_column(column)
    for name, value in rate.items():
        table.add_row(name, f"{value:,.0f}", f"{value / list(rate.values())[-1]:.1f}")
    console.print(table)


@app.command()
def extraction(
    models: list[str], rounds: int = 3, context: int = 512, sequences: int = 128, cache: Cache = None
) -> None:
    """Bytes per token, error of half precision, and time against the model's own forward pass."""
    transformers.logging.set_verbosity_error()
    columns = ("model", "heads kept", "bytes/token/head", "dense fp16 / that", "time / forward pass", "error of states")
    table = Table(
        *columns, title=f"Extraction of {sequences} sequences of {context}, {torch.get_num_threads()} threads"
    )
    for name in models:
        model = HookedRecurrentModel.from_pretrained(name)
        tokens = from_files(model, corpus.fetch(cache), context, sequences * context)[:sequences]
        every = [(site.layer, head) for site in model.sites for head in range(site.n_heads)]
        for sites in (every[-1:], every):
            table.add_row(name, str(len(sites)), *extracted(model, tokens, sites, rounds))
    console.print(table)


@torch.no_grad()
def extracted(model: HookedRecurrentModel, tokens: Tensor, sites: list[tuple[int, int]], rounds: int) -> list[str]:
    with tempfile.TemporaryDirectory() as folder:
        numbers = itertools.count()
        kept = lambda: extract(model, tokens, sites, Path(folder) / str(next(numbers)), progress=False)  # noqa: E731
        forward = lambda: [model.hf_model(input_ids=batch, use_cache=False) for batch in tokens.split(8)]  # noqa: E731
        seconds = timed_race({"forward": forward, "extract": kept}, rounds)
        ratio = median([e / f for e, f in zip(seconds["extract"], seconds["forward"], strict=True)])
        store = kept()
        worst = max(site["max"] for site in store.report["state_error"].values())
        return [
            f"{store.bytes_per_token / len(sites):.1f}",
            f"{store.times_smaller:.1f}",
            f"{ratio:.3f}",
            f"{worst:.1e}",
        ]


@app.command()
def kill(n: Annotated[int, typer.Option(help="Kills of each.")] = 10, seed: int = 0, cache: Cache = None) -> None:
    """kill -9 at random moments of an extraction and of a training; what comes out at the end, byte for byte."""
    texts = corpus.fetch(cache) / "moby-dick"
    extracting = ["extract", "tiny-gdn", "{}", "--site", "2.0", "--text", str(texts), "--max-tokens", "120000"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        survive(extracting, folder / "stores", n, seed)
        store = str(folder / "stores" / "whole")
        training = ["train", store, "{}", "--steps", "1200", "--atoms", "512", "--save-every", "50"]
        survive(training, folder / "saes", n, seed)


def survive(command: list[str], folder: Path, n: int, seed: int) -> None:
    """Run to the end once; then again and again, killed, and compare every time that it comes to its end."""

    def start(out: str) -> subprocess.Popen[bytes]:
        line = [sys.executable, "-m", "writesae.cli", *(part.format(folder / out) for part in command)]
        return subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    began = time.monotonic()
    assert start("whole").wait() == 0
    took, draw, kills, ends = time.monotonic() - began, random.Random(seed), 0, 0
    while kills < n or not ends:
        process = start("killed")
        try:
            process.wait(draw.uniform(0.2, 1.0) * took if kills < n else None)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            kills += 1
        if process.wait() == 0 or kills == n:
            assert start("killed").wait() == 0  # to the end, if it was not there yet
            ends += 1
            differences = different(folder / "whole", folder / "killed")
            if differences:
                raise SystemExit(f"{command[0]}: after {kills} kills these differ: {', '.join(differences)}")
            shutil.rmtree(folder / "killed")
    print(f"{command[0]}: {kills} kills, {ends} runs to the end after kills, all files the same at each")


def different(whole: Path, again: Path) -> list[str]:
    """Names of files that are not the same, but for the seconds that logs and checkpoints record."""
    names = [sorted(p.relative_to(x) for p in x.rglob("*") if p.is_file()) for x in (whole, again)]
    if names[0] != names[1]:
        return [str(p) for p in set(names[0]) ^ set(names[1])]
    same = {"checkpoint.safetensors": same_tensors, "metrics.jsonl": lambda a, b: lines(a) == lines(b)}
    plain = lambda a, b: a.read_bytes() == b.read_bytes()  # noqa: E731
    return [str(p) for p in names[0] if not same.get(p.name, plain)(whole / p, again / p)]


def same_tensors(a: Path, b: Path) -> bool:
    one, other = (safetensors.torch.load_file(x) for x in (a, b))
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def lines(path: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


if __name__ == "__main__":
    app()
