"""What heads write, kept in factors: the inputs of the recurrence, from which writes and states are rebuilt.

The state of a 128 x 128 head has 16,384 numbers per token. In a Gated DeltaNet it follows from k, v, beta and
log_decay, which have 258. A store keeps those, in half precision, for sequences that each begin from a zero state. It
rebuilds the rest without the model, with the code that `ActivationCache` uses. `extraction.py` makes stores, and
`shards.py` describes their files.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from writesae.hooks.sites import Head
from writesae.jobs.disk import read_json
from writesae.jobs.progress import track
from writesae.models.fingerprint import same_weights
from writesae.recurrence import Write
from writesae.recurrence.dynamics import Dynamics, States
from writesae.recurrence.rules import RULES, Rule
from writesae.stores.shards import HEADER, REPORT, StoredSite, StoreInfo, read_info, read_shard, shard_path, shards_in

if TYPE_CHECKING:
    from writesae.model import HookedRecurrentModel

OPEN_SHARDS = 8  # how many shards stay mapped into memory
Numbers: TypeAlias = slice | Sequence[int] | Tensor


class ActivationStore:
    """What some heads write, and their states, along token sequences; rebuilt from factors, without the model.

    ``sequences`` are given as a slice, a list or a tensor of their numbers, in any order. Values are float32 on the
    CPU, exactly as stored. At most `OPEN_SHARDS` shards are mapped into memory, and only what is asked for is read.

    Attributes:
        info: what the store holds.
        folder: where it is; None for a store in memory (`writesae.stores.extraction.record`).

    >>> store = ActivationStore.open("my-store")
    >>> store.write(2, 0, [5, 3]).shape                        # [2, pos]
    >>> store.state(2, 0, slice(0, 4), [-1]).shape             # [4, 1, d_key, d_value]
    """

    def __init__(self, info: StoreInfo, folder: Path | None = None, shards: Sequence[Mapping[str, Tensor]] = ()):
        self.info = info
        self.folder = folder
        self._in_memory = shards
        self._open: OrderedDict[int, Mapping[str, Tensor]] = OrderedDict()
        self._checked: set[int] = set()
        self._sites = {site.place: site for site in info.sites}

    @classmethod
    def open(cls, folder: str | Path) -> ActivationStore:
        """Open a store on disk. Each shard's checksum is verified when it is first read; `verify` checks all.

        Raises:
            FileNotFoundError: there is no store, or shards are missing.
            ValueError: the header is damaged, or of another version.
        """
        folder = Path(folder)
        info = read_info(folder)
        n_missing = info.n_shards - sum(i < info.n_shards for i in shards_in(folder))
        if n_missing:  # a damaged header may say any number of shards
            missing = (shard_path(folder, i) for i in range(info.n_shards))
            first = list(itertools.islice((path.name for path in missing if not path.is_file()), 3))
            raise FileNotFoundError(
                f"{folder} lacks {n_missing} of {info.n_shards} shards, {', '.join(first)}"
                f"{', ...' if n_missing > 3 else ''}: the same `writesae extract` again makes what is missing"
            )
        return cls(info, folder)

    @staticmethod
    def is_at(folder: str | Path) -> bool:
        """Whether a folder holds a store."""
        return (Path(folder) / HEADER).is_file()

    def place(self, name: str) -> Head:
        """The head of a name, ``LAYER.HEAD``; ValueError lists those that are in the store."""
        for head in self._sites:
            if str(head) == name:
                return head
        raise ValueError(f"the store has no site {name!r}; it has {', '.join(map(str, self.info.sites))}")

    def __len__(self) -> int:
        return self.info.n_sequences

    def __repr__(self) -> str:
        sites = ", ".join(map(str, self.info.sites))
        return f"ActivationStore({self.info.model_id}: {sites}; {len(self)} sequences of {self.context} tokens)"

    @property
    def sites(self) -> list[Head]:
        """The heads in the store."""
        return list(self._sites)

    @property
    def n_sequences(self) -> int:
        return self.info.n_sequences

    @property
    def context(self) -> int:
        """Tokens per sequence."""
        return self.info.context

    @property
    def bytes_per_token(self) -> float:
        """Bytes per token of all heads together, token ids and file headers included; measured."""
        if self.folder is None:
            size = sum(x.nbytes for shard in self._in_memory for x in shard.values())
        else:
            size = sum(shard_path(self.folder, i).stat().st_size for i in range(self.info.n_shards))
        return size / (self.n_sequences * self.context)

    @property
    def times_smaller(self) -> float:
        """How many times smaller it is than the dense states of the same heads, at two bytes per number."""
        return 2 * sum(site.d_key * site.d_value for site in self.info.sites) / self.bytes_per_token

    @property
    def report(self) -> dict[str, Any]:
        """What `writesae.stores.extraction.store_error` measured when the store was made; empty if nothing was."""
        path = self.folder and self.folder / REPORT
        if path is None or not path.is_file():
            return {}
        return read_json(path, "delete it, and the same `writesae extract` makes it again")

    # --- what is kept -------------------------------------------------------------------------------------------------

    def tokens(self, sequences: Numbers | None = None) -> Int[Tensor, "n pos"]:
        """Token ids of some sequences; None for all."""
        return self._rows("tokens", self._numbers(slice(None) if sequences is None else sequences)).long()

    def values(self, layer: int, head: int, sequences: Numbers) -> dict[str, Tensor]:
        """The inputs of the recurrence that writes and states depend on, by name, ``[n, pos, 1, ...]``.

        Raises:
            IndexError: no such head or sequence.
            ValueError: a shard is damaged.
        """
        site, numbers = self.site(layer, head), self._numbers(sequences)
        return {name: self._rows(f"{site}.{name}", numbers).float().unsqueeze(2) for name in site.shapes}

    # --- what follows from it -----------------------------------------------------------------------------------------

    def write(self, layer: int, head: int, sequences: Numbers) -> Write:
        """The native writes, ``[n, pos]``."""
        return self.dynamics(layer, head, sequences).native[:, :, 0]

    def delta(self, layer: int, head: int, sequences: Numbers) -> Write:
        """What each token's state gains beyond decay, ``[n, pos]``; rank 2 for RWKV-7."""
        return self.states(layer, head, sequences).gain

    def states(self, layer: int, head: int, sequences: Numbers) -> States:
        """Every state of these sequences, in factors."""
        return self.dynamics(layer, head, sequences).states(0)

    def state(
        self, layer: int, head: int, sequences: Numbers, positions: Sequence[int]
    ) -> Float[Tensor, "n n_positions d_key d_value"]:
        """The states after the tokens at ``positions`` (negative ones count from the end), built.

        Raises:
            IndexError: no such head, sequence or position.
            ValueError: a shard is damaged; or the head's update rule is not known here.
        """
        for p in positions:
            if not -self.context <= p < self.context:
                raise IndexError(f"position {p}: the store's sequences have positions 0 to {self.context - 1}")
        return self.dynamics(layer, head, sequences).states_at([int(p) % self.context for p in positions])[:, :, 0]

    def dynamics(self, layer: int, head: int, sequences: Numbers) -> Dynamics:
        """What one head's memory went through, ``[n, pos, 1]``."""
        values = self.values(layer, head, sequences)
        return Dynamics.of(self._rule(layer), values)

    def _rule(self, layer: int) -> Rule:
        name = self.info.rules[layer]
        if name not in RULES:
            raise ValueError(
                f"layer {layer} follows the rule {name!r}, which is not known here (known: {', '.join(RULES)}): import "
                f"the package that registers it with writesae.hooks.register, or use the version that made the store"
            )
        return RULES[name]

    def site(self, layer: int, head: int) -> StoredSite:
        """Sizes of one head's state, and of what is stored of it; IndexError if the head is not in the store."""
        place = Head(layer, head)
        if place not in self._sites:
            raise IndexError(f"{place.words} is not in the store; it has {', '.join(map(str, self._sites))}")
        return self._sites[place]

    # --- against the model --------------------------------------------------------------------------------------------

    def check_fits(self, model: HookedRecurrentModel) -> None:
        """Raise ValueError unless the model's recurrent layers are those that the store was made with."""
        for site in self.info.sites:
            layer = site.layer
            known = {s.layer: (s.n_heads, s.d_key, s.d_value) for s in model.sites}
            heads, *sizes = known.get(layer, (0, 0, 0))
            if site.head >= heads or sizes != [site.d_key, site.d_value]:
                raise ValueError(
                    f"the store has head {site.head} of layer {layer} of {self.info.model_id}, {site.d_key} x "
                    f"{site.d_value}; {model.model_id} has recurrent layers {list(known)}, and there {heads} heads"
                )
            if not same_weights(self.info.fingerprints[layer], found := model.fingerprint(layer)):
                raise ValueError(
                    f"the store was made with {self.info.model_id}, whose layer {layer} has fingerprint "
                    f"{self.info.fingerprints[layer]}; that of {model.model_id} has {found}: other weights. "
                    f"Load that model, or extract again with this one"
                )

    # --- reading ------------------------------------------------------------------------------------------------------

    def verify(self, progress: bool = True) -> None:
        """Read every shard and check it against its checksum.

        Args:
            progress: show a progress bar.

        Raises:
            ValueError: a shard is not as it was written; names the first.
        """
        for i in track(range(self.info.n_shards if self.folder else 0), "checking shards", progress):
            self._checked.discard(i)
            self._open.pop(i, None)
            self._shard(i)

    def _numbers(self, sequences: Numbers) -> Int[Tensor, " n"]:
        if isinstance(sequences, slice):
            sequences = range(len(self))[sequences]
        numbers = torch.as_tensor(sequences, device="cpu").long().reshape(-1)
        wrong = numbers[(numbers < 0) | (numbers >= len(self))]
        if len(wrong):
            raise IndexError(f"sequence {int(wrong[0])}: the store has sequences 0 to {len(self) - 1}")
        return numbers

    def _rows(self, name: str, numbers: Int[Tensor, " n"]) -> Tensor:
        """Some sequences of one tensor, in the dtype that it is stored in."""
        of_shard, within = numbers // self.info.shard_sequences, numbers % self.info.shard_sequences
        for i in of_shard[:1].tolist():
            self._shard(i)  # whose sizes are checked, before room is made for what the header says
        shape = self.info.shapes().get(name, [])
        dtype = torch.int32 if name == "tokens" else self.info.torch_dtype
        found = torch.empty(len(numbers), self.context, *shape, dtype=dtype)
        for i in of_shard.unique().tolist():
            here = (of_shard == i).nonzero()[:, 0]
            found[here] = self._shard(i)[name][within[here]]
        return found

    def _shard(self, i: int) -> Mapping[str, Tensor]:
        if self.folder is None:
            return self._in_memory[i]
        if i not in self._open:
            self._open[i] = read_shard(self.folder, i, self.info, check=i not in self._checked)
            self._checked.add(i)
            if len(self._open) > OPEN_SHARDS:
                self._open.popitem(last=False)
        self._open.move_to_end(i)
        return self._open[i]
