"""The files of an activation store: a header, and shards that can each be checked, and made again, by themselves.

    store.json                    what is stored, of which model, on which tokens (`StoreInfo`)
    shard-00000.safetensors ...   some sequences each: "tokens", and "LAYER.HEAD.QUANTITY" [n, pos, ...]
    report.json                   what half precision costs: the error of rebuilt states

Every file appears whole or not at all. Its bytes follow from the model, the tokens and the shard's number alone.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from writesae.hooks.sites import Head
from writesae.jobs.disk import read_json, write_whole
from writesae.jobs.tensors import checksum

HEADER = "store.json"
REPORT = "report.json"
FORMAT = 1
DTYPES = ("float16", "bfloat16", "float32")
RULE_OF = {  # stores of version 0.1 named a layer's family as messages do, where its rule is meant
    "Gated DeltaNet": "gated_delta",
    "Kimi Delta Attention": "kimi_delta",
    "Mamba-2": "mamba2",
    "RWKV-7": "rwkv7",
    "DeltaNet": "delta",
    "Gated Linear Attention": "gla",
}
AGAIN = "delete that file and run the same `writesae extract` again: it makes only what is missing"


@dataclass(frozen=True)
class StoredSite:
    """One head of a store: the shape of its state, and of each of its quantities at one token."""

    layer: int
    head: int
    d_key: int
    d_value: int
    shapes: dict[str, list[int]]

    @property
    def place(self) -> Head:
        """Which head it is."""
        return Head(self.layer, self.head)

    def __str__(self) -> str:
        return str(self.place)


@dataclass(frozen=True)
class StoreInfo:
    """What a store holds; ``store.json`` is this.

    Attributes:
        model_id, model_revision: name of the model, and its commit on the hub if it has one.
        weights: sha256 of all of the model's weights, their dtype included.
        fingerprints: ``model.fingerprint(layer)`` by layer.
        families: name of the update rule by layer, which says how writes and states follow from what is stored. Old
            stores have the family's display name here; see `rules`.
        sites: the heads.
        context: tokens per sequence.
        n_sequences: how many sequences.
        shard_sequences: sequences per shard; the last shard may have fewer.
        batch_size: sequences run at once, which may change the last bits of values.
        dtype: precision of the stored values, e.g. ``float16``.
        tokens_sha256: sha256 of all token ids, as int32.
        source: where the tokens came from, for people to read.
        versions: installed versions of writesae, torch and transformers.
        format: version of the file format.
        reading: how the model made tokens of texts, ``prepend_bos`` and ``special_tokens``, as far as that was not the
            tokenizer's own way. The header has it only if there is something in it, as old headers do not have it.
    """

    model_id: str
    model_revision: str | None
    weights: str
    fingerprints: dict[int, str]
    families: dict[int, str]
    sites: tuple[StoredSite, ...]
    context: int
    n_sequences: int
    shard_sequences: int
    batch_size: int
    dtype: str
    tokens_sha256: str
    source: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    format: int = FORMAT
    reading: dict[str, bool] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """What ``store.json`` has."""
        return {name: value for name, value in asdict(self).items() if name != "reading" or value}

    @property
    def n_shards(self) -> int:
        return -(-self.n_sequences // self.shard_sequences)

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def rules(self) -> dict[int, str]:
        """Name of the update rule by layer, also of a store that names the family."""
        return {layer: RULE_OF.get(name, name) for layer, name in self.families.items()}

    def shapes(self) -> dict[str, list[int]]:
        """Shape at one token of everything that is stored, by its name in the shards."""
        return {f"{site}.{name}": shape for site in self.sites for name, shape in site.shapes.items()}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> StoreInfo:
        """From the contents of ``store.json``; ValueError says what is wrong with them."""
        if values.get("format") != FORMAT:
            raise ValueError(f"it has format {values.get('format')!r}, this version reads {FORMAT}")
        values.setdefault("reading", {})
        known = {f.name for f in fields(cls)}
        if wrong := sorted(known ^ values.keys()):
            raise ValueError(f"missing or unknown: {', '.join(wrong)}")
        for name in ("context", "n_sequences", "shard_sequences", "batch_size"):
            if not isinstance(values[name], int) or not 1 <= values[name] < 2**48:
                raise ValueError(f"{name} is {values[name]!r}, and must be a whole number from 1 on")
        if values["dtype"] not in DTYPES:
            raise ValueError(f"dtype is {values['dtype']!r}; allowed are {', '.join(DTYPES)}")
        values["sites"] = tuple(StoredSite(**site) for site in values["sites"])
        for name in ("fingerprints", "families"):
            values[name] = {int(layer): value for layer, value in values[name].items()}
        return cls(**values)

    @cached_property
    def identity(self) -> str:
        """A hash of the header, which every shard carries."""
        return hashlib.sha256(json.dumps(self.to_dict()).encode()).hexdigest()


def shard_path(folder: Path, i: int) -> Path:
    """The file of shard number ``i``."""
    return folder / f"shard-{i:05d}.safetensors"


def shards_in(folder: Path) -> list[int]:
    """Numbers of the shards that a folder holds."""
    names = (re.fullmatch(r"shard-(\d{5,})\.safetensors", path.name) for path in folder.iterdir())
    return [int(name[1]) for name in names if name]


def read_info(folder: Path) -> StoreInfo:
    """The header; FileNotFoundError if there is none, ValueError if it cannot be used."""
    path = folder / HEADER
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} holds no activation store: {HEADER} is missing; `writesae extract` makes one"
        )
    try:
        return StoreInfo.from_json(read_json(path))
    except (ValueError, TypeError, KeyError, AttributeError) as e:
        raise ValueError(f"{path} is not the header of an activation store ({e}): extract into a new folder") from e


def write_shard(folder: Path, i: int, info: StoreInfo, tensors: Mapping[str, Tensor]) -> None:
    """Write a shard, with its checksum and the store's identity."""
    # One key only: safetensors writes several in no particular order, and the same shard has the same bytes.
    seal = json.dumps({"store": info.identity, "shard": i, "sha256": checksum(tensors)})
    write_whole(shard_path(folder, i), safetensors.torch.save(dict(tensors), {"writesae": seal}))


def read_shard(folder: Path, i: int, info: StoreInfo, *, check: bool = True) -> dict[str, Tensor]:
    """A shard's tensors, mapped into memory: they are read when they are used.

    Args:
        folder: the store's folder.
        i: number of the shard.
        info: the store's header.
        check: read the whole shard and compare it with its checksum.

    Raises:
        ValueError: the shard was cut off or altered, or belongs to another store or has another number.
    """
    path = shard_path(folder, i)
    try:
        with safetensors.safe_open(path, "pt") as file:  # type: ignore[no-untyped-call]
            seal = json.loads((file.metadata() or {}).get("writesae", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, ValueError) as e:
        raise ValueError(f"{path} is not a whole shard ({e}): it was cut off or altered; {AGAIN}") from e
    if not isinstance(seal, dict) or (seal.get("store"), seal.get("shard")) != (info.identity, i):
        seal = seal if isinstance(seal, dict) else {}
        raise ValueError(
            f"{path} belongs elsewhere: expected shard {i} of store {info.identity[:16]}, found shard "
            f"{seal.get('shard')} of store {str(seal.get('store'))[:16]}; {AGAIN}"
        )
    rows = min(info.shard_sequences, info.n_sequences - i * info.shard_sequences)
    expected = {"tokens": [rows, info.context]} | {k: [rows, info.context, *v] for k, v in info.shapes().items()}
    if wrong := {name: list(x.shape) for name, x in tensors.items() if list(x.shape) != expected.get(name)}:
        name, found = next(iter(wrong.items()))
        raise ValueError(f"{path}: {name} is {found}, and {HEADER} says {expected.get(name)}; {AGAIN}")
    if check and (found := checksum(tensors)) != seal.get("sha256"):
        raise ValueError(
            f"{path} was altered after it was written: expected checksum {seal.get('sha256')}, found {found}; {AGAIN}"
        )
    return tensors
