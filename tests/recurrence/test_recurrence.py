"""The specification loop against numbers worked out by hand and against other people's code, and what a `Write` is.

Both forms of the recurrence, the loop and the chunked one, stand the same tests here; `test_kernels.py` compares the
two with each other. Every comparison also runs on a **broken twin**, with one term of the recurrence wrong, and has to
fail on it: a tolerance too wide or an input too tame would let the twin through.
"""

import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import jaxtyping
import pytest
import torch
from torch import Tensor
from transformers.models.qwen3_5 import modeling_qwen3_5

from oracles import dplr_recurrence
from writesae.recurrence import Recurrence, Write, at_least_float32, states, step_loop, zero_state
from writesae.recurrence.kernels import chunked

Run = Callable[..., tuple[Tensor, Tensor]]  # step_loop, chunked, or one of them broken
Inputs = tuple[Recurrence, Write, Tensor | None]  # what is run, with the initial state
Breakage = Callable[[Recurrence, Write, Tensor | None], Inputs]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """These tensors are tiny: threads would only wait for each other, for seconds where the cores are busy."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Annotations as users have them, checked by nobody: checking takes most of the time of a small call."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


BOTH = pytest.mark.parametrize("run", [step_loop, chunked])


def random_inputs(
    n_pos: int,
    *,
    per_key: bool = False,
    erase: bool = True,
    rank: int = 1,
    erases: int = 1,
    reads: int = 0,
    d_key: int = 5,
    d_value: int = 4,
    batch: int = 1,
    head: int = 2,
    dtype: torch.dtype = torch.float64,
) -> tuple[Recurrence, Write, Tensor]:
    """A recurrence, its writes and an initial state, with every term large enough to be missed.

    Erase write, erase read and write key are three different vectors, as no architecture has them: a formula that takes
    one for another shows. The product ``a b^T`` stays below 1 in norm, so that long sequences do not blow up.
    """

    def draw(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, dtype=dtype)

    several = () if erases == 1 else (erases,)
    q, a, b = draw(n_pos, head, d_key), *(draw(n_pos, head, *several, d_key) for _ in range(2))
    a, b = (0.8 * x / x.norm(dim=-1, keepdim=True) / erases**0.5 for x in (a, b))
    log_decay = -draw(n_pos, head, d_key).abs() / 4 if per_key else -draw(n_pos, head).abs() / 4
    ranks = () if rank == 1 else (rank,)
    write = Write(draw(n_pos, head, *ranks, d_key), draw(n_pos, head, *ranks, d_value), rank)
    rec = Recurrence(q, log_decay, a, b) if erase else Recurrence(q, log_decay)
    state = draw(head, d_key, d_value)
    if reads:
        rec = replace(rec, q=draw(n_pos, head, reads, d_key), read_weights=draw(n_pos, head, reads, d_value))
    return rec, write, state


# The twins. Each takes the inputs of a run and spoils them as a wrong implementation would.


def without_erase(rec: Recurrence, write: Write, state: Tensor | None) -> Inputs:
    return replace(rec, a=None, b=None), write, state


def a_and_b_swapped(rec: Recurrence, write: Write, state: Tensor | None) -> Inputs:
    return replace(rec, a=rec.b, b=rec.a), write, state


def erase_sees_decayed_state(rec: Recurrence, write: Write, state: Tensor | None) -> Inputs:
    """``a b^T D S`` for ``a b^T S``: the decay counted twice where ``a`` already holds it."""
    assert rec.b is not None
    return replace(rec, b=rec.b * decay_of(rec)), write, state


def erase_key_for_write_key(rec: Recurrence, write: Write, state: Tensor | None) -> Inputs:
    assert rec.b is not None
    return rec, replace(write, key=rec.b if write.rank == 1 else rec.b[..., None, :].expand_as(write.key)), state


def decay_after_write(rec: Recurrence, write: Write, state: Tensor | None) -> Inputs:
    """``D (S + k v^T)`` for ``D S + k v^T``."""
    decay = decay_of(rec)
    return rec, replace(write, key=write.key * (decay if write.rank == 1 else decay[..., None, :])), state


def without_decay(rec: Recurrence, write: Write, state: Tensor | None) -> Inputs:
    return replace(rec, log_decay=torch.zeros_like(rec.log_decay)), write, state


def state_forgotten(rec: Recurrence, write: Write, state: Tensor | None) -> Inputs:
    return rec, write, None


def read_shifted(rec: Recurrence, write: Write, state: Tensor | None) -> Inputs:
    return replace(rec, q=rec.q.roll(1, dims=1)), write, state


def decay_of(rec: Recurrence) -> Tensor:
    """The decay with a key dimension, 1 if it is one number per head."""
    decay = rec.log_decay.exp()
    return decay if decay.ndim == 4 else decay[..., None]


def broken(run: Run, breakage: Breakage) -> Run:
    def twin(rec: Recurrence, write: Write, initial_state: Tensor | None = None, **options) -> tuple[Tensor, Tensor]:
        return run(*breakage(rec, write, initial_state), **options)

    return twin


BREAKAGES = [without_decay, decay_after_write, state_forgotten, read_shifted]
ERASE_BREAKAGES = [without_erase, a_and_b_swapped, erase_sees_decayed_state, erase_key_for_write_key]


def assert_same(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...], tolerance: float) -> None:
    """All of them within ``tolerance``, relative where the numbers exceed 1."""
    assert len(ours) == len(theirs)
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


def must_differ():
    """What a comparison says of a broken twin; not merely any error."""
    return pytest.raises(AssertionError, match=r"not close|not equal|allowed")


# By hand -------------------------------------------------------------------------------------------------------------

EDIT = [[0.0, 1.0], [1.0, 0.0]]
# Two tokens from S_0 = [[1, 0], [0, 2]]. Example, with one decay per head (1/2, then 1/4), read "same":
#   token 0   D S = [[.5, 0], [0, 1]]       b^T S = (1, 2)   a (b^T S) = [[-.5, -1], [0, 0]]   k v^T = [[3, 0], [6, 0]]
#             S_1 = [[3, -1], [6, 1]]       o = (1, 2) S_1 = (15, 1)
#   token 1   D S = [[.75, -.25], [1.5, .25]]   b^T S = (6, 1)   a (b^T S) = [[0, 0], [-6, -1]]
#             k v^T = [[0, 1], [0, 0]]   S_2 = [[.75, .75], [-4.5, -.75]]   o = (2, 0) S_2 = (1.5, 1.5)
BY_HAND = {
    "scalar decay": ({}, [[15, 1], [1.5, 1.5]], [[0.75, 0.75], [-4.5, -0.75]]),
    "per-key decay": ({"per_key": True}, [[15, 0], [6, 0]], [[3, 0], [-3, -0.25]]),
    "no erase": ({"erase": False}, [[15.5, 2], [1.75, 2]], [[0.875, 1], [1.5, 0.25]]),
    "read next": ({"read": "next"}, [[0, 1], [1.5, -0.5]], [[0.75, 0.75], [-4.5, -0.75]]),
    "edit": ({"edit": True}, [[17, 2], [1.5, 2]], [[0.75, 1], [-5.25, -0.75]]),
    "reads before": ({"reads_before": True}, [[1, 4], [6, -2]], [[0.75, 0.75], [-4.5, -0.75]]),
    "edit, reads before": ({"reads_before": True, "edit": True}, [[1, 4], [6, 0]], [[0.75, 1], [-5.25, -0.75]]),
    "edit, read next": ({"edit": True, "read": "next"}, [[0, 1], [1.5, 0]], [[0.75, 1], [-5.25, -0.75]]),
}


def check_by_hand(run: Run, case: str) -> None:
    def tokens(*rows: list[float]) -> Tensor:  # [batch 1, pos 2, head 1, feature]
        return torch.tensor(rows, dtype=torch.float64)[None, :, None]

    options, o, S = BY_HAND[case]
    decay = tokens([0.5, 0.25], [1.0, 0.5]) if options.get("per_key") else tokens([0.5], [0.25])[..., 0]
    rec = Recurrence(tokens([1, 2], [2, 0]), decay.log(), tokens([-0.5, 0], [0, -1]), tokens([1, 1], [0, 1]))
    if not options.get("erase", True):
        rec = replace(rec, a=None, b=None)
    rec = replace(rec, reads_before=options.get("reads_before", False))
    ours = run(
        rec,
        Write(tokens([1, 2], [1, 0]), tokens([3, 0], [0, 1])),
        torch.tensor([[[[1.0, 0.0], [0.0, 2.0]]]], dtype=torch.float64),
        dense={0: torch.tensor([[EDIT]], dtype=torch.float64)} if options.get("edit") else None,
        read=options.get("read", "same"),
    )
    assert_same(ours, (tokens(*o), torch.tensor([[S]], dtype=torch.float64)), 1e-14)


@BOTH
@pytest.mark.parametrize("case", BY_HAND)
def test_two_tokens_by_hand(run: Run, case: str) -> None:
    check_by_hand(run, case)


@BOTH
@pytest.mark.parametrize("breakage", BREAKAGES + ERASE_BREAKAGES)
def test_two_tokens_by_hand_twin(run: Run, breakage: Breakage) -> None:
    with must_differ():
        check_by_hand(broken(run, breakage), "scalar decay")


# fla's loop ----------------------------------------------------------------------------------------------------------


def fla_loop(rec: Recurrence, write: Write, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """fla's loop in our letters: it calls our erase read ``alpha`` and our erase write ``beta``, and scales ``q``."""
    assert rec.a is not None and rec.b is not None

    def heads_first(x: Tensor) -> Tensor:
        return x.transpose(1, 2)

    log_decay = rec.log_decay if rec.log_decay.ndim == 4 else rec.log_decay[..., None].expand_as(rec.q)
    o, S = dplr_recurrence()(
        heads_first(rec.q) * math.sqrt(rec.q.shape[-1]),
        heads_first(write.key),
        heads_first(write.value),
        alpha=heads_first(rec.b),
        beta=heads_first(rec.a),
        gk=heads_first(log_decay),
        initial_state=state,
    )
    assert S is not None
    return o.transpose(1, 2), S


def check_against_fla(run: Run, inputs: Inputs, tolerance: float) -> None:
    assert_same(run(*inputs), fla_loop(*inputs), tolerance)


@BOTH
@pytest.mark.parametrize("initial", [False, True], ids=["from zero", "from a state"])
@pytest.mark.parametrize("per_key", [False, True], ids=["scalar decay", "per-key decay"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-13)])
def test_fla(
    run: Run, dtype: torch.dtype, tolerance: float, per_key: bool, initial: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if dtype == torch.float64:  # fla's loop calls .float() on all it is given; let that keep the last digits
        monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    rec, write, state = random_inputs(70, per_key=per_key, batch=2, dtype=dtype)
    check_against_fla(run, (rec, write, state if initial else None), tolerance)


@BOTH
@pytest.mark.parametrize("per_key", [False, True], ids=["scalar decay", "per-key decay"])
@pytest.mark.parametrize("breakage", BREAKAGES + ERASE_BREAKAGES)
def test_fla_twin(run: Run, breakage: Breakage, per_key: bool) -> None:
    inputs = random_inputs(20, per_key=per_key, dtype=torch.float32)
    with must_differ():
        check_against_fla(broken(run, breakage), inputs, 1e-5)


# Gated DeltaNet, as transformers computes it -------------------------------------------------------------------------

TRANSFORMERS = pytest.mark.parametrize(
    "theirs", ["torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"], ids=["chunks", "loop"]
)


def interleaved(x: Tensor, n: int) -> Tensor:
    """Key heads to value heads: each serves ``n`` value heads that lie side by side."""
    return x.repeat_interleave(n, dim=2)


def tiled(x: Tensor, n: int) -> Tensor:
    """The wrong order: with 2 key heads and 4 value heads, 0 1 0 1 for 0 0 1 1."""
    return x.repeat(1, 1, n, 1)


def erase_undecayed(rec: Recurrence, write: Write, state: Tensor | None) -> Inputs:
    """``-beta k (k^T S)`` for ``-beta k (k^T D S)``: Gated DeltaNet erases from the state it has decayed."""
    assert rec.a is not None
    return replace(rec, a=rec.a / decay_of(rec)), write, state


def write_not_gated(rec: Recurrence, write: Write, state: Tensor | None) -> Inputs:
    """``k v^T`` for ``beta k v^T``; ``beta`` is the norm of ``a`` without the decay, the keys being normalised."""
    assert rec.a is not None
    beta = (rec.a / decay_of(rec)).norm(dim=-1, keepdim=True)
    return rec, replace(write, value=write.value / beta), state


def check_against_transformers(
    run: Run, theirs: str, *, n_pos: int = 70, initial: bool = True, to_value_heads: Callable = interleaved
) -> None:
    """The mapping of Gated DeltaNet to the recurrence, on two key heads that serve three value heads each."""
    batch, n_key_heads, n_value_heads, d_key, d_value = 2, 2, 6, 8, 7
    q, k = (torch.randn(batch, n_pos, n_key_heads, d_key) for _ in range(2))
    v = torch.randn(batch, n_pos, n_value_heads, d_value)
    g = -torch.rand(batch, n_pos, n_value_heads)
    beta = torch.rand(batch, n_pos, n_value_heads) * 0.9 + 0.1
    state = torch.randn(batch, n_value_heads, d_key, d_value) if initial else None

    function = inspect.unwrap(getattr(modeling_qwen3_5, theirs))  # the torch code, and never a kernel in its place
    expected = function(q, k, v, g, beta, initial_state=state, output_final_state=True, use_qk_l2norm_in_kernel=True)

    q, k = (to_value_heads(x, n_value_heads // n_key_heads) for x in (q, k))
    q, k = (x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt() for x in (q, k))
    beta = beta[..., None]
    rec = Recurrence(q / math.sqrt(d_key), g, a=-beta * g.exp()[..., None] * k, b=k)
    assert_same(run(rec, Write(k, beta * v), state), expected, 1e-5)


@BOTH
@TRANSFORMERS
@pytest.mark.parametrize("n_pos", [1, 63, 64, 65, 130])
@pytest.mark.parametrize("initial", [False, True], ids=["from zero", "from a state"])
def test_transformers(run: Run, theirs: str, n_pos: int, initial: bool) -> None:
    check_against_transformers(run, theirs, n_pos=n_pos, initial=initial)


# Not `a_and_b_swapped` and `erase_key_for_write_key`: a is parallel to b here and b is the write key, both are right.
@BOTH
@TRANSFORMERS
@pytest.mark.parametrize(
    "breakage", [*BREAKAGES, without_erase, erase_sees_decayed_state, erase_undecayed, write_not_gated]
)
def test_transformers_twin(run: Run, theirs: str, breakage: Breakage) -> None:
    with must_differ():
        check_against_transformers(broken(run, breakage), theirs)


@BOTH
@TRANSFORMERS
def test_transformers_twin_with_heads_in_the_wrong_order(run: Run, theirs: str) -> None:
    with must_differ():
        check_against_transformers(run, theirs, to_value_heads=tiled)


# The loop's own options ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("per_key", [False, True], ids=["scalar decay", "per-key decay"])
def test_states_are_the_final_states_of_the_prefixes(per_key: bool, rank: int) -> None:
    rec, write, state = random_inputs(6, per_key=per_key, rank=rank)
    for t, S in enumerate(states(rec, write, state)):
        torch.testing.assert_close(S, step_loop(rec[:, : t + 1], write[:, : t + 1], state)[1])
    assert t == 5


def test_a_write_of_rank_3_is_three_writes_at_once() -> None:
    """Over `dense`, which builds the matrices without the factors' help."""
    rec, write, state = random_inputs(6, rank=3)
    dense = dict(enumerate(write.dense().unbind(1)))
    for read in ("same", "next"):
        nothing = Write(write.key[..., 0, :], torch.zeros_like(write.value[..., 0, :]))
        assert_same(
            step_loop(rec, write, state, read=read), step_loop(rec, nothing, state, dense=dense, read=read), 1e-13
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_computed_in_float32_at_least(dtype: torch.dtype) -> None:
    rec, write, state = random_inputs(9, dtype=dtype)
    E = torch.randn_like(state)
    higher = torch.promote_types(dtype, torch.float32)
    ours = step_loop(rec, write, state, dense={4: E})
    upcast = step_loop(rec.float(), write.to(higher), state.to(higher), dense={4: E.to(higher)})
    assert_same(ours, upcast, 0.0)
    assert {x.dtype for x in (*ours, *states(rec, write, state), zero_state(rec, write))} == {higher}
    if dtype != higher:  # the twin: the same numbers rounded once
        with must_differ():
            assert_same(tuple(x.to(dtype).to(higher) for x in ours), upcast, 0.0)


def test_at_least_float32() -> None:
    for dtype, computed in [(torch.bfloat16, torch.float32), (torch.float32, torch.float32)]:
        assert at_least_float32(torch.ones(2, dtype=dtype)).dtype == computed
    x = torch.ones(2, dtype=torch.float64)
    assert at_least_float32(x) is x


@BOTH
@pytest.mark.parametrize("position", [-1, 3, 64])
def test_edit_outside_the_sequence(run: Run, position: int) -> None:
    rec, write, state = random_inputs(3)
    with pytest.raises(IndexError, match=f"dense edit at position {position}: allowed are 0 to 2"):
        run(rec, write, dense={1: state, position: state})


@BOTH
@pytest.mark.parametrize("erase", [False, True])
@pytest.mark.parametrize("n_write", [2, 4, 130])
def test_writes_for_other_positions_than_the_reads(run: Run, n_write: int, erase: bool) -> None:
    """They would be broadcast or cut off in silence."""
    rec, _, state = random_inputs(3, erase=erase)
    _, write, _ = random_inputs(n_write)
    with pytest.raises(ValueError, match=f"3 positions.*{n_write}"):
        run(rec, write, state)


# Recurrence ----------------------------------------------------------------------------------------------------------


def test_erase_write_and_erase_read_come_together() -> None:
    rec, _, _ = random_inputs(3)
    for half in ({"a": None}, {"b": None}):
        with pytest.raises(ValueError, match="erase write a and erase read b come together"):
            replace(rec, **half)


@pytest.mark.parametrize("field", ["log_decay", "a", "b"])
def test_recurrence_of_fields_that_do_not_fit(field: str, unchecked: None) -> None:
    """Said even where nothing checks the annotations: such a field would be broadcast in silence."""
    rec, _, _ = random_inputs(3)
    with pytest.raises(ValueError, match=rf"{field} \[1, 2, 2.* does not fit q \[1, 3, 2, 5\]"):
        replace(rec, **{field: getattr(rec, field)[:, 1:]})


@pytest.mark.parametrize("per_key", [False, True], ids=["scalar decay", "per-key decay"])
@pytest.mark.parametrize("erase", [False, True])
def test_recurrence_index(per_key: bool, erase: bool) -> None:
    """One head of some positions of one sequence runs as it runs among the others."""
    rec, write, state = random_inputs(7, per_key=per_key, erase=erase, batch=3, head=4)
    part = (slice(1, 2), slice(0, 5), slice(2, 3))
    assert rec[part].n_pos == 5
    o, _ = step_loop(rec, write, state)
    torch.testing.assert_close(step_loop(rec[part], write[part], state[1:2, 2:3])[0], o[part])


def test_reads_and_their_weights_come_together(unchecked: None) -> None:
    rec, _, _ = random_inputs(3, reads=2)
    for half in ({"q": rec.q[..., 0, :]}, {"read_weights": None}):
        with pytest.raises(ValueError, match="a dimension of reads in q and read_weights come together"):
            replace(rec, **half)
    assert rec.read_weights is not None
    for wrong in (rec.read_weights[:, 1:], rec.read_weights[:, :, :, :1]):  # would be broadcast in silence
        with pytest.raises(ValueError, match=r"read_weights \[1, .* does not fit q \[1, 3, 2, 2, 5\]"):
            replace(rec, read_weights=wrong)


@BOTH
def test_weights_for_other_columns_than_the_writes(run: Run) -> None:
    rec, write, state = random_inputs(3, reads=2)
    with pytest.raises(ValueError, match="read_weights have 4 columns, the writes have 1"):
        run(rec, replace(write, value=write.value[..., :1]), state[..., :1])


# Several reads per token ---------------------------------------------------------------------------------------------


def weights_of_the_other_read(rec: Recurrence, write: Write, state: Tensor | None) -> Inputs:
    assert rec.read_weights is not None
    return replace(rec, read_weights=rec.read_weights.flip(3)), write, state


def weights_of_the_next_token(rec: Recurrence, write: Write, state: Tensor | None) -> Inputs:
    assert rec.read_weights is not None
    return replace(rec, read_weights=rec.read_weights.roll(1, 1)), write, state


def unweighted(rec: Recurrence, write: Write, state: Tensor | None) -> Inputs:
    assert rec.read_weights is not None
    return replace(rec, read_weights=torch.ones_like(rec.read_weights)), write, state


def first_read_only(rec: Recurrence, write: Write, state: Tensor | None) -> Inputs:
    assert rec.read_weights is not None
    return replace(rec, q=rec.q[:, :, :, :1], read_weights=rec.read_weights[:, :, :, :1]), write, state


READ_BREAKAGES = [weights_of_the_other_read, weights_of_the_next_token, unweighted, first_read_only]


def check_several_reads(run: Run, *, per_key: bool = False, erase: bool = True, **changes: bool) -> None:
    """``o_t = sum_r w_tr * (S_t^T q_tr)``, of states that are built."""
    rec, write, state = random_inputs(7, per_key=per_key, erase=erase, rank=2, reads=3, batch=2)
    rec = replace(rec, **changes)
    after = torch.stack(list(states(rec, write, state)), 1)
    seen = torch.cat([state[:, None], after[:, :-1]], 1) if rec.reads_before else after
    o = torch.einsum("bthrv,bthkv,bthrk->bthv", rec.read_weights, seen, rec.q)
    assert_same(run(rec, write, state), (o, after[:, -1]), 1e-12)


@BOTH
@pytest.mark.parametrize("per_key", [False, True], ids=["scalar decay", "per-key decay"])
@pytest.mark.parametrize("erase", [False, True])
@pytest.mark.parametrize("reads_before", [False, True])
def test_several_reads(run: Run, per_key: bool, erase: bool, reads_before: bool) -> None:
    check_several_reads(run, per_key=per_key, erase=erase, reads_before=reads_before)


@BOTH
@pytest.mark.parametrize("breakage", READ_BREAKAGES)
def test_several_reads_twin(run: Run, breakage: Breakage) -> None:
    with must_differ():
        check_several_reads(broken(run, breakage))


def test_several_reads_are_those_of_each_weighted_and_added() -> None:
    rec, write, state = random_inputs(7, reads=3)
    assert rec.read_weights is not None
    each = torch.stack([step_loop(one, write, state)[0] for one in rec.single_reads()], 3)
    torch.testing.assert_close((rec.read_weights * each).sum(3), step_loop(rec, write, state)[0])
    part = (slice(None), slice(2, 7), slice(1, 2))
    whole, S = step_loop(rec, write, state)
    start = step_loop(rec[:, :2], write[:, :2], state)[1][:, 1:2]
    assert_same(step_loop(rec[part], write[part], start), (whole[part], S[:, 1:2]), 1e-12)
    half = replace(rec, read_weights=rec.read_weights.to(torch.bfloat16)).float()
    assert half.read_weights is not None and half.read_weights.dtype == torch.float32


# Write ---------------------------------------------------------------------------------------------------------------

RANKS = pytest.mark.parametrize("ranks", [(1, 1), (1, 3), (3, 1), (3, 2)])


def random_write(rank: int, *lead: int) -> Write:
    ranks = () if rank == 1 else (rank,)
    return Write(
        torch.randn(*lead, *ranks, 5, dtype=torch.float64), torch.randn(*lead, *ranks, 4, dtype=torch.float64), rank
    )


def test_write_by_hand() -> None:
    one = Write(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 0.0, 4.0]))
    assert one.dense().tolist() == [[3, 0, 4], [6, 0, 8]]
    assert one.norm().item() == pytest.approx(math.sqrt(5) * 5)
    assert (one.shape, one.d_key, one.d_value) == (torch.Size([]), 2, 3)

    two = Write(torch.tensor([[1.0, 2.0], [1.0, 0.0]]), torch.tensor([[3.0, 0.0, 4.0], [0.0, 1.0, 0.0]]), rank=2)
    assert two.dense().tolist() == [[3, 1, 4], [6, 0, 8]]
    assert two.norm().item() == pytest.approx(math.sqrt(126))
    assert (two.shape, two.d_key, two.d_value) == (torch.Size([]), 2, 3)
    assert one.inner(two).item() == 125  # 9 + 16 + 36 + 64
    assert one.cosine(two).item() == pytest.approx(125 / math.sqrt(125 * 126))


MASK = torch.tensor([[True, False, True], [False, True, False]])
# What each operation is on the matrices themselves, and a wrong way to do it on the factors.
ALGEBRA: dict[str, tuple[Callable, Callable, Callable]] = {
    "dense": (lambda w, u: w, lambda W, U: W, lambda w, u: replace(w, key=w.key.flip(-1))),
    "inner": (lambda w, u: w.inner(u), lambda W, U: (W * U).sum((-1, -2)), lambda w, u: w.norm() * u.norm()),
    "norm": (
        lambda w, u: w.norm(),
        lambda W, U: W.norm(dim=(-1, -2)),
        lambda w, u: w.inner(w),
    ),
    "cosine": (
        lambda w, u: w.cosine(u),
        lambda W, U: (W * U).sum((-1, -2)) / (W.norm(dim=(-1, -2)) * U.norm(dim=(-1, -2))),
        lambda w, u: w.inner(u),
    ),
    "+": (lambda w, u: w + u, lambda W, U: W + U, lambda w, u: w - u),
    "-": (lambda w, u: w - u, lambda W, U: W - U, lambda w, u: u - w),
    "negated": (lambda w, u: -w, lambda W, U: -W, lambda w, u: Write(-w.key, -w.value, w.rank)),
    "scaled": (lambda w, u: w * 2.5, lambda W, U: 2.5 * W, lambda w, u: Write(w.key * 2.5, w.value * 2.5, w.rank)),
    "scaled from the left": (lambda w, u: 3 * w, lambda W, U: 3 * W, lambda w, u: w),
    "scaled each": (
        lambda w, u: w * u.norm(),
        lambda W, U: W * U.norm(dim=(-1, -2))[..., None, None],
        lambda w, u: w * u.norm().mean(),
    ),
    "scaled per head": (
        lambda w, u: w * torch.arange(3.0),
        lambda W, U: W * torch.arange(3.0)[:, None, None],
        lambda w, u: w * torch.arange(2.0)[:, None],
    ),
    "index": (lambda w, u: w[1], lambda W, U: W[1], lambda w, u: w[0]),
    "slice": (lambda w, u: w[:, 1:], lambda W, U: W[:, 1:], lambda w, u: w[:, :2]),
    "mask": (lambda w, u: w[MASK], lambda W, U: W[MASK], lambda w, u: w[~MASK]),
}


def check_algebra(ours: Callable, on_matrices: Callable, ranks: tuple[int, int]) -> None:
    w, u = (random_write(rank, 2, 3) for rank in ranks)
    result = ours(w, u)
    assert_same((result.dense() if isinstance(result, Write) else result,), (on_matrices(w.dense(), u.dense()),), 1e-12)


@RANKS
@pytest.mark.parametrize("operation", ALGEBRA)
def test_write_algebra(operation: str, ranks: tuple[int, int]) -> None:
    ours, on_matrices, _ = ALGEBRA[operation]
    check_algebra(ours, on_matrices, ranks)


@RANKS
@pytest.mark.parametrize("operation", ALGEBRA)
def test_write_algebra_twin(operation: str, ranks: tuple[int, int]) -> None:
    _, on_matrices, wrong = ALGEBRA[operation]
    with must_differ():
        check_algebra(wrong, on_matrices, ranks)


@RANKS
def test_write_broadcasts(ranks: tuple[int, int]) -> None:
    """One write against one for each head: what a decoder and the model's writes are to each other."""
    w, u = random_write(ranks[0]), random_write(ranks[1], 2, 3)
    torch.testing.assert_close(w.inner(u), (w.dense() * u.dense()).sum((-1, -2)))
    torch.testing.assert_close((w + u).dense(), w.dense() + u.dense())
    torch.testing.assert_close((u - w).dense(), u.dense() - w.dense())
    assert (w + u).rank == sum(ranks)
    assert (w + u).shape == (2, 3)


@pytest.mark.parametrize("rank", [1, 3])
def test_write_of_nothing(rank: int) -> None:
    """Zero writes are common (padding, empty codes): no NaN may come of one."""
    w = random_write(rank, 4)
    zero = w * 0.0
    assert zero.norm().tolist() == [0] * 4
    assert zero.cosine(w).tolist() == zero.cosine(zero).tolist() == [0] * 4
    torch.testing.assert_close(w.cosine(w), torch.ones(4, dtype=torch.float64))
    assert (w - w).norm().max() < 1e-6  # from the factors, so not exactly 0 but the root of a rounding error


def test_write_to() -> None:
    w = random_write(3, 4).to(torch.bfloat16)
    assert (w.key.dtype, w.value.dtype, w.rank) == (torch.bfloat16, torch.bfloat16, 3)
    assert w.to("meta").key.device.type == "meta"


@pytest.mark.parametrize(
    ("key", "value", "rank", "text"),
    [
        ((2, 5), (3, 4), 1, r"equal leading dimensions; got key \[2, 5\] and value \[3, 4\]"),
        ((2, 5), (4,), 1, r"equal leading dimensions; got key \[2, 5\] and value \[4\]"),
        ((), (), 1, r"key \[..., d_key\] and value \[..., d_value\].*got key \[\] and value \[\]"),
        ((5,), (4,), 2, r"equal leading dimensions; got key \[5\] and value \[4\]"),
        ((2, 3, 5), (2, 2, 4), 3, r"equal leading dimensions; got key \[2, 3, 5\] and value \[2, 2, 4\]"),
        ((2, 3, 5), (2, 3, 4), 2, r"rank=2 needs key \[..., 2, d_key\]; got \[2, 3, 5\]"),
    ],
)
def test_write_of_factors_that_do_not_fit(key: tuple[int, ...], value: tuple[int, ...], rank: int, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Write(torch.zeros(key), torch.zeros(value), rank)


def test_a_write_is_shown_by_its_sizes() -> None:
    """Not by its numbers, of which there may be millions."""
    assert repr(Write(torch.zeros(1, 7, 4, 32), torch.zeros(1, 7, 4, 16))) == "Write([1, 7, 4], 32 x 16, rank 1)"
    assert repr(Write(torch.zeros(3, 2, 5), torch.zeros(3, 2, 4), rank=2)) == "Write([3], 5 x 4, rank 2)"
