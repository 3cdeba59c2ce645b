"""What a language model is asked, and how its answers are read: JSON of one form, or none."""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Callable, Sequence
from typing import Any

from writesae.explaining.examples import Example

Messages = list[dict[str, str]]
LONGEST = 300  # characters of a label
STRONG = 0.3  # tokens are marked from this share of the example's largest activation on, as in delphi

LABEL = """A unit inside a language model is active at some tokens of a text. Say in a few words what they have in \
common.
In the examples, tokens at which the unit is active stand between << and >>. After each example its strength follows, \
from 1 to 10. In examples under "Not active" it is active nowhere.
Say one thing, as specific as the examples allow: what the marked tokens are, or what the text around them is about. \
Do not speak of marks, examples or the unit.
Answer with one JSON object and nothing else: {"label": "..."}. The label has at most 20 words."""

DETECTION = """A unit inside a language model is described by a label. For each text, say whether the unit is active \
somewhere in it: 1 if something in the text fits the label, else 0.
Answer with one JSON object and nothing else: {"answers": [1, 0]}, one number per text, in their order."""

FUZZING = """A unit inside a language model is described by a label. In each text some tokens stand between << and >>. \
Say whether they are the tokens at which the unit is active: 1 if the marked tokens fit the label, else 0.
Answer with one JSON object and nothing else: {"answers": [1, 0]}, one number per text, in their order."""


class NoAnswer(ValueError):
    """An answer that is not of the form asked for."""


def label_messages(shown: Sequence[Example], counter: Sequence[Example], largest: float) -> Messages:
    """The question for a label."""
    lines = ["Active:"]
    for one in shown:
        strength = min(10, max(1, math.ceil(10 * one.peak / largest)))
        lines.append(f"{json.dumps(marked(one, strong(one)), ensure_ascii=False)} strength {strength}")
    if counter:
        lines += ["Not active:", *(json.dumps("".join(one.tokens), ensure_ascii=False) for one in counter)]
    return [{"role": "system", "content": LABEL}, {"role": "user", "content": "\n".join(lines)}]


def judge_messages(task: str, label: str, texts: Sequence[str]) -> Messages:
    """The question which of some texts fit a label; ``task`` is `DETECTION` or `FUZZING`."""
    numbered = [f"{i}. {json.dumps(text, ensure_ascii=False)}" for i, text in enumerate(texts, 1)]
    question = "\n".join([f"Label: {json.dumps(label, ensure_ascii=False)}", f"{len(texts)} texts:", *numbered])
    return [{"role": "system", "content": task}, {"role": "user", "content": question}]


# --- marks ------------------------------------------------------------------------------------------------------------


def marked(example: Example, where: Sequence[bool]) -> str:
    """Its text, with runs of the tokens ``where`` between << and >>."""
    parts, inside = [], False
    for token, mark in zip(example.tokens, where, strict=True):
        if mark != inside:
            parts.append("<<" if mark else ">>")
        inside = mark
        parts.append(token)
    return "".join(parts) + (">>" if inside else "")


def strong(example: Example) -> list[bool]:
    """At which tokens the atom is at least `STRONG` times as active as at its strongest."""
    return [x > 0 and x >= STRONG * example.peak for x in example.activations]


def wrong(example: Example, n: int, rng: random.Random) -> list[bool]:
    """``n`` tokens at random."""
    chosen = set(rng.sample(range(len(example.tokens)), min(n, len(example.tokens))))
    return [i in chosen for i in range(len(example.tokens))]


def fuzzed(active: Sequence[Example], inactive: Sequence[Example], rng: random.Random) -> list[tuple[str, bool]]:
    """Texts for fuzzing, as delphi makes them: of examples where the atom fires the strong tokens are marked; of the
    others as many at random as the atom fires at on average, rounded up."""
    mean = sum(sum(x > 0 for x in one.activations) for one in active) / max(1, len(active))
    right = [(marked(one, strong(one)), True) for one in active]
    return right + [(marked(one, wrong(one, math.ceil(mean), rng)), False) for one in inactive]


# --- answers ----------------------------------------------------------------------------------------------------------


def read_label(answer: str) -> str:
    """The label in an answer. NoAnswer if there is none, or a very long one."""
    label = _object(answer, "label")
    if not isinstance(label, str) or not label.strip():
        raise NoAnswer(f"its label is {label!r:.60}, not a text")
    label = " ".join(label.split())
    if len(label) > LONGEST:
        raise NoAnswer(f"its label has {len(label)} characters, more than {LONGEST}")
    return label


def answers_reader(n: int) -> Callable[[str], list[bool]]:
    """A reader of ``n`` answers, which raises NoAnswer for anything else."""

    def read(answer: str) -> list[bool]:
        found = _object(answer, "answers")
        if not isinstance(found, list) or len(found) != n or any(x not in (0, 1) for x in found):
            raise NoAnswer(f"its answers are {found!r:.60}, not {n} of 0 or 1")
        return [bool(x) for x in found]

    return read


def _object(answer: str, key: str) -> Any:
    """The entry of the one JSON object in an answer. What a model thought before, and a fence, may be around."""
    text = re.sub(r"(?s)^.*</think>", "", answer).strip()
    if fence := re.fullmatch(r"(?s)```(?:json)?\s*(.*?)\s*```", text):
        text = fence[1]
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise NoAnswer(f"no JSON: {text[:60]!r}") from e
    if not isinstance(found, dict) or set(found) != {key}:
        raise NoAnswer(f'no object {{"{key}": ...}}: {text[:60]!r}')
    return found[key]
