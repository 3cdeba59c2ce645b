"""The oracle for edits: dense matrices added to dense states, one token after the other. Slow, and plain to see right.

Nothing of `writesae` is used but for reading an SAE's weights. Two independent ways:

- `BruteForce` puts a python loop in the place of a modeling file's recurrence. The loop knows which layer runs, counts
  tokens, and edits the state of one head of one sequence.
- `cache_protocol` leaves the recurrence alone and feeds the model token by token; after each token it adds the matrix
  to the recurrent state in the model's cache (the paper's protocol, ``read="next"``).

The loop is one for every architecture. A `Rule` says what is its own: the functions that run its recurrence, what
their arguments mean and what they return, and what the memory erases at a token.

Each sequence of a batch has its own edits, so that one run serves many experiments.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from operator import attrgetter
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu, softplus

if TYPE_CHECKING:
    from architectures import Architecture

# Helpers of the modeling files that a wrapped model replaces too.
HELPERS = ("causal_conv1d_fn", "causal_conv1d_update", "mamba2_split_conv1d_scan_combined")


@dataclass(frozen=True)
class Now:
    """One head at one token of one sequence: what it writes natively, ``key value^T``, and three states. A token that
    takes several steps has a key and a value for each: what the step adds to a memory without a past.

    ``decayed`` and ``kept`` are the state before the token after its decay, and after its erase too.
    """

    key: Tensor  # [*step, d_key]
    value: Tensor  # [*step, d_value]
    decayed: Tensor  # [d_key, d_value]
    kept: Tensor

    @property
    def write(self) -> Tensor:
        return outer(self.key, self.value)

    @property
    def state(self) -> Tensor:
        return self.kept + self.write

    @property
    def delta(self) -> Tensor:
        return self.state - self.decayed


@dataclass(frozen=True)
class DenseEdit:
    """What happens to one head of one layer of one sequence.

    Attributes:
        layer, head: where.
        fn: for stage ``"write"``: ``fn(now, i) -> E``, the matrix to add, at the ``i``-th of the positions. For any
            other stage: what the quantity is to be, ``fn(value) -> value``.
        positions: which tokens, None for all.
        stage: ``write``, or the quantity that is changed: an input of the rule, state, o, z.
        read: ``"next"``: the token's own read does not see the matrix yet.
    """

    layer: int
    head: int
    fn: Callable[..., Tensor]
    positions: Sequence[int] | None = None
    stage: str = "write"
    read: str = "same"

    def index(self, position: int) -> int | None:
        """Which of the positions this is, None if none of them."""
        if self.positions is None:
            return 0
        return list(self.positions).index(position) if position in self.positions else None


@dataclass(frozen=True)
class DenseKnockout:
    """The reads of one head at ``targets`` (None: all) do not see what is left of what earlier ``sources`` wrote."""

    layer: int
    head: int
    sources: tuple[int, ...]
    targets: tuple[int, ...] | None


# Edits ---------------------------------------------------------------------------------------------------------------


def delete(now: Now, i: int) -> Tensor:
    return -now.write


def add(*matrices: Tensor, relative: float | None = None) -> Callable[[Now, int], Tensor]:
    """Add a matrix, or the i-th at the i-th position; ``relative``: at so many times the native write's norm."""

    def fn(now: Now, i: int) -> Tensor:
        M = matrices[i if len(matrices) > 1 else 0].double()
        return M if relative is None else relative * now.write.norm() * M / M.norm()

    return fn


def replace(*matrices: Tensor, relative: float | None = None) -> Callable[[Now, int], Tensor]:
    fn = add(*matrices, relative=relative)
    return lambda now, i: fn(now, i) - now.write


def substitute(sae: Any, *, atom: int | None = None, norm: str = "code") -> Callable[[Now, int], Tensor]:
    """The SAE's top atom at its activation for the native write, by dense products over all atoms."""
    V_enc, W_enc = (x.detach().double() for x in (sae.encoder.key, sae.encoder.value))
    V, W, bias = (x.detach().double() for x in (sae.V_dec, sae.W_dec, sae.b_enc))
    mean = 0.0 if sae.mean is None else sae.mean.double()

    def fn(now: Now, i: int) -> Tensor:
        X = getattr(now, sae.cfg.target) - mean
        pre = torch.stack([v @ X @ w for v, w in zip(V_enc, W_enc, strict=True)]) + bias
        top = int(pre.argmax())
        if pre[top] <= 0 or (atom is not None and top != atom):
            return torch.zeros_like(now.write)
        amount = pre[top] if norm == "code" else now.write.norm()
        return amount * torch.outer(V[top], W[top]) - now.write

    return fn


def recode(
    sae: Any, ablate: Sequence[int] = (), scale: Any = None, clamp: Any = None, error_term: bool = False
) -> Callable[[Now, int], Tensor]:
    """The whole reconstruction for what the SAE reads, or only the change, by dense products over all atoms."""
    V_enc, W_enc = (x.detach().double() for x in (sae.encoder.key, sae.encoder.value))
    V, W, bias = (x.detach().double() for x in (sae.V_dec, sae.W_dec, sae.b_enc))
    mean = 0.0 if sae.mean is None else sae.mean.double()
    constant = 0.0 if sae.constant is None else sae.constant.detach().double()

    def fn(now: Now, i: int) -> Tensor:
        X = getattr(now, sae.cfg.target)
        pre = torch.stack([v @ (X - mean) @ w for v, w in zip(V_enc, W_enc, strict=True)]) + bias
        before = torch.where(pre >= pre.topk(sae.cfg.k).values[-1], pre.clamp_min(0), 0)
        after = before.clone()
        for atom in ablate:
            after[atom] = 0
        for atom, factor in (scale or {}).items():
            after[atom] *= factor
        for atom, value in (clamp or {}).items():
            after[atom] = value if before[atom] > 0 else 0
        if error_term:
            return torch.einsum("a,ak,av->kv", after - before, V, W)
        return torch.einsum("a,ak,av->kv", after, V, W) + constant - X

    return fn


# The rules -----------------------------------------------------------------------------------------------------------

At = Mapping[str, Tensor]  # quantities of one token, [batch, head, ...]
READS = ("q", "read_weights")  # those that only read the state


@dataclass
class Call:
    """What one call of a native function means, in float64.

    Attributes:
        x: the quantities that enter the recurrence, ``[batch, pos, head, ...]``, each head with its own.
        S: the state before, ``[batch, head, d_key, d_value]``; None for zeros.
        answer: outputs ``[batch, pos, head, d_value]`` and final state -> what the mixer gets back.
        raw: what the function makes some of these of, before it normalises, ``[batch, pos, head, ...]``.
        normalised: what it makes of ``raw``.
    """

    x: dict[str, Tensor]
    S: Tensor | None
    answer: Callable[[Tensor, Tensor], Any]
    raw: dict[str, Tensor] = field(default_factory=dict)
    normalised: Callable[..., dict[str, Tensor]] = dict

    def state(self) -> Tensor:
        k, v = self.x["k"], self.x["v"]
        return k.new_zeros(k.shape[0], k.shape[2], k.shape[-1], v.shape[-1]) if self.S is None else self.S


@dataclass(frozen=True, eq=False)
class Rule:
    """An update rule.

    Attributes:
        name: of it.
        inputs: quantities that enter the recurrence, in the order in which their hooks fire.
        raw: what these are made of by the functions themselves; their hooks fire before.
        kernels: the functions of a modeling file that run it, and for each how to read a call.
        erase: a token's quantities, the state before it and that state decayed -> what is added to the latter, beside
            the write; None if nothing is.
        value: a token's quantities -> the value of its write, if that is not ``v`` or ``beta v``.
        decay_per_key: the decay is one number per row of the state, not one per head.
        transposed: the model keeps ``[head, d_value, d_key]``.
        columns: it keeps ``[head, d_key]``, or the heads of each call of a kernel apart.
        forgets: its kernel for many tokens begins at zero, whatever is in the cache.
        reads_before: a token reads the state as it was before the token.
        shares: the rule of other models whose mixers are read by the same adapter, and whose recurrence has all that
            this one's has: their full grid of tests stands for both.
    """

    name: str
    inputs: tuple[str, ...]
    kernels: Mapping[str, Callable[..., Call]]
    erase: Callable[[At, Tensor, Tensor], Tensor] | None = None
    value: Callable[[At], Tensor] | None = None
    decay_per_key: bool = False
    transposed: bool = False
    columns: bool = False
    forgets: bool = False
    reads_before: bool = False
    raw: tuple[str, ...] = ()
    shares: Rule | None = None

    def step(self, x: At, S: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """One token: key and value of its write, the state decayed, and that state after the erase."""
        decayed = S
        if "log_decay" in x:
            decay = x["log_decay"].exp()
            decayed = S * (decay[..., None] if self.decay_per_key else decay[..., None, None])
        kept = decayed if self.erase is None else decayed + self.erase(x, S, decayed)
        if self.value is not None:
            return x["k"], self.value(x), decayed, kept
        value = x["v"] * x["beta"][..., None] if "beta" in x else x["v"]
        return x["k"], value, decayed, kept

    def read(self, x: At, S: Tensor) -> Tensor:
        """What one token reads of a state: once, or several times, and then their weighted sum."""
        if "read_weights" not in x:
            return read_along(x["q"], S)
        several = zip(x["q"].unbind(2), x["read_weights"].unbind(2), strict=True)
        return torch.stack([weights * read_along(q, S) for q, weights in several]).sum(0)


def outer(key: Tensor, value: Tensor) -> Tensor:
    """``key value^T``, or with a key and a value for each of some steps, ``[..., step, d]``, their sum."""
    if key.ndim in (2, 4):
        return torch.einsum("...sk,...sv->...kv", key, value)
    return torch.einsum("...k,...v->...kv", key, value)


def read_along(key: Tensor, S: Tensor) -> Tensor:
    return torch.einsum("bhk,bhkv->bhv", key, S)


def delta_erase(x: At, S: Tensor, decayed: Tensor) -> Tensor:
    """``-beta k (k^T D S)``: what the memory holds along the key is replaced by the value (arXiv 2412.06464, eq. 10;
    with a decay per key channel, Kimi Linear, arXiv 2510.26692, eq. 1)."""
    return -outer(x["k"], x["beta"][..., None] * read_along(x["k"], decayed))


def delta_steps(x: At, S: Tensor, v: Tensor) -> list[Tensor]:
    """What each step of a token writes along its key from the state ``S``, erase and write one after the other (arXiv
    2502.10297)."""
    found = []
    for j in range(x["k"].shape[2]):
        k = x["k"][:, :, j]
        found.append(x["beta"][:, :, j, None] * (v[:, :, j] - read_along(k, S)))
        S = S + outer(k, found[-1])
    return found


def product_erase(x: At, S: Tensor, decayed: Tensor) -> Tensor:
    return outer(x["k"], torch.stack(delta_steps(x, decayed, torch.zeros_like(x["v"])), 2))


def product_value(x: At) -> Tensor:
    """What each step writes where nothing was before the token."""
    return torch.stack(delta_steps(x, torch.zeros_like(outer(x["k"], x["v"])), x["v"]), 2)


def comba_erase(x: At, S: Tensor, decayed: Tensor) -> Tensor:
    """``-beta k (p^T S)``, which reads the state before its decay (arXiv 2506.02475)."""
    return -outer(x["k"], x["beta"][..., None] * read_along(x["kappa"], S))


def gdn2_erase(x: At, S: Tensor, decayed: Tensor) -> Tensor:
    """``-k ((b * k)^T D S)``, with an erase gate ``b`` of each key channel (fla/layers/gdn2.py)."""
    return -outer(x["k"], read_along(x["erase_gate"] * x["k"], decayed))


def rwkv7_erase(x: At, S: Tensor, decayed: Tensor) -> Tensor:
    """``-(kappa iclr)(kappa^T S)``, which reads the state before its decay (arXiv 2503.14456, eq. 17)."""
    return -outer(x["kappa"] * x["iclr"], read_along(x["kappa"], S))


def for_each_head(x: Tensor, n_heads: int) -> Tensor:
    """``x [batch, pos, group, ...]`` with each group copied for the heads that it serves, side by side."""
    return x[:, :, [h * x.shape[2] // n_heads for h in range(n_heads)]]


def delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    **_: Any,
) -> Call:
    """transformers' functions of Gated DeltaNet and of Kimi delta attention."""
    raw = {name: for_each_head(x.double(), value.shape[2]) for name, x in (("q_raw", query), ("k_raw", key))}

    def normalised(q_raw: Tensor, k_raw: Tensor) -> dict[str, Tensor]:
        q, k = q_raw, k_raw
        if use_qk_l2norm_in_kernel:
            q, k = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
        return dict(q=q / q.shape[-1] ** 0.5, k=k)

    return Call(
        normalised(**raw) | dict(v=value.double(), beta=beta.double(), log_decay=g.double()),
        None if initial_state is None else initial_state.double(),
        lambda o, S: (o.to(query.dtype), S.float() if output_final_state else None),
        raw,
        normalised,
    )


def mamba2_chunk_scan(
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    **_: Any,
) -> Call:
    """``S = exp(dt A) S + B (dt x)^T``, and beside the memory ``D x`` (Mamba-2, arXiv 2405.21060)."""
    n_heads, x = hidden_states.shape[2], hidden_states.double()
    dt = dt.double() + (0 if dt_bias is None else dt_bias.double())
    dt = (softplus(dt) if dt_softplus else dt).clamp(*dt_limit)
    skip = 0 if D is None else D.double()[:, None] * x

    def answer(o: Tensor, S: Tensor) -> Any:
        o = (o + skip).float()  # transformers computes in float32 here and hands that on
        return (o, S.mT.float().contiguous()) if return_final_states else o

    return Call(
        dict(
            q=for_each_head(C.double(), n_heads),
            k=for_each_head(B.double(), n_heads),
            v=x.clone(),
            beta=dt,
            log_decay=dt * A.double(),
        ),
        None if initial_states is None else initial_states.double().mT,
        answer,
    )


def mamba2_selective_state_update(
    state: Tensor,
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    z: Tensor | None = None,
    **_: Any,
) -> Call:
    """One token, with the state updated in place. What is one number per head comes copied over the head's channels."""
    first = lambda x: None if x is None else x[..., 0]  # noqa: E731
    call = mamba2_chunk_scan(
        hidden_states[:, None], first(dt)[:, None], A[:, 0, 0], B[:, None], C[:, None], 1, first(D), first(dt_bias),
        initial_states=state, dt_softplus=dt_softplus,
    )  # fmt: skip

    def answer(o: Tensor, S: Tensor) -> Tensor:
        state.copy_(S.mT)
        o = call.answer(o, S)[:, 0]
        return (o if z is None else o * silu(z)).to(hidden_states.dtype)

    return Call(call.x, call.S, answer)


def mamba_selective_scan(
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    **_: Any,
) -> Call:
    """``h_cn = exp(dt_c A_cn) h_cn + dt_c B_n x_c``, and beside the memory ``D x`` and a gate (Mamba, arXiv
    2312.00752): each channel is a head, with one column."""
    x, dt = hidden_states.double().mT, dt.double().mT
    dt = dt + (0 if delta_bias is None else delta_bias.double())
    dt = softplus(dt) if delta_softplus else dt
    of_all = lambda y: y.double().mT[:, :, None].repeat(1, 1, x.shape[2], 1)  # noqa: E731
    skip = 0 if D is None else D.double() * x

    def answer(o: Tensor, S: Tensor) -> Any:
        y = (o[..., 0] + skip).mT
        y = (y if z is None else y * silu(z.double())).float()
        return (y, S[..., 0].float()) if return_last_state else y

    x_, quantities = x.clone()[..., None], dict(q=of_all(C), k=of_all(B))
    return Call(quantities | dict(v=x_, beta=dt, log_decay=dt[..., None] * A.double()), None, answer)


def mamba_selective_state_update(
    state: Tensor,
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    **_: Any,
) -> Call:
    """One token, with the state updated in place."""
    last = lambda x: None if x is None else x[..., None]  # noqa: E731
    call = mamba_selective_scan(*map(last, (hidden_states, dt)), A, last(B), last(C), D, last(z), dt_bias, dt_softplus)

    def answer(o: Tensor, S: Tensor) -> Tensor:
        state.copy_(S[..., 0])
        return call.answer(o, S)[..., 0].to(hidden_states.dtype)

    return Call(call.x, state.double()[..., None], answer)


def lightning(
    mixer: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    past_key_values: Any = None,
    **_: Any,
) -> Call:
    """MiniMax's mixer as a whole: linear attention with one fixed decay per head (arXiv 2501.08313, eq. 9)."""
    qkv = mixer.act_fn(mixer.qkv_proj(hidden_states))
    qkv = qkv if attention_mask is None else qkv * attention_mask[..., None]
    q, k, v = qkv.double().unflatten(-1, (mixer.num_attention_heads, -1)).split(mixer.head_dim, -1)
    state = None if past_key_values is None else past_key_values.get_linear_cache(mixer.layer_idx)
    gate = mixer.output_gate(hidden_states).sigmoid()

    def answer(o: Tensor, S: Tensor) -> Any:
        if past_key_values is not None:
            past_key_values.set_linear_cache(mixer.layer_idx, S.to(hidden_states.dtype))
        return mixer.out_proj(gate * mixer.norm(o.flatten(2).to(hidden_states.dtype))), S

    log_decay = -mixer.slope_rate[:, 0, 0].double().expand(q.shape[:3]).clone()
    return Call(dict(q=q, k=k, v=v, log_decay=log_decay), None if state is None else state.double(), answer)


def mlstm(
    backend: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    igate: Tensor,
    fgate: Tensor,
    c_initial: Tensor | None = None,
    n_initial: Tensor | None = None,
    m_initial: Tensor | None = None,
    **_: Any,
) -> Call:
    """The cell of xLSTM (arXiv 2405.04517, eq. 19 to 27; stabilised as in its appendix): the matrix and its normaliser
    in units of ``exp(m)``. What is read of the matrix is divided by what is read of the normaliser, so ``q`` is."""
    raw = {
        name: x.double().transpose(1, 2) for name, x in dict(q_raw=query, k_raw=key, igate=igate, fgate=fgate).items()
    }
    after: list[Tensor] = []

    def normaliser(q_raw: Tensor, k_raw: Tensor, igate: Tensor, fgate: Tensor) -> dict[str, Tensor]:
        n = torch.zeros_like(k_raw[:, 0]) if n_initial is None else n_initial.double()
        m = torch.zeros_like(igate[:, 0]) if m_initial is None else m_initial.double()[..., 0]
        found: dict[str, list[Tensor]] = {"beta": [], "log_decay": [], "denominator": []}
        for t in range(q_raw.shape[1]):
            kept = fgate[:, t].sigmoid().log() + m
            m = torch.maximum(kept, igate[:, t])
            beta, log_decay = (igate[:, t] - m).exp(), kept - m
            n = log_decay.exp()[..., None] * n + beta[..., None] * k_raw[:, t]
            read = (n * q_raw[:, t]).sum(-1) / q_raw.shape[-1] ** 0.5
            found["beta"].append(beta)
            found["log_decay"].append(log_decay)
            found["denominator"].append(torch.maximum(read.abs(), (-m).exp()) + backend.config.eps)
        after[:] = n, m[..., None]
        return {name: torch.stack(x, 1) for name, x in found.items()}

    raw["denominator"] = native = normaliser(**raw)["denominator"]

    def normalised(denominator: Tensor, **raw: Tensor) -> dict[str, Tensor]:
        x = normaliser(**raw)
        whole = x.pop("denominator")
        whole = torch.where(denominator == native, whole, denominator)  # an edit of it comes last
        return x | dict(q=raw["q_raw"] / raw["q_raw"].shape[-1] ** 0.5 / whole[..., None], k=raw["k_raw"].clone())

    def answer(o: Tensor, S: Tensor) -> Any:
        return o.transpose(1, 2).to(query.dtype), tuple(x.float() for x in (S, *after))

    quantities = normalised(**raw) | dict(v=value.double().transpose(1, 2))
    return Call(quantities, None if c_initial is None else c_initial.double(), answer, raw, normalised)


def canonical(initial_state: Tensor | None = None, output_final_state: bool = False, **x: Tensor) -> Call:
    """The functions of our own models, whose arguments are the quantities themselves."""
    return Call(
        {name: value.double() for name, value in x.items()},
        None if initial_state is None else initial_state.double(),
        lambda o, S: (o.to(x["q"].dtype), S.float() if output_final_state else None),
    )


GATED_DELTA = Rule(
    "gated_delta",
    ("q", "k", "v", "beta", "log_decay"),
    dict.fromkeys(("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"), delta_rule),
    delta_erase,
    raw=("q_raw", "k_raw"),
)
KDA = Rule(
    "kimi_delta",
    ("q", "k", "v", "beta", "log_decay"),
    dict.fromkeys(("chunk_kimi_delta_attention", "recurrent_kimi_delta_attention"), delta_rule),
    delta_erase,
    decay_per_key=True,
    raw=("q_raw", "k_raw"),
)
MAMBA2 = Rule(
    "mamba2",
    ("q", "k", "v", "beta", "log_decay"),
    {f.__name__: f for f in (mamba2_chunk_scan, mamba2_selective_state_update)},
    transposed=True,
)
MAMBA1 = Rule(
    "mamba1",
    ("q", "k", "v", "beta", "log_decay"),
    {f.__name__: f for f in (mamba_selective_scan, mamba_selective_state_update)},
    decay_per_key=True,
    columns=True,
    forgets=True,
)
DELTA_PRODUCT = Rule(
    "delta_product",
    ("q", "k", "v", "beta", "log_decay"),
    {"delta_product_recurrence": canonical},
    product_erase,
    product_value,
)
MAMBA3 = Rule("mamba3", ("q", "k", "v", "beta", "log_decay"), {"mamba3_recurrence": canonical}, shares=DELTA_PRODUCT)
MAMBA3_MIMO = Rule(
    "mamba3_mimo",
    ("q", "k", "v", "beta", "log_decay", "read_weights"),
    {"mamba3_mimo_recurrence": canonical},
)
MLSTM = Rule(
    "mamba2",
    ("q", "k", "v", "beta", "log_decay"),
    {"xLSTMBackend.forward": mlstm},
    raw=("q_raw", "k_raw", "igate", "fgate", "denominator"),
)
RWKV6 = Rule(
    "rwkv6", ("q", "k", "v", "log_decay"), {"rwkv6_recurrence": canonical}, decay_per_key=True, reads_before=True
)
RWKV7 = Rule(
    "rwkv7",
    ("q", "k", "v", "log_decay", "kappa", "iclr"),
    {"rwkv7_recurrence": canonical},
    rwkv7_erase,
    decay_per_key=True,
)
GDN2 = Rule(
    "gdn2",
    ("q", "k", "v", "log_decay", "erase_gate", "write_gate"),
    {"gdn2_recurrence": canonical},
    gdn2_erase,
    lambda x: x["write_gate"] * x["v"],
    decay_per_key=True,
    shares=RWKV7,
)
FLA_GATED_DELTA = Rule(
    "gated_delta",
    ("q", "k", "v", "beta", "log_decay"),
    {"gated_delta_rule_recurrence": canonical},
    delta_erase,
    shares=DELTA_PRODUCT,
)
FLA_KDA = Rule(
    "kimi_delta",
    ("q", "k", "v", "beta", "log_decay"),
    {"kda_recurrence": canonical},
    delta_erase,
    decay_per_key=True,
    shares=RWKV7,
)
COMBA = Rule(
    "comba",
    ("q", "k", "v", "beta", "log_decay", "kappa"),
    {"comba_recurrence": canonical},
    comba_erase,
    shares=DELTA_PRODUCT,
)
DELTA_NET = Rule(
    "delta", ("q", "k", "v", "beta"), {"delta_rule_recurrence": canonical}, delta_erase, shares=DELTA_PRODUCT
)
GLA = Rule("gla", ("q", "k", "v", "log_decay"), {"gla_recurrence": canonical}, decay_per_key=True)
SIMPLE_GLA = Rule("simple_gla", ("q", "k", "v", "log_decay"), {"retention_recurrence": canonical}, shares=GLA)
LIGHTNING = Rule("simple_gla", ("q", "k", "v", "log_decay"), {"MiniMaxLightningAttention.forward": lightning})
LINEAR_ATTENTION = Rule("linear_attention", ("q", "k", "v"), {"linear_attn_recurrence": canonical}, shares=GLA)


# The loop in the model's place ---------------------------------------------------------------------------------------


def native(function: Callable[..., Any]) -> Callable[..., Any]:
    """A modeling file's own function, also if it has been intercepted."""
    return getattr(getattr(function, "writesae", None), "function", function)


def function_of(module: ModuleType, name: str) -> Callable[..., Any]:
    """A function of a modeling file, or a method of a class in it, ``Class.method``."""
    return attrgetter(name)(module)


@contextmanager
def replaced(module: ModuleType, **functions: Callable[..., Any]) -> Iterator[None]:
    """The module with other functions in it while the block runs."""
    before = {name: function_of(module, name) for name in functions}

    def put(those: Mapping[str, Callable[..., Any]]) -> None:
        for name, function in those.items():
            owner, _, last = name.rpartition(".")
            setattr(attrgetter(owner)(module) if owner else module, last, function)

    try:
        put(functions)
        yield
    finally:
        put(before)


@contextmanager
def untouched(a: Architecture) -> Iterator[None]:
    """The modeling file as its authors have it, whatever has been wrapped."""
    names = [*a.rule.kernels, *(name for name in HELPERS if hasattr(a.modeling, name))]
    with replaced(a.modeling, **{name: native(function_of(a.modeling, name)) for name in names}):
        yield


@contextmanager
def layer_watch(a: Architecture, model: nn.Module, tell: Callable[[int], None]) -> Iterator[None]:
    """Calls ``tell(layer)`` before each recurrent layer runs."""
    handles = [
        mixer.register_forward_pre_hook(lambda _m, _a, layer=layer: tell(layer))
        for layer, mixer in a.mixers(model).items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class BruteForce:
    """``with BruteForce(architecture, model, edits): model(...)``, also in pieces with a cache; once for a sequence.

    Args:
        a: architecture of the model.
        model: a model that nobody wrapped.
        edits: for each sequence of the batch.
    """

    def __init__(self, a: Architecture, model: nn.Module, edits: Sequence[Sequence[DenseEdit | DenseKnockout]]):
        self.a, self.model = a, model
        self.by_layer: dict[int, list[tuple[int, DenseEdit]]] = {layer: [] for layer in a.layers}
        self.knockouts: dict[int, list[tuple[int, DenseKnockout]]] = {layer: [] for layer in a.layers}
        self.left: dict[tuple[int, DenseKnockout], Tensor] = {}  # of what a knockout's sources wrote, in the state
        for row, items in enumerate(edits):
            for edit in items:
                kind: Any = self.knockouts if isinstance(edit, DenseKnockout) else self.by_layer
                kind[edit.layer].append((row, edit))
        self.seen = dict.fromkeys(self.by_layer, 0)  # tokens that each layer has had
        self.n_rows = len(edits)
        self.layer = self.first = -1  # the running layer, and the position of its call's first token
        self.head = 0  # the first of the call's heads
        self.kept: dict[tuple[int, int], Tensor] = {}  # states after the last call, for kernels that forget them

    def __enter__(self) -> BruteForce:
        def tell(layer: int) -> None:
            self.layer, self.first, self.head = layer, self.seen[layer], 0

        def kernel(read: Callable[..., Call]) -> Callable[..., Any]:
            return lambda *args, **kwargs: self.run(read(*args, **kwargs))

        kernels = {name: kernel(read) for name, read in self.a.rule.kernels.items()}
        self.stack = ExitStack()
        self.stack.enter_context(replaced(self.a.modeling, **kernels))
        self.stack.enter_context(layer_watch(self.a, self.model, tell))
        for mixer in self.a.mixers(self.model).values():
            if self.a.gate:
                handle = getattr(mixer, self.a.gate).register_forward_pre_hook(
                    lambda _norm, args: (args[0], self.changed("z", args[1]), *args[2:])
                )
                self.stack.callback(handle.remove)
            for stage, name in self.a.outputs.items():
                if hasattr(mixer, name):
                    handle = getattr(mixer, name).register_forward_hook(
                        lambda _module, _args, output, stage=stage: self.changed(stage, output)
                    )
                    self.stack.callback(handle.remove)
        return self

    def __exit__(self, *exception: object) -> None:
        self.stack.close()

    def here(self, t: int) -> list[tuple[int, DenseEdit, int]]:
        """Row, edit and index of position, for the running layer's edits that act at the call's token ``t``."""
        found = [(row, edit, edit.index(self.first + t)) for row, edit in self.by_layer[self.layer]]
        return [(row, edit, i) for row, edit, i in found if i is not None]

    def of_call(self, t: int, n_heads: int) -> list[tuple[int, DenseEdit, int]]:
        """The same, of the call's heads, which count from its first."""
        found = [(row, _shifted(edit, self.head), i) for row, edit, i in self.here(t)]
        return [(row, edit, i) for row, edit, i in found if 0 <= edit.head < n_heads]

    def run(self, call: Call) -> Any:
        n_heads, place = call.x["v"].shape[2], (self.layer, self.head)
        if self.a.rule.forgets and self.first and call.S is None:
            call.S = self.kept[place]
        S, x, outputs = call.state(), {name: value.clone() for name, value in call.x.items()}, []
        n_pos, raw = x["q"].shape[1], {name: value.clone() for name, value in call.raw.items()}
        for t in range(n_pos):
            for row, edit, _i in self.of_call(t, n_heads):
                if edit.stage in raw:
                    raw[edit.stage][row, t, edit.head] = edit.fn(raw[edit.stage][row, t, edit.head])
        x |= call.normalised(**raw)
        for t in range(n_pos):
            here = self.of_call(t, n_heads)
            for row, edit, _i in here:
                if edit.stage in x:
                    value = x[edit.stage]
                    value[row, t, edit.head] = edit.fn(value[row, t, edit.head])
            at = {name: value[:, t] for name, value in x.items()}
            key, value, decayed, kept = self.a.rule.step(at, S)
            before, S = S, kept + outer(key, value)
            after_the_read = []
            for row, edit, i in here:
                if edit.stage == "write":
                    h = edit.head
                    E = edit.fn(Now(key[row, h], value[row, h], decayed[row, h], kept[row, h]), i)
                    if edit.read == "same":
                        S[row, h] += E
                    else:
                        after_the_read.append((row, h, E))
            for row, edit, _i in here:
                if edit.stage == "state":
                    S[row, edit.head] = edit.fn(S[row, edit.head])
            o = self.a.rule.read(at, before if self.a.rule.reads_before else S)
            self.knock_out(at, outer(key, value), o, self.first + t)
            for row, edit, _i in here:
                if edit.stage == "o":
                    o[row, edit.head] = edit.fn(o[row, edit.head])
            for row, h, E in after_the_read:
                S[row, h] += E
            outputs.append(o)
        self.kept[place] = S
        self.head += n_heads
        if self.head == self.a.n_heads:
            self.seen[self.layer] += n_pos
        return call.answer(torch.stack(outputs, 1), S)

    def knock_out(self, at: At, written: Tensor, o: Tensor, position: int) -> None:
        """Take what the sources of knockouts wrote out of the reads of their targets, and keep it for later ones."""
        for row, whole in self.knockouts[self.layer]:
            edit = _shifted(whole, self.head)
            if not 0 <= edit.head < written.shape[1]:
                continue
            before = self.left.get((row, whole), torch.zeros_like(written))
            *_, left = self.a.rule.step(at, before)
            if edit.targets is None or position in edit.targets:
                seen = before if self.a.rule.reads_before else left
                o[row, edit.head] -= self.a.rule.read(at, seen)[row, edit.head]
            self.left[row, whole] = left + written if position in edit.sources else left

    def changed(self, stage: str, value: Tensor) -> Tensor:
        """A quantity outside of the recurrence; tokens, heads and channels may be flattened together."""
        changed = value.reshape(self.n_rows, -1, self.a.n_heads, *self.a.shape(stage)).clone()
        for t in range(changed.shape[1]):
            for row, edit, _i in self.here(t):
                if edit.stage == stage:
                    changed[row, t, edit.head] = edit.fn(changed[row, t, edit.head])
        return changed.reshape(value.shape)


def _shifted(edit: Any, first: int) -> Any:
    """The same edit in a call whose heads begin at ``first``."""
    return dataclasses.replace(edit, head=edit.head - first) if first else edit


@torch.no_grad()
def brute_force(
    a: Architecture, model: Any, ids: Tensor, edits: Sequence[Sequence[DenseEdit | DenseKnockout]]
) -> Tensor:
    """Logits ``[batch, pos, vocab]`` of whole sequences, each with its own edits."""
    with BruteForce(a, model, edits):
        return model(input_ids=ids, use_cache=False).logits


@torch.no_grad()
def cache_protocol(a: Architecture, model: Any, ids: Tensor, edits: Sequence[Sequence[DenseEdit]]) -> Tensor:
    """Logits of the model fed token by token, with matrices added to the cached states after each token's pass."""
    seen: dict[int, tuple[Tensor, ...]] = {}  # what the token's step was, by layer
    layer = -1

    def tell(now: int) -> None:
        nonlocal layer
        layer = now

    def watched(read: Callable[..., Call], function: Callable[..., Any]) -> Callable[..., Any]:
        def kernel(*args: Any, **kwargs: Any) -> Any:
            call = read(*args, **kwargs)
            now = a.rule.step({name: value[:, 0] for name, value in call.x.items()}, call.state())
            before = seen.get(layer)  # of the other heads, if each call is of some
            whole = before is None or before[0].shape[1] == a.n_heads
            seen[layer] = now if whole else tuple(torch.cat(pair, 1) for pair in zip(before, now, strict=True))
            return function(*args, **kwargs)

        return kernel

    cache, logits = a.new_cache(model), []
    kernels = {name: watched(read, native(function_of(a.modeling, name))) for name, read in a.rule.kernels.items()}
    with replaced(a.modeling, **kernels), layer_watch(a, model, tell):
        for t in range(ids.shape[1]):
            logits.append(model(input_ids=ids[:, t : t + 1], use_cache=True, **cache, **a.place(t, 1)).logits)
            for row, items in enumerate(edits):
                for edit in items:
                    i, h = edit.index(t), edit.head
                    if i is None:
                        continue
                    assert edit.stage == "write" and edit.read == "next", (
                        "a cached state can only be edited after a read"
                    )
                    now = Now(*(part[row, h] for part in seen[edit.layer]))
                    a.slot(*cache.values(), edit.layer)[row, h] += edit.fn(now, i).float()
    return torch.cat(logits, 1)
