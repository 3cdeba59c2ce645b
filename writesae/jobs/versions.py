"""What a result was made with: the versions that are installed. That of writesae stands in `pyproject.toml`."""

from __future__ import annotations

from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version


def versions(*packages: str) -> dict[str, str]:
    """The version of each package that is installed."""
    found = {}
    for name in packages:
        with suppress(PackageNotFoundError):  # of an extra that was not asked for
            found[name] = version(name)
    return found
