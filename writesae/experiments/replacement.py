"""The replacement test (paper, section 3.2): can one atom stand in for what the model writes?

At a *firing*, a token at which the SAE activates an atom, the native write of one head is taken out and something else
put in; the score is how far the model's final distribution moves, in nats. The SAE's top atom at its activation should
move it less than putting in nothing, and putting in nothing less than a random matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from writesae.experiments.engine.conditions import (
    CONDITIONS,
    DEFAULT,
    Generators,
    Texts,
    check_conditions,
    check_sites,
    draw,
    flats_for,
    measure,
    place_of,
    several,
    top_atoms,
    windows_of,
)
from writesae.experiments.engine.replay import LOGITS, Replayer
from writesae.experiments.replacement_result import ReplacementResult, When
from writesae.recurrence import Read

if TYPE_CHECKING:
    from writesae.model import HookedRecurrentModel
    from writesae.saes import WriteSAE

__all__ = ["CONDITIONS", "ReplacementResult", "When", "joined", "replacement_test"]


@torch.no_grad()
def replacement_test(
    model: HookedRecurrentModel,
    sae: WriteSAE | Sequence[WriteSAE],
    text: Texts,
    *,
    n_firings: int = 300,
    context: int = 96,
    horizon: int = 16,
    atom: int | None = None,
    conditions: Sequence[str] = DEFAULT,
    read: Read = "same",
    flat: WriteSAE | Sequence[WriteSAE] | None = None,
    together: bool = False,
    per_window: int = 8,
    batch_size: int = 32,
    seed: int = 0,
    check_model: bool = True,
    progress: Callable[[int], Any] | None = None,
) -> ReplacementResult:
    """Run the replacement test at firings drawn at random, several from each window of the text.

    Args:
        model: the model.
        sae: an SAE of one of its heads; its top atom at each firing is tested. Several: each head by itself, with
            ``n_firings`` each, all in one result.
        text: held-out text, cut into windows of ``context`` tokens.
        n_firings: how many to test.
        context: tokens a window; a firing has at least a quarter of it before it, ``horizon`` tokens after it.
        horizon: how many tokens after the firing to score, beside the firing itself.
        atom: test only where this atom is the top one.
        conditions: what is put in, of `CONDITIONS`; ``atom`` and ``delete`` always are.
        read: ``"same"``: the firing's own read sees the edit. ``"next"``: it does not (the paper's cache-slot
            protocol), and scores begin at the token after it.
        flat: for the condition ``flat_svd``: an SAE of writes or states at the same head (of each).
        together: with several SAEs, replace the writes of all their heads at once, at tokens where all are active.
            What is put in at upper layers are atoms for the writes of the native pass.
        per_window: firings drawn from a window at most.
        batch_size: windows a forward pass.
        seed: of the choice of firings and of the random matrices.
        check_model: refuse an SAE trained on other weights.
        progress: called with the number of firings done.

    Raises:
        ValueError: the text is too short, or the SAE (or ``atom``) fires too rarely in it; the message has the numbers.
        IndexError: no such atom.
    """
    saes = several(sae)
    check_sites(model, saes, check_model)
    chosen = check_conditions((*conditions, *(["flat_svd"] if flat is not None else [])), flat)
    flats = flats_for(saes, flat, model)
    for name, value in (("n_firings", n_firings), ("per_window", per_window), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name}={value}: it must be at least 1")
    if atom is not None:
        if len(saes) > 1:
            raise ValueError(f"atom={atom} means an atom of one SAE; {len(saes)} were given")
        saes[0].atom(atom)  # raises for one out of range
    windows, document = windows_of(model, text, context, horizon)
    parts: list[dict[str, Any]] = []
    for group in [saes] if together else [[one] for one in saes]:
        replayer = Replayer(model, [place_of(one) for one in group], horizon=horizon, read=read)
        generator, generators = torch.Generator().manual_seed(seed), Generators(seed)
        order = torch.randperm(len(windows), generator=generator)
        at_once = max(1, min(batch_size, LOGITS // (context * model.W_U.shape[1])))
        before, start, done = sum(len(part["atom"]) for part in parts), 0, 0
        while done < n_firings and start < len(windows):
            some = order[start : start + min(at_once, -(-(n_firings - done) // per_window))]
            start += len(some)
            native = replayer.native(windows[some].to(model.device))
            tops = {place_of(one): top_atoms(native, one) for one in group}
            fires = torch.stack([value > 0 for value, _ in tops.values()]).all(0).cpu()
            if atom is not None:
                fires &= tops[place_of(group[0])][1].cpu() == atom
            fires[:, : context // 4] = False
            fires[:, context - horizon :] = False
            window, position = (x[: n_firings - done] for x in draw(fires, per_window, generator))
            if not len(window):
                continue
            part = measure(replayer, native, group, window, position, tops, chosen, generators, flats)
            where = (-1, -1) if len(group) > 1 else place_of(group[0])
            part |= {name: torch.full_like(window, x) for name, x in zip(("layer", "head"), where, strict=True)}
            parts.append(part | {"window": some[window], "document": document[some[window]]})
            done += len(window)
            if progress is not None:
                progress(before + done)
        if done < n_firings:
            what = f"atom {atom}" if atom is not None else "every SAE" if len(group) > 1 else "the SAE"
            raise ValueError(
                f"{what} at {', '.join(f'layer {a} head {b}' for a, b in replayer.places)} fired at only {done} "
                f"tokens of {len(windows)} windows of {context} ({per_window} a window at most); {n_firings} firings "
                f"were asked for: give a longer text, or lower n_firings or context"
            )
    return ReplacementResult(
        **joined(parts),
        places=tuple(place_of(one) for one in saes),
        together=together and len(saes) > 1,
        read=read,
        context=context,
        way=replayer.way,
    )


def joined(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The columns of several parts as one."""

    def join(values: list[Any]) -> Any:
        if isinstance(values[0], dict):
            return {key: torch.cat([value[key] for value in values]) for key in values[0]}
        return torch.cat(values)

    return {name: join([part[name] for part in parts]) for name in parts[0]}
