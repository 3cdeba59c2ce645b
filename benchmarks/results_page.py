"""The results page, docs/results.md, from reports of the shipped models:

    for model in tiny-gdn tiny-mamba2 tiny-rwkv7; do writesae reproduce --model $model --out runs/$model; done
    python benchmarks/results_page.py runs/tiny-gdn runs/tiny-mamba2 runs/tiny-rwkv7

The tables are made of the outcomes in these folders; what is said about them stands in docs/results_text.md. Each
model's whole report, with its figures, goes to docs/results/.
"""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from PIL import Image

from writesae.experiments.report.outcome import Outcome, load_outcome
from writesae.results.result import Number

DOCS = Path(__file__).resolve().parent.parent / "docs"
Row = tuple[str, ...]


class Report:
    """One model's outcomes."""

    def __init__(self, folder: Path):
        self.folder = folder
        found = [load_outcome(path.parent) for path in sorted(folder.glob("*/outcome.json"))]
        self.outcomes = {outcome.key: outcome for outcome in found}
        self.model = found[0].model_id or folder.name
        self.sites = sorted({site for outcome in found for site in outcome.sites})

    def outcome(self, experiment: str, name: str = "", site: tuple[int, int] | None = None) -> Outcome | None:
        place = "" if site is None else f"L{site[0]}H{site[1]}"
        return self.outcomes.get("_".join(part for part in (experiment, name, place) if part))

    def pooled(self, experiment: str, name: str = "") -> Outcome:
        start = f"{experiment}_{name}_L" if name else f"{experiment}_L"
        return next(outcome for key, outcome in self.outcomes.items() if key.startswith(start))


def number(outcome: Outcome | None, name: str) -> str:
    """A number by its name, with its interval; a dash where there is none."""
    found: Iterable[Number] = () if outcome is None else (x for x in outcome.numbers if x.name == name)
    return next(map(str, found), "-")


def table(head: Row, rows: Iterable[Row]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in (head, ("---",) * len(head), *rows)]
    return "\n".join(lines)


def of_sites(reports: Iterable[Report], make: Callable[[Report, tuple[int, int]], Row]) -> list[Row]:
    """A row for each head."""
    return [
        (f"`{report.model}` layer {layer} head {head}", *make(report, (layer, head)))
        for report in reports
        for layer, head in report.sites
    ]


def replacement(reports: list[Report]) -> str:
    def row(report: Report, site: tuple[int, int]) -> Row:
        place = f"L{site[0]}H{site[1]}"
        same, late = report.pooled("replacement_test"), report.pooled("replacement_test", "next")
        population = report.outcome("population_test", site=site)
        return (
            number(same, f"atom beats deletion, {place}"),
            number(same, f"atom beats deletion, in total, {place}"),
            number(late, f"atom beats deletion, {place}"),
            number(late, f"atom beats deletion, in total, {place}"),
            number(population, "atom beats deletion, mean over atoms"),
            number(population, "atom beats deletion, mean over atoms, in total"),
        )

    return table(
        ("head", "at the firing", "with the next 16 tokens", "cache slot: at t+1", "cache slot: in total",
         "per atom, at the firing", "per atom, in total"),
        of_sites(reports, row),
    )  # fmt: skip


def by_model(reports: list[Report], names: dict[str, str], outcome: Callable[[Report], Outcome | None]) -> str:
    rows = [(shown, *(number(outcome(report), name) for report in reports)) for name, shown in names.items()]
    return table(("", *(f"`{report.model}`" for report in reports)), rows)


def controls(reports: list[Report]) -> str:
    names = {
        "atom < deletion < random": "atom < deletion < random, at the firing",
        "atom < deletion < random, in total": "the same, in total",
        "matched-norm atom beats deletion, in total": "atom at the native norm beats deletion, in total",
        "another atom beats deletion, in total": "another atom beats deletion, in total",
        "matched-norm random beats deletion, in total": "random at the native norm beats deletion, in total",
        "orthogonal rank-1 beats deletion, in total": "orthogonal rank-1 beats deletion, in total",
        "flat-SAE top SVD beats deletion": "flat SAE's top singular pair beats deletion, at the firing",
        "flat-SAE top SVD beats deletion, in total": "the same, in total",
        "cluster bootstrap by atom": "atom beats deletion, interval over atoms",
        "atom beats deletion, smallest quarter of effects": "smallest quarter of effects",
        "atom beats deletion, largest quarter of effects": "largest quarter of effects",
        "median KL, atom": "median KL at the firing: atom",
        "median KL, deletion": "deletion",
        "median KL, random": "random",
        "Cliff's delta, in total": "Cliff's delta, in total",
    }
    return by_model(reports, names, lambda report: report.pooled("replacement_test"))


def logits(reports: list[Report]) -> str:
    names = (
        "exact through the norm",
        "first order",
        "three factors, prefactor fitted",
        "three factors",
        "proportional",
    )

    def row(report: Report, site: tuple[int, int]) -> Row:
        found = report.outcome("logit_change", site=site)
        small = (number(found, f"R², {name}, epsilon 0.1") for name in names)
        return (*small, *(number(found, f"R², {name}, epsilon 1") for name in names[:2]))

    short = ("exact through the norm", "first order", "three factors, prefactor fitted", "as they are", "proportional")
    return table(
        ("R² at", *(f"0.1: {name}" for name in short), *(f"1: {name}" for name in short[:2])), of_sites(reports, row)
    )


def attribution(reports: list[Report]) -> str:
    names = {
        f"{what}, {name}": f"{shown}, {name}"
        for name in ("exact through the norm", "contribution", "first order")
        for what, shown in (("correlation with deletions", "r"), ("R²", "R²"))
    }
    return by_model(reports, names, lambda report: report.outcome("attribution_test"))


def classes(reports: list[Report]) -> str:
    names = ("registers", "bundles", "null atoms", "dBIC, two components against one", "components that BIC prefers",
             "median cosine, registers", "median cosine, bundles")  # fmt: skip
    row = lambda report, site: tuple(number(report.outcome("atom_classes", site=site), name) for name in names)  # noqa: E731
    return table(("head", *names), of_sites(reports, row))


def steering(reports: list[Report]) -> str:
    def row(report: Report, site: tuple[int, int]) -> Row:
        formula, best = (report.outcome("sign_test", name, site) for name in ("", "gradient"))
        return (
            number(formula, "sign as predicted"),
            *(number(x, "target's log p rises") for x in (formula, best)),
            *(number(x, "median change of log p") for x in (formula, best)),
        )

    head = ("head", "formula: sign as predicted", "formula: log p rises", "gradient: log p rises",
            "formula: median change", "gradient: median change")  # fmt: skip
    return table(head, of_sites(reports, row))


def installing(reports: list[Report]) -> str:
    rows = []
    for report in reports:
        for key, outcome in report.outcomes.items():
            if outcome.experiment != "install" or "_1_" in key or key.startswith("install_1"):
                continue
            direction = next((way for way in ("gradient", "optimised") if way in key), "formula")
            layer, head = outcome.sites[0]
            where = f"all heads of layer {layer}" if "all_heads" in key else f"layer {layer} head {head}"
            strata = ("ranks 2 to 10", "ranks 11 to 100", "ranks 101 to 1000", "ranks 1001 and up")
            found = [number(outcome, f"inclusion, {stratum}").split(" ")[0] for stratum in strata]
            whole = (number(outcome, name).split(" ")[0] for name in ("inclusion", "inclusion, unmodified"))
            rows.append(
                (f"`{report.model}` {where}", direction, *whole, *found, number(outcome, "first-step lift"),
                 number(outcome, "p (McNemar)"))
            )  # fmt: skip
    head = ("where", "direction", "included", "unmodified", "ranks 2-10", "11-100", "101-1000", "over 1000",
            "first-step lift", "p")  # fmt: skip
    return table(head, sorted(rows))


def erasing(reports: list[Report]) -> str:
    names = {
        "median change of log p": "change of log p (median)",
        "p (Wilcoxon)": "p",
        "median change of log p, same firings": "the paper's way: token chosen on the same firings",
        "median change of log p, no firing: delete": "deletion where it does not fire",
        "median change of log p, no firing: plus 4": "4 a* added where it does not fire",
    }
    row = lambda report, site: tuple(number(report.outcome("erase", site=site), name) for name in names)  # noqa: E731
    return table(("head", *names.values()), of_sites(reports, row))


TABLES = {
    "replacement": replacement, "controls": controls, "logits": logits, "attribution": attribution, "classes": classes,
    "steering": steering, "installing": installing, "erasing": erasing,
}  # fmt: skip


def keep(report: Report) -> None:
    """The model's report and its figures, in few colours: a quarter of the size."""
    folder = DOCS / "results" / report.model
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "figures").mkdir(parents=True)
    (folder / "report.md").write_text((report.folder / "report.md").read_text())
    for path in sorted((report.folder / "figures").glob("*.png")):
        with Image.open(path) as image:
            small = image.convert("RGB").resize((image.width * 2 // 3, image.height * 2 // 3), Image.Resampling.LANCZOS)
            small.quantize(48).save(folder / "figures" / path.name, optimize=True)


def main(folders: list[str]) -> None:
    reports = [Report(Path(folder)) for folder in folders]
    text = (DOCS / "results_text.md").read_text()
    unknown = set(re.findall(r"\{\{(\w+)\}\}", text)) - TABLES.keys()
    if unknown:
        raise ValueError(f"docs/results_text.md asks for {sorted(unknown)}; there are {', '.join(TABLES)}")
    for name, make in TABLES.items():
        text = text.replace(f"{{{{{name}}}}}", make(reports))
    (DOCS / "results.md").write_text(text)
    for report in reports:
        keep(report)


if __name__ == "__main__":
    main(sys.argv[1:])
