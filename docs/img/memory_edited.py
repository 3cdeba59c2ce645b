"""Draws docs/img/memory_edited-{light,dark}.svg, the picture at the top of README, from a run of `tiny-gdn`.

A text tells a name, goes on about something else, and asks for it. One head wrote the name down. That write is
exchanged for the one of a text that tells another name: the head's state before and after, and the model's answer.

    python docs/img/memory_edited.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.colors
import matplotlib.pyplot as plt
import torch

import writesae as ws

FOLDER = Path(__file__).parent
LAYER, HEAD = 2, 1
NAME, OTHER = " Henry", " Robert"
STORY = (
    "The captain was called{}. The ship went out of the harbour in the morning, and the people of the town looked at "
    "it for a long time. It was written that the captain was called"
)
THEMES = {
    "light": {
        "ink": "#1f2328",
        "quiet": "#6e7781",
        "native": "#8c959f",
        "edited": "#bc4c00",
        "paper": "#ffffff",
        "scale": ["#0b4fb3", "#6ea8fe", "#ffffff", "#ff9b5e", "#bc4c00"],
    },
    "dark": {
        "ink": "#e6edf3",
        "quiet": "#9198a1",
        "native": "#6e7681",
        "edited": "#ff9b5e",
        "paper": "#0d1117",
        "scale": ["#79c0ff", "#1f6feb", "#0d1117", "#d4621a", "#ffb77c"],
    },
}


@torch.no_grad()
def run() -> dict[str, Any]:
    """States ``[d_key, d_value]`` of the head after the last token, and probabilities of the next one."""
    model = ws.HookedRecurrentModel.from_pretrained("tiny-gdn")
    text, other = STORY.format(NAME), STORY.format(OTHER)
    tokens = model.to_str_tokens(text)
    place = tokens.index(NAME)
    write = model.run_with_cache(other)[1].write(LAYER)[0, place, HEAD]

    def state(cache: ws.ActivationCache) -> torch.Tensor:
        return cache.state(LAYER, positions=[-1])[0, 0, HEAD]

    native, cache = model.run_with_cache(text)
    with model.intervene(ws.Replace(LAYER, HEAD, write=write), positions=[place]):
        edited, edited_cache = model.run_with_cache(text)
    p, q = native[0, -1].softmax(-1), edited[0, -1].softmax(-1)
    shown = list(dict.fromkeys([*q.topk(2).indices.tolist(), *p.topk(2).indices.tolist()]))
    return {
        "later": len(tokens) - 1 - place,
        "before": state(cache),
        "change": state(edited_cache) - state(cache),
        "after": state(edited_cache),
        "words": [model.tokenizer.decode([i]).strip() for i in shown],
        "p": [p[i].item() for i in shown],
        "q": [q[i].item() for i in shown],
    }


def draw(found: dict[str, Any], theme: dict[str, str]) -> Any:
    """Three matrices in one colour scale, the first two adding up to the third, and the next token."""
    plt.rcParams.update(
        {
            "font.size": 9,
            "font.family": "DejaVu Sans",
            "svg.hashsalt": "writesae",  # the same file every time
            "svg.fonttype": "path",
            **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), theme["ink"]),
        }
    )
    figure = plt.figure(figsize=(9.6, 2.9), facecolor=theme["paper"])
    colors = matplotlib.colors.LinearSegmentedColormap.from_list("", theme["scale"])
    limit = 0.5 * max(
        found[name].abs().max().item() for name in ("before", "change", "after")
    )  # few entries are larger
    matrices = [
        ("before", 0.010, "its memory", "“… was called Henry. …”"),
        ("change", 0.235, "one write exchanged", "for that of “… Robert. …”"),
        ("after", 0.460, "its memory, edited", f"asked {found['later']} tokens later"),
    ]
    for name, left, title, below in matrices:
        axis = figure.add_axes((left, 0.17, 0.19, 0.63))
        axis.imshow(found[name], cmap=colors, vmin=-limit, vmax=limit, interpolation="nearest")
        axis.set(xticks=[], yticks=[])
        axis.set_title(title, fontsize=10.5, fontweight="bold", color=theme["ink"], pad=7)
        axis.set_xlabel(below, fontsize=9, color=theme["quiet"], labelpad=6)
        for spine in axis.spines.values():
            spine.set(color=theme["quiet"], linewidth=0.6)
    for left, sign in ((0.2175, "+"), (0.4425, "=")):
        figure.text(left, 0.485, sign, fontsize=17, ha="center", va="center", color=theme["quiet"])

    axis = figure.add_axes((0.755, 0.17, 0.20, 0.63), facecolor="none")
    rows = range(len(found["words"]))
    for offset, name, color in ((-0.2, "p", theme["native"]), (0.2, "q", theme["edited"])):
        axis.barh([row + offset for row in rows], found[name], height=0.36, color=color)
        for row, value in zip(rows, found[name], strict=True):
            axis.text(
                value + 0.02, row + offset, f"{100 * value:.0f}%", fontsize=7.5, va="center", color=theme["quiet"]
            )
    axis.set(xlim=(0, 1.08), xticks=[], yticks=list(rows), yticklabels=found["words"])
    axis.invert_yaxis()
    axis.tick_params(length=0)
    for side in ("top", "right", "bottom", "left"):
        axis.spines[side].set_visible(False)
    axis.set_title("the next token", fontsize=10.5, fontweight="bold", color=theme["ink"], pad=7)
    figure.text(0.757, 0.125, "as it was", fontsize=9, color=theme["native"], fontweight="bold", va="center")
    figure.text(0.838, 0.125, "edited", fontsize=9, color=theme["edited"], fontweight="bold", va="center")
    return figure


if __name__ == "__main__":
    found = run()
    for name, theme in THEMES.items():
        figure = draw(found, theme)
        figure.savefig(FOLDER / f"memory_edited-{name}.svg", metadata={"Date": None})
    print({key: value for key, value in found.items() if key in ("words", "p", "q")})
    print({name: round(found[name].norm().item(), 4) for name in ("before", "change", "after")})
