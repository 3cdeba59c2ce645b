"""Labels of atoms: contexts from one pass over the texts, a label from a language model, and two scores of it.

The scores are those of Paulo et al. 2024 (arXiv 2410.13928). A judge that knows the label alone, and not the atom, says
of each context whether the atom fires in it (*detection*), or whether the tokens marked in it are those that it fires
at (*fuzzing*). Contexts are others than those that the label was made from.
"""

from __future__ import annotations

import hashlib
import queue
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from rich.console import Console

from writesae.explaining.chat import Chat
from writesae.explaining.examples import Examples, gather
from writesae.explaining.prompts import (
    DETECTION,
    FUZZING,
    LABEL,
    LONGEST,
    Messages,
    NoAnswer,
    answers_reader,
    fuzzed,
    judge_messages,
    label_messages,
    read_label,
)
from writesae.hooks.attachable import fit
from writesae.jobs.arguments import named_kinds
from writesae.jobs.progress import Bars
from writesae.jobs.resumable import differences
from writesae.pages.survey import cut_windows, survey
from writesae.saes.labels import Label, Labels, Score
from writesae.stores.windows import Texts

if TYPE_CHECKING:
    from writesae.model import HookedRecurrentModel
    from writesae.saes import WriteSAE

T = TypeVar("T")
TEMPERATURES = (0.0, 0.4, 0.8)  # of the first question and, after an answer that is none, of the next ones
TOKENS = 400  # of an answer, at most; doubled each time it is asked again
FEWEST = 4  # contexts of each kind without which there is no label or no score
EVERY = 1.0  # seconds between two writings of the file


@dataclass(frozen=True)
class Estimate:
    """What labels will cost, before anybody is asked.

    Attributes:
        calls: calls, if every answer is good.
        tokens: tokens of all questions, at four characters per token.
    """

    calls: int
    tokens: int

    def __str__(self) -> str:
        return f"{self.calls:,} calls with about {self.tokens:,} tokens"


@named_kinds
def explain(
    model: HookedRecurrentModel,
    sae: WriteSAE,
    texts: Texts,
    chat: Chat,
    *,
    out: str | Path | None = None,
    atoms: int | Sequence[int] = 32,
    scores: bool = True,
    width: int = 32,
    shown: int = 20,
    tested: int = 20,
    per_call: int = 5,
    seed: int = 0,
    check_model: bool = True,
    dry_run: bool = False,
    say: Callable[[str], Any] | None = None,
    console: Console | None = None,
) -> Labels:
    """Label atoms of an SAE with a language model, and score the labels.

    One pass over the texts finds where the atoms fire. Of each atom, contexts from strong to weak firings and contexts
    without any are shown, and the model says in a few words what the atom means. Scores come from other contexts.
    Answers that are no answers are asked for again. With ``out``, what was answered is kept, and the same call
    continues where it was stopped, even within an atom, and asks again where there was no answer.

    Args:
        model: the model that the SAE is of.
        sae: an SAE of one of its heads.
        texts: texts that the SAE was not trained on; or token ids.
        chat: whom to ask: a `ChatServer` or a `ChatModel`.
        out: file of the labels; None keeps them in memory alone.
        atoms: how many, those that fire most; or which.
        scores: also make scores.
        width: tokens per context.
        shown: contexts per atom that a label is made from, half of them the strongest.
        tested: contexts per atom of each kind for scores.
        per_call: contexts judged in one call.
        seed: of all that is drawn.
        check_model: refuse an SAE trained on other weights.
        dry_run: ask nobody: the labels returned are those that were there, and ``say`` is told what the rest costs.
        say: called with one sentence about what will be asked.
        console: where progress is shown; None for none.

    Returns:
        The labels, those in ``out`` from before included.

    Raises:
        IndexError: no such atom.
        ValueError: no text; an SAE of another model; ``out`` has labels of another SAE or made otherwise; a server
            that refuses the key or the model.
        ConnectionError: nobody answers. What was answered is kept.
    """
    for name, value in (("width", width), ("shown", shown), ("tested", tested), ("per_call", per_call)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")
    if width < 4:
        raise ValueError(f"width must be at least 4 tokens, not {width}: less is no context")
    fit(sae, model, check_model=check_model)
    if not isinstance(atoms, int):
        sae.atom(torch.tensor(list(atoms), dtype=torch.long))  # raises for one out of range
    elif atoms < 1:
        raise ValueError(f"atoms must be at least 1, not {atoms}; or say which: atoms=[53]")
    windows = cut_windows(model, texts)
    digest = hashlib.sha256(b"|".join(window.tokens.cpu().numpy().tobytes() for window in windows))
    prompts = hashlib.sha256("".join((LABEL, DETECTION, FUZZING)).encode()).hexdigest()[:8]
    made_with = {
        "texts": digest.hexdigest()[:16], "layer": model.fingerprint(sae.place[0]), "prompts": prompts, "width": width,
        "shown": shown, "tested": tested, "per_call": per_call, "seed": seed,
    }  # fmt: skip
    made = _begun(out, Labels(sae.fingerprint(), chat.name, made_with), sae)
    if not dry_run:
        chat.check()  # before the model runs

    with Bars(console, transient=True) as bars:
        found = survey(model, sae, windows, seed=seed, progress=bars.add("reading texts", len(windows)))
        wanted = found.most_frequent(atoms) if isinstance(atoms, int) else list(dict.fromkeys(atoms))
        left = [atom for atom in wanted if not _done(made.atoms.get(atom), scores)]
        which = {"width": width, "n_shown": shown, "n_test": tested, "seed": seed}
        examples = gather(model, sae, windows, found, left, **which, progress=bars.add("reading contexts"))
        if say is not None:
            done = f"; {len(wanted) - len(left):,} are done" if len(left) < len(wanted) else ""
            cost = estimate(examples, scores=scores, per_call=per_call)
            say(f"{len(left):,} atoms to label with {chat.name}: {cost}{done}")
        if dry_run:
            return made
        tell = bars.add("asking for labels", len(wanted), len(wanted) - len(left))
        _ask_all(made, examples, chat, scores, per_call, seed, None if out is None else Path(out), tell.advance)
    return made


def estimate(examples: Sequence[Examples], *, scores: bool = True, per_call: int = 5) -> Estimate:
    """What labels from these examples will cost."""
    calls, characters = 0, 0
    for one in examples:
        if len(one.shown) < FEWEST:
            continue
        questions = [label_messages(one.shown, one.counter, one.largest)]
        if scores and min(len(one.active), len(one.inactive)) >= FEWEST:
            for task in (DETECTION, FUZZING):
                texts = [text for text, _ in _tests(one, task, 0)]
                questions += [judge_messages(task, "x" * 60, some) for some in _parts(texts, per_call)]
        calls += len(questions)
        characters += sum(len(message["content"]) for question in questions for message in question)
    return Estimate(calls, -(-characters // 4))


def _begun(out: str | Path | None, made: Labels, sae: WriteSAE) -> Labels:
    """What is in the file already; ValueError if it is of another SAE or was made otherwise."""
    if out is None or not Path(out).exists():
        return made
    there = Labels.load(out, sae)
    old, new = ({"by": x.by, **x.made_with} for x in (there, made))
    if changed := differences(old, new):
        pairs = "; ".join(f"{key} {old.get(key)!s:.40} there, {new[key]!s:.40} now" for key in changed)
        raise ValueError(f"{out} was begun otherwise: {pairs}. Give what it was begun with, or another file (--out)")
    return there


def _done(label: Label | None, scores: bool) -> bool:
    """Whether nothing is left to ask."""
    if label is None or label.text is None:
        return label is not None and label.problem is not None and label.problem.startswith(FEW)
    return not scores or None not in (label.detection, label.fuzzing) or (label.problem or "").startswith(FEW)


# --- asking -----------------------------------------------------------------------------------------------------------

FEW = "too few contexts"


def _ask_all(
    made: Labels,
    examples: Sequence[Examples],
    chat: Chat,
    scores: bool,
    per_call: int,
    seed: int,
    out: Path | None,
    tell: Callable[[], Any],
) -> None:
    """Ask about several atoms at once. What is answered comes here, to be written; threads write nothing.

    They are daemons, so that a stopped run need not wait for a slow server.
    """
    waiting: queue.SimpleQueue[Examples] = queue.SimpleQueue()
    answers: queue.SimpleQueue[tuple[int, Label | BaseException | None]] = queue.SimpleQueue()
    stop = threading.Event()
    for one in examples:
        waiting.put(one)

    def work() -> None:
        while not stop.is_set():
            try:
                one = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                for label in _label(one, made.atoms.get(one.atom), chat, scores, per_call, seed, stop):
                    answers.put((one.atom, label))
                answers.put((one.atom, None))
            except BaseException as e:  # raised again below, where it is heard
                answers.put((one.atom, e))
                return

    for _ in range(min(chat.at_once, len(examples))):
        threading.Thread(target=work, daemon=True).start()
    left, written = len(examples), time.monotonic()
    try:
        while left:
            atom, label = answers.get()
            if isinstance(label, BaseException):
                raise label
            if label is None:
                left -= 1
                tell()
                continue
            made.atoms[atom] = label
            if out is not None and time.monotonic() - written > EVERY:
                made.save(out)
                written = time.monotonic()
    finally:
        stop.set()
        while not answers.empty():  # what others were told meanwhile
            atom, label = answers.get()
            if isinstance(label, Label):
                made.atoms[atom] = label
        if out is not None:
            made.save(out)


def _label(
    one: Examples, label: Label | None, chat: Chat, scores: bool, per_call: int, seed: int, stop: threading.Event
) -> Iterator[Label]:
    """The label of an atom, again with each score, from what was there already."""
    if label is None or label.text is None:
        if len(one.shown) < FEWEST:
            yield Label(None, problem=f"{FEW}: it fires in {len(one.shown) + len(one.active)} of the text's")
            return
        question = label_messages(one.shown, one.counter, one.largest)
        text, problem = _ask(chat, question, read_label, stop)
        yield (label := Label(text, problem=problem and f"no label: {problem}"))
    if label.text is None or not scores:
        return
    if min(len(one.active), len(one.inactive)) < FEWEST:
        yield replace(label, problem=f"{FEW} for scores: {len(one.active)} with it, {len(one.inactive)} without")
        return
    label = replace(label, problem=None)
    for name, task in (("detection", DETECTION), ("fuzzing", FUZZING)):
        if getattr(label, name) is None:
            score, problem = _judge(chat, task, str(label.text), _tests(one, task, seed), per_call, stop)
            label = replace(label, **{name: score}, problem=f"no {name}: {problem}" if problem else label.problem)
            yield label


def _judge(
    chat: Chat, task: str, label: str, tests: list[tuple[str, bool]], per_call: int, stop: threading.Event
) -> tuple[Score | None, str | None]:
    """The score of a label; None, and why, if there was no answer at all."""
    right, n, unanswered, problem = {True: 0, False: 0}, {True: 0, False: 0}, 0, None
    for some in _parts(tests, per_call):
        question = judge_messages(task, label, [text for text, _ in some])
        answers, said = _ask(chat, question, answers_reader(len(some)), stop)
        if answers is None:
            unanswered, problem = unanswered + len(some), said
            continue
        for (_, active), answer in zip(some, answers, strict=True):
            n[active] += 1
            right[active] += answer == active
    if not n[True] or not n[False]:
        return None, problem or "too few answers"
    return Score(right[True], n[True], right[False], n[False], unanswered), None


def _ask(
    chat: Chat, question: Messages, read: Callable[[str], T], stop: threading.Event
) -> tuple[T | None, str | None]:
    """What was answered, or None and what was wrong with the last answer."""
    problem = None
    for turn, temperature in enumerate(TEMPERATURES):
        try:
            return read(chat.ask(question, max_tokens=TOKENS * 2**turn, temperature=temperature, stop=stop)), None
        except NoAnswer as e:
            problem = str(e)
    return None, problem and problem[:LONGEST]


def _tests(one: Examples, task: str, seed: int) -> list[tuple[str, bool]]:
    """Contexts of both kinds to judge, mixed."""
    rng = random.Random(f"{seed} {one.atom} {task}")
    if task == FUZZING:
        tests = fuzzed(one.active, one.inactive, rng)
    else:
        tests = [("".join(x.tokens), kind) for kind in (True, False) for x in (one.active if kind else one.inactive)]
    rng.shuffle(tests)
    return tests


def _parts(items: Sequence[T], size: int) -> list[Sequence[T]]:
    return [items[i : i + size] for i in range(0, len(items), size)]
