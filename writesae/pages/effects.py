"""What atoms do to the model, measured by running it: to logits, in place of a write, to a text that it writes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from writesae.experiments.population import population_test
from writesae.experiments.replacement import middle
from writesae.futures.continuations import ENDED, CommonRandomNumbers, go_on
from writesae.futures.replay import LOGITS
from writesae.hooks import Add, short_chunks
from writesae.hooks.scope import owning
from writesae.model import late_logits
from writesae.pages.survey import Survey, Window, token_string
from writesae.recurrence import Write
from writesae.stores.windows import together

if TYPE_CHECKING:
    from writesae.model import HookedRecurrentModel
    from writesae.saes import WriteSAE

HORIZON = 8  # tokens after a firing whose predictions count too
STEP = 0.1  # of the activation: the change is a derivative to 1 part in 1,000, and well above rounding
TESTED = 128  # tokens per window of the replacement test
FOLLOWED = 16  # tokens scored after a firing in the replacement test
CONDITIONS = ("atom", "delete", "matched", "random")  # in the order of `Replaced`


@owning(everywhere=False)
@torch.no_grad()
def logit_effect(
    model: HookedRecurrentModel,
    sae: WriteSAE,
    found: Survey,
    windows: Sequence[Window],
    atoms: Sequence[int],
    *,
    n_firings: int = 5,
    rows: int = 64,
) -> Float[Tensor, "atom vocab"]:
    """What each atom, as strong as it fires, adds to each logit to first order; less the mean over all tokens.

    ``(logits(+e a A) - logits(-e a A)) / 2e`` with the atom ``A`` added at its activation ``a`` and ``e = STEP``, at
    each of its ``n_firings`` strongest firings; mean over these, and over the predictions of that token and the
    ``HORIZON`` after it. It is the derivative of all logits along an atom: for each token the product of the atom with
    the gradient of that logit (`writesae.gradients`), which would need one backward pass per token of the vocabulary.

    Args:
        model: the model.
        sae: an SAE of one of its heads.
        found: the survey of the windows.
        windows: the texts.
        atoms: which atoms; the result is NaN for those that never fired.
        n_firings: firings used per atom.
        rows: sequences run at once.
    """
    layer, head = sae.place
    tokens = {(window.document, window.start): window.tokens for window in windows}
    firings = []  # which of the atoms, its activation, tokens of the window as far as they count, place in it
    for i, atom in enumerate(atoms):
        for firing in found.strongest[atom][:n_firings]:
            place = firing.position % found.context
            window = tokens[firing.document, firing.position - place]
            firings.append((i, firing.activation, window[: place + HORIZON + 1], place))
    total, count = torch.zeros(len(atoms), model.n_vocab), torch.zeros(len(atoms), 1)
    scored = max(1, LOGITS // (2 * (HORIZON + 1) * model.n_vocab))
    for start in range(0, len(firings), max(1, rows // 2)):
        which, strength, sequences, places = zip(*firings[start : start + max(1, rows // 2)], strict=True)
        which, place, n = torch.tensor(which), torch.tensor(places), len(which)
        ids, given = together([*sequences, *sequences])
        edit = sae.atom(torch.tensor(atoms)[which]) * (STEP * torch.tensor(strength)).to(sae.b_enc)
        both = Write(torch.cat([edit.key, edit.key]), torch.cat([edit.value, -edit.value]), edit.rank)
        at = torch.cat([place, place])[:, None].to(ids.device)
        editing = model.intervene(Add(layer, head, write=both[:, None]), positions=at, check_model=False)
        with short_chunks(), editing, late_logits(model) as end:
            model(ids, **given)
        after = torch.tensor([len(sequence) for sequence in sequences]) - place  # tokens of each that are counted
        # Padding is on the left: a sequence's last token is in the last column, and may come before the horizon.
        column = ids.shape[1] - after[:, None] + torch.arange(HORIZON + 1)
        counts = (column < ids.shape[1]).float()
        column = column.clamp_max(ids.shape[1] - 1).to(ids.device)
        row = torch.arange(n, device=ids.device)[:, None].expand_as(column)
        for few in torch.arange(n).split(scored):
            up, down = (end.at(row[few] + shift, column[few]) for shift in (0, n))
            change = (up.float() - down.float()).cpu() / (2 * STEP)
            mean = (change * counts[few, :, None]).sum(1) / counts[few].sum(1, keepdim=True)
            total.index_add_(0, which[few], mean)
        count.index_add_(0, which, torch.ones(n, 1))
    mean = total / count
    return mean - mean.mean(-1, keepdim=True)


@dataclass(frozen=True)
class Readers:
    """Which later tokens read what an atom wrote at one of its firings.

    Attributes:
        tokens: of the text around, as strings.
        place: where among them the atom fires.
        shares: of each of these tokens, how long what it reads of the atom is, as a share of all that the head reads
            there; 0 before the firing.
    """

    tokens: tuple[str, ...]
    place: int
    shares: tuple[float, ...]


@owning(everywhere=False)
@torch.no_grad()
def readers(
    model: HookedRecurrentModel,
    sae: WriteSAE,
    found: Survey,
    windows: Sequence[Window],
    atom: int,
    *,
    n_firings: int = 3,
    before: int = 8,
    after: int = 40,
) -> tuple[Readers, ...]:
    """What later tokens read of an atom, at its strongest firings.

    The atom is added once more, as strong as it fires, at that token. A head's reads are linear in its memory, so what
    they change by, ``o_s(with) - o_s``, is what they read of the atom's own write, with all that the memory decayed and
    erased of it in between. Its length over that of ``o_s`` is the share.

    Args:
        model: the model.
        sae: an SAE of one of its heads.
        found: the survey of the windows.
        windows: the texts.
        atom: which.
        n_firings: how many of its strongest firings.
        before, after: tokens shown around each.
    """
    layer, head = sae.place
    tokens = {(window.document, window.start): window.tokens for window in windows}
    point, some = f"blocks.{layer}.mixer.hook_o", []
    for firing in found.strongest[atom][:n_firings]:
        place = firing.position % found.context
        ids = tokens[firing.document, firing.position - place][: place + after + 1]
        read = reads_of(model, layer, head, ids, place, sae.atom(atom) * firing.activation, point)
        start = max(0, place - before)
        words = tuple(token_string(model, token) for token in ids[start:].tolist())
        some.append(Readers(words, place - start, tuple(round(x, 4) for x in read[start:].tolist())))
    return tuple(some)


def reads_of(
    model: HookedRecurrentModel, layer: int, head: int, ids: Int[Tensor, " pos"], place: int, write: Write, point: str
) -> Float[Tensor, " pos"]:
    """How long what each token reads of a write at ``place`` is, over all that the head reads there."""
    given = {"names": [point], "stop_at_layer": layer + 1}
    _, plain = model.run_with_cache(ids[None], **given)
    with model.intervene(Add(layer, head, write=write), positions=[place]):
        _, added = model.run_with_cache(ids[None], **given)
    native, more = (cache[point][0, :, head].float() for cache in (plain, added))
    share = (more - native).norm(dim=-1) / native.norm(dim=-1).clamp_min(1e-30)
    share[:place] = 0
    return share.cpu()


@dataclass(frozen=True)
class Replaced:
    """The replacement test at an atom's own firings: the atom, at its activation, in place of what the head writes.

    Attributes:
        n: firings tested.
        wins: at how many of them the atom moved the model's next-token distribution less than writing nothing does.
        wins_total: the same, summed over the firing and the tokens after it.
        wins_matched: the same at the firing, with the atom at the native write's norm.
        kl_atom, kl_delete, kl_matched, kl_random: median KL divergence of the edited model from the model at the
            firing, in nats.
    """

    n: int
    wins: int
    wins_total: int
    wins_matched: int
    kl_atom: float
    kl_delete: float
    kl_matched: float
    kl_random: float


def replace(
    model: HookedRecurrentModel,
    sae: WriteSAE,
    found: Survey,
    windows: Sequence[Window],
    atom: int,
    *,
    max_firings: int = 32,
    seed: int = 0,
) -> Replaced | None:
    """The replacement test of an atom (`population_test`) where it is the strongest; None if no firing can be tested.

    Windows are pieces of the survey's windows, and only pieces in which the atom is known to fire are run, so that the
    cost does not grow with the text.
    """
    sample = found.sample(atom)
    window, position = (sample[name].long() for name in ("window", "position"))
    inside = position % TESTED
    testable = ((inside >= TESTED // 4) & (inside < TESTED - FOLLOWED)).nonzero()[:max_firings, 0]
    places = {(w, p // TESTED) for w, p in zip(window[testable].tolist(), position[testable].tolist(), strict=True)}
    pieces = [windows[w].tokens[i * TESTED : (i + 1) * TESTED] for w, i in sorted(places)]
    pieces = [piece for piece in pieces if len(piece) == TESTED]
    if not pieces:
        return None
    try:
        tested = population_test(
            model, sae, torch.stack(pieces), atoms=[atom], min_firings=1, max_firings=max_firings, check_model=False,
            context=TESTED, horizon=FOLLOWED, conditions=CONDITIONS, seed=seed,
        ).firings  # fmt: skip
    except ValueError:  # from an empty memory in the middle of a window, it is not the strongest anywhere
        return None
    wins = tested.wins("atom", "delete"), tested.wins("atom", "delete", "through"), tested.wins("matched", "delete")
    return Replaced(tested.n, *(rate.count for rate in wins), *(middle(tested.score(name)) for name in CONDITIONS))


@dataclass(frozen=True)
class Steered:
    """A prompt continued by the model as it is, and with an atom added at every token, prompt and continuation.

    Attributes:
        prompt: the text.
        scale: strength of the added atom, in units of the native write's norm.
        plain, steered: the continuations as strings of tokens, sampled with the same random numbers.
    """

    prompt: str
    scale: float
    plain: tuple[str, ...]
    steered: tuple[str, ...]

    @property
    def same(self) -> int:
        """How many tokens the two have in common at their beginning."""
        pairs = zip(self.plain, self.steered, strict=False)
        return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(self.plain), len(self.steered)))


@owning(everywhere=False)
def steer(
    model: HookedRecurrentModel,
    sae: WriteSAE,
    atoms: Sequence[int],
    prompts: Sequence[Int[Tensor, " _"]],
    *,
    scales: Sequence[float] = (3.0, -3.0),
    n_tokens: int = 32,
    temperature: float = 0.7,
    rows: int = 64,
    seed: int = 0,
) -> list[list[Steered]]:
    """For each atom, every prompt continued at every scale, as with ``model.intervene(sae, atom=, scale=)``.

    Args:
        model: the model.
        sae: an SAE of one of its heads.
        atoms: which atoms.
        prompts: token ids.
        scales: strengths, in units of the native write's norm at each token.
        n_tokens: tokens per continuation; no continuation ends earlier.
        temperature: temperature of the sampling.
        seed: seed of the random numbers, which all continuations of a prompt share.
        rows: sequences run at once.
    """
    layer, head = sae.place
    shown = ["".join(token_string(model, token) for token in row.tolist()) for row in prompts]

    def run(which: list[tuple[int, int]], scale: float) -> list[tuple[str, ...]]:
        """Continuations of pairs of an atom and a prompt."""
        texts = []
        for start in range(0, len(which), rows):
            atom, prompt = (torch.tensor(x) for x in zip(*which[start : start + rows], strict=True))
            ids, given = together([prompts[p] for p in prompt.tolist()])
            edit = Add(layer, head, write=sae.atom(atom)[:, None], scale=scale, relative=True)
            chance = CommonRandomNumbers(prompt, temperature, seed)
            mask = given.get("attention_mask")
            new = go_on(model, ids, mask, n_tokens, [edit] if scale else [], chance=chance, whole=True)
            texts += [tuple(token_string(model, token) for token in row.tolist() if token != ENDED) for row in new]
        return texts

    plain = run([(0, p) for p in range(len(prompts))], 0.0)
    pairs = [(atom, p) for atom in atoms for p in range(len(prompts))]
    by_scale = {scale: run(pairs, scale) for scale in scales}
    return [
        [
            Steered(shown[p], scale, plain[p], by_scale[scale][i * len(prompts) + p])
            for p in range(len(prompts))
            for scale in scales
        ]
        for i in range(len(atoms))
    ]
