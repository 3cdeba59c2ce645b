"""What a new experiment is made of: what experiments share, and the registry by which they are found.

An experiment is a function that returns a `Result`, in a file of its own::

    @experiment("what it asks, in a line")
    def my_experiment(model, sae, text, *, n=100, seed=0, progress=None):
        run = Run(model, text, [sae], seed=seed, progress=progress)
        ...
        return MyResult(...)

Registered, it is a name of ``reproduce(only=...)`` and a part of the report, in which the paper's numbers stand beside
its own.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeAlias, TypeVar

import torch
from jaxtyping import Int
from torch import Tensor

from writesae.hooks.attachable import fit
from writesae.hooks.scope import owning
from writesae.hooks.sites import Head
from writesae.jobs.progress import Bar, Progress
from writesae.model import HookedRecurrentModel
from writesae.results.result import Result
from writesae.saes import WriteSAE
from writesae.stores.windows import Texts, Windows

F = TypeVar("F", bound=Callable[..., Result])
R = TypeVar("R")


@dataclass
class Run:
    """What experiments share. Each makes one of its arguments, which mean the same everywhere.

    Attributes:
        model: the model.
        text: held-out text, one or several (or token ids of several), cut into windows.
        saes: SAEs of heads of the model.
        batch_size: rows run at once.
        seed: of everything that is drawn.
        check_model: refuse SAEs that were trained on other weights.
        progress: told how many units are done so far.
        total: how many were asked for, where batches may do more.

    Raises:
        IndexError, ValueError: an SAE does not fit the model, or ``batch_size`` is below 1.
    """

    model: HookedRecurrentModel
    text: Texts = ()
    saes: Sequence[WriteSAE] = ()
    batch_size: int = 32
    seed: int = 0
    check_model: bool = True
    progress: Progress | None = None
    total: int | None = None
    done: int = field(default=0, init=False)
    generator: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        positive(batch_size=self.batch_size)
        for sae in self.saes:
            fit(sae, self.model, check_model=self.check_model)
        self.generator = torch.Generator().manual_seed(self.seed)

    def windows(self, context: int, n: int = 1, lower: str = "context") -> Windows:
        """The text in windows of ``context`` tokens; ValueError if there are fewer than ``n``."""
        return Windows.cut(self.model, self.text, context).enough(n, lower=lower)

    def prompts(self, n: int, context: int) -> Int[Tensor, "n context"]:
        """``n`` windows drawn from the text, on the model's device; ValueError if there are fewer."""
        windows = self.windows(context, n, "n_prompts or context")
        return windows.draw(n, self.generator).tokens.to(self.model.device)

    def batches(self, rows: Tensor, units: int = 1) -> Iterator[Tensor]:
        """``batch_size`` rows at a time; progress is told of ``units`` per row when a batch is done."""
        for part in rows.split(self.batch_size):
            yield part
            self.tell(units * len(part))

    def reading(self, windows: Tensor) -> Iterator[Tensor]:
        """``batch_size`` windows at a time, which are only read before the units begin."""
        read = 0
        for part in windows.split(self.batch_size):
            self.note(f"{read} of {len(windows)} windows read")
            yield part
            read += len(part)

    def note(self, words: str) -> None:
        """Say what goes on before the next unit is done: nobody should look at a bar that stands still."""
        if isinstance(self.progress, Bar):
            self.progress.note(words)
        else:
            self.tell(0)

    def tell(self, n: int) -> None:
        """So many units more are done."""
        self.done += n
        if self.progress is not None:
            self.progress(self.done if self.total is None else min(self.done, self.total))


def positive(**counts: int) -> None:
    """ValueError if one of these arguments is below 1."""
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name}={count}: it must be at least 1")


def several(sae: WriteSAE | Sequence[WriteSAE] | None) -> list[WriteSAE]:
    """None, one or several, as a list."""
    return list(sae) if isinstance(sae, Sequence) else [] if sae is None else [sae]


def one_each(saes: Iterable[WriteSAE]) -> list[Head]:
    """The heads of some SAEs; ValueError if there is none, or two of one head."""
    heads = [sae.place for sae in saes]
    for head in heads:
        if heads.count(head) > 1:
            raise ValueError(f"two SAEs of {head.words}: give one per head")
    if not heads:
        raise ValueError("no SAE given: give one or more")
    return heads


# What `reproduce` runs


@dataclass(frozen=True)
class Sizes:
    """How much of everything. The defaults take minutes on the shipped models and two cores.

    Attributes:
        firings: of the replacement test, for each head and protocol.
        population: atoms of the population test.
        classes: tokens read to class atoms.
        logit: prompts of the test of predicted logit changes; a quarter as many atoms.
        deletions: of the attribution test.
        erase: firings at which an atom is erased.
        signs: trials of the sign test.
        prompts: of installing and amplifying.
        tokens: generated while amplifying.
        per_stratum: targets of each stratum that are installed, for each prompt.
        text: tokens of the text that are used, in whole texts evenly spread over it; None for all.
        per_atom: firings at which each atom of the population test is tested, at most.
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
    per_stratum: int = 2
    text: int | None = None
    per_atom: int = 30

    @classmethod
    def quick(cls) -> Sizes:
        """For a look: a few seconds per experiment on a small model, and intervals that are wide."""
        return cls(48, 6, 8_000, 12, 32, 24, 32, 3, 30, per_stratum=1, per_atom=8, text=8_000)


@dataclass(frozen=True)
class Asked:
    """What `reproduce` was asked to do: its arguments."""

    model: HookedRecurrentModel
    saes: Sequence[WriteSAE]
    texts: str | Sequence[str]
    sizes: Sizes = field(default_factory=Sizes)
    flat: Sequence[WriteSAE] = ()
    other_seeds: Sequence[WriteSAE] = ()
    seed: int = 0
    check_model: bool = True
    #: results that another experiment needs as well, made once: see `once`
    made: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def once(self, key: Hashable, make: Callable[[], R]) -> R:
        """What ``make`` returns, made when it is first asked for."""
        if key not in self.made:
            self.made[key] = make()
        return self.made[key]

    @property
    def common(self) -> dict[str, Any]:
        """Settings that most experiments have."""
        return {"seed": self.seed, "check_model": self.check_model}

    @cached_property
    def prompts(self) -> Tensor:
        """Pieces of the text of 24 tokens, evenly spread over it."""
        return Windows.cut(self.model, self.texts, 24).spread(self.sizes.prompts * 24).tokens

    def first_of_layer(self, sae: WriteSAE) -> bool:
        """Whether no SAE before this one is of its layer: what is done once per layer is done with it."""
        return sae is next(other for other in self.saes if other.place.layer == sae.place.layer)


@dataclass(frozen=True)
class Task:
    """One run of an experiment.

    Attributes:
        run: does it, given the settings and ``progress``.
        about: SAEs of the heads it is about; none if it is about the model.
        settings: what its result depends on, beside model, SAEs and text. SAEs among them count as SAEs.
        name: tells several runs of one experiment apart.
        experiment: name of its function; filled in by the registry.
    """

    run: Callable[..., Result]
    about: Sequence[WriteSAE] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    name: str = ""
    experiment: str = ""

    @property
    def heads(self) -> list[Head]:
        return list(dict.fromkeys(sae.place for sae in self.about))

    @property
    def key(self) -> str:
        """Name of its folder."""
        heads = "_".join(head.folder for head in self.heads[:4]) + ("_and_more" if len(self.heads) > 4 else "")
        return "_".join(part for part in (self.experiment, self.name, heads) if part)

    @property
    def saes(self) -> list[WriteSAE]:
        return [*self.about, *(x for value in self.settings.values() for x in _saes_in(value))]

    @property
    def plain(self) -> dict[str, Any]:
        """The settings without SAEs."""
        return {name: value for name, value in self.settings.items() if not _saes_in(value)}


Plan: TypeAlias = Callable[[Asked], Iterable[Task]]


@dataclass(frozen=True)
class Experiment:
    """A registered experiment.

    Attributes:
        function: what users call.
        help: what it asks, in a line.
        order: of the parts of the report.
        plan: the runs that `reproduce` makes of it.
    """

    function: Callable[..., Result]
    help: str
    order: float | int
    plan: Plan

    @property
    def name(self) -> str:
        return self.function.__name__

    def __str__(self) -> str:
        return self.help


EXPERIMENTS: dict[str, Experiment] = {}
"""All registered experiments by name, in the order of the report."""


def experiment(
    help: str,
    *,
    order: float | int = math.inf,
    settings: Callable[[Sizes], Mapping[str, Any]] = lambda _: {},
    plan: Plan | None = None,
) -> Callable[[F], F]:
    """Register a function as an experiment. What it attaches to the model acts in its own calls alone, so that other
    threads may run the model meanwhile (`writesae.hooks.scope`); otherwise it stays the function that it is.

    Args:
        help: what it asks, in a line.
        order: its place in the report; those without one come last.
        settings: what `reproduce` sets, depending on how much of everything it was asked for.
        plan: the runs that `reproduce` makes of it. Without one they follow from the function's arguments: ``model``,
            ``text`` or ``texts``, ``saes`` (all), ``seed``, ``check_model`` and ``progress`` are given to it, and with
            an argument ``sae`` it is run once for each SAE.
    """

    def register(function: F) -> F:
        function = owning(everywhere=False)(function)
        made = Experiment(function, help, order, plan or _plan_of(function, settings))
        EXPERIMENTS.pop(made.name, None)
        registered = sorted([*EXPERIMENTS.values(), made], key=lambda one: one.order)
        EXPERIMENTS.clear()
        EXPERIMENTS.update({one.name: one for one in registered})
        return function

    return register


def tasks_of(asked: Asked, only: Sequence[str] | None = None) -> list[Task]:
    """The runs of all experiments, or some: first those about all heads, then head by head, then about the model."""
    heads = one_each(asked.saes)
    found = [
        replace(task, experiment=one.name)
        for one in list(EXPERIMENTS.values())
        if only is None or one.name in only
        for task in one.plan(asked)
    ]

    def part(task: Task) -> int:
        where = task.heads
        return heads.index(where[0]) if len(where) == 1 else -1 if where else len(heads)

    return sorted(found, key=part)


def _plan_of(function: Callable[..., Result], settings: Callable[[Sizes], Mapping[str, Any]]) -> Plan:
    """The runs that follow from the arguments of a function."""
    names = inspect.signature(function).parameters

    def plan(asked: Asked) -> Iterator[Task]:
        texts = {"text": asked.texts, "texts": asked.texts, "model": asked.model}
        for about in [[sae] for sae in asked.saes] if "sae" in names else [list(asked.saes) if "saes" in names else []]:

            def run(about: list[WriteSAE] = about, **more: Any) -> Result:
                have = {**texts, "saes": about, "sae": about[0] if about else None, **more}
                return function(**{name: x for name, x in have.items() if name in names})

            common = {name: x for name, x in asked.common.items() if name in names}
            yield Task(run, about, {**settings(asked.sizes), **common})

    return plan


def _saes_in(value: Any) -> list[WriteSAE]:
    return [x for x in (value if isinstance(value, list | tuple) else [value]) if isinstance(x, WriteSAE)]
