"""Packages that only some features need. A plain install does without them; `EXTRAS` says which extra brings each."""

from __future__ import annotations

from importlib import import_module
from typing import Any

EXTRAS = {  # package -> the extra of pyproject.toml that has it
    "datasets": "data",
    "matplotlib": "plots",
    "openai": "explain",
    "pandas": "stats",
    "scipy": "stats",
    "sklearn": "stats",
    "starlette": "serve",
    "uvicorn": "serve",
}


class MissingExtra(ImportError):
    """A package that an extra brings is not installed."""


def extra(module: str) -> Any:
    """A module of one of these packages, imported now: called where it is used, never while a module of ours is loaded.

    Raises:
        MissingExtra: the package is not installed; the message has the command that installs it.
    """
    package = module.partition(".")[0]
    try:
        import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:  # it is installed, and itself lacks something
            raise
        name = EXTRAS[package]
        raise MissingExtra(
            f"this needs {package}, which is not installed and comes with the extra [{name}]: "
            f"pip install 'writesae[{name}]'",
            name=package,
        ) from error
    return import_module(module)


def need(*modules: str) -> None:
    """Say now that one of these is missing, before work begins that will use them at its end; raises as `extra`."""
    for module in modules:
        extra(module)
