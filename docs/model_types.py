"""Writes docs/model_types.md: every model type with a memory that transformers and flash-linear-attention have.

Run it again after a new release of either: ``python docs/model_types.py``. It fails while a type is neither among the
adapters nor among the reasons of `writesae.models.kinds`.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

from writesae.hooks.families import FAMILIES, Family
from writesae.models.kinds import OF_FLA, OF_TRANSFORMERS, has_recurrence
from writesae.models.load import OURS

PAGE = Path(__file__).with_suffix(".md")
AS_TRANSFORMERS = ("bitnet", "mamba", "mamba2")  # kinds of flash-linear-attention that load as transformers' own
OF_LAYERS = ("gdn2",)  # kinds of ours alone: flash-linear-attention has the layer, and no model of it

HEAD = """# Every recurrent model type

Made by `docs/model_types.py` from the sources of transformers and flash-linear-attention; a test compares it with those
that are installed. [The support table](support.md) says what works for those with an adapter. A model with images or
sound around one of these text models is found by the text model inside.
"""


def package(name: str) -> Path | None:
    """Where an installed package lies."""
    found = importlib.util.find_spec(name)
    return None if found is None or not found.submodule_search_locations else Path(found.submodule_search_locations[0])


def of_transformers() -> list[str]:
    """Folders of the installed transformers whose models remember more than keys and values."""
    folder = package("transformers")
    assert folder is not None
    return sorted(file.parent.name for file in folder.glob("models/*/modeling_*.py") if has_recurrence(file))


def of_fla() -> list[str] | None:
    """Model types of the installed flash-linear-attention; None where only its operations are installed."""
    folder = package("fla")
    files = [] if folder is None else sorted(folder.glob("models/*/configuration_*.py"))
    found = (re.search(r"""model_type = ['"](\w+)""", file.read_text("utf-8")) for file in files)
    return sorted(match[1] for match in found if match) or None


def adapters() -> dict[str, Family]:
    """``{modeling module: family}``, the first of it where a file has mixers of several."""
    return {module: family for family in reversed(FAMILIES) for module in family.mixers}


def ours_of_fla() -> dict[str, Family]:
    """``{model type: family}`` of our own models."""
    return {kind: adapters()[cls.__module__] for kind, cls in OURS.items()}


def adapted() -> dict[str, Family]:
    """``{folder of transformers: family}``."""
    prefix = "transformers.models."
    return {module.split(".")[2]: family for module, family in adapters().items() if module.startswith(prefix)}


def table(kinds: list[str], ours: dict[str, Family], reasons: dict[str, str]) -> str:
    """One row for each kind.

    Raises:
        ValueError: a kind is neither in ``ours`` nor in ``reasons``, or in both.
    """
    if wrong := [kind for kind in kinds if (kind in ours) == (kind in reasons)]:
        raise ValueError(
            f"{', '.join(wrong)}: each needs an adapter (writesae.hooks.families) or a reason (writesae.models.kinds)"
        )
    rows = ["| model type | adapter | if there is none, why |", "|---|---|---|"]
    for kind in kinds:
        name, why = (ours[kind].name, "") if kind in ours else ("none", reasons[kind])
        rows.append(f"| `{kind}` | {name} | {why} |")
    return "\n".join(rows)


def page() -> str:
    """The page. Of flash-linear-attention those types that we know of, if it is not installed."""
    kinds = of_fla() or sorted({*OURS, *OF_FLA})
    theirs = [kind for kind in kinds if kind not in (*AS_TRANSFORMERS, *OF_LAYERS)]
    code = lambda kinds: ", ".join(f"`{kind}`" for kind in kinds)  # noqa: E731
    parts = [
        f"{HEAD}\n## transformers",
        table(of_transformers(), adapted(), OF_TRANSFORMERS),
        "## flash-linear-attention",
        f"Its {code(AS_TRANSFORMERS)} load as transformers' own. Of {code(OF_LAYERS)} it has a layer and no model: the "
        f"one here is ours.",
        table(sorted([*theirs, *OF_LAYERS]), ours_of_fla(), OF_FLA),
    ]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
