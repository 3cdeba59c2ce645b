"""Reading with an SAE: which atoms are active at every token, from a text or from what a head writes.

States are read as streams, ``v^T S_t w`` decaying as they do and carried from block to block; where there is one decay
per key channel, readings do not decay as one number, and states are built a block of positions at a time. Neither holds
all pre-activations, or all states, of a long text.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from writesae.hooks.attachable import fit
from writesae.hooks.clock import cache_in
from writesae.hooks.names import inputs
from writesae.hooks.positions import PAD
from writesae.recurrence import Write
from writesae.recurrence.dynamics import States
from writesae.recurrence.kernels import CHUNK, full_precision
from writesae.recurrence.matrices import Matrices, size
from writesae.saes.autoencoder import Autoencoder
from writesae.saes.config import SAEConfig, Target

if TYPE_CHECKING:
    from writesae.hooks import ActivationCache
    from writesae.model import HookedRecurrentModel, Text

BLOCK = 2**20  # numbers: pre-activations, or entries of states, worked on at once


@dataclass(frozen=True, eq=False)
class Codes:
    """The active atoms at every token of some sequences.

    Attributes:
        values: activations, largest first; 0 where fewer are active, and at padding.
        indices: their atoms.
        tokens: token ids.
        positions: of each token in its sequence; -1 for padding.
        cfg: of the SAE.
    """

    values: Float[Tensor, "batch pos m"]
    indices: Int[Tensor, "batch pos m"]
    tokens: Int[Tensor, "batch pos"]
    positions: Int[Tensor, "batch pos"]
    cfg: SAEConfig

    @property
    def n_atoms(self) -> int:
        return self.cfg.n_atoms

    @property
    def n_tokens(self) -> int:
        """Without padding."""
        return int((self.positions != PAD).sum())

    @property
    def fired(self) -> Int[Tensor, " n_atoms"]:
        """At how many tokens each atom is active."""
        return self.indices[self.values > 0].bincount(minlength=self.n_atoms)

    def dense(self) -> Float[Tensor, "batch pos n_atoms"]:
        """Activations of all atoms."""
        return self.values.new_zeros(*self.tokens.shape, self.n_atoms).scatter_add(-1, self.indices, self.values)

    def atom(self, index: int) -> Float[Tensor, "batch pos"]:
        """Activations of one atom; IndexError if there is no such atom."""
        if not 0 <= index < self.n_atoms:
            raise IndexError(f"atom {index}: this SAE has atoms 0 to {self.n_atoms - 1}")
        return (self.values * (self.indices == index)).sum(-1)

    def __repr__(self) -> str:
        active, n = int((self.values > 0).sum()), self.n_tokens
        return (
            f"Codes({len(self.tokens)} sequences, {n:,} tokens: {active / max(n, 1):.1f} of {self.n_atoms:,} atoms "
            f"active per token, {int((self.fired > 0).sum()):,} of them somewhere)"
        )


@torch.no_grad()
def encode(
    model: HookedRecurrentModel,
    sae: Autoencoder,
    x: Text,
    *,
    check_model: bool = True,
    batch_size: int = 8,
    **kwargs: Any,
) -> Codes:
    """Which atoms are active at every token of a text, several, or token ids; no gradient is kept.

    Equal to ``sae.encode`` of what the cache of a pass has: writes, deltas or states, with whatever hooks and
    interventions are attached to the model. Padding activates nothing.

    Args:
        model: the model.
        sae: an SAE of one of its heads.
        x: as for ``model(x)``.
        check_model: refuse an SAE trained on other weights.
        batch_size: sequences run at once. Interventions with positions for each sequence want all of them at once.
        **kwargs: for the model, e.g. ``attention_mask``. Others than that may hold something of every sequence, as
            ``past_key_values`` does, so with them all sequences are run at once.

    Raises:
        ValueError: the SAE does not say its layer and head, or is for another model; text without a tokenizer; a
            batch_topk SAE without a threshold; the mask does not say which tokens are padding.
    """
    fit(sae, model, check_model=check_model)
    if set(kwargs) - {"attention_mask"}:
        return _pass(model, sae, x, model.to_tokens(x)[0], **kwargs)
    ids, mask = model.to_tokens(x)
    mask = kwargs.get("attention_mask", mask)
    parts = []
    for start in range(0, len(ids), batch_size):
        rows, own = ids[start : start + batch_size], None if mask is None else mask[start : start + batch_size]
        if own is not None and own.ndim == 2:  # padding that these have in common, from longer texts of other batches
            first = int(own.bool().any(0).int().argmax())
            rows, own = rows[:, first:], own[:, first:]
        parts.append(_pass(model, sae, rows, rows, attention_mask=own))
    return _joined(parts, ids)


@torch.no_grad()
def encode_matrices(
    sae: Autoencoder, x: Matrices, initial: Float[Tensor, "batch d_key d_value"] | None = None, *, block: int = BLOCK
) -> tuple[Float[Tensor, "batch pos m"], Int[Tensor, "batch pos m"]]:
    """Activations, largest first, and their atoms, of matrices along sequences, ``[batch, pos]``; as ``sae.topk``.

    Works on a block of positions at a time, so that neither states nor the pre-activations of all atoms are held.

    Args:
        sae: the SAE.
        x: writes, deltas, dense matrices, or `States`.
        initial: for `States`: the state before the first token, None for zero.
        block: how many numbers to work on at once: pre-activations, or entries of states.
    """
    x = x.to(sae.b_enc.device)
    initial = None if initial is None else initial.to(sae.b_enc.device)
    # Filled in place: small results kept between large blocks would leave the memory in holes that no block fits into.
    values = sae.b_enc.new_zeros(*size(x)[:2], sae.sparsity.width(sae.cfg) or 1)
    indices, start = torch.zeros_like(values, dtype=torch.long), 0
    with full_precision(sae.b_enc.device):
        for pre in _pre(sae, x, initial, block):
            found, m = sae.sparsify(pre), values.shape[-1]
            if (more := found[0].shape[-1] - m) > 0:
                values, indices = (F.pad(part, (0, more)) for part in (values, indices))
            for whole, part in zip((values, indices), found, strict=True):
                whole[:, start : start + pre.shape[1], : part.shape[-1]] = part
            start += pre.shape[1]
    return values, indices


def _pre(
    sae: Autoencoder, x: Matrices, initial: Tensor | None, block: int
) -> Iterator[Float[Tensor, "batch block n_atoms"]]:
    """Pre-activations, a block of positions after the other."""
    batch, n_pos, d_key, d_value = size(x)
    rank = x.gain.rank if isinstance(x, States) else x.rank if isinstance(x, Write) else 1
    step = block // (batch * max(sae.cfg.n_atoms * sae.cfg.rank * rank, d_key * d_value))
    step = step // CHUNK * CHUNK or max(step, 1)  # whole chunks of the decayed sum
    if isinstance(x, States) and not x.one_decay:
        yield from map(sae.pre, x.pieces(step, initial))
        return
    before = sae.pre(initial) if isinstance(x, States) and initial is not None else None
    for start in range(0, n_pos, step):
        here = (slice(None), slice(start, start + step))
        if not isinstance(x, States):
            yield sae.pre(x[here])
        else:
            pre = sae.pre_of_states(x.gain[here], x.log_decay[here], before)
            before = pre[:, -1].clone()
            yield pre


# What an SAE reads of a pass


def target_of(
    cache: ActivationCache, layer: int, head: int, target: Target
) -> tuple[Write | States, Float[Tensor, "batch d_key d_value"] | None]:
    """What an SAE with that target reads of a head in a pass, ``[batch, pos]``, nothing built; and, for states, the one
    before the pass (None: zero).

    Edits are in the states, not in the deltas. Models write nothing at padding, and no state is there that could decay.
    """
    if target == "write":
        return cache.write(layer)[:, :, head], None
    dynamics = cache.dynamics(layer).heads([head])
    if target == "delta":
        return dynamics.delta()[:, :, 0], None
    if dynamics.dense:
        raise ValueError(
            f"a hook on the state of layer {layer} changes it: such states are not made of writes. Detach the hook, or "
            f"encode single states, sae.encode(cache.state({layer}, positions, heads=[{head}]))"
        )
    return dynamics.states(0), None if dynamics.initial is None else dynamics.initial[:, 0]


def _pass(model: HookedRecurrentModel, sae: Autoencoder, x: Text, ids: Tensor, **kwargs: Any) -> Codes:
    """One run of the model, read."""
    layer = sae.place.layer
    if cache_in(kwargs) is None:  # nobody wants the rest; a cache has to be filled
        kwargs = {"stop_at_layer": layer + 1, **kwargs}
    _, cache = model.run_with_cache(x, names=inputs(model.family(layer).rule, layer), **kwargs)
    return codes_of(sae, cache, ids)


def codes_of(sae: Autoencoder, cache: ActivationCache, ids: Int[Tensor, "batch pos"]) -> Codes:
    """What an SAE reads of a pass that is there: its cache has `inputs`, ``ids`` are its tokens."""
    found = encode_matrices(sae, *target_of(cache, *sae.place, sae.cfg.target))
    values, indices = (part.to(ids.device) for part in found)
    values = values.masked_fill((cache.positions == PAD)[..., None], 0)
    if sae.sparsity.width(sae.cfg) is None:  # padding may have had more than any token
        m = max(1, int((values > 0).sum(-1).max()))
        values, indices = values[..., :m], indices[..., :m]
    return Codes(values, indices, ids, cache.positions, sae.cfg)


def _joined(parts: list[Codes], ids: Tensor) -> Codes:
    """Passes over parts of a batch as one; sequences of each end together."""
    m = max(part.values.shape[-1] for part in parts)

    def join(name: str, fill: int = 0) -> Tensor:
        rows = []
        for part in parts:
            x: Tensor = getattr(part, name)
            sides = (ids.shape[1] - x.shape[1], 0)
            rows.append(F.pad(x, (0, m - x.shape[2], *sides) if x.ndim == 3 else sides, value=fill))
        with full_precision(rows[0].device):  # autocast concatenates only its own dtypes
            return torch.cat(rows)

    return Codes(join("values"), join("indices"), ids, join("positions", PAD), parts[0].cfg)
