"""From a model and a text to an SAE of one head: gather what the head writes, train, note where the SAE belongs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from rich.progress import track
from torch import Tensor

from writesae.recurrence import Write
from writesae.saes.config import VARIANTS, SAEConfig, Target
from writesae.saes.matrices import Matrices
from writesae.saes.train import train_sae
from writesae.saes.write_sae import WriteSAE

if TYPE_CHECKING:
    from writesae.hooks import ActivationCache
    from writesae.model import HookedRecurrentModel


@torch.no_grad()
def collect(
    model: HookedRecurrentModel,
    tokens: Int[Tensor, "n pos"],
    layer: int,
    head: int,
    target: Target = "write",
    *,
    stride: int = 1,
    batch_size: int = 8,
    progress: bool = True,
) -> Matrices:
    """What one head writes, or its states, over token sequences.

    Args:
        model: hooked model.
        tokens: sequences of equal length, without padding.
        layer, head: which head; head is a value head.
        target: ``"write"``, ``"delta"`` or ``"state"``, see `SAEConfig`.
        stride: keep every so-manieth position of each sequence, from ``stride - 1`` on. A state takes
            ``d_key * d_value`` numbers, so keep few of those.
        batch_size: sequences run at once.
        progress: show a progress bar.

    Returns:
        Samples in the order of the text: a `Write` with leading dimension ``[N]``; states ``[N, d_key, d_value]``.

    Raises:
        IndexError: no such recurrent layer, or head.
    """
    site = model.site(layer)
    if not 0 <= head < site.n_heads:
        raise IndexError(f"head {head} of layer {layer}: allowed are 0 to {site.n_heads - 1}")
    prefix = f"blocks.{layer}.mixer."
    positions = list(range(stride - 1, tokens.shape[1], stride))
    parts: list[Any] = []
    for batch in track(tokens.split(batch_size), f"layer {layer}, head {head}", disable=not progress):
        names = [n for n in model.hook_names if n.startswith(prefix) and not n.endswith("hook_state")]
        _, cache = model.run_with_cache(batch, names=f"{prefix}hook_write" if target == "write" else names)
        found = target_of(cache, layer, head, target, positions)
        if isinstance(found, Write):
            parts.append((found.key.flatten(0, 1), found.value.flatten(0, 1), found.rank))
        else:
            parts.append(found.flatten(0, 1))
    if target == "state":
        return torch.cat(parts)
    keys, values, ranks = zip(*parts, strict=True)
    return Write(torch.cat(keys), torch.cat(values), rank=ranks[0])


def train_site(
    model: HookedRecurrentModel,
    text: str | Sequence[str] | Int[Tensor, "n pos"],
    layer: int,
    head: int,
    *,
    n_atoms: int = 1024,
    k: int = 1,
    target: Target = "write",
    variant: str = "TiedSAE",
    context: int = 512,
    held_out: float = 0.1,
    stride: int = 1,
    progress: bool = True,
    **training: Any,
) -> WriteSAE:
    """Collect from a text, train, and fill in where the SAE belongs.

    Args:
        model: hooked model.
        text: a text, several (each its own sequences), or token ids ``[n, pos]``.
        layer, head: which head.
        n_atoms, k, target, tied: see `SAEConfig`. With ``k=1`` one atom has to carry a write alone, as the replacement
            test asks of it; the paper has 32 atoms active in a state.
        context: tokens of a sequence; what is left of a text after the last whole sequence is dropped.
        held_out: share of the sequences, at the end, that is only measured on.
        stride: see `collect`.
        progress: show progress bars.
        **training: for `train_sae`: ``steps``, ``batch_size``, ``lr``, ``checkpoint``, ``seed``, ...

    Returns:
        The SAE; ``sae.cfg.training`` holds settings and measurements.

    Raises:
        ValueError: the text is shorter than two sequences.
    """
    tokens = text if isinstance(text, Tensor) else sequences(model, text, context)
    n_train = len(tokens) - round(held_out * len(tokens))
    if n_train < 1:
        raise ValueError(f"the text makes {len(tokens)} sequences of {context} tokens: too few; give more text")
    data = collect(model, tokens, layer, head, target, stride=stride, progress=progress)
    site = model.site(layer)
    cfg = SAEConfig(
        d_key=site.d_key,
        d_value=site.d_value,
        n_atoms=n_atoms,
        k=k,
        target=target,
        **VARIANTS[variant],
        layer=layer,
        head=head,
        model_id=model.model_id,
        model_revision=getattr(model.config, "_commit_hash", None),
        fingerprint=model.fingerprint(layer),
        training={"tokens": tokens.numel(), "context": tokens.shape[1], "stride": stride},
    )
    boundary = n_train * (tokens.shape[1] // stride) if n_train < len(tokens) else None
    return train_sae(cfg, data, validation=boundary, progress=progress, **training)


def sequences(model: HookedRecurrentModel, text: str | Sequence[str], context: int) -> Int[Tensor, "n pos"]:
    """Each text cut into sequences of ``context`` tokens; what is left at its end is dropped."""
    rows = [model.to_tokens(part)[0][0] for part in ([text] if isinstance(text, str) else text)]
    return torch.cat([row[: len(row) // context * context].reshape(-1, context) for row in rows])


def target_of(cache: ActivationCache, layer: int, head: int, target: Target, positions: Sequence[int]) -> Matrices:
    """What an SAE with that target reads of a head, ``[batch, n_positions]``, from a pass without padding."""
    if target == "state":
        return cache.state(layer, positions, heads=[head])[:, :, 0]
    return (cache.write(layer) if target == "write" else cache.delta(layer))[:, list(positions), head]
