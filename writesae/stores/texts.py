"""Readers of texts: .txt files, data sets, token ids; cut into windows that never cross from text to text."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from writesae.jobs.extras import extra
from writesae.stores.windows import Windows, at_most

if TYPE_CHECKING:
    from writesae.model import HookedRecurrentModel

_READERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}


class Document(NamedTuple):
    """A text, and the file that it was read from."""

    name: str
    text: str


def read(path: Path) -> list[Document]:
    """The documents of a .txt file, or of every .txt file below a folder, in natural order (chapter_2 < chapter_10).

    Raises:
        FileNotFoundError: no such file or folder.
        ValueError: there is no text in it.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: give a .txt file, or a folder of .txt files")
    root = path if path.is_dir() else path.parent
    files = path.rglob("*.txt") if path.is_dir() else [path]
    documents = [Document(str(f.relative_to(root)), f.read_text(encoding="utf-8").strip()) for f in files]
    documents = [document for document in documents if document.text]
    if not documents:
        raise ValueError(f"no text in {path}")
    return sorted(documents, key=lambda d: [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", d.name)])


def from_files(
    model: HookedRecurrentModel, path: Path, context: int, max_tokens: int | None = None
) -> Int[Tensor, "n pos"]:
    """The windows of a .txt file, or of every .txt file below a folder.

    Args:
        model: whose tokenizer is used.
        path: file or folder.
        context: tokens per window.
        max_tokens: keep at most this many tokens, evenly spread over all of the text; None for all.

    Raises:
        FileNotFoundError: no such file or folder.
        ValueError: no text in it, or no text as long as one window.
    """
    found = Windows.cut(model, [document.text for document in read(path)], context)
    return found.enough(of=str(path)).spread(max_tokens).tokens.int()


def from_dataset(
    model: HookedRecurrentModel,
    name: str,
    context: int,
    max_tokens: int | None = None,
    *,
    split: str = "train",
    column: str = "text",
    config: str | None = None,
) -> Int[Tensor, "n pos"]:
    """The windows of a data set, read as a stream: nothing is downloaded beyond what is used.

    A stream has no known end, so ``max_tokens`` takes the first windows. Needs the extra ``data``.

    Args:
        model: whose tokenizer is used.
        name: a hub id, a folder that `datasets` can load, or one .jsonl, .json, .parquet or .csv file.
        context: tokens per window.
        max_tokens: keep at most this many tokens; None for the whole split.
        split, column: where the texts are.
        config: which of the data set's configurations, if it has several.

    Raises:
        ImportError: the extra is not installed.
        FileNotFoundError, ValueError: no such data set, split or column, or no text as long as one window.
    """
    most, n, rows = at_most(max_tokens, context), 0, []
    for text in _texts(name, split, column, config):
        rows.append(model.to_tokens(text)[0][0].int())
        n += len(rows[-1]) // context
        if n >= most:
            break
    found = Windows.of_rows(rows, context).enough(of=f"data set {name}, split {split}, column {column},")
    return found[:most].tokens.int()


def from_array(path: Path, context: int, max_tokens: int | None = None, n_vocab: int = 2**31) -> Int[Tensor, "n pos"]:
    """The windows of token ids in a .npy file: ``[pos]`` is one text; in ``[n, pos]`` every row is one.

    Args:
        path: the file.
        context: tokens per window.
        max_tokens: keep at most this many tokens, evenly spread; None for all.
        n_vocab: of the model: ids are below it.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no array of integers of one or two dimensions, or no row as long as one window.
    """
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist: give a .npy file of token ids") from None
    except (MemoryError, PermissionError):
        raise
    except Exception as e:  # its header is Python, and fails in many ways when it is damaged
        raise ValueError(f"{path} is not a whole .npy file of numbers ({e}); make it again") from e
    if not isinstance(array, np.ndarray) or array.ndim not in (1, 2) or array.dtype.kind not in "iu":
        got = f"{array.dtype} {list(array.shape)}" if isinstance(array, np.ndarray) else "an archive of arrays"
        raise ValueError(f"{path} holds {got}; token ids are integers, [pos] or [n, pos]")
    array = np.atleast_2d(array)
    if array.size and not 0 <= int(array.min()) <= int(array.max()) < n_vocab:
        raise ValueError(
            f"{path} holds numbers from {array.min()} to {array.max()}: these are no token ids; allowed are 0 to "
            f"{n_vocab - 1}"
        )
    found = Windows.of_rows([torch.from_numpy(row.astype(np.int32)) for row in array], context)
    return found.enough(of=str(path)).spread(max_tokens).tokens


def _texts(name: str, split: str, column: str, config: str | None) -> Iterator[str]:
    """The texts of a data set, in order; rows without text are left out."""
    datasets = extra("datasets")
    datasets.disable_progress_bars()
    kind, files = (_READERS.get(Path(name).suffix), name) if Path(name).is_file() else (name, None)
    if kind is None:
        raise ValueError(f"{name}: a data set in one file is one of {', '.join(_READERS)}")
    try:
        rows: Any = datasets.load_dataset(kind, config, data_files=files, split=split, streaming=True)
    except (OSError, ValueError) as e:  # no such data set, configuration or split; no network
        raise ValueError(f"data set {name}, split {split}, cannot be read: {e}") from e
    for row in rows:
        if column not in row:
            raise ValueError(f"data set {name} has no column {column!r}; its columns are {', '.join(row)}")
        if not isinstance(row[column], str | None):
            raise ValueError(f"column {column!r} of data set {name} holds {type(row[column]).__name__}, not text")
        if row[column]:
            yield row[column]
