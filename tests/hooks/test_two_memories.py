"""Gated Slot Attention: what its memory of keys, which has no hook points, does and does not notice."""

import pytest
import torch

import writesae as ws
from architectures import architecture_named
from edit_cases import random_ids
from writesae.hooks import name_of

A = architecture_named("gsa")


@pytest.fixture
def model() -> ws.HookedRecurrentModel:
    return ws.HookedRecurrentModel(A.build())


@torch.no_grad()
def test_a_hook_on_k_changes_what_is_written_and_not_what_is_read_with(model: ws.HookedRecurrentModel) -> None:
    ids, names = random_ids(3, 1, 20), [name_of(quantity, 1) for quantity in ("scores", "q", "write", "o")]
    _, before = model.run_with_cache(ids, names=names)
    halved = lambda x, hook: 0.5 * x  # noqa: E731
    for hooked, same in (("k", {"scores", "q"}), ("log_decay", {"scores", "q", "write"}), ("scores", {"write"})):
        with model.hooks([(name_of(hooked, 1), halved)]):
            _, after = model.run_with_cache(ids, names=names)
        for quantity, name in zip(("scores", "q", "o"), (names[0], names[1], names[3]), strict=True):
            assert torch.equal(before[name], after[name]) == (quantity in same), (hooked, quantity)
        written = [cache[names[2]].dense() for cache in (before, after)]
        assert torch.equal(*written) == ("write" in same), hooked
    torch.testing.assert_close(after[names[1]], after[names[0]].softmax(-1))


@torch.no_grad()
def test_a_memory_keeps_both_in_float32(model: ws.HookedRecurrentModel) -> None:
    memory = model.memory([1, 2, 3])
    half = ws.HookedRecurrentModel(A.build().bfloat16())
    cache = half._cache_of(memory, 1)
    states = cache.layers[0].recurrent_states
    assert [states[i].dtype for i in (0, 1)] == [torch.float32] * 2
    assert torch.equal(states[1], memory.others["0.recurrent_states.1"])
