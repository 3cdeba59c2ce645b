"""How far an edit moves the state, over the tokens that follow, without any replay.

With the inputs of the layer as they were, the difference of states obeys the recurrence of the edit alone,
``dS_t = A_t dS_{t-1}`` with ``A_t = D_t + a_t b_t^T`` on the key side, so ``sum_r p_r u_r^T`` becomes
``sum_r (A_t p_r) u_r^T``: vectors, never matrices.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor

from writesae.futures.replay import Native
from writesae.hooks.sites import Head
from writesae.recurrence import Write
from writesae.recurrence.write import wide, widest


@torch.no_grad()
def divergence(
    native: Native,
    window: Int[Tensor, " firing"],
    position: Int[Tensor, " firing"],
    writes: Mapping[Head, Write],
    horizon: int,
) -> Float[Tensor, "firing condition step"]:
    """``||S' - S|| / ||S||`` from the token on, of the heads edited taken together, with nothing else changed.

    ``writes``, ``[firing, condition]``, stand instead of the native ones; ``horizon`` tokens are followed. Exact for
    edits of one layer. Where several are edited, what lower edits do to the inputs of upper layers is left out.
    """
    at = position[:, None] + torch.arange(horizon + 1, device=position.device)
    moved2 = state2 = torch.zeros((), dtype=widest(position.device), device=position.device)
    for (layer, head), write in writes.items():
        dynamics = native.cache.dynamics(layer).heads([head])
        rec, own = dynamics.recurrence, dynamics.native[:, :, 0]
        norm2 = torch.stack([wide(S).square().sum((-1, -2))[:, 0] for S in dynamics.each_state()], 1)
        state2 = state2 + norm2[window[:, None], at][:, None]
        pick = lambda x: wide(x[:, :, 0][window[:, None], at])  # noqa: E731
        edit = write - own[window, position][:, None]
        keys, values = (wide(x) for x in edit.factors())  # [firing, condition, rank, ...]
        gram, found = values @ values.mT, []
        decay = pick(rec.log_decay).exp().reshape(*at.shape, 1, 1, -1)
        erase = rec.erase()
        a, b = (None, None) if erase is None else (pick(x)[:, :, None] for x in erase)
        for step in range(horizon + 1):
            if step:
                erased = 0.0 if a is None or b is None else keys @ b[:, step].mT @ a[:, step]
                keys = decay[:, step] * keys + erased
            found.append(((keys @ keys.mT) * gram).sum((-1, -2)).clamp_min(0))
        moved2 = moved2 + torch.stack(found, -1)
    return (moved2 / state2.clamp_min(1e-37)).sqrt().float()
