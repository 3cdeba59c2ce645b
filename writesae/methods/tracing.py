"""A pass of a model that is cut into nodes, frozen or not; and edges between them, one backward pass each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from writesae.gradients import Logit
from writesae.gradients.backward import check_differentiable, frozen
from writesae.hooks import Add, HookPoint, find_mixers, name_of
from writesae.hooks.residual import MIXERS, MLPS, stream_in
from writesae.hooks.scope import owning
from writesae.hooks.sites import Head
from writesae.methods.cuts import EMBEDDING, Cut, Features, Node, Whole, Writes
from writesae.methods.direct_paths import layers_of, modules_of
from writesae.methods.frozen import Freezing
from writesae.model import HookedRecurrentModel, late_logits
from writesae.models.wrappers import bare


@dataclass(frozen=True, eq=False)
class Question:
    """What is traced: one text, one number, and the SAEs whose atoms and features are nodes.

    Attributes:
        saes: of writes, by head.
        stream: of the residual stream and of what modules add to it, by name of the hook point; a transcoder by that
            of what it stands for.
    """

    model: HookedRecurrentModel
    ids: Int[Tensor, "1 pos"]
    of: Logit
    saes: Mapping[Head, Any]
    stream: Mapping[str, Any]


@dataclass(eq=False)
class Again:
    """What a pass is that repeats another: in the frozen model or in the real one.

    Attributes:
        kept: factors of the frozen model (`Freezing.kept`); None: the real model.
        cuts: of the pass that is repeated.
        removed: nodes that are taken out, ``(cut, node)``.
        hold: whether every cut gives what it gave, so that only direct effects are seen.
    """

    kept: list[Tensor] | None
    cuts: list[Cut]
    removed: list[tuple[int, int]]
    hold: bool

    def at(self, cut: int) -> list[int]:
        return [node for c, node in self.removed if c == cut]


@dataclass(eq=False)
class Trace:
    """A pass, cut into nodes.

    Attributes:
        cuts: in the order in which they came.
        biases: of the model, to differentiate by.
        value: the number asked about, with its graph.
        kept: the factors that were held fixed.
        given: what each cut was given.
        probability: of the token asked about.
    """

    cuts: list[Cut] = field(default_factory=list)
    biases: list[nn.Parameter] = field(default_factory=list)
    value: Tensor = field(default_factory=lambda: torch.zeros(()))
    kept: list[Tensor] = field(default_factory=list)
    given: list[Tensor] = field(default_factory=list)
    probability: float = 0.0

    @property
    def starts(self) -> list[int]:
        """Where each cut's nodes begin in the list of all; its length at the end."""
        ends = [0]
        for cut in self.cuts:
            ends.append(ends[-1] + len(cut.nodes))
        return ends

    @property
    def nodes(self) -> list[Node]:
        return [node for cut in self.cuts for node in cut.nodes]

    def where(self, node: int) -> tuple[int, int]:
        """A node's cut, and its place in it."""
        starts = self.starts
        cut = next(c for c in range(len(self.cuts)) if node < starts[c + 1])
        return cut, node - starts[cut]

    def gradients(self, cut: int, seed: Tensor | None = None) -> tuple[list[Tensor | None], Tensor]:
        """Gradients along direct paths of ``<seed, given>`` of a cut with respect to what earlier cuts give, and what
        biases add to it. The target is the cut behind the last."""
        end = self.value if cut == len(self.cuts) else self.cuts[cut].given
        zero = torch.zeros((), dtype=torch.float64)
        if not end.requires_grad:
            return [None] * cut, zero
        probes = [c.probe for c in self.cuts[:cut]]
        found = torch.autograd.grad(end, [*probes, *self.biases], seed, retain_graph=True, allow_unused=True)
        added = [
            (g * b.detach()).double().sum() for g, b in zip(found[cut:], self.biases, strict=True) if g is not None
        ]
        return list(found[:cut]), torch.stack(added).sum() if added else zero

    def row(self, cut: int, seed: Tensor | None = None) -> tuple[Float[Tensor, " n"], Tensor]:
        """The edges from every node to ``<seed, given>``, and what is constant in it."""
        gradients, constant = self.gradients(cut, seed)
        parts = []
        for c, G in zip(self.cuts, [*gradients, *[None] * (len(self.cuts) - cut)], strict=True):
            if G is None:
                parts.append(torch.zeros(len(c.nodes), dtype=torch.float64))
                continue
            effects, more = c.effects(G)
            parts.append(effects.detach().double().cpu())
            constant = constant + more.detach().double().cpu()
        return torch.cat(parts), constant

    def totals(self, replaced: bool) -> list[Tensor]:
        """The gradient of the number with respect to what each cut gives, by all paths of the frozen model.
        ``replaced``: those that go through nodes alone, not through errors."""
        found, _ = self.gradients(len(self.cuts))
        D = [torch.zeros_like(c.probe) if g is None else g for c, g in zip(self.cuts, found, strict=True)]
        for n in reversed(range(len(self.cuts))):
            if not self.cuts[n].given.requires_grad:
                continue
            earlier, _ = self.gradients(n, self.cuts[n].pull(D[n], replaced))
            D[:n] = [d if g is None else d + g for d, g in zip(D[:n], earlier, strict=True)]
        return D


def run(asked: Question, again: Again | None = None) -> Trace:
    """The pass, frozen and cut; or one that repeats it with nodes taken out (`Again`): that has no cuts."""
    check_differentiable(asked.model.hf_model)
    kept = None if again is None else again.kept
    mode = Freezing(kept) if again is None or kept is not None else None
    pass_ = _Pass(asked, again, mode)
    with torch.inference_mode(False), torch.enable_grad(), frozen(asked.model.hf_model), ExitStack() as stack:
        pass_.attach(stack)
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        if mode is not None:
            stack.enter_context(mode)
        with late_logits(asked.model) as end:
            asked.model(asked.ids)
        at = torch.tensor([asked.of.at % end.shape[1]])
        logits = end.at(torch.zeros_like(at), at)
        token = asked.of.token
        assert isinstance(token, int)
        with pass_.ours():
            of = Logit(token, 0, asked.of.minus)
            pass_.trace.value = of(logits[:, None])[0]
            pass_.trace.probability = float(logits.detach()[0].float().softmax(-1)[token])
    pass_.trace.kept = [] if mode is None else mode.kept
    if again is not None and len(pass_.trace.given) != len(again.cuts):
        raise RuntimeError(f"{len(again.cuts)} cuts were made before, and now {len(pass_.trace.given)}")
    return pass_.trace


@dataclass(eq=False)
class _Pass:
    """What is attached to a model for one pass."""

    asked: Question
    again: Again | None
    mode: Freezing | None
    trace: Trace = field(default_factory=Trace)
    inputs: dict[tuple[int, str], Tensor] = field(default_factory=dict)

    @contextmanager
    def ours(self) -> Iterator[None]:
        if self.mode is None:
            yield
        else:
            with self.mode.paused():
                yield

    def attach(self, stack: ExitStack) -> None:
        model = self.asked.model
        mixers = [mixer for _, mixer, _ in find_mixers(model.hf_model)]
        named = model.hf_model.named_parameters()
        self.trace.biases = [p for name, p in named if name.endswith("bias") and p.ndim == 1]
        stack.callback(_restore, [(p, p.requires_grad) for p in self.trace.biases])
        for p in self.trace.biases:
            p.requires_grad_(True)
        hooks: list[Any] = []
        for site in model.sites:
            for quantity in model.family(site.layer).rule.inputs:
                hooks.append((name_of(quantity, site.layer), self.input))
            hooks.append((name_of("o", site.layer), self.read))
        hooks += [(name, self.features) for name, sae in self.asked.stream.items() if not transcodes(sae)]
        left = {name for name, sae in self.asked.stream.items() if transcodes(sae)}
        call = stack.enter_context(owning(everywhere=False))
        tokens = bare(model.hf_model).get_input_embeddings()  # Zamba2 hands them to later layers, beside the stream
        stack.callback(tokens.register_forward_hook(lambda _m, _a, x: self.embedding(x) if call.here else None).remove)
        places: dict[int, list[tuple[int, str]]] = {}
        for index, layer in enumerate(layers_of(model)):
            for name, module in modules_of(layer, mixers):
                quantity = "mlp_out" if name in MLPS else "mixer_out" if name in MIXERS else name
                at = f"blocks.{index}.hook_{quantity}"
                if at in left:
                    hook = self._transcoded(at, index, call)
                    stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
                    left.remove(at)
                elif at in self.asked.stream:
                    continue  # its SAE's features are the nodes
                elif not any(module is mixer for mixer in mixers) and any(p.ndim > 1 for p in module.parameters()):
                    places.setdefault(id(module), []).append((index, name))
                    if len(places[id(module)]) == 1:  # Zamba2 has one transformer in several layers
                        hook = self._whole(places[id(module)], call)
                        stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
        if left:
            raise ValueError(f"a transcoder of {', '.join(sorted(left))}: no module of that layer gives just that")
        stack.enter_context(model.hooks(hooks))
        if self.again is not None and not self.again.hold and self.again.kept is None:
            for c, n in self.again.removed:
                cut = self.again.cuts[c]
                if isinstance(cut, Writes):
                    node = cut.nodes[n]
                    edit = Add(node.layer, node.head, write=cut.removal(n))  # type: ignore[arg-type]
                    stack.enter_context(model.intervene(edit, positions=[node.position]))

    def cut(self, given: Tensor, make: Any, value: Tensor | None = None) -> Tensor:
        """What a place goes on with: ``value``, or what it was given; ``make`` makes the cut, of the probe."""
        self.trace.given.append(given)
        value = given if value is None else value
        probe = torch.zeros_like(value).requires_grad_()
        if self.again is None:
            self.trace.cuts.append(make(probe))
            return value.detach() + probe
        index = len(self.trace.given) - 1
        before: Any = self.again.cuts[index]
        base = before.value + probe if self.again.hold else value
        return base + sum((before.removal(n) for n in self.again.at(index)), torch.zeros_like(value))

    def embedding(self, x: Tensor) -> Tensor:
        with self.ours():
            x, ids = x.detach(), self.asked.ids[0].tolist()
            nodes = [Node(EMBEDDING, -1, t, feature=token) for t, token in enumerate(ids)]
            out = self.cut(x, lambda probe: Whole(x, probe, nodes))
            return out if out.requires_grad else out.requires_grad_()

    def _whole(self, places: list[tuple[int, str]], call: Any) -> Any:
        left = iter(places)

        def after(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            if not call.here:
                return None
            x = output[0] if isinstance(output, tuple) else output
            layer, name = next(left)
            if x.shape != stream_in(args, kwargs).shape:  # weights of lanes
                return None
            with self.ours():
                nodes = [Node(name, layer, t) for t in range(x.shape[1])]
                new = self.cut(x, lambda probe: Whole(x, probe, nodes))
            return (new, *output[1:]) if isinstance(output, tuple) else new

        return after

    def _transcoded(self, at: str, layer: int, call: Any) -> Any:
        """A module whose transcoder's features are nodes: they are read off what it is given."""
        sae = self.asked.stream[at]

        def after(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            if not call.here:
                return None
            x = output[0] if isinstance(output, tuple) else output
            h = stream_in(args, kwargs)
            with self.ours():
                both, n = torch.cat([h, x], -1), h.shape[-1]
                new = self.cut(both, lambda probe: Features.of(both, probe, sae, layer, at, read=n), x)
            return (new, *output[1:]) if isinstance(output, tuple) else new

        return after

    def features(self, x: Tensor, hook: HookPoint) -> Tensor:
        with self.ours():
            sae = self.asked.stream[hook.name]
            return self.cut(x, lambda probe: Features.of(x, probe, sae, hook.layer, hook.name))

    def input(self, x: Tensor, hook: HookPoint) -> Tensor | None:
        """What enters a recurrence: values are live, all else is as it was."""
        self.inputs[hook.layer, hook.quantity] = x
        if hook.quantity == "v" or self.mode is None:
            return None
        with self.ours():
            kept = self.mode.keep(lambda: x)
            return kept.clone() if kept is x else kept

    def read(self, o: Tensor, hook: HookPoint) -> Tensor:
        """What heads read: the cut of the writes."""
        layer, rule = hook.layer, self.asked.model.family(hook.layer).rule
        live = rule.write(lambda q: self.inputs[layer, q] if q == "v" else self.inputs[layer, q].detach()).value
        with self.ours():
            if self.again is None:
                detached = lambda q: self.inputs[layer, q].detach()  # noqa: E731
                saes = {h.head: sae for h, sae in self.asked.saes.items() if h.layer == layer}
                rec, write = rule.recurrence(detached).float(), rule.write(detached)
                return self._probe(o, live, lambda p: Writes.of(live, p, rec, write, o.detach(), layer, saes))
            self.trace.given.append(live)
            index = len(self.trace.given) - 1
            before: Any = self.again.cuts[index]
            base = before.read + torch.zeros_like(o).requires_grad_() if self.again.hold else o
            if self.again.kept is None and not self.again.hold:
                return base  # the model's own intervention did it
            return base + sum((before.change(n) for n in self.again.at(index)), torch.zeros_like(o))

    def _probe(self, o: Tensor, given: Tensor, make: Any) -> Tensor:
        probe = torch.zeros_like(o).requires_grad_()
        self.trace.given.append(given)
        self.trace.cuts.append(make(probe))
        return o.detach() + probe


def transcodes(sae: Any) -> str | None:
    """Name of the hook point whose value a transcoder stands for (SAELens' ``hook_name_out``); None for an SAE."""
    return getattr(getattr(sae.cfg, "metadata", None), "hook_name_out", None)


def _restore(before: list[tuple[nn.Parameter, bool]]) -> None:
    for p, wanted in before:
        p.requires_grad_(wanted)
