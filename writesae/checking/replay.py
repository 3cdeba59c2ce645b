"""Brute force: the recurrence one token after the other, in float64, with edits made in the state itself."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from writesae.model import HookedRecurrentModel
from writesae.recurrence import Read, Recurrence, Write, step_loop

State = Float[Tensor, "batch head d_key d_value"]


@dataclass(frozen=True)
class Change:
    """What happens to the state at some tokens.

    Attributes:
        positions: which tokens.
        new: number of the position among those, the token's native write as a matrix, the state after it -> the state.
        read: ``"next"``: the token's own read does not see it yet.
    """

    positions: Collection[int]
    new: Callable[[int, State, State], State]
    read: Read = "same"


NONE = Change((), lambda _i, _write, state: state)


def replay(
    rec: Recurrence, write: Write, change: Change = NONE, state: State | None = None
) -> tuple[Float[Tensor, "batch pos head d_value"], State]:
    """Outputs and final state of a layer, `step_loop` token by token, with a change of its state."""
    outputs, at = [], list(change.positions)
    for t in range(rec.n_pos):
        now = (slice(None), slice(t, t + 1))
        o, state = step_loop(rec[now], write[now], state)
        if t in at:
            state = change.new(at.index(t), write[:, t].dense(), state)
            if rec.sees(change.read) == "same":
                o = rec[now].read(state[:, None])
        outputs.append(o)
    assert state is not None
    return torch.cat(outputs, 1), state


def exact(model: HookedRecurrentModel, layer: int, values: Callable[[str], Tensor]) -> tuple[Recurrence, Write]:
    """Recurrence and native write of a layer in float64, on the CPU: not every device has float64."""
    rule = model.family(layer).rule
    get = lambda quantity: values(quantity).detach().cpu().double()  # noqa: E731
    return rule.recurrence(get), rule.write(get)
