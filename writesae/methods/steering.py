"""Steering by contrast: the difference of what a model holds after two kinds of texts, to be added elsewhere.

In the residual stream it is contrastive activation addition (Panickssery et al. 2312.06681; ActAdd, Turner et al.
2308.10248). In a recurrent memory the difference is a matrix, of one head's states (as Paulo et al. 2404.05971) or of
its writes, of which the leading parts are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from writesae.hooks import Add, AddVector, Intervention, ResidualEdit
from writesae.hooks.names import inputs, name_of
from writesae.hooks.quantities import RESIDUAL
from writesae.jobs.arguments import named_kinds
from writesae.jobs.tensors import read_tensors, write_tensors
from writesae.methods.cells import Cells
from writesae.model import HookedRecurrentModel
from writesae.models.fingerprint import same_weights
from writesae.recurrence import Write
from writesae.stores.windows import Texts

KEY = "steering_vector"
MEMORY = ("state", "write")
DRAWS = 4  # of each control
SAME = 1e-5  # of a mean: a smaller difference is rounding
Direction: TypeAlias = Tensor | Write
At: TypeAlias = tuple[str, int] | tuple[str, int, int]


@dataclass(frozen=True, eq=False)
class SteeringVector:
    """A direction in the residual stream, or a low-rank matrix in the memory of one head.

    Attributes:
        at: ``("resid_post", 9)`` or another point of the stream; ``("state", 9, 4)`` or ``("write", 9, 4)``, of a head.
        direction: ``[d_model]``, or a `Write` without leading dimensions.
        shuffled: the same from texts of which half of each side have changed sides, scaled to the same norm, ``[draw]``
            times over; None where a side has a single text. What they do is not about the contrast.
        kept: share of the squared norm of the difference that is in ``direction``; below 1 where its rank was cut.
        model_id, fingerprint: of the model; the fingerprint is of its last recurrent layer.
    """

    at: At
    direction: Direction
    shuffled: Direction | None
    kept: float
    model_id: str
    fingerprint: str

    def __repr__(self) -> str:
        return f"SteeringVector({self.at}, norm {self.norm:.3g})"

    @property
    def layer(self) -> int:
        return self.at[1]

    @property
    def norm(self) -> float:
        """Length of the direction; of a matrix, its Frobenius norm."""
        return float(self.direction.norm())

    def intervention(self, scale: float | int = 1.0) -> Intervention | ResidualEdit:
        """What adds ``scale`` times the direction: ``with model.intervene(vector.intervention(2), positions=[17])``.

        In the stream it is an `AddVector`; in the memory an `Add`, which writes it beside the token's own write, so
        that from there on it decays and is erased like anything else that the head remembers.
        """
        if isinstance(self.direction, Write):
            return Add(*self.at[1:], write=self.direction, scale=scale)
        return AddVector(self.direction, name_of(*self.at[:2]), scale)

    def controls(self, seed: int = 0) -> dict[str, list[SteeringVector]]:
        """What to compare it with: ``random`` directions and, unless a side had a single text, ``shuffled`` ones."""
        found = {"random": [self.as_random(seed + i) for i in range(DRAWS)]}
        if self.shuffled is not None:
            found["shuffled"] = [replace(self, direction=self.shuffled[i], shuffled=None) for i in range(DRAWS)]
        return found

    def as_random(self, seed: int = 0) -> SteeringVector:
        """A random direction of the same norm; of a matrix, with the same singular values."""
        generator = torch.Generator().manual_seed(seed)
        if isinstance(self.direction, Write):
            keys, values = self.direction.factors()
            sizes = torch.linalg.svdvals(self.direction.dense())[: len(keys)].cpu()
            U, V = (torch.linalg.qr(torch.randn(x.shape[::-1], generator=generator))[0].T for x in (keys, values))
            made: Direction = _write(U, V * sizes[:, None]).to(keys)
        else:
            x = torch.randn(self.direction.shape, generator=generator).to(self.direction)
            made = x * (self.norm / x.norm())
        return replace(self, direction=made, shuffled=None)

    def check_fits(self, model: HookedRecurrentModel) -> None:
        """Raise ValueError unless it was made with this model."""
        if not same_weights(self.fingerprint, model.fingerprint(model.sites[-1].layer)):
            raise ValueError(
                f"this vector was made with {self.model_id}, which has other weights than {model.model_id}: make one "
                f"with this model, steering_vector(model, positive, negative, at={self.at})"
            )

    def save(self, path: str | Path) -> Path:
        """Write it into one safetensors file, whole or not at all."""
        described = {"at": list(self.at), "kept": self.kept, "model_id": self.model_id, "fingerprint": self.fingerprint}
        tensors = {}
        for name, x in (("direction", self.direction), ("shuffled", self.shuffled)):
            if isinstance(x, Write):
                tensors[f"{name}.key"], tensors[f"{name}.value"] = x.factors()
            elif x is not None:
                tensors[name] = x
        write_tensors(Path(path), KEY, tensors, described)
        return Path(path)

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> SteeringVector:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: no such file.
            ValueError: the file is damaged, or something else.
        """
        tensors, cfg = read_tensors(Path(path), KEY, "steering vector", "save or fetch it again")
        tensors = {name: x.to(device) for name, x in tensors.items()}
        found: dict[str, Any] = {
            name: _write(tensors[f"{name}.key"], tensors[f"{name}.value"])
            if f"{name}.key" in tensors
            else tensors.get(name)
            for name in ("direction", "shuffled")
        }
        return cls(
            tuple(cfg["at"]), **found, kept=cfg["kept"], model_id=cfg["model_id"], fingerprint=cfg["fingerprint"]
        )


@named_kinds
@torch.no_grad()
def steering_vector(
    model: HookedRecurrentModel,
    positive: Texts,
    negative: Texts,
    at: At,
    *,
    positions: Sequence[int] = (-1,),
    rank: int = 1,
    batch_size: int = 16,
    seed: int = 0,
) -> SteeringVector:
    """The mean of what the model holds after positive texts, less that after negative ones.

    >>> vector = ws.steering_vector(model, kind, unkind, at=("resid_post", 2))
    >>> with model.intervene(vector.intervention(4), positions=slice(5, None)):
    ...     model.generate("I think that you", max_new_tokens=20)

    Args:
        model: the model. Layers above are not run.
        positive, negative: texts of either kind, or token ids ``[n, pos]``. The two need not be of equal number.
        at: ``("resid_pre", layer)``, ``("mixer_out", layer)``, ``("mlp_out", layer)``, ``("resid_post", layer)``;
            ``("state", layer, head)``: the head's memory after the token; ``("write", layer, head)``: its write there.
        positions: which tokens of each text, their mean; negative ones count from its end.
        rank: of states and writes, how many leading parts of the difference are kept (by its singular values).
        batch_size: texts run at once.
        seed: which texts change sides in the control.

    Raises:
        ValueError: no text on one side, no such point, a rank that the memory does not have, equal means.
        IndexError: no such layer, head or position.
    """
    read = _reader(model, at, rank)
    sides = []
    for name, texts in (("positive", positive), ("negative", negative)):
        rows: Any = [texts] if isinstance(texts, str) else texts
        parts = [read(rows[i : i + batch_size], list(positions)) for i in range(0, len(rows), batch_size)]
        if not parts:
            raise ValueError(f"no {name} texts: give one at least")
        sides.append(torch.cat(parts))
    difference = sides[0].mean(0) - sides[1].mean(0)
    if float(difference.norm()) <= SAME * float(sides[0].mean(0).norm()):
        raise ValueError("the two kinds of texts have the same mean: give texts that differ in what should be steered")
    direction, kept = _cut(difference, at, rank)
    shuffled = None
    if min(map(len, sides)) > 1:
        generator = torch.Generator().manual_seed(seed)
        drawn = [_exchanged(sides, generator) for _ in range(DRAWS)]
        cut = [_cut(x[0].mean(0) - x[1].mean(0), at, rank)[0] for x in drawn]
        same: list[Any] = [x * float(direction.norm() / x.norm().clamp_min(1e-30)) for x in cut]
        shuffled = torch.stack(same) if isinstance(direction, Tensor) else _stacked(same)
    return SteeringVector(at, direction, shuffled, kept, model.model_id, model.fingerprint(model.sites[-1].layer))


def _reader(model: HookedRecurrentModel, at: At, rank: int) -> Any:
    """A function of texts and positions: what each text has, ``[text, ...]``."""
    what, layer, *head = at
    known = f"(point, layer) with one of {', '.join(RESIDUAL)}, or (state or write, layer, head)"
    if what in MEMORY:
        if len(head) != 1:
            raise ValueError(f"at={at}: a memory belongs to one head; give {known}")
        site = model.site(layer)
        site.check_head(head[0])
        if not 1 <= rank <= min(site.d_key, site.d_value):
            raise ValueError(
                f"rank={rank}: states of {site.d_key} x {site.d_value} allow 1 to {min(site.d_key, site.d_value)}"
            )
        names = inputs(model.family(layer).rule, layer)
    elif what in RESIDUAL:
        if head or rank != 1:
            raise ValueError(f"at={at}, rank={rank}: the stream has neither heads nor ranks; give {known}")
        names = [name_of(what, layer)]
        if names[0] not in model.hook_names:
            raise IndexError(f"at={at}: layer {layer} has no {what}; this model has layers 0 to {model.n_layers - 1}")
    else:
        raise ValueError(f"at={at}: give {known}")

    def read(texts: Any, positions: Sequence[int]) -> Float[Tensor, "text ..."]:
        ids, mask = model.to_tokens(texts)
        cells = Cells.of(ids, mask, positions)
        _, cache = model.run_with_cache(ids, names=names, stop_at_layer=layer + 1, attention_mask=mask)
        if what == "state":
            return cache.state(layer, positions, heads=head)[:, :, 0].float().mean(1)
        found = (
            cache.write(layer)[cells.rows, cells.columns, head[0]].dense()
            if head
            else cells.of_pass(cache[what, layer])
        )
        return found.float().unflatten(0, (len(ids), -1)).mean(1)

    return read


def _cut(difference: Tensor, at: At, rank: int) -> tuple[Direction, float]:
    """The direction that a difference of means becomes, and the share of its squared norm."""
    if at[0] not in MEMORY:
        return difference, 1.0
    U, S, Vh = torch.linalg.svd(difference, full_matrices=False)
    kept = float(S[:rank].square().sum() / S.square().sum().clamp_min(1e-30))
    return _write(U[:, :rank].T, Vh[:rank] * S[:rank, None]), kept


def _exchanged(sides: Sequence[Tensor], generator: torch.Generator) -> list[Tensor]:
    """The two sides, half of each on the other."""
    mixed = [side[torch.randperm(len(side), generator=generator)] for side in sides]
    halves = [(side[: len(side) // 2], side[len(side) // 2 :]) for side in mixed]
    return [torch.cat([halves[0][0], halves[1][1]]), torch.cat([halves[1][0], halves[0][1]])]


def _write(keys: Float[Tensor, "*lead rank d_key"], values: Float[Tensor, "*lead rank d_value"]) -> Write:
    """Writes from their factors, which have a rank dimension even where it is 1."""
    rank = keys.shape[-2]
    return Write(keys[..., 0, :], values[..., 0, :]) if rank == 1 else Write(keys, values, rank)


def _stacked(writes: Sequence[Write]) -> Write:
    keys, values = zip(*(write.factors() for write in writes), strict=True)
    return _write(torch.stack(keys), torch.stack(values))
