"""The tokenizer of a checkpoint, and RWKV's own, which transformers does not have."""

from __future__ import annotations

import ast
import functools
import importlib.util
import shutil
from pathlib import Path
from typing import Any, ClassVar

from transformers import AddedToken, AutoTokenizer, PreTrainedModel, PreTrainedTokenizer

from writesae.models.load import find, hub_arguments, is_mamba_of_authors, is_pth, read_config

WORLD_VOCABULARY = "rwkv_vocab_v20230424.txt"
MAMBA_TOKENIZER = "EleutherAI/gpt-neox-20b"  # what the authors trained all their models with


def load_tokenizer(source: str | Path, **kwargs: Any) -> Any:
    """The tokenizer of a checkpoint; arguments as for `writesae.models.load.load_model`."""
    hub = hub_arguments(kwargs)
    if is_pth(source):
        return WorldTokenizer()
    fields, name = read_config(source, hub), source
    may_be_rwkv = fields.get("model_type", "rwkv7") in ("rwkv6", "rwkv7")  # otherwise the hub need not be asked
    if may_be_rwkv and (vocabulary := find(source, WORLD_VOCABULARY, hub)):
        return WorldTokenizer(vocabulary)
    if is_mamba_of_authors(fields) and not find(source, "tokenizer_config.json", hub):
        name, hub = MAMBA_TOKENIZER, {k: v for k, v in hub.items() if k not in ("revision", "subfolder")}
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **hub)
        if not tokenizer("a", add_special_tokens=False)["input_ids"]:  # transformers makes one without files
            raise ValueError("there are no files of one, or its vocabulary is empty")
        return tokenizer
    except (OSError, ValueError) as error:
        beside = "" if name == source else f" (they use that of {name})"
        raise ValueError(
            f"no tokenizer could be loaded for {source}{beside}: pass tokenizer=..., or tokenizer=False to work with "
            f"token ids only ({error})"
        ) from error


def check_tokenizer(tokenizer: Any, model: PreTrainedModel) -> None:
    """Raise ValueError if the tokenizer has ids for which the model has no embedding."""
    n_rows = model.get_input_embeddings().weight.shape[0]  # type: ignore[union-attr]
    if hasattr(tokenizer, "__len__") and len(tokenizer) > n_rows:
        raise ValueError(
            f"the tokenizer has ids up to {len(tokenizer) - 1}, but the model's vocabulary ends at {n_rows - 1}: "
            f"it is not this model's tokenizer"
        )


class WorldTokenizer(PreTrainedTokenizer):
    """RWKV's "World" tokenizer: from left to right, the longest token that the text's bytes begin with.

    It does what tokenizers of transformers do: several texts, padding, truncation, tensors, chat templates, pipelines.
    Its tokens are bytes; where transformers wants text, each byte stands as one character (Latin-1).

    Args:
        vocab_file: the authors' vocabulary file; None for the one in their package ``rwkv``.
        **kwargs: as for any tokenizer of transformers: ``chat_template``, ``padding_side`` (by default left), ...
    """

    vocab_files_names: ClassVar[dict[str, str]] = {"vocab_file": WORLD_VOCABULARY}
    model_input_names: ClassVar[list[str]] = ["input_ids", "attention_mask"]

    def __init__(self, vocab_file: str | Path | None = None, **kwargs: Any):
        if vocab_file is None:
            package = importlib.util.find_spec("rwkv")
            if package is None or not package.submodule_search_locations:
                raise ModuleNotFoundError(
                    "the tokenizer of RWKV models needs the vocabulary in their authors' package: "
                    'pip install "writesae[rwkv]", or pass tokenizer=...',
                    name="rwkv",
                )
            vocab_file = Path(package.submodule_search_locations[0], WORLD_VOCABULARY)
        self.vocab_file = str(vocab_file)
        self.tokens = _read_vocabulary(self.vocab_file)
        self._ids = {token: i for i, token in self.tokens.items()}
        lengths: dict[bytes, set[int]] = {}
        for token in self._ids:
            lengths.setdefault(token[:2], set()).add(len(token))
        self._lengths = {start: sorted(found, reverse=True) for start, found in lengths.items()}
        end = AddedToken("<|endoftext|>", special=True, normalized=False)  # id 0, which no text encodes to
        given = {"bos_token": end, "eos_token": end, "pad_token": end, "padding_side": "left"}
        super().__init__(**given | {"split_special_tokens": True} | kwargs)

    @property
    def vocab_size(self) -> int:
        return 1 + max(self.tokens)

    def __len__(self) -> int:
        return self.vocab_size

    def get_vocab(self) -> dict[str, int]:
        return {token.decode("latin-1"): i for token, i in self._ids.items()} | {"<|endoftext|>": 0}

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        rest, found, at = text.encode(), [], 0
        while at < len(rest):
            lengths = (*self._lengths.get(rest[at : at + 2], ()), 1)
            n = next(n for n in lengths if rest[at : at + n] in self._ids)
            found.append(rest[at : at + n].decode("latin-1"))
            at += n
        return found

    def _convert_token_to_id(self, token: str) -> int:
        return self._ids[token.encode("latin-1")]

    def _convert_id_to_token(self, index: int) -> str:
        return self.tokens.get(index, b"\xff").decode("latin-1")

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Text; bytes that are no UTF-8 (a part of a character) become U+FFFD."""
        ends = {"<|endoftext|>"}
        return b"".join(t.encode() if t in ends else t.encode("latin-1") for t in tokens).decode(errors="replace")

    def _decode(self, token_ids: int | list[int], skip_special_tokens: bool = False, **_: Any) -> str:
        ids = [token_ids] if isinstance(token_ids, int) else token_ids
        tokens = [self._convert_id_to_token(i) if i else "<|endoftext|>" for i in ids if i or not skip_special_tokens]
        return self.convert_tokens_to_string(tokens)

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str, ...]:
        path = Path(save_directory, (f"{filename_prefix}-" if filename_prefix else "") + WORLD_VOCABULARY)
        shutil.copyfile(self.vocab_file, path)
        return (str(path),)


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
