"""Pictures with tokens across: which of a text are shown, how wide that is, and their names below."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

WIDEST = 9.0  # inches of a panel, however long the text
LINE = 0.115  # inches that a token's name takes, at its size
MARGIN = 1.5  # inches beside the tokens, for what stands at the left and right


def wide(n: int, each: float = 0.2, least: float = 4.6, most: float = WIDEST) -> float:
    """Inches of a panel for n tokens: ``each`` for one while that fits."""
    return min(max(least, each * n + MARGIN), most)


def name_tokens(axis: Any, words: Sequence[str], inches: float, *, down: bool = False) -> None:
    """Write tokens below a panel so many inches wide, or with ``down`` beside one so high.

    Where there are too many, every second, third, ... is named, and the axis says so.
    """
    step = max(1, math.ceil(len(words) * LINE / (inches - MARGIN)))
    at = range(0, len(words), step)
    names = [repr(words[i])[1:-1] for i in at]
    if down:
        axis.set_yticks(at, names, fontsize=7, parse_math=False)
    else:
        axis.set_xticks(at, names, rotation=90, fontsize=7, parse_math=False)
    if step > 1:
        side, label = ("y", axis.get_ylabel()) if down else ("x", axis.get_xlabel())
        axis.set(**{f"{side}label": f"{label or 'tokens'} (1 of {step} named)"})


def chosen(tokens: slice | Sequence[int], positions: Sequence[int]) -> list[int]:
    """Which entries of ``positions`` to show: the positions asked for, or a slice of them.

    Negative ones count from behind the last entry.

    Raises:
        IndexError: a position that is not there, or a slice with none.
    """
    end = max(positions, default=-1) + 1
    if isinstance(tokens, slice):
        found = [i for i, t in enumerate(positions) if t in range(*tokens.indices(end))]
    else:
        asked = [t + end if t < 0 else t for t in tokens]
        if missing := [t for t, at in zip(tokens, asked, strict=True) if at not in positions]:
            raise IndexError(f"tokens={list(tokens)}: {missing[0]} was not looked at; there are {spans(positions)}")
        found = [list(positions).index(t) for t in asked]
    if not found:
        raise IndexError(f"tokens={tokens!r} are none; there are {spans(positions)}")
    return found


def spans(positions: Sequence[int]) -> str:
    """Positions in words, whole stretches as one: ``0 to 5, 9``."""
    parts: list[list[int]] = []
    for t in sorted(positions):
        if parts and t == parts[-1][1] + 1:
            parts[-1][1] = t
        else:
            parts.append([t, t])
    words = [f"{a}" if a == b else f"{a} to {b}" for a, b in parts]
    return ", ".join(words[:4]) + (f", ... ({len(positions)} tokens)" if len(words) > 4 else "")
