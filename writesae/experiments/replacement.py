"""The replacement test (paper, section 3.2): can one atom stand in for what the model writes?

At a *firing*, a token at which the SAE activates an atom, the native write of one head is taken out and something else
put in; the score is how far the model's final distribution moves, in nats. The SAE's top atom at its activation should
move it less than putting in nothing, and putting in nothing less than a random atom.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from rich.table import Table
from rich.text import Text
from scipy.stats import binomtest
from torch import Tensor

from writesae.hooks import Delete, Intervention, Replace, Substitute
from writesae.recurrence import Write
from writesae.saes.reading import encode_matrices, inputs, target_of
from writesae.texts import sequences

if TYPE_CHECKING:
    from writesae.model import HookedRecurrentModel
    from writesae.saes import WriteSAE

When: TypeAlias = Literal["at", "through"]

CONDITIONS = {
    "atom": "the SAE's top atom at its activation",
    "matched": "the top atom at the native write's norm",
    "delete": "nothing",
    "random": "a random rank-1 matrix at the atom's activation",
}


@dataclass(frozen=True)
class Rate:
    """How often out of how many, with its Wilson 95% interval."""

    count: int
    n: int
    low: float
    high: float

    @property
    def rate(self) -> float:
        return self.count / self.n

    def __str__(self) -> str:
        return f"{100 * self.rate:.1f}% [{100 * self.low:.1f}, {100 * self.high:.1f}]"


def wilson(count: int, n: int) -> Rate:
    """A proportion with its Wilson 95% interval; raises ValueError without any trial."""
    if n < 1:
        raise ValueError("an interval needs at least one trial")
    interval = binomtest(count, n).proportion_ci(method="wilson")
    return Rate(count, n, float(interval.low), float(interval.high))


@dataclass(frozen=True)
class ReplacementResult:
    """The records of a replacement test, one row a firing.

    Attributes:
        layer, head: the site.
        kl: ``KL(edited || native)`` of the next-token distribution in nats, at the firing and the tokens after it.
        window: which window of the text each firing is in, and ``position`` its position there.
        atom: the top atom, ``activation`` its coefficient, ``native_norm`` the Frobenius norm of the native write.
        cosine: cosine of the atom to the native write.
    """

    layer: int
    head: int
    kl: dict[str, Float[Tensor, "firing horizon"]]
    window: Int[Tensor, " firing"]
    position: Int[Tensor, " firing"]
    atom: Int[Tensor, " firing"]
    activation: Float[Tensor, " firing"]
    native_norm: Float[Tensor, " firing"]
    cosine: Float[Tensor, " firing"]

    @property
    def n(self) -> int:
        return len(self.atom)

    def score(self, condition: str, when: When = "at") -> Float[Tensor, " firing"]:
        """How far a condition moves the model, nats: ``"at"`` the firing, or summed ``"through"`` all tokens scored."""
        return self.kl[condition][:, 0] if when == "at" else self.kl[condition].sum(1)

    def wins(self, better: str, worse: str, when: When = "at") -> Rate:
        """How often ``better`` moves the distribution less than ``worse``."""
        return wilson(int((self.score(better, when) < self.score(worse, when)).sum()), self.n)

    def chain(self, when: When = "at") -> Rate:
        """How often the strict order atom < delete < random holds."""
        atom, delete, random = (self.score(c, when) for c in ("atom", "delete", "random"))
        return wilson(int(((atom < delete) & (delete < random)).sum()), self.n)

    def table(self) -> Table:
        horizon = next(iter(self.kl.values())).shape[1] - 1
        moments: dict[When, str] = {"at": "at the firing"}
        if horizon:
            moments["through"] = f"with the next {horizon}"
        table = Table(title=f"Replacement test, layer {self.layer} head {self.head}: {self.n} firings on held-out text")
        table.add_column("put in")
        for moment in moments.values():
            table.add_column(f"KL, {moment}", justify="right")
            table.add_column("beats deletion", justify="right")
        for name, what in CONDITIONS.items():
            row = [Text.assemble((name, "bold"), f": {what}")]
            for when in moments:
                row.append(Text(f"{float(self.score(name, when).median()):.1e}"))
                row.append(Text("" if name == "delete" else str(self.wins(name, "delete", when))))
            table.add_row(*row)
        table.caption = (
            "KL: median, in nats, summed over the tokens; Wilson 95% intervals.\n"
            + "".join(
                f"{moment}: deletion beats random {self.wins('delete', 'random', when)}, "
                f"atom < deletion < random {self.chain(when)}.\n"
                for when, moment in moments.items()
            )
            + f"Median cosine of atom and write {float(self.cosine.median()):.2f}."
        )
        return table


@torch.no_grad()
def replacement_test(
    model: HookedRecurrentModel,
    sae: WriteSAE,
    text: str | Sequence[str],
    *,
    n_firings: int = 300,
    context: int = 96,
    horizon: int = 16,
    atom: int | None = None,
    batch_size: int = 32,
    seed: int = 0,
    check_model: bool = True,
    progress: Callable[[int], Any] | None = None,
) -> ReplacementResult:
    """Run the replacement test at firings drawn at random, one from each window of the text.

    Args:
        model: the model.
        sae: an SAE of one of its heads; its top atom at each firing is tested.
        text: held-out text, cut into windows of ``context`` tokens.
        n_firings: how many to test.
        context: tokens a window; a firing has at least a quarter of it before it, ``horizon`` tokens after it.
        horizon: how many tokens after the firing to score, beside the firing itself.
        atom: test only where this atom is the top one.
        batch_size: windows a forward pass.
        seed: of the choice of firings and of the random matrices.
        check_model: refuse an SAE trained on other weights.
        progress: called with the number of firings done.

    Raises:
        ValueError: the text is too short, or the SAE (or ``atom``) fires too rarely in it; the message has the numbers.
    """
    sae.check_fits(model, check_model=check_model)
    layer, head = sae.cfg.layer, sae.cfg.head
    assert layer is not None and head is not None
    if atom is not None:
        sae.atom(atom)  # raises for one out of range
    windows = sequences(model, text, context)
    if atom is None and len(windows) < n_firings:
        raise ValueError(
            f"{n_firings} firings need as many windows of {context} tokens; the text has {len(windows)}: "
            f"give a longer text, or lower n_firings or context"
        )
    generator = torch.Generator().manual_seed(seed)
    windows = windows[torch.randperm(len(windows), generator=generator)]
    parts: list[dict[str, Any]] = []
    done = 0
    for start in range(0, len(windows), batch_size):
        if done >= n_firings:
            break
        ids = windows[start : start + batch_size].to(model.device)
        native, cache = model.run_with_cache(ids, names=inputs(model, layer))
        values, indices = encode_matrices(sae, *target_of(cache, layer, head, sae.cfg.target))
        chosen = _choose(values[..., 0], indices[..., 0], atom, context // 4, context - 1 - horizon, generator)
        keep = chosen["row"][: n_firings - done]
        if not len(keep):
            continue
        part: dict[str, Any] = {name: x[: len(keep)] for name, x in chosen.items()}
        t = part["position"].to(model.device)
        write = cache.write(layer)[keep.to(model.device), t, torch.full_like(t, head)]
        part |= {"native_norm": write.norm(), "cosine": sae.atom(part["atom"]).cosine(write), "window": start + keep}
        ids, native = ids[keep], native[keep]
        part["kl"] = {
            name: _kl(_run(model, ids, edit, t, check_model), native, t, horizon)
            for name, edit in _conditions(sae, layer, head, part["activation"], generator).items()
        }
        parts.append(part)
        done += len(keep)
        if progress is not None:
            progress(done)
    if done < n_firings:
        what = f"atom {atom}" if atom is not None else "the SAE"
        raise ValueError(f"{what} fired in only {done} of {len(windows)} windows; {n_firings} firings were asked for")
    join = lambda name: torch.cat([part[name] for part in parts]).cpu()  # noqa: E731
    return ReplacementResult(
        layer,
        head,
        {name: torch.cat([part["kl"][name] for part in parts]).cpu() for name in CONDITIONS},
        **{name: join(name) for name in ("window", "position", "atom", "activation", "native_norm", "cosine")},
    )


def _conditions(
    sae: WriteSAE, layer: int, head: int, activation: Tensor, generator: torch.Generator
) -> dict[str, Intervention]:
    n = len(activation)
    draw = lambda d: F.normalize(torch.randn(n, 1, d, generator=generator), dim=-1).to(activation.device)  # noqa: E731
    random = Write(draw(sae.cfg.d_key), draw(sae.cfg.d_value)) * activation[:, None]
    edits = (
        Substitute(sae),
        Substitute(sae, norm="native"),
        Delete(layer, head),
        Replace(layer, head, write=random),
    )
    return dict(zip(CONDITIONS, edits, strict=True))


def _run(model: HookedRecurrentModel, ids: Tensor, edit: Intervention, t: Tensor, check_model: bool) -> Tensor:
    with model.intervene(edit, positions=t[:, None], check_model=check_model):
        return model(ids)


def _kl(edited: Tensor, native: Tensor, t: Tensor, horizon: int) -> Float[Tensor, "firing horizon"]:
    """KL(edited || native) at ``t`` and the ``horizon`` tokens after it."""
    rows = torch.arange(len(t), device=t.device)[:, None]
    at = t[:, None] + torch.arange(horizon + 1, device=t.device)
    p, q = (x[rows, at].double().log_softmax(-1) for x in (edited, native))
    return F.kl_div(q, p, reduction="none", log_target=True).sum(-1)


def _choose(
    value: Tensor, top: Tensor, atom: int | None, first: int, last: int, generator: torch.Generator
) -> dict[str, Tensor]:
    """One firing at random from each window that has any at tokens ``first`` to ``last``."""
    fires = value > 0 if atom is None else (value > 0) & (top == atom)
    fires[:, :first] = False
    fires[:, last + 1 :] = False
    rows = fires.any(1).nonzero()[:, 0].cpu()
    position = torch.multinomial(fires[rows].float().cpu(), 1, generator=generator)[:, 0]
    return {"row": rows, "position": position, "atom": top[rows, position], "activation": value[rows, position]}
