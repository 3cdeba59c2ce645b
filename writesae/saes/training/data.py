"""What an SAE is trained on: matrices of one head in memory, or an activation store read a buffer at a time."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from writesae.recurrence import Write
from writesae.recurrence.dynamics import States
from writesae.recurrence.matrices import Matrices, joined, parts, size
from writesae.saes.config import SAEConfig, Target

if TYPE_CHECKING:
    from writesae.stores.store import ActivationStore


def spread(seed: int, which: int) -> int:
    """A seed of torch's for the ``which``-th drawing under a seed of ours.

    torch's CPU generator takes the lowest 32 bits, so seeds of ours have to differ there: they start far apart (2^32
    divided by the golden ratio), and drawings under one follow each other.
    """
    return (seed * 2_654_435_769 + which) % 2**32


class Data(ABC):
    """Samples to train on, and samples held out.

    Samples are drawn by *unit*: one matrix, or all the states of one sequence, which share their cost.
    """

    held_out: Matrices | None
    device: torch.device

    @abstractmethod
    def at(self, step: int, batch_size: int) -> Matrices:
        """What step ``step`` draws its batch from: the same object as long as that does not change."""

    @abstractmethod
    def identity(self) -> str:
        """A description that changes when the data do."""


class InMemory(Data):
    """Matrices ``[N]`` (a `Write` or dense), or `States` ``[n, pos]``; those from ``validation`` on are held out."""

    def __init__(self, data: Matrices, validation: int | None = None) -> None:
        n = size(data)[0]
        if validation is not None and not 0 < validation < n:
            raise ValueError(f"validation={validation} must split the {n} samples: 1 to {n - 1}")
        self.train = data if validation is None else data[:validation]
        self.held_out = None if validation is None else data[validation:]
        self.device = parts(data)[0].device

    def at(self, step: int, batch_size: int) -> Matrices:
        return self.train

    def identity(self) -> str:
        n = size(self.train)[0]
        digest = hashlib.sha256()
        for part in parts(self.train[:: max(1, n // 64)]):
            digest.update(part.float().cpu().contiguous().numpy().tobytes())
        return f"{n} samples, {digest.hexdigest()[:16]}"


class FromStore(Data):
    """One head of an activation store.

    Args:
        store: the store.
        layer, head: one of its sites.
        target: ``"write"``, ``"delta"`` or ``"state"``.
        held_out: share of the sequences that is only measured on: evenly spread, so every part of the text has some.
        stride: of states that have to be built (one decay per key channel), keep every ``stride``-th position.
        buffer_tokens: tokens in memory at once. A larger store is read in pieces, in an order drawn from ``seed``.
        held_out_tokens: at most so many tokens are measured on.
        seed: of the order.
        device: where batches go.
    """

    def __init__(
        self,
        store: ActivationStore,
        layer: int,
        head: int,
        target: Target,
        *,
        held_out: float = 0.1,
        stride: int = 8,
        buffer_tokens: int = 2**20,
        held_out_tokens: int = 2**15,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        self.store, self.layer, self.head, self.target = store, layer, head, target
        self.stride, self.seed, self.device = stride, seed, torch.device(device)
        n = store.n_sequences
        n_held_out = min(round(held_out * n), n - 1) if held_out else 0
        if held_out and not n_held_out:
            raise ValueError(f"held_out={held_out} of {n} sequences is none; use a larger store or held_out=0")
        aside = (torch.arange(n_held_out) * n + n // 2) // max(n_held_out, 1)
        keep = torch.ones(n, dtype=torch.bool)
        keep[aside] = False
        self.sequences = keep.nonzero()[:, 0]
        self.per_buffer = min(len(self.sequences), max(1, buffer_tokens // store.context))
        measured = aside[:: max(1, len(aside) * store.context // held_out_tokens)]
        self.held_out = self.load(measured) if n_held_out else None
        self._number, self._buffer = -1, None

    def load(self, sequences: Tensor) -> Matrices:
        """The samples of some sequences."""
        found = joined([self._load(some) for some in sequences.split(16)])  # working out deltas takes memory
        if isinstance(found, States):
            found.norm2  # noqa: B018  (known from here on, for every batch of it)
        return found

    def _load(self, sequences: Tensor) -> Matrices:
        where = self.layer, self.head, sequences
        if self.target != "state":
            found = self.store.write(*where) if self.target == "write" else self.store.delta(*where)
            return Write(found.key.flatten(0, 1), found.value.flatten(0, 1), rank=found.rank).to(self.device)
        states = self.store.states(*where).to(self.device)
        if states.one_decay:
            return states
        positions = torch.arange(self.stride - 1, states.shape[1], self.stride)
        return torch.cat([states[i : i + 1].dense()[0, positions] for i in range(len(sequences))])

    def at(self, step: int, batch_size: int) -> Matrices:
        samples = self.per_buffer * self.store.context
        number = 0 if self.per_buffer == len(self.sequences) else step // max(1, samples // batch_size)
        if number != self._number:
            per_pass = len(self.sequences) // self.per_buffer
            which, part = divmod(number, per_pass)
            order = torch.randperm(
                len(self.sequences), generator=torch.Generator().manual_seed(spread(self.seed, which))
            )
            chosen = order[part * self.per_buffer : (part + 1) * self.per_buffer].sort().values
            self._number, self._buffer = number, None  # let go of the old one before reading the new
            self._buffer = self.load(self.sequences[chosen])
        assert self._buffer is not None
        return self._buffer

    def identity(self) -> str:
        info = self.store.info
        about = f"{info.weights[:16]} {info.tokens_sha256[:16]} {info.dtype} {self.layer}.{self.head} {self.target}"
        return (
            f"{about} every {self.stride}, {len(self.sequences)} sequences, {self.per_buffer} at once, seed {self.seed}"
        )


def n_samples(data: Matrices) -> int:
    """How many matrices there are."""
    return size(data)[0] * per_unit(data)


def per_unit(data: Matrices) -> int:
    """How many matrices are drawn at once: those of a sequence, if they are its states."""
    return data.shape[1] if isinstance(data, States) else 1


def pieces(data: Matrices, n: int = 4096) -> Iterator[Matrices]:
    """All units in order, about ``n`` samples at a time."""
    step = max(1, n // per_unit(data))
    return (data[start : start + step] for start in range(0, size(data)[0], step))


def check_data(cfg: SAEConfig, data: Matrices) -> None:
    """ValueError if these are not samples of the SAE's size, or not finite."""
    found = size(data)
    if len(found) != (4 if isinstance(data, States) else 3) or found[-2:] != (cfg.d_key, cfg.d_value) or not found[0]:
        raise ValueError(
            f"an SAE of {cfg.d_key}x{cfg.d_value} learns from [N, {cfg.d_key}, {cfg.d_value}], dense or a Write with "
            f"leading dimension [N], or from States [n, pos]; got {list(found)}"
        )
    for part in parts(data):
        if not part.isfinite().all():
            raise ValueError("some of these matrices have numbers that are NaN or infinite; leave them out")
