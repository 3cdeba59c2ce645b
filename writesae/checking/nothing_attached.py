"""With nothing attached, and with hooks that only look, the model is what it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn

from writesae.checking.result import Row
from writesae.checking.subject import MODES, PIECES, PREFILL, Subject, largest
from writesae.hooks import install, name_of
from writesae.hooks.residual import stream_in


def check_nothing_attached(subject: Subject) -> Iterator[Row]:
    """Bit for bit the unwrapped model, in every way of feeding it; on our own kernels the same but for rounding."""
    for mode in MODES:
        yield _same(subject, "nothing attached", mode, subject.bare(mode))


def check_nothing_left(subject: Subject) -> Iterator[Row]:
    """After everything that was attached and taken away again, bit for bit as before."""
    check, found = "nothing left behind", subject.run()
    if subject.model.kernels == "native":
        yield _same(subject, check, PREFILL, found)
    else:
        yield Row(check, PREFILL, largest(found - subject.bare()), 0.0, note="against itself, as it was before")


def _same(subject: Subject, check: str, mode: str, found: Tensor) -> Row:
    """Some GPU kernels are not bit-identical to themselves: then that difference is what is allowed."""
    difference = largest(found - subject.unwrapped(mode))
    if subject.gets_wrong(mode):
        wrong = "each piece would begin with an empty memory" if mode == PIECES else "padding would be taken for tokens"
        note = f"against prefill: unwrapped, {wrong}"
        return Row(check, mode, difference, subject.tolerance, note=note)
    if not difference:
        return Row(check, mode, 0.0, 0.0, note="bit for bit")
    if not subject.unwrapped(mode).isfinite().all():
        return Row(check, mode, None, 0.0, note="logits of the unwrapped model are not finite")
    if subject.model.kernels != "native":
        return Row(check, mode, difference, subject.tolerance, note="our kernels against the model's own")
    own = subject.from_run_to_run(mode)
    note = f"the unwrapped model differs by {own:.2g} from run to run" if own else "not bit for bit"
    return Row(check, mode, difference, own, note=note)


def check_rounding(subject: Subject) -> Iterator[Row]:
    """What rounding does to the unwrapped model itself: the yardstick of what follows."""
    check, native = "unwrapped, by itself", subject.unwrapped()
    nudged = largest(subject.nudged(subject.ids)[0] - native)
    yield Row(check, "last bit off", nudged, note="each layer's input off by up to one unit in the last place")
    for mode in (mode for mode in MODES[1:] if not subject.gets_wrong(mode)):
        yield Row(check, mode, largest(subject.unwrapped(mode) - native), note="against its own prefill")


def check_looking(subject: Subject) -> Iterator[Row]:
    """Hooks on every point of the checked layers that only look change nothing; and what they see of the residual
    stream is what torch's own hooks see at these layers."""
    model, seen = subject.model, {}
    with ExitStack() as stack:
        for layer in subject.layers:
            module = install(model.hf_model).layers[layer]
            for handle in _torch_hooks(module, layer, seen):
                stack.callback(handle.remove)
        names = [name for name in model.hook_names if model.hook_dict[name].layer in subject.layers]
        names = [name for name in names if model.hook_dict[name].quantity != "state"]
        logits, cache = model.run_with_cache(subject.ids, names, **subject.of_last)
    difference = largest(logits[:, -len(subject.unwrapped()) :][0].float() - subject.unwrapped())
    note = "bit for bit" if not difference else "kernels that do more than the recurrence run in parts"
    yield Row("hooks that only look", "every hook", difference, subject.tolerance, note=note)
    for layer in subject.layers:
        points = ("resid_pre", "resid_post")
        differences = [largest(cache[name_of(point, layer)] - seen[point, layer]) for point in points]
        yield Row("stream = torch's hooks", f"layer {layer}", max(differences), 0.0, "value")


def _torch_hooks(module: nn.Module, layer: int, seen: dict[tuple[str, int], Tensor]) -> list[Any]:
    def before(_module: nn.Module, args: Any, kwargs: Any) -> None:
        seen["resid_pre", layer] = stream_in(args, kwargs).clone()

    def after(_module: nn.Module, _args: Any, output: Any) -> None:
        seen["resid_post", layer] = (output[0] if isinstance(output, tuple) else output).clone()

    return [module.register_forward_pre_hook(before, with_kwargs=True), module.register_forward_hook(after)]
