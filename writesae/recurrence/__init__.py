"""The mathematics that every architecture shares: writes, the recurrence, and what follows from it."""

from writesae.recurrence.dynamics import States
from writesae.recurrence.spec import (
    Read,
    Recurrence,
    Write,
    at_least_float32,
    check_dense,
    first_state,
    states,
    step_loop,
    zero_state,
)
from writesae.recurrence.write import memory_dtype

__all__ = [
    "Read", "Recurrence", "States", "Write", "at_least_float32", "check_dense", "first_state", "memory_dtype", "states",
    "step_loop", "zero_state",
]  # fmt: skip
