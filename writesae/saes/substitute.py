"""The replacement test's edit: an SAE's atom in place of what the model writes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from writesae.hooks.interventions import Intervention, Moment
from writesae.recurrence import Write
from writesae.recurrence.write import of_rank
from writesae.saes.sae import WriteSAE


@dataclass(frozen=True, init=False)
class OfItsHead(Intervention):
    """An intervention by an SAE, at the layer and head that the SAE is of."""

    sae: WriteSAE = None  # type: ignore[assignment]  # always given; the bases' defaults ask for one

    def _set(self, sae: WriteSAE, **values: Any) -> None:
        """Be made with these attributes. An SAE that does not say its head is refused where it is attached."""
        for name, value in {"layer": sae.cfg.layer, "head": sae.cfg.head, "sae": sae, **values}.items():
            object.__setattr__(self, name, value)

    @property
    def fitted(self) -> WriteSAE:
        return self.sae

    @property
    def needs_state(self) -> bool:
        return self.sae.cfg.target != "write"


@dataclass(frozen=True, init=False)
class Substitute(OfItsHead):
    """The replacement test's edit (paper, sections 2 and 3.2): native write out, the SAE's top atom in.

    The atom enters at its activation, ``a_i A_i``, whatever its rank (a dense atom takes ``min(d_key, d_value)`` terms
    per token). Where the SAE activates no atom, the native write stays.

    Attributes:
        sae: a `WriteSAE`; layer and head are its site's.
        atom: act only where this atom is the top one, or one of several; None: whichever it is.
        norm: ``"code"``: the atom at its activation. ``"native"``: at the native write's norm (paper, appendix J).
    """

    atom: int | Sequence[int] | None = None
    norm: Literal["code", "native"] = "code"

    def __init__(
        self,
        sae: WriteSAE,
        *,
        atom: int | Sequence[int] | None = None,
        norm: Literal["code", "native"] = "code",
    ):
        if norm not in ("code", "native"):
            raise ValueError(
                f"norm={norm!r}: allowed are 'code' (the activation) and 'native' (the native write's norm)"
            )
        if atom is not None:
            sae.atom(torch.as_tensor(atom))  # raises for an atom out of range
        self._set(sae, atom=atom, norm=norm)

    @property
    def replaces(self) -> bool:
        return True

    def edit(self, now: Moment) -> Write:
        values, indices = self.sae.topk(now.target(self.sae.cfg.target), 1)
        value, top = values[..., 0], indices[..., 0]
        fires = value > 0
        if self.atom is not None:
            fires = fires & torch.isin(top, torch.as_tensor(self.atom, device=top.device))
        atom = self.sae.dictionary.atom(top)
        atom = atom * (value if self.norm == "code" else now.write.norm() / atom.norm().clamp_min(1e-30))
        rank = max(atom.rank, now.write.rank)
        pairs = zip(of_rank(atom, rank).factors(), of_rank(now.write, rank).factors(), strict=True)
        key, value = (torch.where(fires[..., None, None], new, native) for new, native in pairs)
        return Write(key, value, rank=rank) if rank > 1 else Write(key[..., 0, :], value[..., 0, :])
