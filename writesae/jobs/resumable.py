"""Folders that a stopped run continues in: what is there is taken, if it was made by the same work.

What the work is, its *identity*, is everything that its results depend on: weights, settings, texts (by a hash). It is
kept with the results, in one of two ways:

- each file says what it was made with, and one made with anything else is made again: `Kept`;
- the whole folder is of one work, and a run of other work is refused: `check_same` says in what they differ.

Either way a file appears whole or not at all (`writesae.jobs.disk`), so that what is there can be taken as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from writesae.jobs.disk import read_json, write_json


@dataclass(frozen=True)
class Kept:
    """JSON files of one work in a folder, each with the work's identity beside its contents.

    Attributes:
        folder: where they are; None keeps nothing.
        identity: everything the contents depend on, as JSON gives it back.
    """

    folder: Path | None
    identity: Mapping[str, Any]

    def read(self, name: str) -> dict[str, Any] | None:
        """The contents of a file; None if it is not there, damaged, or of other work: make it again."""
        if self.folder is None:
            return None
        try:
            found = read_json(self.folder / name)
        except (OSError, ValueError):
            return None
        if differences(found, self.identity):
            return None
        return {key: value for key, value in found.items() if key not in self.identity}

    def write(self, name: str, contents: Mapping[str, Any]) -> None:
        """Write a file, whole or not at all; keys of the contents are none of the identity's."""
        if self.folder is not None:
            write_json(self.folder / name, {**self.identity, **contents}, indent=None)


def differences(there: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The keys of ``now`` that are missing, or have another value, in what is there."""
    return [key for key, value in now.items() if key not in there or there[key] != value]


def check_same(folder: Path, there: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse to continue in a folder that was begun by other work.

    Args:
        folder: for the message.
        there: identity of the work that the folder was begun by.
        now: identity of this work. What it does not have is not compared.

    Raises:
        ValueError: they differ; the message says in what.
    """
    if found := differences(there, now):
        pairs = "; ".join(f"{key} {there.get(key)!s:.60} there, {now[key]!s:.60} now" for key in found)
        raise ValueError(f"{folder} was begun otherwise: {pairs}. Give what it was begun with, or choose a new folder")
