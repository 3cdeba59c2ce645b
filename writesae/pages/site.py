"""The static site: ``index.html``, and ``atom/00053.html`` for every atom, with style, scripts and help shared by all.

Of several SAEs, each has a folder of its own, named by its head, with all of that but the index, which is one for all::

    <site>/index.html                                         <site>/index.html, assets/
    <site>/help.html, assets/, atom/, data/                   <site>/L2H1/help.html, assets/, atom/, data/
                                                              <site>/L0H0/...

It opens from disk and fetches nothing from anywhere else. What pages repeat is kept in files that they share, and what
they have much of as numbers, so that thousands of atoms fit in a few megabytes.
"""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from writesae.jobs.arguments import named_kinds
from writesae.jobs.disk import read_json, remove_halves, write_json, write_whole
from writesae.jobs.progress import track
from writesae.pages.neuronpedia import export
from writesae.pages.render import HOME, assets, atom_page, index_page, index_rows, scripts, title
from writesae.pages.study import Study, studies
from writesae.saes import WriteSAE
from writesae.saes.labels import Labels
from writesae.stores.windows import Texts

if TYPE_CHECKING:
    from writesae.model import HookedRecurrentModel

DATA = "data"  # subfolder of the data that the pages are made of
PAGES = "pages.json"  # in it: the sha256 of every page
AGAIN = "the same `writesae pages` again writes it anew"


@named_kinds
def write_pages(
    model: HookedRecurrentModel,
    sae: WriteSAE | Sequence[WriteSAE],
    texts: Texts,
    out: str | Path,
    *,
    atoms: int = 32,
    also: Sequence[int] = (),
    prompts: Sequence[str] | None = None,
    name: str | Sequence[str] | None = None,
    source: str = "",
    neuronpedia: bool = False,
    labels: Labels | str | Path | Sequence[Labels | str | Path] | None = None,
    command: str | None = None,
    records: str | Path | None = None,
    check_model: bool = True,
    console: Console | None = None,
) -> Path:
    """Write a page of every atom of an SAE, or of several, and one index to search and sort them all.

    One pass over the texts serves all atoms of all SAEs. What needs runs of the model for each atom (tokens promoted as
    measured, the replacement test, a steered text) is measured for some of them; pages of the others say so. Called
    again with the same folder, it takes what is there, so that a stopped run continues and more atoms can be measured
    later.

    Args:
        model: the model.
        sae: an SAE of one of its heads; or several, one per head.
        texts: held-out texts, nothing that the SAE was trained on; or token ids.
        out: folder of the site; the data that it is made of is kept in its subfolder ``data``, of several SAEs in
            ``L2H1/data`` and so on.
        atoms: how many atoms of each SAE to measure, the most frequent.
        also: further atoms to measure, of each SAE.
        prompts: prompts to continue with each atom added; None for the beginnings of two of the texts.
        name: the SAE's name, for titles, or one for each; None for its model and head.
        source: where the texts come from, in words, for the pages.
        neuronpedia: also write ``neuronpedia/`` (see `writesae.pages.neuronpedia`), of several SAEs in each's folder.
        labels: what atoms mean, as `writesae.explain` returned it, or its file; or several, each of which is of one of
            the SAEs; None for none.
        command: the command shown on pages of atoms that were not measured, to be run in ``out``; None for one made of
            ``name``.
        records: a JSON file for what the index knows of every atom; None for none.
        check_model: refuse an SAE trained on other weights.
        console: where progress is shown; None for none.

    Returns:
        The path of ``index.html``.

    Raises:
        IndexError: no such atom.
        ValueError: no text; an SAE that does not say its head, or one of another model; two of one head; labels of
            another SAE; a folder that holds a site of one SAE where several are given, or the other way round.
    """
    saes, out = [sae] if isinstance(sae, WriteSAE) else list(sae), Path(out)
    names = _names(saes, name)
    folders = _folders(saes, out)
    said = _labels(labels, saes)
    made = studies(
        model, saes, texts, atoms=atoms, also=also, folders=[folder / DATA for folder in folders], names=names,
        prompts=prompts, source=source, check_model=check_model, console=console,
    )  # fmt: skip
    made = [
        one if of is None else replace(one, labels=of.atoms, labelled_by=of.by)
        for one, of in zip(made, said, strict=True)
    ]
    command = command or shlex.join(["writesae", "pages", *names, "--out", "."])
    home = HOME if folders == [out] else f"../{HOME}"
    remove_halves(out, "*")
    for one, folder in zip(made, folders, strict=True):
        digests = _write_atoms(one, folder, command, home, console)
        if neuronpedia:
            export(one, folder / "neuronpedia")
        write_json(folder / DATA / PAGES, digests)
    if home != HOME:
        _only(out, folders)
        for path, text in scripts().items():
            write_file(out / path, text)
    rows = index_rows(*made)
    write_file(out / HOME, index_page(*made, command=command, rows=rows))
    if records is not None:
        about = {"index": str(out / HOME), "name": title(made), "source": source}
        write_json(Path(records), {**about, "atoms": rows})
    return out / HOME


def _write_atoms(made: Study, folder: Path, command: str, home: str, console: Console | None) -> dict[str, str]:
    """Pages of the atoms of one SAE, and what they share; the sha256 of each file."""
    n_atoms, digests = made.sae.cfg.n_atoms, {}
    for part in (folder, folder / "atom", folder / "assets", folder / "neuronpedia"):
        remove_halves(part, "*")
    for atom in track(range(n_atoms), f"writing pages, {made.sae.place.folder}", console, transient=True):
        page = atom_page(made, atom, command=command, home=home)
        digests[page_name(atom)] = write_file(folder / page_name(atom), page)
    for path in set((folder / "atom").glob("*.html")) - {folder / name for name in digests}:
        path.unlink()  # of a larger SAE that was here before
    return digests | {path: write_file(folder / path, text) for path, text in assets(made, home=home).items()}


def _names(saes: Sequence[WriteSAE], name: str | Sequence[str] | None) -> list[str]:
    """The name of each SAE; ValueError if they are not as many."""
    names = [name_of(sae) for sae in saes] if name is None else [name] if isinstance(name, str) else list(name)
    if not saes or len(names) != len(saes):
        raise ValueError(f"{len(names)} names for {len(saes)} SAEs: give at least one SAE, and as many names, or none")
    return names


def _folders(saes: Sequence[WriteSAE], out: Path) -> list[Path]:
    """Where each SAE's pages go; ValueError if two would go to one place, or if another kind of site is there."""
    places = [sae.place for sae in saes]
    if twice := [place for i, place in enumerate(places) if place in places[:i]]:
        raise ValueError(f"two SAEs of {twice[0].words}: a site has one per head; write the other's to another folder")
    of_one, there = (out / "atom").is_dir(), (out / HOME).is_file()
    if there and of_one != (len(saes) == 1):
        holds, asked = ("one SAE", "several") if of_one else ("several SAEs", "one")
        raise ValueError(f"{out} holds a site of {holds}, and this one would be of {asked}: name another folder, out=")
    return [out] if len(saes) == 1 else [out / place.folder for place in places]


def _only(out: Path, folders: Sequence[Path]) -> None:
    """One index for these folders: take away those of their own, and pages of SAEs that were in this site and are no
    more; their data stay, should they come back."""
    for folder in folders:
        (folder / HOME).unlink(missing_ok=True)
    for folder in {path.parent for path in out.glob("L*H*/atom")} - set(folders):
        for path in folder.glob("atom/*.html") if not (folder / HOME).exists() else ():  # else it is another site
            path.unlink()


def _labels(
    labels: Labels | str | Path | Sequence[Labels | str | Path] | None, saes: Sequence[WriteSAE]
) -> list[Labels | None]:
    """Of each SAE its labels, from wherever they are; ValueError if some are of none of them."""
    given = [] if labels is None else [labels] if isinstance(labels, Labels | str | Path) else labels
    prints = [sae.fingerprint() for sae in saes]
    found = {}
    for one in given:
        read = one if isinstance(one, Labels) else Labels.load(one)
        if read.sae not in prints:
            where = "labels= are" if isinstance(one, Labels) else f"{one} has labels"
            ours = f"this one's is {prints[0]}" if len(saes) == 1 else f"these have {', '.join(prints)}"
            raise ValueError(f"{where} of another SAE (fingerprint {read.sae}, {ours}): give those of this SAE")
        found[read.sae] = read
    return [found.get(one) for one in prints]


def read_page(out: Path, name: str) -> str:
    """A page that was written before.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it was altered since.
    """
    path, written = out / name, out / DATA / PAGES
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: pages= is a folder that `writesae pages` has written")
    data = path.read_bytes()
    if written.is_file() and read_json(written, AGAIN).get(name) != hashlib.sha256(data).hexdigest():
        raise ValueError(f"{path} was altered after it was written; {AGAIN}")
    return data.decode("utf-8")


def write_file(path: Path, text: str) -> str:
    """Write a page whole; its sha256. Half a surrogate pair, which a broken token may hold, becomes a question mark."""
    data = text.encode("utf-8", errors="replace")
    write_whole(path, data)
    return hashlib.sha256(data).hexdigest()


def page_name(atom: int) -> str:
    """Where an atom's page lies in the site."""
    return f"atom/{atom:05d}.html"


def name_of(sae: WriteSAE) -> str:
    """``tiny-gdn/L2H1``: model and head."""
    place = sae.place.folder
    return place if sae.cfg.model_id is None else f"{sae.cfg.model_id}/{place}"
