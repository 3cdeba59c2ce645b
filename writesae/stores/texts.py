"""Texts to run a model on: files, data sets of the hub, token ids; as sequences that never cross from text to text."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor

if TYPE_CHECKING:
    from writesae.model import HookedRecurrentModel

_READERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}


def sequences(model: HookedRecurrentModel, text: str | Sequence[str], context: int) -> Int[Tensor, "n pos"]:
    """Each text cut into sequences of ``context`` tokens; what is left at its end is dropped."""
    texts = [text] if isinstance(text, str) else text
    return torch.cat([cut(model.to_tokens(part)[0][0], context) for part in texts])


def prompts(
    model: HookedRecurrentModel, text: str | Sequence[str], context: int, n: int, generator: torch.Generator
) -> Int[Tensor, "n pos"]:
    """``n`` of a text's sequences of ``context`` tokens, drawn at random; ValueError if it has fewer."""
    found = sequences(model, text, context)
    if len(found) < n:
        raise ValueError(
            f"the text has {len(found)} prompts of {context} tokens; {n} were asked for: give a longer text, or lower "
            f"n_prompts or context"
        )
    return found[torch.randperm(len(found), generator=generator)[:n]]


def cut(row: Int[Tensor, " pos"], context: int) -> Int[Tensor, "n context"]:
    """One text's tokens in sequences of ``context``, without the remainder."""
    return row[: len(row) // context * context].reshape(-1, context)


def from_files(
    model: HookedRecurrentModel, path: Path, context: int, max_tokens: int | None = None
) -> Int[Tensor, "n pos"]:
    """Sequences of a .txt file, or of every .txt file below a folder.

    Args:
        model: whose tokenizer is used.
        path: file or folder.
        context: tokens of a sequence.
        max_tokens: keep at most so many tokens, evenly spread over all of the text; None for all.

    Raises:
        FileNotFoundError: no such file or folder.
        ValueError: no text in it, or no text as long as one sequence.
    """
    from writesae.zoo import corpus

    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: give a .txt file, or a folder of such")
    found = sequences(model, [document.text for document in corpus.read(path)], context).int()
    return spread(_some(found, path, context), max_tokens)


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
    """Sequences of a data set, read as a stream: nothing is downloaded beyond what is used.

    A stream has no known end, so ``max_tokens`` takes whole documents from its beginning. Needs the extra ``data``.

    Args:
        model: whose tokenizer is used.
        name: a hub id, a folder that `datasets` can load, or one .jsonl, .json, .parquet or .csv file.
        context: tokens of a sequence.
        max_tokens: keep at most so many tokens; None for the whole split.
        split, column: where the texts are.
        config: which of the data set's configurations, if it has several.

    Raises:
        ImportError: the extra is not installed.
        FileNotFoundError, ValueError: no such data set, split or column, or no text as long as one sequence.
    """
    most, n = _at_most(max_tokens, context), 0
    parts = [torch.empty(0, context, dtype=torch.int32)]
    for text in _texts(name, split, column, config):
        parts.append(sequences(model, text, context).int())
        n += len(parts[-1])
        if n >= most:
            break
    return _some(torch.cat(parts), f"{name}, split {split}, column {column}", context)[:most]


def from_array(path: Path, context: int, max_tokens: int | None = None) -> Int[Tensor, "n pos"]:
    """Sequences of token ids in a .npy file: ``[pos]`` is one text, in ``[n, pos]`` every row is one.

    Args:
        path: the file.
        context: tokens of a sequence.
        max_tokens: keep at most so many tokens, evenly spread; None for all.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no array of integers of one or two dimensions, or no row as long as one sequence.
    """
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist: give a .npy file of token ids") from None
    except (ValueError, EOFError) as e:
        raise ValueError(f"{path} is not a .npy file of numbers ({e})") from e
    if not isinstance(array, np.ndarray) or array.ndim not in (1, 2) or array.dtype.kind not in "iu":
        got = f"{array.dtype} {list(array.shape)}" if isinstance(array, np.ndarray) else "an archive of arrays"
        raise ValueError(f"{path} holds {got}; token ids are integers, [pos] or [n, pos]")
    array = np.atleast_2d(array)
    if array.size and not 0 <= int(array.min()) <= int(array.max()) < 2**31:
        raise ValueError(f"{path} holds numbers from {array.min()} to {array.max()}: these are no token ids")
    whole = array[:, : array.shape[1] // context * context].reshape(-1, context)
    return spread(_some(torch.from_numpy(whole.astype(np.int32)), path, context), max_tokens)


def together(rows: Sequence[Int[Tensor, " _"]]) -> tuple[Int[Tensor, "batch n_pos"], dict[str, Tensor]]:
    """Rows of tokens as a batch, padded on the left, and the ``attention_mask`` to give the model, if it needs one."""
    n_pos = max(map(len, rows))
    ids = torch.stack([F.pad(row, (n_pos - len(row), 0)) for row in rows])
    mask = torch.stack([F.pad(torch.ones_like(row), (n_pos - len(row), 0)) for row in rows])
    return ids, {} if bool(mask.all()) else {"attention_mask": mask}


def spread(tokens: Int[Tensor, "n pos"], max_tokens: int | None) -> Int[Tensor, "m pos"]:
    """As many sequences as ``max_tokens`` allows, evenly spread over all of them."""
    wanted = min(len(tokens), _at_most(max_tokens, tokens.shape[1]))
    return tokens[torch.arange(wanted) * len(tokens) // wanted]


def _at_most(max_tokens: int | None, context: int) -> int:
    """How many sequences."""
    if max_tokens is not None and max_tokens < context:
        raise ValueError(f"max_tokens={max_tokens} is less than one sequence of {context} tokens")
    return sys.maxsize if max_tokens is None else max_tokens // context


def _some(tokens: Tensor, source: object, context: int) -> Tensor:
    if not len(tokens):
        raise ValueError(f"no text of {source} has {context} tokens: choose a smaller context, or give longer texts")
    return tokens


def _texts(name: str, split: str, column: str, config: str | None) -> Iterator[str]:
    """The texts of a data set, in order; rows without text are left out."""
    try:
        import datasets
    except ImportError as e:
        raise ImportError("data sets need the extra [data]: pip install 'writesae[data]'") from e
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
