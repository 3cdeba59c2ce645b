"""Pages as HTML: what the templates are given, and how they are filled. Every text is escaped; nothing is fetched."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
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


def render(template: str, **values: Any) -> str:
    """A page from ``templates/<template>.html``, with its style and script inside."""
    return _environment().get_template(f"{template}.html").render(page=template, **values)


@cache
def _environment() -> Any:
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined,
        loader=jinja2.FileSystemLoader(TEMPLATES),
    )  # fmt: skip
    environment.filters |= {"visible": visible, "number": number, "percent": percent, "signed": signed}
    environment.globals |= {"asset": asset, "script_hash": script_hash}
    return environment


@cache
def asset(name: str) -> Any:
    """A style sheet or script of ours, to stand in the page as it is."""
    from markupsafe import Markup

    return Markup((TEMPLATES / name).read_text(encoding="utf-8"))


@cache
def script_hash(name: str) -> str:
    """What lets this script run, and no other that text might bring along."""
    return "sha256-" + base64.b64encode(hashlib.sha256(asset(name).encode()).digest()).decode()


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
    return "".join(chr(0x2400 + ord(c)) if ord(c) < 32 else c for c in shown)


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


def atom_page(study: Study, atom: int, *, command: str) -> str:
    """The page of an atom. ``command`` is what measures more, told where something was not measured."""
    return render("atom", **atom_values(study, atom), command=command)


def atom_values(study: Study, atom: int) -> dict[str, Any]:
    """Everything that the template shows of an atom."""
    cfg, found = study.sae.cfg, study.survey
    classes, fired = found.classes, int(found.seen.firings[atom])
    activations, peak = found.sample(atom)["activation"].tolist(), float(found.seen.largest[atom])
    cosines = ("cosine", "key_cosine", "value_cosine", "elsewhere")
    near = zip(*(rows[atom] for rows in study.nearest), strict=True)
    return dict(
        atom=atom, n_atoms=cfg.n_atoms, study=study, cfg=cfg, found=found, fired=fired, rate=fired / found.n_tokens,
        peak=peak, mean=float(classes.mean_activation[atom]), kind=str(classes.classes[atom]),
        cosines={name: float(getattr(classes, name)[atom]) for name in cosines},
        contexts=[context_values(context, peak) for context in found.strongest[atom]],
        fires_at=fires_at(study, atom), n_sample=len(activations), histogram=histogram(activations),
        positions=positions(study, atom), direct=bars_of(study.direct[atom]),
        measured=measured(study.measured.get(atom)),
        factors=[("key", study.decoder.key[atom].tolist()), ("value", study.decoder.value[atom].tolist())],
        label=label_values(study, atom), share=float(study.decoder.share[atom]), norm=float(study.decoder.norm[atom]),
        nearest=[dict(atom=i, cosine=c, kind=str(classes.classes[i]), top=fires_most_at(study, i)) for i, c in near],
    )  # fmt: skip


def label_values(study: Study, atom: int) -> dict[str, Any] | None:
    """What the atom means and how well the label does; None if there is none."""
    label = study.labels.get(atom)
    if label is None or label.text is None:
        return None
    names = {"detection": label.detection, "fuzzing": label.fuzzing}
    scores = [(name, score.balanced_accuracy) for name, score in names.items() if score is not None]
    return dict(text=plain(label.text), scores=scores)


def context_values(context: Context, peak: float) -> dict[str, Any]:
    """A context, its tokens with activations and how strong these are beside the atom's strongest."""
    words, here = (*context.before, context.token, *context.after), len(context.before)
    tokens = [
        dict(text=plain(word) or "∅", value=value, strength=round(value / peak, 3) if value > 0 else 0, here=i == here)
        for i, (word, value) in enumerate(zip(words, context.activations, strict=True))
    ]
    return dict(tokens=tokens, activation=context.activation, document=context.document, position=context.position)


def fires_at(study: Study, atom: int) -> list[tuple[str, float]]:
    """The tokens that the atom fires at most, and the share of its firings that each has."""
    return [(study.string(token), share) for token, share in study.survey.fires_at[atom]]


def fires_most_at(study: Study, atom: int) -> str:
    return next((token for token, _ in fires_at(study, atom)), "")


def histogram(values: Sequence[float]) -> list[dict[str, Any]]:
    """Bars of a histogram from zero to the largest."""
    if not values:
        return []
    counts, edges = np.histogram(values, BINS, (0.0, max(values)))
    top = max(int(counts.max()), 1)
    return [
        dict(height=n / top, label=f"{number(a)} to {number(b)}: {n:,} of {len(values):,} firings")
        for n, a, b in zip(counts.tolist(), edges[:-1].tolist(), edges[1:].tolist(), strict=True)
    ]


def positions(study: Study, atom: int) -> list[dict[str, Any]]:
    """Bars of the rate by position in the window."""
    fired, tokens = study.survey.by_position[atom], study.survey.tokens_by_position
    rates = (fired / tokens.clamp_min(1)).tolist()
    top = max(max(rates), 1e-30)
    return [
        dict(
            height=rate / top, rate=rate,
            label=f"tokens {i * BIN} to {(i + 1) * BIN - 1} of a window: {percent(rate)} "
                  f"({int(fired[i]):,} of {int(tokens[i]):,})",
        )
        for i, rate in enumerate(rates)
    ]  # fmt: skip


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


def index_page(study: Study, *, command: str) -> str:
    """The index of all atoms, which searches and sorts itself."""
    rows = [index_row(study, atom) for atom in range(study.sae.cfg.n_atoms)]
    classes = {name: sum(row["class"] == name for row in rows) for name in ("register", "bundle", "null")}
    split = min((row["cosine"] for row in rows if row["class"] == "register"), default=None)
    return render("index", study=study, cfg=study.sae.cfg, rows=rows, classes=classes, split=split, command=command)


def index_row(study: Study, atom: int) -> dict[str, Any]:
    """What the index knows of an atom: numbers to sort by, texts to show and to search in."""
    found, classes = study.survey, study.survey.classes
    contexts, fired = found.strongest[atom], int(found.seen.firings[atom])
    done = study.measured.get(atom)
    tokens = study.direct[atom]
    of = lambda x: round(float(x), 5) if fired else None  # noqa: E731
    label = label_values(study, atom)
    row: dict[str, Any] = {
        "atom": atom, "label": label["text"] if label else "",
        "class": str(classes.classes[atom]), "rate": fired / found.n_tokens,
        "peak": of(found.seen.largest[atom]), "cosine": of(classes.cosine[atom]),
        "wins": round(done.replaced.wins / done.replaced.n, 4) if done and done.replaced else None,
        "at": visible(fires_most_at(study, atom)) if fired else "", "measured": done is not None,
        "promotes": [visible(token) for token, _ in tokens.promoted[:3]],
        "context": [], "text": "\n".join(plain("".join((*c.before, c.token, *c.after))) for c in contexts),
        "tokens": " ".join(token for token, _ in (*tokens.promoted, *(done.tokens.promoted if done else ()))),
    }  # fmt: skip
    if contexts:
        before, after = (plain("".join(words)) for words in (contexts[0].before[-6:], contexts[0].after[:3]))
        row["context"] = [before, plain(contexts[0].token), after]
    return row
