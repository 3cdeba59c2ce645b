"""``manifest.json`` of a collection of checkpoints: a SHA-256 for each tag."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath

from writesae.jobs.disk import read_json

MANIFEST = "manifest.json"
_ALLOWED = f'{MANIFEST} maps tags or paths to a SHA-256, or to an object with "sha256"'


def verify(path: Path, digest: str, root: Path) -> bool:
    """Whether ``manifest.json`` in ``root`` vouches for a file; False if there is none, or it does not name the file.

    A file is named by its path, its folder's path, or the end of either (a tag is the last folder's name); the longest
    counts.

    Raises:
        ValueError: the checksum is another, or the manifest is not one.
    """
    manifest = root / MANIFEST
    if not manifest.is_file():
        return False
    place = path.absolute().parts
    entries = {PurePosixPath(tag).parts: checksum for tag, checksum in _read(manifest).items()}
    named = [tag for tag in entries if tag in (place[-len(tag) :], place[:-1][-len(tag) :])]
    if not named:
        return False
    tag = max(named, key=len)
    if entries[tag] != digest:
        raise ValueError(
            f"{path} has SHA-256 {digest}, but {manifest} says {entries[tag]} for {'/'.join(tag)}: it was damaged or "
            f"exchanged, or the name means another file; fetch it again"
        )
    return True


def _read(manifest: Path) -> dict[str, str]:
    """Tag to checksum."""
    found = {}
    for tag, value in read_json(manifest).items():
        if isinstance(value, dict):
            sums = [x for name, x in value.items() if re.sub("[-_ ]", "", name).lower() == "sha256"]
            value = sums[0] if len(sums) == 1 else f"an object with {', '.join(value) or 'nothing'}"
        if not tag.strip("/. ") or not isinstance(value, str) or not re.fullmatch("[0-9a-fA-F]{64}", value):
            raise ValueError(f"{manifest} says {value!r} for {tag!r}; {_ALLOWED}")
        found[tag] = value.lower()
    return found
