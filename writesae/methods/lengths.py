"""How long each head remembers, what it reads, and how much its memory holds.

A write ``k v^T`` stays of rank 1 while it is in the memory: decay and erase act on its key alone. So how much of it is
left after some tokens is the length of a vector, and nothing of size ``[d_key, d_value]`` is needed for it. Who reads
whom is asked for some reads at once, by the recurrence run backwards from them (`kernels.adjoint`): a number for each
earlier token and each of these reads, and no square of the text's length. State sinks: 2606.00930.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from writesae.hooks.names import inputs, name_of
from writesae.hooks.sites import Head
from writesae.jobs.arguments import named_kinds
from writesae.jobs.progress import Bars
from writesae.methods.remembered import MemoryLength
from writesae.model import HookedRecurrentModel, late_logits
from writesae.recurrence import Recurrence, Write, at_least_float32
from writesae.recurrence.kernels import adjoint, adjoint_write, chunked
from writesae.stores.windows import Texts, Windows

BLOCK = 2**24  # numbers: parts of reads worked on at once
UNREAD = 0.1  # of an equal share: a write that no read gives more than this is unread


@named_kinds
@torch.no_grad()
def memory_length(
    model: HookedRecurrentModel,
    texts: Texts,
    *,
    layers: Sequence[int] | None = None,
    context: int = 256,
    max_tokens: int | None = None,
    writes: int = 16,
    reads: int = 32,
    states: int = 4,
    delimiters: Sequence[int] | None = None,
    batch_size: int = 4,
    progress: bool = True,
) -> MemoryLength:
    """How long each head remembers: half-lives of writes, how far reads reach, sinks, and ranks of states.

    >>> found = ws.memory_length(model, texts)
    >>> found.table(); found.plot(); found.records()         # a row per head
    >>> found.tokens()                                       # which tokens write most, and which are never read

    Time and memory grow with the length of the text, not with its square.

    Args:
        model: the model.
        texts: a text, several, or token ids ``[n, pos]``.
        layers: recurrent layers; None for all.
        context: tokens of a window, read from an empty memory.
        max_tokens: of all windows, spread evenly over the texts; None for all.
        writes: of each window, whose half-life is measured: evenly in its first half, each followed for half a window.
        reads: of each window that are looked at, evenly in its second half.
        states: of each window whose rank is measured.
        delimiters: token ids that count as such; None: tokens without a letter or digit, if there is a tokenizer.
        batch_size: windows run at once.
        progress: show a bar.

    Raises:
        ValueError: not one window of text, or a context too short for what is asked.
        IndexError: a layer that is not recurrent.
    """
    chosen = [model.site(layer) for layer in ([s.layer for s in model.sites] if layers is None else layers)]
    least = 2 * max(writes, reads, states)
    if min(writes, reads, states) < 1 or context < least:
        raise ValueError(
            f"context={context} with writes={writes}, reads={reads}, states={states}: each is at least 1, and a window "
            f"needs {least} tokens"
        )
    windows = Windows.of_rows(list(texts), context) if isinstance(texts, Tensor) else Windows.cut(model, texts, context)
    tokens = windows.enough(of="the text").spread(max_tokens).tokens
    known = _delimiters(model, tokens.unique(), delimiters)
    found: dict[str, list[list[Tensor]]] = defaultdict(list)  # by name, of each batch, of each layer
    names = [name for site in chosen for name in [*inputs(model.family(site.layer).rule, site.layer)]]
    names += [name_of(q, site.layer) for site in chosen for q in model.family(site.layer).rule.reads]
    with Bars(progress) as bars:
        bar = bars.add("measuring memories", len(tokens))
        for ids in tokens.split(batch_size):
            ids = ids.to(model.device).long()
            with late_logits(model):
                _, cache = model.run_with_cache(ids, names=names)
            parts: dict[str, list[Tensor]] = defaultdict(list)
            for site in chosen:
                rule = model.family(site.layer).rule
                rec = rule.recurrence(lambda quantity, layer=site.layer, cache=cache: cache[quantity, layer])
                write = cache.write(site.layer)
                of_states = _ranks(cache.dynamics(site.layer).states_at(spread(context, states)))
                for made in (_lives(rec, keys_of(write), writes), _reads(rec, write, reads, ids, known), of_states):
                    for name, x in made.items():
                        parts[name].append(x.cpu())
            for name, of_layers in parts.items():
                found[name].append(of_layers)
            bar.advance(len(ids))
    whole = {name: torch.cat([torch.cat(of_layers, -1) for of_layers in batches]) for name, batches in found.items()}
    strings = {i: str(i) if model.tokenizer is None else str(model.to_string(i)) for i in tokens.unique().tolist()}
    return MemoryLength(
        heads=tuple(Head(site.layer, head) for site in chosen for head in range(site.n_heads)),
        ids=tokens.cpu().long(),
        words=strings,
        delimiters=None if known is None else tuple(known.tolist()),
        **whole,
    )


def spread(n_pos: int, n: int, start: int = 0) -> list[int]:
    """``n`` positions from ``start`` to the last of ``n_pos``, evenly."""
    return [start + (i + 1) * (n_pos - start) // n - 1 for i in range(n)]


def keys_of(write: Write) -> Float[Tensor, "batch pos head *term d_key"]:
    """Keys of writes. Where these are of a higher rank: of terms whose values are orthogonal and of length 1, so that
    the norm of a write, and of what is left or read of it, is that of all its keys."""
    if write.rank == 1:
        return write.key
    keys, values = (at_least_float32(x) for x in write.factors())
    return torch.linalg.qr(values.mT)[1] @ keys


def _lives(rec: Recurrence, keys: Float[Tensor, "batch pos head *term d_key"], n: int) -> dict[str, Tensor]:
    """Half-lives ``[batch, n, head]`` by decay alone and with erases; mean strength ``[batch, lag, head]`` of both."""
    half = rec.n_pos // 2
    at = torch.tensor(spread(half, n), device=keys.device)
    made = {}
    for name, erases in (("by_decay", False), ("with_erase", True)):
        strength = survival(rec, keys, at, half, erases=erases)
        below = strength <= 0.5
        first = below.int().argmax(1).float()
        made[f"half_life_{name}"] = torch.where(below.any(1), first, float("inf"))
        made[f"strength_{name}"] = strength.mean(2)
    return made


def survival(
    rec: Recurrence,
    keys: Float[Tensor, "batch pos head *term d_key"],
    at: Int[Tensor, " n"],
    lags: int,
    *,
    erases: bool = True,
) -> Float[Tensor, "batch lag n head"]:
    """How much is left of the writes of some tokens, 0 to ``lags`` tokens later: their Frobenius norm, 1 at first.

    The write's value is of no matter: its key alone decays and is erased, ``x_t = D_t x_{t-1} + a_t (b_t^T x_{t-1})``.

    Args:
        rec: the recurrence.
        keys: of all writes, see `keys_of`.
        at: which tokens.
        lags: how long to follow them; the last must have so many tokens after it.
        erases: False for decay alone.
    """
    x = at_least_float32(keys[:, at])
    x = x if x.ndim == 5 else x[..., None, :]  # [batch, n, head, term, d_key]
    norms = [x.norm(dim=(-2, -1))]
    for lag in range(1, lags + 1):
        now = rec[:, at + lag].float()
        decay, erase = now.log_decay.exp(), now.erase()
        y = x * (decay[..., None, None] if decay.ndim == 3 else decay[..., None, :])
        if erases and erase is not None:
            a, b = erase
            y = y + (x @ b.mT) @ a
        x = y
        norms.append(x.norm(dim=(-2, -1)))
    return torch.stack(norms, 1) / norms[0][:, None].clamp_min(1e-30)


def read_from(
    rec: Recurrence, keys: Float[Tensor, "batch pos head *term d_key"], at: Sequence[int]
) -> Float[Tensor, "batch pos head n *term"]:
    """How much of what each token wrote is in what the tokens ``at`` read, as rows of `ActivationCache.pattern`."""
    one_hot = F.one_hot(torch.tensor(at, device=rec.q.device), rec.n_pos).T.to(at_least_float32(rec.q))
    asked = one_hot[None, :, None].expand(*rec.q.shape[:3], -1)
    gained = adjoint_write(rec, asked)
    of_key = lambda key: chunked(adjoint(rec, key), gained)[0].flip(1)  # noqa: E731
    return of_key(keys) if keys.ndim == 4 else torch.stack([of_key(key) for key in keys.unbind(-2)], -1)


def parts_of_reads(rec: Recurrence, write: Write, at: Sequence[int]) -> Float[Tensor, "batch pos head n"]:
    """How long the part of each token's write is in what the tokens ``at`` read, of each read all weights included."""
    if rec.read_weights is not None:
        keys, values = (at_least_float32(x) for x in write.factors())
        each = torch.stack([read_from(one, keys, at) for one in rec.single_reads()], -1)
        weights = at_least_float32(rec.read_weights[:, at])
        return torch.einsum("bjhnsr,bjhsv,bnhrv->bjhnv", each, values, weights).norm(dim=-1)
    keys = keys_of(write)
    sizes = at_least_float32(write.norm() / keys.flatten(3).norm(dim=-1).clamp_min(1e-30))
    found = read_from(rec, keys, at)
    return (found.abs() if found.ndim == 4 else found.norm(dim=-1)) * sizes[..., None]


def _reads(
    rec: Recurrence, write: Write, n: int, ids: Int[Tensor, "batch pos"], delimiters: Int[Tensor, " m"] | None
) -> dict[str, Tensor]:
    """Where some reads go, ``[batch, 1 or pos, head]``, as many heads at once as `BLOCK` allows."""
    numbers = ids.numel() * n * (1 if rec.read_weights is None else write.d_value)
    step, parts = max(1, BLOCK // numbers), []
    for start in range(0, rec.q.shape[2], step):
        some = (slice(None), slice(None), slice(start, start + step))
        parts.append(_reads_of_heads(rec[some], write[some], n, ids, delimiters))
    return {name: torch.cat([part[name] for part in parts], -1) for name in parts[0]}


def _reads_of_heads(
    rec: Recurrence, write: Write, n: int, ids: Int[Tensor, "batch pos"], delimiters: Int[Tensor, " m"] | None
) -> dict[str, Tensor]:
    """Of a read, a token has the share that its part has in the sum of all parts' lengths."""
    n_pos, device = rec.n_pos, rec.q.device
    at = torch.tensor(spread(n_pos, n, n_pos // 2), device=device)
    share = parts_of_reads(rec, write, at.tolist())
    share = share / share.sum(1, keepdim=True).clamp_min(1e-30)
    near = (share.flip(1).cumsum(1) < 0.5).sum(1) - (n_pos - 1 - at)  # those after the read have no share
    # Of each write, in the later reads: in units of an equal share among all the tokens up to the read.
    source = torch.arange(n_pos, device=device)[:, None]
    later = (at > source) & (source >= n_pos // 2)  # of writes before, the nearest reads are not looked at
    equal = share * (at + 1) * later[:, None]
    counts = later.sum(-1)[:, None]
    made = {
        "read_distance": near.float().median(-1).values[:, None],
        "first": share[:, 0].mean(-1)[:, None],
        "own": share.gather(1, at.expand(len(share), 1, share.shape[2], -1))[:, 0].mean(-1)[:, None],
        "unread": ((equal.amax(-1) < UNREAD) & (counts > 0)).sum(1, keepdim=True) / (counts > 0).sum(),
        "received": torch.where(counts > 0, equal.sum(-1) / counts.clamp_min(1), float("nan")),
        "written": write.norm(),
    }
    if delimiters is not None:
        there: Bool[Tensor, "batch pos"] = torch.isin(ids, delimiters.to(ids.device)).to(device)
        made["delimiter"] = (share * there[..., None, None]).sum(1).mean(-1)[:, None]
    return {name: x.float() for name, x in made.items()}


def _ranks(states: Float[Tensor, "batch n head d_key d_value"]) -> dict[str, Tensor]:
    """Effective ranks of some states, ``[batch, n, head]``."""
    s = torch.linalg.svdvals(states)
    squares = s.square()
    participation = squares.sum(-1).square() / squares.square().sum(-1).clamp_min(1e-30)
    p = s / s.sum(-1, keepdim=True).clamp_min(1e-30)
    return {"participation": participation, "entropy_rank": (-torch.special.xlogy(p, p).sum(-1)).exp()}


def _delimiters(
    model: HookedRecurrentModel, ids: Int[Tensor, " n"], given: Sequence[int] | None
) -> Int[Tensor, " m"] | None:
    """The token ids that are delimiters; None where that is not known."""
    if given is not None:
        return torch.tensor([model.to_single_token(i) for i in given], dtype=torch.long)
    if model.tokenizer is None:
        return None
    plain = [i for i in ids.tolist() if not any(c.isalnum() or c == "\ufffd" for c in str(model.to_string(i)))]
    return torch.tensor(plain, dtype=torch.long)
