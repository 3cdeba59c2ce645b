"""The tokenizer of a checkpoint, and RWKV's own, which is no transformers tokenizer."""

from __future__ import annotations

import ast
import functools
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

from writesae.models.load import find, hub_arguments, is_mamba2_of_authors, is_pth, read_config

WORLD_VOCABULARY = "rwkv_vocab_v20230424.txt"
MAMBA2_TOKENIZER = "EleutherAI/gpt-neox-20b"  # what the authors trained all their Mamba-2 models with


def load_tokenizer(source: str | Path, **kwargs: Any) -> Any:
    """The tokenizer of a checkpoint; arguments as for `writesae.models.load.load_model`."""
    hub = hub_arguments(kwargs)
    if is_pth(source):
        return WorldTokenizer()
    fields, name = read_config(source, hub), source
    may_be_rwkv = fields.get("model_type", "rwkv7") == "rwkv7"  # else spare the hub a question
    if may_be_rwkv and (vocabulary := find(source, WORLD_VOCABULARY, hub)):
        return WorldTokenizer(vocabulary)
    if is_mamba2_of_authors(fields) and not find(source, "tokenizer_config.json", hub):
        name, hub = MAMBA2_TOKENIZER, {k: v for k, v in hub.items() if k not in ("revision", "subfolder")}
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **hub)
        if not tokenizer("a", add_special_tokens=False)["input_ids"]:  # transformers makes one of no files at all
            raise ValueError("there are no files of one, or its vocabulary is empty")
        return tokenizer
    except (OSError, ValueError) as error:
        beside = "" if name == source else f" (they use that of {name})"
        raise ValueError(
            f"no tokenizer could be loaded for {source}{beside}: pass tokenizer=..., or tokenizer=False to work with "
            f"token ids only ({error})"
        ) from error


def check_tokenizer(tokenizer: Any, model: PreTrainedModel) -> None:
    """An error if the tokenizer has ids that the model has no embedding for."""
    n_rows = model.get_input_embeddings().weight.shape[0]  # type: ignore[union-attr]
    if hasattr(tokenizer, "__len__") and len(tokenizer) > n_rows:
        raise ValueError(
            f"the tokenizer has ids up to {len(tokenizer) - 1}, but the model's vocabulary ends at {n_rows - 1}: "
            f"it is not this model's tokenizer"
        )


class WorldTokenizer:
    """RWKV's "World" tokenizer: from left to right, the longest token that the text's bytes begin with.

    Args:
        vocabulary: the authors' vocabulary file; None for the one in their package ``rwkv``.
    """

    bos_token_id = eos_token_id = pad_token_id = 0  # the end of a document, which no text encodes to

    def __init__(self, vocabulary: str | Path | None = None):
        if vocabulary is None:
            package = importlib.util.find_spec("rwkv")
            if package is None or not package.submodule_search_locations:
                raise ModuleNotFoundError(
                    "the tokenizer of RWKV models needs the vocabulary in their authors' package: "
                    'pip install "writesae[rwkv]", or pass tokenizer=...',
                    name="rwkv",
                )
            vocabulary = Path(package.submodule_search_locations[0], WORLD_VOCABULARY)
        self.tokens = _read_vocabulary(str(vocabulary))
        self._ids = {token: i for i, token in self.tokens.items()}
        lengths: dict[bytes, set[int]] = {}
        for token in self._ids:
            lengths.setdefault(token[:2], set()).add(len(token))
        self._lengths = {start: sorted(found, reverse=True) for start, found in lengths.items()}

    def __len__(self) -> int:
        return 1 + max(self.tokens)

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": self.encode(text)}

    def encode(self, text: str) -> list[int]:
        rest, ids = text.encode(), []
        at = 0
        while at < len(rest):
            lengths = (*self._lengths.get(rest[at : at + 2], ()), 1)
            n = next(n for n in lengths if rest[at : at + n] in self._ids)
            ids.append(self._ids[rest[at : at + n]])
            at += n
        return ids

    def decode(self, ids: int | Tensor | Sequence[int], skip_special_tokens: bool = False) -> str:
        """Text; bytes that are no UTF-8 (a part of a character) become U+FFFD."""
        ids = torch.as_tensor(ids).flatten().tolist()
        names = {0: b"" if skip_special_tokens else b"<|endoftext|>"}
        return b"".join(names[i] if i in names else self.tokens.get(i, b"\xff") for i in ids).decode(errors="replace")


@functools.cache
def _read_vocabulary(path: str) -> dict[int, bytes]:
    """A line holds an id, a Python literal (str or bytes), and its length in bytes."""
    tokens = {}
    for line in Path(path).read_text(encoding="utf-8").split("\n"):
        if line.strip():
            i, rest = line.split(" ", 1)
            token = ast.literal_eval(rest[: rest.rindex(" ")])
            tokens[int(i)] = token.encode() if isinstance(token, str) else token
    return tokens
