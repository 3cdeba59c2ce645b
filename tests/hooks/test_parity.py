"""Hooks change nothing by being there; every edit is what brute force says, on every architecture and in every mode.

The oracle runs once an architecture: a batch in which each sequence has the edits of one case. Its logits do not depend
on how a sequence is fed, so they serve prefill, pieces, decoding, padded batches and generation alike.

The first architecture of each rule gets every case by itself. The others share its adapter; for them, combinations that
hold every kind of edit must do.

Every comparison goes through `assert_close`, and each twin at the end breaks one thing that `assert_close` must notice.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import brute_force as bf
from architectures import (
    ARCHITECTURES,
    D_KEY,
    Architecture,
    architecture_named,
    each_architecture,
    each_rule,
)
from brute_force import DenseEdit
from edit_cases import (
    Case,
    annotations_unchecked,
    assert_close,
    cases,
    edit,
    random_ids,
    random_sae,
    random_write,
    together,
)
from writesae import Add, Delete, HookedRecurrentModel, Substitute, Write
from writesae.hooks import response, tap
from writesae.hooks.clock import Pass
from writesae.hooks.families import gdn, mamba1, mamba2
from writesae.hooks.families.base import of_heads
from writesae.hooks.families.mamba2 import ChunkScan, StepUpdate
from writesae.hooks.families.xlstm import MLSTMCall
from writesae.hooks.positions import PAD
from writesae.recurrence import Recurrence
from writesae.recurrence.rules import Rule

EFFECT = 1e-3  # what an edit must move at least for the comparison to mean anything
N_POS = 130  # two chunks of 64 and a bit
N_PROMPT = 117  # the rest is generated
N_NEXT = 70  # tokens of the cache protocol, which goes one by one
LENGTHS = [1, 2, 63, 64, 65, 200]


# Experiments ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Experiment:
    """A wrapped model of an architecture, and what brute force says.

    Attributes:
        a: the architecture.
        ids: ``[pos]`` tokens of all single cases.
        expected: logits of each case by its name, ``[pos, vocab]``.
        plain: the same tokens without edits.
        unedited: ``ids`` without edits.
        sequences: tokens of each combination: what the model generates under it.
        generated: the logits that generation saw.
        protocol: logits of the cases of read="next" by the cache protocol.
    """

    a: Architecture
    model: HookedRecurrentModel
    ids: Tensor
    expected: dict[str, Tensor]
    plain: dict[str, Tensor]
    unedited: Tensor
    sequences: dict[str, Tensor]
    generated: dict[str, Tensor]
    protocol: dict[str, Tensor]


@functools.cache
@annotations_unchecked()
def experiment(a: Architecture) -> Experiment:
    model, unwrapped = HookedRecurrentModel(a.build()), a.build()
    single, combined = cases(a).single, cases(a).combined
    ids = random_ids(1, N_POS)
    sequences, generated = {}, {}
    for case in combined:
        sequences[case.name], generated[case.name] = generate(model, case, ids[None, :N_PROMPT])
    # One batch for all: each case on the same tokens, each combination on its own, and the latter without edits.
    rows = [*(ids for _ in single), *sequences.values(), ids, *sequences.values()]
    edits = [c.dense for c in single + combined] + [[]] * (1 + len(combined))
    logits = list(bf.brute_force(a, unwrapped, torch.stack(rows), edits))
    n = len(single) + len(combined)
    protocol = {}
    if cases(a).next:
        later = cases(a).next
        by_cache = bf.cache_protocol(a, unwrapped, ids[:N_NEXT].expand(len(later), -1), [c.dense for c in later])
        protocol = dict(zip([c.name for c in later], by_cache, strict=True))
    return Experiment(
        a,
        model,
        ids,
        expected=dict(zip([c.name for c in single + combined], logits[:n], strict=True)),
        unedited=logits[n],
        plain=dict.fromkeys([c.name for c in single], logits[n])
        | dict(zip([c.name for c in combined], logits[n + 1 :], strict=True)),
        sequences=sequences,
        generated=generated,
        protocol=protocol,
    )


def long_ids() -> Tensor:
    return random_ids(6, max(LENGTHS))


@functools.cache
def of_any_length(a: Architecture) -> Tensor:
    """What brute force says of `long_ids` for each case of `Cases.any_length`; also of any shorter sequence, since
    nothing depends on what comes later."""
    edits = [case.dense for case in cases(a).any_length]
    return bf.brute_force(a, a.build(), long_ids().expand(len(edits), -1), edits)


# The modes: each returns logits [pos, vocab] of the same tokens ------------------------------------------------------


@torch.no_grad()
def prefill(e: Experiment, case: Case, ids: Tensor) -> Tensor:
    with case.attach(e.model):
        return e.model(ids)[0]


@torch.no_grad()
def feed(e: Experiment, case: Case, ids: Tensor, pieces: Sequence[int], mask: Tensor | None = None) -> Tensor:
    """In pieces of these lengths, with a cache."""
    model, logits, start = e.model, [], 0
    cache = DynamicCache(config=model.config)
    assert sum(pieces) == ids.shape[1]
    if hasattr(model.hf_model.base_model, "rope_deltas"):
        model.hf_model.base_model.rope_deltas = None  # what `generate` leaves there makes transformers fail with a mask
    with case.attach(model):
        for n in pieces:
            now = {} if mask is None else {"attention_mask": mask[:, : start + n]}
            now |= e.a.place(start, n)
            logits.append(model(ids[:, start : start + n], past_key_values=cache, **now))
            start += n
    return torch.cat(logits, 1)


def pieces(e: Experiment, case: Case, ids: Tensor) -> Tensor:
    return feed(e, case, ids[None], [5, 1, 58, 1, 1, 51, 13])[0]


def decode(e: Experiment, case: Case, ids: Tensor) -> Tensor:
    """One by one from the very first token, then a long piece, and one by one again."""
    return feed(e, case, ids[None], [1] * 8 + [N_PROMPT - 8] + [1] * (N_POS - N_PROMPT))[0]


def left_padded(e: Experiment, case: Case, ids: Tensor, pieces: Sequence[int] | None = None) -> Tensor:
    """Beside a sequence that is 70 tokens longer, so that padding fills a chunk."""
    n_pad = 70
    extra = random_ids(3, n_pad)
    batch = torch.stack([torch.cat([torch.zeros(n_pad, dtype=torch.long), ids]), torch.cat([ids, extra])])
    mask = torch.ones_like(batch)
    mask[0, :n_pad] = 0
    if pieces is not None:
        logits = feed(e, case, batch, [n_pad + pieces[0], *pieces[1:]], mask)
    else:
        with torch.no_grad(), case.attach(e.model):
            logits = e.model(batch, attention_mask=mask)
    assert_close(logits[0, n_pad:], logits[1, :N_POS])  # the longer one is edited alike
    return logits[0, n_pad:]


def left_padded_pieces(e: Experiment, case: Case, ids: Tensor) -> Tensor:
    return left_padded(e, case, ids, [3, 1, 1, 60, 52, *[1] * 3, 10])


@torch.no_grad()
def right_padded(e: Experiment, case: Case, ids: Tensor) -> Tensor:
    n_pad = 9
    batch = torch.stack(
        [torch.cat([ids, torch.zeros(n_pad, dtype=torch.long)]), torch.cat([ids, random_ids(3, n_pad)])]
    )
    mask = torch.ones_like(batch)
    mask[0, -n_pad:] = 0
    with case.attach(e.model):
        logits = e.model(batch, attention_mask=mask)[:, :N_POS]
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
def run_in_every_way(a: Architecture, model: Any, ids: Tensor) -> list[Tensor]:
    """Of a transformers model: forward, with a cache in pieces, padded, generate; logits and final states."""
    mask = torch.ones_like(ids)
    mask[0, :5] = int(a.ignores_padding)  # where a wrapped one is right, and not the same
    cache = a.new_cache(model)
    # Where several tokens would be given an empty memory (see test_pieces_go_on), the last ones come one by one.
    ends = list(range(67, 76)) if a.rule.forgets else [67, 75]
    steps = [
        model(input_ids=ids[:, start:end], **cache, **a.place(start, end - start)).logits
        for start, end in [(0, 66), *itertools.pairwise([66, *ends])]
    ]
    of_ours = a.new_cache(model) if a.own_cache else {}
    made = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=4, do_sample=False, **of_ours)
    return [
        model(input_ids=ids, use_cache=False).logits,
        model(input_ids=ids, attention_mask=mask).logits,
        *steps,
        *(a.slot(*cache.values(), layer) for layer in a.layers),
        made,
    ]


@each_architecture
def test_nothing_attached_nothing_changed(architecture: Architecture) -> None:
    a, ids = architecture, random_ids(2, 2, 75)
    raw, hf_model = a.build(), a.build()
    with bf.untouched(a):
        expected = run_in_every_way(a, raw, ids)

    def check(text: str) -> None:
        for x, y in zip(run_in_every_way(a, hf_model, ids), expected, strict=True):
            assert torch.equal(x, y), text

    model = HookedRecurrentModel(hf_model)
    check("wrapped")
    assert torch.equal(model(ids), expected[0])
    assert torch.equal(model.run_with_cache(ids)[0], expected[0])
    with torch.no_grad(), model.hooks([(lambda _name: True, lambda value, hook: None)], state_positions=[3, 70]):
        assert torch.equal(model(ids), expected[0]), "every point listened to"
    edits = [Delete(0, 1), Add(1, write=random_write(a, 1)), Substitute(random_sae(a, 3, 1, "state"))]
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
    assert not model.busy


@pytest.mark.parametrize("a", [a for a in ARCHITECTURES if a.rule.forgets], ids=str)
@torch.no_grad()
def test_pieces_go_on(a: Architecture) -> None:
    """transformers' Mamba-1 gives every piece of several tokens an empty memory; a wrapped one goes on."""
    ids, hf_model = random_ids(2, 2, 75), a.build()
    with bf.untouched(a):
        expected = hf_model(input_ids=ids, use_cache=False).logits

    def in_pieces(ends: Sequence[int]) -> Tensor:
        cache = a.new_cache(hf_model)
        pieces = itertools.pairwise([0, *ends])
        return torch.cat([hf_model(input_ids=ids[:, i:j], use_cache=True, **cache).logits for i, j in pieces], 1)

    with bf.untouched(a):
        assert (in_pieces([66, 67, 75]) - expected).abs()[:, 67:].max() > 1e-2, "it remembers: `forgets` can go"
    HookedRecurrentModel(hf_model)
    for ends in ([66, 67, 75], [1, 3, 64, 75], [74, 75]):
        assert_close(in_pieces(ends), expected)


# Every edit, in every mode -------------------------------------------------------------------------------------------


@each_rule
def test_oracles_agree(architecture: Architecture) -> None:
    """The oracle's two forms are one. (That without edits it is the model: tests/hooks/test_oracles.py.)"""
    e = experiment(architecture)
    for case in cases(architecture).next:
        assert_close(e.expected[case.name][:N_NEXT], e.protocol[case.name], 5e-5)


@pytest.mark.parametrize(
    ("architecture", "case"), [(a, case) for a in ARCHITECTURES for case in cases(a).single], ids=str
)
def test_prefill(architecture: Architecture, case: Case) -> None:
    e = experiment(architecture)
    assert (e.expected[case.name] - e.plain[case.name]).abs().max() > EFFECT
    with nullcontext() if architecture is ARCHITECTURES[0] else annotations_unchecked():
        ours = prefill(e, case, e.ids)
    assert_close(ours, e.expected[case.name])
    if case.name in e.protocol:
        assert_close(ours[:N_NEXT], e.protocol[case.name])


@each_architecture
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@annotations_unchecked()
def test_modes(architecture: Architecture, mode: Callable[..., Tensor]) -> None:
    e = experiment(architecture)
    for case in cases(architecture).combined:
        assert (e.expected[case.name] - e.plain[case.name]).abs().max() > EFFECT
        assert_close(mode(e, case, e.sequences[case.name]), e.expected[case.name])


@each_architecture
@annotations_unchecked()
def test_lengths(architecture: Architecture) -> None:
    """Around a chunk's border, and at the two ends: alone, and as what comes before a last token that is decoded."""
    e = experiment(architecture)
    for case, expected in zip(cases(architecture).any_length, of_any_length(architecture), strict=True):
        for n in LENGTHS:
            ids = long_ids()[:n]
            assert_close(prefill(e, case, ids), expected[:n])
            if n > 1:
                assert_close(feed(e, case, ids[None], [n - 1, 1])[0], expected[:n])


@each_architecture
def test_generate(architecture: Architecture) -> None:
    e = experiment(architecture)
    for case in cases(architecture).combined:
        assert_close(e.generated[case.name], e.expected[case.name][N_PROMPT - 1 : -1])


@each_architecture
@annotations_unchecked()
def test_generate_left_padded(architecture: Architecture) -> None:
    e, n_pad = experiment(architecture), 9
    for case in cases(architecture).combined[:2]:
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
    a, n_pos, n_pad = architecture, 40, 7
    model, raw = HookedRecurrentModel(a.build()), a.build()
    ids = random_ids(4, 2, n_pos)
    positions = torch.tensor([[3, 30], [20, 8]])
    for writes in (random_write(a, 5, 2, 2), random_write(a, 6, 2, 1)):
        dense = writes.dense().expand(2, 2, D_KEY, a.d_value)
        edits = [[DenseEdit(1, 2, bf.add(*dense[row]), positions[row].tolist())] for row in (0, 1)]
        expected = bf.brute_force(a, raw, ids, edits)
        padded = torch.cat([torch.zeros(2, n_pad, dtype=torch.long), ids], 1)
        padded[1] = torch.cat([ids[1], random_ids(5, n_pad)])
        mask = torch.ones_like(padded)
        mask[0, :n_pad] = 0
        with torch.no_grad(), model.intervene(Add(1, 2, write=writes), positions=positions):
            logits = model(padded, attention_mask=mask)
        assert_close(logits[0, n_pad:], expected[0])
        assert_close(logits[1, :n_pos], expected[1])


@torch.no_grad()
@annotations_unchecked()
def test_limits_of_dt() -> None:
    """Mamba-2's scan clamps dt, its step does not: so a model with limits decodes otherwise than it prefills."""
    a, ids = architecture_named("mamba2"), random_ids(8, 1, 14)
    case = together("both", cases(a).any_length)
    a = replace(a, values=a.values | {"time_step_limit": (0.3, 0.9)})
    raw, model = a.build(), HookedRecurrentModel(a.build())

    def feed(run: Callable[..., Tensor], pieces: Sequence[int]) -> Tensor:
        cache, parts = DynamicCache(config=model.config), ids.split(list(pieces), 1)
        return torch.cat([run(part, cache) for part in parts], 1)

    results = []
    for lengths in ([14], [8, 1, 1, 3, 1]):
        with bf.BruteForce(a, raw, [case.dense]):
            expected = feed(lambda x, cache: raw(input_ids=x, cache_params=cache).logits, lengths)
        with case.attach(model):
            assert_close(feed(lambda x, cache: model(x, past_key_values=cache), lengths), expected)
        results.append(expected)
    with pytest.raises(AssertionError, match="not close"):
        assert_close(*results)


@each_rule
def test_blocks_add_up_in_any_order(architecture: Architecture) -> None:
    e, by_name = experiment(architecture), cases(architecture)
    delete = by_name["delete at an int, same"]
    # Of layers 0 and 3, by write and by state, and a hook on writes.
    several = [delete, by_name["add, same"], by_name["hook_write, rank 2"], by_name["substitute states, same"]]
    one, other = together("forwards", several), together("backwards", several[::-1])
    assert_close(prefill(e, one, e.ids), prefill(e, other, e.ids), 2e-5)
    back = edit("what it was", Add(0, 1, write=random_write(architecture, 1), scale=0.0), None, [1], 17)
    with pytest.raises(AssertionError):
        assert_close(prefill(e, delete + delete, e.ids), prefill(e, delete, e.ids))
    assert_close(prefill(e, delete + back, e.ids), prefill(e, delete, e.ids), 1e-6)


def measure(architecture: Architecture) -> dict[str, float]:
    """The largest differences that the tests above allow `TOLERANCE` for; benchmarks/parity_table.py shows them."""
    e, raw, c = experiment(architecture), architecture.build(), cases(architecture)

    def largest(pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
        return max((x - y).abs().max().item() for x, y in pairs)

    with torch.no_grad(), bf.untouched(architecture):
        unedited = raw(input_ids=e.ids[None], use_cache=False).logits
    with torch.no_grad():
        found = {"unedited": largest([(e.model(e.ids), unedited)])}
    found["oracle, unedited"] = largest([(e.unedited, unedited[0])])
    if c.single:
        single = {case.name: prefill(e, case, e.ids) for case in c.single}
        found["each edit, prefill"] = largest((ours, e.expected[name]) for name, ours in single.items())
        found["read next, cache slot"] = largest((single[name][:N_NEXT], x) for name, x in e.protocol.items())
    for name, mode in MODES.items():
        found[name] = largest((mode(e, case, e.sequences[case.name]), e.expected[case.name]) for case in c.combined)
    found["lengths"] = largest(
        (prefill(e, case, long_ids()[:n]), expected[:n])
        for case, expected in zip(c.any_length, of_any_length(architecture), strict=True)
        for n in LENGTHS
    )
    found["generate"] = largest((e.generated[x.name], e.expected[x.name][N_PROMPT - 1 : -1]) for x in c.combined)
    found["moved"] = min((e.expected[x.name] - e.plain[x.name]).abs().max().item() for x in c.single + c.combined)
    return found


# Broken twins --------------------------------------------------------------------------------------------------------

chunked, respond = response.chunked, response.respond
scan_result, step_result, scan1_result = ChunkScan.result, StepUpdate.result, mamba1.SelectiveScan.result
normalised = MLSTMCall._normalised


def without_erase(rec: Recurrence) -> Recurrence:
    return replace(rec, a=None, b=None)


def a_and_b_swapped(rec: Recurrence) -> Recurrence:
    return replace(rec, a=rec.b, b=rec.a)


def erase_undecayed(rec: Recurrence) -> Recurrence:
    """``-beta k (k^T S)`` for ``-beta k (k^T D S)``."""
    decay = rec.log_decay.exp()
    return replace(rec, b=rec.b / (decay if decay.ndim == 4 else decay[..., None]))


def decay_of_the_first_channel(rec: Recurrence) -> Recurrence:
    return replace(rec, log_decay=rec.log_decay[..., 0])


def written_along_the_erase_key(rec: Any, write: Write, *args: Any, **kwargs: Any) -> Any:
    key = rec.b if write.rank == 1 else rec.b[..., None, :].expand_as(write.key)
    return chunked(rec, replace(write, key=key * write.key.norm(dim=-1, keepdim=True)), *args, **kwargs)


def read_ignored(*args: Any, **kwargs: Any) -> Any:
    return chunked(*args, **(kwargs | {"read": "same"}))


def state_not_carried(recurrence: Any, native: Write, record: Any, o: Tensor, state: Tensor | None, _: Any) -> Any:
    return respond(recurrence, native, record, o, None)[0], state


positions = Pass.positions


def padding_counted(now: Pass) -> Tensor:
    shape, past = now.call["input_ids"].shape, now.past or 0
    counted = torch.arange(past, past + shape[1]).expand(shape)
    return counted.masked_fill(positions(now) == PAD, PAD)


def position_after(now: Pass) -> Tensor:
    """Off by one."""
    return (positions(now) - 1).clamp_min(PAD)


def write_without_strength(get: Callable[[str], Tensor]) -> Write:
    """``B x^T`` for ``B (dt x)^T``."""
    return Write(get("k"), get("v"))


def heads_tiled(
    x: Tensor, heads: Sequence[int] | None, n_heads: int, then: Callable[[Tensor], Tensor] = lambda x: x
) -> Tensor:
    """Key heads 0 1 0 1 for 0 0 1 1."""
    n_keys = x.shape[2]
    if n_keys == n_heads:
        return of_heads(x, heads, n_heads, then)
    return then(x.float())[:, :, [h % n_keys for h in (range(n_heads) if heads is None else heads)]]


def skip_of_the_edited(call: ChunkScan, o: Tensor, state: Tensor | None) -> Any:
    """``D`` times what hooks made of x."""
    D = call.arguments["D"]
    if "v" in call.changed:
        call.skip = (D[:, None] if D.ndim == 1 else D) * call.to_native(call.changed["v"])
    return scan_result(call, o, state)


def state_not_in_place(call: StepUpdate, o: Tensor, state: Tensor | None) -> Any:
    kept = call.arguments["state"].clone()
    result = step_result(call, o, state)
    call.arguments["state"].copy_(kept)
    return result


def skip1_of_the_edited(call: mamba1.SelectiveScan, o: Tensor, state: Tensor | None) -> Any:
    """``D`` times what hooks or edits made of x."""
    if "v" in call.changed:
        x = [call.to_native(piece) for piece in call._apart(call.changed["v"][..., 0], 2)]
        call.skips = [y * call.per_token(part["D"]) for y, part in zip(x, call.parts, strict=True)]
    return scan1_result(call, o, state)


def state1_not_in_place(call: mamba1.StateUpdate, outputs: list[Tensor], states: list[Tensor] | None) -> Any:
    return outputs


def nothing_counted(call: MLSTMCall, heads: Sequence[int] | None) -> tuple[Tensor, Tensor]:
    """Reads are divided by the least that they may be divided by."""
    read, n = normalised(call, heads)
    return 0 * read, n


def padding_let_in(_call: MLSTMCall, _padding: Tensor) -> None:
    pass


def forgotten(_here: Any) -> None:
    return None


@dataclass(frozen=True)
class Twin:
    """Something broken, in the place of ``owner.name``, and a case in a mode that must notice."""

    rule: bf.Rule
    owner: Any
    name: str
    broken: Callable[..., Any]
    mode: Callable[..., Tensor]
    case: str

    @property
    def a(self) -> Architecture:
        return next(a for a in ARCHITECTURES if a.rule is self.rule)

    def __str__(self) -> str:
        return f"{self.a.name}-{self.broken.__name__}-{self.mode.__name__}-{self.case}"


SLICE = "substitute deltas, same"  # a slice: nothing says that a position is missing
RULES = {a.rule for a in ARCHITECTURES}
TWINS = [
    *(
        Twin(rule, Rule, "recurrence", without_erase, prefill, case)
        for rule in (bf.GATED_DELTA, bf.KDA, bf.COMBA, bf.DELTA_PRODUCT, bf.GDN2, bf.DELTA_NET, bf.RWKV7)
        for case in ("interventions", "hooks", "substitutes")
    ),
    # Not for the rules whose `a b^T` is symmetric, since both lie along the key: swapping is right there.
    *(
        Twin(rule, Rule, "recurrence", a_and_b_swapped, prefill, "interventions")
        for rule in (bf.KDA, bf.GDN2, bf.RWKV7)
    ),
    *(Twin(rule, Rule, "recurrence", erase_undecayed, prefill, "interventions") for rule in (bf.GATED_DELTA, bf.KDA)),
    *(
        Twin(rule, Rule, "recurrence", decay_of_the_first_channel, prefill, "interventions")
        for rule in (bf.KDA, bf.MAMBA1, bf.GLA, bf.RWKV7)
    ),
    Twin(bf.GATED_DELTA, response, "chunked", written_along_the_erase_key, prefill, "interventions"),
    Twin(bf.GATED_DELTA, response, "chunked", read_ignored, prefill, "read next"),
    Twin(bf.GATED_DELTA, response, "chunked", read_ignored, decode, "read next"),
    *(
        Twin(rule, tap, "respond", state_not_carried, *how)
        for rule in (bf.GATED_DELTA, bf.MAMBA1, bf.MAMBA2, bf.MLSTM)
        for how in ((pieces, "interventions"), (decode, "read next"))
    ),
    *(
        Twin(rule, adapter, "of_heads", heads_tiled, *how)
        for rule, adapter in ((bf.GATED_DELTA, gdn), (bf.MAMBA2, mamba2))
        for how in ((prefill, "interventions"), (decode, "substitutes"), (prefill, "hook_k"))
    ),
    *(
        Twin(rule, Rule, "write", write_without_strength, *how)
        for rule in (bf.MAMBA1, bf.MAMBA2, bf.MLSTM)
        for how in ((prefill, "interventions"), (decode, "hooks"))
    ),
    Twin(bf.MAMBA1, mamba1.SelectiveScan, "result", skip1_of_the_edited, prefill, "hook_v"),
    Twin(bf.MAMBA1, mamba1.SelectiveScan, "result", skip1_of_the_edited, prefill, "interventions"),
    Twin(bf.MAMBA1, mamba1.StateUpdate, "with_states", state1_not_in_place, decode, "interventions"),
    Twin(bf.MAMBA1, tap.Running, "remembered", forgotten, pieces, "interventions"),
    Twin(bf.MAMBA2, ChunkScan, "result", skip_of_the_edited, prefill, "hook_v"),
    Twin(bf.MAMBA2, ChunkScan, "result", skip_of_the_edited, prefill, "interventions"),
    Twin(bf.MAMBA2, StepUpdate, "result", state_not_in_place, decode, "interventions"),
    Twin(bf.MLSTM, MLSTMCall, "_normalised", nothing_counted, prefill, "interventions"),
    Twin(bf.MLSTM, MLSTMCall, "_normalised", nothing_counted, decode, "hooks"),
    Twin(bf.MLSTM, MLSTMCall, "leave_out", padding_let_in, left_padded, "interventions"),
    Twin(bf.GATED_DELTA, Pass, "positions", padding_counted, left_padded, SLICE),
    Twin(bf.GATED_DELTA, Pass, "positions", padding_counted, left_padded_pieces, SLICE),
    Twin(bf.GATED_DELTA, Pass, "positions", position_after, prefill, "interventions"),
]


@pytest.mark.parametrize("twin", [twin for twin in TWINS if twin.rule in RULES], ids=str)
@annotations_unchecked()
def test_twins(twin: Twin, monkeypatch: pytest.MonkeyPatch) -> None:
    e, case = experiment(twin.a), cases(twin.a)[twin.case]
    ids, expected = e.sequences.get(case.name, e.ids), e.expected[case.name]
    assert_close(twin.mode(e, case, ids), expected)
    if twin.owner is Rule:  # frozen, and its functions are values of each adapter
        for one in e.model.taps:
            rule = one.family.rule
            broken = twin.broken if twin.name == "write" else lambda get, rule=rule: twin.broken(rule.recurrence(get))
            # A value that every tap is given, the adapter, with one function of its rule broken.
            monkeypatch.setattr(one, "family", replace(one.family, rule=replace(rule, **{twin.name: broken})))
    else:  # one step of the algebra or of an adapter: no input makes it drop a state, or count padding
        monkeypatch.setattr(twin.owner, twin.name, twin.broken)
    with pytest.raises(AssertionError, match="not close"):
        assert_close(twin.mode(e, case, ids), expected)
