"""The static site: ``index.html``, and ``atom/00053.html`` for every atom, with style, scripts and help shared by all.

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
from writesae.pages.render import assets, atom_page, index_page, index_rows
from writesae.pages.study import study
from writesae.saes.labels import Labels
from writesae.stores.windows import Texts

if TYPE_CHECKING:
    from writesae.model import HookedRecurrentModel
    from writesae.saes import WriteSAE

DATA = "data"  # subfolder of the data that the pages are made of
PAGES = "pages.json"  # in it: the sha256 of every page
AGAIN = "the same `writesae pages` again writes it anew"


@named_kinds
def write_pages(
    model: HookedRecurrentModel,
    sae: WriteSAE,
    texts: Texts,
    out: str | Path,
    *,
    atoms: int = 32,
    also: Sequence[int] = (),
    prompts: Sequence[str] | None = None,
    name: str | None = None,
    source: str = "",
    neuronpedia: bool = False,
    labels: Labels | str | Path | None = None,
    command: str | None = None,
    records: str | Path | None = None,
    check_model: bool = True,
    console: Console | None = None,
) -> Path:
    """Write a page of every atom of an SAE, and an index to search and sort them.

    One pass over the texts serves all atoms. What needs runs of the model for each atom (tokens promoted as measured,
    the replacement test, a steered text) is measured for some of them; pages of the others say so. Called again with
    the same folder, it takes what is there, so that a stopped run continues and more atoms can be measured later.

    Args:
        model: the model.
        sae: an SAE of one of its heads.
        texts: held-out texts, nothing that the SAE was trained on; or token ids.
        out: folder of the site; the data that it is made of is kept in its subfolder ``data``.
        atoms: how many atoms to measure, the most frequent.
        also: further atoms to measure.
        prompts: prompts to continue with each atom added; None for the beginnings of two of the texts.
        name: the SAE's name, for titles; None for its model and head.
        source: where the texts come from, in words, for the pages.
        neuronpedia: also write ``neuronpedia/`` (see `writesae.pages.neuronpedia`).
        labels: what atoms mean, as `writesae.explain` returned it, or its file; None for none.
        command: the command shown on pages of atoms that were not measured, to be run in ``out``; None for one made of
            ``name``.
        records: a JSON file for what the index knows of every atom; None for none.
        check_model: refuse an SAE trained on other weights.
        console: where progress is shown; None for none.

    Returns:
        The path of ``index.html``.

    Raises:
        IndexError: no such atom.
        ValueError: no text; an SAE that does not say its head, or one of another model; labels of another SAE.
    """
    out = Path(out)
    name = name or name_of(sae)
    said = _labels(labels, sae)
    made = study(
        model, sae, texts, atoms=atoms, also=also, folder=out / DATA, prompts=prompts, name=name, source=source,
        check_model=check_model, console=console,
    )  # fmt: skip
    if said is not None:
        made = replace(made, labels=said.atoms, labelled_by=said.by)
    command = command or shlex.join(["writesae", "pages", name, "--out", "."])
    for folder in (out, out / "atom", out / "assets", out / "neuronpedia"):
        remove_halves(folder, "*")
    written = {out / page_name(atom) for atom in range(sae.cfg.n_atoms)}
    digests = {}
    for atom in track(range(sae.cfg.n_atoms), "writing pages", console, transient=True):
        digests[page_name(atom)] = write_file(out / page_name(atom), atom_page(made, atom, command=command))
    for path in set((out / "atom").glob("*.html")) - written:  # pages of a larger SAE that was here before
        path.unlink()
    if neuronpedia:
        export(made, out / "neuronpedia")
    for path, text in assets(made).items():
        digests[path] = write_file(out / path, text)
    rows = index_rows(made)
    digests["index.html"] = write_file(out / "index.html", index_page(made, command=command, rows=rows))
    write_json(out / DATA / PAGES, digests)
    if records is not None:
        write_json(Path(records), {"index": str(out / "index.html"), "name": name, "source": source, "atoms": rows})
    return out / "index.html"


def _labels(labels: Labels | str | Path | None, sae: WriteSAE) -> Labels | None:
    """Labels from wherever they are; ValueError if they are of another SAE."""
    if isinstance(labels, str | Path):
        return Labels.load(labels, sae)
    if labels is not None and labels.sae != sae.fingerprint():
        raise ValueError(f"labels= are of another SAE (fingerprint {labels.sae}, this one's is {sae.fingerprint()})")
    return labels


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
