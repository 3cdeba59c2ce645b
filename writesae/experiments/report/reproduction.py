"""The paper's experiments on any model with SAEs, one after the other, kept on disk and put into a report.

Each experiment ends as an outcome in a folder of its own. Started again, those that are there and were made with the
same settings are taken as they are; one that failed is tried again. So a stopped run loses at most one experiment.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxtyping import Int
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from torch import Tensor

from writesae.experiments.amplifying import amplify
from writesae.experiments.classes import atom_classes
from writesae.experiments.deletions import attribution_test
from writesae.experiments.engine.conditions import check_sites, place_of, several
from writesae.experiments.erasing import erase
from writesae.experiments.installing import install
from writesae.experiments.logit_changes import logit_change
from writesae.experiments.population import population_test
from writesae.experiments.replacement import replacement_test
from writesae.experiments.report.outcome import Outcome, load_outcome, save_outcome
from writesae.experiments.report.report import write_report
from writesae.experiments.results.result import Result
from writesae.experiments.signs import sign_test
from writesae.experiments.stability import seed_stability
from writesae.experiments.token_classes import choose_atoms
from writesae.stores.texts import sequences, spread

if TYPE_CHECKING:
    from writesae.model import HookedRecurrentModel
    from writesae.saes import WriteSAE

Report = Callable[[int], Any]  # told how many units are done


@dataclass(frozen=True)
class Sizes:
    """How much of everything. The defaults take minutes on the shipped models and two cores.

    Attributes:
        firings: of the replacement test, each head and protocol.
        population: atoms of the population test.
        classes: tokens read to class atoms.
        logit: prompts of the test of predicted logit changes; so many atoms as a quarter of it.
        deletions: of the attribution test.
        erase: firings at which an atom is erased.
        signs: trials of the sign test.
        prompts: of installing and amplifying.
        tokens: generated while amplifying.
    """

    firings: int = 1000
    population: int = 100
    classes: int = 60_000
    logit: int = 48
    deletions: int = 1024
    erase: int = 150
    signs: int = 1000
    prompts: int = 40
    tokens: int = 100

    @classmethod
    def quick(cls) -> Sizes:
        """For a look: a few seconds an experiment, and intervals that are wide."""
        return cls(100, 10, 8_000, 16, 128, 24, 100, 8, 30)


@dataclass(frozen=True)
class Task:
    """One experiment to run.

    Attributes:
        experiment: name of its function; where only some are wanted, they are chosen by it.
        key: name of its folder.
        run: does it, given whom to tell of its progress.
        settings: that its result depends on, beside model, SAEs and text.
        saes: those it is about; none if it is about the model.
        sites: the heads.
    """

    experiment: str
    key: str
    run: Callable[[Report], Result]
    settings: Mapping[str, Any]
    saes: Sequence[WriteSAE]
    sites: Sequence[tuple[int, int]]


EXPERIMENTS = {
    "replacement_test": "an atom in place of what is written (section 3.2), both protocols",
    "population_test": "the same, atom by atom (App. F.2)",
    "atom_classes": "registers and bundles (section 3.1)",
    "seed_stability": "atoms of SAEs trained with other seeds (section 3.1); needs --other-seed",
    "logit_change": "predicted changes of logits (equation 1) and one backward pass",
    "attribution_test": "which writes made a prediction, against real deletions",
    "erase": "an atom taken out where it fires (section 4)",
    "sign_test": "a direction chosen for a token (section 4)",
    "install": "a token written into the memory (section 4)",
    "amplify": "a class of atoms amplified while generating (section 4)",
}


def reproduce(
    model: HookedRecurrentModel,
    saes: Sequence[WriteSAE],
    texts: str | Sequence[str],
    out: str | Path,
    *,
    only: Sequence[str] | None = None,
    sizes: Sizes | None = None,
    flat: Sequence[WriteSAE] = (),
    other_seeds: Sequence[WriteSAE] = (),
    seed: int = 0,
    check_model: bool = True,
    console: Console | None = None,
    title: str | None = None,
) -> list[Outcome]:
    """Run the experiments, and write ``report.md`` and ``report.html``.

    Args:
        model: the model.
        saes: SAEs of its heads, one a head.
        texts: held-out text: nothing that the SAEs were trained on.
        out: folder of the outcomes and the report; one with outcomes in it is continued.
        only: names of `EXPERIMENTS`; None for all that apply.
        sizes: how much of everything.
        flat: SAEs of states with dense decoders, of the same heads, for the flat-SVD control (App. F.4).
        other_seeds: SAEs of the same heads trained with other seeds.
        seed: of everything drawn.
        check_model: refuse SAEs trained on other weights.
        console: where progress is shown; None for none.
        title: of the report.

    Returns:
        The outcomes, in the order of the report; those that failed have an ``error``.

    Raises:
        ValueError: an unknown experiment, no SAE, or two of one head.
    """
    unknown = set(only or ()) - EXPERIMENTS.keys()
    if unknown:
        raise ValueError(f"no experiment {sorted(unknown)[0]!r}: there are {', '.join(EXPERIMENTS)}")
    check_sites(model, saes, check_model)
    for sae in (*flat, *other_seeds):
        sae.check_fits(model, check_model=check_model)
    tasks = [
        task
        for task in Plan(model, saes, texts, sizes or Sizes(), flat, other_seeds, seed, check_model).tasks()
        if only is None or task.experiment in only
    ]
    if not tasks:
        raise ValueError(f"nothing to run of {', '.join(only or ())}: seed_stability needs SAEs of other seeds")
    out, shared = Path(out), _shared(model, texts, seed)
    prints = {id(sae): sae_fingerprint(sae) for sae in (*saes, *flat, *other_seeds)}
    columns = [
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    ]
    outcomes: list[Outcome] = []
    with Progress(*columns, console=console or Console(quiet=True), transient=True) as progress:
        whole = progress.add_task("experiments", total=len(tasks))
        for task in tasks:
            settings = _as_saved(task, shared, prints)
            outcome = _done(out / task.key, settings)
            there = outcome is not None
            if outcome is None:
                bar = progress.add_task(task.key, total=None)
                tell = lambda done, bar=bar: progress.update(bar, completed=done)  # noqa: E731
                outcome = _run(out / task.key, task, settings, model, tell)
                progress.remove_task(bar)
            outcomes.append(outcome)
            progress.advance(whole)
            if there and task is not tasks[-1]:
                continue  # it is in the report that is there, or will be in the next
            write_report(out, outcomes, title=title or f"writesae: {model.model_id}", intro=_intro(model, saes))
    return outcomes


def _done(folder: Path, settings: Mapping[str, Any]) -> Outcome | None:
    """What is in the folder, if it was made with the same settings and did not fail."""
    try:
        outcome = load_outcome(folder)
    except (FileNotFoundError, ValueError):  # not there, or damaged: made again
        return None
    return outcome if outcome.settings == settings and outcome.error is None else None


def _run(folder: Path, task: Task, settings: Mapping[str, Any], model: HookedRecurrentModel, tell: Report) -> Outcome:
    began = time.monotonic()
    try:
        result: Result | Exception = task.run(tell)
    except Exception as error:  # one experiment that cannot be done, on too little text say, must not cost the others
        result = error
    layers = [layer for layer, _ in task.sites] or [model.sites[0].layer]
    return save_outcome(
        result,
        folder,
        task.experiment,
        settings,
        model_id=model.model_id,
        sites=task.sites,
        rule=model.site(layers[0]).rule,
        seconds=time.monotonic() - began,
    )


def _as_saved(task: Task, shared: Mapping[str, Any], prints: Mapping[int, str]) -> dict[str, Any]:
    """Everything that the outcome depends on, as JSON gives it back; ``prints`` are those of the SAEs, by their id."""
    used = {f"SAE {i}": prints[id(sae)] for i, sae in enumerate(task.saes)}
    settings = {**shared, **used, **task.settings}
    return {name: list(x) if isinstance(x, tuple) else x for name, x in settings.items()}


def _shared(model: HookedRecurrentModel, texts: str | Sequence[str], seed: int) -> dict[str, Any]:
    digest = hashlib.sha256()
    for text in [texts] if isinstance(texts, str) else texts:
        digest.update(text.encode() + b"\0")
    weights = hashlib.sha256("".join(model.fingerprint(site.layer) for site in model.sites).encode()).hexdigest()
    return {"weights": weights[:16], "text": digest.hexdigest()[:16], "seed": seed}


def sae_fingerprint(sae: WriteSAE) -> str:
    digest = hashlib.sha256(f"{sae.cfg.layer}.{sae.cfg.head}.{sae.cfg.target}.{sae.cfg.sparsity}".encode())
    for name, x in sorted(sae.state_dict().items()):
        digest.update(name.encode() + x.detach().cpu().float().numpy().tobytes())
    return digest.hexdigest()[:16]


def _intro(model: HookedRecurrentModel, saes: Sequence[WriteSAE]) -> str:
    heads = ", ".join(
        f"layer {s.cfg.layer} head {s.cfg.head} ({s.cfg.n_atoms:,} atoms of a {s.cfg.target}, k={s.cfg.k})"
        for s in saes
    )
    n = sum(p.numel() for p in model.parameters()) / 1e6
    return (
        f"{model.model_id}: {type(model.hf_model).__name__}, {n:,.1f} M parameters, rule {model.sites[0].rule}. SAEs "
        f"of {heads}. Intervals are 95%."
    )


# --- what is run ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """The tasks, from what `reproduce` was given."""

    model: HookedRecurrentModel
    saes: Sequence[WriteSAE]
    texts: str | Sequence[str]
    sizes: Sizes
    flat: Sequence[WriteSAE]
    other_seeds: Sequence[WriteSAE]
    seed: int
    check_model: bool

    def tasks(self) -> Iterator[Task]:
        yield from self.of_all()
        for sae in self.saes:
            yield from self.of_head(sae)
        run = lambda **settings: attribution_test(self.model, self.texts, **settings)  # noqa: E731
        yield self.task("attribution_test", [], run, n_deletions=self.sizes.deletions, seed=self.seed)

    def task(
        self, experiment: str, about: Sequence[WriteSAE], run: Callable[..., Result], name: str = "", **settings: Any
    ) -> Task:
        """An experiment on some heads, ``run`` with the settings; ``name`` tells several of one kind apart."""
        sites = list(dict.fromkeys(map(place_of, about)))
        place = "_".join(f"L{layer}H{head}" for layer, head in sites[:4]) + ("_and_more" if len(sites) > 4 else "")
        key = "_".join(part for part in (experiment, name, place) if part)
        others = [x for value in settings.values() for x in several(value) if hasattr(x, "cfg")]
        kept = {key: value for key, value in settings.items() if not any(hasattr(x, "cfg") for x in several(value))}
        return Task(experiment, key, lambda tell: run(progress=tell, **settings), kept, [*about, *others], sites)

    def of_all(self) -> Iterator[Task]:
        """The replacement test, all heads in one table."""
        saes = list(self.saes)
        given: dict[str, Any] = dict(n_firings=self.sizes.firings, seed=self.seed, check_model=self.check_model)
        given["conditions"] = ["atom", "matched", "delete", "random", "random_matched", "orthogonal", "other_atom"]
        if flat := [flat for sae in saes for flat in self.flat if place_of(flat) == place_of(sae)]:
            if len(flat) < len(saes):
                raise ValueError(f"{len(flat)} flat SAEs for {len(saes)} heads: give one for each head, or none")
            given["flat"] = flat
        run = lambda **settings: replacement_test(self.model, saes, self.texts, **settings)  # noqa: E731
        yield self.task("replacement_test", saes, run, **given)
        yield self.task("replacement_test", saes, run, "next", read="next", **given)
        if len({layer for layer, _ in map(place_of, saes)}) < len(saes):
            yield self.task("replacement_test", saes, run, "together", together=True, **given)

    def of_head(self, sae: WriteSAE) -> Iterator[Task]:
        """What is asked of each head by itself."""
        model, texts, sizes, one = self.model, self.texts, self.sizes, [sae]
        common: dict[str, Any] = dict(seed=self.seed, check_model=self.check_model)
        prompts = _prompts(model, texts, sizes.prompts)
        yield self.task(
            "population_test", one, lambda **s: _population(model, sae, texts, **s),
            n_atoms=sizes.population, max_tokens=sizes.classes, **common,
        )  # fmt: skip
        yield self.task(
            "atom_classes", one, lambda **s: atom_classes(model, sae, texts, **s), max_tokens=sizes.classes, **common
        )
        if seeds := [other for other in self.other_seeds if place_of(other) == place_of(sae)]:
            yield self.task("seed_stability", [sae, *seeds], lambda progress: seed_stability([sae, *seeds]))
        yield self.task(
            "logit_change", one, lambda **s: logit_change(model, sae, texts, **s),
            n_prompts=sizes.logit, atoms=max(4, sizes.logit // 4), **common,
        )  # fmt: skip
        yield self.task("erase", one, lambda **s: _erase(model, sae, texts, **s), n=sizes.erase, **common)
        for direction, name in (("formula", ""), ("gradient", "gradient")):
            yield self.task(
                "sign_test", one, lambda **s: sign_test(model, *place_of(sae), texts, **s), name,
                n=sizes.signs, direction=direction, seed=self.seed,
            )  # fmt: skip
        for direction, n_positions in (("formula", 3), ("formula", 1), ("gradient", 3), ("gradient", 1)):
            name = f"{n_positions}" if direction == "formula" else f"{direction}_{n_positions}"
            settings: dict[str, Any] = dict(direction=direction, n_positions=n_positions, seed=self.seed)
            scales = [3.0, 1.5, 6.0]
            yield self.task(
                "install", one, lambda **s: install(model, *place_of(sae), prompts, **s), name, scale=scales, **settings
            )
            if n_positions == 3 and sae is next(x for x in self.saes if place_of(x)[0] == place_of(sae)[0]):
                whole_layer = lambda **s: install(model, place_of(sae)[0], None, prompts, **s)  # noqa: E731
                yield self.task("install", one, whole_layer, f"{name}_all_heads", scale=3.0, **settings)
        yield self.task(
            "amplify", one, lambda **s: _amplify(model, sae, texts, prompts, **s), n_tokens=sizes.tokens, **common
        )


def _population(
    model: HookedRecurrentModel, sae: WriteSAE, texts: str | Sequence[str], max_tokens: int, **settings: Any
) -> Result:
    """With the classes of the atoms, so that registers and bundles are compared."""
    shared = {name: settings[name] for name in ("seed", "check_model")}
    classes = atom_classes(model, sae, texts, max_tokens=max_tokens, **shared).classes
    return population_test(model, sae, texts, classes=classes, **settings)


def _erase(model: HookedRecurrentModel, sae: WriteSAE, texts: str | Sequence[str], n: int, **settings: Any) -> Result:
    """Of the atom that fires most; at fewer firings than asked for if the text has no more."""
    codes = model.encode(sae, sequences(model, texts, 64), check_model=False)
    late = codes.indices[:, 16:][codes.values[:, 16:] > 0].bincount(minlength=sae.cfg.n_atoms)
    return erase(model, sae, int(late.argmax()), texts, n=min(n, int(late.max())), context=64, **settings)


def _amplify(
    model: HookedRecurrentModel, sae: WriteSAE, texts: str | Sequence[str], prompts: Tensor, **settings: Any
) -> Result:
    """Of the atoms that are more active at ends of sentences than elsewhere, as in the paper."""
    chosen = choose_atoms(model, sae, texts, "boundary", check_model=settings["check_model"])
    return amplify(model, chosen, prompts, ["sentence ends", "newlines", "paragraphs", "word length"], **settings)


def _prompts(model: HookedRecurrentModel, texts: str | Sequence[str], n: int, length: int = 24) -> Int[Tensor, "n pos"]:
    """Pieces of the text, evenly spread over it."""
    windows = sequences(model, texts, length)
    return spread(windows, n * length) if len(windows) > n else windows
