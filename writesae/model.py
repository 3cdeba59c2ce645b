"""`HookedRecurrentModel`: a transformers model with its memory open to reading and editing."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from writesae.hooks import (
    ActivationCache,
    Add,
    Attached,
    Family,
    HookPoint,
    Intervention,
    PositionSet,
    Site,
    Tap,
    install,
    unknown_name,
)
from writesae.hooks.positions import CACHES, Positions
from writesae.models.load import load_model
from writesae.models.tokenizers import check_tokenizer, load_tokenizer
from writesae.recurrence import Read
from writesae.zoo import shipped_model, shipped_models

if TYPE_CHECKING:
    from writesae.saes import Codes, WriteSAE

Text: TypeAlias = str | Sequence[str] | Sequence[int] | Int[Tensor, "..."]
Names: TypeAlias = str | Sequence[str] | Callable[[str], bool] | None
Hooks: TypeAlias = Sequence[tuple[str | Callable[[str], bool], Callable[[Any, HookPoint], Any]]]


MEANING = {
    "v_mix": ("[batch, pos, head, d_value]", "how much of the first layer's value is mixed into v"),
    "q": ("[batch, pos, head, d_key]", "what reads the state, after any norm and scale"),
    "k": ("[batch, pos, head, d_key]", "where a token writes, after any norm"),
    "v": ("[batch, pos, head, d_value]", "what it writes"),
    "beta": ("[batch, pos, head]", "how strongly it writes, and erases if anything is erased"),
    "log_decay": ("[batch, pos, head]", "log of how much of the state stays, <= 0"),
    "kappa": ("[batch, pos, head, d_key]", "removal key: what the erase reads, of length 1"),
    "iclr": ("[batch, pos, head, d_key]", "in-context learning rate: how much of that is erased"),
    "write": ("Write [batch, pos, head]", "the native write, in factors: key k, value v (times beta if there is one)"),
    "state": ("[batch, pos, head, d_key, d_value]", "the memory, at the positions asked for"),
    "o": ("[batch, pos, head, d_value]", "what was read, before norm and gate"),
    "z": ("[batch, pos, head, d_value]", "the output gate, as the norm is given it"),
}


class HookedRecurrentModel(nn.Module):
    """Wraps a transformers model with matrix-state layers; the model itself stays what it is (``model.hf_model``).

    Args:
        hf_model: the model. It computes exactly as before as long as nothing is attached.
        tokenizer: needed for text in and out; token ids work without.
        model_id: name that SAEs trained on it record; default is where it was loaded from.

    Raises:
        ValueError: the model has no recurrent layer that is known.

    >>> model = HookedRecurrentModel.from_pretrained("tiny-gdn")
    >>> logits, cache = model.run_with_cache("The state of the Union")
    >>> cache["k", 1].shape        # [batch, pos, head, d_key]
    """

    def __init__(self, hf_model: PreTrainedModel, tokenizer: Any = None, *, model_id: str | None = None):
        super().__init__()
        self._taps: list[Tap] = install(hf_model)
        self.hf_model = hf_model
        self.tokenizer = tokenizer
        self.model_id: str = model_id or str(getattr(hf_model, "name_or_path", "") or type(hf_model).__name__)
        self._points = {point.name: point for tap in self._taps for point in tap.points.values()}
        self._by_layer = {tap.site.layer: tap for tap in self._taps}

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        dtype: torch.dtype | str = torch.float32,
        tokenizer: Any = None,
        **kwargs: Any,
    ) -> HookedRecurrentModel:
        """Load a shipped model (``"tiny-gdn"``), a hub id or a folder.

        Args:
            name: what to load.
            dtype: of the weights; ``"auto"`` for the checkpoint's own. Recurrences run in float32 whichever it is.
            tokenizer: a tokenizer, None for the model's own, or False for none (token ids only).
            **kwargs: for ``from_pretrained`` (``device_map``, ``revision``, ``local_files_only``, ...).

        Formats are those of transformers, of flash-linear-attention (RWKV-7, DeltaNet, GLA), and of the authors of
        RWKV-7 (the path of a ``.pth`` file) and Mamba-2; see `writesae.models.load`.
        """
        source = shipped_model(str(name)) or str(name)
        try:
            hf_model = load_model(source, dtype=dtype, **kwargs)
        except OSError as error:
            raise OSError(
                f"{name} is not shipped (that is: {', '.join(shipped_models())}), and could not be loaded as a "
                f"folder, a hub id or a .pth file: {error}"
            ) from error
        if tokenizer is None:
            tokenizer = load_tokenizer(source, **kwargs)
        if tokenizer is False:
            tokenizer = None
        else:
            check_tokenizer(tokenizer, hf_model)
        return cls(hf_model.eval(), tokenizer, model_id=str(name))

    # --- what there is ------------------------------------------------------------------------------------------------

    @property
    def sites(self) -> list[Site]:
        """The recurrent layers, ``Site(layer, n_heads, d_key, d_value, rule)``."""
        return [tap.site for tap in self._taps]

    @property
    def hook_names(self) -> list[str]:
        """Every hook point, in the order in which they fire."""
        return list(self._points)

    def describe_hooks(self) -> list[tuple[str, str, str]]:
        """``(name, shape, meaning)`` of each kind of hook point, in firing order."""
        kinds: dict[str, tuple[str, str, str]] = {}
        for tap in sorted(self._taps, key=lambda tap: -len(tap.points)):  # the first layer may lack some
            for quantity in tap.points:
                shape, meaning = MEANING[quantity]
                if quantity == "log_decay" and tap.family.decay_per_key:
                    shape = "[batch, pos, head, d_key]"
                if quantity in tap.family.letters:
                    meaning = f"{meaning} ({tap.family.letters[quantity]})"
                kinds.setdefault(quantity, (f"blocks.{{layer}}.mixer.hook_{quantity}", shape, meaning))
        return list(kinds.values())

    @property
    def config(self) -> Any:
        return self.hf_model.config

    @property
    def device(self) -> torch.device:
        return self.hf_model.device

    def site(self, layer: int) -> Site:
        """The site of a layer; IndexError if that layer is not recurrent."""
        return self._tap(layer).site

    def family(self, layer: int) -> Family:
        """The adapter of a layer's architecture; IndexError if that layer is not recurrent."""
        return self._tap(layer).family

    def _tap(self, layer: int) -> Tap:
        if layer not in self._by_layer:
            raise IndexError(f"layer {layer!r} is not recurrent; recurrent layers are {sorted(self._by_layer)}")
        return self._by_layer[layer]

    def _mixer(self, layer: int) -> nn.Module:
        tap = self._tap(layer)
        return next(m for m in self.hf_model.modules() if getattr(m, "writesae_tap", None) is tap)

    def W_O(self, layer: int) -> Float[Tensor, "head d_value d_model"]:
        """The output projection of a recurrent layer, head by head; norm and gate before it are not in it."""
        return self.family(layer).projection(self._mixer(layer))

    def norm(self, layer: int) -> nn.Module | None:
        """The module that normalises (and gates) what the heads of a recurrent layer read; None where nothing does."""
        return self.family(layer).norm(self._mixer(layer))

    @property
    def W_U(self) -> Float[Tensor, "d_model vocab"]:
        """The output embedding: what makes logits of the normalised residual stream."""
        return self.hf_model.get_output_embeddings().weight.T  # type: ignore[union-attr, operator]

    def fingerprint(self, layer: int) -> str:
        """A hash of the recurrent layer's weights, rounded to bfloat16 so that it does not depend on the load dtype.

        SAEs record it, and are refused by a model with other weights.
        """
        mixer = self._mixer(layer)
        digest = hashlib.sha256()
        for name, parameter in sorted(mixer.named_parameters()):
            digest.update(f"{name}{list(parameter.shape)}".encode())
            digest.update(parameter.detach().to("cpu", torch.bfloat16).contiguous().view(torch.int16).numpy().tobytes())
        return digest.hexdigest()[:16]

    # --- running ------------------------------------------------------------------------------------------------------

    def to_tokens(self, text: Text) -> tuple[Int[Tensor, "batch pos"], Int[Tensor, "batch pos"] | None]:
        """Token ids and attention mask (None where nothing is padded); several texts are padded on the left."""
        if isinstance(text, Tensor):
            ids = text if text.ndim == 2 else text[None]
            if text.ndim not in (1, 2) or text.dtype.is_floating_point or text.numel() == 0:
                raise ValueError(
                    f"token ids must be integers [pos] or [batch, pos]; got {text.dtype} {list(text.shape)}"
                )
            return self._check_ids(ids.to(self.device)), None
        if not isinstance(text, str) and len(text) and all(isinstance(x, int) for x in text):
            return self.to_tokens(torch.tensor(text))
        texts = [text] if isinstance(text, str) else list(text)  # type: ignore[arg-type]
        if not texts or not all(isinstance(x, str) and x for x in texts):
            raise ValueError(f"give a non-empty text, a list of such, or token ids; got {text!r}")
        rows = [torch.tensor(self._tokenizer()(x, verbose=False)["input_ids"]) for x in texts]
        n_pos = max(len(row) for row in rows)
        ids = torch.full((len(rows), n_pos), self._pad_id())
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, n_pos - len(row) :], mask[i, n_pos - len(row) :] = row, 1
        return ids.to(self.device), None if bool(mask.all()) else mask.to(self.device)

    def to_str_tokens(self, text: Text) -> list[str]:
        """The tokens of one text, as strings."""
        ids, _ = self.to_tokens(text)
        if len(ids) != 1:
            raise ValueError(f"to_str_tokens takes one text; got {len(ids)}")
        return [self._tokenizer().decode([i]) for i in ids[0].tolist()]

    def to_single_token(self, token: str | int) -> int:
        """The id of a text that is one token (an id is checked and returned).

        Raises:
            ValueError: the text makes another number of tokens, which the message shows; an id outside the vocabulary.
        """
        if isinstance(token, int):
            return int(self._check_ids(torch.tensor([token]))[0])
        split = lambda text: self._tokenizer()(text, add_special_tokens=False, verbose=False)["input_ids"]  # noqa: E731
        ids = split(token)
        if len(ids) != 1:
            parts = [self._tokenizer().decode([i]) for i in ids]
            also = f"; {' ' + token!r} is one" if len(split(" " + token)) == 1 else ""
            raise ValueError(f"{token!r} is {len(ids)} tokens, {parts}: give one token{also}")
        return ids[0]

    def logits_of_last(self, n: int) -> dict[str, Any]:
        """The argument that has the model make logits of the last ``n`` tokens alone (0: of all), if it knows one: with
        a large vocabulary they may cost as much as the layers."""
        return {"logits_to_keep": n} if "logits_to_keep" in inspect.signature(self.hf_model.forward).parameters else {}

    def _tokenizer(self) -> Any:
        if self.tokenizer is None:
            raise ValueError("text needs a tokenizer: HookedRecurrentModel(hf_model, tokenizer), or pass token ids")
        return self.tokenizer

    def _pad_id(self) -> int:
        """Any valid id will do, since padding is masked."""
        return next((i for i in (self._tokenizer().pad_token_id, self._tokenizer().eos_token_id) if i is not None), 0)

    def _check_ids(self, ids: Tensor) -> Tensor:
        n_vocab = self.hf_model.get_input_embeddings().weight.shape[0]  # type: ignore[union-attr]
        if int(ids.min()) < 0 or int(ids.max()) >= n_vocab:
            bad = ids[(ids < 0) | (ids >= n_vocab)][0]
            raise ValueError(f"token id {int(bad)} is outside the model's vocabulary of {n_vocab}")
        return ids.long()

    def forward(self, x: Text, **kwargs: Any) -> Float[Tensor, "batch pos vocab"]:
        """Logits for text or token ids, with whatever is attached.

        Args:
            x: a text, several (padded on the left), token ids ``[pos]`` or ``[batch, pos]``.
            **kwargs: for the model: ``attention_mask`` (over the whole sequence), ``past_key_values`` (a
                ``transformers.DynamicCache(config=model.config)``, updated in place: feed a sequence in pieces), ...
        """
        ids, mask = self.to_tokens(x)
        mask = kwargs.pop("attention_mask", mask)
        past = self._cache_renamed(kwargs)
        if past is None:
            kwargs.setdefault("use_cache", False)
            if mask is None or mask.ndim == 2:  # with any other mask, an edit says that it can't know positions
                self._check_within(torch.full((len(ids),), ids.shape[1]) if mask is None else mask.sum(-1))
        elif mask is not None and not isinstance(x, Tensor) and mask.shape[1] == ids.shape[1]:
            raise ValueError(
                "texts of unequal length can't continue a cache: pass token ids and the whole attention_mask"
            )
        return self.hf_model(input_ids=ids, attention_mask=mask, **kwargs).logits

    def _cache_renamed(self, kwargs: dict[str, Any]) -> Any:
        """The cache among arguments, under the name that the model has for it: another name, it would ignore."""
        past = next((kwargs.pop(name) for name in CACHES if kwargs.get(name) is not None), None)
        if past is not None:
            takes = inspect.signature(self.hf_model.forward).parameters
            kwargs[next((name for name in CACHES if name in takes), CACHES[0])] = past
        return past

    @torch.no_grad()
    def generate(self, x: Text, **kwargs: Any) -> str | list[str] | Int[Tensor, "batch pos"]:
        """Continue a text, with whatever is attached acting on every token, prompt and generated alike.

        Args:
            x: a text, several, or token ids.
            **kwargs: for ``transformers`` generation: ``max_new_tokens``, ``do_sample``, ``temperature``, ...

        Returns:
            Prompt and continuation: a text for a text, a list for several, token ids for token ids.
        """
        ids, mask = self.to_tokens(x)
        mask = kwargs.pop("attention_mask", mask)
        if mask is not None and not bool(mask[:, -1].all()):
            raise ValueError("generation needs padding on the left: the attention mask ends with padding")
        mask = torch.ones_like(ids) if mask is None else mask
        self._cache_renamed(kwargs)
        if "max_new_tokens" in kwargs:
            self._check_within(mask.sum(-1) + kwargs["max_new_tokens"] - 1)  # the last token is never fed
        out = self.hf_model.generate(input_ids=ids, attention_mask=mask, **kwargs)  # type: ignore[operator]
        if "max_new_tokens" in kwargs:  # positions past an early end of the text are no mistake
            for positions in self._asked():
                positions.vouch()
        if isinstance(x, Tensor) or (not isinstance(x, str) and isinstance(x[0], int)):
            return out
        n_new = out.shape[1] - ids.shape[1]
        texts = [x] if isinstance(x, str) else list(x)
        per_text = out.shape[0] // len(texts)
        rows = [
            self._tokenizer().decode(out[i][-(n_new + int(mask[i // per_text].sum())) :], skip_special_tokens=True)
            for i in range(len(out))
        ]
        return rows[0] if isinstance(x, str) and len(rows) == 1 else rows

    def run_with_cache(
        self, x: Text, names: Names = None, *, state_positions: Sequence[int] | None = None, **kwargs: Any
    ) -> tuple[Float[Tensor, "batch pos vocab"], ActivationCache]:
        """Logits, and the quantities named.

        Args:
            x: as for `forward`.
            names: a name, a list of names, a function of the name, or None for every quantity except states.
            state_positions: positions at which ``hook_state`` is kept, where ``names`` asks for it. (States elsewhere
                come from ``cache.state(layer, positions)`` later; nothing need be asked for in advance.)
            **kwargs: as for `forward`.

        Raises:
            KeyError: no such hook point.
        """
        wanted = self._select(names, also=lambda name: not name.endswith("hook_state"))
        states = [point for point in wanted if point.quantity == "state"]
        if bool(states) != (state_positions is not None):
            raise ValueError(
                "hook_state holds a d_key x d_value matrix a token, so it is kept only where asked: pass both a "
                "hook_state in names= and state_positions=[...], or use cache.state(layer, positions) afterwards"
            )
        cache = ActivationCache(self._taps)
        # States are rebuilt from the recurrence's inputs.
        inputs = {f"blocks.{s.layer}.mixer.hook_{q}" for s in states for q in self.family(s.layer).state_inputs}
        chosen = {point.name for point in wanted if point not in states}
        keep = [point for name, point in self._points.items() if name in inputs | chosen]
        with ExitStack() as stack:
            for point in keep:
                stack.enter_context(point.add_hook(lambda value, hook: cache._store(hook.name, value)))
            for tap in self._taps:
                recorder = lambda record, tap=tap: cache._record(tap, record)  # noqa: E731
                if any(p in wanted for p in tap.points.values()):
                    stack.enter_context(_added(tap.recorders, recorder))
            logits = self(x, **kwargs)
        for point in states:
            cache._store(point.name, cache.state(point.layer, list(state_positions or ())))
        cache._only({point.name for point in wanted})
        return logits, cache

    def run_with_hooks(
        self, x: Text, hooks: Hooks, *, state_positions: Positions = None, **kwargs: Any
    ) -> Float[Tensor, "batch pos vocab"]:
        """`forward` with hooks attached for this one call; see `hooks`."""
        with self.hooks(hooks, state_positions=state_positions):
            return self(x, **kwargs)

    def encode(self, sae: WriteSAE, x: Text, *, check_model: bool = True, **kwargs: Any) -> Codes:
        """Which atoms of an SAE are active at every token, and how strongly; see `writesae.saes.reading.encode`.

        >>> codes = model.encode(WriteSAE.from_pretrained("tiny-gdn/L2H0"), "The state of the Union")
        >>> codes.values.shape, codes.indices.shape        # [batch, pos, m], largest first
        """
        from writesae.saes.reading import encode  # SAEs know models, so models learn of SAEs late

        return encode(self, sae, x, check_model=check_model, **kwargs)

    # --- attaching ----------------------------------------------------------------------------------------------------

    @contextmanager
    def hooks(self, hooks: Hooks, *, state_positions: Positions = None) -> Iterator[HookedRecurrentModel]:
        """Attach functions to hook points while the block runs.

        Args:
            hooks: pairs ``(name, fn)``; the name may be a function of names. ``fn(value, hook)`` returns what to go on
                with, of the same shape and dtype, or None. ``hook.name`` and ``hook.layer`` say where it is.
            state_positions: for ``hook_state``, which fires only at these positions: once a token, with value
                ``[rows, 1, head, d_key, d_value]``, the state as that token's read sees it, for the sequences
                (usually all) for which that token is at an asked position (``hook.positions [rows]``).

        Raises:
            KeyError: no such hook point.
        """
        with ExitStack() as stack:
            requests: dict[int, PositionSet] = {}
            for name, fn in hooks:
                for point in self._select(name):
                    if point.quantity != "state":
                        stack.enter_context(point.add_hook(fn))
                        continue
                    if state_positions is None:
                        raise ValueError(
                            f"{point.name} holds a d_key x d_value matrix a token, so it fires only where asked: "
                            f"pass state_positions=[...]"
                        )
                    if point.layer not in requests:
                        requests[point.layer] = PositionSet(state_positions)
                        stack.enter_context(_added(self._tap(point.layer).state_requests, requests[point.layer]))
                    stack.enter_context(point.add_hook(_only_for(requests[point.layer], fn)))
            yield self
            _check_reached(requests.values())

    @contextmanager
    def intervene(
        self,
        what: Intervention | WriteSAE | Sequence[Intervention],
        *,
        positions: Positions = None,
        read: Read = "same",
        atom: int | None = None,
        scale: float | int | None = None,
        check_model: bool = True,
    ) -> Iterator[HookedRecurrentModel]:
        """Edit the memory while the block runs: in ``model(...)``, ``generate``, and calls of ``hf_model`` itself.

        Args:
            what: an intervention, several (their edits add up), or an SAE with ``atom`` and ``scale``: that atom is
                added at ``scale`` times the native write's Frobenius norm.
            positions: which tokens, counted over the whole sequence, prompt and generated alike: None for all, an int,
                a list, a slice, or an integer tensor ``[batch, n]`` for each sequence its own.
            read: ``"same"``: an edit at ``t`` is seen by the read at ``t``. ``"next"``: from ``t + 1`` on (the paper's
                cache-slot protocol).
            atom, scale: for an SAE.
            check_model: refuse an SAE that was trained on other weights.

        Raises:
            IndexError: layer, head, atom or position out of range.
            ValueError: an SAE for another shape, site or model.
        """
        edits = self._interventions(what, atom, scale)
        if read not in ("same", "next"):
            raise ValueError(f"read={read!r}: allowed are 'same' and 'next'")
        attached = []
        for edit in edits:
            sae: Any = getattr(edit, "sae", None) or (what if hasattr(what, "check_fits") else None)
            if sae is not None:
                sae.check_fits(self, check_model=check_model)
            site, where = self.site(edit.layer), PositionSet(positions)
            edit.check(site, where)
            attached.append((self._tap(edit.layer), Attached(edit, edit.heads(site), where, read)))
        with ExitStack() as stack:
            for tap, item in attached:
                stack.enter_context(_added(tap.attached, item))
            yield self
            _check_reached(item.positions for _, item in attached)

    def _interventions(self, what: Any, atom: int | None, scale: float | int | None) -> list[Intervention]:
        if hasattr(what, "check_fits"):  # an SAE
            if atom is None or scale is None:
                raise TypeError(
                    "intervene(sae, ...) needs atom= and scale= (add that atom at scale x the native write's norm); "
                    "for the SAE's own top atoms use intervene(Substitute(sae))"
                )
            return [Add(what.cfg.layer, what.cfg.head, write=what.atom(atom), scale=scale, relative=True)]
        if atom is not None or scale is not None:
            raise TypeError("atom= and scale= go with an SAE; an intervention carries its own")
        edits = list(what) if isinstance(what, Sequence) else [what]
        for edit in edits:
            if not isinstance(edit, Intervention):
                got = type(edit).__name__
                raise TypeError(f"intervene takes an intervention (Add, Delete, ...) or an SAE; got {got}")
        return edits

    def _select(self, names: Names, also: Callable[[str], bool] = lambda _: True) -> list[HookPoint]:
        """The hook points meant by ``names``; ``also`` restricts what None means."""
        if names is None:
            return [point for name, point in self._points.items() if also(name)]
        if callable(names):
            chosen = [point for name, point in self._points.items() if names(name)]
            if not chosen:
                raise KeyError("the names function chose no hook point; it is asked about each of model.hook_names")
            return chosen
        wanted = [names] if isinstance(names, str) else list(names)
        for name in wanted:
            if name not in self._points:
                raise unknown_name(name, self._points)
        return [self._points[name] for name in dict.fromkeys(wanted)]

    def _asked(self) -> list[PositionSet]:
        """The positions of everything attached."""
        return [p for tap in self._taps for p in [*(item.positions for item in tap.attached), *tap.state_requests]]

    def _check_within(self, lengths: Int[Tensor, " batch"]) -> None:
        for positions in self._asked():
            positions.check_within(lengths)


@contextmanager
def _added(items: list[Any], item: Any) -> Iterator[None]:
    """``item`` is in ``items`` while the block runs, whatever else comes and goes."""
    items.append(item)
    try:
        yield
    finally:
        del items[next(i for i, other in enumerate(items) if other is item)]


def _only_for(request: PositionSet, fn: Callable[[Any, HookPoint], Any]) -> Callable[[Any, HookPoint], Any]:
    """Call ``fn`` only for the positions its own block asked for, not for those of a block around it."""
    return lambda value, hook: fn(value, hook) if hook.request is request else None


def _check_reached(positions: Any) -> None:
    """An edit that was never reached though sequences ran is a mistake, not a no-op."""
    for p in positions:
        if missed := p.missed():
            raise IndexError(
                f"a sequence that ran in this block never reached position{'s' if len(missed) > 1 else ''} "
                f"{', '.join(map(str, missed[:5]))}, so nothing happened there"
            )
