"""The paper's experiments on any model with SAEs, one after the other, kept on disk and put into a report.

Each experiment ends as an outcome in a folder of its own. Started again, those that are there and were made with the
same settings are taken as they are; one that failed is tried again. So a stopped run loses at most one experiment.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from writesae.experiments.protocol import EXPERIMENTS, Asked, Sizes, Task, one_each, tasks_of
from writesae.experiments.report.outcome import Outcome, load_outcome, save_outcome
from writesae.experiments.report.report import write_report
from writesae.hooks.attachable import fit
from writesae.jobs.arguments import named_kinds
from writesae.jobs.extras import need
from writesae.jobs.progress import Bars, Progress
from writesae.model import HookedRecurrentModel
from writesae.models.wrappers import bare, in_half_precision
from writesae.results.result import Result
from writesae.saes import WriteSAE

__all__ = ["EXPERIMENTS", "Sizes", "reproduce"]


@named_kinds
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
        model, seed, check_model: see `Run`.
        saes: SAEs of its heads, one per head.
        texts: held-out text: nothing that the SAEs were trained on.
        out: folder of the outcomes and the report; one with outcomes in it is continued.
        only: names of experiments, yours among them if they are registered; None for all that apply.
        sizes: how much of everything.
        flat: SAEs of states with dense decoders, of the same heads, for the flat-SVD control (App. F.4).
        other_seeds: SAEs of the same heads trained with other seeds.
        console: where progress is shown; None for none.
        title: of the report.

    Returns:
        The outcomes, in the order of the report; those that failed have an ``error``.

    Raises:
        MissingExtra: the extras [plots] and [stats] are not installed; reports need both.
        ValueError: an unknown experiment, no SAE, or two of one head.
    """
    need("matplotlib", "pandas", "scipy", "sklearn")
    unknown = set(only or ()) - EXPERIMENTS.keys()
    if unknown:
        raise ValueError(f"no experiment {sorted(unknown)[0]!r}: there are {', '.join(EXPERIMENTS)}")
    for sae in (*saes, *flat, *other_seeds):
        fit(sae, model, check_model=check_model)
    one_each(saes)
    sizes = sizes or Sizes()
    texts = _some(model, texts, sizes.text)
    tasks = tasks_of(Asked(model, saes, texts, sizes, flat, other_seeds, seed, check_model), only)
    if not tasks:
        raise ValueError(f"nothing to run of {', '.join(only or ())}: seed_stability needs SAEs of other seeds")
    out, shared = Path(out), _shared(model, texts, seed)
    prints = {id(sae): sae.fingerprint() for sae in (*saes, *flat, *other_seeds)}
    outcomes: list[Outcome] = []
    with Bars(console, transient=True) as bars:
        whole = bars.add("experiments", len(tasks))
        for task in tasks:
            settings = _as_saved(task, shared, prints)
            outcome = _done(out / task.key, settings)
            there = outcome is not None
            if outcome is None:
                bar = bars.add(task.key)
                outcome = _run(out / task.key, task, settings, model, bar)
                bar.remove()
            outcomes.append(outcome)
            whole.advance()
            if there and task is not tasks[-1]:
                continue  # it is in the report that is there, or will be in the next
            write_report(out, outcomes, title=title or f"writesae: {model.model_id}", intro=_intro(model, saes))
    return outcomes


def _some(model: HookedRecurrentModel, texts: str | Sequence[str], n_tokens: int | None) -> str | Sequence[str]:
    """As many whole texts as have about so many tokens, evenly spread over all."""
    if isinstance(texts, str) or n_tokens is None:
        return texts
    total = sum(model.to_tokens(text)[0].shape[1] for text in texts)
    return texts[:: max(1, round(total / n_tokens))]


def _done(folder: Path, settings: Mapping[str, Any]) -> Outcome | None:
    """What is in the folder, if it was made with the same settings and did not fail."""
    try:
        outcome = load_outcome(folder)
    except (FileNotFoundError, ValueError):  # not there, or damaged: made again
        return None
    return outcome if outcome.settings == settings and outcome.error is None else None


def _run(folder: Path, task: Task, settings: Mapping[str, Any], model: HookedRecurrentModel, tell: Progress) -> Outcome:
    began = time.monotonic()
    try:
        result: Result | Exception = task.run(progress=tell, **task.settings)
    except Exception as error:  # one experiment that cannot be done, on too little text say, must not cost the others
        result = error
    return save_outcome(
        result,
        folder,
        task.experiment,
        settings,
        model_id=model.model_id,
        sites=task.heads,
        rule=(model.site(task.heads[0].layer) if task.heads else model.sites[0]).rule,
        seconds=time.monotonic() - began,
    )


def _as_saved(task: Task, shared: Mapping[str, Any], prints: Mapping[int, str]) -> dict[str, Any]:
    """Everything that the outcome depends on, as JSON gives it back; ``prints`` are those of the SAEs, by their id."""
    used = {f"SAE {i}": prints[id(sae)] for i, sae in enumerate(task.saes)}
    settings = {**shared, **used, **task.plain}
    return {name: list(x) if isinstance(x, tuple) else x for name, x in settings.items()}


def _shared(model: HookedRecurrentModel, texts: str | Sequence[str], seed: int) -> dict[str, Any]:
    digest = hashlib.sha256()
    for text in [texts] if isinstance(texts, str) else texts:
        digest.update(text.encode() + b"\0")
    weights = hashlib.sha256("".join(model.fingerprint(site.layer) for site in model.sites).encode()).hexdigest()
    return {
        "weights": weights[:16], "dtype": _dtype(model), "kernels": model.kernels, "text": digest.hexdigest()[:16],
        "seed": seed, **model.reading,
    }  # fmt: skip


def _dtype(model: HookedRecurrentModel) -> str:
    return str(bare(model.hf_model).dtype).removeprefix("torch.")


def _kernels(model: HookedRecurrentModel) -> str:
    return "" if model.kernels == "native" else ", recurrences on the kernels of writesae"


def _intro(model: HookedRecurrentModel, saes: Sequence[WriteSAE]) -> str:
    heads = ", ".join(
        f"layer {s.cfg.layer} head {s.cfg.head} ({s.cfg.n_atoms:,} atoms of a {s.cfg.target}, k={s.cfg.k})"
        for s in saes
    )
    n = sum(p.numel() for p in model.parameters()) / 1e6
    rounded = " **Its logits are rounded: effects of less than about a hundredth are lost (dtype float32 keeps them).**"
    note = rounded if in_half_precision(model.hf_model) else ""
    return (
        f"{model.model_id}: {type(model.hf_model).__name__}, {n:,.1f} M parameters, rule {model.sites[0].rule}, in "
        f"{_dtype(model)}{_kernels(model)}.{note} SAEs of {heads}. Intervals are 95%."
    )
