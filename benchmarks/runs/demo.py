"""The demo: a name is told once. Which write holds it, and what the model says when that write is changed."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from rich import box
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from torch import Tensor

from writesae.experiments import ReplacementResult, replacement_test
from writesae.gradients import Logit
from writesae.hooks import Delete, Intervention, Replace
from writesae.jobs.progress import Bars
from writesae.methods import Patching, patching
from writesae.model import HookedRecurrentModel, Memory
from writesae.recurrence import Write
from writesae.saes import Substitute, WriteSAE
from writesae.zoo import ZOO, heldout_documents, shipped_models, shipped_saes

NAME, OTHER = " Henry", " Robert"
TOLD = "The captain was called{}."
BETWEEN = " The ship went out of the harbour in the morning, and the people of the town looked at it for a long time."
ASKED = " It was written that the captain was called"
SEA = (
    "Captain Ahab stood upon the deck of the Pequod, and looked out over the waves for the white whale; the "
    "harpooneers and the mates were in the boats, and the old man cried out to them to row."
)
STATE = (
    "The Congress has passed the laws that were needed for the Treasury. The revenues of the Government for the fiscal "
    "year, and the expenditures of the departments, are in the report of the Secretary."
)
GOES_ON = " And the"
WIDTH = 78  # of everything that is printed


class Place(NamedTuple):
    """One write: of which layer and head, at which token."""

    layer: int
    head: int
    position: int


class Outcome(NamedTuple):
    """What the model says after an edit, and how likely the two names are."""

    done: str
    says: str
    name: float
    other: float


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

    with Bars(transient=True) as bars, torch.no_grad():
        n = sum(site.n_heads for site in model.sites) * len(model.to_str_tokens(story(NAME)))
        found = patching(
            model, story(OTHER), story(NAME), Logit(OTHER, minus=NAME), estimate=False,
            progress=bars.add("which write holds the name", n),
        )  # fmt: skip
    held = holders(model, found)
    console.print(told(model, found, held))
    outcomes = changed(model, held, saes)
    console.print(table_of(outcomes))
    console.print(swapped(model))

    with Bars(transient=True) as bars:
        lines = [bars.add(f"replacement test, {sae.place.words}", n_firings) for sae in saes]
        results = [
            replacement_test(model, sae, heldout_documents(), n_firings=n_firings, progress=bar)
            for sae, bar in zip(saes, lines, strict=True)
        ]
    console.print(replaced(results))
    if picture is not None:
        with console.status("drawing"):
            draw(found, held, outcomes, results, picture)
        console.print(f"Picture: {picture}")
    console.print(f"Done in {time.monotonic() - began:.0f} s.")


def story(name: str) -> str:
    """A name is told, the text goes on, and the name is asked for."""
    return TOLD.format(name) + BETWEEN + ASKED


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
    return Panel("\n".join(lines), title=name, width=WIDTH)


# The name ---------------------------------------------------------------------------------------------------------


def holders(model: HookedRecurrentModel, found: Patching, most: int = 12) -> list[Place]:
    """The fewest writes, in the order of what each restores, that make the model say the other name when exchanged."""
    other = writes_of(model, story(OTHER))
    places = [Place(*where) for *where, _ in found.top(most)]
    for n in range(1, most + 1):
        if said(model, exchanged(other, places[:n]))[0] == OTHER:
            return places[:n]
    return places


def told(model: HookedRecurrentModel, found: Patching, held: Sequence[Place]) -> Panel:
    """The story, and which writes hold the name."""
    text = Text.assemble(
        (TOLD.partition("{}")[0], "dim"), (NAME, "bold"), (f".{BETWEEN}{ASKED}", "dim"), (said(model, [])[0], "bold")
    )
    n_writes = found.grid.numel()
    which = [
        f"{'the one' if i == 0 else 'then'} at {found.tokens[t]!r} of layer {layer} head {head} "
        f"({float(found.restored[found.layers.index(layer), head, t]):.0%})"
        for i, (layer, head, t) in enumerate(held[:4])
    ]
    text.append(
        f"\n\nWhich of its {n_writes:,} writes holds the name? Each was exchanged for the one of a text that says "
        f"{OTHER.strip()}, by itself. What brings the other name: {', '.join(which)}"
        + (f", and {len(held) - 4} more." if len(held) > 4 else ".")
    )
    return Panel(text, title="A name is told once, and asked for later", width=WIDTH)


@torch.no_grad()
def changed(model: HookedRecurrentModel, held: Sequence[Place], saes: Sequence[WriteSAE]) -> list[Outcome]:
    """What the model says with those writes deleted, exchanged, or replaced by atoms; and controls."""
    own, other = writes_of(model, story(NAME)), writes_of(model, story(OTHER))
    elsewhere = [Place(layer, head, t + 1) for layer, head, t in held]
    of_head = {tuple(sae.place): sae for sae in saes}
    with_sae = [place for place in held if place[:2] in of_head]
    random = torch.Generator().manual_seed(0)
    rows: list[tuple[str, list[tuple[Intervention, Place]]]] = [
        ("nothing", []),
        (counted("{} deleted", held), [(Delete(p.layer, p.head), p) for p in held]),
        ("the writes at the next token deleted", [(Delete(p.layer, p.head), p) for p in elsewhere]),
        (f"exchanged for{OTHER}'s", exchanged(other, held)),
        ("a random write instead", [(Replace(p.layer, p.head, write=like(own[p], random)), p) for p in held]),
    ]
    if with_sae:
        atoms = {place: of_head[place[:2]].topk(other[place][None], 1) for place in with_sae}
        rows += [
            (counted("its atom for {}", with_sae), [(Substitute(of_head[p[:2]]), p) for p in with_sae]),
            (
                f"the atom of{OTHER}'s instead",
                [
                    (Replace(p.layer, p.head, write=of_head[p[:2]].atom(int(i[0, 0])) * float(value[0, 0])), p)
                    for p, (value, i) in atoms.items()
                ],
            ),
        ]
    made = [Outcome(words, *said(model, edits)) for words, edits in rows]
    before, after = (model.memory(TOLD.format(n) + BETWEEN) for n in (NAME, OTHER))
    memory = before.with_heads(after, every_head(model))
    return [*made, Outcome(f"all states of{OTHER}'s text", *answers(model, model(ASKED, memory=memory)))]


def every_head(model: HookedRecurrentModel) -> list[tuple[int, int]]:
    return [(site.layer, head) for site in model.sites for head in range(site.n_heads)]


def counted(words: str, places: Sequence[Place]) -> str:
    return words.format("that write" if len(places) == 1 else f"those {len(places)} writes")


@torch.no_grad()
def said(model: HookedRecurrentModel, edits: Sequence[tuple[Intervention, Place]]) -> tuple[str, float, float]:
    """What it answers, with edits at their tokens; and the probabilities of both names."""
    with ExitStack() as stack:
        for edit, place in edits:
            stack.enter_context(model.intervene(edit, positions=[place.position]))
        return answers(model, model(story(NAME)))


def answers(model: HookedRecurrentModel, logits: Float[Tensor, "1 pos vocab"]) -> tuple[str, float, float]:
    p = logits[0, -1].detach().float().softmax(-1)
    name, other = (float(p[model.to_single_token(n)]) for n in (NAME, OTHER))
    return model.to_str_tokens([int(p.argmax())])[0], name, other


def exchanged(other: Writes, places: Sequence[Place]) -> list[tuple[Intervention, Place]]:
    return [(Replace(p.layer, p.head, write=other[p]), p) for p in places]


class Writes:
    """What a model writes in a text, by place."""

    def __init__(self, writes: dict[int, Write]):
        self._writes = writes

    def __getitem__(self, place: Place) -> Write:
        return self._writes[place.layer][0, place.position, place.head]


@torch.no_grad()
def writes_of(model: HookedRecurrentModel, text: str) -> Writes:
    _, cache = model.run_with_cache(text, names=[n for n in model.hook_names if ".mixer." in n and "state" not in n])
    return Writes({site.layer: cache.write(site.layer) for site in model.sites})


def like(write: Write, random: torch.Generator) -> Write:
    """A random rank-1 write of the same size."""
    key, value = (torch.randn(x.shape[-1], generator=random).to(x) for x in (write.key, write.value))
    made = Write(key, value)
    return made * float(write.norm() / made.norm())


def table_of(outcomes: Sequence[Outcome]) -> Table:
    """What was changed, what the model says, and a bar for each name."""
    table = Table(title="What the model says after a change", box=box.SIMPLE_HEAD, width=WIDTH)
    table.add_column("changed in its memory")
    table.add_column("it says")
    for name in (NAME, OTHER):
        table.add_column(f"p({name.strip()})", width=18)
    for row in outcomes:
        bars = [Text(f"{p:4.0%} " + "█" * round(12 * p)) for p in (row.name, row.other)]
        table.add_row(row.done, Text(repr(row.says.strip())[1:-1]), *bars)
    return table


# Whole memories ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def swapped(model: HookedRecurrentModel) -> Panel:
    """How a text about the sea goes on, and how with the memory of another text."""
    sea, state = model.memory(SEA), model.memory(STATE)
    made: list[tuple[str, Memory]] = [
        ("after the text about a ship", sea),
        ("its states exchanged for the other text's", sea.with_heads(state, every_head(model))),
        ("after the text about the Treasury", state),
    ]
    lines = Text()
    for words, memory in made:
        text = model.generate(GOES_ON, memory=memory, max_new_tokens=16, do_sample=False, repetition_penalty=1.3)
        lines.append(f"{words}\n", style="dim").append(f"  {str(text).strip()}\n")
    return Panel(lines, title="A whole memory exchanged", width=WIDTH)


# Atoms ---------------------------------------------------------------------------------------------------------------


def replaced(results: Sequence[ReplacementResult]) -> Table:
    """One line per SAE: how often an atom in place of a write stays closer to the model than a deletion."""
    table = Table(
        title="Atoms in place of writes, on held-out text: closer to the model than a deletion",
        box=box.SIMPLE_HEAD, width=WIDTH,
    )  # fmt: skip
    for column in ("SAE", "firings", "at the firing", "with the next tokens", "a random write"):
        table.add_column(column, justify="left" if column == "SAE" else "right")
    for result in results:
        (layer, head) = result.places[0]
        rates = [result.wins("atom", "delete"), result.wins("atom", "delete", "through")]
        rates.append(result.wins("random", "delete", "through"))
        shown = (f"{100 * r.rate:.0f}% [{100 * r.low:.0f}, {100 * r.high:.0f}]" for r in rates)
        table.add_row(f"layer {layer} head {head}", str(result.n), *shown)
    return table


# The picture ---------------------------------------------------------------------------------------------------------


def draw(
    found: Patching,
    held: Sequence[Place],
    outcomes: Sequence[Outcome],
    results: Sequence[ReplacementResult],
    path: Path,
) -> None:
    """Which write brings the other name; what the model says after each change; and atoms in place of other writes."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "font.size": 9})
    figure = plt.figure(figsize=(11, 7.5), layout="constrained")
    top, below = figure.subfigures(2, 1, height_ratios=(1, 1))
    _draw_grid(top.subplots(), found, held)
    left, right = below.subplots(1, 2, width_ratios=(1.6, 1))
    _draw_outcomes(left, outcomes)
    _draw_rates(right, results)
    partial = path.with_name(path.name + ".partial")
    figure.savefig(partial, dpi=150, format="png")
    partial.replace(path)
    plt.close(figure)


def _draw_grid(axis: Any, found: Patching, held: Sequence[Place], most: int = 16) -> None:
    """The heads in which writes matter most, down; tokens across."""
    strength = found.restored.abs().amax(-1).flatten()
    heads = sorted(strength.topk(min(most, len(strength))).indices.tolist())
    grid = found.restored.flatten(0, 1)[heads].float().numpy()
    axis.imshow(grid, cmap="RdBu_r", vmin=-1, vmax=1, aspect="auto", interpolation="nearest")
    n = found.grid.shape[1]
    axis.set_yticks(range(len(heads)), [f"{found.layers[i // n]}.{i % n}" for i in heads], fontsize=7)
    axis.set_xticks(range(len(found.tokens)), [t.strip() for t in found.tokens], rotation=90, fontsize=8)
    rows = {(found.layers[i // n], i % n): y for y, i in enumerate(heads)}
    for layer, head, t in held:
        if (layer, head) in rows:
            axis.scatter([t], [rows[layer, head]], s=130, facecolors="none", edgecolors="0.1", lw=1.5)
    axis.set_ylabel("layer.head")
    axis.set_title(f"Which write holds {NAME.strip()}: red, if exchanged it brings {OTHER.strip()}", fontsize=10)


def _draw_outcomes(axis: Any, outcomes: Sequence[Outcome]) -> None:
    for y, row in enumerate(outcomes):
        for shift, p, color in ((-0.2, row.name, "C0"), (0.2, row.other, "C3")):
            axis.barh(y + shift, p, height=0.38, color=color)
        axis.text(1.02, y, row.says.strip(), va="center", fontsize=9, style="italic")
    axis.set_yticks(range(len(outcomes)), [row.done for row in outcomes])
    axis.invert_yaxis()
    axis.set_xlim(0, 1)
    axis.set_xlabel(f"probability of {NAME.strip()} (blue) and {OTHER.strip()} (red); beside it, what the model says")


def _draw_rates(axis: Any, results: Sequence[ReplacementResult]) -> None:
    for y, result in enumerate(results):
        for shift, when, color in ((-0.2, "at", "C0"), (0.2, "through", "#9ecae1")):
            rate = result.wins("atom", "delete", when)  # type: ignore[arg-type]
            axis.barh(y + shift, 100 * rate.rate, height=0.38, color=color)
            axis.plot([100 * rate.low, 100 * rate.high], [y + shift] * 2, color="0.1", lw=1.5)
    axis.set_yticks(range(len(results)), ["layer {}\nhead {}".format(*r.places[0]) for r in results])
    axis.axvline(50, color="0.3", lw=0.8, ls="--")
    axis.invert_yaxis()
    axis.set_xlim(0, 100)
    axis.set_xlabel("% of firings at which an atom is closer than a deletion")
    axis.set_title("at the firing (dark), with the next tokens (light)", fontsize=9)
