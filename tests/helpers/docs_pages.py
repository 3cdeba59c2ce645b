"""The pages in docs/ as tests see them: their sections, and the code in these."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"


@dataclass(frozen=True)
class Section:
    """A heading of the second level, on a page, and the fenced blocks below it: ``(language, code)``."""

    page: str
    heading: str
    blocks: tuple[tuple[str, str], ...]


def blocks(text: str) -> tuple[tuple[str, str], ...]:
    return tuple((found[1], found[2]) for found in re.finditer(r"(?ms)^```(\w+)\n(.*?)^```$", text))


def setup(page: str) -> str:
    """The first Python of a page: what all its snippets begin with."""
    return next(code for language, code in blocks((DOCS / page).read_text("utf-8")) if language == "python")


def sections(folder: str) -> list[Section]:
    """Those of all pages in a folder, except its index."""
    found = []
    for path in sorted((DOCS / folder).glob("*.md")):
        text = path.read_text("utf-8")
        fenced = re.sub(r"(?ms)^```.*?^```$", lambda block: re.sub(r"(?m)^#", "\0", block[0]), text)  # comments in code
        _, *parts = re.split(r"(?m)^## ", fenced) if path.stem != "README" else [""]
        for part in parts:
            heading, body = part.replace("\0", "#").split("\n", 1)
            found.append(Section(path.name, heading.strip(), blocks(body)))
    return found


def matches(pattern: str, message: str, *, whole: bool = True) -> bool:
    """Whether ``message`` is what ``pattern`` says, where ``...`` is anything and a line break is a space."""
    parts = (re.escape(" ".join(part.split())) for part in pattern.split("..."))
    find = re.fullmatch if whole else re.search
    return find(r"\s*.*?\s*".join(parts), " ".join(message.split())) is not None


def rows(page: str, heading: str) -> list[tuple[list[str], list[str]]]:
    """Of the tables below a heading of the second level: the code in the first and in the second column."""
    text = (DOCS / page).read_text("utf-8")
    part = next(part for part in re.split(r"(?m)^## ", text) if part.startswith(f"{heading}\n"))
    cells = (line.split(" | ") for line in part.splitlines() if line.startswith("| `"))
    return [(re.findall(r"`([^`]+)`", theirs), re.findall(r"`([^`]+)`", ours)) for theirs, ours, *_ in cells]
