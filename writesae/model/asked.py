"""What users ask `intervene` for, as edits: interventions, edits at hook points, SAEs with atoms and scales."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

from jaxtyping import Float
from torch import Tensor

from writesae.hooks import AttachableSAE, Intervention, Patch, PointEdit, Steer
from writesae.hooks.residual_edits import is_residual_sae

Strength: TypeAlias = float | int | Float[Tensor, " batch"]


def edits_of(what: Any, atom: Any, scale: Any) -> list[tuple[Intervention | PointEdit, Any]]:
    """What is to be attached, and the SAE of the memory that it comes from, None if there is none.

    Raises:
        TypeError: something that is no edit; an SAE without atom or scale, or these without an SAE.
        ValueError: not as many scales as atoms.
    """
    if _is_sae(what):
        if atom is None or scale is None:
            other = "Substitute(sae)" if isinstance(what, AttachableSAE) else "Reconstruct(sae)"
            raise TypeError(
                "intervene(sae, ...) needs atom= and scale= (add that atom at scale x the norm of what is there); "
                f"for the SAE's own atoms use intervene({other})"
            )
        atoms = list(atom) if isinstance(atom, Sequence) else [atom]
        scales = list(scale) if isinstance(scale, Sequence) else [scale] * len(atoms)
        if len(scales) != len(atoms) or not atoms:
            raise ValueError(
                f"{len(atoms)} atoms and {len(scales)} scales: give one scale for all, or a list with one for each"
            )
        return [_adding(what, a, s) for a, s in zip(atoms, scales, strict=True)]
    if atom is not None or scale is not None:
        raise TypeError("atom= and scale= go with an SAE; an intervention carries its own")
    edits = [what] if isinstance(what, tuple) and what and _is_sae(what[0]) else what
    edits = list(edits) if isinstance(edits, Sequence) else [edits]
    made: list[tuple[Intervention | PointEdit, Any]] = []
    for edit in edits:
        if isinstance(edit, tuple) and len(edit) == 3 and _is_sae(edit[0]):
            made.append(_adding(*edit))
            continue
        edit = edit.edit() if isinstance(edit, Patch) else edit
        if not isinstance(edit, (Intervention, PointEdit)):
            got = f"the class {edit.__name__}" if isinstance(edit, type) else type(edit).__name__
            if _is_sae(edit) or (isinstance(edit, tuple) and edit and _is_sae(edit[0])):
                got += " in a list, where an SAE stands with atom and scale, (sae, 53, 3.0), or as Substitute(sae)"
            raise TypeError(f"intervene takes an intervention (Add, Delete, ...) or an SAE; got {got}")
        made.append((edit, edit.fitted if isinstance(edit, Intervention) else None))
    return made


def _is_sae(what: object) -> bool:
    """Whether it is an SAE, of the memory or of the residual stream."""
    return isinstance(what, AttachableSAE) or is_residual_sae(what)


def _adding(sae: Any, atom: int, scale: Strength) -> tuple[Intervention | PointEdit, Any]:
    """The edit that adds an atom at ``scale`` times the norm of what is there, and the SAE if it is of the memory."""
    return (
        (sae.adding(atom, scale), sae) if isinstance(sae, AttachableSAE) else (Steer(sae, atom=atom, scale=scale), None)
    )
