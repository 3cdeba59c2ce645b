"""Files that are there whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path


def remove_halves(folder: Path, *names: str) -> None:
    """Remove what processes that were killed left half-written of files of these names (or patterns of names)."""
    for name in names:
        for half in folder.glob(f".{name}.*.tmp"):
            half.unlink()


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
