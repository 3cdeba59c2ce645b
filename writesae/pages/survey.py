"""What every atom does over some texts, from one pass over them.

For every atom: its strongest firings with the tokens around them (`top_contexts`), counts, rates by position, its
class (`atom_classes`), the atoms that fire together with it, and a random sample of its firings, which gives the
histograms, the tokens it fires at, and the firings at quantiles of its activation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from writesae.experiments.classes import AtomClasses, classes_of
from writesae.experiments.engine.mixture import MIN_VALUES
from writesae.hooks.names import inputs
from writesae.hooks.positions import PAD
from writesae.jobs.progress import Progress
from writesae.pages.decoder import Decoder
from writesae.pages.together import NEAR, Together
from writesae.saes.activity.contexts import Contexts
from writesae.saes.activity.firings import COLUMNS, Seen, compare
from writesae.saes.activity.reading import codes_of
from writesae.saes.activity.search import Strongest
from writesae.saes.config import SAEConfig
from writesae.stores.windows import Texts, Window, each_window, together

if TYPE_CHECKING:
    from writesae.hooks import ActivationCache
    from writesae.model import HookedRecurrentModel
    from writesae.saes import WriteSAE

CONTEXT = 256  # tokens per window
BIN = 16  # positions per bin
FIRES_AT = 6  # how many of the tokens that an atom fires at are listed
WITH = 8  # how many of the atoms that fire together with an atom are listed
QUANTILES = (0.95, 0.8, 0.65, 0.5, 0.35, 0.2, 0.05)  # of an atom's activations, at which a firing is shown
NUMBERS = (*COLUMNS, "side", "activation", "token", "window", "position")
"""The numbers kept per firing: `COLUMNS`; whether the model's own key points as the atom's does (1) or away (-1); the
activation; the token's id; the number of the window, and the position in it."""


def cut_windows(model: HookedRecurrentModel, texts: Texts, context: int = CONTEXT) -> list[Window]:
    """Texts cut into windows of ``context`` tokens. Unlike `Windows`, the last of a text may be shorter: pages show all
    of a text, and lose none of it. ValueError if there is no text."""
    windows = list(each_window(model, texts, context))
    if not windows:
        raise ValueError("no text: give at least one that is not empty")
    return windows


@dataclass(frozen=True, eq=False)
class Survey:
    """What the pass found. Where an atom never fired, its numbers are NaN.

    Attributes:
        cfg: the SAE's configuration.
        n_documents, n_tokens: how many texts and tokens were read.
        n_prompts: in how many windows.
        context: tokens of the longest window.
        strongest: the strongest firings of each atom.
        seen: counts, and a sample of each atom's firings with their `NUMBERS`.
        by_position: firings by position in the window, in bins of `BIN` tokens.
        tokens_by_position: tokens read in each of these bins.
        together, together_n: of each atom those that fire with it, and how often (`Together.closest`).
        strings: token id -> text, for the tokens in contexts and in the sample.
    """

    cfg: SAEConfig
    n_documents: int
    n_tokens: int
    n_prompts: int
    context: int
    strongest: Contexts
    seen: Seen
    by_position: Int[Tensor, "atom bin"]
    tokens_by_position: Int[Tensor, " bin"]
    together: Int[Tensor, "atom n"]
    together_n: Int[Tensor, "atom n"]
    strings: dict[int, str]

    @cached_property
    def classes(self) -> AtomClasses:
        """Registers and bundles; split at a cosine of 0.05 where too few atoms fire for the mixture."""
        few = int((self.seen.firings > 0).sum()) < MIN_VALUES
        return classes_of(self.cfg, self.seen, self.n_tokens, self.context, 1, 0.05 if few else None, 0)

    @cached_property
    def _sample(self) -> tuple[Tensor, Tensor]:
        return self.seen.draw()

    def sample(self, atom: int) -> dict[str, Tensor]:
        """The sample of an atom's firings: each of the `NUMBERS`, ``[firing]``."""
        atoms, numbers = self._sample
        start, end = (int(torch.searchsorted(atoms, x)) for x in (atom, atom + 1))
        return dict(zip(NUMBERS, numbers[start:end].T, strict=True))

    @property
    def near(self) -> int:
        """How many tokens apart firings may be, to be together: none, unless one atom a token is active."""
        return NEAR if self.cfg.k == 1 else 0

    def at_quantiles(self, atom: int) -> list[tuple[float, float, int, int]]:
        """Firings of the sample at `QUANTILES` of the atom's activation: quantile, activation, window, position in it.
        None where there are too few to be different ones."""
        found = self.sample(atom)
        order = found["activation"].argsort(descending=True, stable=True)
        if len(order) < len(QUANTILES):
            return []
        some = [(q, order[round((1 - q) * (len(order) - 1))]) for q in QUANTILES]
        return [(q, float(found["activation"][i]), int(found["window"][i]), int(found["position"][i])) for q, i in some]

    @cached_property
    def fires_at(self) -> list[list[tuple[int, float]]]:
        """For each atom, the tokens it fires at most: ids, and each one's share of its firings."""
        found = []
        for atom in range(self.cfg.n_atoms):
            tokens, counts = self.sample(atom)["token"].long().unique(return_counts=True)
            order = counts.argsort(descending=True, stable=True)[:FIRES_AT]
            found.append(list(zip(tokens[order].tolist(), (counts[order] / counts.sum()).tolist(), strict=True)))
        return found

    def most_frequent(self, n: int) -> list[int]:
        """The atoms that fire most, without those that never do."""
        return self.strongest.most_frequent(n)

    # On disk

    def tensors(self) -> dict[str, Tensor]:
        """Everything but the counts of text and the strings, for `loaded`."""
        atoms, numbers = self._sample
        mine = {name: getattr(self, name) for name in _MINE}
        top = {f"top.{name}": getattr(self.strongest, name) for name in ("fired", "histogram", *Strongest.KEPT)}
        seen = {f"seen.{name}": getattr(self.seen, name) for name in ("firings", "total", "largest")}
        return mine | top | seen | {"seen.atoms": atoms, "seen.numbers": numbers}

    @classmethod
    def loaded(
        cls, model: HookedRecurrentModel, cfg: SAEConfig, tensors: dict[str, Tensor], about: dict[str, int]
    ) -> Survey:
        """The survey that `tensors` and `about` were taken from."""
        top = {name.removeprefix("top."): x for name, x in tensors.items() if name.startswith("top.")}
        strings = _strings(model, top["tokens"], tensors["seen.numbers"])
        read = about["n_documents"], about["n_tokens"]
        contexts = Contexts(cfg, torch.arange(cfg.n_atoms), about["before"], *read, **top, strings=strings)
        seen = Seen(cfg.n_atoms, about["most"], NUMBERS)
        seen.firings, seen.total, seen.largest = (tensors[f"seen.{x}"] for x in ("firings", "total", "largest"))
        atoms, numbers = tensors["seen.atoms"], tensors["seen.numbers"]
        seen.kept = [(atoms, torch.arange(len(atoms)) / max(len(atoms), 1), numbers)]
        mine = {name: tensors[name] for name in _MINE}
        return cls(cfg, *read, about["n_prompts"], about["context"], contexts, seen, **mine, strings=strings)

    @property
    def about(self) -> dict[str, int]:
        """The numbers that `loaded` needs."""
        own = {name: getattr(self, name) for name in ("n_documents", "n_tokens", "n_prompts", "context")}
        return own | {"before": self.strongest.before, "most": self.seen.most}


_MINE = ("by_position", "tokens_by_position", "together", "together_n")  # tensors that are the survey's own


def survey(model: HookedRecurrentModel, sae: WriteSAE, windows: Sequence[Window], **settings: Any) -> Survey:
    """`surveys` of one SAE."""
    return surveys(model, [sae], windows, **settings)[0]


@torch.no_grad()
def surveys(
    model: HookedRecurrentModel,
    saes: Sequence[WriteSAE],
    windows: Sequence[Window],
    *,
    n: int = 12,
    before: int = 24,
    after: int = 12,
    max_firings: int = 500,
    batch_size: int = 8,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[Survey]:
    """One pass over the windows, for all atoms of all SAEs; of each SAE what a pass for it alone would find.

    Args:
        model: the model.
        saes: SAEs of its heads.
        windows: the windows to read.
        n: strongest firings kept per atom.
        before, after: tokens kept before and after each of them.
        max_firings: size of the sample of each atom's firings.
        batch_size: windows run at once.
        seed: seed of the sample.
        progress: called with the number of windows done.
    """
    layers = sorted({sae.place.layer for sae in saes})
    names = [name for layer in layers for name in inputs(model.family(layer).rule, layer)]
    context = max(len(window.tokens) for window in windows)
    running = [_Running(sae, context, n, before, after, max_firings, seed) for sae in saes]
    for start in range(0, len(windows), batch_size):
        some = windows[start : start + batch_size]
        ids, mask = together([window.tokens for window in some])
        given: Any = {**mask, "names": names, "stop_at_layer": layers[-1] + 1}  # nobody wants the rest
        _, cache = model.run_with_cache(ids, **given)
        for one in running:
            one.add(cache, ids, some, start)
        if progress is not None:
            progress(min(start + batch_size, len(windows)))
    return [one.found(model, windows) for one in running]


class _Running:
    """What a pass has found so far of one SAE; the arguments are those of `surveys`."""

    def __init__(
        self, sae: WriteSAE, context: int, n: int, before: int, after: int, max_firings: int, seed: int
    ) -> None:
        n_atoms = sae.cfg.n_atoms
        self.sae, self.context, self.n_bins = sae, context, -(-context // BIN)
        self.generator = torch.Generator().manual_seed(seed)
        self.strongest = Strongest(torch.arange(n_atoms), n_atoms, n, before, after)
        self.seen, self.keys = Seen(n_atoms, max_firings, NUMBERS), Decoder.of(sae).key
        self.pairs = Together(n_atoms, NEAR if sae.cfg.k == 1 else 0)
        self.by_position = torch.zeros(n_atoms * self.n_bins, dtype=torch.long)
        self.tokens_by_position = torch.zeros(self.n_bins, dtype=torch.long)

    def add(self, cache: ActivationCache, ids: Int[Tensor, "window pos"], some: Sequence[Window], start: int) -> None:
        """Count a batch, of which the first window is number ``start``."""
        layer, head = self.sae.place
        codes, write = codes_of(self.sae, cache, ids), cache.write(layer)[:, :, head]
        self.strongest.add(codes, torch.tensor([w.document for w in some]), torch.tensor([w.start for w in some]))
        self.pairs.add(codes)
        row, pos, _ = at = (codes.values > 0).nonzero(as_tuple=True)
        columns = compare(self.sae, codes, at, write, self.generator)
        atom, activation = codes.indices[at].cpu(), codes.values[at].float().cpu()
        side = (self.keys[atom].to(write.key) * write.factors()[0][row, pos, 0]).sum(-1).sign().cpu()
        token, place = codes.tokens[row, pos].cpu(), codes.positions[row, pos].cpu()
        number = start + row.cpu()
        more = torch.stack([side.float(), activation, token.float(), number.float(), place.float()], -1)
        drawn = torch.rand(len(atom), generator=self.generator)
        self.seen.add(atom, activation, torch.cat([columns, more], -1), drawn)
        self.by_position += (atom * self.n_bins + place // BIN).bincount(minlength=len(self.by_position))
        real = codes.positions[codes.positions != PAD].cpu()
        self.tokens_by_position += (real // BIN).bincount(minlength=self.n_bins)

    def found(self, model: HookedRecurrentModel, windows: Sequence[Window]) -> Survey:
        """After the last batch of the windows."""
        cfg, n_tokens = self.sae.cfg, sum(len(window.tokens) for window in windows)
        found = self.strongest.contexts(model, cfg, windows[-1].document + 1, n_tokens)
        strings = _strings(model, found.tokens, self.seen.draw()[1])
        mine = (
            self.by_position.view(cfg.n_atoms, self.n_bins),
            self.tokens_by_position,
            *self.pairs.closest(self.seen.firings, WITH),
        )
        read = found.n_documents, n_tokens, len(windows), self.context
        return Survey(cfg, *read, found, self.seen, *mine, strings=strings)


def _strings(model: HookedRecurrentModel, tokens: Tensor, numbers: Float[Tensor, "firing number"]) -> dict[int, str]:
    ids = torch.cat([tokens.flatten(), numbers[:, NUMBERS.index("token")].long()]).unique().tolist()
    return {token: token_string(model, token) for token in ids if token >= 0}


def token_string(model: HookedRecurrentModel, token: int) -> str:
    """A token as text; its number where there is no tokenizer."""
    return str(token) if model.tokenizer is None else model.tokenizer.decode([token])
