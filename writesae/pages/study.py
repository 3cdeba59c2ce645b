"""Everything that atom pages show, gathered step by step and kept on disk, where a stopped run continues::

    <folder>/survey.safetensors.gz, survey.json all atoms, from one pass over the texts
    <folder>/atoms/00053.json                   what was measured of one atom by running the model

Files appear whole and say what they were made with. Those made with anything else are made again.
"""

from __future__ import annotations

import gzip
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from writesae.hooks.attachable import fit
from writesae.jobs.disk import remove_halves, write_whole
from writesae.jobs.extras import need
from writesae.jobs.progress import Bars
from writesae.jobs.resumable import Kept
from writesae.pages.decoder import BLOCK, Decoder, direct_effect, extremes, nearest
from writesae.pages.effects import (
    FOLLOWED,
    HORIZON,
    STEP,
    TESTED,
    Readers,
    Replaced,
    Steered,
    logit_effect,
    readers,
    replace,
    steer,
)
from writesae.pages.survey import CONTEXT, Survey, Window, cut_windows, surveys, token_string
from writesae.saes.labels import Label
from writesae.stores.windows import Texts

if TYPE_CHECKING:
    from writesae.model import HookedRecurrentModel
    from writesae.saes import WriteSAE

FORMAT = "writesae atom pages 2"
SURVEY = "survey.safetensors.gz"
SHOWN = 10  # tokens per list of promoted or suppressed ones; atoms in the list of nearest ones
CONSTANTS = (CONTEXT, HORIZON, STEP, TESTED, FOLLOWED)


@dataclass(frozen=True)
class Tokens:
    """Tokens and how much the logit of each changes: the most promoted, and the most suppressed, strongest first."""

    promoted: tuple[tuple[str, float], ...]
    suppressed: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Measured:
    """What was measured of one atom by running the model.

    Attributes:
        tokens: changes of logits to first order, see `logit_effect`.
        agreement: correlation of these changes with the direct effect, over all tokens.
        replaced: the replacement test; None where it could not be made.
        steered: continuations with the atom added.
        readers: which later tokens read the atom, at its strongest firings.
    """

    tokens: Tokens
    agreement: float
    replaced: Replaced | None
    steered: tuple[Steered, ...]
    readers: tuple[Readers, ...] = ()

    @classmethod
    def loaded(cls, x: dict[str, Any]) -> Measured:
        """From JSON's lists and dictionaries."""
        pairs = {name: tuple((str(token), float(v)) for token, v in rows) for name, rows in x["tokens"].items()}
        steered = tuple(
            Steered(one["prompt"], one["scale"], tuple(one["plain"]), tuple(one["steered"])) for one in x["steered"]
        )
        replaced = None if x["replaced"] is None else Replaced(**x["replaced"])
        read = tuple(Readers(tuple(one["tokens"]), one["place"], tuple(one["shares"])) for one in x["readers"])
        return cls(Tokens(**pairs), float(x["agreement"]), replaced, steered, read)


@dataclass(frozen=True, eq=False)
class Study:
    """Everything that pages show.

    Attributes:
        model, sae: the model and the SAE that the pages are about.
        name: the SAE's name.
        source: where the texts come from, in words.
        survey: what every atom does over the texts.
        measured: atom -> what was measured by running the model, for some atoms.
        windows: the texts, as they were read.
        labels: atom -> what it means, for some atoms.
        labelled_by: the language model that said so.
    """

    model: HookedRecurrentModel
    sae: WriteSAE
    name: str
    source: str
    survey: Survey
    measured: dict[int, Measured]
    windows: Sequence[Window] = ()
    labels: Mapping[int, Label] = field(default_factory=dict)
    labelled_by: str = ""

    @cached_property
    def decoder(self) -> Decoder:
        """The atoms in factors, signed so that keys point as the model's own do where the atom fires."""
        n_atoms = self.sae.cfg.n_atoms
        atoms, numbers = self.survey.seen.draw()
        side = torch.zeros(n_atoms).index_add_(0, atoms, numbers[:, self.survey.seen.names.index("side")])
        return Decoder.of(self.sae).turned(side)

    @cached_property
    def nearest(self) -> tuple[list[list[int]], list[list[float]]]:
        """Of each atom the most similar others, and the cosines."""
        indices, values = nearest(self.sae, SHOWN)
        return indices.tolist(), values.tolist()

    @cached_property
    def direct(self) -> list[Tokens]:
        """Of each atom the tokens that its value promotes through the output embedding (`direct_effect`)."""
        return self._direct(self.decoder.value)

    @cached_property
    def distinct(self) -> list[Tokens]:
        """The same, less what the average of the atoms that fire promotes: a token that nearly all of them promote
        says nothing of one."""
        value, fires = self.decoder.value, self.survey.seen.firings > 0
        return self._direct(value - value[fires if fires.any() else slice(None)].mean(0))

    def _direct(self, values: Tensor) -> list[Tokens]:
        step = max(1, BLOCK // self.model.W_U.shape[1])
        parts = [self.tokens(direct_effect(self.model, *self.sae.place, value)) for value in values.split(step)]
        return [tokens for part in parts for tokens in part]

    def tokens(self, effect: Tensor) -> list[Tokens]:
        """The extremes of changes of logits, ``[atom, vocab]``."""
        up, by, down, by_down = (x.tolist() for x in extremes(effect, SHOWN))
        named = lambda ids, values: tuple(  # noqa: E731
            (self.string(token), round(value, 6)) for token, value in zip(ids, values, strict=True)
        )
        return [Tokens(named(*row[:2]), named(*row[2:])) for row in zip(up, by, down, by_down, strict=True)]

    def string(self, token: int) -> str:
        """A token as text."""
        if token not in self._strings:
            self._strings[token] = self.survey.strings.get(token) or token_string(self.model, token)
        return self._strings[token]

    @cached_property
    def _strings(self) -> dict[int, str]:
        return {}


def study(
    model: HookedRecurrentModel,
    sae: WriteSAE,
    texts: Texts,
    *,
    folder: Path | None = None,
    name: str = "",
    before: Study | None = None,
    **settings: Any,
) -> Study:
    """`studies` of one SAE.

    Args:
        model, sae, texts: as there.
        folder, name, before: of the SAE, as there.
        settings: as there.
    """
    given = {"folders": [folder], "names": [name], "before": [before]}
    return studies(model, [sae], texts, **given, **settings)[0]


def studies(
    model: HookedRecurrentModel,
    saes: Sequence[WriteSAE],
    texts: Texts,
    *,
    folders: Sequence[Path | None],
    names: Sequence[str],
    before: Sequence[Study | None] | None = None,
    atoms: int = 32,
    also: Sequence[int] = (),
    prompts: Sequence[str] | None = None,
    source: str = "",
    check_model: bool = True,
    console: Console | None = None,
    at_once: int = 16,
) -> list[Study]:
    """Gather what pages show of several SAEs; what their folders have of it already is taken from there.

    One pass over the texts serves all SAEs that have no survey yet.

    Args:
        model: the model.
        saes: SAEs of its heads.
        texts: held-out texts, or token ids.
        folders: of each SAE where results are kept; None keeps nothing.
        names: of each SAE its name.
        before: of each SAE an earlier study of the same model and texts, which is extended; None for none.
        atoms: how many atoms of each SAE to measure by running the model, the most frequent.
        also: further atoms to measure, of each SAE.
        prompts: prompts to steer; None for the beginnings of two of the texts.
        source: where the texts come from, in words.
        check_model: refuse an SAE trained on other weights.
        console: where progress is shown; None for none.
        at_once: atoms measured together; a stopped run loses these at most.

    Raises:
        MissingExtra: the extra [stats] is not installed; the classes of atoms need it.
        IndexError: no such atom.
        ValueError: no text; an SAE that does not say its head, or one of another model.
    """
    need("scipy", "sklearn")
    for sae in saes:
        fit(sae, model, check_model=check_model)
        sae.atom(torch.tensor(list(also), dtype=torch.long))  # raises for one out of range
    windows = cut_windows(model, texts)
    starts = _prompts(model, windows, prompts)
    keeping = [
        _keeping(folder, _settings(model, sae, windows, starts)) for sae, folder in zip(saes, folders, strict=True)
    ]
    before = before or [None] * len(saes)
    with Bars(console, transient=True) as bars:
        found = {
            i: seen
            for i, one in enumerate(before)
            if (seen := one.survey if one is not None else _kept_survey(model, saes[i], keeping[i])) is not None
        }
        if unread := [i for i in range(len(saes)) if i not in found]:
            tell = bars.add("reading the texts", len(windows))
            for i, seen in zip(unread, surveys(model, [saes[i] for i in unread], windows, progress=tell), strict=True):
                found[i] = seen
                _keep_survey(seen, keeping[i])
        made, left = [], []
        for i, one in enumerate(before):
            made.append(one or Study(model, saes[i], names[i], source, found[i], _kept_atoms(keeping[i]), windows))
            wanted = dict.fromkeys([*found[i].most_frequent(atoms), *also])
            left.append([x for x in wanted if x not in made[i].measured and int(found[i].seen.firings[x])])
        tell = bars.add("measuring atoms", sum(map(len, left)))
        for one, kept, missing in zip(made, keeping, left, strict=True):
            for start in range(0, len(missing), at_once):
                some = missing[start : start + at_once]
                for atom, result in zip(some, _measure(one, windows, some, starts), strict=True):
                    one.measured[atom] = result
                    kept.write(f"atoms/{atom:05d}.json", {"measured": asdict(result)})
                tell.advance(len(some))
    return made


def _measure(made: Study, windows: Sequence[Window], atoms: Sequence[int], prompts: Sequence[Tensor]) -> list[Measured]:
    model, sae, found = made.model, made.sae, made.survey
    effect = logit_effect(model, sae, found, windows, atoms)
    direct = direct_effect(model, *sae.place, made.decoder.value[torch.tensor(atoms)])
    agreement = torch.cosine_similarity(effect, direct, dim=-1).tolist()  # both are centred
    replaced = [replace(model, sae, found, windows, atom) for atom in atoms]
    read = [readers(model, sae, found, windows, atom) for atom in atoms]
    parts = zip(made.tokens(effect), agreement, replaced, steer(model, sae, atoms, prompts), read, strict=True)
    return [Measured(tokens, r, test, tuple(steered), later) for tokens, r, test, steered, later in parts]


def _prompts(model: HookedRecurrentModel, windows: Sequence[Window], prompts: Sequence[str] | None) -> list[Tensor]:
    """Token ids of the prompts to steer."""
    if prompts is not None:
        return [model.to_tokens(prompt)[0][0] for prompt in prompts]
    first = {window.document: window.tokens for window in reversed(windows)}  # the first window of each text
    documents = sorted(first)
    chosen = dict.fromkeys([documents[0], documents[len(documents) // 2]])
    return [_beginning(model, first[document]) for document in chosen]


def _beginning(model: HookedRecurrentModel, tokens: Tensor, most: int = 16) -> Tensor:
    """The first words of a text, without blank lines before them; as many tokens as end with a word."""
    words = [token_string(model, token) for token in tokens[: 2 * most].tolist()]
    start = next((i for i, word in enumerate(words) if word.strip()), 0)
    between = [i for i in range(start + 1, len(words)) if words[i][:1].isspace() and not words[i - 1][-1:].isspace()]
    ends = [i for i in between if i <= start + most]
    return tokens[start : ends[-1] if ends else start + most]


# --- on disk ----------------------------------------------------------------------------------------------------------


def _keeping(folder: Path | None, settings: str) -> Kept:
    """What is kept in a folder, of which halves of files that a stopped run left are taken out."""
    for part in (folder, folder / "atoms") if folder is not None else ():
        remove_halves(part, "survey.*", "*.json")
    return Kept(folder, {"format": FORMAT, "settings": settings})


def _settings(model: HookedRecurrentModel, sae: WriteSAE, windows: Sequence[Window], prompts: Sequence[Tensor]) -> str:
    """A hash of everything that results depend on."""
    digest = hashlib.sha256(f"{FORMAT} {CONSTANTS} {sae.fingerprint()}".encode())
    for site in model.sites:
        digest.update(model.fingerprint(site.layer).encode())
    for row in (*(window.tokens for window in windows), *prompts):
        digest.update(row.cpu().numpy().tobytes() + b"|")
    return digest.hexdigest()[:16]


def _kept_atoms(kept: Kept) -> dict[int, Measured]:
    """What was measured before."""
    found = {}
    for path in sorted((kept.folder / "atoms").glob("*.json")) if kept.folder is not None else ():
        if (read := kept.read(f"atoms/{path.name}")) is not None:
            found[int(path.stem)] = Measured.loaded(read["measured"])
    return found


def _keep_survey(found: Survey, kept: Kept) -> None:
    if kept.folder is not None:
        data = gzip.compress(save_tensors({name: x.contiguous() for name, x in found.tensors().items()}), 6, mtime=0)
        write_whole(kept.folder / SURVEY, data)
        kept.write("survey.json", {"about": found.about, "sha256": _sha256(data)})


def _kept_survey(model: HookedRecurrentModel, sae: WriteSAE, kept: Kept) -> Survey | None:
    read = kept.read("survey.json")
    if read is None or kept.folder is None or not (path := kept.folder / SURVEY).is_file():
        return None
    data = path.read_bytes()
    return (
        Survey.loaded(model, sae.cfg, load_tensors(gzip.decompress(data)), read["about"])
        if _sha256(data) == read["sha256"]
        else None
    )


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
