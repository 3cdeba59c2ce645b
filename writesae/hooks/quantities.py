"""Every quantity that a hook point may hold: its shape and its meaning. An architecture may add its own (`Family`)."""

from __future__ import annotations

from typing import NamedTuple


class Quantity(NamedTuple):
    """What a hook point holds.

    Attributes:
        shape: of its value, in words.
        meaning: in one line, for `describe_hooks` and `writesae hooks`.
    """

    shape: str
    meaning: str


RESIDUAL = ("resid_pre", "mixer_out", "mlp_out", "resid_post")
"""Those of the residual stream, which every layer has. All others belong to a recurrent mixer."""

PER_KEY = "[batch, pos, head, d_key]"
PER_VALUE = "[batch, pos, head, d_value]"
PER_HEAD = "[batch, pos, head]"
STREAM = "[batch, pos, d_model]"

QUANTITIES: dict[str, Quantity] = {  # in firing order
    "resid_pre": Quantity(STREAM, "the residual stream before the layer"),
    "v_mix": Quantity(PER_VALUE, "how much of the first layer's value is mixed into v"),
    "q_raw": Quantity(PER_KEY, "the query before its norm and scale"),
    "k_raw": Quantity(PER_KEY, "the key before its norm"),
    "q": Quantity(PER_KEY, "what reads the state, after any norm and scale"),
    "k": Quantity(PER_KEY, "where a token writes, after any norm"),
    "v": Quantity(PER_VALUE, "what it writes"),
    "beta": Quantity(PER_HEAD, "how strongly it writes, and erases if anything is erased"),
    "log_decay": Quantity(PER_HEAD, "log of how much of the state stays, <= 0"),
    "kappa": Quantity(PER_KEY, "removal key: what the erase reads, of length 1"),
    "iclr": Quantity(PER_KEY, "in-context learning rate: how much of that is erased"),
    "write": Quantity(f"Write {PER_HEAD}", "the native write, in factors: key k, value v (times beta if there is one)"),
    "state": Quantity("[batch, pos, head, d_key, d_value]", "the memory, at the positions asked for"),
    "o": Quantity(PER_VALUE, "what was read, before norm and gate"),
    "z": Quantity(PER_VALUE, "the output gate, as the norm is given it"),
    "mixer_out": Quantity(STREAM, "what the mixer, recurrent or attention, gives to the stream"),
    "mlp_out": Quantity(STREAM, "what the MLP or the experts give to the stream"),
    "resid_post": Quantity(STREAM, "the residual stream after the layer"),
}
UNDESCRIBED = Quantity("[batch, pos, head, ...]", "an input of the recurrence")
