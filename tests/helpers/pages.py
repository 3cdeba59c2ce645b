"""What tests of atom pages share: a part of a shipped SAE, texts with markup in them, and the site made of both."""

from __future__ import annotations

import atexit
import dataclasses
import functools
import shutil
import tempfile
from pathlib import Path

import torch

from writesae import HookedRecurrentModel, WriteSAE
from writesae.pages import Study, write_pages
from writesae.pages.effects import Steered
from writesae.pages.render import alone, assets, atom_page, index_page
from writesae.pages.site import DATA
from writesae.pages.study import Tokens, study
from writesae.zoo import heldout_documents, shipped_saes

NASTY = (
    'The <script>alert("a")</script> of the </script><img src="x" onerror="alert(1)"> and <b id="bold">bold</b> words, '
    "&amp; &lt;not&gt; a 'quote' or a \"quote\", {{ 7 * 7 }} {% raw %} <!-- of the State --> ]]> of the Union.\n\n\t"
)
SEARCHED = "zanzibar"  # in one text alone


@functools.cache
def hooked(name: str = "tiny-gdn") -> HookedRecurrentModel:
    return HookedRecurrentModel.from_pretrained(name)


@functools.cache
def part(name: str = "tiny-gdn/L2H1", n_atoms: int = 40) -> WriteSAE:
    """The first atoms of a shipped SAE, of which the last never fires."""
    whole = WriteSAE.from_pretrained(name)
    made = WriteSAE(dataclasses.replace(whole.cfg, n_atoms=n_atoms))
    made.load_state_dict({name: x[:n_atoms] for name, x in whole.state_dict().items()})
    with torch.no_grad():
        made.b_enc[-1] = -100.0
    return made.eval()


def part_of(model: str) -> WriteSAE:
    """The first atoms of the last SAE shipped with a model."""
    return part(f"{model}/{shipped_saes(model)[-1].name}")


@functools.cache
def texts() -> tuple[str, ...]:
    """Of real documents their beginnings; markup, many times over, so that atoms fire at it."""
    documents = [document.strip()[:1500] for document in heldout_documents()[::6]]
    return (*documents, 8 * NASTY, f"We sailed to {SEARCHED}, and then to the island of {SEARCHED}.")


@functools.cache
def site() -> Path:
    """The site, with three atoms measured and everything that can be written beside it; made once."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder)
    index = write_pages(
        hooked(), part(), texts(), folder, atoms=3, name="tiny-gdn/L2H1", source="A few texts", neuronpedia=True
    )
    return index.parent


@functools.cache
def heads() -> tuple[WriteSAE, WriteSAE]:
    """Of two heads of a model, the first atoms of their SAEs."""
    return part(), part("tiny-gdn/L0H0", 24)


@functools.cache
def site_of_heads() -> Path:
    """The site of both, with two atoms of each measured; made once."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder)
    write_pages(hooked(), heads(), texts(), folder, atoms=2, records=folder / "rows.json", neuronpedia=True)
    return folder


@functools.cache
def studied() -> Study:
    """What the site was made of."""
    return study(hooked(), part(), texts(), atoms=3, folder=site() / DATA, name="tiny-gdn/L2H1", source="A few texts")


@functools.cache
def nasty_pages() -> dict[str, str]:
    """A page of an atom, and the index, where every token, name and prompt is markup."""
    made = studied()
    atom = sorted(made.measured)[0]
    strings = {token: NASTY for token in made.survey.strings}
    found = dataclasses.replace(made.survey, strings=strings)
    object.__setattr__(found, "strongest", dataclasses.replace(found.strongest, strings=strings))
    nasty = tuple((NASTY, value) for _, value in made.measured[atom].tokens.promoted)
    measured = dataclasses.replace(
        made.measured[atom],
        tokens=Tokens(nasty, nasty),
        steered=(Steered(NASTY, 3.0, (NASTY, NASTY), (NASTY, "<b>")),),
    )
    whole = Study(made.model, made.sae, NASTY, NASTY, found, {atom: measured}, made.windows)
    files = assets(whole)
    made_of = {
        "atom": (atom_page(whole, atom, command=NASTY), "../"),
        "not measured": (atom_page(whole, sorted(made.measured)[1], command=NASTY), "../"),
        "index": (index_page(whole, command=NASTY), ""),
        "help": (files["help.html"], ""),
    }
    return {name: alone(page, root, files.__getitem__) for name, (page, root) in made_of.items()}
