"""Where the graph of a circuit is cut: places of a pass whose values are nodes.

At a cut the model goes on with values that have no past, plus zeros to differentiate by (the probe). So a gradient with
respect to a probe goes along direct paths alone: through no other node. The values with their past (``given``) are what
edges end at.

Letters: ``G`` is the gradient of a number with respect to what a cut gives, ``D`` that of the target, by all paths.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from writesae.gradients.backward import LayerGradient
from writesae.recurrence import Recurrence, Write
from writesae.recurrence.kernels import adjoint, adjoint_write, chunked
from writesae.recurrence.write import at_least_float32

EMBEDDING, WRITE, ATOM, FEATURE, ERROR, TARGET = "embedding", "write", "atom", "feature", "error", "target"


@dataclass(frozen=True)
class Node:
    """One node.

    Attributes:
        kind: ``embedding``, ``write``, ``atom``, ``feature``, ``error``, ``target``, or the name of a module of a layer
            that is taken as a whole, such as ``mlp``.
        layer: its layer; -1 for embeddings, the number of layers for the target.
        head: its head; -1 where it is of none.
        position: its token.
        feature: number of the atom or residual feature; the token id, of embeddings and the target; else -1.
        activation: of an atom or a feature; of a whole node None.
        place: name of the hook point, of residual features and their errors.
    """

    kind: str
    layer: int
    position: int
    head: int = -1
    feature: int = -1
    activation: float | None = None
    place: str = ""

    @property
    def has_past(self) -> bool:
        """Whether edges end at it: what an embedding or an error is, nothing explains."""
        return self.kind not in (EMBEDDING, ERROR)


class Cut(ABC):
    """A place whose values are nodes.

    Attributes:
        probe: zeros that were added to what it gives.
        given: what it was given, with its past.
        nodes: its nodes.
    """

    probe: Tensor
    given: Tensor
    nodes: list[Node]

    @abstractmethod
    def effects(self, G: Tensor) -> tuple[Float[Tensor, " n"], Float[Tensor, ""]]:
        """What each node adds to a number, and what is constant does."""

    @abstractmethod
    def pull(self, G: Tensor, replaced: bool) -> Tensor:
        """The gradient with respect to `given`. ``replaced``: errors stay as they were; else the whole value moves."""

    @abstractmethod
    def reads(self, i: int, D: Tensor) -> tuple[Tensor, Float[Tensor, ""]]:
        """The vector, of the shape of `given`, that reads the node's pre-activation off it, and its constant."""

    @abstractmethod
    def removal(self, i: int) -> Tensor | Write:
        """What is added to what the cut gives, or to the state, where the node is taken out."""


@dataclass(eq=False)
class Whole(Cut):
    """A vector per token, taken as a whole: an embedding, or what an MLP or an attention layer gives.

    A node's pre-activation is its value along what the target reads of it, ``D . out``.
    """

    given: Float[Tensor, "1 pos ..."]
    probe: Float[Tensor, "1 pos ..."]
    nodes: list[Node]

    @property
    def value(self) -> Tensor:
        return self.given.detach()

    def effects(self, G: Tensor) -> tuple[Tensor, Tensor]:
        return (at_least_float32(G) * self.value)[0].flatten(1).sum(1), torch.zeros(())

    def pull(self, G: Tensor, replaced: bool) -> Tensor:
        return G

    def reads(self, i: int, D: Tensor) -> tuple[Tensor, Tensor]:
        return _row(D, self.nodes[i].position), torch.zeros(())

    def removal(self, i: int) -> Tensor:
        return -_row(self.value, self.nodes[i].position)


@dataclass(eq=False)
class Features(Cut):
    """The activations of an SAE of the residual stream or of what a module adds to it, and its error, per token.

    A feature's pre-activation is its activation, to first order in what the SAE reads. That is exact for ReLU, TopK and
    JumpReLU, whose active features are linear; what is constant (biases) is the node's constant.

    A transcoder reads what the module is given and stands for what it gives. Then ``given`` is both, side by side, the
    first ``read`` entries being what it reads; otherwise ``read`` is None.
    """

    given: Float[Tensor, "1 pos d_given"]
    probe: Float[Tensor, "1 pos d_model"]
    sae: Any
    nodes: list[Node]
    codes: Float[Tensor, "pos atom"]
    where: tuple[Int[Tensor, " n"], Int[Tensor, " n"]]  # token and feature of each active one
    error: Float[Tensor, "pos d_model"]
    constant: Float[Tensor, " d_model"]
    read: int | None = None

    @classmethod
    def of(cls, given: Tensor, probe: Tensor, sae: Any, layer: int, place: str, read: int | None = None) -> Features:
        with torch.no_grad():
            x = given.detach()[0, :, read or 0 :].to(sae.W_dec)
            codes = sae.encode(given.detach()[0, :, :read].to(sae.W_dec))
            constant, made = sae.decode(torch.zeros_like(codes[:1]))[0], sae.decode(codes)
        t, j = (codes != 0).nonzero(as_tuple=True)
        nodes = [
            Node(FEATURE, layer, int(a), feature=int(b), activation=float(codes[a, b]), place=place)
            for a, b in zip(t.tolist(), j.tolist(), strict=True)
        ] + [Node(ERROR, layer, a, place=place) for a in range(len(x))]
        return cls(given, probe, sae, nodes, codes, (t, j), x - made, constant, read)

    @property
    def value(self) -> Tensor:
        return self.given.detach()[..., self.read or 0 :]

    def effects(self, G: Tensor) -> tuple[Tensor, Tensor]:
        G, (t, j) = G[0].to(self.error), self.where
        of_features = (G[t] * self.sae.W_dec.detach()[j]).sum(1) * self.codes[t, j]
        return torch.cat([of_features, (G * self.error).sum(1)]), (G * self.constant).sum()

    def _slopes(self, weights: Float[Tensor, "pos atom"]) -> Tensor:
        """Gradients of activations, weighted, of the shape of `given`."""
        with torch.enable_grad():
            x = self.given.detach()[0, :, : self.read].to(self.error).requires_grad_()
            found = torch.autograd.grad(self.sae.encode(x), x, weights)[0][None].to(self.given.dtype)
        return F.pad(found, (0, self.given.shape[-1] - found.shape[-1]))

    def pull(self, G: Tensor, replaced: bool) -> Tensor:
        if not replaced:
            return F.pad(G, (self.read or 0, 0))
        active = (self.codes != 0).to(self.error.dtype)
        return self._slopes(G[0].to(self.error) @ self.sae.W_dec.detach().T * active)

    def reads(self, i: int, D: Tensor) -> tuple[Tensor, Tensor]:
        t, j = self.where[0][i], self.where[1][i]
        one = torch.zeros_like(self.codes)
        one[t, j] = 1.0
        slope = self._slopes(one)
        return slope, self.codes[t, j] - (slope * self.given.detach()).sum()

    def removal(self, i: int) -> Tensor:
        made, t = torch.zeros_like(self.probe), self.nodes[i].position
        n = len(self.where[0])
        made[0, t] = -(self.error[t] if i >= n else self.codes[t, self.where[1][i]] * self.sae.W_dec[self.where[1][i]])
        return made.detach()


@dataclass(eq=False)
class Atoms:
    """What an SAE of a head makes of its writes: the active atoms, one entry each, and slopes of the activations."""

    sae: Any
    token: Int[Tensor, " n"]
    atom: Int[Tensor, " n"]
    value: Float[Tensor, " n"]
    slope: Float[Tensor, " n"]  # of the activation in the pre-activation
    pre: Float[Tensor, " n"]
    reading: Float[Tensor, "n *step d_value"]  # of the pre-activation in the write's value

    @classmethod
    def of(cls, sae: Any, write: Write) -> Atoms:
        """``write``: of its head, ``[pos]``."""
        with torch.enable_grad():
            pre = sae.pre(write.detach()).detach().requires_grad_()
            codes = sae.activate(pre)
            slopes = torch.autograd.grad(codes.sum(), pre)[0]
        t, j = (codes != 0).nonzero(as_tuple=True)
        E, key = sae.encoder.detach(), write.key.detach()[t].to(pre.dtype)
        if isinstance(E, Write):
            k, v = E[j].factors()
            reading = torch.einsum("nrk,n...k,nrv->n...v", k, key, v)
        else:
            reading = torch.einsum("nkv,n...k->n...v", E[j], key)
        return cls(sae, t, j, codes.detach()[t, j], slopes[t, j], pre.detach()[t, j], reading)


@dataclass(eq=False)
class Writes(Cut):
    """What the heads of a recurrent layer write, as wholes or as atoms and an error.

    A whole write's pre-activation is its value along what the target reads of it; an atom's is its encoder's. What the
    heads read of either is the recurrence itself (`kernels.adjoint`): exact, and no pattern is made.
    """

    given: Float[Tensor, "1 pos head *step d_value"]  # values of the writes
    probe: Float[Tensor, "1 pos head d_value"]  # of the reads
    recurrence: Recurrence
    write: Write
    read: Float[Tensor, "1 pos head d_value"]
    layer: int
    atoms: dict[int, Atoms]
    nodes: list[Node]

    @classmethod
    def of(
        cls, given: Tensor, probe: Tensor, rec: Recurrence, write: Write, read: Tensor, layer: int, saes: dict[int, Any]
    ) -> Writes:
        atoms = {head: Atoms.of(sae, write[0, :, head]) for head, sae in sorted(saes.items())}
        nodes, n_pos = [], write.shape[1]
        for head in range(write.shape[2]):
            if head in atoms:
                found = atoms[head]
                rows = zip(found.token.tolist(), found.atom.tolist(), found.value.tolist(), strict=True)
                nodes += [Node(ATOM, layer, t, head, j, a) for t, j, a in rows]
            kind = ERROR if head in atoms else WRITE
            nodes += [Node(kind, layer, t, head) for t in range(n_pos)]
        return cls(given, probe, rec, write, read, layer, atoms, nodes)

    def _back(self, G: Tensor) -> Float[Tensor, "1 pos head *step d_value"]:
        """The gradient with respect to the values of the writes."""
        gained, keys = adjoint_write(self.recurrence, G), self.write.factors()[0].unbind(-2)
        found = torch.stack([chunked(adjoint(self.recurrence, key), gained)[0].flip(1) for key in keys], -2)
        return found.view_as(self.write.value)

    def _of_atoms(self, G: Tensor, head: int) -> Float[Tensor, " n"]:
        """What each active atom of a head would add at activation 1."""
        one, found = (slice(None), slice(None), slice(head, head + 1)), self.atoms[head]
        if not len(found.atom):
            return G.new_zeros(0)
        names, index = found.atom.unique(return_inverse=True)
        layer = LayerGradient(self.recurrence[one], self.write[one], G[one])
        atoms = found.sae.dictionary.atom(names).detach()
        return layer.prices(0, atoms)[0][found.token, index]

    def effects(self, G: Tensor) -> tuple[Tensor, Tensor]:
        whole = (self._back(G) * self.write.value)[0].flatten(2).sum(-1)
        parts = []
        for head in range(whole.shape[1]):
            if head not in self.atoms:
                parts.append(whole[:, head])
                continue
            found = self.atoms[head]
            each = self._of_atoms(G, head) * found.value
            parts += [each, whole[:, head].index_add(0, found.token, -each.to(whole.dtype))]
        return torch.cat(parts), torch.zeros(())

    def pull(self, G: Tensor, replaced: bool) -> Tensor:
        back = self._back(G)
        for head, found in self.atoms.items() if replaced else ():
            each = torch.einsum("n,n...->n...", self._of_atoms(G, head) * found.slope, found.reading)
            back[0, :, head] = torch.zeros_like(back[0, :, head]).index_add(0, found.token, each.to(back.dtype))
        return back.to(self.given.dtype)

    def _atom(self, i: int) -> tuple[Atoms, int] | None:
        node = self.nodes[i]
        if node.kind != ATOM:
            return None
        first = next(n for n, other in enumerate(self.nodes) if other.head == node.head)
        return self.atoms[node.head], i - first

    def reads(self, i: int, D: Tensor) -> tuple[Tensor, Tensor]:
        node, atom, made = self.nodes[i], self._atom(i), torch.zeros_like(self.given)
        if atom is None:
            made[0, node.position, node.head] = self._back(D)[0, node.position, node.head]
            return made, torch.zeros(())
        found, n = atom
        made[0, node.position, node.head] = found.reading[n].to(made.dtype)
        return made, found.pre[n] - (found.reading[n] * self.write.value[0, node.position, node.head]).sum()

    def removal(self, i: int) -> Write:
        """A write ``[]`` for the node's head and token."""
        node, atom = self.nodes[i], self._atom(i)
        native = self.write[0, node.position, node.head]
        if atom is not None:
            found, n = atom
            return (found.sae.dictionary.atom(found.atom[n]) * -found.value[n]).detach()
        made = -native
        if node.kind == ERROR:
            found = self.atoms[node.head]
            for n in (found.token == node.position).nonzero()[:, 0].tolist():
                made = made + (found.sae.dictionary.atom(found.atom[n]) * found.value[n]).detach()
        return made

    def change(self, i: int) -> Float[Tensor, "1 pos head d_value"]:
        """What heads read less where the node is taken out."""
        node, edit, made = self.nodes[i], self.removal(i), torch.zeros_like(self.read)
        one, lead = (slice(None), slice(None), slice(node.head, node.head + 1)), (1, self.recurrence.n_pos, 1)
        for key, value in zip(*(x.unbind(-2) for x in edit.factors()), strict=True):
            keys, values = key.new_zeros(*lead, len(key)), value.new_zeros(*lead, len(value))
            keys[0, node.position, 0], values[0, node.position, 0] = key, value
            made[one] += chunked(self.recurrence[one], Write(keys, values))[0].to(made.dtype)
        return made


def _row(x: Tensor, t: int) -> Tensor:
    made = torch.zeros_like(x)
    made[:, t] = x[:, t]
    return made
