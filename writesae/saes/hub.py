"""An SAE on the hub: its files, and a card that says what it is."""

from __future__ import annotations

import html
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, Protocol, runtime_checkable

from writesae.saes.config import VARIANTS, SAEConfig

CARD = "README.md"


@runtime_checkable
class Saveable(Protocol):
    """What can be uploaded: an SAE that writes its own files."""

    cfg: SAEConfig

    def save_pretrained(self, folder: Path, /) -> Path: ...


def push(
    sae: Saveable,
    repo_id: str,
    *,
    subfolder: str | None,
    private: bool,
    commit_message: str,
    revision: str | None,
    license: str | None,
) -> str:
    """See `WriteSAE.push_to_hub`."""
    from huggingface_hub import HfApi

    inside = PurePosixPath(subfolder or "")
    if inside.is_absolute() or ".." in inside.parts:
        raise ValueError(f"subfolder must be a path inside the repository; got {subfolder!r}")
    subfolder = inside.as_posix() if inside.parts else None
    text = card(sae.cfg, repo_id, subfolder=subfolder, revision=revision, license=license)
    api = HfApi()
    with tempfile.TemporaryDirectory() as temporary:  # laid out as the repository is
        root = Path(temporary)
        folder = sae.save_pretrained(root / inside)
        (folder / CARD).write_text(text, encoding="utf-8")
        api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        if subfolder and not api.file_exists(repo_id, CARD, revision=revision):
            (root / CARD).write_text(text, encoding="utf-8")  # the one that the hub shows
        return str(
            api.upload_folder(repo_id=repo_id, folder_path=root, commit_message=commit_message, revision=revision)
        )


def card(
    cfg: SAEConfig,
    repo_id: str,
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    license: str | None = None,
) -> str:
    """The model card: front matter for the hub, then what the SAE is, how to load it, and what was measured."""
    from huggingface_hub import ModelCardData

    on_hub = cfg.model_id if cfg.model_id and re.fullmatch(r"[\w.-]+/[\w.-]+", cfg.model_id) else None
    front = ModelCardData(
        library_name="writesae",
        tags=["writesae", "sparse-autoencoder", "interpretability", "recurrent-state"],
        base_model=on_hub,  # else the hub would refuse the card
        license=license,
    ).to_yaml()
    site = "an unknown head" if cfg.layer is None or cfg.head is None else f"layer {cfg.layer}, head {cfg.head}"
    what = {"write": "what it writes", "delta": "what its state gains", "state": "its state"}[cfg.target]
    atoms = f"rank-{cfg.rank}" if cfg.decoder == "factored" else "dense"
    facts = {
        "variant": f"{_variant(cfg)}, {cfg.sparsity}, k={cfg.k}",
        "encoder, decoder": f"{cfg.encoder}, {cfg.decoder}",
        "reads": f"{cfg.target}, {cfg.d_key} x {cfg.d_value} (keys x values)",
        "atoms": f"{cfg.n_atoms:,}, {atoms}",
        "model": cfg.model_id,
        "its revision": cfg.model_revision,
        "fingerprint of its layer": cfg.fingerprint,
    }
    place = [repr(repo_id), *([repr(subfolder)] if subfolder else []), *([f"{revision=}"] if revision else [])]
    parts = [
        f"---\n{front}\n---\n",
        f"# {_variant(cfg)} of {_text(cfg.model_id or 'a recurrent model')}, {site}\n",
        f"A sparse autoencoder over one head of a recurrent language model: it reads {what}, a matrix "
        f"{cfg.d_key} x {cfg.d_value}, with {cfg.n_atoms:,} {atoms} atoms. Made with `writesae`.\n",
        _table(_flat(facts)),
        f"```python\nimport writesae as ws\n\nsae = ws.WriteSAE.from_pretrained({', '.join(place)})\n```\n",
    ]
    if rows := list(_flat(cfg.training)):
        parts += ["## Training and measurements\n", _table(rows)]
    return "\n".join(parts)


def _variant(cfg: SAEConfig) -> str:
    """The paper's name for the combination, if it has one."""
    for name, choices in VARIANTS.items():
        if all(getattr(cfg, field) == value for field, value in ({"rank": 1} | choices).items()):
            return name
    return "SAE"


def _flat(values: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """Nested records as rows, outer names first."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{name}: ")
        elif value is not None and value != []:
            yield before + str(name), f"{value:.4g}" if isinstance(value, float) else value


def _table(rows: Any) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {_text(name)} | {_text(value)} |" for name, value in rows)]) + "\n"


def _text(value: Any) -> str:
    """One line of plain text, whatever Markdown and HTML would make of it."""
    line = " ".join(html.escape(str(value), quote=False).split())
    return re.sub(r"([\\`*_{}\[\]|~])", r"\\\1", line)
