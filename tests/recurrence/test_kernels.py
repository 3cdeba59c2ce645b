"""The chunked forms against the loop that is their specification, in every shape a chunk border can cut.

`test_recurrence.py` compares the loop, and the chunked form too, with other people's code. As there, every comparison
has **broken twins**: the same comparison, of something with one thing wrong, has to fail.
"""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise, product

import pytest
import torch
from test_recurrence import (
    BREAKAGES,
    ERASE_BREAKAGES,
    READ_BREAKAGES,
    Breakage,
    Inputs,
    Run,
    assert_same,
    broken,
    must_differ,
    one_thread,  # noqa: F401  a fixture, and in use here by being imported
    random_inputs,
    unchecked,  # noqa: F401  a fixture too
    without_erase,
)
from torch import Tensor
from torch.autograd.gradcheck import GradcheckError, gradcheck
from torch.utils._python_dispatch import TorchDispatchMode

from writesae.recurrence import Recurrence, Write, decay, kernels, states, step_loop
from writesae.recurrence.decay import CHUNK, CHUNK_PER_KEY
from writesae.recurrence.kernels import chunked, decayed_sum, erase_reads, states_at, value_reads

PER_KEY = pytest.mark.parametrize("per_key", [False, True], ids=["scalar decay", "per-key decay"])
ERASE = pytest.mark.parametrize("erase", [True, False], ids=["erase", "no erase"])
RANK = pytest.mark.parametrize("rank", [1, 3], ids=["rank 1", "rank 3"])
READ = pytest.mark.parametrize("read", ["same", "next"])
INITIAL = pytest.mark.parametrize("initial", [False, True], ids=["from zero", "from a state"])

# For tests of thousands of calls; the annotations are checked in the others.
UNCHECKED = pytest.mark.usefixtures("unchecked")

BORDERS = [1, CHUNK_PER_KEY, CHUNK_PER_KEY + 1, CHUNK, CHUNK + 1, 2 * CHUNK + 1]
EDITED = [0, CHUNK_PER_KEY, CHUNK - 1, CHUNK, 2 * CHUNK]


# The loop ------------------------------------------------------------------------------------------------------------


def loop_at_every_length(inputs: Inputs, dense: dict[int, Tensor], read: str) -> tuple[Tensor, Tensor]:
    """The loop, one token at a time: outputs and the state after every token, so the result at every length at once.

    A prefix of the outputs and its last state are what the loop says of that prefix, as nothing looks ahead.
    """
    rec, write, state = inputs
    outputs, after = [], []
    for t in range(rec.n_pos):
        now = (slice(None), slice(t, t + 1))
        o, state = step_loop(rec[now], write[now], state, dense={0: dense[t]} if t in dense else None, read=read)
        outputs.append(o)
        after.append(state)
    return torch.cat(outputs, 1), torch.stack(after, 1)


def check_lengths(
    run: Run,
    inputs: Inputs,
    lengths: list[int] | range,
    *,
    dense: dict[int, Tensor] | None = None,
    read: str = "same",
    **options: int,
) -> None:
    rec, write, state = inputs
    dense = dense or {}
    o, after = loop_at_every_length(inputs, dense, read)
    for n in lengths:
        edits = {t: E for t, E in dense.items() if t < n}
        ours = run(rec[:, :n], write[:, :n], state, dense=edits, read=read, **options)
        assert_same(ours, (o[:, :n], after[:, n - 1]), 1e-11)


@UNCHECKED
@pytest.mark.parametrize(
    ("per_key", "erase", "rank", "read", "initial"),
    [
        (False, True, 1, "same", False),  # Gated DeltaNet
        (False, True, 3, "next", True),  # ... edited
        (True, True, 3, "same", True),  # RWKV-7, edited
        (False, False, 1, "same", True),  # Mamba-2
        (True, False, 3, "next", False),
    ],
)
def test_every_length(per_key: bool, erase: bool, rank: int, read: str, initial: bool) -> None:
    rec, write, state = random_inputs(300, per_key=per_key, erase=erase, rank=rank)
    check_lengths(chunked, (rec, write, state if initial else None), range(1, 301), read=read)


@UNCHECKED
@PER_KEY
@ERASE
@RANK
@READ
@INITIAL
@pytest.mark.parametrize("edited", [False, True], ids=["not edited", "edited"])
def test_every_option(per_key: bool, erase: bool, rank: int, read: str, initial: bool, edited: bool) -> None:
    rec, write, state = random_inputs(BORDERS[-1], per_key=per_key, erase=erase, rank=rank)
    dense = {t: torch.randn_like(state) for t in EDITED} if edited else None
    lengths = [t + 1 for t in EDITED] if edited else BORDERS  # so that an edit is at the first or the last token too
    check_lengths(chunked, (rec, write, state if initial else None), lengths, dense=dense, read=read)


@UNCHECKED
@PER_KEY
@ERASE
@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 7, 33, 70, 1000])
def test_every_chunk_size(per_key: bool, erase: bool, chunk: int) -> None:
    inputs = random_inputs(71, per_key=per_key, erase=erase, rank=2, batch=2)
    dense = {t: torch.randn_like(inputs[2]) for t in (0, 4, 5, 70)}
    check_lengths(chunked, inputs, [1, 6, 35, 70, 71], dense=dense, chunk=chunk)


def chunks_not_carried(rec: Recurrence, write: Write, initial_state: Tensor | None = None, **options):
    """Every chunk but the first starts from zero."""
    pieces = [slice(start, start + CHUNK) for start in range(0, rec.n_pos, CHUNK)]
    results = [
        chunked(rec[:, piece], write[:, piece], initial_state if piece.start == 0 else None, read=options["read"])
        for piece in pieces
    ]
    return torch.cat([o for o, _ in results], 1), results[-1][1]


def other_read(rec: Recurrence, write: Write, initial_state: Tensor | None = None, **options):
    options["read"] = {"same": "next", "next": "same"}[options["read"]]
    return chunked(rec, write, initial_state, **options)


def rank_cut(rec: Recurrence, write: Write, initial_state: Tensor | None = None, **options):
    """Only the first two terms of each write."""
    two = Write(write.key[..., :2, :], write.value[..., :2, :], rank=2)
    return chunked(rec, two, initial_state, **options)


def edits_dropped(rec: Recurrence, write: Write, initial_state: Tensor | None = None, **options):
    options["dense"] = {}
    return chunked(rec, write, initial_state, **options)


def edits_one_token_late(rec: Recurrence, write: Write, initial_state: Tensor | None = None, **options):
    options["dense"] = {t + 1: E for t, E in options["dense"].items() if t + 1 < rec.n_pos}
    return chunked(rec, write, initial_state, **options)


def along_the_key(inputs: Inputs) -> tuple[Inputs, Tensor]:
    """The same, with an erase that writes along the key of the write's first term, and how strongly it does."""
    rec, write, state = inputs
    assert rec.a is not None
    strength = -torch.rand_like(rec.a[..., 0]) / 8  # or the state grows without bound
    keys = write.factors()[0]
    keys = keys[..., 0, :] if rec.a.ndim == 4 else keys[..., : rec.a.shape[3], :]
    return (replace(rec, a=strength[..., None] * keys), write, state), strength


@UNCHECKED
@PER_KEY
@pytest.mark.parametrize(("rank", "erases"), [(1, 1), (3, 1), (2, 2), (3, 2)])
@READ
def test_erase_along_the_key(per_key: bool, rank: int, erases: int, read: str) -> None:
    inputs, strength = along_the_key(random_inputs(BORDERS[-1], per_key=per_key, rank=rank, erases=erases))
    dense = {t: torch.randn_like(inputs[2]) for t in EDITED}

    def run(rec: Recurrence, *args, strength: Tensor = strength, **options):
        return chunked(rec, *args, strength=strength[:, : rec.n_pos], **options)

    check_lengths(run, inputs, BORDERS, read=read)
    check_lengths(run, inputs, [t + 1 for t in EDITED], dense=dense, read=read)
    if read == "same":  # otherwise it is of no use, and is not used
        with must_differ():
            check_lengths(run, inputs, [2], read=read, strength=-strength)
        with must_differ():  # the erase writes elsewhere
            check_lengths(run, random_inputs(2, per_key=per_key, rank=rank, erases=erases), [2], read=read)


@UNCHECKED
@PER_KEY
@READ
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_several_erases(per_key: bool, rank: int, read: str) -> None:
    """Tokens that erase two terms, whatever they write; their loop is the sum of the terms."""
    inputs = random_inputs(BORDERS[-1], per_key=per_key, rank=rank, erases=2)
    rec, write, state = inputs
    dense = {t: torch.randn_like(state) for t in EDITED}
    check_lengths(chunked, inputs, BORDERS, read=read)
    check_lengths(chunked, inputs, [t + 1 for t in EDITED], dense=dense, read=read)
    first, a, b = (slice(None), 0), *(x[:, 0].mT for x in rec.erase())
    decay = rec.log_decay[first].exp().view(*state.shape[:2], -1, 1)
    after = next(states(rec, write, state))
    torch.testing.assert_close(after, decay * state + a @ b.mT @ state + write[:, 0].dense())
    assert erase_reads(rec, write, state)[:, 0].allclose(b.mT @ state)
    one = replace(rec, a=rec.a[:, :, :, 0], b=rec.b[:, :, :, 0])
    with must_differ():
        check_lengths(lambda _, *rest, **options: chunked(one, *rest, **options), inputs, [BORDERS[-1]], read=read)


@UNCHECKED
def test_erase_terms_come_in_pairs() -> None:
    rec = random_inputs(3, erases=2)[0]
    with pytest.raises(ValueError, match=r"a \[1, 3, 2, 2, 5\] and erase read b \[1, 3, 2, 1, 5\] differ in rank"):
        replace(rec, b=rec.b[:, :, :, :1])
    with pytest.raises(ValueError, match=r"b \[1, 3, 2, 2, 4\] does not fit q \[1, 3, 2, 5\]"):
        replace(rec, b=rec.b[..., :4])


def reading_before(inputs: Inputs) -> Inputs:
    return replace(inputs[0], reads_before=True), *inputs[1:]


@UNCHECKED
@PER_KEY
@ERASE
@RANK
@INITIAL
def test_reads_before(per_key: bool, erase: bool, rank: int, initial: bool) -> None:
    """A read of the state before the token, as in RWKV-6; which read sees an edit first is then no question."""
    rec, write, state = reading_before(random_inputs(BORDERS[-1], per_key=per_key, erase=erase, rank=rank))
    inputs = rec, write, state if initial else None
    dense = {t: torch.randn_like(state) for t in EDITED}
    for read in ("same", "next"):
        check_lengths(chunked, inputs, BORDERS, read=read)
        check_lengths(chunked, inputs, [t + 1 for t in EDITED], dense=dense, read=read)
    assert_same(step_loop(*inputs, dense=dense), step_loop(*inputs, dense=dense, read="next"), 0.0)
    o, _ = step_loop(replace(rec, q=rec.q.roll(-1, 1), reads_before=False), write, state, dense=dense)
    assert_same((step_loop(rec, write, state, dense=dense)[0][:, 1:],), (o[:, :-1],), 1e-13)
    for twin in (lambda rec, *rest: (replace(rec, reads_before=False), *rest), *BREAKAGES[:-1]):
        with must_differ():
            check_lengths(broken(chunked, twin), (rec, write, state), BORDERS)


@UNCHECKED
@PER_KEY
@RANK
def test_reads_before_an_erase_along_the_key(per_key: bool, rank: int) -> None:
    inputs, strength = along_the_key(reading_before(random_inputs(BORDERS[-1], per_key=per_key, rank=rank)))

    def run(rec: Recurrence, *args, **options):
        return chunked(rec, *args, strength=strength[:, : rec.n_pos], **options)

    check_lengths(run, inputs, BORDERS)


@PER_KEY
@ERASE
def test_reads_before_have_the_gradients_of_the_loop(per_key: bool, erase: bool) -> None:
    check_gradients(chunked, reading_before(random_inputs(70, per_key=per_key, erase=erase)))


@UNCHECKED
@PER_KEY
@ERASE
def test_in_stretches(per_key: bool, erase: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU the tokens at once are as many chunks as fit its cache: here one, two or all of them."""
    inputs = random_inputs(3 * CHUNK + 5, per_key=per_key, erase=erase, rank=2, batch=2)
    for cached in (1, 2 * CHUNK * 2 * 2 * (5 + 2 * 5 + 2 * 4), 10**9):
        monkeypatch.setattr(kernels, "CACHED", cached)
        n_chunks = kernels.stretches(inputs[0].q, inputs[1].key, inputs[1].value)[0][1].stop / CHUNK
        assert n_chunks == {1: 1, 10**9: 3 + 5 / CHUNK}.get(cached, 2)
        check_lengths(chunked, inputs, [1, CHUNK + 1, 3 * CHUNK + 5])


@UNCHECKED
@PER_KEY
@ERASE
@READ
@INITIAL
@pytest.mark.parametrize("reads", [1, 2, 3])
def test_several_reads(per_key: bool, erase: bool, read: str, initial: bool, reads: int) -> None:
    rec, write, state = random_inputs(BORDERS[-1], per_key=per_key, erase=erase, rank=2, reads=reads, batch=2)
    dense = {t: torch.randn_like(state) for t in EDITED}
    inputs = rec, write, state if initial else None
    check_lengths(chunked, inputs, BORDERS, read=read)
    check_lengths(chunked, inputs, [t + 1 for t in EDITED], dense=dense, read=read)
    check_lengths(chunked, reading_before(inputs), BORDERS, read=read)
    for chunk in (1, 5, 70):
        check_lengths(chunked, inputs, [6, 35], dense={5: dense[0]}, read=read, chunk=chunk)


@UNCHECKED
@PER_KEY
@pytest.mark.parametrize("rank", [1, 2])
def test_several_reads_and_an_erase_along_the_key(per_key: bool, rank: int) -> None:
    inputs, strength = along_the_key(random_inputs(BORDERS[-1], per_key=per_key, rank=rank, erases=rank, reads=2))

    def run(rec: Recurrence, *args, **options):
        return chunked(rec, *args, strength=strength[:, : rec.n_pos], **options)

    check_lengths(run, inputs, BORDERS)


@UNCHECKED
@PER_KEY
@pytest.mark.parametrize("twin", [broken(chunked, breakage) for breakage in READ_BREAKAGES])
def test_several_reads_twin(twin: Run, per_key: bool) -> None:
    inputs = random_inputs(CHUNK + 2, per_key=per_key, reads=3)
    dense = {t: torch.randn_like(inputs[2]) for t in (3, CHUNK)}
    with must_differ():
        check_lengths(twin, inputs, [CHUNK + 2], dense=dense)


@UNCHECKED
def test_several_reads_of_states_of_few_columns() -> None:
    inputs = random_inputs(BORDERS[-1], per_key=True, erase=False, reads=2, d_value=1)
    check_lengths(chunked, inputs, BORDERS)


@PER_KEY
@ERASE
def test_several_reads_have_the_gradients_of_the_loop(per_key: bool, erase: bool) -> None:
    check_gradients(chunked, random_inputs(70, per_key=per_key, erase=erase, reads=2))


@PER_KEY
@pytest.mark.parametrize("field", ["q", "read_weights"])
def test_several_reads_have_the_gradients_of_the_loop_twin(field: str, per_key: bool) -> None:
    with must_differ():
        check_gradients(broken(chunked, detached(field)), random_inputs(70, per_key=per_key, reads=2))


TWINS = [broken(chunked, breakage) for breakage in BREAKAGES + ERASE_BREAKAGES]
TWINS += [chunks_not_carried, other_read, rank_cut, edits_dropped, edits_one_token_late]


@UNCHECKED
@PER_KEY
@pytest.mark.parametrize("twin", TWINS)
def test_every_option_twin(twin: Run, per_key: bool) -> None:
    inputs = random_inputs(CHUNK + 2, per_key=per_key, rank=3)
    dense = {t: torch.randn_like(inputs[2]) for t in (3, CHUNK)}
    with must_differ():
        check_lengths(twin, inputs, [CHUNK + 2], dense=dense)


def test_batch_and_heads_stay_apart() -> None:
    rec, write, state = random_inputs(70, batch=3, head=4)
    whole = chunked(rec, write, state)
    for i, h in product(range(3), range(4)):
        i, h = slice(i, i + 1), slice(h, h + 1)
        o, S = chunked(rec[i, :, h], write[i, :, h], state[i, h])
        assert_same((o, S), (whole[0][i, :, h], whole[1][i, h]), 1e-12)


# Strong decay --------------------------------------------------------------------------------------------------------


def strongly_decayed(pattern: str, per_key: bool, dtype: torch.dtype) -> Inputs:
    rec, write, state = random_inputs(70, per_key=per_key, dtype=dtype)
    log_decay = rec.log_decay.clone()
    if pattern.startswith("every token"):
        log_decay[:] = float(pattern.split()[-1])
    elif pattern == "some tokens -1000":
        log_decay[:, ::7] = -1000
    elif pattern == "one head -1000":
        log_decay[:, :, 1] = -1000
    elif pattern == "no decay":
        log_decay[:] = 0
        rec = replace(rec, a=rec.a / 8)  # or the state grows without bound
    return replace(rec, log_decay=log_decay), write, state


def results_and_gradients(run: Run, inputs: Inputs, dense: dict[int, Tensor] | None = None, **options) -> list[Tensor]:
    """Outputs, final state, and the gradients of a random sum of both for every input."""
    rec, write, state = inputs
    dense = dense or {}
    leaves = [rec.q, rec.log_decay, rec.a, rec.b, rec.read_weights, write.key, write.value, state, *dense.values()]
    leaves = [x.detach().clone().requires_grad_() for x in leaves if x is not None]
    rest = iter(leaves)
    fields = {name: getattr(rec, name) for name in ("q", "log_decay", "a", "b", "read_weights")}
    rec = replace(rec, **{name: None if x is None else next(rest) for name, x in fields.items()})
    write = Write(next(rest), next(rest), write.rank)
    state = None if state is None else next(rest)
    o, S = run(rec, write, state, dense={t: next(rest) for t in dense}, **options)
    weights = torch.Generator().manual_seed(1)
    total = sum((x * torch.randn(x.shape, generator=weights)).sum() for x in (o, S))  # the same in every dtype
    gradients = torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)
    return [o.detach(), S.detach(), *gradients]


def check_strong_decay(pattern: str, per_key: bool) -> None:
    """Results and gradients, the loop's to rounding; in float32 that is the loop in float64 on the same numbers."""
    for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 1e-4)):
        rec, write, state = strongly_decayed(pattern, per_key, dtype)
        ours = results_and_gradients(chunked, (rec, write, state))
        exact = Recurrence(*(x.double() for x in (rec.q, rec.log_decay, rec.a, rec.b) if x is not None))
        expected = results_and_gradients(step_loop, (exact, write.to(torch.float64), state.double()))
        assert_same(tuple(x.double() for x in ours), tuple(expected), tolerance)


STRONG = ["every token -50", "every token -1000", "some tokens -1000", "one head -1000"]


@UNCHECKED
@PER_KEY
@pytest.mark.parametrize("pattern", [*STRONG, "every token -0.6", "every token -1.3", "every token -2.4", "no decay"])
def test_strong_decay(pattern: str, per_key: bool) -> None:
    check_strong_decay(pattern, per_key)


def mask_after_exp(g: Tensor) -> Tensor:
    """Right as long as nothing overflows; then the results are still right, and the gradient is 0 * inf."""
    G = g.cumsum(-1)
    return (G[..., :, None] - G[..., None, :]).exp().tril()


def exp_of_each_sum(g: Tensor) -> Tensor:
    """One exponential per token and not one per pair of them: 0 / 0."""
    G = g.cumsum(-1)
    return (G.exp()[..., :, None] / G.exp()[..., None, :]).tril()


def difference_of_sums(g: Tensor) -> Tensor:
    """No overflow, but after one strong decay in a chunk the last digits of all others are gone."""
    G = g.cumsum(-1)
    later = torch.ones(G.shape[-1], G.shape[-1], dtype=torch.bool).triu(1)
    return (G[..., :, None] - G[..., None, :]).masked_fill(later, -torch.inf).exp()


@UNCHECKED
@PER_KEY
@pytest.mark.parametrize(
    ("unstable", "patterns"),
    [(mask_after_exp, STRONG), (exp_of_each_sum, STRONG), (difference_of_sums, ["some tokens -1000"])],
)
def test_strong_decay_twin(
    unstable: Callable[..., Tensor], patterns: list[str], per_key: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decay, "between", unstable)  # right for every value but for rounding: no input breaks it
    check_strong_decay("no decay", per_key)  # the twin is right where decays are mild
    for pattern in patterns:
        with must_differ():
            check_strong_decay(pattern, per_key)


@UNCHECKED
def test_factored_decay_twin(monkeypatch: pytest.MonkeyPatch) -> None:
    """A factor per token is for mild decays: taken for any, it overflows."""
    monkeypatch.setattr(decay, "MILD", float("inf"))  # a bound on rounding, which nobody should be able to set
    check_strong_decay("no decay", per_key=True)
    with must_differ():
        check_strong_decay("every token -50", per_key=True)


# Gradients -----------------------------------------------------------------------------------------------------------


def check_gradients(run: Run, inputs: Inputs, **options) -> None:
    dense = {t: torch.randn_like(inputs[2]) for t in (5, 69)}
    ours, theirs = (results_and_gradients(f, inputs, dense, **options) for f in (run, step_loop))
    assert_same(ours, theirs, 1e-10)


@PER_KEY
@ERASE
@RANK
@READ
def test_gradients_are_the_loops(per_key: bool, erase: bool, rank: int, read: str) -> None:
    check_gradients(chunked, random_inputs(70, per_key=per_key, erase=erase, rank=rank), read=read)


def detached(*fields: str) -> Breakage:
    """Results stay right, but nothing is learned through ``fields``."""

    def breakage(rec: Recurrence, write: Write, state: Tensor | None) -> Inputs:
        rec = replace(rec, **{name: getattr(rec, name).detach() for name in fields if hasattr(rec, name)})
        write = replace(write, **{name: getattr(write, name).detach() for name in fields if hasattr(write, name)})
        return rec, write, state.detach() if state is not None and "state" in fields else state

    return breakage


FIELDS = ["q", "log_decay", "a", "b", "key", "value", "state"]


@PER_KEY
@pytest.mark.parametrize("field", FIELDS)
def test_gradients_twin(field: str, per_key: bool) -> None:
    with must_differ():
        check_gradients(broken(chunked, detached(field)), random_inputs(70, per_key=per_key))


def check_by_differences(run: Run, *, per_key: bool, read: str) -> None:
    """Gradients against finite differences, over chunk borders and an edit."""
    rec, write, state = random_inputs(5, per_key=per_key, rank=2, d_key=2, d_value=2, head=1)

    def results(q, log_decay, a, b, key, value, S, E):
        return run(Recurrence(q, log_decay, a, b), Write(key, value, rank=2), S, dense={2: E}, read=read, chunk=2)

    inputs = (rec.q, rec.log_decay, rec.a, rec.b, write.key, write.value, state, torch.randn_like(state))
    gradcheck(results, [x.detach().requires_grad_() for x in inputs])


@UNCHECKED
@PER_KEY
@READ
def test_gradients_by_differences(per_key: bool, read: str) -> None:
    check_by_differences(chunked, per_key=per_key, read=read)


@UNCHECKED
@pytest.mark.parametrize("field", FIELDS)
def test_gradients_by_differences_twin(field: str) -> None:
    with pytest.raises(GradcheckError, match="Jacobian mismatch"):
        check_by_differences(broken(chunked, detached(field)), per_key=False, read="same")


# Carrying the state, and looking at it -------------------------------------------------------------------------------


def check_split(
    inputs: Inputs, splits: list[list[int]], carry: Callable[[Tensor], Tensor | None] = lambda S: S
) -> None:
    """The whole against its pieces, each from the state its predecessor left."""
    rec, write, state = inputs
    whole = chunked(*inputs)
    for at in splits:
        outputs, S = [], state
        for start, stop in pairwise([0, *at, rec.n_pos]):
            o, S = chunked(rec[:, start:stop], write[:, start:stop], S if start == 0 else carry(S))
            outputs.append(o)
        assert_same((torch.cat(outputs, 1), S), whole, 1e-11)


@UNCHECKED
@PER_KEY
def test_split_anywhere(per_key: bool) -> None:
    check_split(random_inputs(135, per_key=per_key, rank=2), [*([at] for at in range(1, 135)), [3, 4, 67, 131]])


@PER_KEY
@ERASE
@pytest.mark.parametrize("carry", [lambda S: None, lambda S: S.mT.reshape(S.shape)], ids=["forgotten", "transposed"])
def test_split_twin(carry: Callable[[Tensor], Tensor | None], per_key: bool, erase: bool) -> None:
    inputs = random_inputs(70, per_key=per_key, erase=erase)
    for at in (1, CHUNK, 69):
        with must_differ():
            check_split(inputs, [[at]], carry)


def check_states_at(run: Callable[..., Tensor], inputs: Inputs, dense: dict[int, Tensor]) -> None:
    rec, write, state = inputs
    _, after = loop_at_every_length(inputs, dense, "same")
    for positions in ([0], [69], [63, 64], [40, 3, 68, 3], list(range(0, 70, 9))):
        assert_same((run(rec, write, positions, state, dense=dense),), (after[:, positions],), 1e-11)


@UNCHECKED
@PER_KEY
@ERASE
@INITIAL
@pytest.mark.parametrize("edits", [[], [0, 63, 69]], ids=["not edited", "edited"])
def test_states_at(per_key: bool, erase: bool, initial: bool, edits: list[int]) -> None:
    rec, write, state = random_inputs(70, per_key=per_key, erase=erase, rank=2)
    inputs = rec, write, state if initial else None
    check_states_at(states_at, inputs, {t: torch.randn_like(state) for t in edits})
    assert states_at(rec, write, [], inputs[2]).shape == (1, 0, 2, 5, 4)


@pytest.mark.parametrize(
    "twin",
    [
        lambda rec, write, at, state, dense: states_at(rec, write, [max(t - 1, 0) for t in at], state, dense=dense),
        lambda rec, write, at, state, dense: states_at(rec, write, sorted(at), state, dense=dense),
        lambda rec, write, at, state, dense: states_at(rec, write, at, None, dense=dense),
        lambda rec, write, at, state, dense: states_at(rec, write, at, state),
        lambda rec, write, at, state, dense: states_at(*without_erase(rec, write, None)[:2], at, state, dense=dense),
    ],
    ids=["one token early", "in order of time", "initial forgotten", "edits dropped", "no erase"],
)
def test_states_at_twin(twin: Callable[..., Tensor]) -> None:
    inputs = random_inputs(70)
    with must_differ():
        check_states_at(twin, inputs, {t: torch.randn_like(inputs[2]) for t in (0, 63)})


@pytest.mark.parametrize("position", [-1, 70])
def test_states_outside_the_sequence(position: int) -> None:
    rec, write, state = random_inputs(70)
    with pytest.raises(IndexError, match=f"state at position {position}: allowed are 0 to 69"):
        states_at(rec, write, [0, position], state)
    with pytest.raises(IndexError, match=f"dense edit at position {position}: allowed are 0 to 69"):
        states_at(rec, write, [0], state, dense={position: state})


def check_erase_reads(run: Callable[..., Tensor], inputs: Inputs) -> None:
    """``b_t^T S_{t-1}``, with the state before the token, and before its decay."""
    rec, write, state = inputs
    before = [torch.zeros(1, 2, 5, 4, dtype=torch.float64) if state is None else state, *states(rec, write, state)]
    assert rec.b is not None
    assert_same((run(*inputs),), (torch.einsum("bphk,bphkv->bphv", rec.b, torch.stack(before[:-1], 1)),), 1e-11)


@PER_KEY
@RANK
@INITIAL
@pytest.mark.parametrize("n_pos", BORDERS)
def test_erase_reads(n_pos: int, per_key: bool, rank: int, initial: bool) -> None:
    rec, write, state = random_inputs(n_pos, per_key=per_key, rank=rank)
    check_erase_reads(erase_reads, (rec, write, state if initial else None))


@PER_KEY
@pytest.mark.parametrize(
    "breakage", [x for x in BREAKAGES + ERASE_BREAKAGES if x.__name__ not in ("read_shifted", "without_erase")]
)
def test_erase_reads_twin(breakage: Breakage, per_key: bool) -> None:
    with must_differ():
        check_erase_reads(broken(erase_reads, breakage), random_inputs(70, per_key=per_key))
    with must_differ():  # of the state after the token
        check_erase_reads(lambda *inputs: erase_reads(*inputs).roll(-1, dims=1), random_inputs(70, per_key=per_key))


def test_erase_reads_of_a_recurrence_that_erases_nothing() -> None:
    with pytest.raises(ValueError, match="erases nothing"):
        erase_reads(*random_inputs(3, erase=False))


def check_decayed_sum(run: Callable[..., Tensor], n_pos: int, initial: bool = True) -> None:
    """``v_i^T S_t w_i`` of real states, from the codes of the writes alone."""
    rec, write, state = random_inputs(n_pos, head=1)
    # The delta rule, which erases along the write key: what is written and erased is then one write, k delta^T.
    rate = -0.9 * rec.log_decay.exp()[..., None] / write.key.square().sum(-1, keepdim=True)
    rec = replace(rec, a=rate * write.key, b=write.key)
    delta = write.value + rate * erase_reads(rec, write, state if initial else None)

    V, W = torch.randn(6, 5, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
    codes = ((write.key @ V.T) * (delta @ W.T))[:, :, 0]
    first = torch.einsum("ik,bhkv,iv->bi", V, state, W)
    ours = run(codes, rec.log_decay[:, :, 0], first if initial else None)
    S = torch.stack(list(states(rec, write, state if initial else None)), 1)[:, :, 0]
    assert_same((ours,), (torch.einsum("ik,bpkv,iv->bpi", V, S, W),), 1e-11)


@INITIAL
@pytest.mark.parametrize("n_pos", BORDERS)
def test_decayed_sum(n_pos: int, initial: bool) -> None:
    check_decayed_sum(decayed_sum, n_pos, initial)


@pytest.mark.parametrize(
    "twin",
    [
        lambda x, g, first: decayed_sum(x, g * 0, first),
        lambda x, g, first: decayed_sum(x, g),
        lambda x, g, first: decayed_sum(x * g.exp()[..., None], g, first),  # decay after the write
        lambda x, g, first: decayed_sum(x, g.roll(1, dims=1), first),
        lambda x, g, first: torch.cat([decayed_sum(x[:, :64], g[:, :64], first), decayed_sum(x[:, 64:], g[:, 64:])], 1),
        lambda x, g, first: decayed_sum(x, g, first).roll(1, dims=1),
    ],
    ids=["no decay", "initial forgotten", "decay after", "decay shifted", "not carried", "shifted"],
)
def test_decayed_sum_twin(twin: Callable[..., Tensor]) -> None:
    with must_differ():
        check_decayed_sum(twin, 70)


# Reads from the side of the values ------------------------------------------------------------------------------------


def of_values(inputs: Inputs) -> tuple[Tensor, ...]:
    """Arguments of `value_reads`: reads, keys, values, decays and the first state."""
    rec, write, S = inputs
    decays = rec.log_decay if rec.log_decay.ndim == 4 else rec.log_decay[..., None].expand_as(write.key)
    return write.value.roll(1, 1), write.key, write.value, decays, S


def check_value_reads(run: Callable[..., tuple[Tensor, Tensor]], n_pos: int, strong: float = 1.0, d_key: int = 5):
    """``S_t x_t`` of real states, in one stretch and in several."""
    rec, write, S = random_inputs(n_pos, per_key=True, erase=False, d_key=d_key, batch=2)
    x, *rest = of_values((replace(rec, log_decay=rec.log_decay * strong), write, S))
    every = list(states(Recurrence(rec.q, rest[2]), write, S))
    expected = torch.einsum("bphkv,bphv->bphk", torch.stack(every, 1), x)
    assert_same(run(x, *rest), (expected, every[-1]), 1e-10)


@pytest.mark.parametrize("strong", [1.0, 40.0], ids=["mild", "strong"])
@pytest.mark.parametrize("n_pos", BORDERS)
def test_value_reads(n_pos: int, strong: float, monkeypatch: pytest.MonkeyPatch) -> None:
    for cached in (kernels.CACHED, 1):
        monkeypatch.setattr(kernels, "CACHED", cached)
        check_value_reads(value_reads, n_pos, strong)
        check_value_reads(value_reads, n_pos, strong, d_key=1)
    from_zero = value_reads(*(args := of_values(random_inputs(n_pos, per_key=True)))[:4])
    assert_same(from_zero, value_reads(*args[:4], torch.zeros_like(args[4])), 0.0)


@pytest.mark.parametrize(
    "twin",
    [
        lambda x, k, v, g, S: value_reads(x, k, v, g),
        lambda x, k, v, g, S: value_reads(x, k, v, g.mean(-1, keepdim=True).expand_as(g), S),
        lambda x, k, v, g, S: value_reads(x, k, v, g.roll(1, 1), S),
        lambda x, k, v, g, S: value_reads(x.roll(1, 1), k, v, g, S),
        lambda x, k, v, g, S: value_reads(x, k.roll(1, 2), v, g, S),
    ],
    ids=["initial forgotten", "one decay", "decay shifted", "read shifted", "heads mixed up"],
)
def test_value_reads_twin(twin: Callable[..., tuple[Tensor, Tensor]]) -> None:
    with must_differ():
        check_value_reads(twin, 70)


def test_value_reads_have_gradients() -> None:
    for strong in (1, 40):
        args = [x.detach().requires_grad_() for x in of_values(random_inputs(35, per_key=True))]
        assert gradcheck(lambda x, k, v, g, S, by=strong: value_reads(x, k, v, g * by, S), args, fast_mode=True)


# Linearity -----------------------------------------------------------------------------------------------------------


def check_linear(inputs: Inputs, state_of_second: Tensor | None, dense: dict[int, Tensor], **options) -> None:
    """The response to the sum of two writes, one of them with edits, is the sum of the responses."""
    rec, first, state = inputs
    second = Write(torch.randn_like(first.key), torch.randn_like(first.value), first.rank)
    o1, S1 = chunked(rec, first, state, **options)
    o2, S2 = chunked(rec, second, state_of_second, dense=dense, **options)
    assert_same(chunked(rec, first + second, state, dense=dense, **options), (o1 + o2, S1 + S2), 1e-11)


@PER_KEY
@ERASE
@RANK
@READ
def test_response_is_linear_in_the_writes(per_key: bool, erase: bool, rank: int, read: str) -> None:
    rec, write, state = random_inputs(70, per_key=per_key, erase=erase, rank=rank)
    dense = {t: torch.randn_like(state) for t in (0, 33, 69)}
    check_linear((rec, write, state), None, dense, read=read)
    check_linear((rec, write, None), None, {}, read=read)


def test_response_is_linear_twin() -> None:
    """The initial state belongs to one of the two responses only."""
    rec, write, state = random_inputs(70)
    with must_differ():
        check_linear((rec, write, state), state, {})


# Precision and memory ------------------------------------------------------------------------------------------------

ROUNDED = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


def all_forms(rec: Recurrence, write: Write, state: Tensor, E: Tensor) -> tuple[Tensor, ...]:
    log_decay = rec.log_decay.flatten(2)[..., 0]  # of the first head, and its first key channel
    return (
        *chunked(rec, write, state, dense={4: E}),
        erase_reads(rec, write, state),
        states_at(rec, write, [0, 68], state, dense={4: E}),
        decayed_sum(write.value[:, :, 0], log_decay),
    )


@PER_KEY
@ROUNDED
def test_computed_in_float32(dtype: torch.dtype, per_key: bool) -> None:
    """Nothing is lost but what the inputs have lost: as exact as if they had been converted before."""
    rec, write, state = random_inputs(70, per_key=per_key, dtype=dtype)
    E = torch.randn_like(state)
    upcast = all_forms(rec.float(), write.to(torch.float32), state.float(), E.float())
    ours = all_forms(rec, write, state, E)
    assert {x.dtype for x in ours} == {torch.float32}
    assert_same(ours, upcast, 0.0)
    for x, y in zip(ours, upcast, strict=True):
        with must_differ():  # the twin: the same numbers rounded once
            assert_same((x.to(dtype).float(),), (y,), 0.0)


class LargestTensor(TorchDispatchMode):
    """The number of elements that the largest tensor made inside holds in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(result):
            if isinstance(x, Tensor):
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.element_size())
        return result


def check_memory(run: Callable[[Inputs], object], per_key: bool = False) -> None:
    """At 512 positions of a 64 x 64 state nothing may be near 512 states, nor on the way back.

    The bound is the one that `kernels` states, per head: 8% of all states for scalar decay, 25% for per-key.
    """
    n_pos, d, head = 512, 64, 2
    rec, write, state = random_inputs(n_pos, per_key=per_key, d_key=d, d_value=d, head=head, dtype=torch.float32)
    inputs = rec, write, state
    for x in (rec.q, rec.log_decay, rec.a, rec.b, write.key, write.value, state):
        assert x is not None
        x.requires_grad_()
    allowed = n_pos * (CHUNK_PER_KEY * d if per_key else CHUNK + d + d)
    with LargestTensor() as largest:
        run(inputs)
    assert largest.elements <= head * allowed, f"{largest.elements} elements, {head * allowed} allowed"


MEMORY = {
    "outputs": lambda inputs: chunked(*inputs),
    "outputs, edited": lambda inputs: chunked(*inputs, dense={100: inputs[2], 511: inputs[2]}),
    "gradients": lambda inputs: sum(x.sum() for x in chunked(*inputs)).backward(),
    "states": lambda inputs: states_at(*inputs[:2], [0, 100, 511], inputs[2]),
    "erase reads": lambda inputs: erase_reads(*inputs),
    "value reads": lambda inputs: value_reads(*of_values(inputs)),
}


@UNCHECKED
@PER_KEY
@pytest.mark.parametrize("what", MEMORY)
def test_memory(what: str, per_key: bool) -> None:
    check_memory(MEMORY[what], per_key)


@UNCHECKED
@PER_KEY
@pytest.mark.parametrize(
    "twin",
    [
        lambda inputs: inputs[1].dense(),
        lambda inputs: chunked(*inputs, chunk=1),  # a chunk border at every token
        lambda inputs: torch.stack(list(states(*inputs)), 1),
    ],
    ids=["dense writes", "chunks of one", "all states"],
)
def test_memory_twin(twin: Callable[[Inputs], object], per_key: bool) -> None:
    with must_differ():
        check_memory(twin, per_key)


def test_autocast_leaves_the_recurrence_in_float32() -> None:
    rec, write, state = random_inputs(CHUNK + 2, dtype=torch.float32)
    plain = chunked(rec, write, state)
    with torch.autocast("cpu", torch.bfloat16):
        inside = chunked(rec, write, state)
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16, "autocast was in force"
    for a, b in zip(plain, inside, strict=True):
        assert b.dtype == torch.float32 and torch.equal(a, b)


# States of few columns, token by token -------------------------------------------------------------------------------


def few_columns(n_pos: int, rank: int = 1, d_value: int = 1) -> tuple[Recurrence, Write, Tensor]:
    rec, write, S = random_inputs(n_pos, per_key=True, erase=False, rank=rank, d_value=d_value, batch=2, head=3)
    return replace(rec, log_decay=rec.log_decay * 8), write, S  # some channels forget within a token or two


@READ
@RANK
@INITIAL
@pytest.mark.parametrize("n_pos", [1, 2, 31, 32, 33, 63, 64, 65, 200])
def test_few_columns(n_pos: int, initial: bool, rank: int, read: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One stretch of all chunks, and a stretch for each chunk as where heads come by the thousand."""
    for d_value in (1, kernels.FEW - 1):
        rec, write, S = few_columns(n_pos, rank, d_value)
        expected = step_loop(rec, write, S if initial else None, read=read)
        for cached in (kernels.CACHED, 1):
            monkeypatch.setattr(kernels, "CACHED", cached)
            assert_same(chunked(rec, write, S if initial else None, read=read), expected, 1e-10)
        before = reading_before((rec, write, S if initial else None))
        assert_same(chunked(*before, read=read), step_loop(*before, read=read), 1e-10)
    if n_pos > 1:  # twins
        key_last = replace(rec, log_decay=rec.log_decay.roll(1, -1))
        for twin in (replace(rec, log_decay=rec.log_decay.roll(1, 1)), key_last):
            with must_differ():
                assert_same(chunked(twin, write, S, read=read), step_loop(rec, write, S, read=read), 1e-10)


def test_few_columns_have_gradients() -> None:
    rec, write, S = few_columns(35)
    parts = [x.requires_grad_() for x in (rec.q, rec.log_decay, write.key, write.value, S)]

    def run(q: Tensor, g: Tensor, key: Tensor, value: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
        return chunked(Recurrence(q, g), Write(key, value), S)

    assert gradcheck(run, parts, fast_mode=True)
    detached = lambda q, g, *rest: run(q, g.detach(), *rest)  # noqa: E731
    with pytest.raises(GradcheckError):
        gradcheck(detached, parts, fast_mode=True)
