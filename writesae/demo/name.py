"""A name that a text tells once and asks for later: which writes hold it, and what is said when they are changed."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from writesae.gradients import Logit
from writesae.hooks import ActivationCache, Add, Delete, Intervention, Replace
from writesae.jobs.progress import Progress
from writesae.methods import Patching, patching
from writesae.model import HookedRecurrentModel
from writesae.recurrence import Write
from writesae.saes import WriteSAE

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


Edits = Sequence[tuple[Intervention, Place]]


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
        if said(model, exchanged(other, places[:n])).says == OTHER:
            return Held(found, places[:n], True, own, other)
    return Held(found, places, False, own, other)


def write_at(cache: ActivationCache, place: Place) -> Write:
    return cache.write(place.layer)[0, place.position, place.head]


def exchanged(cache: ActivationCache, places: Sequence[Place]) -> Edits:
    return put(places, [write_at(cache, place) for place in places])


def put(places: Sequence[Place], writes: Sequence[Write]) -> Edits:
    """A write in the place of each."""
    return [(Replace(p.layer, p.head, write=w), p) for p, w in zip(places, writes, strict=True)]


def deleted(places: Sequence[Place]) -> Edits:
    return [(Delete(p.layer, p.head), p) for p in places]


@torch.no_grad()
def said(model: HookedRecurrentModel, edits: Edits, done: str = "", text: str = story(NAME)) -> Outcome:
    """What it says after a text, with edits at their tokens."""
    with ExitStack() as stack:
        for edit, place in edits:
            stack.enter_context(model.intervene(edit, positions=[place.position]))
        return outcome(model, model(text), done)


def outcome(model: HookedRecurrentModel, logits: Float[Tensor, "1 pos vocab"], done: str) -> Outcome:
    p = logits[0, -1].float().softmax(-1)
    name, other = (float(p[model.to_single_token(n)]) for n in (NAME, OTHER))
    return Outcome(done, model.to_str_tokens([int(p.argmax())])[0], name, other)


class Changes(NamedTuple):
    """What is said after each change of the memory.

    Attributes:
        rows: all of them, in the order in which they are shown.
        deleted: with the writes that hold the name deleted.
        atom: with an atom in the place of each; None if a head has no SAE that was told this name often.
        likeness: cosines of these atoms and the writes.
    """

    rows: list[Outcome]
    deleted: Outcome
    atom: Outcome | None
    likeness: list[float]


@torch.no_grad()
def changed(model: HookedRecurrentModel, where: Held, saes: Sequence[WriteSAE]) -> Changes:
    """Those writes deleted, exchanged or replaced by atoms, beside controls; and all states exchanged."""
    places = where.places
    elsewhere = [Place(layer, head, t + 1) for layer, head, t in places]
    random = torch.Generator().manual_seed(0)
    one = len(places) == 1
    of_head = {tuple(sae.place): sae for sae in saes}

    def atoms(cache: ActivationCache) -> list[Write]:
        return [atom_for(of_head[p[:2]], write_at(cache, p)) for p in places]

    own = [write_at(where.own, p) for p in places]
    rows = [
        said(model, [], "nothing"),
        said(model, deleted(places), "that write deleted" if one else f"those {len(places)} writes deleted"),
        said(model, deleted(elsewhere), "next token's deleted instead"),
        said(model, exchanged(where.other, places), f"exchanged for{OTHER}'s"),
        said(model, put(places, [like(write, random) for write in own]), "random written instead"),
    ]
    atom, likeness = None, []
    if all(p[:2] in of_head for p in places):
        its = atoms(where.own)
        likeness = [float(a.cosine(write)) for a, write in zip(its, own, strict=True)]
        atom = said(model, put(places, its), "an SAE's atom for it" if one else "SAE atoms for them")
        its = atoms(where.other)
        rows += [atom, said(model, put(places, its), f"{OTHER.strip()}'s atom{'' if one else 's'} instead")]
    before, after = (model.memory(TOLD.format(name) + BETWEEN) for name in (NAME, OTHER))
    swapped = before.with_heads(after, every_head(model))
    rows.append(outcome(model, model(ASKED, memory=swapped), f"all states of{OTHER}'s text"))
    return Changes(rows, rows[1], atom, likeness)


def atom_for(sae: WriteSAE, write: Write) -> Write:
    """An SAE's strongest atom for a write, at its activation."""
    activation, atom = sae.topk(write[None], 1)
    return sae.atom(int(atom)) * float(activation)


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
        said(model, [(Add(p.layer, p.head, write=w), p) for p, w in zip(at_end, put_in, strict=False)], done, text)
        for done, put_in in rows
    ]


def every_head(model: HookedRecurrentModel) -> list[tuple[int, int]]:
    return [(site.layer, head) for site in model.sites for head in range(site.n_heads)]


def like(write: Write, random: torch.Generator) -> Write:
    """A random rank-1 write of the same size."""
    key, value = (torch.randn(x.shape[-1], generator=random).to(x) for x in (write.key, write.value))
    made = Write(key, value)
    return made * float(write.norm() / made.norm())
