"""The static site: ``index.html``, and ``atom/00053.html`` for every atom. It opens from disk and fetches nothing."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from writesae.jobs.disk import write_whole
from writesae.jobs.progress import track
from writesae.pages.neuronpedia import export
from writesae.pages.render import atom_page, index_page
from writesae.pages.study import study
from writesae.stores.windows import Texts

if TYPE_CHECKING:
    from writesae.model import HookedRecurrentModel
    from writesae.saes import WriteSAE

DATA = "data"  # subfolder of the data that the pages are made of


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
    command: str | None = None,
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
        command: the command shown on pages of atoms that were not measured; None for one made of ``name`` and ``out``.
        check_model: refuse an SAE trained on other weights.
        console: where progress is shown; None for none.

    Returns:
        The path of ``index.html``.

    Raises:
        IndexError: no such atom.
        ValueError: no text; an SAE that does not say its head, or one of another model.
    """
    out = Path(out)
    name = name or name_of(sae)
    made = study(
        model, sae, texts, atoms=atoms, also=also, folder=out / DATA, prompts=prompts, name=name, source=source,
        check_model=check_model, console=console,
    )  # fmt: skip
    command = command or shlex.join(["writesae", "pages", name, "--out", str(out)])
    written = {out / page_name(atom) for atom in range(sae.cfg.n_atoms)}
    for atom in track(range(sae.cfg.n_atoms), "writing pages", console, transient=True):
        write_file(out / page_name(atom), atom_page(made, atom, command=command))
    for path in set((out / "atom").glob("*.html")) - written:  # pages of a larger SAE that was here before
        path.unlink()
    if neuronpedia:
        export(made, out / "neuronpedia")
    write_file(out / "index.html", index_page(made, command=command))
    return out / "index.html"


def write_file(path: Path, text: str) -> None:
    """Write a page whole. Half a surrogate pair, which a broken token may hold, becomes a question mark."""
    write_whole(path, text.encode("utf-8", errors="replace"))


def page_name(atom: int) -> str:
    """Where an atom's page lies in the site."""
    return f"atom/{atom:05d}.html"


def name_of(sae: WriteSAE) -> str:
    """``tiny-gdn/L2H0``: model and head."""
    place = sae.place.folder
    return place if sae.cfg.model_id is None else f"{sae.cfg.model_id}/{place}"
