"""What the replacement test puts in the place of a native write, and at which tokens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from writesae.experiments.protocol import Run, several
from writesae.futures.divergence import divergence
from writesae.futures.replay import Native, Replayer, stacked
from writesae.hooks.attachable import fit
from writesae.hooks.sites import Head
from writesae.recurrence import Read, Write, at_least_float32, memory_dtype
from writesae.recurrence.matrices import top_pair
from writesae.saes import WriteSAE
from writesae.saes.activity.reading import encode_matrices, target_of
from writesae.stores.windows import Windows

CONDITIONS = {
    "atom": "the SAE's top atom at its activation",
    "matched": "the top atom at the native write's norm",
    "delete": "nothing",
    "random": "a random rank-1 matrix at the atom's activation",
    "random_matched": "a random rank-1 matrix at the native write's norm",
    "orthogonal": "rank 1, key and value orthogonal to the native ones, at its norm",
    "other_atom": "another atom of the SAE, at random, at the top atom's activation",
    "flat_svd": "top singular pair of a flat SAE's reconstruction, at the native norm",
}
DEFAULT = ("atom", "matched", "delete", "random")


def check_conditions(
    run: Run, conditions: Iterable[str], flat: WriteSAE | Sequence[WriteSAE] | None
) -> tuple[tuple[str, ...], dict[Head, WriteSAE]]:
    """The conditions with those that every test needs, and the flat SAE of each head of the run.

    Raises:
        ValueError: no such condition; or ``flat_svd`` without a flat SAE for each head.
    """
    flats = {sae.place: sae for sae in several(flat)}
    asked = {"atom", "delete", *conditions} | ({"flat_svd"} if flat is not None else set())
    for name in conditions:
        if name not in CONDITIONS:
            raise ValueError(f"no condition {name!r}: allowed are {', '.join(CONDITIONS)}")
    if "flat_svd" in asked and flat is None:
        raise ValueError("the condition 'flat_svd' and flat=, an SAE of the same head, come together")
    for sae in flats.values():
        fit(sae, run.model, check_model=False)
    for head in (sae.place for sae in run.saes):
        if flats and head not in flats:
            raise ValueError(f"no flat SAE for {head.words}: flat= has {', '.join(x.words for x in flats)}")
    return tuple(name for name in CONDITIONS if name in asked), flats


def windows_of(run: Run, context: int, horizon: int) -> Windows:
    """The text in windows; ValueError if none is long enough, or a window leaves no token to test."""
    if context // 4 > context - 1 - horizon:
        raise ValueError(
            f"context={context} leaves no token with {context // 4} tokens before it and {horizon} (horizon) after it: "
            f"choose a longer context or a shorter horizon"
        )
    return run.windows(context)


def top_atoms(native: Native, sae: WriteSAE) -> tuple[Float[Tensor, "window pos"], Int[Tensor, "window pos"]]:
    """Of every token the strongest activation and its atom, where the windows are (an SAE may lie elsewhere)."""
    values, indices = encode_matrices(sae, *target_of(native.cache, *sae.place, sae.cfg.target))
    return values[..., 0].to(native.ids.device), indices[..., 0].to(native.ids.device)


def draw(
    fires: Bool[Tensor, "window pos"], most: int, generator: torch.Generator
) -> tuple[Int[Tensor, " firing"], Int[Tensor, " firing"]]:
    """Window and position of up to ``most`` firings of each window, drawn at random without replacement."""
    lots = torch.rand(fires.shape, generator=generator).masked_fill(~fires.cpu(), 2.0)
    order = lots.argsort(1)[:, :most]
    window = torch.arange(len(fires))[:, None].expand_as(order)
    chosen = lots.gather(1, order) < 1
    return window[chosen], order[chosen]


class Generators:
    """A random stream for each condition, so that one does not change with which others are asked for."""

    def __init__(self, seed: int):
        self.streams = {name: torch.Generator().manual_seed(1000 * seed + i) for i, name in enumerate(CONDITIONS)}

    def unit(self, condition: str, n: int, d: int, off: Tensor | None = None) -> Float[Tensor, "n d"]:
        """Random unit vectors, orthogonal to ``off`` if given."""
        x = torch.randn(n, d, generator=self.streams[condition])
        if off is not None:
            along = F.normalize(off.cpu().float(), dim=-1)
            x = x - (x * along).sum(-1, keepdim=True) * along
        return F.normalize(x, dim=-1)

    def other(self, condition: str, atom: Int[Tensor, " n"], n_atoms: int) -> Int[Tensor, " n"]:
        """Another atom for each."""
        if n_atoms < 2:
            raise ValueError(f"the condition {condition!r} needs an SAE of two atoms or more; this one has {n_atoms}")
        shift = torch.randint(1, n_atoms, atom.shape, generator=self.streams[condition])
        return (atom + shift.to(atom.device)) % n_atoms


def put_in(
    condition: str,
    sae: WriteSAE,
    native: Write,
    atom: Int[Tensor, " firing"],
    activation: Float[Tensor, " firing"],
    generators: Generators,
    flat: Write | None = None,
) -> Write:
    """What one of `CONDITIONS` writes at each firing, ``[firing]``.

    ``native`` is what the model writes there, ``atom`` and ``activation`` the top atoms, ``flat`` made by `flat_svd`.
    """
    n, norm, here = len(atom), native.norm(), (native.key.device, memory_dtype(native.key))
    write, activation = sae.atom(atom).to(*here), activation.to(*here)
    if condition == "atom":
        return write * activation
    if condition == "matched":
        return write * (norm / write.norm().clamp_min(1e-30))
    if condition == "delete":
        return native * 0.0
    if condition == "other_atom":
        return sae.atom(generators.other(condition, atom, sae.cfg.n_atoms)).to(*here) * activation
    if condition == "flat_svd":
        assert flat is not None
        return flat * norm
    off = (native.key, native.value) if condition == "orthogonal" else (None, None)
    key, value = (
        generators.unit(condition, n, d, x).to(*here)
        for d, x in zip((sae.cfg.d_key, sae.cfg.d_value), off, strict=True)
    )
    return Write(key, value) * (activation if condition == "random" else norm)


def flat_svd(native: Native, flat: WriteSAE, window: Int[Tensor, " firing"], position: Int[Tensor, " firing"]) -> Write:
    """The top singular pair of what a flat SAE makes of its matrix at each firing, of norm 1 (paper, appendix F.4)."""
    values, indices = encode_matrices(flat, *target_of(native.cache, *flat.place, flat.cfg.target))
    window, position = window.to(values.device), position.to(values.device)
    values, indices = values[window, position], indices[window, position]
    codes = values.new_zeros(len(values), flat.cfg.n_atoms).scatter_add(-1, indices, values)
    return top_pair(at_least_float32(flat.decode(codes))).to(native.ids.device)


class Tester:
    """Replaces the writes of some SAEs' heads, all at once, at firings in windows, and keeps what happened.

    Args:
        run: whose model, batch size and seed.
        windows: of the text.
        saes: SAEs of the heads.
        conditions, flats: see `check_conditions`.
        horizon, read: see `Replayer`.
    """

    def __init__(
        self,
        run: Run,
        windows: Windows,
        saes: Sequence[WriteSAE],
        conditions: Sequence[str],
        flats: Mapping[Head, WriteSAE],
        horizon: int,
        read: Read,
    ):
        self.run, self.windows, self.saes, self.conditions, self.flats = run, windows, saes, conditions, flats
        read = run.model.family(saes[0].place.layer).rule.first_read(read)
        self.replayer = Replayer(run.model, [sae.place for sae in saes], horizon=horizon, read=read)
        self.generators, self.horizon = Generators(run.seed), horizon
        self.step = min(run.batch_size, self.replayer.rows)  # windows per pass, whose states fit as well
        at = torch.arange(windows.context)
        #: the positions with enough of a window before and after them
        self.testable = (at >= windows.context // 4) & (at < windows.context - horizon)
        self.parts: list[dict[str, Any]] = []

    def native(self, which: Int[Tensor, " window"]) -> tuple[Native, dict[Head, tuple]]:
        """The pass over some windows as the model is, and the `top_atoms` of each head."""
        native = self.replayer.native(self.windows.tokens[which].to(self.run.model.device))
        return native, {sae.place: top_atoms(native, sae) for sae in self.saes}

    def test(
        self,
        native: Native,
        tops: Mapping[Head, tuple[Tensor, Tensor]],
        which: Int[Tensor, " window"],
        window: Int[Tensor, " firing"],
        position: Int[Tensor, " firing"],
    ) -> None:
        """Replay firings, ``window`` counted within ``which``, and keep their columns, those of `ReplacementResult`.

        Several SAEs act at once; what is one number per head is then pooled over heads as parts of one large matrix.
        """
        kept: dict[str, Any] = {"window": which[window], "document": self.windows.document[which[window]]}
        window, position = window.to(native.ids.device), position.to(native.ids.device)
        writes: dict[Head, Write] = {}
        pooled = []  # of each head: squares of activation and of both norms, inner product
        for sae in self.saes:
            own = native.write(sae.place, window, position)
            activation, atom = (x[window, position] for x in tops[sae.place])
            flat = flat_svd(native, self.flats[sae.place], window, position) if "flat_svd" in self.conditions else None
            put = [put_in(name, sae, own, atom, activation, self.generators, flat) for name in self.conditions]
            writes[sae.place] = stacked(put).to(own.key.dtype)
            here = window.device, memory_dtype(own.key)
            activation, first = activation.to(*here), sae.atom(atom).to(*here) * activation.to(*here)
            pooled.append([activation.square(), own.norm().square(), first.norm().square(), first.inner(own)])
        activation2, native2, first2, inner = (torch.stack(parts).sum(0) for parts in zip(*pooled, strict=True))
        futures = self.replayer.futures(native, window, position, writes, self.run.tell)
        moved = divergence(native, window, position, writes, self.horizon)
        head = self.saes[0].place if len(self.saes) == 1 else Head(-1, -1)
        kept |= {
            "position": position,
            "atom": atom if len(self.saes) == 1 else torch.full_like(atom, -1),
            "activation": activation2.sqrt().float(),
            "native_norm": native2.sqrt().float(),
            "cosine": (inner / (native2 * first2).sqrt().clamp_min(1e-30)).float(),
            **{name: torch.full_like(window, x) for name, x in head._asdict().items()},
        }
        for name, found in (("kl", futures.kl.float()), ("flips", futures.flips), ("divergence", moved)):
            kept[name] = dict(zip(self.conditions, found.unbind(1), strict=True))
        self.parts.append(kept)
