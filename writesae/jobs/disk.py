"""Files that are there whole or not at all, and that say themselves whether they are as they were written.

Every JSON file of ours has its own checksum as its last entry, over all others. A file that was altered, by a bad disk
or by hand, is an error that names it. Files that were made before this have none, and are taken as they are.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CHECKSUM = "writesae_checksum"  # of a JSON file's other entries


def remove_halves(folder: Path, *names: str) -> None:
    """Remove what processes that were killed left half-written of files of these names (or patterns of names). What a
    process that still runs is writing stays."""
    for name in names:
        for half in folder.glob(f".{name}.*.tmp"):
            if not _runs(half.name.split(".")[-2]):
                half.unlink(missing_ok=True)


def _runs(process: str) -> bool:
    """Whether a process of this number runs, other than this one."""
    if not process.isdigit() or int(process) == os.getpid():
        return False
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError, OSError):
        return True
    return True


def write_whole(path: Path, data: bytes) -> None:
    """Write under a temporary name, then rename: a reader sees the old file or the new one, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, values: Mapping[str, Any], indent: int | None = 2) -> None:
    """Write an object as JSON, whole, with its checksum."""
    write_whole(path, (json.dumps(sealed(values), indent=indent, allow_nan=False) + "\n").encode())


def plain(x: Any) -> Any:
    """What JSON has: numbers that are not finite, and everything that it does not know, as text."""
    if isinstance(x, Mapping):
        return {str(key): plain(value) for key, value in x.items()}
    if isinstance(x, list | tuple):
        return [plain(value) for value in x]
    if isinstance(x, float):
        return x if math.isfinite(x) else str(x)
    return x if isinstance(x, str | int | None) else str(x)


def read_json(path: Path, again: str = "fetch or make it again") -> dict[str, Any]:
    """The object in a JSON file, without its checksum, which is checked if there is one.

    Args:
        path: the file.
        again: what to do about a damaged one, for the message.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file was cut off or altered, or holds something else.
    """
    try:
        values = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{path} is not JSON ({e}): it was cut off or altered; {again}") from e
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a JSON {type(values).__name__}, not an object with names; {again}")
    try:
        return unsealed(values)
    except ValueError as e:
        raise ValueError(f"{path} {e}; {again}") from e


def sealed(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values with their checksum."""
    if CHECKSUM in values:
        raise ValueError(f"{CHECKSUM!r} is the name of the checksum itself")
    return {**values, CHECKSUM: _checksum(values)}


def unsealed(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values without their checksum; ValueError if it is not theirs."""
    found = {name: value for name, value in values.items() if name != CHECKSUM}
    if CHECKSUM in values:
        if values[CHECKSUM] != _checksum(found):
            raise ValueError(
                f"was altered after it was written (its checksum differs; if you did that, delete its entry {CHECKSUM})"
            )
        return found
    for name, value in found.items():  # its own name may be what was altered
        if isinstance(value, str) and re.fullmatch(r"[0-9a-f]{16}", value):
            others = {other: x for other, x in found.items() if other != name}
            if value == _checksum(others):
                raise ValueError(f"was altered after it was written ({CHECKSUM!r} is called {name!r})")
    return found


def _checksum(values: Mapping[str, Any]) -> str:
    """Over what JSON says, and not how: order of names, spaces and line breaks are free."""
    return hashlib.sha256(json.dumps(json.loads(json.dumps(values)), sort_keys=True).encode()).hexdigest()[:16]
