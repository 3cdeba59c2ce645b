"""What can be attached to a model: functions at hook points, interventions in the memory and the residual stream."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeAlias

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import DynamicCache

from writesae.hooks import (
    AttachableSAE,
    Attached,
    Family,
    HookPoint,
    Intervention,
    Patch,
    PointEdit,
    PositionSet,
    ResidualEdit,
    Site,
    Tap,
    install,
    name_of,
    resolve,
)
from writesae.hooks.attachable import bring, fit
from writesae.hooks.positions import Positions
from writesae.hooks.quantities import RESIDUAL
from writesae.hooks.residual_edits import Tokens
from writesae.hooks.scope import Owner, in_main_thread_alone, owning
from writesae.jobs.arguments import named_kinds
from writesae.model.asked import Strength, edits_of
from writesae.model.blocks import block
from writesae.model.tokens import TokenModel
from writesae.models.wrappers import bare, device_of
from writesae.recurrence import Read

Name: TypeAlias = str | tuple[str, int]
Names: TypeAlias = Name | Sequence[Name] | Callable[[str], bool] | None
Hooked: TypeAlias = tuple[Name | Callable[[str], bool], Callable[[Any, HookPoint], Any]]
Hooks: TypeAlias = Sequence[Hooked] | Hooked


class HookedModel(TokenModel):
    """A transformers model with hook points, and the methods that attach to them.

    Args:
        hf_model: the model itself; `install` gives it its hook points.
        tokenizer: its tokenizer; None to work with token ids alone.
    """

    def __init__(self, hf_model: Any, tokenizer: Any = None):
        super().__init__()
        self._installed = installed = install(hf_model)
        self.hf_model = hf_model
        self.tokenizer = tokenizer
        self._points = {point.name: point for layer in installed.points for point in layer.values()}
        self._by_layer = {tap.site.layer: tap for tap in self.taps}
        self._aliases = {tap.site.layer: tap.family.aliases for tap in self.taps}
        self._handles: list[torch.utils.hooks.RemovableHandle] = []  # of `add_hook`

    # --- what there is ------------------------------------------------------------------------------------------------

    @property
    def sites(self) -> list[Site]:
        """The recurrent layers, ``Site(layer, n_heads, d_key, d_value, rule)``."""
        return [tap.site for tap in self.taps]

    @property
    def hook_names(self) -> list[str]:
        """Every hook point, in the order in which they fire."""
        return list(self._points)

    @property
    def hook_dict(self) -> dict[str, HookPoint]:
        """Every hook point by its name."""
        return dict(self._points)

    @property
    def n_layers(self) -> int:
        """The number of layers, recurrent or not."""
        return len(self._installed.layers)

    @property
    def blocks(self) -> list[nn.Module]:
        """The modules of the layers, as the model calls them."""
        return list(getattr(self._installed.text_model, self.taps[0].family.layers))

    @property
    def taps(self) -> list[Tap]:
        """What is attached to each recurrent mixer, in order of layers."""
        return self._installed.taps

    @property
    def busy(self) -> bool:
        """Whether hooks or edits are attached."""
        return self._installed.ours.busy

    def site(self, layer: int) -> Site:
        """The site of a layer; IndexError if that layer is not recurrent."""
        return self._tap(layer).site

    def family(self, layer: int) -> Family:
        """The adapter of a layer's architecture; IndexError if that layer is not recurrent."""
        return self._tap(layer).family

    def layer_device(self, layer: int) -> torch.device:
        """Where a layer runs, recurrent or not: the model's device, unless its layers lie on several."""
        return device_of(self._installed.layers[layer])

    def new_cache(self, ids: Int[Tensor, "batch pos"] | None = None) -> DynamicCache:
        """An empty cache of transformers that the model takes: a ``DynamicCache(config=...)`` for most. With the tokens
        that it is for, also one that the unwrapped model takes."""
        take = self.taps[0].family.takes_cache
        if take is not None:
            return take(None, self._installed.text_model, ids)
        return DynamicCache(config=bare(self.hf_model).config)

    def _tap(self, layer: int) -> Tap:
        if not isinstance(layer, int) or isinstance(layer, bool) or layer not in self._by_layer:
            raise IndexError(f"layer {layer!r} is not recurrent; recurrent layers are {sorted(self._by_layer)}")
        return self._by_layer[layer]

    # --- attaching ----------------------------------------------------------------------------------------------------

    @block
    @contextmanager
    def hooks(
        self,
        hooks: Hooks = (),
        *,
        fwd_hooks: Hooks = (),
        bwd_hooks: Hooks = (),
        state_positions: Positions = None,
    ) -> Iterator[Any]:
        """Attach functions to hook points while the block runs. `writesae.hooks.scope` says in which threads they act.

        Args:
            hooks: pairs ``(name, fn)``; the name may be a pair ``("k", 1)``, or a function of names.
                ``fn(value, hook)`` returns the value to use instead, of the same shape and dtype, or None to keep it.
                ``hook.name`` and ``hook.layer`` say where it is.
            fwd_hooks: further pairs, under TransformerLens' name.
            bwd_hooks: pairs whose function gets the gradient of the value, and may return another.
            state_positions: where ``hook_state`` fires, once per token. Its value is the state as that token's read
                sees it, ``[rows, 1, head, d_key, d_value]``: a row for each sequence that has the token at one of these
                positions, usually all (``hook.positions [rows]`` has the positions).

        Raises:
            KeyError: no such hook point.
            RuntimeError: the model ran without reaching a hook point.
        """
        everywhere = in_main_thread_alone()
        with self._attaching(hooks, fwd_hooks, bwd_hooks, state_positions, everywhere) as owner:
            yield self
        _warn_if_elsewhere(owner)

    @contextmanager
    def _attaching(
        self, hooks: Hooks, fwd_hooks: Hooks, bwd_hooks: Hooks, state_positions: Positions, everywhere: bool
    ) -> Iterator[Owner]:
        """`hooks`, in every thread or only in the running one."""
        with ExitStack() as stack:
            owner, silent = stack.enter_context(self._block(everywhere)), Counter[str]()
            requests: dict[int, PositionSet] = {}
            for name, fn in (*_pairs(hooks), *_pairs(fwd_hooks)):
                for point in self._select(name):
                    if point.quantity != "state":
                        stack.enter_context(point.add_hook(_noting(silent, point, fn), owner=owner))
                        continue
                    if state_positions is None:
                        raise ValueError(
                            f"{point.name} holds a d_key x d_value matrix per token, so it fires only where asked: "
                            f"pass state_positions=[...]"
                        )
                    if point.layer not in requests:
                        requests[point.layer] = PositionSet(state_positions)
                        stack.enter_context(self._tap(point.layer).state_requests.added(requests[point.layer], owner))
                    stack.enter_context(point.add_hook(_only_for(requests[point.layer], fn), owner=owner))
            for name, fn in _pairs(bwd_hooks):
                for point in self._without_states(name, "gradients come from ws.gradient"):
                    stack.enter_context(point.add_hook(fn, "bwd", owner))
            yield owner
            check_fired([name for name, n in silent.items() if n == 0], owner.passes)
            _check_reached(requests.values())

    @contextmanager
    def _block(self, everywhere: bool) -> Iterator[Owner]:
        """What a block attaches with this owner acts while it runs."""
        with owning(everywhere) as owner, self._installed.ours.blocks.added(owner, owner):
            yield owner

    def add_hook(
        self, name: Name | Callable[[str], bool], fn: Callable[[Any, HookPoint], Any], dir: str = "fwd"
    ) -> None:
        """Attach a function to a hook point, in every thread, until `reset_hooks`. Prefer `hooks`, which leaves nothing
        behind."""
        for point in self._without_states(name, "attach to it with model.hooks(..., state_positions=[...])"):
            self._handles.append(point.add_hook(fn, dir))

    def reset_hooks(self) -> None:
        """Remove everything that `add_hook` attached. What a ``with`` block attached is removed when the block ends."""
        while self._handles:
            self._handles.pop().remove()

    def _without_states(self, name: Name | Callable[[str], bool], instead: str) -> list[HookPoint]:
        points = self._select(name)
        states = [point.name for point in points if point.quantity == "state"]
        if states and not callable(name):
            raise ValueError(f"{states[0]} fires only at positions asked for: {instead}")
        return [point for point in points if point.quantity != "state"]

    @named_kinds
    @block
    @contextmanager
    def intervene(
        self,
        what: Intervention | PointEdit | Patch | AttachableSAE | Any | Sequence[Intervention | PointEdit | Any],
        *,
        positions: Positions = None,
        read: Read = "same",
        atom: int | Sequence[int] | None = None,
        scale: Strength | Sequence[Strength] | None = None,
        check_model: bool = True,
    ) -> Iterator[Any]:
        """Edit the memory while the block runs: in ``model(...)``, ``generate``, and calls of ``hf_model`` itself.

        Args:
            what: an intervention, several (their edits add up), or an SAE with ``atom`` and ``scale``: that atom is
                added at ``scale`` times the native write's Frobenius norm. In a list, an SAE stands with its atom and
                scale, ``(sae, 53, 3)``, so SAEs of several layers act together. Edits of the residual stream
                (`Reconstruct`, `Steer`, `AddVector`) may be among them, and are made in the order given; with an SAE
                of SAELens, ``atom`` and ``scale`` are those of `Steer`.
            positions: which tokens, counted over the whole sequence, prompt and generated tokens alike: None for all,
                an int, a list, a slice, or an integer tensor ``[batch, n]`` with a row for each sequence.
            read: ``"same"``: an edit at ``t`` is seen by the read at ``t``. ``"next"``: from ``t + 1`` on (the paper's
                cache-slot protocol). RWKV-6 reads before it writes: there both are from ``t + 1`` on.
            atom: for an SAE: an atom, or several.
            scale: of each atom or of all: a number, or one for each row of the batch, ``[batch]``.
            check_model: refuse an SAE that was trained on other weights.

        Raises:
            IndexError: layer, head, atom or position out of range.
            ValueError: an SAE for another shape, site or model.
            RuntimeError: the model ran without reaching what is edited.
        """
        what = getattr(what, "write_sae", what)  # of what `writesae.saelens` made for SAELens
        if read not in ("same", "next"):
            raise ValueError(f"read={read!r}: allowed are 'same' and 'next'")
        with ExitStack() as stack:
            owner, places = stack.enter_context(self._block(in_main_thread_alone())), []
            for edit, fitted in edits_of(what, atom, scale):
                if isinstance(edit, PointEdit):
                    place, where = edit.hook_name, [edit.places(positions)]
                    stack.enter_context(self._edit_point(edit, where[0], read, owner))
                else:
                    if fitted is not None:
                        fit(fitted, self, check_model=check_model)
                    site, (written, targets) = self.site(edit.layer), edit.places(positions, read)
                    edit.check(site, written)
                    attached = Attached(edit, edit.heads(site), written, read, targets)
                    stack.enter_context(self._tap(edit.layer).attached.added(attached, owner))
                    place, where = f"the recurrence of layer {edit.layer}", attached.places
                places.append((place, where))
            yield self
            check_fired([place for place, where in places if not where[0].reached], owner.passes)
            _check_reached(each for _, where in places for each in where)
        _warn_if_elsewhere(owner)

    @contextmanager
    def _edit_point(self, edit: PointEdit, where: PositionSet, read: Read, owner: Owner) -> Iterator[None]:
        """``edit`` acts at a hook point, at the tokens of ``where``, while the block runs."""
        if read != "same":
            raise ValueError(f"read={read!r} is about the memory; an edit at a hook point is seen at once")
        (point,) = self._select(edit.hook_name)
        bring(edit.fitted, self.layer_device(point.layer))
        if isinstance(edit, ResidualEdit) and point.quantity not in RESIDUAL:
            names = ", ".join(name_of(quantity, point.layer) for quantity in RESIDUAL)
            raise ValueError(
                f"{type(edit).__name__} acts on the residual stream ({names}); {point.name} is not a part of it"
            )

        def fn(x: Tensor, _hook: HookPoint) -> Tensor | None:
            mask, index = where.match(self._installed.clock.now.positions_on_cpu())
            if not mask.any():
                return None
            index = None if index is None else index[mask].to(x.device, non_blocking=True)
            there = tuple(i.to(x.device, non_blocking=True) for i in mask.nonzero(as_tuple=True))
            new = x.clone()
            new[there] = edit(x[there], Tokens(len(mask), there[0], index))
            return new

        with self._installed.ours.stream.added(where, owner), point.add_hook(fn, owner=owner):
            yield

    def _select(self, names: Names, also: Callable[[str], bool] = lambda _: True) -> list[HookPoint]:
        """The hook points meant by ``names``; ``also`` restricts what None means."""
        if names is None:
            return [point for name, point in self._points.items() if also(name)]
        if callable(names):
            chosen = [point for name, point in self._points.items() if names(name)]
            if not chosen:
                raise KeyError("the names function chose no hook point; it is asked about each of model.hook_names")
            return chosen
        one = isinstance(names, str) or _is_pair(names)
        wanted = [names] if one else list(names) if isinstance(names, Iterable) else [names]
        if not all(isinstance(name, str) or _is_pair(name) for name in wanted):
            raise TypeError(
                f"names={names!r}: give a name, a pair like ('k', 1), a list of such, a function of the name, or None "
                f"for all"
            )
        full = [name if isinstance(name, str) else name_of(*name) for name in wanted]  # type: ignore[misc]
        found = (resolve(name, self._points, self._aliases) for name in full)
        return [self._points[name] for name in dict.fromkeys(found)]

    def _asked(self) -> list[PositionSet]:
        """The positions of everything that is in force in the running thread and task."""
        of_taps = (
            positions
            for tap in self.taps
            for positions in (*(p for a in tap.attached.here() for p in a.places), *tap.state_requests.here())
        )
        return [*of_taps, *self._installed.ours.stream.here()]

    def _check_within(self, lengths: Int[Tensor, " batch"]) -> None:
        for positions in self._asked():
            positions.check_within(lengths)


def _is_pair(name: object) -> bool:
    """Whether ``name`` is a quantity and a layer, as in ``cache["k", 1]``."""
    return isinstance(name, tuple) and len(name) == 2 and isinstance(name[0], str) and isinstance(name[1], int)


def check_fired(silent: Iterable[str], n_passes: int) -> None:
    """Raise RuntimeError if something attached was never called though the model ran: that would be a silent no-op."""
    for name in silent if n_passes else ():
        raise RuntimeError(
            f"the model ran in this block, and {name} was never reached, so nothing happened there: another tool "
            f"computes that part of the model in its own way. Wrap the model with writesae after that tool changed it"
        )


def _warn_if_elsewhere(owner: Owner) -> None:
    """Something was attached, and the model ran only where it does not act: most likely not what was meant."""
    if owner.foreign and not owner.begun:
        warnings.warn(
            "the model ran while this block was open, but only in threads in which what the block attached does not "
            "act: it was opened outside of the main thread, or in an asyncio task, as in a notebook. Start such "
            "threads with contextvars.copy_context().run, or by asyncio.to_thread",
            stacklevel=5,
        )


def _noting(seen: Counter[str], point: HookPoint, fn: Callable[[Any, HookPoint], Any]) -> Callable[..., Any]:
    """``fn``, with a count of its calls."""
    seen[point.name] += 0

    def noted(value: Any, hook: HookPoint) -> Any:
        seen[point.name] += 1
        return fn(value, hook)

    return noted


def _only_for(request: PositionSet, fn: Callable[[Any, HookPoint], Any]) -> Callable[[Any, HookPoint], Any]:
    """Call ``fn`` only for the positions its own block asked for, not for those of a block around it."""
    return lambda value, hook: fn(value, hook) if hook.request is request else None


def _check_reached(positions: Any) -> None:
    """Raise IndexError if sequences ran and never reached a position asked for: that would be a silent no-op."""
    for p in positions:
        if missed := p.missed():
            raise IndexError(
                f"a sequence that ran in this block never reached position{'s' if len(missed) > 1 else ''} "
                f"{', '.join(map(str, missed[:5]))}, so nothing happened there"
            )


def _pairs(hooks: Hooks) -> list[Any]:
    """Pairs of a name and a function; one alone stands for a list of one. TypeError for anything else."""
    one = isinstance(hooks, tuple) and len(hooks) == 2 and callable(hooks[1])
    pairs: list[Any] = [hooks] if one else list(hooks)
    for pair in pairs:
        if not (isinstance(pair, tuple | list) and len(pair) == 2 and callable(pair[1])):
            raise TypeError(f"hooks are pairs of a name and a function, [(name, fn), ...]; got {pair!r}")
    return pairs
