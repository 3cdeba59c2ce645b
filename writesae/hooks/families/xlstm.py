"""xLSTM's mLSTM: linear attention with gates that are exponentials, read through a normaliser.

    C_t = f C_{t-1} + i k_t v_t^T               n_t = f n_{t-1} + i k_t
    h_t = C_t^T q_t / d_t                       d_t = max(|n_t . q_t|, exp(-m_t)) + eps
    m_t = max(log f_t + m_{t-1}, i_t)           f = exp(log f_t + m_{t-1} - m_t),  i = exp(i_t - m_t)

with ``log f_t`` the log sigmoid of the forget gate and ``i_t`` the input gate before its exponential. The stabiliser
``m`` is the unit, ``exp(m)``, in which ``C`` and the normaliser ``n`` are kept. Neither ``n`` nor ``m`` depends on
``C``. So the matrix obeys the recurrence of all others, in the letters of `writesae.recurrence`: no erase, decay ``f``,
write ``k (beta v)^T`` with ``beta = i``, and a read along ``q_t / d_t``.

An edit of the matrix changes what is read of it linearly and exactly, and leaves ``n`` and ``m`` as they are: they go
on counting what the model itself wrote. So does a hook that changes ``q``, ``k``, ``v``, ``beta`` or ``log_decay``,
which are of the matrix alone, and one that changes ``denominator``, which is ``d``. The model's own inputs are points
before these (``q_raw``, ``k_raw``, ``igate``, ``fgate``): what a hook makes of them goes to the native function, and
normaliser and stabiliser follow.

transformers keeps no padding out of any of this, and has a cache class for it alone. `MatrixCache` keeps ``C``, ``n``
and ``m`` where all others keep states.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache, LinearAttentionLayer

from writesae.hooks.families.base import Family, KernelCall, of_heads
from writesae.hooks.families.gdn import modeling
from writesae.hooks.families.registry import register
from writesae.hooks.quantities import PER_HEAD, PER_KEY, Quantity
from writesae.models.wrappers import device_of
from writesae.recurrence import Recurrence, Write, rules
from writesae.recurrence.kernels import chunked
from writesae.recurrence.write import widest

_ARGUMENT = {"q_raw": "query", "k_raw": "key", "v": "value", "igate": "igate", "fgate": "fgate"}
_RAW = ("q_raw", "k_raw", "igate", "fgate", "denominator")
_OF_NATIVE = {"q_raw", "k_raw", "igate", "fgate", "v"}  # what the native function takes as it is
_PARTS = ("c_initial", "n_initial", "m_initial")


class MatrixCache(DynamicCache):
    """Keeps ``C``, ``n`` and ``m`` of each layer as its recurrent states 0, 1 and 2, and shows them to the model by the
    names that an ``xLSTMCache`` has for them."""

    def __init__(self, n_layers: int):
        Cache.__init__(self, [LinearAttentionLayer(number_of_states=len(_PARTS)) for _ in range(n_layers)])
        self.seqlen_offset = 0  # which the model counts

    @property
    def is_compileable(self) -> bool:
        """Generation on a GPU would compile the model."""
        return False

    @property
    def rnn_state(self) -> _States:
        return _States(self.layers)


@dataclass
class _States:
    layers: Sequence[Any]

    def __getitem__(self, layer: int) -> tuple[Tensor, ...]:
        return tuple(self.layers[layer].recurrent_states.values())


def matrix_cache(cache: Any, text_model: Any, tokens: Tensor | None) -> MatrixCache:
    """The cache that a model is given, as one that it takes: None is a new one, and an empty one stays the object that
    it is. If there are tokens, it begins with zeros for them, of the dtype that the model has them in.

    Raises:
        ValueError: a cache that another model has fed, or one of another class.
    """
    if cache is None:
        cache = MatrixCache(len(text_model.blocks))
    if not isinstance(cache, MatrixCache):
        kind = type(cache).__name__
        if kind not in ("xLSTMCache", "DynamicCache"):
            raise ValueError(f"a cache of the class {kind}: xLSTM takes a DynamicCache(config=...), or none")
        states, layers = vars(cache).get("rnn_state", {}), vars(cache).get("layers", ())
        if any(bool(C.any()) for C, *_ in states.values()) or any(layer.is_initialized for layer in layers):
            raise ValueError(
                f"this {kind} was filled where writesae did not see it, and which of its tokens were padding is not "
                f"known: begin with a new one, or with DynamicCache(config=model.config)"
            )
        vars(cache).pop("rnn_state", None)
        cache.__class__ = MatrixCache
        cache.__init__(len(text_model.blocks))
    of_layers: Any = cache.layers
    empty = [layer for layer in of_layers if layer.recurrent_states[0] is None]
    if tokens is not None and empty:
        like = tokens if tokens.is_floating_point() else text_model.get_input_embeddings().weight
        for layer, block in zip(empty, text_model.blocks, strict=True):
            n_heads, d_key, d_value = sizes(block.mlstm_layer)
            for i, shape in enumerate(((d_key, d_value), (d_key,), (1,))):
                zeros = torch.zeros(len(tokens), n_heads, *shape, dtype=like.dtype, device=device_of(block))
                layer.lazy_initialization(recurrent_states=zeros, state_idx=i)
    return cache


def sizes(mixer: Any) -> tuple[int, int, int]:
    """``n_heads, d_key, d_value``; the config's own are rounded up to multiples of 64."""
    n_heads = mixer.config.num_heads
    return n_heads, mixer.qk_dim // n_heads, mixer.v_dim // n_heads


class MLSTMCall(KernelCall):
    """A call of ``xLSTMBackend.forward(self, query [batch, head, pos, d_key], key, value, igate [batch, head, pos],
    fgate, c_initial, n_initial, m_initial)``, which returns reads and ``(C, n, m)``."""

    state_argument = "c_initial"

    def __init__(self, family: Family, arguments: dict[str, Any]):
        super().__init__(family, arguments)
        self.normaliser: Tensor | None = None  # n [batch, head, d_key] and m [batch, head, 1] after the call
        self.stabiliser: Tensor | None = None

    def start_from(self, state: Tensor) -> None:
        """What remains of the model's own memory is copied: its cache changes it in place."""
        super().start_from(state)
        copies = {name: self.arguments[name].clone() for name in _PARTS[1:] if self.arguments.get(name) is not None}
        self.arguments |= copies

    def leave_out(self, padding: Bool[Tensor, "batch pos"]) -> None:
        """A token whose input gate is closed and whose forget gate is open leaves all three as they are."""
        gates = {"igate": -torch.inf, "fgate": torch.inf}
        closed = {name: self.arguments[name].masked_fill(padding[:, None], value) for name, value in gates.items()}
        self.arguments = self.arguments | closed

    def set(self, quantity: str, value: Tensor) -> None:
        super().set(quantity, value)
        if quantity in _RAW:
            self._known.clear()  # others follow from it

    def canonical(self, quantity: str, heads: Sequence[int] | None) -> Tensor:
        if quantity in _ARGUMENT:
            x = self.arguments[_ARGUMENT[quantity]].transpose(1, 2)
            return of_heads(x, heads, x.shape[2])
        get = lambda name: self.get(name, heads)  # noqa: E731
        if quantity == "q":
            return self._scaled(heads) / get("denominator")[..., None]
        if quantity == "k":
            return get("k_raw") if "k_raw" in self.changed else self.canonical("k_raw", heads)  # no memory in common
        if quantity == "denominator":
            read, _ = self._normalised(heads)
            least = (-get("m")[:, 1:]).exp().to(read.dtype)
            return torch.maximum(read.abs(), least) + self.arguments["self"].config.eps
        if quantity == "beta":
            return (get("igate") - get("m")[:, 1:]).exp().to(get("igate").dtype)
        if quantity == "log_decay":
            m, fgate = get("m"), get("fgate")
            return (F.logsigmoid(fgate.to(m.dtype)) + m[:, :-1] - m[:, 1:]).clamp_max(0).to(fgate.dtype)
        return self._stabilised(heads)

    def _scaled(self, heads: Sequence[int] | None) -> Tensor:
        q = self.get("q_raw", heads)
        return q * q.shape[-1] ** -0.5

    def _stabilised(self, heads: Sequence[int] | None) -> Tensor:
        """m before the call and after each token ``[batch, 1 + pos, head]``. Sums of gates over a whole text, whose
        differences count: in float64 where there is one."""
        igate, fgate = (self.get(name, heads) for name in ("igate", "fgate"))
        before, wide = self._part("m_initial", heads), widest(igate.device)
        first = igate.new_zeros(igate.shape[0], 1, igate.shape[2]) if before is None else before.mT
        kept = F.logsigmoid(fgate.to(wide)).cumsum(1)
        m = kept + torch.maximum(first.to(wide), (igate.to(wide) - kept).cummax(1).values)
        return torch.cat([first.to(wide), m], 1)

    def _normalised(self, heads: Sequence[int] | None) -> tuple[Tensor, Tensor]:
        """What each token reads of n, and n after the last: the recurrence itself, with 1 for the value."""
        before, log_decay = self._part("n_initial", heads), self.canonical("log_decay", heads)  # as the gates have them
        write = Write(self.get("k_raw", heads), self.canonical("beta", heads)[..., None])
        before = None if before is None else before[..., None]
        o, n = chunked(Recurrence(self._scaled(heads), log_decay), write, before)
        return o[..., 0], n[..., 0]

    def _part(self, name: str, heads: Sequence[int] | None) -> Tensor | None:
        """A part of the model's memory before the call, of some heads."""
        x = self.arguments.get(name)
        return x if x is None or heads is None else x[:, list(heads)]

    @property
    def initial_state(self) -> Tensor | None:
        return self.arguments.get(self.state_argument)

    @property
    def dtype(self) -> torch.dtype:
        return self.arguments["query"].dtype

    def run(self, native: Callable[..., Any]) -> tuple[Tensor, Tensor | None]:
        if self.changed.keys() - _OF_NATIVE:  # what is of the matrix alone
            return self.compute()
        changed = {_ARGUMENT[name]: x.to(self.dtype).transpose(1, 2) for name, x in self.changed.items()}
        arguments = self.arguments | changed
        if self.dtype in self.family.needs_memory and self.initial_state is None:
            batch, n_heads, _, d_key = arguments["query"].shape
            shapes = ((d_key, arguments["value"].shape[-1]), (d_key,), (1,))
            zeros = (arguments["query"].new_zeros(batch, n_heads, *shape) for shape in shapes)
            arguments |= dict(zip(_PARTS, zeros, strict=True))
        o, (state, self.normaliser, self.stabiliser) = native(**arguments)
        return o.transpose(1, 2), state

    def compute(self) -> tuple[Tensor, Tensor]:
        o, state = super().compute()
        _, self.normaliser = self._normalised(None)
        self.stabiliser = self.get("m")[:, -1:].mT.to(self.normaliser.dtype)
        return o, state

    def result(self, o: Tensor, state: Tensor | None) -> Any:
        return o.transpose(1, 2), (state, self.normaliser, self.stabiliser)


XLSTM = Family(
    name="mLSTM",
    rule=rules.MAMBA2,
    mixers={modeling("xlstm"): "xLSTMLayer"},
    kernels=("xLSTMBackend.forward",),
    sizes=sizes,
    raw=_RAW,
    norms=("multihead_norm",),
    seen_at={"z": "ogate_preact"},
    call=MLSTMCall,
    takes_cache=matrix_cache,
    rounds_within=32,  # it divides by a sum that nearly cancels where the read does
    layers="blocks",
    ignores_padding=True,
    needs_memory=(torch.bfloat16, torch.float16),  # transformers begins one in float32, and fails on a chunk
    cut_beyond="max_inference_chunksize",
    meanings={
        "q_raw": Quantity(PER_KEY, "the query, before its scale; it also reads the normaliser"),
        "k_raw": Quantity(PER_KEY, "the key, of the matrix and of the normaliser"),
        "igate": Quantity(PER_HEAD, "the input gate, before its exponential"),
        "fgate": Quantity(PER_HEAD, "the forget gate, before its sigmoid"),
        "denominator": Quantity(PER_HEAD, "what is read of the normaliser: what the read of the matrix is divided by"),
    },
    letters={
        "q": "scaled, and divided by the denominator",
        "k": "of the matrix alone",
        "beta": "exp(igate - m); of the matrix alone",
        "log_decay": "in units of the stabiliser m; of the matrix alone",
        "state": "C, in units of the stabiliser m",
        "z": "before its sigmoid",
    },
)
register(XLSTM)
