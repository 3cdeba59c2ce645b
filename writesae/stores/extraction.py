"""From a model and token sequences to an `ActivationStore`: one pass of the model for any number of heads.

A shard follows from the model, the tokens and its number alone, and appears whole or not at all. So the same command
continues a run that was stopped, several processes share the work without communicating, and the files are the same in
the end (to the last bit on the same hardware with the same number of threads, as the model's outputs are).
"""

from __future__ import annotations

import errno
import hashlib
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor

from writesae.hooks.names import inputs
from writesae.hooks.scope import owning
from writesae.hooks.sites import Head
from writesae.jobs.disk import remove_halves, write_json
from writesae.jobs.processes import Processes, is_sharded
from writesae.jobs.progress import Bars
from writesae.jobs.resumable import check_same
from writesae.jobs.versions import versions
from writesae.models.quantized import check_finite
from writesae.recurrence.write import index_of
from writesae.stores.shards import (
    DTYPES,
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

SHARD_BYTES = 64 * 2**20  # about how large a shard is by default


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
    """Make a store on disk, or continue where a run with the same arguments stopped.

    Under ``accelerate launch`` every process makes its share of the shards; all return the whole store. The processes
    of a tensor-parallel model (``tp_plan="auto"``) make every shard together.

    Args:
        model: hooked model, with nothing attached.
        tokens: sequences of equal length, without padding; each begins from a zero state.
        sites: ``(layer, head)`` of each head to store.
        folder: a new or empty folder, or that of the run to continue.
        batch_size: sequences run at once.
        shard_sequences: sequences per shard; None for shards of about 64 MB, in whole batches.
        dtype: precision of the store: float16, bfloat16 or float32.
        progress: show a progress bar.
        source: where the tokens came from, for the header.

    Raises:
        IndexError: no such layer or head.
        ValueError: the folder holds other files, or a store made with other arguments (the message says which); a
            value, or a weight of the model, is NaN or infinite, or too large for ``dtype``.
        OSError: the disk is full, or has too little room for the rest of the store.
    """
    folder, team = Path(folder), Processes.launched()
    new = _describe(model, tokens, sites, batch_size, shard_sequences, dtype, source)
    if team.first:
        _prepare(folder, new)
    team.wait()
    info = _same_as(folder, new)
    todo = [i for i in range(info.n_shards) if not shard_path(folder, i).exists()]
    # The processes of a tensor-parallel model compute every shard together, and one of them writes it.
    together = any(map(is_sharded, model.hf_model.parameters()))
    mine = todo if together else [i for i in todo if i % team.count == team.index]
    with Bars(progress and team.first) as bars:
        bar = bars.add(f"{len(sites)} heads", total=sum(len(_of_shard(info, tokens, i)) for i in mine))
        for i in mine:
            rows = _of_shard(info, tokens, i)
            shard = _run(model, info, rows, i * info.shard_sequences, bar.advance)
            if not together or team.first:
                with _explained(folder, info):
                    write_shard(folder, i, info, shard)
    missing = not (folder / REPORT).exists()
    if together:
        team.wait()  # nobody looks whether it is there when the first has written it
    if missing and (together or team.first):
        found = store_error(model, tokens, info)
        if team.first:
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
    """A store in memory; arguments and errors are those of `extract`."""
    info = _describe(model, tokens, sites, batch_size, len(tokens), dtype, "")
    with Bars(progress) as bars:
        bar = bars.add(f"{len(sites)} heads", total=len(tokens))
        return ActivationStore(info, shards=[_run(model, info, tokens, 0, bar.advance)])


def store_error(model: HookedRecurrentModel, tokens: Int[Tensor, "n pos"], info: StoreInfo) -> dict[str, Any]:
    """How far states rebuilt from a store are from those rebuilt from float32, at some tokens of the first sequences.

    Returns:
        How many sequences, which positions, and for each head the largest and the median ``||S' - S|| / ||S||``.
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
        S, kept_S = (store.state(site.layer, site.head, slice(None), positions) for store in (before, after))
        off = (kept_S - S).norm(dim=(-2, -1)) / S.norm(dim=(-2, -1)).clamp_min(1e-30)
        errors[str(site)] = {"max": _digits(off.max()), "median": _digits(off.median())}
    return {"dtype": info.dtype, "sequences": len(rows), "positions": positions, "state_error": errors}


def parse_sites(model: HookedRecurrentModel, names: Iterable[str]) -> list[Head]:
    """The heads that names stand for, each ``LAYER.HEAD`` or ``LAYER.all``.

    Raises:
        ValueError: a name of another form.
        IndexError: a layer that is not recurrent, or a head that it does not have.
    """
    sites = []
    for name in names:
        layer, _, head = name.partition(".")
        if not layer.isdecimal() or not (head.isdecimal() or head == "all"):
            raise ValueError(f"site {name!r}: write LAYER.HEAD or LAYER.all, e.g. 2.0; `writesae hooks` lists them")
        heads = range(model.site(int(layer)).n_heads) if head == "all" else [int(head)]
        sites += [Head(int(layer), h) for h in heads]
    return _checked(model, sites)


def _checked(model: HookedRecurrentModel, sites: Iterable[tuple[int, int]]) -> list[Head]:
    """Each head once; IndexError if there is no such head."""
    heads = [Head(*site) for site in dict.fromkeys(sites)]
    for layer, head in heads:
        if not 0 <= head < model.site(layer).n_heads:
            raise IndexError(f"head {head} of layer {layer}: allowed are 0 to {model.site(layer).n_heads - 1}")
    return heads


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
    heads = _by_layer(site.place for site in info.sites)
    for start in range(0, len(tokens), info.batch_size):
        rows = slice(start, start + info.batch_size)

        def keep(x: Tensor, point: HookPoint, rows: slice = rows) -> None:
            layer, quantity = point.layer, point.quantity
            given = x[:, :, index_of(heads[layer])]
            kept = given.to(dtype).cpu()
            if not bool(kept.isfinite().all()):
                raise _not_finite(given.cpu(), kept, layer, heads[layer], quantity, first + rows.start)
            for i, head in enumerate(heads[layer]):
                shard[f"{Head(layer, head)}.{quantity}"][rows] = kept[:, :, i]

        _pass(model, tokens[rows], heads, keep)
        advance(len(tokens[rows]))
    return shard


@torch.no_grad()
def _pass(model: HookedRecurrentModel, tokens: Tensor, layers: Collection[int], keep: Callable[..., None]) -> None:
    """Give ``keep`` the inputs of these layers' recurrences that writes and states depend on."""
    wanted = [name for layer in layers for name in inputs(model.family(layer).rule, layer)]
    with owning(everywhere=False), model.hooks([(name, keep) for name in wanted]):
        model(tokens, stop_at_layer=max(layers) + 1)  # nobody wants the layers above, nor logits


def _not_finite(x: Tensor, kept: Tensor, layer: int, heads: list[int], quantity: str, first: int) -> ValueError:
    row, pos, j, *_ = (~kept.isfinite()).nonzero()[0].tolist()
    given = x[row, pos, j].flatten()
    value = given[~kept[row, pos, j].flatten().isfinite()][0].item()
    place = Head(layer, heads[j]).words
    where = f"{place}: {quantity} at sequence {first + row}, position {pos}, is {value:.6g}"
    if torch.tensor(value).isfinite():
        return ValueError(
            f"{where}, too large for {str(kept.dtype).removeprefix('torch.')}, which ends at "
            f"{torch.finfo(kept.dtype).max:.6g}: choose dtype bfloat16 or float32"
        )
    return ValueError(f"{where}: the model itself fails there; look at these tokens, or run it in float32")


def _by_layer(sites: Iterable[Head]) -> dict[int, list[int]]:
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
    """The header, after checking everything that can be checked before the pass."""
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
    chosen = _checked(model, sites)
    if not chosen:
        raise ValueError("no sites: name at least one (layer, head)")
    if model.hf_model.training or model.busy:
        raise ValueError(
            "the model is in training mode, or hooks or edits are attached: call model.eval(), detach them"
        )
    check_finite(model.hf_model)
    heads = _by_layer(chosen)
    shapes: dict[int, dict[str, list[int]]] = {layer: {} for layer in heads}
    _pass(
        model, tokens[:1, :2], heads, lambda x, point: shapes[point.layer].update({point.quantity: list(x.shape[3:])})
    )
    stored = []
    for layer, head in chosen:
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
        reading=model.reading,
    )


def _numbers(site: StoredSite) -> int:
    """How many numbers of a head are stored per token."""
    return sum(torch.Size(shape).numel() for shape in site.shapes.values())


# --- the folder -------------------------------------------------------------------------------------------------------


def _prepare(folder: Path, new: StoreInfo) -> None:
    """Write the header and check that there is room for the shards; remove what a killed run left half-written."""
    folder.mkdir(parents=True, exist_ok=True)
    remove_halves(folder, HEADER, REPORT, "shard-*.safetensors")
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
        _write(folder, HEADER, new.to_dict(), new)


def _same_as(folder: Path, new: StoreInfo) -> StoreInfo:
    """The header that is there; ValueError says in what this run differs from the one that began it."""
    old = read_info(folder)
    check_same(folder, _work(old), _work(new))
    return old


def _work(info: StoreInfo) -> dict[str, Any]:
    """What every shard depends on, as a message can name it."""
    work = asdict(info) | {"families": info.rules, "sites": " ".join(map(str, info.sites))}
    # Fingerprints follow from the weights, and those that 0.1.0 wrote are others.
    return {name: value for name, value in work.items() if name not in ("source", "fingerprints")}


def _write(folder: Path, name: str, values: dict[str, Any], info: StoreInfo) -> None:
    with _explained(folder, info):
        write_json(folder / name, values)


@contextmanager
def _explained(folder: Path, info: StoreInfo) -> Iterator[None]:
    """Explain that the disk is full, or gone, in the middle of the work, and what to do."""
    try:
        yield
    except OSError as e:
        done = sum(shard_path(folder, i).exists() for i in range(info.n_shards))
        full = "the disk is full" if e.errno in (errno.ENOSPC, errno.EDQUOT) else str(e)
        found = OSError(
            f"{folder}: {full}. {done} of {info.n_shards} shards are whole and stay; when this is fixed, the same "
            f"command continues"
        )
        found.errno = e.errno
        raise found from e


def _of_shard(info: StoreInfo, tokens: Tensor, i: int) -> Tensor:
    return tokens[i * info.shard_sequences : (i + 1) * info.shard_sequences]


def _digits(x: Tensor) -> float:
    return float(f"{float(x):.3g}")
