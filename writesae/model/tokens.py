"""Between texts, token ids and logits: what a wrapped model and its tokenizer do without looking inside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias, overload

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from writesae.models.arguments import arguments_of, check_arguments
from writesae.models.wrappers import device_of, weight

Text: TypeAlias = str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]] | Int[Tensor, "..."] | Any
"""A text, several, token ids (also a numpy array or lists), or the mapping that a tokenizer returns."""


class TokenModel(nn.Module):
    """A causal language model of transformers and its tokenizer.

    Attributes:
        hf_model: the model.
        tokenizer: its tokenizer, None if there are only token ids.
        prepend_bos: whether a text begins with a BOS token; None: as the tokenizer has it.
        special_tokens: whether the tokenizer adds its special tokens to a text.
    """

    hf_model: Any
    tokenizer: Any
    prepend_bos: bool | None = None
    special_tokens: bool = True

    @property
    def device(self) -> torch.device:
        """Where token ids go: where the model takes its inputs."""
        return device_of(self.hf_model)

    # --- text to tokens and back --------------------------------------------------------------------------------------

    def to_tokens(
        self, text: Text, *, prepend_bos: bool | None = None, special_tokens: bool | None = None
    ) -> tuple[Int[Tensor, "batch pos"], Int[Tensor, "batch pos"] | None]:
        """Token ids and attention mask (None if nothing is padded). Several texts are padded on the left.

        Args:
            text: a text, several, or token ids, which stay as they are.
            prepend_bos: True: a text begins with one BOS token, False: with none but its own; None: as the model says
                (`TokenModel`). A text that begins with BOS itself, as chat templates make them, gets no second one.
            special_tokens: whether the tokenizer adds its special tokens; None: as the model says.
        """
        if isinstance(text, Mapping):
            x, given = self.read(text, {})
            if extra := given.keys() - {"attention_mask"}:
                raise ValueError(f"{sorted(extra)[0]} cannot be used here: give input_ids and attention_mask alone")
            ids, _ = self.to_tokens(x)
            return ids, given.get("attention_mask")
        if isinstance(text, np.ndarray):
            text = torch.from_numpy(text)
        if isinstance(text, Tensor):
            ids = text if text.ndim == 2 else text[None]
            if text.ndim not in (1, 2) or text.dtype.is_floating_point or text.dtype == torch.bool or not text.numel():
                raise ValueError(
                    f"token ids must be integers [pos] or [batch, pos]; got {text.dtype} {list(text.shape)}"
                )
            return self._check_ids(ids).to(self.device), None
        if isinstance(text, Sequence) and not isinstance(text, str | bytes) and len(text):
            if all(isinstance(x, int) and not isinstance(x, bool) for x in text):
                return self.to_tokens(torch.tensor(text))
            if all(isinstance(x, Sequence) and not isinstance(x, str) and len(x) for x in text):
                return self.to_tokens(_rows(list(text)))  # type: ignore[arg-type]
        texts = (
            [text]
            if isinstance(text, str)
            else list(text)
            if isinstance(text, Sequence) and not isinstance(text, bytes)
            else []
        )
        if not texts or not all(isinstance(x, str) and x for x in texts):
            got = " ".join(repr(text).split())
            raise ValueError(f"give a non-empty text, a list of such, or token ids; got {got[:100]}")
        bos = self.prepend_bos if prepend_bos is None else prepend_bos
        special = self.special_tokens if special_tokens is None else special_tokens
        rows = [torch.tensor(self._ids(x, bos, special), dtype=torch.long) for x in texts]  # type: ignore[arg-type]
        n_pos = max(len(row) for row in rows)
        ids = torch.full((len(rows), n_pos), self._pad_id())
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, n_pos - len(row) :], mask[i, n_pos - len(row) :] = row, 1
        return ids.to(self.device), None if bool(mask.all()) else mask.to(self.device)

    def _ids(self, text: str, prepend_bos: bool | None, special_tokens: bool) -> list[int]:
        """The token ids of a text; beside those in the text itself one BOS at most, and none before one of its own."""
        tokenizer, split = self._tokenizer(), lambda **more: self._tokenizer()(text, verbose=False, **more)["input_ids"]
        ids: list[int] = split() if special_tokens else split(add_special_tokens=False)
        bos = getattr(tokenizer, "bos_token_id", None)
        if bos is None:
            if prepend_bos:
                raise ValueError(
                    "prepend_bos=True: the tokenizer has no BOS token; set tokenizer.bos_token, or leave it out"
                )
            return ids
        if special_tokens and ids[:1] == [bos] and (prepend_bos is False or ids[:2] == [bos, bos]):
            own = _leading(split(add_special_tokens=False), bos)
            if _leading(ids, bos) > own and (own or prepend_bos is False):  # the tokenizer has added one
                ids = ids[1:]
        return [bos, *ids] if prepend_bos and ids[:1] != [bos] else ids

    @property
    def reading(self) -> dict[str, bool]:
        """How texts become tokens, as far as that is not the tokenizer's own way; stores and SAEs record it."""
        said = {} if self.prepend_bos is None else {"prepend_bos": self.prepend_bos}
        return said if self.special_tokens else {**said, "special_tokens": False}

    def read(self, x: Text | None, arguments: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Separate what a user gave into text or token ids (None with ``inputs_embeds``), and arguments for the model.

        Args:
            x: as for ``model(x)``: a text, several, token ids, or the mapping that a tokenizer returns, whose entries
                besides ``input_ids`` are arguments for the model.
            arguments: those given by name.

        Raises:
            TypeError: an argument that the model does not have, or one given twice.
            ValueError: none of text, token ids and embeddings, or more than one of them.
        """
        arguments = dict(arguments)
        if isinstance(x, Mapping):
            if twice := x.keys() & arguments.keys():
                raise TypeError(f"{sorted(twice)[0]} is given twice: in the mapping, and by name")
            arguments = {**x, **arguments}
            x = arguments.pop("input_ids", None)
            if x is None and arguments.get("inputs_embeds") is None:
                raise ValueError(f"a mapping needs input_ids or inputs_embeds; this one has {', '.join(arguments)}")
        mask = arguments.get("attention_mask")
        if isinstance(mask, np.ndarray | Sequence):
            mask = (
                _rows(mask) if isinstance(mask, Sequence) and isinstance(mask[0], Sequence) else torch.as_tensor(mask)
            )
            mask = mask if mask.ndim > 1 else mask[None]
        if isinstance(mask, Tensor):
            arguments["attention_mask"] = mask.to(self.device)
        check_arguments(self.hf_model, arguments)
        if (x is None) == (arguments.get("inputs_embeds") is None):
            raise ValueError("give text or token ids, or inputs_embeds= [batch, pos, d_model] in place of them")
        return x, arguments

    @overload
    def to_str_tokens(self, text: str | Sequence[int] | Int[Tensor, "..."]) -> list[str]: ...
    @overload
    def to_str_tokens(self, text: Sequence[str]) -> list[list[str]]: ...
    def to_str_tokens(self, text: Text) -> list[str] | list[list[str]]:
        """The tokens of a text, or of one sequence of ids, as strings; for several texts, one list per text."""
        if not isinstance(text, (str, Tensor)) and len(text) and all(isinstance(x, str) for x in text):
            return [self.to_str_tokens(x) for x in text]  # type: ignore[misc]
        ids, _ = self.to_tokens(text)
        if len(ids) != 1:
            raise ValueError(f"to_str_tokens takes one sequence of token ids, [pos] or [1, pos]; got {list(ids.shape)}")
        return [self._tokenizer().decode([i]) for i in ids[0].tolist()]

    def to_string(self, tokens: int | Sequence[int] | Int[Tensor, "..."]) -> str | list[str]:
        """The text of a token id, or of ids ``[pos]``; for ``[batch, pos]`` a list of texts."""
        ids, _ = self.to_tokens([tokens] if isinstance(tokens, int) else tokens)
        texts = [self._tokenizer().decode(row.tolist()) for row in ids]
        return texts if isinstance(tokens, Tensor) and tokens.ndim == 2 else texts[0]

    def to_single_token(self, token: str | int) -> int:
        """The id of a text that is one token (an id is checked and returned).

        Raises:
            ValueError: the text is not one token (the message shows its tokens), or the id is outside the vocabulary.
            TypeError: neither a text nor an id.
        """
        if not isinstance(token, str | int):
            raise TypeError(f"a token is a text of one token, or an id; got a {type(token).__name__}")
        if isinstance(token, int):
            return int(self._check_ids(torch.tensor([token]))[0])
        split = lambda text: self._tokenizer()(text, add_special_tokens=False, verbose=False)["input_ids"]  # noqa: E731
        ids = split(token)
        if len(ids) != 1:
            parts = [self._tokenizer().decode([i]) for i in ids]
            also = f"; {' ' + token!r} is one" if len(split(" " + token)) == 1 else ""
            raise ValueError(f"{token!r} is {len(ids)} tokens, {parts}: give one token{also}")
        return ids[0]

    def _tokenizer(self) -> Any:
        if self.tokenizer is None:
            raise ValueError("text needs a tokenizer: HookedRecurrentModel(hf_model, tokenizer), or pass token ids")
        return self.tokenizer

    def _pad_id(self) -> int:
        """Any valid id will do, since padding is masked."""
        return next((i for i in (self._tokenizer().pad_token_id, self._tokenizer().eos_token_id) if i is not None), 0)

    def _check_ids(self, ids: Tensor) -> Tensor:
        least, most = torch.stack(ids.aminmax()).tolist()  # a device is waited for once
        if least < 0 or most >= self.n_vocab:
            bad = ids[(ids < 0) | (ids >= self.n_vocab)][0]
            raise ValueError(f"token id {int(bad)} is outside the model's vocabulary of {self.n_vocab}")
        return ids.long()

    # --- embeddings and logits ----------------------------------------------------------------------------------------

    @property
    def n_vocab(self) -> int:
        """Rows of the embedding: token ids are below it."""
        return self.hf_model.get_input_embeddings().weight.shape[0]

    @property
    def W_E(self) -> Float[Tensor, "vocab d_model"]:
        """The input embedding."""
        return weight(self.hf_model.get_input_embeddings())

    @property
    def W_U(self) -> Float[Tensor, "d_model vocab"]:
        """The output embedding: what makes logits of the normalised residual stream."""
        return weight(self.hf_model.get_output_embeddings()).T

    def tokens_to_residual_directions(
        self, tokens: str | int | Sequence[int] | Int[Tensor, "..."]
    ) -> Float[Tensor, "... d_model"]:
        """The columns of `W_U` of some tokens: the directions that raise their logits.

        Args:
            tokens: one token, as text or id, for ``[d_model]``; ids ``[...]`` for ``[..., d_model]``.

        The model's last norm comes before `W_U`, and its weights are not folded into these: multiply by them to compare
        with the stream before that norm.
        """
        if isinstance(tokens, str):
            tokens = self.to_single_token(tokens)
        return self.W_U.T[self._check_ids(torch.as_tensor(tokens, device=self.device))]

    @torch.no_grad()
    def likely(self, x: Text | Float[Tensor, "*batch vocab"], n: int = 5) -> list[tuple[str, float]]:
        """The ``n`` most likely next tokens and their probabilities, after the last token of one text.

        Args:
            x: a text or its token ids, for which the model runs, with whatever is attached; or logits, of which
                the last row is taken.
            n: how many.

        Raises:
            ValueError: several texts, or fewer tokens in the vocabulary than asked for.

        >>> model.likely("The state of the", n=2)
        >>> with model.intervene(ws.Delete(layer=2, head=0)):
        ...     model.likely("The state of the")
        """
        logits = x if isinstance(x, Tensor) and x.dtype.is_floating_point else self(x)
        if logits.ndim > 2 and logits.shape[:-2].numel() != 1:
            raise ValueError(f"likely is of one text: got logits {list(logits.shape)}; give one row of them")
        last = logits.reshape(-1, logits.shape[-1])[-1].float().softmax(-1)
        if not isinstance(n, int) or not 1 <= n <= len(last):
            raise ValueError(f"n={n!r}: allowed are 1 to {len(last)}, the tokens of the vocabulary")
        values, ids = last.topk(n)
        return [
            (str(self.to_string([token])), value) for token, value in zip(ids.tolist(), values.tolist(), strict=True)
        ]

    def logits_of_last(self, n: int) -> dict[str, Any]:
        """The argument with which the model makes logits for the last ``n`` tokens only (0: for all), if it has one.

        With a large vocabulary, logits may cost as much as the layers.
        """
        return {"logits_to_keep": n} if "logits_to_keep" in arguments_of(self.hf_model) else {}


def is_text(x: object) -> bool:
    """Whether ``x`` is one text or several, and not token ids."""
    return isinstance(x, str) or (isinstance(x, Sequence) and bool(len(x)) and isinstance(x[0], str))


def _leading(ids: Sequence[int], token: int) -> int:
    """How many times a token stands at the beginning."""
    return next((i for i, one in enumerate(ids) if one != token), len(ids))


def _rows(rows: Sequence[Sequence[int]]) -> Tensor:
    """Lists of equal length as a tensor."""
    lengths = sorted({len(row) for row in rows})
    if len(lengths) > 1:
        raise ValueError(
            f"rows of {lengths[0]} to {lengths[-1]} token ids: pad them on the left to one length and give an "
            f"attention_mask, or give texts"
        )
    return torch.tensor(rows)


@torch.no_grad()
def kl_divergence(
    edited: Float[Tensor, "*batch vocab"], native: Float[Tensor, "*batch vocab"]
) -> Float[Tensor, "*batch"]:
    """How far next-token distributions are from others: ``KL(edited || native)`` at each token, in nats.

    Args:
        edited, native: logits of the same tokens, ``[batch, pos, vocab]`` or any leading dimensions.

    >>> with model.intervene(ws.Delete(layer=2, head=0), positions=[5]):
    ...     moved = ws.kl_divergence(model(text), native)
    """
    p, q = (x.float().log_softmax(-1) for x in (edited, native))
    return (p.exp() * (p - q)).sum(-1).clamp_min(0)


def next_token_loss(
    logits: Float[Tensor, "batch pos vocab"],
    ids: Int[Tensor, "batch pos"],
    mask: Int[Tensor, "batch pos"] | None = None,
    per_token: bool = False,
) -> Float[Tensor, "..."]:
    """Cross entropy in nats of each next token: the mean over real ones, or ``[batch, pos - 1]`` (0 at padding)."""
    losses = F.cross_entropy(logits[:, :-1].mT.float(), ids[:, 1:], reduction="none")
    if mask is None:
        return losses if per_token else losses.mean()
    real = (mask[:, 1:] * mask[:, :-1]).to(losses)
    return losses * real if per_token else (losses * real).sum() / real.sum()
