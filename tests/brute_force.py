"""The oracle for edits: dense matrices added to dense states, one token after the other. Slow, and plain to see right.

Nothing of `writesae` is used but for reading an SAE's weights. Two independent ways:

- `BruteForce` puts a python loop in the place of a modeling file's recurrence. The loop knows which layer runs, counts
  tokens, and edits the state of one head of one sequence.
- `cache_protocol` leaves the recurrence alone and feeds the model token by token; after each token it adds the matrix
  to the recurrent state in the model's cache (the paper's protocol, ``read="next"``).

Each sequence of a batch has its own edits, so that one run serves many experiments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

KERNELS = ("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule")


@dataclass(frozen=True)
class Now:
    """One head at one token of one sequence: key, value, gate and decay of the token, and the state before it."""

    k: Tensor  # [d_key], of length 1
    v: Tensor  # [d_value]
    beta: Tensor
    decay: Tensor
    S: Tensor  # [d_key, d_value]

    @property
    def write(self) -> Tensor:
        return torch.outer(self.k, self.beta * self.v)

    @property
    def delta(self) -> Tensor:
        return torch.outer(self.k, self.beta * (self.v - self.decay * self.S.T @ self.k))

    @property
    def state(self) -> Tensor:
        return self.decay * self.S + self.delta


@dataclass(frozen=True)
class DenseEdit:
    """What happens to one head of one layer of one sequence.

    Attributes:
        layer, head: where.
        fn: for stage ``"write"``: ``fn(now, i) -> E``, the matrix to add, at the ``i``-th of the positions. For any
            other stage: what the quantity is to be, ``fn(value) -> value``.
        positions: which tokens, None for all.
        stage: ``write``, or the quantity that is changed: q, k, v, beta, log_decay, state, o, z.
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
        if position < 0:
            return None
        if self.positions is None:
            return 0
        return list(self.positions).index(position) if position in self.positions else None


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
    V_enc, W_enc = (x.detach().double() for x in sae.encoder())
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


# The loop in the model's place ---------------------------------------------------------------------------------------


def native(function: Callable[..., Any]) -> Callable[..., Any]:
    """A modeling file's own function, also if it has been intercepted."""
    return getattr(function, "writesae_native", function)


@contextmanager
def replaced(module: ModuleType, **functions: Callable[..., Any]) -> Iterator[None]:
    """The module with other functions in it while the block runs."""
    before = {name: getattr(module, name) for name in functions}
    try:
        for name, function in functions.items():
            setattr(module, name, function)
        yield
    finally:
        for name, function in before.items():
            setattr(module, name, function)


@contextmanager
def untouched(module: ModuleType) -> Iterator[None]:
    """The modeling file as transformers has it, whatever has been wrapped."""
    names = [*KERNELS, "causal_conv1d_fn", "causal_conv1d_update"]
    with replaced(module, **{name: native(getattr(module, name)) for name in names}):
        yield


def mixers(model: nn.Module) -> dict[int, nn.Module]:
    return {int(m.layer_idx): m for m in model.modules() if hasattr(m, "A_log")}


@contextmanager
def layer_watch(model: nn.Module, tell: Callable[[int], None]) -> Iterator[None]:
    """Calls ``tell(layer)`` before each recurrent layer runs."""
    handles = [
        mixer.register_forward_pre_hook(lambda _m, _a, layer=layer: tell(layer))
        for layer, mixer in mixers(model).items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def canonical(
    query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, use_qk_l2norm_in_kernel: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What enters the recurrence, in float64: each key head copied for the value heads that it serves, side by side."""
    heads = [h // (value.shape[2] // key.shape[2]) for h in range(value.shape[2])]
    q, k = query.double()[:, :, heads], key.double()[:, :, heads]
    if use_qk_l2norm_in_kernel:
        q, k = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
    return q / q.shape[-1] ** 0.5, k, value.double().clone(), g.double().clone(), beta.double().clone()


class BruteForce:
    """``with BruteForce(model, modeling, edits): model(...)``, also in pieces with a cache; one use for one sequence.

    Args:
        model: a transformers model that nobody wrapped.
        modeling: its modeling file.
        edits: for each sequence of the batch.
        left: padding tokens before each sequence.
    """

    def __init__(
        self,
        model: nn.Module,
        modeling: ModuleType,
        edits: Sequence[Sequence[DenseEdit]],
        left: Sequence[int] | None = None,
    ):
        self.model, self.modeling = model, modeling
        self.left = list(left or [0] * len(edits))
        self.by_layer: dict[int, list[tuple[int, DenseEdit]]] = {layer: [] for layer in mixers(model)}
        for row, items in enumerate(edits):
            for edit in items:
                self.by_layer[edit.layer].append((row, edit))
        self.seen = dict.fromkeys(self.by_layer, 0)  # tokens that each layer has had
        self.layer = -1

    def __enter__(self) -> BruteForce:
        def tell(layer: int) -> None:
            self.layer = layer

        self.parts = [
            replaced(self.modeling, **dict.fromkeys(KERNELS, self.kernel)),
            layer_watch(self.model, tell),
        ]
        for part in self.parts:
            part.__enter__()
        norms = [getattr(m, "norm", None) or m.o_norm for m in mixers(self.model).values()]
        self.handles = [norm.register_forward_pre_hook(self.gate) for norm in norms]
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self.handles:
            handle.remove()
        for part in reversed(self.parts):
            part.__exit__(None, None, None)

    def here(self, column: int) -> list[tuple[int, DenseEdit, int]]:
        """Row, edit and index of position, for the running layer's edits that act at a column of the batch."""
        found = []
        for row, edit in self.by_layer[self.layer]:
            i = edit.index(column - self.left[row])
            if i is not None:
                found.append((row, edit, i))
        return found

    def kernel(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        g: Tensor,
        beta: Tensor,
        initial_state: Tensor | None = None,
        output_final_state: bool = False,
        use_qk_l2norm_in_kernel: bool = False,
        **_: Any,
    ) -> tuple[Tensor, Tensor | None]:
        q, k, v, g, beta = canonical(query, key, value, g, beta, use_qk_l2norm_in_kernel)
        inputs = {"q": q, "k": k, "v": v, "beta": beta, "log_decay": g}
        batch, n_pos, n_heads, d_key = q.shape
        S = torch.zeros(batch, n_heads, d_key, v.shape[-1], dtype=torch.float64)
        if initial_state is not None:
            S = initial_state.double()
        outputs = []
        self.first = self.seen[self.layer]
        for t in range(n_pos):
            here = self.here(self.first + t)
            for row, edit, _i in here:
                if edit.stage in inputs:
                    x = inputs[edit.stage]
                    x[row, t, edit.head] = edit.fn(x[row, t, edit.head])
            before, decay = S, g[:, t].exp()
            S = decay[..., None, None] * S
            expected = torch.einsum("bhkv,bhk->bhv", S, k[:, t])
            S = S + torch.einsum("bhk,bhv->bhkv", k[:, t], beta[:, t, :, None] * (v[:, t] - expected))
            after_the_read = []
            for row, edit, i in here:
                if edit.stage == "write":
                    h = edit.head
                    E = edit.fn(Now(k[row, t, h], v[row, t, h], beta[row, t, h], decay[row, h], before[row, h]), i)
                    if edit.read == "same":
                        S[row, h] += E
                    else:
                        after_the_read.append((row, h, E))
            for row, edit, _i in here:
                if edit.stage == "state":
                    S[row, edit.head] = edit.fn(S[row, edit.head])
            o = torch.einsum("bhkv,bhk->bhv", S, q[:, t])
            for row, edit, _i in here:
                if edit.stage == "o":
                    o[row, edit.head] = edit.fn(o[row, edit.head])
            for row, h, E in after_the_read:
                S[row, h] += E
            outputs.append(o)
        self.seen[self.layer] += n_pos
        return torch.stack(outputs, 1).to(query.dtype), S.float() if output_final_state else None

    def gate(self, _norm: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The gated norm gets outputs and gates of all sequences, tokens and heads one below the other."""
        o, z, *rest = args
        changed = z.unflatten(0, (len(self.left), -1, mixers(self.model)[self.layer].num_v_heads)).clone()
        for t in range(changed.shape[1]):
            for row, edit, _i in self.here(self.first + t):
                if edit.stage == "z":
                    changed[row, t, edit.head] = edit.fn(changed[row, t, edit.head])
        return (o, changed.reshape(z.shape), *rest)


@torch.no_grad()
def brute_force(model: nn.Module, modeling: ModuleType, ids: Tensor, edits: Sequence[Sequence[DenseEdit]]) -> Tensor:
    """Logits ``[batch, pos, vocab]`` of whole sequences, each with its own edits."""
    with BruteForce(model, modeling, edits):
        return model(input_ids=ids, use_cache=False).logits


@torch.no_grad()
def cache_protocol(model: nn.Module, modeling: ModuleType, ids: Tensor, edits: Sequence[Sequence[DenseEdit]]) -> Tensor:
    """Logits of the model fed token by token, with matrices added to the cached states after each token's pass."""
    seen: dict[int, tuple[Tensor, ...]] = {}
    layer = -1

    def tell(now: int) -> None:
        nonlocal layer
        layer = now

    def watched(function: Callable[..., Any]) -> Callable[..., Any]:
        def kernel(query, key, value, g, beta, initial_state=None, use_qk_l2norm_in_kernel=False, **kwargs):
            _, k, v, log_decay, b = canonical(query, key, value, g, beta, use_qk_l2norm_in_kernel)
            S = torch.zeros(k.shape[0], k.shape[2], k.shape[3], v.shape[3], dtype=torch.float64)
            seen[layer] = (k, v, log_decay, b, S if initial_state is None else initial_state.double().clone())
            kwargs |= dict(initial_state=initial_state, use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel)
            return function(query, key, value, g=g, beta=beta, **kwargs)

        return kernel

    cache, logits = DynamicCache(config=model.config), []
    functions = {name: watched(native(getattr(modeling, name))) for name in KERNELS}
    with replaced(modeling, **functions), layer_watch(model, tell):
        for t in range(ids.shape[1]):
            logits.append(model(input_ids=ids[:, t : t + 1], past_key_values=cache, use_cache=True).logits)
            for row, items in enumerate(edits):
                for edit in items:
                    i, h = edit.index(t), edit.head
                    if i is None:
                        continue
                    assert edit.stage == "write" and edit.read == "next", (
                        "a cached state can only be edited after a read"
                    )
                    k, v, log_decay, b, S = seen[edit.layer]
                    now = Now(k[row, 0, h], v[row, 0, h], b[row, 0, h], log_decay[row, 0, h].exp(), S[row, h])
                    cache.layers[edit.layer].recurrent_states[0][row, h] += edit.fn(now, i).float()
    return torch.cat(logits, 1)
