"""`HookedRecurrentModel`: a transformers model with its memory open to reading and editing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from writesae.hooks import ActivationCache, AttachableSAE
from writesae.hooks.clock import cache_in
from writesae.hooks.names import inputs
from writesae.hooks.positions import Positions
from writesae.hooks.quantities import QUANTITIES
from writesae.hooks.residual import Stopped, stop_at
from writesae.hooks.scope import owning
from writesae.hooks.tap import check_kernels
from writesae.jobs.arguments import named_kinds
from writesae.jobs.choices import meant
from writesae.jobs.elsewhere import NamesElsewhere
from writesae.model.attaching import Hooks, Names, check_fired
from writesae.model.continuing import positions_behind
from writesae.model.generating import GeneratingModel
from writesae.model.memory import Memory
from writesae.model.tokens import Text, is_text, next_token_loss
from writesae.models.arguments import arguments_of
from writesae.models.devices import device_named, dtype_named
from writesae.models.fingerprint import fingerprint_of_module
from writesae.models.load import load_model
from writesae.models.tokenizers import check_tokenizer, load_tokenizer
from writesae.models.wrappers import bare, unwrapped
from writesae.zoo import shipped_model, shipped_models


class HookedRecurrentModel(NamesElsewhere, GeneratingModel):
    """Wraps a transformers model with matrix-state layers; the model itself stays what it is (``model.hf_model``).

    Args:
        hf_model: the model, or one wrapped by nnsight, TransformerLens (`TransformerBridge`), PEFT or this class. It
            computes exactly as before as long as nothing is attached.
        tokenizer: needed for text; token ids work without one.
        model_id: the name that SAEs trained on it record; by default where it was loaded from.
        prepend_bos: whether texts begin with a BOS token, in everything that reads texts: stores, training, contexts,
            experiments; None: as the tokenizer has it. See `to_tokens`.
        special_tokens: whether the tokenizer adds its special tokens to texts.
        kernels: what computes the recurrences, ``"native"`` or ``"writesae"``, see `kernels`; None: as ``hf_model`` has
            it, which is ``"native"`` unless another wrapper of it was given something else.

    Raises:
        ValueError: no such kernels, no layer of a known recurrent architecture, or nnsight has not loaded the weights.

    >>> model = HookedRecurrentModel.from_pretrained("tiny-gdn")
    >>> logits, cache = model.run_with_cache("The state of the Union")
    >>> cache["k", 1].shape        # [batch, pos, head, d_key]
    """

    elsewhere: ClassVar[Mapping[str, str]] = {  # methods of SAELens' model
        "run_with_saes": "here it is `with model.intervene(ws.Recode(sae)): model(text)` (docs/names.md)",
        "add_sae": "here an SAE is put in for a block, `with model.intervene(ws.Recode(sae)): ...` (docs/names.md)",
        "saes": "here it is `with model.intervene([ws.Recode(sae), ws.Recode(another)]): ...` (docs/names.md)",
        "reset_saes": "what a `with model.intervene(...)` put in is out again when the block ends",
        "run_with_cache_with_saes": "here it is `model.encode(sae, text)` (docs/names.md)",
    }

    def __init__(
        self,
        hf_model: PreTrainedModel | Any,
        tokenizer: Any = None,
        *,
        model_id: str | None = None,
        prepend_bos: bool | None = None,
        special_tokens: bool = True,
        kernels: str | None = None,
    ):
        if kernels is not None:
            check_kernels(kernels)
        if isinstance(hf_model, HookedRecurrentModel):
            model_id = model_id or hf_model.model_id
            prepend_bos = hf_model.prepend_bos if prepend_bos is None else prepend_bos
            special_tokens = special_tokens and hf_model.special_tokens
            hf_model, own_tokenizer = hf_model.hf_model, hf_model.tokenizer
        else:
            hf_model, own_tokenizer = unwrapped(hf_model)
        if isinstance(hf_model, str | Path):
            raise TypeError(
                f"HookedRecurrentModel wraps a model that is loaded; to load one: "
                f"HookedRecurrentModel.from_pretrained({str(hf_model)!r})"
            )
        bare(hf_model)  # raises where PEFT puts virtual tokens before the text
        super().__init__(hf_model, own_tokenizer if tokenizer is None else tokenizer)
        if kernels is not None:
            self.kernels = kernels
        self.prepend_bos, self.special_tokens = prepend_bos, special_tokens
        self.model_id: str = model_id or str(getattr(hf_model, "name_or_path", "") or type(hf_model).__name__)

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        dtype: torch.dtype | str | None = None,
        tokenizer: Any = None,
        device: torch.device | str | None = None,
        prepend_bos: bool | None = None,
        special_tokens: bool = True,
        kernels: str | None = None,
        **kwargs: Any,
    ) -> HookedRecurrentModel:
        """Load a shipped model (``"tiny-gdn"``), a hub id or a folder.

        Args:
            name: what to load.
            dtype: of the weights, itself or its name; None (or ``"auto"``): as the checkpoint lies, but shipped models,
                which lie in bfloat16 to be small, in float32. Recurrences run in float32 with any of them. bfloat16
                takes half the memory and costs exactness: logits of the shipped models are then 0.01 off on average
                (0.18 at most), and those of a text whole and in pieces differ by up to 0.13, in float32 by 4e-5.
            tokenizer: a tokenizer, None for the model's own, or False for none (token ids only).
            prepend_bos, special_tokens: how texts become tokens, see `HookedRecurrentModel`.
            kernels: what computes the recurrences, see there.
            device: where to move it: ``"cuda"``, ``"cuda:1"``, ``"mps"``, ...; ``"auto"`` for the accelerator that is
                there, or else the CPU; None: where it is loaded (the CPU, or as ``device_map`` says).
            **kwargs: for ``from_pretrained`` (``device_map``, ``quantization_config``, ``revision``,
                ``local_files_only``, ...).

        Raises:
            OSError: there is no such checkpoint.
            ValueError: no such device or dtype here, weights that do not fit, or a model without recurrent layers.

        Formats are those of transformers, of flash-linear-attention (RWKV-7, DeltaNet, GLA), and of the authors of
        RWKV-7 (the path of a ``.pth`` file) and Mamba-2; see `writesae.models.load`.
        """
        if "torch_dtype" in kwargs:
            raise TypeError("torch_dtype is called dtype here, as in transformers: from_pretrained(..., dtype=...)")
        if kernels is not None:
            check_kernels(kernels)
        if device is not None and kwargs.get("device_map") is not None:
            raise TypeError("device and device_map both say where the model goes: pass one of them")
        if not isinstance(name, str | Path):
            raise TypeError(f"a model is named by a text or a path; got {name!r}")
        shipped = shipped_model(str(name))
        source = shipped or str(name)
        place = None if device is None else device_named(device)
        dtype = dtype_named(dtype or ("auto" if shipped is None else torch.float32), place)
        if place is not None and kwargs.get("quantization_config") is not None:
            kwargs["device_map"], place = {"": place}, None  # some quantised layers cannot be moved afterwards
        near = shipped is None and "/" not in str(name) and meant(str(name), shipped_models(), 0.8)
        if near and not Path(name).exists():  # said at once: a hub out of reach takes a minute to say so
            raise OSError(f"{_not_shipped(name)}, and there is no such folder")
        try:
            hf_model = load_model(source, dtype=dtype, **kwargs)
        except OSError as error:
            raise OSError(
                f"{_not_shipped(name)}, and could not be loaded as a folder, a hub id or a .pth file: {error}"
            ) from error
        if tokenizer is None:
            tokenizer = load_tokenizer(source, **kwargs)
        if tokenizer is False:
            tokenizer = None
        else:
            check_tokenizer(tokenizer, hf_model)
        model = cls(
            hf_model.eval(),
            tokenizer,
            model_id=str(name),
            prepend_bos=prepend_bos,
            special_tokens=special_tokens,
            kernels=kernels,
        )
        return model if place is None else model.to(place)

    # --- what there is ------------------------------------------------------------------------------------------------

    def describe_hooks(self) -> list[tuple[str, str, str]]:
        """``(name, shape, meaning)`` of each kind of hook point, in firing order."""
        kinds: dict[str, tuple[str, str, str]] = {}
        order = list(QUANTITIES)
        points = self._installed.points
        for layer in sorted(range(len(points)), key=lambda i: -len(points[i])):  # some lack what others have
            describe = self._by_layer[layer].family.describe if layer in self._by_layer else QUANTITIES.__getitem__
            before = order[0]
            for quantity, point in points[layer].items():
                name = point.name.replace(f".{layer}.", ".{layer}.")
                shape, meaning = describe(quantity)
                kinds.setdefault(quantity, (name, shape, meaning))
                if quantity not in order:  # an architecture's own
                    order.insert(order.index(before) + 1, quantity)
                before = quantity
        return [kinds[quantity] for quantity in order if quantity in kinds]

    @property
    def config(self) -> Any:
        return self.hf_model.config

    @property
    def kernels(self) -> str:
        """What computes the recurrences: ``"native"``, the model's own functions, or ``"writesae"``, ours.

        Ours are plain torch on any device, and their logits within rounding (1e-4) of the native ones. Without a GPU
        they take less time and memory in every architecture (`docs/benchmarks.md`). They compute calls of several
        tokens; single tokens, as in decoding, stay with the native function. May be set at any time; it belongs to
        ``hf_model``, so to every wrapper of it.

        >>> model.kernels = "writesae"
        """
        return self.taps[0].kernels

    @kernels.setter
    def kernels(self, kernels: str) -> None:
        check_kernels(kernels)
        for tap in self.taps:
            tap.kernels = kernels

    def W_O(self, layer: int) -> Float[Tensor, "head d_value d_model"]:
        """The output projection of a recurrent layer, head by head; norm and gate before it are not in it."""
        return self.family(layer).projection(self._installed.mixers[self._tap(layer).site.layer])

    def out_proj(self, layer: int) -> nn.Module:
        """The module that projects what the heads of a recurrent layer give, side by side, to the residual stream."""
        return self.family(layer).out_proj(self._installed.mixers[self._tap(layer).site.layer])

    def norm(self, layer: int) -> nn.Module | None:
        """The module that normalises (and gates) what the heads of a recurrent layer read; None if there is none."""
        return self.family(layer).norm(self._installed.mixers[self._tap(layer).site.layer])

    def fingerprint(self, layer: int) -> str:
        """What tells the weights of a recurrent layer from others, whatever dtype they are loaded in.

        SAEs record it, and are refused by a model with other weights. Active adapters of PEFT count: with them, the
        fingerprint is that of the layer with the adapter merged. Compare two with
        `writesae.models.fingerprint.same_weights`: loaded in float16 or quantised, a checkpoint has a string that is
        not equal and still the same.
        """
        return fingerprint_of_module(self._installed.mixers[self._tap(layer).site.layer])

    # --- running ------------------------------------------------------------------------------------------------------

    def forward(
        self,
        x: Text | None = None,
        *,
        return_type: str | None = "logits",
        loss_per_token: bool = False,
        stop_at_layer: int | None = None,
        memory: Memory | None = None,
        **kwargs: Any,
    ) -> Any:
        """Logits ``[batch, pos, vocab]`` for text or token ids, with all that is attached.

        Args:
            x: a text, several (padded on the left), token ids ``[pos]`` or ``[batch, pos]``, or the mapping that a
                tokenizer returns. None with ``inputs_embeds=`` ``[batch, pos, d_model]``.
            return_type: "loss": the cross entropy in nats per token, the mean over real tokens; "both": logits and
                loss; None: nothing is returned.
            loss_per_token: the loss of each token instead of the mean, ``[batch, pos - 1]``, 0 at padding.
            stop_at_layer: run the layers before this one only, and return the residual stream that would enter it
                ``[batch, pos, d_model]``. Negative ones count from the end; `n_layers` stops after the last layer.
            memory: what the model remembers (`memory`): ``x`` goes on from there. It stays as it is.
            **kwargs: for the model: ``attention_mask`` (over the whole sequence), ``past_key_values`` (a
                ``transformers.DynamicCache(config=model.config)``, updated in place: feed a sequence in pieces), ...
        """
        if return_type not in ("logits", "loss", "both", None):
            raise ValueError(f"return_type={return_type!r}: allowed are 'logits', 'loss', 'both' and None")
        if memory is not None:
            x, kwargs = self._going_on_from(memory, x, kwargs)
        x, kwargs = self.read(x, self._cache_renamed(kwargs))
        tokens, mask = self._tokens(x, kwargs)
        size = next(iter(tokens.values())).shape[:2]
        past = cache_in(kwargs)
        if past is None:
            kwargs.setdefault("use_cache", False)
            if mask is None or mask.ndim == 2:  # with any other mask, an edit says that it can't know positions
                self._check_within(torch.full(size[:1], size[1]) if mask is None else mask.sum(-1))
        elif mask is not None and is_text(x) and mask.shape[1] == size[1]:
            raise ValueError(
                "texts of unequal length can't continue a cache: the shorter ones would have padding in the middle. "
                "Continue them one by one, or give whole texts without a cache"
            )
        self._installed.clock.check({**tokens, "attention_mask": mask, **kwargs})
        if past is not None and mask is not None and mask.ndim == 2 and "position_ids" in arguments_of(self.hf_model):
            kwargs.setdefault("position_ids", positions_behind(mask)[:, -size[1] :])  # as generation has them
        if stop_at_layer is not None:
            if past is not None:
                raise ValueError("stop_at_layer would leave past_key_values half filled: pass one of them")
            try:
                with stop_at(self._installed.layers, stop_at_layer):
                    self.hf_model(**tokens, attention_mask=mask, **kwargs)
            except Stopped as stopped:
                return stopped.stream
            raise RuntimeError(f"the model ran without its layer {stop_at_layer}")
        if return_type in ("loss", "both") and "input_ids" not in tokens:
            raise ValueError(f"return_type={return_type!r} needs the token ids that come next; inputs_embeds has none")
        with self._differentiable(memory, size[0]):
            logits = self.hf_model(**tokens, attention_mask=mask, **kwargs).logits
        if return_type in ("logits", None):
            return logits if return_type else None
        mask = None if memory is not None else mask
        if logits.shape[1] != size[1] or (mask is not None and mask.shape != size):
            raise ValueError("a loss needs logits of all tokens: drop logits_to_keep and past_key_values")
        loss = next_token_loss(logits, tokens["input_ids"], mask, loss_per_token)
        return loss if return_type == "loss" else (logits, loss)

    def run_with_cache(
        self,
        x: Text | None = None,
        names: Names = None,
        *,
        names_filter: Names = None,
        state_positions: Sequence[int] | None = None,
        remove_batch_dim: bool = False,
        device: torch.device | str | None = None,
        **kwargs: Any,
    ) -> tuple[Any, ActivationCache]:
        """Logits ``[batch, pos, vocab]`` (or what else `forward` is asked for), and a cache of the quantities named.

        Args:
            x: as for `forward`.
            names: a name or a pair ``("k", 1)``, a list of such, a function of the name, or None for every quantity
                except states.
            names_filter: the same, under TransformerLens' name.
            state_positions: positions at which ``hook_state`` is kept, if ``names`` asks for it. (Any state can be had
                later from ``cache.state(layer, positions)``, without asking in advance.)
            remove_batch_dim: leave the batch dimension out of everything in the cache; for one sequence.
            device: where to keep the cache; None: where values were computed.
            **kwargs: as for `forward`: ``stop_at_layer``, ``return_type``, ``attention_mask``, ...

        Raises:
            KeyError: no such hook point.
            ValueError: ``remove_batch_dim`` with several sequences; a hook point behind ``stop_at_layer``.
        """
        if names is not None and names_filter is not None:
            raise TypeError("names and names_filter mean the same: pass one of them")
        names = names_filter if names is None else names
        wanted = self._select(names, also=lambda name: not name.endswith("hook_state"))
        stop = kwargs.get("stop_at_layer")
        if stop is not None:
            stop = stop + self.n_layers if stop < 0 else stop
            late = [point.name for point in wanted if point.layer >= stop]
            if late and names is not None and not callable(names):
                raise ValueError(f"stop_at_layer={kwargs['stop_at_layer']}: {late[0]} is never reached")
            wanted = [point for point in wanted if point.layer < stop]
        states = [point for point in wanted if point.quantity == "state"]
        if bool(states) != (state_positions is not None):
            raise ValueError(
                "hook_state holds a d_key x d_value matrix per token, so it is kept only where asked: pass both a "
                "hook_state in names= and state_positions=[...], or use cache.state(layer, positions) afterwards"
            )
        cache = ActivationCache(self.taps, self._points, self._aliases, device)
        # States are rebuilt from the recurrence's inputs.
        rebuilt_from = {name for s in states for name in inputs(self.family(s.layer).rule, s.layer)}
        chosen = {point.name for point in wanted if point not in states}
        keep = [point for name, point in self._points.items() if name in rebuilt_from | chosen]
        clock = self._installed.clock
        with ExitStack() as stack:
            call = stack.enter_context(owning(everywhere=False))
            for point in keep:
                keep_it = lambda value, hook: cache.store(hook.name, value, clock)  # noqa: E731
                stack.enter_context(point.add_hook(keep_it, owner=call))
            for tap in self.taps:
                recorder = lambda record, tap=tap: cache.record(tap, record)  # noqa: E731
                if any(p in wanted for p in tap.points.values()):
                    stack.enter_context(tap.recorders.added(recorder, call))
            out = self(x, **kwargs)
        check_fired([point.name for point in keep if point.name not in cache], 1)
        for point in states:
            cache.store(point.name, cache.state(point.layer, list(state_positions or ())))
        cache.keep_only({point.name for point in wanted})
        if remove_batch_dim:
            cache.remove_batch_dim()
        return out, cache

    def run_with_hooks(
        self,
        x: Text | None = None,
        hooks: Hooks = (),
        *,
        fwd_hooks: Hooks = (),
        bwd_hooks: Hooks = (),
        state_positions: Positions = None,
        **kwargs: Any,
    ) -> Any:
        """`forward` with hooks attached for this one call; see `hooks`.

        ``bwd_hooks`` act in the backward pass from what is returned, even after this call.
        """
        with self._attaching(hooks, fwd_hooks, bwd_hooks, state_positions, everywhere=False):
            return self(x, **kwargs)

    @named_kinds
    def encode(self, sae: AttachableSAE, x: Text, *, check_model: bool = True, **kwargs: Any) -> Any:
        """Which atoms of an SAE are active at every token, and how strongly; see `WriteSAE.read`.

        >>> codes = model.encode(WriteSAE.from_pretrained("tiny-gdn/L2H1"), "The state of the Union")
        >>> codes.values.shape, codes.indices.shape        # [batch, pos, m], largest first
        """
        return sae.read(self, x, check_model=check_model, **kwargs)


def _not_shipped(name: str | Path) -> str:
    ours = shipped_models()
    return f"{name} is not shipped (that is: {', '.join(ours)}{meant(str(name), ours, 0.7)})"
