"""What a result was made with: the versions that are installed. That of writesae stands in `pyproject.toml`."""

from __future__ import annotations

from importlib.metadata import version


def versions(*packages: str) -> dict[str, str]:
    """The installed version of each package."""
    return {name: version(name) for name in packages}
