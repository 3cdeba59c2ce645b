"""One atom's page in a notebook."""

from __future__ import annotations

import html
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from writesae import zoo
from writesae.jobs.disk import write_whole
from writesae.model import HookedRecurrentModel
from writesae.pages.render import alone, assets, atom_page
from writesae.pages.site import name_of, page_name, read_page
from writesae.pages.study import Study, study
from writesae.stores.windows import Texts

if TYPE_CHECKING:
    from writesae.saes import WriteSAE


@dataclass(frozen=True)
class Page:
    """A page that a notebook shows in a frame, so that its style and script affect nothing else.

    Attributes:
        title: the title, which plain Python prints.
        html: the page.
        height: height of the frame, in pixels.
    """

    title: str
    html: str = field(repr=False)
    height: int = 900

    def _repr_html_(self) -> str:
        inside = html.escape(self.html)
        return (
            f'<iframe srcdoc="{inside}" title="{html.escape(self.title)}" width="100%" height="{self.height}" '
            f'style="border: 1px solid #8884; border-radius: 8px"></iframe>'
        )

    def save(self, path: str | Path) -> Path:
        """Save the page as one file that needs no others; returns its path."""
        write_whole(Path(path), self.html.encode("utf-8", errors="replace"))
        return Path(path)


def show(
    sae: WriteSAE,
    atom: int,
    *,
    model: HookedRecurrentModel | None = None,
    texts: Texts | None = None,
    pages: str | Path | None = None,
    check_model: bool = True,
) -> Page:
    """The page of one atom; `WriteSAE.show` calls this and describes the arguments and errors."""
    sae.atom(atom)  # raises for one out of range
    if pages is not None:
        if model is not None or texts is not None:
            raise ValueError("give pages=, a folder made before, or model= and texts= to make a page; not both")
        return Page(f"Atom {atom} of {name_of(sae)}", _one_of(Path(pages), atom))
    made = _studied(sae, atom, model, texts, check_model)
    command = f"writesae pages {name_of(sae)}"
    return Page(
        f"Atom {atom} of {made.name}", _in_frame(atom_page(made, atom, command=command), assets(made).__getitem__)
    )


_last: dict[str, Any] = {}  # what was made for the last SAE shown: its survey serves all of its atoms


def _studied(
    sae: WriteSAE, atom: int, model: HookedRecurrentModel | None, texts: Texts | None, check_model: bool
) -> Study:
    """What the page is made of. The pass over the texts is made once per SAE, model and texts."""
    given = {"sae": sae, "model": model, "texts": texts}
    known = all(_last.get(name, _last) is x for name, x in given.items())
    if not known:
        shipped = sae.cfg.model_id in zoo.shipped_models()
        if texts is None and not shipped:
            raise ValueError(
                f"this SAE is of {sae.cfg.model_id or 'a model it does not name'}, which is not shipped: give texts="
            )
        if model is None and sae.cfg.model_id is None:
            raise ValueError("this SAE does not say which model it is of: give model=")
        load = lambda: HookedRecurrentModel.from_pretrained(str(sae.cfg.model_id), device=sae.b_enc.device)  # noqa: E731
        hooked = load() if model is None else model
        read = zoo.heldout_documents() if texts is None else texts
        read = list(read) if not isinstance(read, str | Tensor) else read
        _last.clear()
        _last.update(given, hooked=hooked, read=read, source="Shipped held-out documents" if texts is None else "")
    before: Study | None = _last.get("study")
    if before is None or atom not in before.measured:
        made = study(
            _last["hooked"], sae, _last["read"], atoms=0, also=[atom], name=name_of(sae), source=_last["source"],
            check_model=check_model, before=before,
        )  # fmt: skip
        _last["study"] = made
        return made
    return before


def _one_of(site: Path, atom: int) -> str:
    """A page of a site."""
    return _in_frame(read_page(site, page_name(atom)), lambda name: read_page(site, name))


def _in_frame(page: str, read: Callable[[str], str]) -> str:
    """With all it needs in it, and without the links to others, which are not there."""
    return alone(page, "../", read).replace('<html lang="en">', '<html lang="en" class="alone">', 1)
