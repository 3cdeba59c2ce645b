"""Names of hook points: ours, and those of TransformerLens that mean the same quantity.

`blocks.{layer}.mixer.hook_{q,k,v,...}` are quantities of a recurrence, `blocks.{layer}.hook_{resid_pre,mixer_out,
mlp_out,resid_post}` those of the residual stream. TransformerLens calls a mixer by its architecture's word
(``linear_attn``, ``mamba``), and has words of its own for quantities that all recurrences have (``hook_ssm_B``); which
quantity each of these is, every family says (`Family.aliases`). Shapes are ours whichever name is used: heads are value
heads unless the quantity itself has key heads, states are ``[d_key, d_value]``, writes are factors.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Mapping

from writesae.hooks.quantities import RESIDUAL
from writesae.recurrence.rules import Rule

OF_BLOCKS = {  # TransformerLens' names of points of the residual stream, by what follows `blocks.{layer}.`
    "hook_in": "resid_pre",
    "hook_out": "resid_post",
    "hook_attn_out": "mixer_out",
    "mlp.hook_out": "mlp_out",
    "ffn.hook_out": "mlp_out",
}
MIXER_OUT = ("hook_out", "hook_ssm_out", "hook_linear_attn_out")  # of a mixer, whatever it is called
_MIXER = re.compile(r"(?:mixer|linear_attn|attn|mamba|ssm)\.(hook_\w+)")
_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")


def name_of(quantity: str, layer: int) -> str:
    """The full name of a quantity of a layer: ``("k", 9) -> "blocks.9.mixer.hook_k"``."""
    return f"blocks.{layer}.{'' if quantity in RESIDUAL else 'mixer.'}hook_{quantity}"


def inputs(rule: Rule, layer: int) -> list[str]:
    """Names of the hook points from which a layer's writes, deltas and states can be rebuilt."""
    return [name_of(quantity, layer) for quantity in rule.state_inputs]


def resolve(name: str, known: Collection[str], aliases: Mapping[int, Mapping[str, str]]) -> str:
    """Our name of the hook point that ``name`` means.

    Args:
        name: ours, or one of TransformerLens.
        known: every name there is.
        aliases: for each recurrent layer, the `Family.aliases` of its architecture.

    Raises:
        UnknownHookError: no such hook point.
    """
    if name in known:
        return name
    meant = name
    if match := _BLOCK.fullmatch(str(name)):
        layer, rest = int(match[1]), match[2]
        quantity = OF_BLOCKS.get(rest)
        if quantity is None and (inner := _MIXER.fullmatch(rest)):
            theirs, own = inner[1].removeprefix("hook_"), aliases.get(layer, {})
            quantity = "mixer_out" if inner[1] in MIXER_OUT else own.get(theirs, theirs if own else None)
        meant = name if quantity is None else name_of(quantity, layer)
    if meant not in known:
        raise unknown_name(name, known)
    return meant


def unknown_name(name: object, known: Iterable[str]) -> UnknownHookError:
    """The error for a hook name that does not exist, with the nearest that do."""
    known = list(known)
    of_layers = [full for full in known if full.endswith(f".hook_{name}")]
    if of_layers:
        return UnknownHookError(
            f"{name!r} of which layer? {of_layers[0]!r} is one of {len(of_layers)}; of a cache, cache[{name!r}, layer]"
        )
    near = difflib.get_close_matches(str(name), known, n=3, cutoff=0.5) or known[:3]
    return UnknownHookError(f"no hook point named {name!r}; nearest: {', '.join(near)} (all: model.hook_names)")


class UnknownHookError(KeyError):
    """No hook point of that name (a KeyError that prints its message as written, not its repr)."""

    def __str__(self) -> str:
        return str(self.args[0])
