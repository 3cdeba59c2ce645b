"""The oracles mean what their docstrings say. Everything else is tested against them, so they are tested first."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import brute_force as bf
import oracles
from architectures import N_VOCAB, Architecture, architecture_named, each_architecture
from oracles import dplr_recurrence
from writesae.hooks.families import FAMILIES, mamba1
from writesae.recurrence import Recurrence, Write, step_loop


def by_hand(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, log_decay: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Our equation in our letters for one head: q, k, a, b, log_decay [pos, d_key], v [pos, d_value]."""
    reads = []
    for t in range(len(q)):
        state = log_decay[t].exp().diag() @ state + torch.outer(a[t], b[t] @ state) + torch.outer(k[t], v[t])
        reads.append(q[t] @ state)
    return torch.stack(reads), state


@pytest.mark.parametrize("swapped", [False, True], ids=["as documented", "a and b swapped"])
def test_dplr_recurrence_is_our_equation_with_the_letters_swapped(swapped: bool) -> None:
    batch, head, pos, d_key, d_value = 2, 3, 7, 5, 4
    q, k, a, b = (torch.randn(batch, head, pos, d_key) / d_key**0.5 for _ in range(4))
    v = torch.randn(batch, head, pos, d_value)
    log_decay = -torch.rand(batch, head, pos, d_key)
    initial = torch.randn(batch, head, d_key, d_value)

    alpha, beta = (a, b) if swapped else (b, a)
    o, final = dplr_recurrence()(q * d_key**0.5, k, v, alpha, beta, log_decay, initial_state=initial)

    per_head = [
        by_hand(*(x[i, h] for x in (q, k, v, a, b, log_decay, initial))) for i in range(batch) for h in range(head)
    ]
    expected_o = torch.stack([o for o, _ in per_head]).reshape(batch, head, pos, d_value)
    expected_final = torch.stack([s for _, s in per_head]).reshape(batch, head, d_key, d_value)

    same = torch.allclose(o, expected_o, atol=1e-5) and torch.allclose(final, expected_final, atol=1e-5)
    assert same != swapped


# Every rule, in three tongues ----------------------------------------------------------------------------------------

BATCH, POS, HEAD, GROUP, D_KEY, D_VALUE = 2, 11, 4, 2, 8, 5
Break = Callable[[Recurrence, Write], tuple[Recurrence, Write]]


def quantities(rule: bf.Rule) -> dict[str, Tensor]:
    """Random ones of realistic size."""
    shape = (BATCH, POS, HEAD)
    x = {
        "q": torch.randn(*shape, D_KEY) / D_KEY**0.5,
        "k": F.normalize(torch.randn(*shape, D_KEY), dim=-1),
        "v": torch.randn(*shape, D_VALUE),
        "beta": torch.rand(*shape),
        "log_decay": -torch.rand(*shape, D_KEY) if rule.decay_per_key else -torch.rand(*shape),
        "kappa": F.normalize(torch.randn(*shape, D_KEY), dim=-1),
        "iclr": torch.rand(*shape, D_KEY),
        "erase_gate": torch.rand(*shape, D_KEY),
        "write_gate": torch.rand(*shape, D_VALUE),
    }
    if rule in (bf.DELTA_PRODUCT, bf.MAMBA3, bf.MAMBA3_MIMO):  # of three steps, each with a key of its own
        x |= {name: torch.stack([x[name] + y for y in 0.3 * torch.randn(3, *x[name].shape)], 3) for name in "kv"}
        x |= {"k": F.normalize(x["k"], dim=-1), "beta": torch.rand(*shape, 3)}
    if rule is bf.MAMBA3_MIMO:  # of two reads
        x |= {"q": torch.randn(*shape, 2, D_KEY) / D_KEY**0.5, "read_weights": torch.randn(*shape, 2, D_VALUE)}
    return {name: x[name] for name in rule.inputs}


def ours(rule: bf.Rule, x: dict[str, Tensor], state: Tensor, breaking: Break | None = None) -> oracles.Result:
    """By the adapter's letters and the loop that is writesae's specification."""
    adapted = next(family.rule for family in FAMILIES if family.rule.name == rule.name)
    assert adapted.inputs == rule.inputs
    rec, write = adapted.recurrence(x.__getitem__), adapted.write(x.__getitem__)
    return step_loop(*(breaking(rec, write) if breaking else (rec, write)), initial_state=state)


def by_rule(rule: bf.Rule, x: dict[str, Tensor], state: Tensor) -> oracles.Result:
    """By the rule that tests/helpers/brute_force.py replays."""
    outputs = []
    for t in range(x["q"].shape[1]):
        at = {name: y[:, t] for name, y in x.items()}
        key, value, _, kept = rule.step(at, state)
        before, state = state, kept + bf.outer(key, value)
        outputs.append(rule.read(at, before if rule.reads_before else state))
    return torch.stack(outputs, 1), state


def same(one: oracles.Result, other: oracles.Result) -> bool:
    return all(torch.allclose(x.float(), y.float(), atol=1e-5) for x, y in zip(one, other, strict=True))


def without_erase(rec: Recurrence, write: Write) -> tuple[Recurrence, Write]:
    return replace(rec, a=None, b=None), write


def swapped(rec: Recurrence, write: Write) -> tuple[Recurrence, Write]:
    return replace(rec, a=rec.b, b=rec.a), write


def erase_undecayed(rec: Recurrence, write: Write) -> tuple[Recurrence, Write]:
    assert rec.b is not None
    decay = rec.log_decay.exp()
    return replace(rec, b=rec.b / decay[(..., *(None,) * (rec.b.ndim - decay.ndim))]), write


def erase_decayed(rec: Recurrence, write: Write) -> tuple[Recurrence, Write]:
    assert rec.b is not None
    return replace(rec, b=rec.b * rec.log_decay.exp()[..., None]), write


def steps_at_once(rec: Recurrence, write: Write) -> tuple[Recurrence, Write]:
    """The second step reads what was there before the first."""
    assert rec.b is not None
    return replace(rec, b=rec.b.flip(3)), write


def of_one_step(rec: Recurrence, write: Write) -> tuple[Recurrence, Write]:
    return rec, Write(write.key[..., -1, :], write.value[..., -1, :])


def never_forgetting(rec: Recurrence, write: Write) -> tuple[Recurrence, Write]:
    return replace(rec, log_decay=torch.zeros_like(rec.log_decay)), write


def forgetting(rec: Recurrence, write: Write) -> tuple[Recurrence, Write]:
    return replace(rec, log_decay=rec.log_decay - 0.1), write


def weights_exchanged(rec: Recurrence, write: Write) -> tuple[Recurrence, Write]:
    assert rec.read_weights is not None
    return replace(rec, read_weights=rec.read_weights.flip(3)), write


def unweighted(rec: Recurrence, write: Write) -> tuple[Recurrence, Write]:
    return replace(rec, q=rec.q.sum(3), read_weights=None), write


def one_decay_a_head(rec: Recurrence, write: Write) -> tuple[Recurrence, Write]:
    return replace(rec, log_decay=rec.log_decay[..., 0]), write


def read_after(rec: Recurrence, write: Write) -> tuple[Recurrence, Write]:
    return replace(rec, reads_before=False), write


def read_decayed(rec: Recurrence, write: Write) -> tuple[Recurrence, Write]:
    return replace(rec, q=rec.q * rec.log_decay.exp()), write


RULES: list[tuple[bf.Rule, Callable[..., oracles.Result], list[Break]]] = [
    (bf.GATED_DELTA, oracles.gated_delta, [without_erase, erase_undecayed]),
    (bf.KDA, oracles.kimi_delta, [without_erase, erase_undecayed, swapped, one_decay_a_head]),
    (bf.COMBA, oracles.comba, [without_erase, erase_decayed, swapped]),
    (bf.DELTA_PRODUCT, oracles.delta_product, [without_erase, erase_undecayed, steps_at_once]),
    (bf.MAMBA3, oracles.mamba3, [never_forgetting, of_one_step]),
    (bf.GDN2, oracles.gdn2, [without_erase, erase_undecayed, swapped, one_decay_a_head]),
    (bf.MAMBA3_MIMO, oracles.mamba3_mimo, [never_forgetting, of_one_step, weights_exchanged, unweighted]),
    (bf.DELTA_NET, oracles.delta, [without_erase]),
    (bf.GLA, oracles.gla, [one_decay_a_head]),
    (bf.SIMPLE_GLA, oracles.simple_gla, [never_forgetting, forgetting]),
    (bf.LINEAR_ATTENTION, oracles.linear_attention, [forgetting]),
    (bf.RWKV6, oracles.rwkv6, [read_after, read_decayed, never_forgetting]),
    (bf.RWKV7, oracles.rwkv7, [without_erase, swapped, one_decay_a_head]),
]


@pytest.mark.parametrize(("rule", "oracle", "twins"), RULES, ids=[rule.name for rule, *_ in RULES])
def test_rules(rule: bf.Rule, oracle: Callable[..., oracles.Result], twins: list[Break]) -> None:
    """The adapter's letters, and the rule of brute force, are what other people compute. (Mamba-2: below.)"""
    x, state = quantities(rule), torch.randn(BATCH, HEAD, D_KEY, D_VALUE)
    expected = oracle(x, state)
    assert same(ours(rule, x, state), expected)
    assert same(by_rule(rule, x, state), expected)
    for twin in twins:
        assert not same(ours(rule, x, state, twin), expected), twin.__name__


OF_MAMBA1 = [
    oracles.mamba1_scan,
    oracles.mamba1_steps,
    pytest.param(
        oracles.mamba1_of_authors,
        marks=pytest.mark.skipif("MAMBA_SSM" not in os.environ, reason="the source of mamba-ssm: MAMBA_SSM=FOLDER"),
    ),
]


@pytest.mark.parametrize("n_pos", [1, 2, 63, 64, 65, 200])
@pytest.mark.parametrize("oracle", OF_MAMBA1)
def test_mamba1(oracle: Callable[[dict[str, Any]], oracles.Result], n_pos: int) -> None:
    """Adapter and brute force against others' functions, skip and gate included."""
    arguments = oracles.mamba1_arguments(BATCH, n_pos, HEAD, D_KEY)
    expected = oracle(arguments)
    call = bf.mamba_selective_scan(**arguments)
    assert same(call.answer(*by_rule(bf.MAMBA1, call.x, call.state())), expected)
    adapted = mamba1.SelectiveScan(mamba1.MAMBA1, arguments)

    def by_adapter(x: dict[str, Tensor]) -> oracles.Result:
        return adapted.result(*ours(bf.MAMBA1, x, torch.zeros(BATCH, HEAD, D_KEY, 1)))

    x = {name: adapted.get(name) for name in bf.MAMBA1.inputs}
    assert same(by_adapter(x), expected)
    assert same(adapted.result(*adapted.compute()), expected)
    for name in ("q", "k", "v", "beta"):
        assert not same(by_adapter(x | {name: x[name].roll(1, 0)}), expected), name
    if n_pos > 1:
        assert not same(by_adapter(x | {"log_decay": x["log_decay"].flip(-1)}), expected)


def groups_tiled(x: dict[str, Tensor]) -> dict[str, Tensor]:
    """Groups 0 1 0 1 for 0 0 1 1."""
    return x | {name: x[name][:, :, [0, 2, 1, 3]] for name in ("q", "k")}


@pytest.mark.parametrize("oracle", [oracles.mamba2_chunks, oracles.mamba2_steps], ids=["chunks", "steps"])
def test_mamba2(oracle: Callable[[dict[str, Any]], oracles.Result]) -> None:
    arguments = oracles.mamba2_arguments(BATCH, POS, HEAD, GROUP, D_KEY, D_VALUE)
    expected = oracle(arguments)
    limits = {} if oracle is oracles.mamba2_chunks else {"dt_limit": (0.0, float("inf"))}
    call = bf.mamba2_chunk_scan(**arguments | limits)
    x = {name: value.float() for name, value in call.x.items()}
    state = call.state().float()
    assert same(ours(bf.MAMBA2, x, state), expected)
    assert same(by_rule(bf.MAMBA2, x, state), expected)
    twins = {
        "no dt in the write": x | {"beta": torch.ones_like(x["beta"])},
        "dt in the decay only once more": x | {"log_decay": x["log_decay"] * x["beta"]},
        "groups tiled": groups_tiled(x),
    }
    for name, broken in twins.items():
        assert not same(ours(bf.MAMBA2, broken, state), expected), name
    with_skip = (expected[0] + arguments["D"][:, None] * arguments["hidden_states"], expected[1])
    assert not same(ours(bf.MAMBA2, x, state), with_skip)


# Models and brute force ----------------------------------------------------------------------------------------------

PIECES = [1, 2, 1, 62, 1, 20, 1]
PAD = 5


def random_ids(*shape: int) -> Tensor:
    return torch.randint(0, N_VOCAB, shape, generator=torch.Generator().manual_seed(7))


@torch.no_grad()
def in_pieces(a: Architecture, model: Any, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """The padding comes in the first piece with a token after it: transformers takes a single token for a real one."""
    cache, logits, start = a.new_cache(model), [], 0
    first = [] if mask is None else [PAD + 1]
    rest = ids.shape[1] - sum(first)
    # transformers' Mamba-1 gives several tokens an empty memory, and some of it wants the mask of the piece alone.
    pieces = [1] * rest if a.rule.forgets else [*PIECES, rest - sum(PIECES)]
    for n in [*first, *pieces]:
        begin = start if a.rule.forgets and a.cache_argument == "cache_params" else 0
        given = {} if mask is None else {"attention_mask": mask[:, begin : start + n]}
        piece = ids[:, start : start + n]
        logits.append(model(input_ids=piece, use_cache=True, **cache, **given, **a.place(start, n)).logits)
        start += n
    return torch.cat(logits, 1)


@each_architecture
@torch.no_grad()
def test_models_are_one_in_every_mode(architecture: Architecture) -> None:
    """Nobody wrapped them: prefill, pieces and decoding are the same, and padding on either side changes nothing."""
    a, model, ids = architecture, architecture.build(), random_ids(2, 100)
    with bf.untouched(a):
        expected = model(input_ids=ids, use_cache=False).logits
        assert (in_pieces(a, model, ids) - expected).abs().max() < 1e-4
        if a.ignores_padding:
            return
        other = ids.clone()
        other[0, :PAD] = 0
        other[0, PAD:] = ids[0, :-PAD]
        mask = torch.ones_like(ids)
        mask[0, :PAD] = 0
        for logits in (model(input_ids=other, attention_mask=mask).logits, in_pieces(a, model, other, mask)):
            assert (logits[0, PAD:] - expected[0, :-PAD]).abs().max() < 1e-4
            assert (logits[1] - expected[1]).abs().max() < 1e-4
        logits = model(input_ids=ids, attention_mask=mask.flip(-1)).logits
        assert (logits[0, :-PAD] - expected[0, :-PAD]).abs().max() < 1e-4


@each_architecture
@torch.no_grad()
def test_brute_force_without_edits_is_the_model(architecture: Architecture) -> None:
    a, model, ids = architecture, architecture.build(), random_ids(2, 100)
    with bf.untouched(a):
        expected = model(input_ids=ids, use_cache=False).logits
    assert (bf.brute_force(a, model, ids, [[], []]) - expected).abs().max() < 5e-5
    with bf.BruteForce(a, model, [[], []]):
        assert (in_pieces(a, model, ids) - expected).abs().max() < 5e-5


def changed(rule: bf.Rule, **inputs: Callable[[dict[str, Tensor]], Tensor]) -> bf.Rule:
    """The rule, with other quantities than its calls have."""

    def reading(read: Callable[..., bf.Call]) -> Callable[..., bf.Call]:
        def broken(*args: Any, **kwargs: Any) -> bf.Call:
            call = read(*args, **kwargs)
            call.x |= {name: fn(call.x) for name, fn in inputs.items()}
            return call

        return broken

    return replace(rule, kernels={name: reading(read) for name, read in rule.kernels.items()})


def not_in_place(state: Tensor, *args: Any, **kwargs: Any) -> bf.Call:
    return bf.mamba2_selective_state_update(state.clone(), *args, **kwargs)


def no_skip(*args: Any, D: Tensor | None = None, **kwargs: Any) -> bf.Call:
    return bf.mamba2_chunk_scan(*args, D=None, **kwargs)


def without(part: str) -> Any:
    """xLSTM's cell, each call of which begins without a part of its memory."""
    return lambda *args, **kwargs: bf.mlstm(*args, **kwargs | {part: None})


BROKEN = {
    "qwen3_5": {"without erase": replace(bf.GATED_DELTA, erase=None)},
    "kimi_linear": {
        "without erase": replace(bf.KDA, erase=None),
        "erase undecayed": replace(bf.KDA, erase=lambda x, S, decayed: bf.delta_erase(x, S, S)),
    },
    "mamba2": {
        "no dt in the write": changed(bf.MAMBA2, beta=lambda x: torch.ones_like(x["beta"])),
        "groups tiled": changed(bf.MAMBA2, **{name: lambda x, name=name: groups_tiled(x)[name] for name in ("q", "k")}),
        "state not in place": replace(
            bf.MAMBA2, kernels=dict(bf.MAMBA2.kernels) | {"mamba2_selective_state_update": not_in_place}
        ),
        "no skip": replace(bf.MAMBA2, kernels=dict(bf.MAMBA2.kernels) | {"mamba2_chunk_scan": no_skip}),
    },
    "xlstm": {
        f"forgets {part}": replace(bf.MLSTM, kernels={"xLSTMBackend.forward": without(part)})
        for part in ("c_initial", "n_initial", "m_initial")
    },
    "rwkv6": {"reads after": replace(bf.RWKV6, reads_before=False)},
    "rwkv7": {
        "without erase": replace(bf.RWKV7, erase=None),
        "a and b swapped": replace(
            bf.RWKV7, erase=lambda x, S, _: -bf.outer(x["kappa"], bf.read_along(x["kappa"] * x["iclr"], S))
        ),
        "erase reads the decayed state": replace(
            bf.RWKV7, erase=lambda x, S, decayed: bf.rwkv7_erase(x, decayed, decayed)
        ),
    },
}  # fmt: skip


@pytest.mark.parametrize(("name", "broken"), [(name, twin) for name, twins in BROKEN.items() for twin in twins])
@torch.no_grad()
def test_broken_brute_force_is_not_the_model(name: str, broken: str) -> None:
    a, ids = architecture_named(name), random_ids(2, 100)
    model = a.build()
    expected = model(input_ids=ids, use_cache=False).logits
    with bf.BruteForce(replace(a, rule=BROKEN[name][broken]), model, [[], []]):
        assert (in_pieces(a, model, ids) - expected).abs().max() > 1e-3
