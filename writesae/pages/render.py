"""Pages as HTML: what the templates are given, and how they are filled. Every text is escaped; nothing is fetched."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from writesae.pages.effects import FOLLOWED
from writesae.pages.study import Measured, Study, Tokens
from writesae.pages.survey import BIN
from writesae.results.statistics import wilson
from writesae.saes.activity.contexts import Context

TEMPLATES = Path(__file__).parent / "templates"
BINS = 24  # of the histogram
BETWEEN = "\x7f"  # stands between tokens, in fewer bytes than a list takes; in no token, since `plain` takes it out
SAMPLE = (12, 5)  # tokens before and after a firing at a quantile


STYLE = '<link rel="stylesheet" href="{}">'
SCRIPT = '<script src="{}"></script>'
HELP = re.compile(r'<a class="about" href="\.\./help\.html#(\w+)">What is this\?</a>')
POLICY = "'self' file:"  # whose scripts run: files of the site
HOME = "index.html"  # the index, from the folder of an SAE's pages


def render(template: str, **values: Any) -> str:
    """A page from ``templates/<template>.html``; style and script are files of the site (`assets`)."""
    return _environment().get_template(f"{template}.html").render(**{"page": template, "root": ""} | values)


def assets(study: Study, *, home: str = HOME) -> dict[str, str]:
    """The files that all pages of an SAE share: style, scripts, and what the pages' parts are."""
    return scripts() | {"help.html": render("help", study=study, cfg=study.sae.cfg, found=study.survey, home=home)}


def scripts() -> dict[str, str]:
    """Style and scripts."""
    return {f"assets/{name}": asset(name) for name in ("style.css", "index.js", "atom.js", "help.js")}


def alone(page: str, root: str, read: Callable[[str], str]) -> str:
    """A page that needs no other file: style, script and help are put into it, and no other script runs.

    Args:
        page: a page as `render` made it.
        root: what leads from it to the site's folder, ``"../"`` or nothing.
        read: a file of the site, by its path there.
    """
    name = next(n for n in re.findall(r'<script src="[./]*assets/(\w+)\.js">', page))
    script = read(f"assets/{name}.js")
    page = page.replace(STYLE.format(f"{root}assets/style.css"), f"<style>{read('assets/style.css')}</style>", 1)
    page = page.replace(SCRIPT.format(f"{root}assets/{name}.js"), f"<script>{script}</script>", 1)
    page = page.replace(f"style-src 'unsafe-inline' {POLICY}", "style-src 'unsafe-inline'", 1)
    page = page.replace(f"script-src {POLICY}", f"script-src '{script_hash(script)}'", 1)
    if HELP.search(page):
        parts = dict(re.findall(r'(?s)<section id="(\w+)">\n<h2>[^\n]*</h2>\n(.*?)\n</section>', read("help.html")))
        fold = lambda found: f"<details class=about><summary>What is this?</summary>{parts[found[1]]}</details>"  # noqa: E731
        page = HELP.sub(fold, page)
    return page


@cache
def _environment() -> Any:
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined,
        loader=jinja2.FileSystemLoader(TEMPLATES),
    )  # fmt: skip
    environment.filters |= {"visible": visible, "number": number, "percent": percent, "signed": signed}
    environment.filters["compact"] = compact
    return environment


@cache
def asset(name: str) -> str:
    """A style sheet or script of ours."""
    return (TEMPLATES / name).read_text(encoding="utf-8")


def script_hash(script: str) -> str:
    """What lets this script run, and no other that text might bring along."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def compact(x: Any) -> Any:
    """JSON in few bytes, which may stand in a page: no markup is left in it."""
    from markupsafe import Markup

    text = json.dumps(x, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


# --- text and numbers -------------------------------------------------------------------------------------------------


def visible(token: str) -> str:
    """A token so that one sees it: ``·`` for spaces at its ends, ``↵`` for a new line, names for control characters."""
    if not token:
        return "∅"
    inner = token.strip(" ")
    left = len(token) - len(token.lstrip(" "))
    ends = "·" * left, "·" * (len(token) - left - len(inner)) if inner else ""
    return ends[0] + plain(inner) + ends[1]


def plain(text: str) -> str:
    """On one line, without control characters."""
    shown = text.replace("\r\n", "↵").replace("\n", "↵").replace("\r", "↵").replace("\t", "⇥")
    return "".join(chr(0x2400 + ord(c)) if ord(c) < 32 else "␡" if c == BETWEEN else c for c in shown)


def number(x: float, digits: int = 3) -> str:
    """A number in few digits: 0.00312, 0.260, 12.3, 1,234; a dash for NaN."""
    if x != x:
        return "–"
    return f"{x:,.0f}" if abs(x) >= 1000 else f"{x:#.{digits}g}".removesuffix(".")


def signed(x: float) -> str:
    return ("+" if x > 0 else "−" if x < 0 else "") + number(abs(x))


def percent(x: float) -> str:
    """A share: 12%, 0.53%, 0.0018%; a dash for NaN."""
    return "–" if x != x else f"{100 * x:.0f}%" if x >= 0.0995 else f"{100 * x:.2g}%"


# --- one atom ---------------------------------------------------------------------------------------------------------


def atom_page(study: Study, atom: int, *, command: str, home: str = HOME) -> str:
    """The page of an atom. ``command`` is what measures more, told where something was not measured; ``home`` leads to
    the index, from the folder of the SAE's pages."""
    return render("atom", root="../", **atom_values(study, atom), command=command, home=home)


def atom_values(study: Study, atom: int) -> dict[str, Any]:
    """Everything that the template shows of an atom."""
    cfg, found = study.sae.cfg, study.survey
    classes, fired = found.classes, int(found.seen.firings[atom])
    done, n_sample, peak = study.measured.get(atom), len(found.sample(atom)["token"]), float(found.seen.largest[atom])
    cosines = ("cosine", "key_cosine", "value_cosine", "elsewhere")
    data = atom_data(study, atom)
    return dict(
        atom=atom, n_atoms=cfg.n_atoms, study=study, cfg=cfg, found=found, fired=fired, rate=fired / found.n_tokens,
        peak=peak, mean=float(classes.mean_activation[atom]), kind=str(classes.classes[atom]), n_sample=n_sample,
        cosines={name: float(getattr(classes, name)[atom]) for name in cosines}, contexts=bool(data["contexts"]),
        samples=bool(data["samples"]), fires_at=fires_at(study, atom), direct=bars_of(study.distinct[atom]),
        positions=[dict(rate=n / max(1, of)) for n, of in zip(data["fired"], data["tokens"], strict=True)],
        measured=measured(done), factors=[(name, data[name]) for name in ("key", "value")], data=data,
        label=label_values(study, atom), share=float(study.decoder.share[atom]), norm=float(study.decoder.norm[atom]),
    )  # fmt: skip


def atom_data(study: Study, atom: int) -> dict[str, Any]:
    """What the page's script makes contexts, bars and factors of (``atom.js``)."""
    found, done = study.survey, study.measured.get(atom)
    activations = found.sample(atom)["activation"].numpy()
    highest = float(activations.max(initial=0.0))
    counts = np.histogram(activations, BINS, (0.0, highest))[0].tolist() if len(activations) else []
    factors = {name: [digits(x) for x in getattr(study.decoder, name)[atom].tolist()] for name in ("key", "value")}
    near = zip(*(rows[atom] for rows in study.nearest), strict=True)
    beside = zip(found.together[atom].tolist(), found.together_n[atom].tolist(), strict=True)
    other = lambda i, x: [i, x, str(found.classes.classes[i]), visible(top) if (top := fires_most_at(study, i)) else ""]  # noqa: E731
    return factors | dict(
        nearest=[other(i, digits(c)) for i, c in near], together=[other(i, n) for i, n in beside if i >= 0],
        peak=digits(float(found.seen.largest[atom])), highest=digits(highest), counts=counts,
        fired=found.by_position[atom].tolist(), tokens=found.tokens_by_position.tolist(), bin=BIN,
        contexts=[context_data(context) for context in found.strongest[atom]],
        samples=[sample_data(study, *one) for one in found.at_quantiles(atom)] if study.windows else [],
        readers=[[r.place, line(r.tokens), sparse(r.shares)] for r in (done.readers if done else ())],
    )  # fmt: skip


def context_data(context: Context) -> list[Any]:
    """Activation, text, token in it, place among the tokens shown, these tokens, activations of the active ones."""
    words = line((*context.before, context.token, *context.after))
    place = len(context.before)
    return [digits(context.activation), context.document, context.position, place, words, sparse(context.activations)]


def sample_data(study: Study, share: float, activation: float, window: int, position: int) -> list[Any]:
    """Share of weaker firings, activation, place among the tokens shown, these tokens."""
    tokens, start = study.windows[window].tokens, max(0, position - SAMPLE[0])
    words = line([study.string(token) for token in tokens[start : position + SAMPLE[1] + 1].tolist()])
    return [share, digits(activation), position - start, words]


def sparse(values: Sequence[float]) -> list[tuple[int, float]]:
    """Those that are not 0, with their places."""
    return [(i, digits(x)) for i, x in enumerate(values) if x > 0]


def digits(x: float) -> float:
    """To four digits."""
    return float(f"{x:.4g}")


def line(words: Sequence[str]) -> str:
    """Tokens, with `BETWEEN` between them."""
    return BETWEEN.join(map(shown, words))


def shown(word: str) -> str:
    """A token on one line."""
    return plain(word) or "∅"


def label_values(study: Study, atom: int) -> dict[str, Any] | None:
    """What the atom means and how well the label does; None if there is none."""
    label = study.labels.get(atom)
    if label is None or label.text is None:
        return None
    names = {"detection": label.detection, "fuzzing": label.fuzzing}
    scores = [(name, score.balanced_accuracy) for name, score in names.items() if score is not None]
    return dict(text=plain(label.text), scores=scores)


def fires_at(study: Study, atom: int) -> list[tuple[str, float]]:
    """The tokens that the atom fires at most, and the share of its firings that each has."""
    return [(study.string(token), share) for token, share in study.survey.fires_at[atom]]


def fires_most_at(study: Study, atom: int) -> str:
    return next((token for token, _ in fires_at(study, atom)), "")


def bars_of(tokens: Tokens) -> dict[str, Any]:
    """Lists of tokens with their values and how long their bars are."""
    longest = max((abs(v) for _, v in (*tokens.promoted, *tokens.suppressed)), default=0) or 1.0
    lists = dict(promoted=tokens.promoted, suppressed=tokens.suppressed)
    return {
        name: [dict(token=token, value=value, length=round(abs(value) / longest, 3)) for token, value in rows]
        for name, rows in lists.items()
    }


def measured(found: Measured | None) -> dict[str, Any] | None:
    """What running the model said, None if it was not run for this atom."""
    if found is None:
        return None
    by_prompt: dict[str, list[dict[str, Any]]] = {}
    for one in found.steered:
        parts = {
            name: (plain("".join(words[: one.same])), plain("".join(words[one.same :])))
            for name, words in (("plain", one.plain), ("steered", one.steered))
        }
        by_prompt.setdefault(one.prompt, []).append(
            dict(scale=one.scale, same=one.same, prompt=plain(one.prompt), **parts)
        )
    r, rows = found.replaced, []
    if r is not None:
        counts = (
            ("at the firing", r.wins),
            (f"at the firing and the {FOLLOWED} tokens after it", r.wins_total),
            ("at the firing, with the write's norm", r.wins_matched),
        )
        rows = [(what, wilson(count, r.n)) for what, count in counts]
    tokens, steered = bars_of(found.tokens), list(by_prompt.values())
    return dict(tokens=tokens, agreement=found.agreement, replaced=r, wins=rows, steered=steered)


# --- the index --------------------------------------------------------------------------------------------------------


def index_rows(*studies: Study) -> list[dict[str, Any]]:
    """What the index knows of every atom of every SAE."""
    return [index_row(study, atom) for study in studies for atom in range(study.sae.cfg.n_atoms)]


def index_page(*studies: Study, command: str, rows: list[dict[str, Any]] | None = None) -> str:
    """The index of all atoms of one SAE, or of several, each of which has a folder of its own beside the index. It
    searches and sorts itself. ``rows`` are `index_rows`, if they were made already."""
    rows = index_rows(*studies) if rows is None else rows
    heads = [head_values(study, [row for row in rows if row["head"] == study.sae.place.folder]) for study in studies]
    classes = {name: sum(row["class"] == name for row in rows) for name in ("register", "bundle", "null")}
    about = dict(
        name=title(studies), marks=", ".join(study.name for study in studies),
        heads=[head["head"] for head in heads] if len(heads) > 1 else [],
    )  # fmt: skip
    labelled_by = ", ".join(dict.fromkeys(study.labelled_by for study in studies if study.labels))
    n_atoms, n_measured = max(study.sae.cfg.n_atoms for study in studies), sum(row["measured"] for row in rows)
    return render(
        "index", heads=heads, about=about, rows=rows, classes=classes, command=command, n_atoms=n_atoms,
        n_measured=n_measured, labelled_by=labelled_by, source=studies[0].source, read=studies[0].survey,
    )  # fmt: skip


def title(studies: Sequence[Study]) -> str:
    """What the pages of these are about: the SAE's name, or how many heads of which model."""
    first = studies[0]
    return (
        first.name if len(studies) == 1 else f"{len(studies)} heads of {first.sae.cfg.model_id or first.model.model_id}"
    )


def head_values(study: Study, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What the index says of an SAE; ``split`` is the least cosine of its registers."""
    split = min((row["cosine"] for row in rows if row["class"] == "register"), default=None)
    supported = study.survey.classes.two_supported
    return dict(name=study.name, head=study.sae.place.folder, cfg=study.sae.cfg, split=split, supported=supported)


def index_row(study: Study, atom: int) -> dict[str, Any]:
    """What the index knows of an atom: numbers to sort by, texts to show and to search in."""
    found, classes = study.survey, study.survey.classes
    contexts, fired = found.strongest[atom], int(found.seen.firings[atom])
    done, tokens, at = study.measured.get(atom), study.distinct[atom], fires_at(study, atom)
    of = lambda x: digits(float(x)) if fired and float(x) == float(x) else None  # noqa: E731
    label = study.labels.get(atom)
    row: dict[str, Any] = {
        "head": study.sae.place.folder, "atom": atom, "label": plain(label.text) if label and label.text else "",
        "class": str(classes.classes[atom]), "rate": fired / found.n_tokens,
        "mean": of(classes.mean_activation[atom]), "peak": of(found.seen.largest[atom]),
        "cosine": of(classes.cosine[atom]), "focus": digits(at[0][1]) if at else None,
        "promotion": digits(tokens.promoted[0][1]) if tokens.promoted else None,
        "wins": round(done.replaced.wins / done.replaced.n, 4) if done and done.replaced else None,
        "at": visible(at[0][0]) if at else "", "measured": done is not None,
        "fires": [plain(token) for token, _ in at], "promotes": [visible(token) for token, _ in tokens.promoted[:3]],
        "context": [], "text": "\n".join(plain("".join((*c.before, c.token, *c.after))) for c in contexts),
        "tokens": "\n".join(token for token, _ in (*tokens.promoted, *(done.tokens.promoted if done else ()))),
    }  # fmt: skip
    if contexts:
        before, after = (plain("".join(words)) for words in (contexts[0].before[-6:], contexts[0].after[:3]))
        row["context"] = [before, plain(contexts[0].token), after]
    return row
