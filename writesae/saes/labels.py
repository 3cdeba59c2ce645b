"""What atoms mean, in words, as a file: labels with their scores. `writesae.explain` makes them, pages show them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from writesae.jobs.disk import read_json, write_json

FORMAT = "writesae labels 1"
AGAIN = "`writesae explain` with another --out makes it again"


@dataclass(frozen=True)
class Score:
    """How well a judge who knows only the label told contexts where the atom fires from others.

    Attributes:
        right_active, n_active: contexts where it fires that were judged so, of how many.
        right_inactive, n_inactive: the same of those where it does not fire.
        unanswered: contexts that the judge gave no usable answer for; counted nowhere else.
    """

    right_active: int
    n_active: int
    right_inactive: int
    n_inactive: int
    unanswered: int = 0

    @property
    def balanced_accuracy(self) -> float:
        """Mean of the two shares that were right: 0.5 is chance, 1 is perfect; NaN if one kind has no answers."""
        if not self.n_active or not self.n_inactive:
            return float("nan")
        return (self.right_active / self.n_active + self.right_inactive / self.n_inactive) / 2


@dataclass(frozen=True)
class Label:
    """What an atom means.

    Attributes:
        text: the label; None if none was made, and ``problem`` says why.
        detection: score of telling whole contexts in which the atom fires from those in which it does not.
        fuzzing: score of telling contexts with the right tokens marked from those with others marked.
        problem: why there is no label or no score; None if there is.
    """

    text: str | None
    detection: Score | None = None
    fuzzing: Score | None = None
    problem: str | None = None

    @classmethod
    def loaded(cls, x: Mapping[str, Any]) -> Label:
        """From JSON's dictionaries."""
        scores = {name: None if x[name] is None else Score(**x[name]) for name in ("detection", "fuzzing")}
        return cls(x["text"], **scores, problem=x["problem"])


@dataclass(eq=False)
class Labels:
    """Labels of an SAE's atoms: ``labels[53]`` is a `Label`, ``53 in labels`` says whether there is one.

    Attributes:
        sae: fingerprint of the SAE (`WriteSAE.fingerprint`).
        by: who made them: the name of the language model.
        made_with: everything else that they depend on.
        atoms: atom -> label.
    """

    sae: str
    by: str
    made_with: dict[str, Any] = field(default_factory=dict)
    atoms: dict[int, Label] = field(default_factory=dict)

    def __getitem__(self, atom: int) -> Label:
        if atom not in self.atoms:
            raise KeyError(f"atom {atom} has no label here; {len(self)} atoms have: {sorted(self.atoms)[:10]}")
        return self.atoms[atom]

    def __contains__(self, atom: int) -> bool:
        return atom in self.atoms

    def __iter__(self) -> Iterator[int]:
        return iter(sorted(self.atoms))

    def __len__(self) -> int:
        return len(self.atoms)

    def to_dict(self) -> dict[str, Any]:
        """All of it, as JSON has it."""
        atoms = {str(atom): asdict(self.atoms[atom]) for atom in self}
        return {"sae": self.sae, "by": self.by, "made_with": self.made_with, "atoms": atoms}

    def save(self, path: str | Path) -> None:
        """Write the file, whole or not at all, with its checksum."""
        write_json(Path(path), {"format": FORMAT, **self.to_dict()})

    @classmethod
    def load(cls, path: str | Path, sae: Any = None) -> Labels:
        """Read a file of labels.

        Args:
            path: the file.
            sae: the SAE that they have to be of; None takes those of any.

        Raises:
            FileNotFoundError: no such file.
            ValueError: it was altered, is something else, or labels of another SAE.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"{path} is no file of labels: `writesae explain SAE --out {path}` makes one")
        found = read_json(Path(path), AGAIN)
        if found.get("format") != FORMAT:
            raise ValueError(f"{path} is no file of labels (format {found.get('format')!r}, not {FORMAT!r}); {AGAIN}")
        if sae is not None and found["sae"] != sae.fingerprint():
            raise ValueError(
                f"{path} has labels of another SAE (fingerprint {found['sae']}, this one's is {sae.fingerprint()}): "
                f"give the file of this SAE; {AGAIN}"
            )
        atoms = {int(atom): Label.loaded(x) for atom, x in found["atoms"].items()}
        return cls(found["sae"], found["by"], found["made_with"], atoms)

    def __repr__(self) -> str:
        return f"Labels({sum(x.text is not None for x in self.atoms.values())} atoms, by {self.by})"
