"""What every edit of the memory would do to a number that the model computes, from one backward pass.

Within a layer the effect of an edit on the outputs is exact and linear (`writesae.recurrence`); through the rest of the
model it is taken to first order. With ``g_t`` the gradient of the number with respect to a head's output ``o_t``, which
one backward pass gives for all layers and tokens, the gradient with respect to what is added to the state at ``t`` is
a matrix ``M_t`` that obeys the layer's recurrence backwards in time (`kernels.adjoint`). ``<M_t, E>`` is the
first-order effect of an edit ``E`` there, its attribution score: of every write, every atom, at every token, on every
architecture.

Most of the nonlinearity lies right behind the head, in its norm: where a head reads little, the norm scales it up, and
then an edit is no small change. `LayerGradient.effect` therefore takes the norm exactly, and
only what comes after it to first order.

The paper's closed form (equation 1) is this without the erase, with the output embedding in place of the way from the
head to the logits, and with a fitted prefactor for what that misses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from writesae.gradients.norms import Norm
from writesae.gradients.probes import Probe
from writesae.gradients.questions import Logit, columns_of, in_ids
from writesae.hooks.names import name_of
from writesae.hooks.scope import owning
from writesae.jobs.arguments import named_kinds
from writesae.model.late_logits import LateLogits, late_logits
from writesae.recurrence import Read, Recurrence, Write, at_least_float32, memory_dtype
from writesae.recurrence.dynamics import Dynamics
from writesae.recurrence.kernels import adjoint, adjoint_write, carried, chunked, gradient_of_read, states_at
from writesae.recurrence.matrices import Atoms, project, top_pair
from writesae.recurrence.write import index_of

if TYPE_CHECKING:
    from writesae.hooks import ActivationCache
    from writesae.model import HookedRecurrentModel, Text


BLOCK = 2**22  # numbers: outputs of a norm, or entries of gradients, worked on at once


E = TypeVar("E", bound="Write | Tensor")


@dataclass(frozen=True, eq=False)
class LayerGradient:
    """The gradient of one number with respect to the memory of one layer.

    Attributes:
        recurrence: the layer's recurrence in the pass.
        write: the native writes, ``[batch, pos, head]``.
        output: the gradient with respect to ``hook_o``.
        norm: the norm right behind the heads, None where there is none.
        read: what the heads read, ``hook_o``, where that is of the native writes alone; else None.
    """

    recurrence: Recurrence
    write: Write
    output: Float[Tensor, "batch pos head d_value"]
    norm: Norm | None = None
    read: Float[Tensor, "batch pos head d_value"] | None = None

    def price(self, edit: Write, *, read: Read = "same") -> Float[Tensor, "batch pos head"]:
        """Attribution scores ``<M_t, E_t>``: how much each edit alone would change the number, to first order.

        Args:
            edit: one per token and head, ``[batch, pos, head]`` (sizes of 1 broadcast), any rank.
            read: ``"same"``: the read at the edit's own token sees it; ``"next"``: only later reads do.
        """
        edit = self._beside(edit.expand(*self.write.shape))
        total = torch.zeros_like(at_least_float32(self.output[..., 0]))
        for key, value in zip(*(x.unbind(-2) for x in edit.factors()), strict=True):
            seen, _ = chunked(adjoint(self.recurrence, key), self._write, read=self._leaves_out(read))
            total = total + (seen.flip(1) * value).sum(-1)
        return total

    def of_output(self) -> Float[Tensor, "batch head"]:
        """What each head's whole output contributes, ``sum_t g_t . o_t``.

        It is the sum of `price` over the head's writes. What a state from before the pass contributes is left out.
        """
        o = chunked(self.recurrence, self.write)[0] if self.read is None else at_least_float32(self.read)
        return (o * self.output).sum((1, 3))

    def of_heads(self, heads: Sequence[int]) -> LayerGradient:
        """The same for some heads alone. It has no norm: that of a layer may need all its heads."""
        some = (slice(None), slice(None), list(heads))
        read = None if self.read is None else self.read[some]
        return LayerGradient(self.recurrence[some], self.write[some], self.output[some], read=read)

    @property
    def at_fixed_scale(self) -> LayerGradient:
        """The same gradient with the scale of the layer's norm held fixed.

        A norm undoes the scale of its input, so that, to first order, the effects of all the parts of what a head reads
        sum to zero. With the scale held fixed, as is usual when logits are attributed, they sum to what the normalised
        output contributes. Where there is no norm, this changes nothing.
        """
        if self.norm is None:
            return self
        return replace(self, output=self.norm.at_fixed_scale().reshape(self.output.shape), norm=None)

    @torch.no_grad()
    def effect(
        self, head: int, positions: Int[Tensor, "batch n"], edits: Write, *, read: Read = "same"
    ) -> Float[Tensor, "batch n"]:
        """How much each edit alone would change the number: exact up to the layer's norm, to first order beyond it.

        Costs ``pos * d_value`` per edit, where `price` costs ``d_key + d_value``. Effects of several edits do not add.

        Args:
            head: which head.
            positions: columns of the pass, ``n`` per sequence, one for each edit.
            edits: ``[batch, n]``, any rank.
            read: as for `price`.

        Raises:
            IndexError: a position outside the pass.
        """
        asked = torch.stack(positions.aminmax()).tolist()
        if asked[0] < 0 or asked[1] >= self.recurrence.n_pos:
            raise IndexError(
                f"edits at positions {asked[0]} to {asked[1]}: allowed are 0 to {self.recurrence.n_pos - 1}"
            )
        positions = positions.to(self.output.device)
        # Tokens before the first edit, and after the last that the number depends on, play no part.
        depends = [t for t, most in enumerate(self.output.abs().amax((0, 2, 3)).tolist()) if most]
        used = slice(asked[0], max([asked[0], *depends[-1:]]) + 1)
        rec, positions, edits = self.recurrence[:, used, head : head + 1], positions - used.start, self._beside(edits)
        width = self.write.d_value if self.norm is None else self.norm.output.shape[-1]
        step = max(1, BLOCK // (rec.n_pos * len(positions) * width))
        parts = []
        for start in range(0, positions.shape[1], step):
            some = slice(start, start + step)
            change = torch.zeros(())
            for key, value in zip(*(x.unbind(-2) for x in edits[:, some].factors()), strict=True):
                seen = carried(rec, key, positions[:, some])
                seen = seen if seen.ndim == 4 else seen[..., None]  # of each column
                if read == "next":
                    now = torch.arange(rec.n_pos, device=positions.device)[None, :, None] == positions[:, None, some]
                    seen = seen.masked_fill(now[..., None], 0)
                change = change + seen * value[:, None]
            if self.norm is None:
                parts.append((change * self.output[:, used, head, None]).sum((1, 3)))
            else:
                parts.append(self.norm.effect(used, head, self.output.shape, change))
        return at_least_float32(torch.cat(parts, 1))

    def prices(self, head: int, atoms: Atoms, *, read: Read = "same") -> Float[Tensor, "batch pos n_atoms"]:
        """The attribution score of every atom, at strength 1, at every token: `price`, of all atoms at once.

        This is to gradients what an SAE's encoder is to states. With one decay per head no gradient matrix is built;
        with one per key channel they are built, a few tokens at a time.
        """
        atoms = self._beside(atoms)
        one = (slice(None), slice(None), slice(head, head + 1))
        back, write = adjoint(self.recurrence[one]), self._write[one]
        gradients = Dynamics(back, write, write, delta_rank=2).states(0)
        if gradients.one_decay:
            found = project(gradients, atoms).flip(1)
        else:
            step = max(1, BLOCK // (len(self.output) * gradients.d_key * gradients.d_value))
            found = torch.cat([project(M, atoms) for M in gradients.pieces(step)], 1).flip(1)
        if self._leaves_out(read) == "next":
            own = gradient_of_read(self.recurrence[one], self.output[one])[:, :, 0].to(found.dtype)
            found = found - project(own, atoms)
        return found

    def at(
        self, positions: Sequence[int], heads: Sequence[int] | None = None, *, read: Read = "same"
    ) -> Float[Tensor, "batch n_positions head d_key d_value"]:
        """The gradients ``M_t`` themselves, at some tokens (columns of the pass) and heads (None for all).

        Raises:
            IndexError: a position outside the pass.
        """
        which = (slice(None), slice(None), index_of(heads))
        n = self.recurrence.n_pos
        for t in positions:
            if not 0 <= t < n:
                raise IndexError(f"gradient at position {t}: allowed are 0 to {n - 1}")
        back, write = adjoint(self.recurrence[which]), self._write[which]
        M = states_at(back, write, [n - 1 - t for t in positions])
        if self._leaves_out(read) == "next":
            M = M - torch.stack([write[:, n - 1 - t].dense() for t in positions], 1)
        return M

    def best(self, positions: Sequence[int], heads: Sequence[int] | None = None, *, read: Read = "same") -> Write:
        """The rank-1 edit of norm 1 that raises the number most to first order: the first singular pair of ``M_t``.

        Leading dimensions ``[batch, n_positions, head]``.
        """
        return top_pair(self.at(positions, heads, read=read))

    def _beside(self, edit: E) -> E:
        """An edit or atoms where the layer is, in the dtype of its gradients: an SAE may have others."""
        beside: Any = edit.to(self.output.device, memory_dtype(self.output))
        return beside

    @property
    def _write(self) -> Write:
        """What the gradient gains at each token, from last to first."""
        return adjoint_write(self.recurrence, self.output)

    def _leaves_out(self, read: Read) -> Read:
        """Whether the token's own read is to be left out: where it comes before the write, it is not there anyway."""
        return "same" if self.recurrence.reads_before else read


@dataclass(frozen=True, eq=False)
class Gradient:
    """One number per sequence of a pass, and its gradients with respect to the memory of some layers.

    Attributes:
        value: the numbers.
        end: what the logits of the pass are made of.
        cache: the inputs of the recurrences.
        layers: layer -> its `LayerGradient`; ``gradient[layer]`` is the same.
    """

    value: Float[Tensor, " batch"]
    end: LateLogits
    cache: ActivationCache
    layers: dict[int, LayerGradient]

    def __repr__(self) -> str:
        return f"Gradient(of {self.value.tolist()}, with respect to layers {', '.join(map(str, sorted(self.layers)))})"

    @property
    @torch.no_grad()
    def logits(self) -> Float[Tensor, "batch pos vocab"]:
        """All logits of the pass, made anew each time."""
        batch, n_pos = self.end.shape
        return self.end.at(*torch.meshgrid(torch.arange(batch), torch.arange(n_pos), indexing="ij"))

    def __getitem__(self, layer: int) -> LayerGradient:
        if layer not in self.layers:
            raise IndexError(f"no gradient was taken at layer {layer}; there are those of {sorted(self.layers)}")
        return self.layers[layer]


@named_kinds
def gradient(
    model: HookedRecurrentModel,
    x: Text,
    of: str | Callable[[Float[Tensor, "batch pos vocab"]], Float[Tensor, " batch"]],
    layers: Sequence[int] | None = None,
    *,
    at: int | Int[Tensor, " batch"] | None = None,
    **kwargs: Any,
) -> Gradient:
    """One pass and one backward pass: the gradient of a number with respect to the memory of every layer.

    Hooks and interventions that are attached act in the pass; first-order effects are then those of further edits.
    Parameters get no gradients.

    Args:
        model: the model.
        x: a text, several, or token ids, as for ``model(x)``.
        of: what to differentiate: logits -> one number per sequence (a `Logit`, a log-probability, ...), which must
            depend on its own sequence alone. A text stands for the logit of that token, after the last one.
        layers: recurrent layers; None for all.
        at: the column that ``of`` depends on, one for all sequences or one per sequence: it then gets the logits of
            that column alone, ``[batch, 1, vocab]``, and no others are made. None: it gets all of them, unless it is a
            `Logit`, which says itself what it depends on.
        **kwargs: arguments of the model, e.g. ``attention_mask``.

    Raises:
        IndexError: a layer that is not recurrent, a token outside the vocabulary, a column that is not there.
        ValueError: not one number per sequence, or the numbers do not depend on what these layers read.

    >>> found = gradient(model, "The state of the", Logit(token))
    >>> found[2].price(found.cache.write(2))        # what each write of layer 2 contributes, [batch, pos, head]
    """
    return differentiate(model, x, in_ids(of, model), layers, at=at, **kwargs)[0]


def differentiate(
    model: HookedRecurrentModel,
    x: Text,
    of: Callable[[Float[Tensor, "batch pos vocab"]], Float[Tensor, " batch"]],
    layers: Sequence[int] | None,
    others: Callable[[], list[Tensor]] = list,
    *,
    at: int | Int[Tensor, " batch"] | None = None,
    **kwargs: Any,
) -> tuple[Gradient, list[Tensor | None]]:
    """`gradient`, and that with respect to other tensors of the same pass (``others()``, asked when it is over); None
    for those that the number does not depend on."""
    chosen = [site.layer for site in model.sites] if layers is None else [model.site(layer).layer for layer in layers]
    if at is None and isinstance(of, Logit):
        of, at = replace(of, at=0), of.at
    check_differentiable(model.hf_model)
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        frozen(model.hf_model),
        owning(everywhere=False) as call,
        ExitStack() as stack,
    ):
        probes = {layer: Probe(stack, model, layer, call) for layer in chosen}
        names = [name_of(q, layer) for layer in chosen for q in model.family(layer).rule.inputs]
        given = {name: _differentiable(value) for name, value in kwargs.items()}
        with late_logits(model) as end:
            _, cache = model.run_with_cache(_differentiable(x), names=names, **given)
        batch, n_pos = end.shape
        if at is None:
            columns = torch.meshgrid(torch.arange(batch), torch.arange(n_pos), indexing="ij")
        else:
            columns = tuple(x[:, None] for x in columns_of(at, batch, n_pos, model.device))
        value = of(end.at(*columns))
        if value.shape != (batch,):
            raise ValueError(f"give one number per sequence, [{batch}]; got {list(value.shape)}")
        if not value.requires_grad:
            raise ValueError("the number asked about does not depend on what these layers read: use the logits given")
        wanted = [tensor for probe in probes.values() for tensor in probe.tensors]
        n, wanted = len(wanted), wanted + others()
        found = torch.autograd.grad(value.sum(), wanted, allow_unused=True)
    cache.detach()
    gradients = dict(zip(map(id, wanted), found, strict=True))
    of_tensor = lambda x: torch.zeros_like(x) if gradients[id(x)] is None else gradients[id(x)]  # noqa: E731
    made = {}
    for layer, probe in probes.items():
        rec = model.family(layer).rule.recurrence(lambda quantity, layer=layer: cache[quantity, layer])
        read = probe.read if cache.of_own_writes(layer) else None
        made[layer] = LayerGradient(rec, cache.write(layer), *probe.gradients(of_tensor), read)
    return Gradient(value.detach(), end.detach(), cache, made), list(found[n:])


def _differentiable(x: Any) -> Any:
    """A tensor made under ``inference_mode`` as one that a backward pass may keep; everything else as it is."""
    return x.clone() if isinstance(x, Tensor) and x.is_inference() else x


def check_differentiable(module: nn.Module) -> None:
    """Raise ValueError if no gradient can go through a model."""
    if any(p.is_inference() for p in module.parameters()):
        raise ValueError(
            "the model was loaded under torch.inference_mode(), so nothing can be differentiated through its weights: "
            "load it outside of that block"
        )


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """No parameter wants a gradient while the block runs: the graph then begins at the first probe."""
    wanted = [p for p in module.parameters() if p.requires_grad]
    for p in wanted:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in wanted:
            p.requires_grad_(True)
