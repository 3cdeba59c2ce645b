"""What a model reads at each step of its training: a pure function of the step, so that resuming is exact."""

from __future__ import annotations

import random
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from writesae.zoo.recall import Recall, Row


class Batch(NamedTuple):
    """Token ids, how much each counts as a prediction, and how many tokens back attention layers see (None: all)."""

    ids: Int[Tensor, "row pos"]
    weights: Float[Tensor, "row pos"]
    sees: int | None
    kind: str


def prose(tokens: Tensor, step: int, batch: int, length: int, seed: int) -> Int[Tensor, "row pos"]:
    """Batch number `step`, [batch, length + 1] token ids.

    Each pass over the corpus cuts it at a new random offset and visits the pieces in a new random order.
    """
    per_pass = (len(tokens) - length) // (length + 1)
    rows = []
    for n in range(step * batch, (step + 1) * batch):
        which_pass, index = divmod(n, per_pass)
        random = torch.Generator().manual_seed(seed * 1_000_003 + which_pass)
        offset = int(torch.randint(length, (), generator=random))
        piece = int(torch.randperm(per_pass, generator=random)[index])
        start = offset + piece * (length + 1)
        rows.append(tokens[start : start + length + 1])
    return torch.stack(rows)


class Course:
    """The order in which a model meets prose and facts.

    Facts begin as lists (`Recall.lists`), one more of them in a list every 100 steps; after `lists` steps they are told
    among prose (`Recall.passage`), whose stretches grow from 16 to 300 tokens over `stretch` steps. One step in four is
    prose at first, then one in two, and three in five over the `cool` last ones, where the learning rate falls.

    While facts are read, attention layers see 8 tokens back: what is asked has to come from the recurrent memory. In
    prose they see everything.

    Args:
        tokens: the training documents, one after another.
        recall: makes the rows with facts; None for a course of prose alone.
        batch, length: rows and tokens of a step of prose; steps with facts read as many tokens in shorter rows.
        seed: of everything that is drawn.
    """

    NEAR = 8

    def __init__(
        self, tokens: Tensor, recall: Recall | None, *, steps: int, batch: int, length: int, lists: int, stretch: int,
        cool: int, seed: int = 0,
    ):  # fmt: skip
        self._tokens, self._recall, self._seed = tokens, recall, seed
        self._batch, self._length = batch, length
        self._steps, self._lists, self._stretch, self._cool = steps, lists, stretch, cool

    def __getitem__(self, step: int) -> Batch:
        rng = random.Random(self._seed * 1_000_003 + step)
        kind, recall = self._kind(step, rng.random()), self._recall
        if kind == "prose" or recall is None:
            ids = prose(self._tokens, step, self._batch, self._length, self._seed)
            return Batch(ids, torch.ones_like(ids, dtype=torch.float), None, "prose")
        gap = 16 * (300 / 16) ** min(1.0, max(0, step - self._lists) / self._stretch)
        length = min(self._length, 512 if kind == "passages" and gap > 60 else 256)
        any_word = 0.7 if step < 0.6 * self._lists else 0.3

        def row() -> Row:
            if kind == "lists":
                return recall.lists(rng, length, min(8, 2 + step // 100), any_word)
            return recall.passage(rng, length, gap)

        rows = [row() for _ in range(max(1, self._batch * self._length // length))]
        ids, weights = (torch.tensor(part) for part in zip(*rows, strict=True))
        return Batch(ids, weights, self.NEAR, kind)

    def _kind(self, step: int, chance: float) -> str:
        if step < self._lists:
            return "prose" if chance < 0.25 else "lists"
        share = 0.6 if step >= self._steps - self._cool else 0.5
        return "prose" if chance < share else "lists" if chance < share + 0.2 * (1 - share) else "passages"
