"""States in factors: what is read of them, their norms, sums and single ones, against the states themselves."""

import pytest
import torch

from writesae.recurrence import Write
from writesae.recurrence.dynamics import States

CASES = [(rank, per_key) for rank in (1, 2) for per_key in (False, True)]


def make(rank=1, per_key=False, pos=150):
    torch.manual_seed(0)
    extra = () if rank == 1 else (rank,)
    gain = Write(torch.randn(3, pos, *extra, 6).double(), torch.randn(3, pos, *extra, 5).double(), rank=rank)
    return States(gain, -2 * torch.rand(3, pos, *((6,) if per_key else ())).double())


def by_the_loop(s):
    keys, values = s.gain.factors()
    decay = s.log_decay.exp()[..., None] if s.log_decay.ndim == 3 else s.log_decay.exp()[..., None, None]
    S, found = torch.zeros(len(keys), 6, 5).double(), []
    for t in range(s.shape[1]):
        S = decay[:, t] * S + torch.einsum("brk,brv->bkv", keys[:, t], values[:, t])
        found.append(S)
    return torch.stack(found, 1)


@pytest.mark.parametrize("rank, per_key", CASES)
def test_against_the_loop(rank, per_key):
    s = make(rank, per_key)
    S = by_the_loop(s)
    torch.testing.assert_close(s.dense(), S)
    torch.testing.assert_close(s.norm2, S.square().sum((-1, -2)))
    torch.testing.assert_close(s.sum(), S.sum((0, 1)))
    rows, positions = torch.tensor([0, 2, 1, 0]), torch.tensor([0, 149, 77, 64])
    torch.testing.assert_close(s.at(rows, positions), S[rows, positions])
    assert s.one_decay != per_key and (s.d_key, s.d_value, s.shape) == (6, 5, (3, 150))
    # a decay of the neighbour's token must not pass
    late = States(s.gain, s.log_decay.roll(1, 1))
    assert (late.norm2 - s.norm2).abs().max() > 0.1 and (late.sum() - s.sum()).abs().max() > 0.1


@pytest.mark.parametrize("rank, per_key", CASES)
@pytest.mark.parametrize("step", [1, 64, 150, 1000])
def test_in_pieces(rank, per_key, step):
    s = make(rank, per_key)
    pieces = list(s.pieces(step))
    assert max(piece.shape[1] for piece in pieces) <= step
    torch.testing.assert_close(torch.cat(pieces, 1), by_the_loop(s))
    later = States(s.gain[:, 40:], s.log_decay[:, 40:])
    torch.testing.assert_close(torch.cat(list(later.pieces(step, by_the_loop(s)[:, 39])), 1), by_the_loop(s)[:, 40:])


def test_some_sequences_keep_what_is_known_of_them():
    s = make()
    assert "norm2" not in s[1:].__dict__
    s.norm2  # noqa: B018
    some = s[torch.tensor([2, 0])]
    assert "norm2" in some.__dict__
    torch.testing.assert_close(some.norm2, by_the_loop(some).square().sum((-1, -2)))
    assert s.to(torch.float64) is s and s.to(torch.float32).gain.key.dtype == torch.float32


def test_strong_decays_take_no_digits():
    s = make()
    s.log_decay[:, 40] = -80.0
    torch.testing.assert_close(s.at(torch.tensor([1]), torch.tensor([60])), by_the_loop(s)[1:2, 60])


def test_what_are_no_states():
    s = make()
    with pytest.raises(ValueError, match=r"gain of one head, \[batch, pos\].*got \[3, 150\] and \[3, 149\]"):
        States(s.gain, s.log_decay[:, 1:])
    with pytest.raises(ValueError, match="readings of a state do not decay as one number"):
        make(per_key=True).read(torch.zeros(3, 150, 2).double())
