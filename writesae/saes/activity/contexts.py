"""The contexts in which atoms of an SAE fire most strongly, as `top_contexts` finds them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from rich.table import Table
from rich.text import Text
from torch import Tensor

from writesae.saes.config import SAEConfig

EDGES = 2.0 ** torch.arange(-16, 16.5, 0.5)  # of a histogram's bins; the first and the last are open


@dataclass(frozen=True)
class Context:
    """A firing of an atom, and the tokens around it in its window.

    Attributes:
        activation: of the atom.
        document, position: which text, counted from 0, and which of its tokens.
        before, token, after: strings of the tokens; ``token`` is where the atom fires.
        activations: of the atom at each of these tokens, in order.
    """

    activation: float
    document: int
    position: int
    before: tuple[str, ...]
    token: str
    after: tuple[str, ...]
    activations: tuple[float, ...]


@dataclass(frozen=True, eq=False)
class Contexts:
    """What `top_contexts` found, one row per atom: ``contexts[53]`` is a list of `Context`, strongest first.

    Attributes:
        cfg: of the SAE.
        atoms: the atoms looked for.
        n_documents, n_tokens: how much was read.
        fired: at how many of these tokens each atom fired.
        histogram: of its activations, in bins between `EDGES`.
        values: activations, largest first; 0 where there were fewer.
        documents, positions: where.
        tokens, activations: of the tokens around, ``before`` of them and then the one; id -1 beyond a window's end.
        strings: of the token ids that occur.
    """

    cfg: SAEConfig
    atoms: Int[Tensor, " atom"]
    before: int
    n_documents: int
    n_tokens: int
    fired: Int[Tensor, " atom"]
    histogram: Int[Tensor, "atom bin"]
    values: Float[Tensor, "atom n"]
    documents: Int[Tensor, "atom n"]
    positions: Int[Tensor, "atom n"]
    tokens: Int[Tensor, "atom n width"]
    activations: Float[Tensor, "atom n width"]
    strings: dict[int, str]

    def __getitem__(self, atom: int) -> list[Context]:
        """Its strongest firings; none if it never fired. IndexError if it was not looked for."""
        row = self._row(atom)
        return [self._context(row, i) for i in range(int((self.values[row] > 0).sum()))]

    def most_frequent(self, n: int) -> list[int]:
        """The atoms that fire most, without those that never do."""
        order = self.fired.argsort(descending=True, stable=True)[:n]
        return self.atoms[order[self.fired[order] > 0]].tolist()

    def about(self, atom: int) -> str:
        """How often it fires and how strongly, in a line."""
        row = self._row(atom)
        fired, seen = int(self.fired[row]), f"{self.n_tokens:,} tokens"
        if not fired:
            return f"atom {atom} never fires in {seen}"
        share = 100 * fired / self.n_tokens
        return (
            f"atom {atom} fires {fired:,} times in {seen} ({share:.2g}%), at most with {float(self.values[row, 0]):.3g}"
        )

    def table(self, atom: int) -> Table:
        """Its strongest firings, the token marked, tokens at which it also fires underlined."""
        table = Table(title=self.about(atom))
        for name in ("activation", "document", "token"):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("«» where it fires")
        for c in self[atom]:
            shown, at = Text(), len(c.before)
            for i, token in enumerate((*c.before, c.token, *c.after)):
                plain = token.replace("\n", "⏎")
                also = "underline" if c.activations[i] > 0 else ""
                shown.append(*((f"«{plain}»", "bold reverse") if i == at else (plain, also)))
            table.add_row(f"{c.activation:.3g}", str(c.document), str(c.position), shown)
        return table

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        atoms = [
            {
                "atom": atom,
                "fired": int(self.fired[row]),
                "max": float(self.values[row, 0]),
                "histogram": self.histogram[row].tolist(),
                "contexts": [asdict(context) for context in self[atom]],
            }
            for row, atom in enumerate(self.atoms.tolist())
        ]
        counts = {"n_documents": self.n_documents, "n_tokens": self.n_tokens}
        return {"sae": self.cfg.to_dict(), **counts, "edges": EDGES.tolist(), "atoms": atoms}

    def __repr__(self) -> str:
        alive = int((self.fired > 0).sum())
        return f"Contexts({alive:,} of {len(self.atoms):,} atoms fired in {self.n_tokens:,} tokens)"

    def _row(self, atom: int) -> int:
        found = (self.atoms == atom).nonzero()
        if not len(found):
            given = f"{self.atoms[:8].tolist()}"[1:-1] + (", ..." if len(self.atoms) > 8 else "")
            raise IndexError(f"atom {atom} was not looked for; top_contexts was asked for {given}")
        return int(found[0])

    def _context(self, row: int, i: int) -> Context:
        there = self.tokens[row, i] >= 0
        strings = [self.strings[token] for token in self.tokens[row, i][there].tolist()]
        at = int(there[: self.before].sum())
        return Context(
            float(self.values[row, i]),
            int(self.documents[row, i]),
            int(self.positions[row, i]),
            tuple(strings[:at]),
            strings[at],
            tuple(strings[at + 1 :]),
            tuple(self.activations[row, i][there].tolist()),
        )
