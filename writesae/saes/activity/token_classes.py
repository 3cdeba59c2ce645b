"""Atoms that belong to a class of tokens (paper, section 4): more active on sentence ends, say, than elsewhere."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from writesae.hooks.positions import PAD
from writesae.hooks.sites import Head
from writesae.jobs.arguments import named_kinds
from writesae.model import HookedRecurrentModel
from writesae.recurrence import Write
from writesae.saes.activity.reading import encode
from writesae.saes.sae import WriteSAE
from writesae.stores.windows import Texts, Windows

CLASSES: dict[str, Callable[[str], bool]] = {
    "boundary": lambda token: "\n" in token or bool(re.search(r"[.!?]", token)),
    "newline": lambda token: "\n" in token,
    "comma": lambda token: "," in token,
    "capitalised": lambda token: token.strip()[:1].isupper(),
    "punctuation": lambda token: bool(re.fullmatch(r"\s*[^\w\s]+\s*", token)),
}


@dataclass(frozen=True, eq=False)
class ChosenAtoms:
    """Atoms of one SAE that are more active on a class of tokens than on others.

    Attributes:
        sae: the SAE. atoms: most different first.
        on_class, on_others: their mean activations over tokens of the class and over the others (0 where inactive).
        pool: the atoms that were active anywhere and are not chosen, for controls.
        n_class, n_others: how many tokens that was.
        what: the class, in a word.
    """

    sae: WriteSAE
    atoms: Int[Tensor, " n"]
    on_class: Float[Tensor, " n"]
    on_others: Float[Tensor, " n"]
    pool: Int[Tensor, " m"]
    n_class: int
    n_others: int
    what: str

    @property
    def site(self) -> Head:
        """The head that the SAE is of."""
        return self.sae.place

    @property
    def contrast(self) -> Float[Tensor, " n"]:
        return self.on_class - self.on_others

    def write(self, atoms: Int[Tensor, "batch n"]) -> Write:
        """``sum_i c_i A_i`` for each row of atoms, ``[batch]``, at the Frobenius norm of the chosen atoms' own sum.

        ``c_i`` is the mean activation of the i-th chosen atom on the class.
        """
        c = self.on_class.to(self.sae.b_enc)
        total = self.sae.decode_write(c.expand(atoms.shape), atoms)
        norm = self.sae.decode_write(c[None], self.atoms[None].to(c.device)).norm()
        return total * (norm / total.norm().clamp_min(1e-30))


@named_kinds
@torch.no_grad()
def choose_atoms(
    model: HookedRecurrentModel,
    sae: WriteSAE,
    texts: Texts,
    is_class: str | Callable[[str], bool],
    n: int = 10,
    *,
    where: Literal["at", "before"] = "at",
    atoms: Sequence[int] | None = None,
    context: int = 256,
    batch_size: int = 8,
    check_model: bool = True,
) -> ChosenAtoms:
    """The atoms with the largest mean activation on a class of tokens minus that on the others.

    Args:
        model, sae, batch_size, check_model: see `Run`.
        texts: where to look; cut into windows of ``context`` tokens.
        is_class: tells from a token's string whether it belongs to the class; or one of `CLASSES`.
        n: how many atoms.
        where: ``"at"`` tokens of the class, or ``"before"`` them, where the model has to predict one.
        atoms: these atoms, whatever their contrast, instead of the ``n`` best.

    Raises:
        ValueError: no text long enough; no token, or every token, is of the class; fewer than ``n`` atoms are more
            active on it; a given atom is never active on it.
        IndexError: no such atom.
    """
    name = is_class if isinstance(is_class, str) else getattr(is_class, "__name__", "a class")
    if isinstance(is_class, str):
        if is_class not in CLASSES:
            raise ValueError(f"is_class={is_class!r}: there are {', '.join(CLASSES)}; or give a function of a string")
        is_class = CLASSES[is_class]
    if where not in ("at", "before") or n < 1:
        raise ValueError(f"where={where!r}, n={n}: where is 'at' or 'before', n at least 1")
    if atoms is not None:
        sae.atom(torch.tensor(list(atoms)))  # raises for one out of range
    windows = Windows.cut(model, texts, context).enough().tokens
    tokenizer = model._tokenizer()
    members = torch.zeros(model.W_U.shape[1], dtype=torch.bool)
    for token in windows.unique().tolist():
        members[token] = bool(is_class(tokenizer.decode([token])))
    sums, counts = torch.zeros(2, sae.cfg.n_atoms, dtype=torch.float64), torch.zeros(2, dtype=torch.long)
    for part in windows.split(batch_size):
        codes = encode(model, sae, part, check_model=check_model, batch_size=batch_size)
        inside = members[part.cpu()].long()
        usable = codes.positions.cpu() != PAD
        if where == "before":
            inside = inside.roll(-1, 1)
            usable[:, -1] = False
        values, indices = codes.values.cpu().double(), codes.indices.cpu()
        for side in (0, 1):
            here = usable & (inside == side)
            counts[side] += here.sum()
            sums[side].index_add_(0, indices[here].flatten(), values[here].flatten())
    if not bool((counts > 0).all()):
        raise ValueError(
            f"{int(counts[1]):,} of {int(counts.sum()):,} tokens are of the class {name!r}: there have to be some that "
            f"are and some that are not"
        )
    on_others, on_class = (sums / counts[:, None]).float()
    contrast = on_class - on_others
    if atoms is None:
        chosen = contrast.topk(min(n, len(contrast))).indices
        if int((contrast > 0).sum()) < n:
            raise ValueError(
                f"only {int((contrast > 0).sum())} atoms are more active on the class {name!r} than elsewhere; n={n} "
                f"were asked for: lower n or give more text"
            )
    else:
        chosen = torch.tensor(list(dict.fromkeys(atoms)))
        if not len(chosen) or not bool((on_class[chosen] > 0).all()):
            raise ValueError(f"atoms={list(atoms)}: give at least one, each active on the class {name!r} somewhere")
    alive = sums.sum(0) > 0
    alive[chosen] = False
    return ChosenAtoms(
        sae, chosen, on_class[chosen], on_others[chosen], alive.nonzero()[:, 0], int(counts[1]), int(counts[0]), name
    )
