"""The demo: what a model writes to memory, an atom that replaces a write, an atom that steers. Offline, on a CPU."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.columns import Columns
from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from writesae.experiments import ReplacementResult, replacement_test
from writesae.experiments.replacement import When
from writesae.hooks import ActivationCache
from writesae.jobs.progress import Bars
from writesae.model import HookedRecurrentModel
from writesae.recurrence import Write
from writesae.saes import WriteSAE
from writesae.saes.activity.reading import encode_matrices, target_of
from writesae.zoo import ZOO, heldout_documents, shipped_models, shipped_saes

SENTENCE = "The Congress of the United States has the power to declare war, and the people have the right to peace."


def run(
    name: str = "tiny-gdn",
    n_firings: int = 300,
    picture: Path | None = None,
    console: Console | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | str | None = None,
) -> None:
    """Everything `writesae demo` shows.

    Args:
        name: a shipped model that comes with SAEs.
        n_firings: firings tested by the replacement test, per SAE.
        picture: PNG file to write; None for none.
        console: where to print; None for the standard output.
        device, dtype: of the model, see `HookedRecurrentModel.from_pretrained`.

    Raises:
        ValueError: not a shipped model that comes with SAEs.
    """
    console = console or Console()
    began = time.monotonic()
    if name not in shipped_models():
        raise ValueError(f"the demo needs a shipped model with SAEs: {', '.join(shipped_models())}; got {name}")
    with console.status(f"loading {name}"):
        model = HookedRecurrentModel.from_pretrained(name, device=device, dtype=dtype)
        saes = [WriteSAE.from_pretrained(folder, device=device) for folder in shipped_saes(name)]
    if not saes:
        raise ValueError(f"no SAEs are shipped with {name}")
    console.print(about(name, model, saes))
    console.print(written(model, saes[0], SENTENCE))

    with Bars(transient=True) as bars:
        lines = [bars.add(f"replacement test, {sae.place.words}", n_firings) for sae in saes]
        results = [
            replacement_test(model, sae, heldout_documents(), n_firings=n_firings, progress=bar)
            for sae, bar in zip(saes, lines, strict=True)
        ]
    for result in results:
        console.print(result.table())

    recipe = json.loads((ZOO / name / "demo.json").read_text())
    with console.status("steering"):
        console.print(steered(model, saes, **recipe))
    if picture is not None:
        with console.status("drawing"):
            draw(model, saes, results, picture)
        console.print(f"Picture: {picture}")
    console.print(f"Done in {time.monotonic() - began:.0f} s.")


def about(name: str, model: HookedRecurrentModel, saes: Sequence[WriteSAE]) -> Panel:
    """What was loaded."""
    record = json.loads((ZOO / name / "training.json").read_text())
    site = model.sites[0]
    n_parameters = sum(p.numel() for p in model.parameters()) / 1e6
    layers = ", ".join(str(s.layer) for s in model.sites)
    lines = (
        f"{type(model.hf_model).__name__}, {n_parameters:.1f} M parameters; recurrent layers {layers}, each with "
        f"{site.n_heads} states of {site.d_key} x {site.d_value}.",
        f"On held-out text it needs {record['held_out_bits_per_byte']:.2f} bits per byte "
        f"(xz -9: {record['xz_bits_per_byte']:.2f}).",
        "SAEs: " + "; ".join(f"{sae.place.words}, {sae.cfg.n_atoms} rank-1 atoms" for sae in saes) + ".",
    )
    return Panel("\n".join(lines), title=name, expand=False)


@torch.no_grad()
def read_writes(model: HookedRecurrentModel, sae: WriteSAE, text: str) -> tuple[ActivationCache, Write, Any, Any, Any]:
    """One pass: its cache, and by token the head's writes, the top atoms' activations, numbers and cosines."""
    layer, head = sae.place
    names = [name for name in model.hook_names if name.startswith(f"blocks.{layer}.mixer.") and "state" not in name]
    _, cache = model.run_with_cache(text, names=names)
    write = cache.write(layer)[0, :, head]
    values, indices = (x[0] for x in encode_matrices(sae, *target_of(cache, layer, head, sae.cfg.target)))
    return cache, write, values[:, 0], indices[:, 0], sae.atom(indices[:, 0]).cosine(write)


def written(model: HookedRecurrentModel, sae: WriteSAE, text: str, n_tokens: int = 12) -> Table:
    """What one head writes at the first tokens of a text, and the atom that stands for it."""
    layer, head = sae.place
    cache, write, values, indices, cosine = read_writes(model, sae, text)
    about = {"write norm": write.norm()}
    if f"blocks.{layer}.mixer.hook_beta" in model.hook_names:
        about["beta"] = cache["beta", layer][0, :, head]
    if f"blocks.{layer}.mixer.hook_log_decay" in model.hook_names:
        kept = cache["log_decay", layer][0, :, head].exp()
        about["memory kept"] = kept.reshape(len(kept), -1).mean(1)  # over key channels, where each has its own
    table = Table(
        title=f"What {sae.place.words} writes at each token", caption="cosine: of the atom and the write it stands for"
    )
    for column in ("token", *about, "top atom", "activation", "cosine"):
        table.add_column(column, justify="left" if column == "token" else "right")
    for t, token in enumerate(model.to_str_tokens(text)[:n_tokens]):
        numbers = (f"{float(x[t]):.2f}" for x in about.values())
        atom = (str(int(indices[t])), f"{float(values[t]):.2f}", f"{float(cosine[t]):.2f}")
        table.add_row(Text(repr(token)), *numbers, *atom)
    return table


def steered(
    model: HookedRecurrentModel,
    saes: Sequence[WriteSAE],
    *,
    layer: int,
    head: int,
    atom: int,
    scale: float,
    prompt: str,
    **generation: Any,
) -> Panel:
    """One text generated as it is, and with an atom added to every write."""
    sae = next(s for s in saes if s.place == (layer, head))
    before = model.generate(prompt, **generation)
    with model.intervene(sae, atom=atom, scale=scale):
        after = model.generate(prompt, **generation)
    sides = [
        Panel(Text(str(text)), title=title, width=56)
        for text, title in ((before, "before"), (after, f"with model.intervene(sae, atom={atom}, scale={scale:g}):"))
    ]
    more, less = (", ".join(map(repr, tokens)) for tokens in promoted(model, sae, atom, scale))
    about = Text(f"Over held-out text it makes more likely, on average: {more}\nless likely: {less}")
    return Panel(Group(Columns(sides), about), title=f"Steering a generation through {sae.place.words}", expand=False)


@torch.no_grad()
def promoted(
    model: HookedRecurrentModel, sae: WriteSAE, atom: int, scale: float, n: int = 8, context: int = 64
) -> tuple[list[str], list[str]]:
    """The tokens whose log-probability the atom raises and lowers most, on average over held-out text."""
    documents = [
        ids[:, :context] for ids in (model.to_tokens(d)[0] for d in heldout_documents()) if ids.shape[1] >= context
    ]
    ids = torch.cat(documents)
    native = model(ids).log_softmax(-1)
    with model.intervene(sae, atom=atom, scale=scale):
        change = (model(ids).log_softmax(-1) - native).mean((0, 1))
    order = change.argsort(descending=True).tolist()
    return tuple([model.tokenizer.decode([token]) for token in tokens] for tokens in (order[:n], order[::-1][:n]))  # type: ignore[return-value]


def draw(
    model: HookedRecurrentModel, saes: Sequence[WriteSAE], results: Sequence[ReplacementResult], path: Path
) -> None:
    """The picture: a write and its atom, the divergences firing by firing, the win rates."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "font.size": 9})
    figure = plt.figure(figsize=(13, 3.2 * len(saes)), layout="constrained")
    grid = figure.subplots(len(saes), 4, squeeze=False, width_ratios=(1, 1, 1.3, 1.1))
    for row, sae, result in zip(grid, saes, results, strict=True):
        _draw_write(row[0], row[1], model, sae)
        _draw_scatter(row[2], result)
        _draw_rates(row[3], result)
    figure.suptitle("One rank-1 atom in place of what the model writes to memory", fontsize=12)
    partial = path.with_name(path.name + ".partial")
    figure.savefig(partial, dpi=150, format="png")
    partial.replace(path)
    plt.close(figure)


@torch.no_grad()
def _draw_write(left: Any, right: Any, model: HookedRecurrentModel, sae: WriteSAE) -> None:
    """The write of the sentence that its atom matches at the median, as a matrix, beside that atom."""
    _, write, values, indices, cosine = read_writes(model, sae, SENTENCE)
    t = int(cosine.argsort()[len(cosine) // 2])
    matrices = (write[t].dense(), (sae.atom(int(indices[t])) * float(values[t])).dense())
    limit = max(float(m.abs().max()) for m in matrices)
    titles = (
        f"{sae.place.words} writes at {model.to_str_tokens(SENTENCE)[t]!r}",
        f"atom {int(indices[t])} at its activation (cosine {float(cosine[t]):.2f})",
    )
    for axis, matrix, title in zip((left, right), matrices, titles, strict=True):
        axis.imshow(matrix.numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest")
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("d_value")
        axis.set_xticks([])
        axis.set_yticks([])
    left.set_ylabel("d_key")


def _draw_scatter(axis: Any, result: ReplacementResult) -> None:
    atom, delete, random = (result.score(c, "through").clamp_min(1e-12) for c in ("atom", "delete", "random"))
    axis.scatter(atom, random, s=6, color="0.7", label="random")
    axis.scatter(atom, delete, s=6, color="C0", label="deletion")
    ends = [float(torch.stack([atom, delete, random]).quantile(q)) for q in (0.005, 0.999)]
    axis.plot(ends, ends, color="0.3", lw=0.8, ls="--")
    axis.set(
        xscale="log", yscale="log", xlabel="total KL with the atom (nats)", ylabel="total KL with something else (nats)"
    )
    axis.set_title(f"{result.n} firings; above the line the atom is closer", fontsize=9)
    axis.legend(frameon=False, loc="upper left", markerscale=2)


def _draw_rates(axis: Any, result: ReplacementResult) -> None:
    """Which one stays closer to the model: at the firing (dark), and summed with the tokens after it (light)."""
    pairs = (("atom", "delete"), ("matched", "delete"), ("delete", "random"), ("atom", "random"))
    for y, pair in enumerate(pairs):
        looks: tuple[tuple[float, str, When], ...] = ((-0.2, "C0", "at"), (0.2, "#9ecae1", "through"))
        for shift, color, when in looks:
            rate = result.wins(*pair, when)
            axis.barh(y + shift, 100 * rate.rate, height=0.38, color=color)
            axis.plot([100 * rate.low, 100 * rate.high], [y + shift] * 2, color="0.1", lw=1.5)
            axis.text(2, y + shift, f"{100 * rate.rate:.0f}%", va="center", fontsize=8)
    axis.set_yticks(range(len(pairs)), [f"{a}\nbeats {b}" for a, b in pairs])
    axis.axvline(50, color="0.3", lw=0.8, ls="--")
    axis.invert_yaxis()
    axis.set_xlim(0, 100)
    axis.set_xlabel("% of firings, with Wilson 95% interval")
    axis.set_title("closer: at the firing (dark), in total (light)", fontsize=9)
