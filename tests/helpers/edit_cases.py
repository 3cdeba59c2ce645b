"""The same edits said twice, to a wrapped model and to the brute-force oracle: every kind of edit, for tests that feed
them to models in different ways."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import jaxtyping
import torch
from torch import Tensor

import brute_force as bf
from architectures import D_KEY, N_HEADS, N_VOCAB, Architecture
from brute_force import DenseEdit
from writesae import (
    Add,
    Delete,
    HookedRecurrentModel,
    Intervention,
    Knockout,
    Recode,
    Replace,
    SAEConfig,
    Substitute,
    Write,
    WriteSAE,
)

CHANGES: dict[str, Any] = {"ablate": [2, 7], "scale": {5: -1.5}, "clamp": {0: 0.3, 11: 0.2}}
LOUDER = dict.fromkeys(range(0, 24, 2), 2.5)  # every other atom, so that some are active in every model
TOLERANCE = 1e-4  # max |Δlogit|; logits have a standard deviation of about 1


@contextmanager
def annotations_unchecked() -> Iterator[None]:
    """They are checked in the prefill of every case on one architecture; checking takes longer than the rest."""
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


def assert_close(ours: Tensor, theirs: Tensor, tolerance: float = TOLERANCE) -> float:
    assert ours.shape == theirs.shape
    difference = (ours - theirs).abs().max().item()
    assert difference <= tolerance, f"not close: logits differ by {difference:.2e}"
    return difference


# Cases: the same edits said twice, to us and to the oracle -----------------------------------------------------------

Attach = Callable[[HookedRecurrentModel], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Case:
    """How to attach it to a wrapped model, and the same in dense matrices."""

    name: str
    attach: Attach
    dense: list[DenseEdit | bf.DenseKnockout]

    def __str__(self) -> str:
        return self.name

    def __add__(self, other: Case) -> Case:
        """Both, one block inside the other."""

        @contextmanager
        def attach(model: HookedRecurrentModel) -> Iterator[None]:
            with self.attach(model), other.attach(model):
                yield

        return Case(f"{self.name} + {other.name}", attach, self.dense + other.dense)


def where(positions: Any) -> list[int] | None:
    """The positions that are meant, in the order asked, for the oracle."""
    match positions:
        case None:
            return None
        case int():
            return [positions]
        case slice():
            return list(range(positions.start or 0, positions.stop or 10**4, positions.step or 1))
        case Tensor():
            return positions[0].tolist()
    return list(positions)


def edit(
    name: str,
    what: Intervention | Sequence[Intervention],
    fn: Any,
    heads: Sequence[int],
    positions: Any,
    read: str = "same",
) -> Case:
    layer = what.layer if isinstance(what, Intervention) else what[0].layer
    return Case(
        f"{name}, {read}",
        lambda model: model.intervene(what, positions=positions, read=read),
        [DenseEdit(layer, h, fn, where(positions), read=read) for h in heads],
    )


def hook(name: str, layer: int, head: int, fn: Callable[[Tensor], Tensor], in_place: bool = False) -> Case:
    """Change one head of a quantity at every token."""

    def change(value: Tensor, _hook: Any) -> Tensor | None:
        new = value if in_place else value.clone()
        new[:, :, head] = fn(value[:, :, head])
        return None if in_place else new

    def attach(model: HookedRecurrentModel) -> AbstractContextManager[Any]:
        return model.hooks([(f"blocks.{layer}.mixer.hook_{name}", change)])

    return Case(f"hook_{name}{' in place' if in_place else ''}", attach, [DenseEdit(layer, head, fn, stage=name)])


def hook_write(layer: int, head: int, extra: Write | None = None) -> Case:
    """Another key than the erase key, and another norm; with ``extra``, a second rank."""
    turn = torch.linspace(-0.5, 0.5, D_KEY)

    def change(write: Write, _hook: Any) -> Write:
        key, value = write.key.clone(), write.value.clone()
        key[:, :, head] += turn
        value[:, :, head] *= 0.7
        new = replace(write, key=key, value=value)
        if extra is not None:
            mask = torch.zeros(N_HEADS)
            mask[head] = 1
            new = new + extra.expand(*write.shape) * mask
        return new

    def fn(now: bf.Now, i: int) -> Tensor:
        E = bf.outer(now.key + turn, 0.7 * now.value) - now.write
        return E if extra is None else E + extra.dense().double()

    def attach(model: HookedRecurrentModel) -> AbstractContextManager[Any]:
        return model.hooks([(f"blocks.{layer}.mixer.hook_write", change)])

    return Case(f"hook_write, rank {1 if extra is None else 2}", attach, [DenseEdit(layer, head, fn)])


def hook_state(layer: int, head: int, positions: list[int]) -> Case:
    def change(state: Tensor, _hook: Any) -> Tensor:
        new = state.clone()
        new[:, 0, head] *= 0.4
        return new

    def attach(model: HookedRecurrentModel) -> AbstractContextManager[Any]:
        return model.hooks([(f"blocks.{layer}.mixer.hook_state", change)], state_positions=positions)

    return Case("hook_state", attach, [DenseEdit(layer, head, lambda S: 0.4 * S, positions, stage="state")])


def random_write(a: Architecture, seed: int, *lead: int, rank: int = 1, size: float = 1.0) -> Write:
    """Of norm ``size``, about what the models write."""
    generator = torch.Generator().manual_seed(seed)
    ranks = () if rank == 1 else (rank,)
    write = Write(
        torch.randn(*lead, *ranks, D_KEY, generator=generator),
        torch.randn(*lead, *ranks, a.d_value, generator=generator),
        rank,
    )
    return write * (size / write.norm())


def random_sae(a: Architecture, layer: int, head: int, target: str, encoder: str = "tied") -> WriteSAE:
    torch.manual_seed(5)
    choices: dict[str, Any] = dict(target=target, encoder=encoder, layer=layer, head=head)
    cfg = SAEConfig(D_KEY, a.d_value, n_atoms=24, k=3, **choices)
    sae = WriteSAE(cfg)
    with torch.no_grad():
        sae.b_enc.normal_(std=0.02)
        if sae.mean is not None:
            sae.mean.normal_(std=0.02)
        if encoder == "bilinear":
            sae.V_enc.normal_(std=0.3)
            sae.W_enc.normal_(std=0.3)
    return sae


def interventions(a: Architecture, read: str) -> list[Case]:
    """One of each. In the cache protocol's reach (`N_NEXT`), and across a border of chunks."""
    one, three, rank2 = random_write(a, 1), random_write(a, 2, 3), random_write(a, 3, rank=2)
    for_two = torch.tensor([[4, 65]])
    top_atom = TOP_ATOM if a.d_value > 1 else TOP_ATOM_OF_ONE_COLUMN
    write_sae, delta_sae = random_sae(a, 1, 0, "write"), random_sae(a, 0, 3, "delta", encoder="bilinear")
    state_sae = random_sae(a, 3, 2, "state")
    at_three = [2, 40, 66]
    return [
        edit("delete at an int", Delete(0, 1), bf.delete, [1], 17, read),
        edit("delete at a list", Delete(1, [2, 0]), bf.delete, [0, 2], [63, 64, 3], read),
        edit("delete in a slice, all heads", Delete(3), bf.delete, range(N_HEADS), slice(5, 9), read),
        edit("delete everywhere", Delete(1, 3), bf.delete, [3], None, read),
        edit("add", Add(0, 2, write=one), bf.add(one.dense()), [2], [0, 69], read),
        edit("add 3x the native norm", Add(1, 1, write=one, scale=3, relative=True), bf.add(one.dense(), relative=3),
             [1], slice(2, None, 7), read),
        edit("add of rank 2", Add(3, [0, 3], write=rank2, scale=-2), bf.add(-2 * rank2.dense()), [0, 3], [20], read),
        edit("add, one write a position", Add(0, [3, 1], write=three), bf.add(*three.dense()), [1, 3], at_three, read),
        edit("add, one a position, relative", Add(0, 1, write=three, scale=2, relative=True),
             bf.add(*three.dense(), relative=2), [1], at_three[::-1], read),
        edit("add at [batch, n]", Add(3, 1, write=three[None, :2]), bf.add(*three.dense()[:2]), [1], for_two, read),
        edit("replace", Replace(1, 2, write=one), bf.replace(one.dense()), [2], for_two, read),
        edit("replace, relative", Replace(3, write=one, scale=1, relative=True), bf.replace(one.dense(), relative=1),
             range(N_HEADS), range(10, 14), read),
        edit("substitute writes", Substitute(write_sae), bf.substitute(write_sae), [0], slice(0, None, 5), read),
        edit("substitute at the native norm", Substitute(write_sae, norm="native"),
             bf.substitute(write_sae, norm="native"), [0], [8, 9, 64], read),
        edit("substitute one atom", Substitute(write_sae, atom=top_atom), bf.substitute(write_sae, atom=top_atom),
             [0], None, read),
        edit("substitute deltas", Substitute(delta_sae), bf.substitute(delta_sae), [3], slice(1, None, 6), read),
        edit("substitute states", Substitute(state_sae), bf.substitute(state_sae), [2], [7, 8, 63, 64], read),
        edit("recode writes", Recode(write_sae), bf.recode(write_sae), [0], slice(0, None, 3), read),
        edit("recode writes, changed", Recode(write_sae, **CHANGES), bf.recode(write_sae, **CHANGES), [0], None, read),
        edit("recode writes, the rest stays", Recode(write_sae, **CHANGES, error_term=True),
             bf.recode(write_sae, **CHANGES, error_term=True), [0], None, read),
        edit("recode deltas", Recode(delta_sae, ablate=[3]), bf.recode(delta_sae, ablate=[3]), [3],
             slice(1, None, 6), read),
        edit("recode deltas, the rest stays", Recode(delta_sae, scale=LOUDER, error_term=True),
             bf.recode(delta_sae, scale=LOUDER, error_term=True), [3], slice(1, None, 6), read),
        edit("recode states", Recode(state_sae), bf.recode(state_sae), [2], [7, 8, 63, 64], read),
        Case(
            f"several in a list, {read}",
            lambda model: model.intervene(
                [Delete(0, 1), Add(1, [1, 2], write=one), Replace(3, 0, write=one), Delete(0, 1)],
                positions=[6, 64], read=read,
            ),
            [DenseEdit(0, 1, fn, [6, 64], read=read) for fn in (bf.delete, bf.delete)]
            + [DenseEdit(1, h, bf.add(one.dense()), [6, 64], read=read) for h in (1, 2)]
            + [DenseEdit(3, 0, bf.replace(one.dense()), [6, 64], read=read)],
        ),
    ]  # fmt: skip


# Of the write SAE, one that is often the top one; with one column, few atoms ever are.
TOP_ATOM, TOP_ATOM_OF_ONE_COLUMN = 17, 22


def hooks(a: Architecture) -> list[Case]:
    """On each quantity that the architecture has."""
    quantities = [
        hook("q_raw", 1, 1, lambda q: 1.3 * q.roll(1, -1)),
        hook("k_raw", 0, 2, lambda k: 0.9 * k.roll(1, -1)),
        hook("igate", 0, 0, lambda i: i + 0.4),
        hook("fgate", 1, 2, lambda f: 0.7 * f),
        hook("denominator", 3, 1, lambda denominator: -0.6 * denominator),
        hook("q", 1, 1, lambda q: 1.3 * q.roll(1, -1)),
        hook("k", 0, 2, lambda k: 0.9 * k.roll(1, -1)),
        hook("v", 3, 0, lambda v: 0.5 * v.roll(1, -1)),
        hook("v", 3, 0, lambda v: 0.5 * v.roll(1, -1), in_place=True),
        hook("beta", 0, 3, lambda beta: 0.6 * beta + 0.1),  # not in proportion: behind some heads is a norm
        hook("log_decay", 3, 3, lambda g: g - 0.2),
        hook("log_decay", 3, 3, lambda g: g - 0.2, in_place=True),
        hook("kappa", 1, 2, lambda kappa: 0.9 * kappa.roll(1, -1)),
        hook("iclr", 0, 0, lambda iclr: 0.6 * iclr),
        hook("erase_gate", 3, 1, lambda gate: 0.7 * gate.roll(1, -1)),
        hook("write_gate", 0, 1, lambda gate: 0.7 * gate.roll(1, -1)),
        hook("scores", 1, 2, lambda scores: 1.5 * scores.roll(1, -1)),
        hook("read_weights", 1, 3, lambda w: 0.7 * w.roll(1, -1)),
        hook("v_mix", 1, 3, lambda v_mix: 0.3 * v_mix),
        hook("z", 3, 2, lambda z: -z),
    ]
    return [
        *(case for case in quantities if case.dense[0].stage in a.quantities(1)),
        hook_write(0, 2),
        hook_write(3, 1, extra=random_write(a, 7, size=0.5)),
        hook("o", 1, 0, lambda o: 1.5 * o.roll(1, -1)),
        hook_state(1, 3, [5, 63, 64, 100]),
        hook("k", 0, 2, lambda k: 0.9 * k.roll(1, -1))
        + edit("delete what it writes", Delete(0, 2), bf.delete, [2], slice(9, 99)),
    ]


def together(name: str, cases: Iterable[Case]) -> Case:
    return replace(functools.reduce(lambda x, y: x + y, cases), name=name)


def combinations(a: Architecture) -> list[Case]:
    """Every kind at once, in few runs, for the modes; at the prompt, its last token, and what is generated."""
    one, three = random_write(a, 11), random_write(a, 12, 3)
    write_sae, delta_sae = random_sae(a, 0, 0, "write"), random_sae(a, 1, 3, "delta", encoder="bilinear")
    state_sae = random_sae(a, 3, 1, "state")
    return [
        together("interventions", [
            edit("delete", Delete(0, [0, 2]), bf.delete, [0, 2], [4, 63, 64, 118]),
            edit("add", Add(0, 2, write=one, scale=2, relative=True), bf.add(one.dense(), relative=2), [2],
                 slice(3, 125, 5)),
            edit("later", Add(1, [0, 1], write=three), bf.add(*three.dense()), [0, 1], [116, 6, 122], "next"),
            edit("replace", Replace(3, write=one), bf.replace(one.dense()), range(N_HEADS), [5, 70, 117]),
        ]),
        together("substitutes", [
            edit("write", Substitute(write_sae), bf.substitute(write_sae), [0], None),
            edit("delta", Substitute(delta_sae), bf.substitute(delta_sae), [3], slice(3, None, 6), "next"),
            edit("state", Substitute(state_sae), bf.substitute(state_sae), [1], [2, 5, 64, 119]),
            edit("delete", Delete(0, 3), bf.delete, [3], [5, 6]),
        ]),
        together("hooks", [case for case in hooks(a) if "in place" not in case.name and "+" not in case.name]),
        together("read next", [
            edit("delete", Delete(0, 1), bf.delete, [1], None, "next"),
            edit("add", Add(3, 2, write=three), bf.add(*three.dense()), [2], [0, 64, 120], "next"),
            edit("state", Substitute(state_sae), bf.substitute(state_sae), [1], [4, 66, 121], "next"),
        ]),
    ]  # fmt: skip


def at_any_length(a: Architecture) -> list[Case]:
    """From the first token on, without an end: for sequences of any length."""
    one, state_sae = random_write(a, 21), random_sae(a, 3, 1, "state")
    by_hooks = [case for case in hooks(a) if "in place" not in case.name and "+" not in case.name]
    return [
        together("interventions", [
            edit("delete", Delete(0, 1), bf.delete, [1], None),
            edit("add", Add(1, [0, 2], write=one, scale=2, relative=True), bf.add(one.dense(), relative=2), [0, 2],
                 slice(0, None, 3)),
            edit("replace", Replace(3, 0, write=one), bf.replace(one.dense()), [0], slice(0, None, 7), "next"),
            edit("state", Substitute(state_sae), bf.substitute(state_sae), [1], slice(0, None, 9)),
            Case(
                "knockout",
                lambda model: model.intervene(Knockout(1, 3, sources=slice(0, None, 5))),
                [bf.DenseKnockout(1, 3, tuple(range(0, 10**3, 5)), None)],
            ),
        ]),
        together("hooks", [case for case in by_hooks if case.name != "hook_state"]),
    ]  # fmt: skip


@dataclass(frozen=True)
class Cases:
    """Of an architecture: single ones by ``read`` and of hooks, combinations of them, and those for any length."""

    same: list[Case]
    next: list[Case]
    hooks: list[Case]
    combined: list[Case]
    any_length: list[Case]

    @property
    def single(self) -> list[Case]:
        return self.same + self.next + self.hooks

    def __getitem__(self, name: str) -> Case:
        return next(case for case in self.single + self.combined if case.name == name)


@functools.cache
def cases(a: Architecture) -> Cases:
    """Single ones only for the first architecture of each rule."""
    single = (interventions(a, "same"), interventions(a, "next"), hooks(a)) if a.is_first_of_its_rule else ([], [], [])
    return Cases(*single, combinations(a), at_any_length(a))


def random_ids(seed: int, *shape: int) -> Tensor:
    return torch.randint(0, N_VOCAB, shape, generator=torch.Generator().manual_seed(seed))
