"""Whom to ask: a server that speaks the chat-completions protocol, or a model of transformers on this machine."""

from __future__ import annotations

import os
import threading
import urllib.parse
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch

from writesae.explaining.prompts import Messages, NoAnswer
from writesae.jobs.extras import extra, need

if TYPE_CHECKING:
    from openai import APIStatusError, OpenAI


@runtime_checkable
class Chat(Protocol):
    """Somebody to ask. ``name`` says who, ``at_once`` how many calls may run together."""

    @property
    def name(self) -> str: ...

    @property
    def at_once(self) -> int: ...

    def check(self) -> None:
        """Raise, with the fix, if nobody is there."""

    def ask(self, messages: Messages, *, max_tokens: int, temperature: float, stop: threading.Event) -> str:
        """The answer. NoAnswer if it is unusable, ConnectionError if there is none, InterruptedError if stopped."""
        ...


@dataclass
class ChatServer:
    """A server with the chat-completions protocol of OpenAI: theirs, vLLM, llama.cpp, Ollama, and many others.

    Asked through the package `openai`: dropped connections, timeouts and statuses such as 429 and 500 are tried again,
    after the time that ``Retry-After`` says or after pauses that double. The key is read from the environment when the
    server is first asked, and written nowhere.

    Args:
        base_url: address, up to and without ``/chat/completions``: ``http://localhost:8000/v1``.
        model: the model's name on the server.
        api_key_env: the environment variable that holds the key; servers without one need none.
        timeout: seconds to wait for an answer.
        tries: how often a call is made before it is given up.
        at_once: calls that run together.

    Raises:
        ValueError: ``base_url`` is no http address, or a number is not positive.
        ImportError: the package `openai` is not installed.
    """

    base_url: str
    model: str
    api_key_env: str = "OPENAI_API_KEY"
    timeout: float = 120.0
    tries: int = 6
    at_once: int = 8
    _there: bool = field(default=False, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        parts = urllib.parse.urlsplit(self.base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"base_url {self.base_url!r} is no address; for instance http://localhost:8000/v1")
        if parts.username or parts.password:
            raise ValueError("base_url has a name or password in it: put the key in the environment (api_key_env)")
        for name in ("timeout", "tries", "at_once"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, not {getattr(self, name)}")
        self.base_url = self.base_url.rstrip("/").removesuffix("/chat/completions")
        need("openai")

    @property
    def name(self) -> str:
        return self.model

    @cached_property
    def _client(self) -> OpenAI:
        key = self._key or "none"  # a server that wants none takes any
        return extra("openai").OpenAI(
            base_url=self.base_url, api_key=key, timeout=self.timeout, max_retries=self.tries - 1
        )

    def check(self) -> None:
        """Raise ConnectionError if nobody answers at the address, ValueError if the key is refused. One short call; a
        server that was there is not asked again."""
        openai = extra("openai")
        if self._there:
            return
        try:
            self._client.with_options(timeout=min(self.timeout, 10.0), max_retries=0).models.list()
        except (openai.AuthenticationError, openai.PermissionDeniedError) as e:
            raise self._refused(e) from None
        except openai.APIConnectionError as e:  # timeouts are some of these
            raise ConnectionError(
                f"no server answers at {self.base_url} ({self._safe(e)}): start it, or give the address of one that "
                f"runs (--base-url)"
            ) from None
        except openai.OpenAIError:
            pass  # somebody is there, who has no list of models
        self._there = True

    def ask(self, messages: Messages, *, max_tokens: int, temperature: float, stop: threading.Event) -> str:
        """The answer; see `Chat`."""
        openai = extra("openai")
        if stop.is_set():
            raise InterruptedError
        asked: Any = messages
        try:
            found = self._client.chat.completions.create(
                model=self.model, messages=asked, max_tokens=max_tokens, temperature=temperature
            )
        except openai.APIStatusError as e:
            if e.status_code < 500 and e.status_code not in (408, 409, 429):
                raise self._refused(e) from None
            raise self._gave_up(f"status {e.status_code}") from None
        except openai.APIConnectionError as e:
            raise self._gave_up(self._safe(e)) from None
        except (openai.OpenAIError, ValueError) as e:
            raise NoAnswer(f"a response that is no chat completion: {self._safe(e)[:60]}") from None
        return self._read(found)

    @staticmethod
    def _read(found: Any) -> str:
        """The text of a response."""
        try:
            choice = found.choices[0]
            text, why = choice.message.content, choice.finish_reason
        except (AttributeError, LookupError, TypeError) as e:
            raise NoAnswer(f"a response that is no chat completion: {str(found)[:60]!r}") from e
        if why == "length":
            raise NoAnswer("an answer that was cut off, longer than asked for")
        if not isinstance(text, str):
            raise NoAnswer("a response without text")
        return text

    @property
    def _key(self) -> str:
        return os.environ.get(self.api_key_env, "").strip()

    def _gave_up(self, said: str) -> ConnectionError:
        return ConnectionError(
            f"{self.base_url} gave no answer in {self.tries} tries (the last: {said}). What was answered before is "
            f"kept; the same call goes on from there"
        )

    def _refused(self, error: APIStatusError) -> ValueError:
        if error.status_code in (401, 403):
            key = "was refused" if self._key else "is not set"
            fix = f"the key, environment variable {self.api_key_env}, {key}: set it, or name another (--api-key-env)"
        else:
            fix = "check the model's name (--model) and the address (--base-url)"
        return ValueError(
            f"{self.base_url} refused a call for model {self.model!r}: status {error.status_code}, "
            f"{self._safe(error.response.text)}; {fix}"
        )

    def _safe(self, what: object) -> str:
        """Words of others, on one line, without the key."""
        text = " ".join(str(what).split())[:300] or type(what).__name__
        return text.replace(self._key, "[key]") if self._key else text


class ChatModel:
    """A language model of transformers on this machine: a folder or a hub id.

    Args:
        name: folder or hub id.
        device: where to run.

    Raises:
        OSError: there is no such model.
    """

    at_once = 1

    def __init__(self, name: str, device: str | torch.device = "cpu") -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.name = name
        self._tokenizer: Any = AutoTokenizer.from_pretrained(name)
        loaded: Any = AutoModelForCausalLM.from_pretrained(name)
        self._model = loaded.to(device).eval()

    def check(self) -> None:
        """Nothing: it was loaded."""

    @torch.no_grad()
    def ask(self, messages: Messages, *, max_tokens: int, temperature: float, stop: threading.Event) -> str:
        """The answer; see `Chat`. ValueError if the question is longer than the model can read."""
        if stop.is_set():
            raise InterruptedError
        if self._tokenizer.chat_template:
            text = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            ids = self._tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
        else:
            text = "\n\n".join(message["content"] for message in messages) + "\n\n"
            ids = self._tokenizer(text, return_tensors="pt").input_ids
        most = getattr(self._model.config, "max_position_embeddings", None)
        if most and ids.shape[1] + max_tokens > most:
            raise ValueError(
                f"a question of {ids.shape[1]} tokens, and {max_tokens} for the answer, are more than the {most} that "
                f"{self.name} can read: show fewer examples (--shown), shorter ones (--width), or take another model"
            )
        how = {"do_sample": temperature > 0, **({"temperature": temperature} if temperature > 0 else {})}
        ids = ids.to(self._model.device)
        pad = self._tokenizer.pad_token_id or self._tokenizer.eos_token_id or 0
        out = self._model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, pad_token_id=pad, **how
        )
        return self._tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
