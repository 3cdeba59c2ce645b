"""From a model and a text, or a store, to SAEs of its heads: gather what they write, train, note where each belongs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from functools import partial
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor

from writesae.hooks.sites import Head
from writesae.jobs.arguments import named_kinds
from writesae.jobs.choices import one_of
from writesae.models.devices import device_named
from writesae.recurrence.matrices import Matrices
from writesae.saes.config import VARIANTS, SAEConfig, Target
from writesae.saes.sae import WriteSAE
from writesae.saes.training.data import FromStore
from writesae.saes.training.run import Log, Run, Settings
from writesae.saes.training.train import train_runs
from writesae.stores.extraction import record
from writesae.stores.store import ActivationStore
from writesae.stores.windows import Windows

if TYPE_CHECKING:
    from writesae.model import HookedRecurrentModel

RECIPES: dict[str, dict[str, Any]] = {
    # One atom has to carry a write alone, as the replacement test asks of it. With several, an encoder of their own
    # (`VARIANTS["WriteSAE"]`) finds those that go together, where tied ones all find what is largest: see `planned`.
    "write": dict(variant="TiedSAE", k=1, batch_size=2048, lr=5e-3),
    "delta": dict(variant="TiedSAE", k=1, batch_size=2048, lr=5e-3),
    # A state is a sum of many writes; the paper has 32 atoms active. Batches are whole sequences. Beside resampling the
    # auxiliary loss changed nothing that was measured (error, atoms alive), and a step takes 1.4 times as long with it.
    "state": dict(variant="WriteSAE", k=32, batch_size=512, lr=5e-3, aux_weight=0.0),
}


def collect(
    model: HookedRecurrentModel,
    tokens: Int[Tensor, "n pos"],
    layer: int,
    head: int,
    target: Target = "write",
    *,
    stride: int = 8,
    batch_size: int = 8,
    progress: bool = True,
) -> Matrices:
    """What one head writes, or its states, over token sequences.

    Args:
        model: hooked model.
        tokens: sequences of equal length, without padding.
        layer, head: which head; head is a value head.
        target: ``"write"``, ``"delta"`` or ``"state"``, see `SAEConfig`.
        stride: of states under one decay per key channel, keep every ``stride``-th position of each sequence, from
            ``stride - 1`` on: each takes ``d_key * d_value`` numbers.
        batch_size: sequences run at once.
        progress: show a progress bar.

    Returns:
        Samples in the order of the text: a `Write` with leading dimension ``[N]``. For states, `States` ``[n, pos]``,
        none of them built; under one decay per key channel ``[N, d_key, d_value]``.

    Raises:
        IndexError: no such recurrent layer, or head.
    """
    store = record(model, tokens, [(layer, head)], batch_size=batch_size, progress=progress)
    data = FromStore(store, layer, head, target, held_out=0.0, stride=stride)
    return data.load(torch.arange(len(store)))


@named_kinds
def train_site(
    model: HookedRecurrentModel,
    text: str | Sequence[str] | Int[Tensor, "n pos"],
    layer: int,
    head: int,
    *,
    context: int = 512,
    progress: bool = True,
    **options: Any,
) -> WriteSAE:
    """Collect from a text in memory, train, and fill in where the SAE belongs.

    Args:
        model: hooked model.
        text: a text, several (each its own sequences), or token ids ``[n, pos]``.
        layer, head: which head.
        context: tokens of a sequence; what is left of a text after the last whole sequence is dropped.
        progress: show progress bars.
        **options: as for `train_store`: ``n_atoms``, ``k``, ``target``, ``variant``, ``steps``, ``checkpoint``, ...
            Without ``device``, it is trained where the model is.

    Returns:
        The SAE; ``sae.cfg.training`` holds settings and measurements.

    Raises:
        ValueError: the text is shorter than two sequences.
    """
    of_store = signature(train_store).parameters.keys() - signature(planned).parameters.keys()
    planned(**{name: value for name, value in options.items() if name not in of_store})
    windows = (
        Windows.of_rows(list(text), text.shape[1]) if isinstance(text, Tensor) else Windows.cut(model, text, context)
    )
    store = record(model, windows.enough(2).tokens, [(layer, head)], progress=progress)
    return train_store(store, progress=progress, **{"device": model.device, **options})[layer, head]


def train_store(
    store: ActivationStore,
    sites: Sequence[tuple[int, int]] | None = None,
    *,
    target: Target = "write",
    variant: str | None = None,
    sparsity: str = "topk",
    n_atoms: int = 1024,
    k: int | None = None,
    choices: Mapping[str, Any] | None = None,
    out: str | Path | None = None,
    held_out: float = 0.1,
    stride: int = 8,
    buffer_tokens: int = 2**20,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 500,
    log: str | Path | Log | None = None,
    log_every: int = 50,
    evaluate_every: int | None = None,
    also_log: Callable[[str, dict[str, Any]], Any] | None = None,
    device: torch.device | str = "cpu",
    progress: bool = True,
    **training: Any,
) -> dict[tuple[int, int], WriteSAE]:
    """Train an SAE for each of several heads of a store, side by side.

    Args:
        store: the store.
        sites: ``(layer, head)`` of each; None for all of the store.
        target: what the SAEs read, see `SAEConfig`.
        variant: encoder and decoder by name, see `VARIANTS`. Default: ``RECIPES[target]``, as for ``k`` and some of
            `Settings`; with another ``k`` a ``"WriteSAE"``, since of tied atoms several are worse than one.
        sparsity, n_atoms, k: see `SAEConfig`.
        choices: further fields of `SAEConfig`: ``rank``, ``center``, ``decoder_bias``.
        out: each SAE is saved to ``out/L<layer>H<head>``, with its checkpoint and its ``metrics.jsonl``; the same call
            goes on where it stopped.
        held_out: share of the sequences, evenly spread, that is only measured on.
        stride, buffer_tokens: see `writesae.saes.training.data.FromStore`.
        checkpoint, log: of a single site, instead of those in ``out``.
        checkpoint_every, log_every, evaluate_every: in steps, see `train_sae`.
        also_log: is given each head's name (``"L2H0"``) and what is logged.
        device: where to train; ``"auto"`` for the accelerator that is there, or else the CPU.
        progress: show progress bars.
        **training: fields of `Settings`: ``steps``, ``batch_size``, ``lr``, ``seed``, ...

    Raises:
        IndexError: no such site in the store.
        ValueError: a setting that cannot be, no such device, or a checkpoint of another training.
    """
    device = device_named(device)
    settings, values = planned(
        target=target, variant=variant, sparsity=sparsity, n_atoms=n_atoms, k=k, choices=choices, **training
    )
    places = {Head(*place).folder: Head(*place) for place in (store.sites if sites is None else sites)}
    runs: dict[str, Run] = {}
    for name, (layer, head) in places.items():
        cfg = site_config(store, layer, head, **values)
        data = FromStore(
            store, layer, head, target, held_out=held_out, stride=stride, buffer_tokens=buffer_tokens,
            seed=settings.seed, device=device,
        )  # fmt: skip
        folder = None if out is None else Path(out) / name
        runs[name] = Run(
            cfg, data, settings,
            folder / "checkpoint.safetensors" if folder else None if checkpoint is None else Path(checkpoint),
            checkpoint_every, log if folder is None or log is not None else folder / "metrics.jsonl", log_every,
            evaluate_every, None if also_log is None else partial(also_log, name),
        )  # fmt: skip
    saes = train_runs(runs, progress)
    for name, sae in saes.items():
        if out is not None and runs[name].processes.first:
            sae.save_pretrained(Path(out) / name)
    return {place: saes[name] for name, place in places.items()}


def planned(
    *,
    target: str = "write",
    variant: str | None = None,
    sparsity: str = "topk",
    n_atoms: int = 1024,
    k: int | None = None,
    choices: Mapping[str, Any] | None = None,
    **training: Any,
) -> tuple[Settings, dict[str, Any]]:
    """What a training will use, or its error, before anything is read or run. Arguments are those of `train_store`.

    Returns:
        Its settings, and what `SAEConfig.variant` is given for each head beside the head's own shape.

    Raises:
        ValueError: a target, variant, sparsity or setting that does not exist, or cannot be.
    """
    recipe = dict(RECIPES[one_of("target", target, RECIPES)])
    for name in training:
        if name == "encoder":
            raise ValueError(f"an SAE's encoder comes with its variant: variant is one of {', '.join(VARIANTS)}")
        one_of("setting of a training", name, (f.name for f in fields(Settings)))
    for name in choices or {}:
        one_of("field of an SAE", name, (f.name for f in fields(SAEConfig)))
    settings = Settings(**{name: recipe[name] for name in recipe if name not in ("variant", "k")} | training)
    k = recipe["k"] if k is None else k
    default = recipe["variant"] if k == recipe["k"] else "WriteSAE"
    values = dict(
        name=variant or default, n_atoms=n_atoms, k=k, target=target,
        sparsity=sparsity, **dict(choices or {}),
    )  # fmt: skip
    SAEConfig.variant(**values, d_key=2**30, d_value=2**30)  # of a shape that no rank exceeds
    return settings, values


def site_config(store: ActivationStore, layer: int, head: int, **values: Any) -> SAEConfig:
    """The configuration of an SAE for one head of a store, see `SAEConfig.variant`."""
    site, info = store.site(layer, head), store.info
    return SAEConfig.variant(
        d_key=site.d_key,
        d_value=site.d_value,
        layer=layer,
        head=head,
        model_id=info.model_id,
        model_revision=info.model_revision,
        fingerprint=info.fingerprints[layer],
        training={"tokens": info.n_sequences * info.context, "context": info.context, **info.reading},
        **values,
    )
