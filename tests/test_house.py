"""The law of the house: a room imports only rooms below it, and no two modules import each other in a circle.

Imports are read with `ast`, those for types and those inside functions included. What stands on a higher floor may
import what stands on a lower one, and what stands in its own room.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "writesae"

FLOORS = [  # from the ground up
    {"recurrence", "jobs", "zoo"},
    {"results"},
    {"models"},
    {"hooks"},
    {"model"},
    {"stores", "gradients", "futures"},
    {"saes", "checking"},
    {"experiments", "methods"},
    {"pages"},
    {"explaining"},
    {"saelens", "demo", "zoo.architectures", "zoo.corpus", "zoo.evaluate"},
    {"zoo.train_lm", "zoo.train_saes"},
    {"cli"},
    {"writesae"},  # the face: `writesae/__init__.py`
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
LATE = {"cli", "writesae"}  # rooms that may import ours inside functions: the command line and the face


def modules(package: Path) -> dict[str, Path]:
    """Every module of the package by its dotted name, the package itself as ``writesae``."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        found[".".join(part for part in parts if part != "__init__") or "writesae"] = path
    return found


def imports(path: Path, known: dict[str, Path]) -> Iterator[tuple[str, int, bool]]:
    """``(module, line, inside a function)`` of everything of ours that a file imports."""
    tree = ast.parse(path.read_text("utf-8"))
    late = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                name = full if ours(full) in known else node.module or ""
                if ours(name) in known:
                    yield ours(name), node.lineno, id(node) in late
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if ours(alias.name) in known:
                    yield ours(alias.name), node.lineno, id(node) in late


def ours(name: str) -> str:
    return name.removeprefix("writesae.")


def room_of(module: str) -> str:
    """The room that a module stands in; a script of the zoo stands by itself."""
    return module if module in FLOOR else module.partition(".")[0]


def broken(package: Path) -> list[str]:
    """Every breach of the law, as a sentence."""
    known, found = modules(package), []
    arrows: dict[str, set[str]] = {}
    for module, path in known.items():
        room = room_of(module)
        if room not in FLOOR:
            found.append(f"{module} stands in no room: name its floor in FLOORS")
            continue
        for target, line, late in imports(path, known):
            other = room_of(target)
            where = f"{path.relative_to(package.parent)}:{line}"
            arrows.setdefault(module, set()).add(target)
            if other != room and FLOOR[other] >= FLOOR[room]:
                found.append(f"{where}: {room} imports {target}, which does not stand below it")
            if late and room not in LATE:
                found.append(f"{where}: imports {target} inside a function")
    return found + [f"a circle: {' -> '.join([*circle, circle[0]])}" for circle in circles(arrows)]


def circles(arrows: dict[str, set[str]]) -> list[list[str]]:
    """The strongly connected parts with more than one module in them."""
    reach: dict[str, set[str]] = {}
    for module in arrows:
        seen, todo = set(), [module]
        while todo:
            for target in arrows.get(todo.pop(), ()):
                if target not in seen:
                    seen.add(target)
                    todo.append(target)
        reach[module] = seen
    parts = {
        tuple(sorted({module, *(o for o in reach[module] if module in reach.get(o, ()))}))
        for module in arrows
        if module in reach[module]
    }
    return [list(part) for part in sorted(parts)]


def test_the_law() -> None:
    assert not (found := broken(PACKAGE)), "\n".join(found)


def missing(path: Path) -> list[str]:
    """What a script imports from the package that is not there."""
    wanted = [
        (node.module, alias.name)
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("writesae")
        for alias in node.names
    ]
    return [
        f"{path.name}: {module}.{name}"
        for module, name in wanted
        if not hasattr(importlib.import_module(module), name) and importlib.util.find_spec(f"{module}.{name}") is None
    ]


def test_scripts_import_what_is_there(tmp_path: Path) -> None:
    """Benchmarks and scripts of the site run seldom, so a name that has moved would go unnoticed."""
    scripts = [path for folder in ("benchmarks", "docs") for path in (PACKAGE.parent / folder).rglob("*.py")]
    assert len(scripts) > 15 and not [gone for path in scripts for gone in missing(path)]
    (tmp_path / "old.py").write_text("def main():\n    from writesae.stores import Windows, gone\n")
    assert missing(tmp_path / "old.py") == ["old.py: writesae.stores.gone"]


def test_few_modules_beside_the_rooms() -> None:
    assert len(list(PACKAGE.glob("*.py"))) <= 4


@pytest.mark.parametrize(
    ("module", "text", "breach"),
    [
        ("hooks/points.py", "from writesae.saes.sae import WriteSAE\n", "hooks imports saes.sae"),
        (
            "hooks/points.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from writesae.model import Text\n",
            "hooks imports model",
        ),
        ("recurrence/spec.py", "def late():\n    from writesae.recurrence import write\n", "inside a function"),
        ("recurrence/write.py", "from writesae.recurrence.spec import Recurrence\n", "a circle: recurrence.spec"),
        ("attic.py", "", "stands in no room"),
    ],
    ids=["upward", "upward, for a type", "late", "circle", "no room"],
)
def test_the_law_can_be_broken(tmp_path: Path, module: str, text: str, breach: str) -> None:
    """The twin: a package in which a single line breaks the law."""
    package = tmp_path / "writesae"
    for name in ("hooks/points", "saes/sae", "model/__init__", "recurrence/write", "recurrence/spec"):
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / f"{name}.py").write_text("")
    (package / "recurrence/spec.py").write_text("from writesae.recurrence.write import Write\n")
    assert not broken(package)
    (package / module).write_text((package / module).read_text() + text if (package / module).exists() else text)
    found = broken(package)
    assert any(breach in sentence for sentence in found), found
