"""From a model and token sequences to an `ActivationStore`: one pass of the model, whatever number of heads.

A shard follows from the model, the tokens and its number alone, and appears whole or not at all. So a run that was
stopped, however, is continued by the same command, several processes share the work without talking to each other, and
the files are the same in the end. (Same to the last bit on the same hardware and number of threads, as the model is.)
"""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from writesae.hooks.names import name_of
from writesae.jobs.disk import write_whole
from writesae.jobs.processes import Processes
from writesae.jobs.versions import versions
from writesae.stores.shards import (
    HEADER,
    REPORT,
    StoredSite,
    StoreInfo,
    checksum,
    read_info,
    read_shard,
    shard_path,
    write_shard,
)
from writesae.stores.store import ActivationStore

if TYPE_CHECKING:
    from writesae.hooks import HookPoint
    from writesae.model import HookedRecurrentModel

DTYPES = ("float16", "bfloat16", "float32")
SHARD_BYTES = 64 * 2**20  # about how large a shard is, if nothing else is asked for


def extract(
    model: HookedRecurrentModel,
    tokens: Int[Tensor, "n pos"],
    sites: Sequence[tuple[int, int]],
    folder: str | Path,
    *,
    batch_size: int = 8,
    shard_sequences: int | None = None,
    dtype: torch.dtype = torch.float16,
    progress: bool = True,
    source: str = "",
) -> ActivationStore:
    """Make a store on disk, or go on where a run with the same arguments stopped.

    Started by ``accelerate launch``, every process makes its share of the shards; all return the whole store.

    Args:
        model: hooked model, nothing attached.
        tokens: sequences of equal length, without padding; each begins from a zero state.
        sites: ``(layer, head)`` of each head to keep.
        folder: a new or empty one, or that of the run to continue.
        batch_size: sequences run at once.
        shard_sequences: sequences of a shard; None for shards of about 64 MB, in whole batches.
        dtype: float16, bfloat16 or float32.
        progress: show a progress bar.
        source: where the tokens came from, for the header.

    Raises:
        IndexError: no such layer or head.
        ValueError: the folder holds something else, or a store made otherwise (the message says in what); a value is
            NaN or infinite, or too large for ``dtype``.
        OSError: the disk is full, or too small for what is still to be made.
    """
    folder, team = Path(folder), Processes.launched()
    new = _describe(model, tokens, sites, batch_size, shard_sequences, dtype, source)
    if team.first:
        _prepare(folder, new)
    team.wait()
    info = _same_as(folder, new)
    todo = [i for i in range(info.n_shards) if not shard_path(folder, i).exists()]
    mine = [i for i in todo if i % team.count == team.index]
    with _bar(f"{len(sites)} heads", [_of_shard(info, tokens, i) for i in mine], progress and team.first) as advance:
        for i in mine:
            rows = _of_shard(info, tokens, i)
            shard = _run(model, info, rows, i * info.shard_sequences, advance)
            with _explained(folder, info):
                write_shard(folder, i, info, shard)
    if team.first and not (folder / REPORT).exists():
        found = store_error(model, tokens, info)
        _write(folder, REPORT, found, info)
    team.wait()
    return ActivationStore.open(folder)


def record(
    model: HookedRecurrentModel,
    tokens: Int[Tensor, "n pos"],
    sites: Sequence[tuple[int, int]],
    *,
    batch_size: int = 8,
    dtype: torch.dtype = torch.float32,
    progress: bool = True,
) -> ActivationStore:
    """The same in memory; arguments and errors are those of `extract`."""
    info = _describe(model, tokens, sites, batch_size, len(tokens), dtype, "")
    with _bar(f"{len(sites)} heads", [tokens], progress) as advance:
        return ActivationStore(info, shards=[_run(model, info, tokens, 0, advance)])


def store_error(model: HookedRecurrentModel, tokens: Int[Tensor, "n pos"], info: StoreInfo) -> dict[str, Any]:
    """How far states rebuilt from a store are from those rebuilt from float32, at some tokens of the first sequences.

    Returns:
        Which sequences and positions, and for each site the largest and the median ``||S' - S|| / ||S||``.
    """
    rows = tokens[: min(4, info.batch_size)]
    exact = replace(info, dtype="float32", n_sequences=len(rows), shard_sequences=len(rows))
    shard = _run(model, exact, rows, 0)
    kept = {name: x if name == "tokens" else x.to(info.torch_dtype) for name, x in shard.items()}
    before = ActivationStore(exact, shards=[shard])
    after = ActivationStore(replace(exact, dtype=info.dtype), shards=[kept])
    positions = sorted({(i + 1) * info.context // 8 - 1 for i in range(8)} - {-1})
    errors = {}
    for site in info.sites:
        where = (site.layer, site.head, slice(None), positions)
        S = before.state(*where)
        off = (after.state(*where) - S).norm(dim=(-2, -1)) / S.norm(dim=(-2, -1)).clamp_min(1e-30)
        errors[str(site)] = {"max": _digits(off.max()), "median": _digits(off.median())}
    return {"dtype": info.dtype, "sequences": len(rows), "positions": positions, "state_error": errors}


def parse_sites(model: HookedRecurrentModel, names: Iterable[str]) -> list[tuple[int, int]]:
    """``LAYER.HEAD`` or ``LAYER.all``, several, as pairs; ValueError or IndexError names what is not one."""
    sites = []
    for name in names:
        layer, _, head = name.partition(".")
        if not layer.isdecimal() or not (head.isdecimal() or head == "all"):
            raise ValueError(f"site {name!r}: write LAYER.HEAD or LAYER.all, e.g. 2.0; `writesae hooks` lists them")
        heads = range(model.site(int(layer)).n_heads) if head == "all" else [int(head)]
        sites += [(int(layer), h) for h in heads]
    return _checked(model, sites)


def _checked(model: HookedRecurrentModel, sites: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Each site once; IndexError if there is no such head."""
    sites = list(dict.fromkeys(sites))
    for layer, head in sites:
        if not 0 <= head < model.site(layer).n_heads:
            raise IndexError(f"head {head} of layer {layer}: allowed are 0 to {model.site(layer).n_heads - 1}")
    return sites


# --- the pass ---------------------------------------------------------------------------------------------------------


def _run(
    model: HookedRecurrentModel,
    info: StoreInfo,
    tokens: Int[Tensor, "n pos"],
    first: int,
    advance: Callable[[int], object] = lambda n: None,
) -> dict[str, Tensor]:
    """The tensors of a shard, for sequences from number ``first`` on."""
    shapes, dtype = info.shapes(), info.torch_dtype
    shard = {name: torch.empty(*tokens.shape, *shape, dtype=dtype) for name, shape in shapes.items()}
    shard["tokens"] = tokens.to("cpu", torch.int32)
    heads = _by_layer((site.layer, site.head) for site in info.sites)
    for start in range(0, len(tokens), info.batch_size):
        rows = slice(start, start + info.batch_size)

        def keep(x: Tensor, point: HookPoint, rows: slice = rows) -> None:
            layer, quantity = point.layer, point.quantity
            given = x[:, :, heads[layer]]
            kept = given.to(dtype).cpu()
            if not bool(kept.isfinite().all()):
                raise _not_finite(given.cpu(), kept, layer, heads[layer], quantity, first + rows.start)
            for i, head in enumerate(heads[layer]):
                shard[f"{layer}.{head}.{quantity}"][rows] = kept[:, :, i]

        _pass(model, tokens[rows], heads, keep)
        advance(len(tokens[rows]))
    return shard


@torch.no_grad()
def _pass(model: HookedRecurrentModel, tokens: Tensor, layers: Iterable[int], keep: Callable[..., None]) -> None:
    """Show the inputs of these layers' recurrences that writes and states depend on, ``[batch, pos, head, ...]``."""
    wanted = [name_of(q, layer) for layer in layers for q in model.family(layer).rule.state_inputs]
    with model.hooks([(name, keep) for name in wanted]):
        # Without the head of the language model, whose logits nobody wants and which may cost as much as the layers.
        model.hf_model.base_model(input_ids=model.to_tokens(tokens)[0], use_cache=False)


def _not_finite(x: Tensor, kept: Tensor, layer: int, heads: list[int], quantity: str, first: int) -> ValueError:
    row, pos, j, *_ = (~kept.isfinite()).nonzero()[0].tolist()
    given = x[row, pos, j].flatten()
    value = given[~kept[row, pos, j].flatten().isfinite()][0].item()
    where = f"layer {layer} head {heads[j]}: {quantity} at sequence {first + row}, position {pos}, is {value:.6g}"
    if torch.tensor(value).isfinite():
        return ValueError(
            f"{where}, too large for {str(kept.dtype).removeprefix('torch.')}, which ends at "
            f"{torch.finfo(kept.dtype).max:.6g}: choose dtype bfloat16 or float32"
        )
    return ValueError(f"{where}: the model itself fails there; look at these tokens, or run it in float32")


def _by_layer(sites: Iterable[tuple[int, int]]) -> dict[int, list[int]]:
    heads: dict[int, list[int]] = {}
    for layer, head in sites:
        heads.setdefault(layer, []).append(head)
    return heads


# --- what it is -------------------------------------------------------------------------------------------------------


def _describe(
    model: HookedRecurrentModel,
    tokens: Tensor,
    sites: Sequence[tuple[int, int]],
    batch_size: int,
    shard_sequences: int | None,
    dtype: torch.dtype,
    source: str,
) -> StoreInfo:
    """The header, after checking all that can be checked before the pass."""
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise ValueError(f"dtype {name}: allowed are {', '.join(DTYPES)}")
    for what, number in (("batch_size", batch_size), ("shard_sequences", shard_sequences)):
        if number is not None and number < 1:
            raise ValueError(f"{what}={number}: must be at least 1")
    if tokens.ndim != 2 or tokens.numel() == 0:
        raise ValueError(f"tokens must be [n, pos], at least one; got {list(tokens.shape)}")
    for part in tokens.split(1024):  # ids are checked before anything is written
        model.to_tokens(part)
    sites = _checked(model, sites)
    if not sites:
        raise ValueError("no sites: name at least one (layer, head)")
    if model.hf_model.training or model.busy:
        raise ValueError(
            "the model is in training mode, or hooks or edits are attached: call model.eval(), detach them"
        )
    heads = _by_layer(sites)
    shapes: dict[int, dict[str, list[int]]] = {layer: {} for layer in heads}
    _pass(
        model, tokens[:1, :2], heads, lambda x, point: shapes[point.layer].update({point.quantity: list(x.shape[3:])})
    )
    stored = []
    for layer, head in sites:
        site = model.site(layer)
        stored.append(StoredSite(layer, head, site.d_key, site.d_value, shapes[layer]))
    if shard_sequences is None:
        of_sequence = tokens.shape[1] * dtype.itemsize * sum(_numbers(site) for site in stored)
        shard_sequences = max(1, SHARD_BYTES // (of_sequence * batch_size)) * batch_size
    ids = tokens.to("cpu", torch.int32).contiguous()
    return StoreInfo(
        model_id=model.model_id,
        model_revision=getattr(model.config, "_commit_hash", None),
        weights=checksum(model.hf_model.state_dict()),
        fingerprints={layer: model.fingerprint(layer) for layer in heads},
        families={layer: model.family(layer).rule.name for layer in heads},
        sites=tuple(stored),
        context=tokens.shape[1],
        n_sequences=len(tokens),
        shard_sequences=shard_sequences,
        batch_size=batch_size,
        dtype=name,
        tokens_sha256=hashlib.sha256(ids.numpy().data).hexdigest(),
        source=source,
        versions=versions("writesae", "torch", "transformers"),
    )


def _numbers(site: StoredSite) -> int:
    """How many numbers of a site are kept a token."""
    return sum(torch.Size(shape).numel() for shape in site.shapes.values())


# --- the folder -------------------------------------------------------------------------------------------------------


def _prepare(folder: Path, new: StoreInfo) -> None:
    """A header and room for the shards; what a killed run left half-written is removed."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in (HEADER, REPORT, "shard-*.safetensors"):
        for left_over in folder.glob(f".{name}.*.tmp"):
            left_over.unlink()
    if (folder / HEADER).exists():
        info = _same_as(folder, new)
    elif any(folder.iterdir()):
        raise ValueError(f"{folder} holds other files, and no {HEADER}: choose a new folder")
    else:
        info = new
    there = [i for i in range(info.n_shards) if shard_path(folder, i).exists()]
    for i in there:
        read_shard(folder, i, info, check=False)
    of_sequence = info.context * (4 + info.torch_dtype.itemsize * sum(_numbers(site) for site in info.sites))
    of_shard = of_sequence * info.shard_sequences
    needed = of_sequence * info.n_sequences - of_shard * len(there)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(
            f"{folder}: what is still to be made takes {needed / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free: make "
            f"room, or extract fewer heads or tokens"
        )
    if not (folder / HEADER).exists():
        _write(folder, HEADER, asdict(new), new)


def _same_as(folder: Path, new: StoreInfo) -> StoreInfo:
    """The header that is there; ValueError says in what this run differs from it."""
    old = read_info(folder)
    known, asked = asdict(old), asdict(new)
    differ = [name for name in known if name != "source" and known[name] != asked[name]]
    if "sites" in differ:
        known["sites"], asked["sites"] = (" ".join(map(str, info.sites)) for info in (old, new))
    if differ:
        pairs = "; ".join(f"{name} {known[name]!s:.60} there, {asked[name]!s:.60} now" for name in differ)
        raise ValueError(f"{folder} was begun otherwise: {pairs}. Give what it was begun with, or choose a new folder")
    return old


def _write(folder: Path, name: str, values: dict[str, Any], info: StoreInfo) -> None:
    with _explained(folder, info):
        write_whole(folder / name, (json.dumps(values, indent=2) + "\n").encode())


@contextmanager
def _explained(folder: Path, info: StoreInfo) -> Iterator[None]:
    """A disk that is full, or gone, in the middle of it."""
    try:
        yield
    except OSError as e:
        done = sum(shard_path(folder, i).exists() for i in range(info.n_shards))
        full = "the disk is full" if e.errno in (errno.ENOSPC, errno.EDQUOT) else str(e)
        found = OSError(
            f"{folder}: {full}. {done} of {info.n_shards} shards are whole and stay; when this is mended, the same "
            f"command continues"
        )
        found.errno = e.errno
        raise found from e


def _of_shard(info: StoreInfo, tokens: Tensor, i: int) -> Tensor:
    return tokens[i * info.shard_sequences : (i + 1) * info.shard_sequences]


@contextmanager
def _bar(what: str, parts: Sequence[Tensor], show: bool) -> Iterator[Callable[[int], object]]:
    """A progress bar over sequences."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, TimeRemainingColumn(), disable=not show) as bar:
        task = bar.add_task(what, total=sum(map(len, parts)))
        yield lambda n: bar.advance(task, n)


def _digits(x: Tensor) -> float:
    return float(f"{float(x):.3g}")
