"""The oracles mean what their docstrings say. Everything else is tested against them, so they are tested first."""

import pytest
import torch
from torch import Tensor

from oracles import dplr_recurrence


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
