"""Texts that say what an atom means: where it fires, from strongest to weakest, and where it does not.

An example is a chunk of ``width`` tokens of a window, as in delphi: chunks never overlap, so that no text by which a
label was made is used again to score it.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from writesae.hooks.names import inputs
from writesae.pages.survey import Survey, token_string
from writesae.saes.activity.reading import codes_of
from writesae.stores.windows import Window, together

if TYPE_CHECKING:
    from writesae.jobs.progress import Progress
    from writesae.model import HookedRecurrentModel
    from writesae.saes import WriteSAE

Place = tuple[int, int]  # the number of a window, and of a chunk in it
POOL = 4  # chunks drawn at random per one that is wanted: the atom fires in some of them


@dataclass(frozen=True)
class Example:
    """A chunk of text.

    Attributes:
        ids, tokens, activations: of each token its id, its text, and the atom's activation there (0: it does not fire).
        quantile: 0 for the strongest quarter of the atom's firings, 3 for the weakest; -1 where it does not fire.
    """

    ids: tuple[int, ...]
    tokens: tuple[str, ...]
    activations: tuple[float, ...]
    quantile: int = -1

    @property
    def peak(self) -> float:
        """The largest activation."""
        return max(self.activations)


@dataclass(frozen=True)
class Examples:
    """What is known of an atom: examples to make a label from, and others to score it with.

    Attributes:
        atom: the atom.
        shown, counter: those that the label is made from: where it fires, strongest first, and where it does not.
        active, inactive: those it is scored with: where it fires, of all quantiles, and where it does not.
        largest: the atom's largest activation in all texts.
    """

    atom: int
    shown: tuple[Example, ...]
    counter: tuple[Example, ...]
    active: tuple[Example, ...]
    inactive: tuple[Example, ...]
    largest: float


@torch.no_grad()
def gather(
    model: HookedRecurrentModel,
    sae: WriteSAE,
    windows: Sequence[Window],
    found: Survey,
    atoms: Sequence[int],
    *,
    width: int = 32,
    n_shown: int = 20,
    n_counter: int = 5,
    n_test: int = 20,
    n_quantiles: int = 4,
    batch_size: int = 8,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[Examples]:
    """Examples of some atoms.

    Places come from the survey: half of those shown are the strongest, the others, and those for scoring, are drawn
    from equal parts of the rest by strength. The windows they are in are run once more, for the activations around.

    Args:
        model, sae, windows, found: what the survey was made of, and the survey.
        atoms: the atoms.
        width: tokens per example.
        n_shown, n_counter: examples for the label: where it fires, and where it does not.
        n_test: examples of each kind for scores.
        n_quantiles: parts of equal size, by strength.
        batch_size: windows run at once.
        seed: of all that is drawn.
        progress: called with the number of windows run.
    """
    rng = random.Random(seed)
    chunks = [(i, j) for i, window in enumerate(windows) for j in range(-(-len(window.tokens) // width))]
    chunks = [(i, j) for i, j in chunks if len(windows[i].tokens) >= j * width + width // 2]  # no short ends
    pool = rng.sample(chunks, min(len(chunks), POOL * (n_test + n_counter)))
    known, of_document = set(chunks), defaultdict(list)
    for i, window in enumerate(windows):
        of_document[window.document].append(i)
    by_strength = {atom: _places(found, windows, of_document, atom, width, known) for atom in atoms}
    chosen = {atom: _choose(places, n_shown, n_test, n_quantiles, rng) for atom, places in by_strength.items()}
    wanted = {place for shown, test in chosen.values() for place, _ in (*shown, *test)} | set(pool)
    seen = _activations(model, sae, windows, sorted(wanted), list(atoms), width, batch_size, progress)
    strings: dict[int, str] = {}

    def example(column: int, place: Place, quantile: int) -> Example:
        i, j = place
        ids = windows[i].tokens[j * width : (j + 1) * width].tolist()
        for token in set(ids) - strings.keys():
            strings[token] = token_string(model, token)
        return Example(tuple(ids), tuple(strings[t] for t in ids), tuple(seen[place][:, column].tolist()), quantile)

    made = []
    for column, atom in enumerate(atoms):
        shown, test = ([example(column, *one) for one in some] for some in chosen[atom])
        silent = [place for place in pool if not (seen[place][:, column] > 0).any()]
        without = [example(column, place, -1) for place in silent[: n_counter + n_test]]
        shown.sort(key=lambda one: -one.peak)
        few = min(n_counter, max(0, len(without) - n_test))  # where there are few, scores come first
        made.append(
            Examples(
                atom, tuple(shown), tuple(without[:few]), tuple(test), tuple(without[few:]),
                float(found.seen.largest[atom]),
            )
        )  # fmt: skip
    return made


def _places(
    found: Survey,
    windows: Sequence[Window],
    of_document: dict[int, list[int]],
    atom: int,
    width: int,
    known: set[Place],
) -> list[Place]:
    """Chunks in which the atom fires, as far as the survey kept firings, strongest first."""
    best: dict[Place, float] = {}
    sample = found.sample(atom)
    rows = zip(*(sample[name].tolist() for name in ("window", "position", "activation")), strict=True)
    firings = [(int(window), int(position), value) for window, position, value in rows]
    for context in found.strongest[atom]:
        starts = [(windows[i].start, i) for i in of_document[context.document]]
        start, i = max(one for one in starts if one[0] <= context.position)
        firings.append((i, context.position - start, context.activation))
    for i, position, value in firings:
        place = i, position // width
        if place in known:
            best[place] = max(best.get(place, 0.0), value)
    return sorted(best, key=lambda place: (-best[place], place))


def _choose(
    places: list[Place], n_shown: int, n_test: int, n_quantiles: int, rng: random.Random
) -> tuple[list[tuple[Place, int]], list[tuple[Place, int]]]:
    """Places to show and to test with, each with its quantile. Where there are few, half are for each."""
    n_shown = min(n_shown, -(-len(places) // 2))
    quantile = {place: i * n_quantiles // len(places) for i, place in enumerate(places)}
    top, rest = places[: -(-n_shown // 2)], places[-(-n_shown // 2) :]
    drawn: list[Place] = []
    parts = [[place for place in rest if quantile[place] == q] for q in range(n_quantiles)]
    for part in parts:
        rng.shuffle(part)
    while any(parts):  # one of each part in turn, so that every beginning of the list is balanced
        drawn += [part.pop() for part in parts if part]
    n_more = n_shown - len(top)
    shown, test = top + drawn[:n_more], drawn[n_more : n_more + n_test]
    return [(place, quantile[place]) for place in shown], [(place, quantile[place]) for place in test]


def _activations(
    model: HookedRecurrentModel,
    sae: WriteSAE,
    windows: Sequence[Window],
    places: Sequence[Place],
    atoms: list[int],
    width: int,
    batch_size: int,
    progress: Progress | None,
) -> dict[Place, torch.Tensor]:
    """Of each place the activations ``[pos, atom]`` of the atoms asked for."""
    layer, _ = sae.place
    names = inputs(model.family(layer).rule, layer)
    column = torch.full((sae.cfg.n_atoms + 1,), -1)
    column[torch.tensor(atoms, dtype=torch.long)] = torch.arange(len(atoms))
    of_window: dict[int, list[int]] = defaultdict(list)
    for i, chunk in places:
        of_window[i].append(chunk)
    needed, found = sorted(of_window), {}
    for start in range(0, len(needed), batch_size):
        some = needed[start : start + batch_size]
        ids, mask = together([windows[i].tokens for i in some])
        given: Any = {**mask, "names": names, "stop_at_layer": layer + 1}
        _, cache = model.run_with_cache(ids, **given)
        codes = codes_of(sae, cache, ids)
        for row, i in enumerate(some):
            values, indices = codes.values[row].float().cpu(), codes.indices[row].cpu()
            real = codes.positions[row].cpu()
            n = len(windows[i].tokens)
            dense = torch.zeros(n, len(atoms))
            at, slot = ((values > 0) & (column[indices] >= 0)).nonzero(as_tuple=True)
            dense[real[at].long(), column[indices[at, slot]]] = values[at, slot]
            for chunk in of_window[i]:
                found[i, chunk] = dense[chunk * width : (chunk + 1) * width].clone()
        if progress is not None:
            progress(start + len(some))
    return found
