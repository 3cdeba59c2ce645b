"""From checkpoints of the paper's code to SAE folders of ours: one file, a folder, a tree of them, or a hub repository.

A checkpoint is any ``.pt`` file. Of those that one run leaves in its folder, ``best.pt`` counts, else ``final.pt``,
else ``checkpoint.pt``; the others are named in the result.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from writesae.saes.formats import fetch
from writesae.saes.paper.manifest import MANIFEST
from writesae.saes.paper.reference import CHECKPOINTS, ON_HUB, load_reference
from writesae.saes.sae import WriteSAE

__all__ = ["Conversion", "conversions", "convert", "load_reference"]


@dataclass(frozen=True)
class Conversion:
    """What became of one checkpoint.

    Attributes:
        checkpoint: the file, as seen from the source.
        folder: where its SAE is now, or was to be.
        result: the SAE, or why there is none.
        passed_over: other checkpoints of the same run, left alone.
    """

    checkpoint: Path
    folder: Path
    result: WriteSAE | Exception
    passed_over: tuple[str, ...] = ()


def convert(
    source: str | Path,
    out: str | Path,
    *,
    model_id: str | None = None,
    layer: int | None = None,
    head: int | None = None,
    revision: str | None = None,
) -> list[Path]:
    """Make SAE folders of every checkpoint in ``source``; those that can't be converted are named when all are done.

    Args:
        source: a ``.pt`` file, a folder, a tree of folders, or the hub: ``owner/name``, or ``owner/name/a/folder``. Of
            a hub repository, ``best.pt``, ``config.json`` and ``manifest.json`` are fetched.
        out: of one file or one folder with a checkpoint, the SAE's folder; of a tree, the same tree again.
        model_id: the model that they belong to.
        layer: where the checkpoint does not say; for one checkpoint only.
        head: likewise.
        revision: branch, tag or commit on the hub.

    Returns:
        The folders, for `WriteSAE.from_pretrained`.

    Raises:
        FileNotFoundError: nothing there.
        OSError, ValueError: what `load_reference` says of the only one.
        ValueError: some can't be converted; the message has each with its reason. The others are there.
    """
    done = list(conversions(source, out, model_id=model_id, layer=layer, head=head, revision=revision))
    failed = [c.result for c in done if isinstance(c.result, Exception)]
    if failed and len(done) == 1:
        raise failed[0]
    if failed:
        reasons = "\n".join(map(str, failed))
        raise ValueError(f"{len(failed)} of {len(done)} checkpoints could not be converted:\n{reasons}")
    return [c.folder for c in done]


def conversions(
    source: str | Path,
    out: str | Path,
    *,
    model_id: str | None = None,
    layer: int | None = None,
    head: int | None = None,
    revision: str | None = None,
) -> Iterator[Conversion]:
    """`convert` one by one; an error of one checkpoint is its result."""
    top, root = _find(str(source), revision)
    found, empty = _checkpoints(top)
    if not found and not empty:
        raise FileNotFoundError(f"{source} has no checkpoint: no .pt file")
    if len(found) > 1 and (layer, head) != (None, None):
        raise ValueError(f"layer and head are for one checkpoint; {source} has {len(found)}: name one of them")
    taken: set[Path] = set()
    for path, passed_over in found.items():
        folder = Path(out)
        if path != top:
            folder /= path.parent.relative_to(top)
            folder = folder if path.name in CHECKPOINTS else folder / path.stem
        result: WriteSAE | Exception
        try:
            if folder in taken:
                raise ValueError(f"{path} would go to {folder}, as another checkpoint does; rename one of them")
            taken.add(folder)
            result = load_reference(path, model_id=model_id, layer=layer, head=head, root=root)
            result.save_pretrained(folder)
        except (OSError, ValueError) as e:
            result = e
        yield Conversion(path.relative_to(root), folder, result, passed_over)
    for path in empty:
        missing = FileNotFoundError(f"{path.parent} has the {path.name} of an SAE, and no .pt file")
        yield Conversion(path.relative_to(root), Path(out) / path.parent.relative_to(top), missing)


def _find(source: str, revision: str | None) -> tuple[Path, Path]:
    """What to convert, and the folder in which a manifest would lie."""
    path = Path(source)
    if path.exists():
        return path, path if path.is_dir() else path.parent
    owner, name, folder = [*source.split("/", 2), "", ""][:3]
    folder = folder.strip("/")
    if path.suffix == ".pt" or not name:
        raise FileNotFoundError(f"{source} is neither a file nor a folder here, nor a hub id of the form owner/name")
    wanted = [f"{folder}/{rest}".lstrip("/") for rest in ON_HUB + tuple(f"*/{x}" for x in ON_HUB)]
    if source.startswith((".", "/", "~")):
        raise FileNotFoundError(f"{source} is not there: give a .pt file, a folder, or owner/name on the hub")
    root = fetch(f"{owner}/{name}", [*wanted, MANIFEST], revision)
    if not (root / folder).is_dir():
        raise FileNotFoundError(f"{owner}/{name} has no {ON_HUB[0]} in {folder or 'it'}")
    return root / folder, root


def _checkpoints(top: Path) -> tuple[dict[Path, tuple[str, ...]], list[Path]]:
    """Each checkpoint with the names of those passed over for it; and configurations of SAEs that have none."""
    if top.is_file():
        return {top: ()}, []
    found, empty = {}, []
    for path in sorted(top.rglob("*.pt")):
        run = [name for name in CHECKPOINTS if (path.parent / name).is_file()]
        if path.name not in run:
            found[path] = ()
        elif path.name == run[0]:
            found[path] = tuple(run[1:])
    for path in sorted(top.rglob(ON_HUB[1])):
        if not any(path.parent.glob("*.pt")) and '"sae_type"' in path.read_text(encoding="utf-8", errors="replace"):
            empty.append(path)
    return found, empty
