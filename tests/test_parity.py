"""Hooks change nothing by being there; every edit is what brute force says, on every architecture and in every mode.

The oracle runs once an architecture: a batch in which each sequence has the edits of one case. Its logits do not depend
on how a sequence is fed, so they serve prefill, pieces, decoding, padded batches and generation alike.

Every comparison goes through `assert_close`, and each twin at the end breaks one thing that `assert_close` must notice.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import jaxtyping
import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import brute_force as bf
from architectures import ARCHITECTURES, D_KEY, D_VALUE, N_HEADS, N_KEY_HEADS, N_VOCAB, Architecture, each_architecture
from brute_force import DenseEdit
from writesae import Add, Delete, HookedRecurrentModel, Intervention, Replace, SAEConfig, Substitute, Write, WriteSAE
from writesae.hooks import intercept
from writesae.hooks.families.gdn import GatedDeltaCall
from writesae.hooks.positions import PAD, Clock

TOLERANCE = 1e-4  # max |Δlogit|; logits have a standard deviation of about 1
EFFECT = 1e-3  # what an edit must move at least for the comparison to mean anything
N_POS = 130  # two chunks of 64 and a bit
N_PROMPT = 117  # the rest is generated
N_NEXT = 70  # tokens of the cache protocol, which goes one by one


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
    dense: list[DenseEdit]

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
        new = Write(key, value)
        if extra is not None:
            mask = torch.zeros(N_HEADS)
            mask[head] = 1
            new = new + extra.expand(*write.shape) * mask
        return new

    def fn(now: bf.Now, i: int) -> Tensor:
        E = torch.outer(now.k + turn, 0.7 * now.beta * now.v) - now.write
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


def random_write(seed: int, *lead: int, rank: int = 1, size: float = 1.0) -> Write:
    """Of norm ``size``, about what the models write."""
    generator = torch.Generator().manual_seed(seed)
    ranks = () if rank == 1 else (rank,)
    write = Write(
        torch.randn(*lead, *ranks, D_KEY, generator=generator),
        torch.randn(*lead, *ranks, D_VALUE, generator=generator),
        rank,
    )
    return write * (size / write.norm())


def random_sae(layer: int, head: int, target: str, tied: bool = True) -> WriteSAE:
    torch.manual_seed(5)
    cfg = SAEConfig(D_KEY, D_VALUE, n_atoms=24, k=3, target=target, tied=tied, layer=layer, head=head)  # type: ignore[arg-type]
    sae = WriteSAE(cfg)
    with torch.no_grad():
        sae.b_enc.normal_(std=0.02)
        if sae.mean is not None:
            sae.mean.normal_(std=0.02)
        if not tied:
            sae.V_enc.normal_(std=0.3)
            sae.W_enc.normal_(std=0.3)
    return sae


def interventions(read: str) -> list[Case]:
    """One of each. In the cache protocol's reach (`N_NEXT`), and across a border of chunks."""
    one, three, rank2 = random_write(1), random_write(2, 3), random_write(3, rank=2)
    for_two = torch.tensor([[4, 65]])
    write_sae, delta_sae = random_sae(1, 0, "write"), random_sae(0, 3, "delta", tied=False)
    state_sae = random_sae(3, 2, "state")
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
        edit("substitute one atom", Substitute(write_sae, atom=TOP_ATOM), bf.substitute(write_sae, atom=TOP_ATOM),
             [0], None, read),
        edit("substitute deltas", Substitute(delta_sae), bf.substitute(delta_sae), [3], slice(1, None, 6), read),
        edit("substitute states", Substitute(state_sae), bf.substitute(state_sae), [2], [7, 8, 63, 64], read),
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


TOP_ATOM = 17  # of the write SAE: one that is often the top one


def hooks() -> list[Case]:
    return [
        hook("q", 1, 1, lambda q: 1.3 * q.roll(1, -1)),
        hook("k", 0, 2, lambda k: 0.9 * k.roll(1, -1)),
        hook("v", 3, 0, lambda v: 0.5 * v),
        hook("v", 3, 0, lambda v: 0.5 * v, in_place=True),
        hook("beta", 0, 3, lambda beta: 0.6 * beta),
        hook("log_decay", 3, 3, lambda g: g - 0.2),
        hook("log_decay", 3, 3, lambda g: g - 0.2, in_place=True),
        hook_write(0, 2),
        hook_write(3, 1, extra=random_write(7, size=0.5)),
        hook("o", 1, 0, lambda o: 1.5 * o.roll(1, -1)),
        hook("z", 3, 2, lambda z: -z),
        hook_state(1, 3, [5, 63, 64, 100]),
        hook("k", 0, 2, lambda k: 0.9 * k.roll(1, -1))
        + edit("delete what it writes", Delete(0, 2), bf.delete, [2], slice(9, 99)),
    ]


def combinations() -> list[Case]:
    """Every kind at once, in few runs, for the modes; at the prompt, its last token, and what is generated."""
    one, three = random_write(11), random_write(12, 3)
    saes = [random_sae(0, 0, "write"), random_sae(1, 3, "delta", tied=False), random_sae(3, 1, "state")]
    spread = slice(3, None, 6)
    total = functools.reduce(lambda x, y: x + y, [
        edit("delete", Delete(0, [0, 2]), bf.delete, [0, 2], [4, 63, 64, 118]),
        edit("add", Add(0, 2, write=one, scale=2, relative=True), bf.add(one.dense(), relative=2), [2],
             slice(3, 125, 5)),
        edit("later", Add(1, [0, 1], write=three), bf.add(*three.dense()), [0, 1], [116, 6, 122], "next"),
        edit("replace", Replace(3, write=one), bf.replace(one.dense()), range(N_HEADS), [5, 70, 117]),
    ])  # fmt: skip
    substitutes = functools.reduce(lambda x, y: x + y, [
        edit("write", Substitute(saes[0]), bf.substitute(saes[0]), [0], None),
        edit("delta", Substitute(saes[1]), bf.substitute(saes[1]), [3], spread, "next"),
        edit("state", Substitute(saes[2]), bf.substitute(saes[2]), [1], [2, 5, 64, 119]),
        edit("delete", Delete(0, 3), bf.delete, [3], [5, 6]),
    ])  # fmt: skip
    hooked = functools.reduce(lambda x, y: x + y, [*hooks()[:3], *hooks()[4:6], *hooks()[7:12]])
    later = functools.reduce(lambda x, y: x + y, [
        edit("delete", Delete(0, 1), bf.delete, [1], None, "next"),
        edit("add", Add(3, 2, write=three), bf.add(*three.dense()), [2], [0, 64, 120], "next"),
        edit("state", Substitute(saes[2]), bf.substitute(saes[2]), [1], [4, 66, 121], "next"),
    ])  # fmt: skip
    return [
        replace(total, name="interventions"),
        replace(substitutes, name="substitutes"),
        replace(hooked, name="hooks"),
        replace(later, name="read next"),
    ]


SAME, NEXT, HOOKS, COMBINED = interventions("same"), interventions("next"), hooks(), combinations()
CASES = SAME + NEXT + HOOKS


# Experiments ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Experiment:
    """A wrapped model of an architecture, and what brute force says.

    Attributes:
        ids: ``[pos]`` tokens of all single cases.
        expected: logits of each case by its name, ``[pos, vocab]``.
        plain: the same tokens without edits.
        sequences: tokens of each combination: what the model generates under it.
        generated: the logits that generation saw.
        protocol: logits of the cases of read="next" by the cache protocol.
    """

    model: HookedRecurrentModel
    ids: Tensor
    expected: dict[str, Tensor]
    plain: dict[str, Tensor]
    sequences: dict[str, Tensor]
    generated: dict[str, Tensor]
    protocol: dict[str, Tensor]


def random_ids(seed: int, *shape: int) -> Tensor:
    return torch.randint(0, N_VOCAB, shape, generator=torch.Generator().manual_seed(seed))


@functools.cache
@annotations_unchecked()
def experiment(name: str) -> Experiment:
    architecture = next(a for a in ARCHITECTURES if a.name == name)
    model, unwrapped = HookedRecurrentModel(architecture.build()), architecture.build()
    ids = random_ids(1, N_POS)
    sequences, generated = {}, {}
    for case in COMBINED:
        sequences[case.name], generated[case.name] = generate(model, case, ids[None, :N_PROMPT])
    # One batch for all: each case on the same tokens, each combination on its own, and the latter without edits.
    rows = [*(ids for _ in CASES), *sequences.values(), ids, *sequences.values()]
    edits = [c.dense for c in CASES + COMBINED] + [[]] * (1 + len(COMBINED))
    logits = list(bf.brute_force(unwrapped, architecture.modeling, torch.stack(rows), edits))
    n = len(CASES) + len(COMBINED)
    return Experiment(
        model,
        ids,
        expected=dict(zip([c.name for c in CASES + COMBINED], logits[:n], strict=True)),
        plain=dict.fromkeys([c.name for c in CASES], logits[n])
        | dict(zip([c.name for c in COMBINED], logits[n + 1 :], strict=True)),
        sequences=sequences,
        generated=generated,
        protocol=cached_protocol(architecture, unwrapped, ids),
    )


def cached_protocol(architecture: Architecture, unwrapped: Any, ids: Tensor) -> dict[str, Tensor]:
    logits = bf.cache_protocol(
        unwrapped, architecture.modeling, ids[:N_NEXT].expand(len(NEXT), -1), [c.dense for c in NEXT]
    )
    return dict(zip([c.name for c in NEXT], logits, strict=True))


# The modes: each returns logits [pos, vocab] of the same tokens ------------------------------------------------------


@torch.no_grad()
def prefill(model: HookedRecurrentModel, case: Case, ids: Tensor) -> Tensor:
    with case.attach(model):
        return model(ids)[0]


@torch.no_grad()
def feed(
    model: HookedRecurrentModel, case: Case, ids: Tensor, pieces: Sequence[int], mask: Tensor | None = None
) -> Tensor:
    """In pieces of these lengths, with a cache."""
    cache, logits, start = DynamicCache(config=model.config), [], 0
    assert sum(pieces) == ids.shape[1]
    if hasattr(model.hf_model.base_model, "rope_deltas"):
        model.hf_model.base_model.rope_deltas = None  # what `generate` leaves there makes transformers fail with a mask
    with case.attach(model):
        for n in pieces:
            now = {} if mask is None else {"attention_mask": mask[:, : start + n]}
            logits.append(model(ids[:, start : start + n], past_key_values=cache, **now))
            start += n
    return torch.cat(logits, 1)


def pieces(model: HookedRecurrentModel, case: Case, ids: Tensor) -> Tensor:
    return feed(model, case, ids[None], [5, 1, 58, 1, 1, 51, 13])[0]


def decode(model: HookedRecurrentModel, case: Case, ids: Tensor) -> Tensor:
    """One by one from the very first token, then a long piece, and one by one again."""
    return feed(model, case, ids[None], [1] * 8 + [N_PROMPT - 8] + [1] * (N_POS - N_PROMPT))[0]


def left_padded(model: HookedRecurrentModel, case: Case, ids: Tensor, pieces: Sequence[int] | None = None) -> Tensor:
    """Beside a sequence that is 70 tokens longer, so that padding fills a chunk."""
    n_pad = 70
    extra = random_ids(3, n_pad)
    batch = torch.stack([torch.cat([torch.zeros(n_pad, dtype=torch.long), ids]), torch.cat([ids, extra])])
    mask = torch.ones_like(batch)
    mask[0, :n_pad] = 0
    if pieces is not None:
        logits = feed(model, case, batch, [n_pad + pieces[0], *pieces[1:]], mask)
    else:
        with torch.no_grad(), case.attach(model):
            logits = model(batch, attention_mask=mask)
    assert_close(logits[0, n_pad:], logits[1, :N_POS])  # the longer one is edited alike
    return logits[0, n_pad:]


def left_padded_pieces(model: HookedRecurrentModel, case: Case, ids: Tensor) -> Tensor:
    return left_padded(model, case, ids, [3, 1, 1, 60, 52, *[1] * 3, 10])


@torch.no_grad()
def right_padded(model: HookedRecurrentModel, case: Case, ids: Tensor) -> Tensor:
    n_pad = 9
    batch = torch.stack(
        [torch.cat([ids, torch.zeros(n_pad, dtype=torch.long)]), torch.cat([ids, random_ids(3, n_pad)])]
    )
    mask = torch.ones_like(batch)
    mask[0, -n_pad:] = 0
    with case.attach(model):
        logits = model(batch, attention_mask=mask)[:, :N_POS]
    assert_close(logits[0], logits[1])
    return logits[0]


MODES = {f.__name__: f for f in (prefill, pieces, decode, left_padded, left_padded_pieces, right_padded)}


@torch.no_grad()
def generate(
    model: HookedRecurrentModel, case: Case, prompt: Tensor, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The sequence of `N_POS` tokens that the model makes of a prompt, and the logits it took the new ones from."""
    seen = []
    handle = model.hf_model.lm_head.register_forward_hook(lambda _m, _a, logits: seen.append(logits[:, -1]))
    mask = torch.ones_like(prompt) if mask is None else mask
    try:
        with case.attach(model):
            out = model.generate(prompt, attention_mask=mask, max_new_tokens=N_POS - N_PROMPT, do_sample=False)
    finally:
        handle.remove()
    return out[0, mask[0].argmax() :], torch.stack(seen, 1)[0]


# Nothing attached: bit for bit ---------------------------------------------------------------------------------------


@torch.no_grad()
def run_in_every_way(model: Any, ids: Tensor) -> list[Tensor]:
    """Of a transformers model: forward, with a cache in pieces, padded, generate; logits and final states."""
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    cache = DynamicCache(config=model.config)
    steps = [model(input_ids=ids[:, a:b], past_key_values=cache).logits for a, b in [(0, 66), (66, 67), (67, 75)]]
    made = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=4, do_sample=False)
    return [
        model(input_ids=ids, use_cache=False).logits,
        model(input_ids=ids, attention_mask=mask).logits,
        *steps,
        *(cache.layers[layer].recurrent_states[0] for layer in (0, 1, 3)),
        made,
    ]


@each_architecture
def test_nothing_attached_nothing_changed(architecture: Architecture) -> None:
    ids = random_ids(2, 2, 75)
    raw, hf_model = architecture.build(), architecture.build()
    with bf.untouched(architecture.modeling):
        expected = run_in_every_way(raw, ids)

    def check(text: str) -> None:
        for x, y in zip(run_in_every_way(hf_model, ids), expected, strict=True):
            assert torch.equal(x, y), text

    model = HookedRecurrentModel(hf_model)
    check("wrapped")
    assert torch.equal(model(ids), expected[0])
    assert torch.equal(model.run_with_cache(ids)[0], expected[0])
    with torch.no_grad(), model.hooks([(lambda _name: True, lambda value, hook: None)], state_positions=[3, 70]):
        assert torch.equal(model(ids), expected[0]), "every point listened to"
    edits = [Delete(0, 1), Add(1, write=random_write(1)), Substitute(random_sae(3, 1, "state"))]
    with model.intervene(edits, positions=[3]):
        assert not torch.equal(model(ids), expected[0])
    check("attached, then detached")
    with (
        pytest.raises(ZeroDivisionError),
        model.intervene(edits),
        model.hooks([(model.hook_names[0], lambda v, hook: 1 / 0)]),
    ):
        model(ids)
    check("after an exception in a block")
    assert all(not tap.busy for tap in model._taps)


# Every edit, in every mode -------------------------------------------------------------------------------------------


@each_architecture
def test_oracles_agree(architecture: Architecture) -> None:
    """The oracle without edits is the model, and its two forms are one."""
    e = experiment(architecture.name)
    raw = architecture.build()
    with torch.no_grad(), bf.untouched(architecture.modeling):
        logits = raw(input_ids=e.ids[None], use_cache=False).logits[0]
    assert_close(e.plain[CASES[0].name], logits, 2e-5)
    for case in NEXT:
        assert_close(e.expected[case.name][:N_NEXT], e.protocol[case.name], 5e-5)


@each_architecture
@pytest.mark.parametrize("case", CASES, ids=str)
def test_prefill(architecture: Architecture, case: Case) -> None:
    e = experiment(architecture.name)
    assert (e.expected[case.name] - e.plain[case.name]).abs().max() > EFFECT
    with nullcontext() if architecture is ARCHITECTURES[0] else annotations_unchecked():
        ours = prefill(e.model, case, e.ids)
    assert_close(ours, e.expected[case.name])
    if case.name in e.protocol:
        assert_close(ours[:N_NEXT], e.protocol[case.name])


@each_architecture
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@annotations_unchecked()
def test_modes(architecture: Architecture, mode: Callable[..., Tensor]) -> None:
    e = experiment(architecture.name)
    for case in COMBINED:
        assert (e.expected[case.name] - e.plain[case.name]).abs().max() > EFFECT
        assert_close(mode(e.model, case, e.sequences[case.name]), e.expected[case.name])


@each_architecture
def test_generate(architecture: Architecture) -> None:
    e = experiment(architecture.name)
    for case in COMBINED:
        assert_close(e.generated[case.name], e.expected[case.name][N_PROMPT - 1 : -1])


@each_architecture
@annotations_unchecked()
def test_generate_left_padded(architecture: Architecture) -> None:
    e, n_pad = experiment(architecture.name), 9
    for case in COMBINED[:2]:
        ids = e.sequences[case.name]
        longer = torch.cat([ids[:N_PROMPT], random_ids(3, n_pad)])
        prompt = torch.stack([torch.cat([torch.zeros(n_pad, dtype=torch.long), ids[:N_PROMPT]]), longer])
        mask = torch.ones_like(prompt)
        mask[0, :n_pad] = 0
        made, logits = generate(e.model, case, prompt, mask)
        assert made.tolist() == ids.tolist()
        assert_close(logits, e.expected[case.name][N_PROMPT - 1 : -1])


@each_architecture
def test_each_sequence_its_own(architecture: Architecture) -> None:
    """Positions and writes of their own for each sequence of a left-padded batch."""
    n_pos, n_pad, raw = 40, 7, architecture.build()
    model = HookedRecurrentModel(architecture.build())
    ids = random_ids(4, 2, n_pos)
    positions = torch.tensor([[3, 30], [20, 8]])
    for writes in (random_write(5, 2, 2), random_write(6, 2, 1)):
        dense = writes.dense().expand(2, 2, D_KEY, D_VALUE)
        edits = [[DenseEdit(1, 2, bf.add(*dense[row]), positions[row].tolist())] for row in (0, 1)]
        expected = bf.brute_force(raw, architecture.modeling, ids, edits)
        padded = torch.cat([torch.zeros(2, n_pad, dtype=torch.long), ids], 1)
        padded[1] = torch.cat([ids[1], random_ids(5, n_pad)])
        mask = torch.ones_like(padded)
        mask[0, :n_pad] = 0
        with torch.no_grad(), model.intervene(Add(1, 2, write=writes), positions=positions):
            logits = model(padded, attention_mask=mask)
        assert_close(logits[0, n_pad:], expected[0])
        assert_close(logits[1, :n_pos], expected[1])


@each_architecture
def test_blocks_add_up_in_any_order(architecture: Architecture) -> None:
    e = experiment(architecture.name)
    cases = [SAME[0], SAME[4], HOOKS[8], SAME[16]]  # of layers 0 and 3, by write and by state, and a hook on writes
    one = functools.reduce(lambda x, y: x + y, cases)
    other = functools.reduce(lambda x, y: x + y, cases[::-1])
    assert_close(prefill(e.model, one, e.ids), prefill(e.model, other, e.ids), 2e-5)
    twice = SAME[0] + SAME[0]
    back = edit("what it was", Add(0, 1, write=random_write(1), scale=0.0), None, [1], 17)
    with pytest.raises(AssertionError):
        assert_close(prefill(e.model, twice, e.ids), prefill(e.model, SAME[0], e.ids))
    assert_close(prefill(e.model, SAME[0] + back, e.ids), prefill(e.model, SAME[0], e.ids), 1e-6)


def measure(architecture: Architecture) -> dict[str, float]:
    """The largest differences that the tests above allow `TOLERANCE` for; benchmarks/parity_table.py shows them."""
    e, raw = experiment(architecture.name), architecture.build()

    def largest(pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
        return max((x - y).abs().max().item() for x, y in pairs)

    with torch.no_grad(), bf.untouched(architecture.modeling):
        unedited = raw(input_ids=e.ids[None], use_cache=False).logits
    with torch.no_grad():
        found = {"unedited": largest([(e.model(e.ids), unedited)])}
    found["oracle, unedited"] = largest([(e.plain[CASES[0].name], unedited[0])])
    single = {c.name: prefill(e.model, c, e.ids) for c in CASES}
    found["each edit, prefill"] = largest((ours, e.expected[name]) for name, ours in single.items())
    found["read next, cache slot"] = largest((single[name][:N_NEXT], theirs) for name, theirs in e.protocol.items())
    for name, mode in MODES.items():
        found[name] = largest((mode(e.model, c, e.sequences[c.name]), e.expected[c.name]) for c in COMBINED)
    found["generate"] = largest((e.generated[c.name], e.expected[c.name][N_PROMPT - 1 : -1]) for c in COMBINED)
    found["moved"] = min((e.expected[c.name] - e.plain[c.name]).abs().max().item() for c in CASES + COMBINED)
    return found


# Broken twins --------------------------------------------------------------------------------------------------------

chunked, respond, key_heads = intercept.chunked, intercept.respond, GatedDeltaCall.get


def without_erase(rec: Any, write: Write, *args: Any, **kwargs: Any) -> Any:
    return chunked(replace(rec, a=None, b=None), write, *args, **kwargs)


def erase_undecayed(rec: Any, write: Write, *args: Any, **kwargs: Any) -> Any:
    """``-beta k (k^T S)`` for ``-beta k (k^T D S)``."""
    return chunked(replace(rec, a=rec.a / rec.log_decay.exp()[..., None]), write, *args, **kwargs)


def written_along_the_erase_key(rec: Any, write: Write, *args: Any, **kwargs: Any) -> Any:
    key = rec.b if write.rank == 1 else rec.b[..., None, :].expand_as(write.key)
    return chunked(rec, replace(write, key=key * write.key.norm(dim=-1, keepdim=True)), *args, **kwargs)


def read_ignored(*args: Any, **kwargs: Any) -> Any:
    return chunked(*args, **(kwargs | {"read": "same"}))


def state_not_carried(call: Any, native: Write, record: Any, o: Tensor, state: Tensor | None) -> Any:
    return respond(call, native, record, o, None)[0], state


def heads_tiled(call: GatedDeltaCall, quantity: str, heads: Sequence[int] | None = None) -> Tensor:
    """Key heads 0 1 0 1 for 0 0 1 1."""
    value = key_heads(call, quantity)
    if quantity in ("q", "k"):
        value = value[:, :, [(h % N_KEY_HEADS) * (N_HEADS // N_KEY_HEADS) for h in range(N_HEADS)]]
    return value if heads is None else value[:, :, list(heads)]


def padding_counted(clock: Clock) -> Tensor:
    n_pos = clock._shape()[1]
    positions = torch.arange(clock._past, clock._past + n_pos).expand(clock._shape())
    return positions.masked_fill(clock._work_out() == PAD, PAD)


def position_after(clock: Clock) -> Tensor:
    """Off by one."""
    return (clock._work_out() - 1).clamp_min(PAD)


INTERVENTIONS, SUBSTITUTES, HOOKED, LATER = COMBINED
TWINS = [
    (intercept, "chunked", without_erase, prefill, INTERVENTIONS),
    (intercept, "chunked", without_erase, prefill, HOOKED),
    (intercept, "chunked", without_erase, prefill, SUBSTITUTES),
    (intercept, "chunked", erase_undecayed, prefill, INTERVENTIONS),
    (intercept, "chunked", written_along_the_erase_key, prefill, INTERVENTIONS),
    (intercept, "chunked", read_ignored, prefill, LATER),
    (intercept, "chunked", read_ignored, decode, LATER),
    (intercept, "respond", state_not_carried, pieces, INTERVENTIONS),
    (intercept, "respond", state_not_carried, decode, LATER),
    (GatedDeltaCall, "get", heads_tiled, prefill, INTERVENTIONS),
    (GatedDeltaCall, "get", heads_tiled, decode, SUBSTITUTES),
    (Clock, "positions", padding_counted, left_padded, SAME[15]),  # a slice: nothing says that a position is missing
    (Clock, "positions", padding_counted, left_padded_pieces, SAME[15]),
    (Clock, "positions", position_after, prefill, INTERVENTIONS),
]


# Not `a` and `b` swapped: `a b^T` is symmetric in this family, where both lie along the key, and swapping is right.
@pytest.mark.parametrize(
    ("owner", "name", "broken", "mode", "case"), TWINS, ids=[f"{t[2].__name__}-{t[3].__name__}-{t[4]}" for t in TWINS]
)
@annotations_unchecked()
def test_twins(
    owner: Any,
    name: str,
    broken: Callable[..., Any],
    mode: Callable[..., Tensor],
    case: Case,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    e = experiment("qwen3_5")
    ids, expected = e.sequences.get(case.name, e.ids), e.expected[case.name]
    assert_close(mode(e.model, case, ids), expected)
    monkeypatch.setattr(owner, name, broken)
    with pytest.raises(AssertionError, match="not close"):
        assert_close(mode(e.model, case, ids), expected)


def test_heads_tiled_twin_of_hooks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hook on keys puts the expanded keys into the model: in the wrong order, it would be another model."""
    e, case = experiment("qwen3_5"), HOOKS[1]
    monkeypatch.setattr(GatedDeltaCall, "get", heads_tiled)
    with pytest.raises(AssertionError, match="not close"):
        assert_close(prefill(e.model, case, e.ids), e.expected[case.name])
