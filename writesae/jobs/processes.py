"""Several processes that share one job: each takes a share of the work, and sums are taken over all of them."""

from __future__ import annotations

import atexit
import os
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import Tensor


@dataclass(frozen=True)
class Processes:
    """The processes started by ``accelerate launch`` (or torchrun); `ALONE` where there is one.

    Attributes:
        count: how many processes.
        index: number of this one, 0 to ``count - 1``.
    """

    count: int = 1
    index: int = 0

    @classmethod
    def launched(cls) -> Processes:
        """The processes that this one was launched with; joins them at the first call."""
        if int(os.environ.get("WORLD_SIZE", "1")) < 2:
            return ALONE
        from accelerate import PartialState

        if not torch.distributed.is_initialized():  # who joins leaves, or threads that still run abort the process
            atexit.register(_leave)
        # Processes may finish their shares far apart: hours are no reason to give up.
        state = PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(days=7))
        return cls(state.num_processes, state.process_index)

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and reports."""
        return self.index == 0

    def share(self, x: Tensor) -> Tensor:
        """This process's share of a batch: every ``count``-th."""
        return x[self.index :: self.count]

    def total(self, x: Tensor) -> Tensor:
        """The sum over all processes, without a gradient."""
        if self.count == 1:
            return x.detach()
        x = x.detach().clone()
        torch.distributed.all_reduce(x)
        return x

    def all(self, x: Tensor) -> Tensor:
        """The tensors of all processes, one after another along the first dimension, without a gradient."""
        if self.count == 1:
            return x.detach()
        lengths = [int(n) for n in self.all_lengths(len(x), x.device)]
        padded = torch.cat([x.detach(), x.new_zeros(max(lengths) - len(x), *x.shape[1:])])
        found = [torch.empty_like(padded) for _ in lengths]
        torch.distributed.all_gather(found, padded)
        return torch.cat([part[:n] for part, n in zip(found, lengths, strict=True)])

    def all_lengths(self, n: int, device: torch.device) -> Tensor:
        """The ``n`` of every process."""
        own = torch.zeros(self.count, dtype=torch.int64, device=device)
        own[self.index] = n
        return self.total(own)

    def wait(self) -> None:
        """Wait until all processes have come here."""
        if self.count > 1:
            torch.distributed.barrier()


ALONE = Processes()


def _leave() -> None:
    """Take leave of the other processes, if they have not been left already."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def is_sharded(x: Tensor) -> bool:
    """Whether each process of a tensor-parallel model holds a part of it."""
    return type(x).__name__ == "DTensor"  # its module takes a second to import


def gathered(x: Tensor) -> Tensor:
    """The whole of a sharded tensor, for which every process has to ask at the same time; any other as it is."""
    return x.full_tensor() if is_sharded(x) else x  # type: ignore[operator]
