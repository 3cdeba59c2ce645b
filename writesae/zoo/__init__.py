"""Models and SAEs shipped inside the package; README.md beside this file says how they were made."""

from pathlib import Path

ZOO = Path(__file__).parent


def shipped_models() -> list[str]:
    """Names of the shipped models."""
    return sorted(folder.parent.name for folder in ZOO.glob("*/config.json"))


def shipped_model(name: str) -> Path | None:
    """Folder of a shipped model; None if no shipped model has that name."""
    return ZOO / name if name in shipped_models() else None


def shipped_saes(model: str) -> list[Path]:
    """Folders of the SAEs shipped with a model."""
    return sorted(folder.parent for folder in (ZOO / model / "saes").glob("*/cfg.json"))


def name_saes(model: str) -> list[Path]:
    """Folders of the SAEs of the heads in which the demo finds a name, trained where six names are told often."""
    return sorted(folder.parent for folder in (ZOO / model / "saes" / "names").glob("*/cfg.json"))


def heldout_documents() -> list[str]:
    """Beginnings of the documents that no shipped model or SAE was trained on."""
    return (ZOO / "heldout.txt").read_text(encoding="utf-8").split("<|endoftext|>")
