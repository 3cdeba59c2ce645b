"""Arguments that were swapped, or are of another kind, said in words before anything runs."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from writesae.jobs.choices import meant

F = TypeVar("F", bound=Callable[..., Any])


def _is_model(x: Any) -> bool:
    return hasattr(x, "run_with_cache") and hasattr(x, "hook_names")


def _is_sae(x: Any) -> bool:
    return hasattr(x, "cfg") and hasattr(x, "encode")


def _is_text(x: Any) -> bool:  # or what stands for texts: token ids, windows of them
    return not _is_model(x) and not _is_sae(x) and not isinstance(x, int | float)


def _are_saes(x: Any) -> bool:
    return _is_sae(x) or (isinstance(x, Sequence) and not isinstance(x, str) and all(map(_is_sae, x)))


# By the name of a parameter, as all public functions use it: what it must be, and in words.
KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "model": (_is_model, "a HookedRecurrentModel"),
    "sae": (_are_saes, "an SAE"),  # of some functions also several
    "saes": (_are_saes, "an SAE or several"),
    "text": (_is_text, "a text, several, or token ids"),
    "texts": (_is_text, "texts"),
}


def named_kinds(function: F) -> F:
    """Check arguments by the names of their parameters (`KINDS`) before the function runs.

    The wrapped function raises TypeError that says what was given where, and the order of the arguments.
    """
    signature = inspect.signature(function)
    checked = {name: KINDS[name] for name in signature.parameters if name in KINDS}

    @functools.wraps(function)
    def check(*args: Any, **kwargs: Any) -> Any:
        try:
            given = signature.bind_partial(*args, **kwargs).arguments
        except TypeError as error:  # an argument too many, or of no such name
            unknown = next((name for name in kwargs if name not in signature.parameters), None)
            near = "" if unknown is None else meant(unknown, signature.parameters)
            raise TypeError(f"{error}: {function.__name__}{_order(signature)}{near}") from None
        for name, (is_one, words) in checked.items():
            if name in given and given[name] is not None and not is_one(given[name]):
                raise TypeError(
                    f"{name} must be {words}; got {_shown(given[name])}. The order is "
                    f"{function.__name__}{_order(signature)}"
                )
        return function(*args, **kwargs)

    return check  # type: ignore[return-value]


def _order(signature: inspect.Signature) -> str:
    """``(model, sae, texts, *, n_firings=...)``, without defaults and types."""
    shown, only_named = [], False
    for name, parameter in signature.parameters.items():
        if name == "self":
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and not only_named:
            shown, only_named = [*shown, "*"], True
        shown.append(f"**{name}" if parameter.kind is parameter.VAR_KEYWORD else name)
    return f"({', '.join(shown)})"


def _shown(value: Any) -> str:
    text = repr(value) if isinstance(value, str | int | float) else f"a {type(value).__name__}"
    return text if len(text) < 60 else f"{text[:56]}...'"


def check_names(made: type, named: Mapping[str, Any]) -> None:
    """Raise TypeError for arguments that a class has none of by that name; the message says the nearest right one."""
    signature = inspect.signature(made.__init__)
    unknown = next((name for name in named if name not in signature.parameters), None)
    if unknown is not None and all(one.kind is not one.VAR_KEYWORD for one in signature.parameters.values()):
        near = meant(unknown, signature.parameters)
        raise TypeError(f"no argument {unknown!r}: {made.__name__}{_order(signature)}{near}")
