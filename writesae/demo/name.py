"""A name that a text tells once and asks for later: which writes hold it, and what is said when they are changed."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from writesae.gradients import Logit
from writesae.hooks import ActivationCache, Add, Delete, Intervention, Patch, Replace
from writesae.jobs.progress import Progress
from writesae.methods import Patching, patching
from writesae.model import HookedRecurrentModel
from writesae.recurrence import Write
from writesae.saes import Substitute, WriteSAE

NAME, OTHER = " Henry", " Robert"
TOLD, UNTOLD = "The captain was called{}.", "The captain was an old man."
BETWEEN = " The ship went out of the harbour in the morning, and the people of the town looked at it for a long time."
ASKED = " It was written that the captain was called"


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

    @property
    def keeps(self) -> bool:
        """Whether the name is still said."""
        return self.says == NAME


class Held(NamedTuple):
    """Where the name is held.

    Attributes:
        found: every write exchanged by itself for that of the text with the other name.
        places: the fewest, in the order of what each restores, that together bring the other name.
        enough: whether they do.
        own, other: what was written in the story, and in that with the other name.
    """

    found: Patching
    places: list[Place]
    enough: bool
    own: ActivationCache
    other: ActivationCache

    def restored(self, place: Place) -> float:
        """How much of the way to the other name one of them goes alone."""
        return float(self.found.restored[self.found.layers.index(place.layer), place.head, place.position])


class Changes(NamedTuple):
    """What the model says after each change.

    Attributes:
        rows: of all changes, in the order in which they are shown.
        deleted: those writes deleted.
        atoms: an atom in the place of each whose head has an SAE; None if none has.
        without: the same writes deleted, which the atoms are to be compared with.
    """

    rows: list[Outcome]
    deleted: Outcome
    atoms: Outcome | None = None
    without: Outcome | None = None


Edits = Sequence[AbstractContextManager[None]]  # blocks of `HookedRecurrentModel.intervene`


def story(name: str) -> str:
    """A name is told, the text goes on, and the name is asked for."""
    return TOLD.format(name) + BETWEEN + ASKED


@torch.no_grad()
def held(model: HookedRecurrentModel, progress: Progress | None = None, most: int = 12) -> Held:
    """Exchange each write for that of the text with the other name; then as many together as it takes."""
    number = Logit(OTHER, minus=NAME)
    found = patching(model, story(OTHER), story(NAME), number, estimate=False, progress=progress)
    ranked = sorted(found.top(found.grid.numel()), key=lambda part: -part[3])  # those that speak against it last
    places = [Place(*where) for *where, _ in ranked[:most]]
    own, other = (model.run_with_cache(story(name))[1] for name in (NAME, OTHER))
    for n in range(1, most + 1):
        if said(model, exchanged(model, other, places[:n])).says == OTHER:
            return Held(found, places[:n], True, own, other)
    return Held(found, places, False, own, other)


def write_at(cache: ActivationCache, place: Place) -> Write:
    return cache.write(place.layer)[0, place.position, place.head]


def exchanged(model: HookedRecurrentModel, cache: ActivationCache, places: Sequence[Place]) -> Edits:
    return [model.intervene([Patch(cache, "write", *place) for place in places])]


def deleted(model: HookedRecurrentModel, places: Sequence[Place]) -> Edits:
    return at_each(model, [(Delete(p.layer, p.head), p) for p in places])


def at_each(model: HookedRecurrentModel, edits: Sequence[tuple[Intervention, Place]]) -> Edits:
    """Each edit at its token."""
    return [model.intervene(edit, positions=[place.position]) for edit, place in edits]


@torch.no_grad()
def said(model: HookedRecurrentModel, edits: Edits, done: str = "", text: str = story(NAME)) -> Outcome:
    """What it says after a text, with edits."""
    with ExitStack() as stack:
        for edit in edits:
            stack.enter_context(edit)
        return outcome(model, model(text), done)


def outcome(model: HookedRecurrentModel, logits: Float[Tensor, "1 pos vocab"], done: str) -> Outcome:
    p = logits[0, -1].float().softmax(-1)
    name, other = (float(p[model.to_single_token(n)]) for n in (NAME, OTHER))
    return Outcome(done, model.to_str_tokens([int(p.argmax())])[0], name, other)


@torch.no_grad()
def changed(model: HookedRecurrentModel, where: Held, saes: Sequence[WriteSAE]) -> Changes:
    """Those writes deleted, exchanged or replaced by an atom, beside controls; and all states exchanged."""
    places, random = where.places, torch.Generator().manual_seed(0)
    elsewhere = [Place(layer, head, t + 1) for layer, head, t in places]
    one = len(places) == 1
    noise = [(Replace(p.layer, p.head, write=like(write_at(where.own, p), random)), p) for p in places]
    gone = said(model, deleted(model, places), "that write deleted" if one else f"those {len(places)} writes deleted")
    rows = [
        said(model, [], "nothing"),
        gone,
        said(model, deleted(model, elsewhere), "next token's deleted instead"),
        said(model, exchanged(model, where.other, places), f"exchanged for{OTHER}'s"),
        said(model, at_each(model, noise), "random written instead"),
    ]
    made = Changes(rows, gone)
    if pairs := with_sae(places, saes):
        which, edits = "it" if one else f"{len(pairs)} of them", [(Substitute(sae), p) for p, sae in pairs]
        atoms = said(model, at_each(model, edits), f"an atom for {which}")
        rows.append(atoms)
        if len(pairs) < len(places):
            gone = said(model, deleted(model, [p for p, _ in pairs]), f"{which} deleted")
            rows.append(gone)
        made = Changes(rows, made.deleted, atoms, gone)
    before, after = (model.memory(TOLD.format(name) + BETWEEN) for name in (NAME, OTHER))
    swapped = before.with_heads(after, every_head(model))
    rows.append(outcome(model, model(ASKED, memory=swapped), f"all states of{OTHER}'s text"))
    return made


@torch.no_grad()
def planted(model: HookedRecurrentModel, where: Held) -> list[Outcome]:
    """The writes that hold the name, added to the memory of a text that tells none; and random ones of their size."""
    random = torch.Generator().manual_seed(0)
    text, end = UNTOLD + BETWEEN + ASKED, len(model.to_str_tokens(UNTOLD)) - 1
    writes = [write_at(where.own, p) for p in where.places]
    rows: list[tuple[str, list[Write]]] = [
        ("as it is", []),
        (f"with{NAME}'s added", writes),
        ("with random added", [like(write, random) for write in writes]),
    ]
    at_end = [Place(p.layer, p.head, end) for p in where.places]
    return [
        said(model, at_each(model, [(Add(p.layer, p.head, write=w), p) for p, w in zip(at_end, put_in, strict=False)]),
             done, text)
        for done, put_in in rows
    ]  # fmt: skip


def with_sae(places: Sequence[Place], saes: Sequence[WriteSAE]) -> list[tuple[Place, WriteSAE]]:
    """Those of these writes whose heads have an SAE, and which."""
    return [(p, sae) for p in places for sae in saes if tuple(sae.place) == p[:2]]


def every_head(model: HookedRecurrentModel) -> list[tuple[int, int]]:
    return [(site.layer, head) for site in model.sites for head in range(site.n_heads)]


def like(write: Write, random: torch.Generator) -> Write:
    """A random rank-1 write of the same size."""
    key, value = (torch.randn(x.shape[-1], generator=random).to(x) for x in (write.key, write.value))
    made = Write(key, value)
    return made * float(write.norm() / made.norm())
