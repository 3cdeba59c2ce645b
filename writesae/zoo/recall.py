"""Text that can only be continued from memory: facts said once among prose, and asked for later.

    The captain was called Tarvik. ... It was written that the captain was called ->  Tarvik

A fact is a role, a relation and a value (a name, a place or a number). A recurrent model learns to recall if it meets
three kinds of rows in this order, all functions of a random generator alone:

- `lists`: facts in a row and all asked at once, in any order. Values may be any word. Learnt first, from nothing;
- `passage`: the same with prose before, between and after, ever more of it;
- prose as it is, from `writesae.zoo.batches`.

One value in eight, told by its hash, is never a fact in training; `questions` with `held_out=True` ask for these.
"""

from __future__ import annotations

import hashlib
import math
import random
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from writesae.zoo.vocabulary import NUMBERS, PEOPLE, PLACES, words_of

ROLES = words_of(
    "captain mate cook carpenter surgeon pilot sailor owner governor senator judge general colonel president "
    "secretary minister teacher doctor farmer merchant clerk stranger traveller king queen bishop boy girl "
    "hunter soldier printer smith"
)
RELATIONS = {
    "name": ("The {} was called", "The name of the {} was", "The {} told us that his name was"),
    "place": ("The {} came from", "The {} was born in", "The {} lived near"),
    "number": ("The number of the {} was", "The {} paid the sum of"),
}
OPENINGS = (
    "",
    "As was said before,",
    "You remember that",
    "It was written that",
    "We have heard that",
    "Now",
    "I repeat that",
)
FEW_NAMES = words_of("Henry Robert John Mary Thomas George")
TOLD, PROSE, ANSWER = 0.2, 1.0, 5.0  # how much a token counts in the loss; a value as it is told counts nothing


class Fact(NamedTuple):
    """What is said of somebody: `said` goes up to the value, which begins with a space."""

    said: str
    value: str


class Row(NamedTuple):
    """Token ids, and how much each counts in the loss as a prediction."""

    ids: list[int]
    weights: list[float]


class Question(NamedTuple):
    """A text up to an answer, and the answer."""

    prompt: list[int]
    answer: list[int]


def is_held_out(value: str) -> bool:
    """Whether a value is kept from training, one in eight."""
    return hashlib.sha256(value.strip().encode()).digest()[0] % 8 == 0


def invented_names() -> list[str]:
    """Some 5,000 names that nobody bears, of several tokens."""
    rng = random.Random(1)
    onsets = words_of("B C D F G H J K L M N P R S T V W Br Cr Dr Gr Pr St Th Tr Sh Ch")
    vowels, codas = words_of("a e i o u ai ea ou"), words_of("n r l t s d m ck rd nd st ll")
    middles = words_of("b d f g k l m n p r s t v")
    long = {"".join(map(rng.choice, (onsets, vowels, middles, vowels[:5], codas))) for _ in range(3000)}
    return sorted(long | {"".join(map(rng.choice, (onsets, vowels, codas))) for _ in range(2000)})


class Recall:
    """Makes rows and questions in a tokenizer's vocabulary, with prose of the texts given.

    Args:
        tokenizer: a byte-level BPE whose pieces break at spaces, so that sentences can be encoded part by part.
        texts: where the sentences between come from.
    """

    def __init__(self, tokenizer: Any, texts: Sequence[str]):
        self._tokenizer, self._end = tokenizer, tokenizer.eos_token_id
        self._known: dict[str, list[int]] = {}
        self.sentences = [
            s.replace("\n", " ") for text in texts for s in re.split(r"(?<=[.!?])\s+", text) if 20 < len(s) < 400
        ]
        self.values = {
            kind: [word for word in words if len(self._encode(" " + word)) == 1]
            for kind, words in (("name", PEOPLE), ("place", PLACES), ("number", NUMBERS))
        }
        self._values = {  # by kind, and by whether they are held out
            (kind, out): [word for word in words if is_held_out(word) == out]
            for kind, words in self.values.items()
            for out in (True, False)
        }
        self.invented = [w for w in invented_names() if len(self._encode(" " + w)) <= 3 and not is_held_out(w)]
        pieces = {tokenizer.decode([i]) for i in range(len(tokenizer))}
        self.words = sorted(w for w in pieces if re.fullmatch(r" [A-Za-z]{2,}", w) and not is_held_out(w))

    @property
    def held_out(self) -> list[int]:
        """Ids of the values that training leaves out."""
        return sorted(self._encode(" " + v)[0] for kind in self.values for v in self._values[kind, True])

    def lists(self, rng: random.Random, length: int, most: int, any_word: float) -> Row:
        """Facts in a row, one to `most`, and then each asked twice, in any order; a new list after each.

        `any_word` is the share of values that may be any word of the vocabulary, or two.
        """
        row = _Writing(self._encode, self._end)
        while row.n <= length:
            facts = self._facts(rng, rng.randint(1, most), any_word)
            for fact in facts:
                row.tell(fact)
            for _ in range(2):
                for fact in rng.sample(facts, len(facts)):
                    row.ask(self._asked(rng, fact), fact.value)
            row.end()
        return row.cut(length)

    def passage(self, rng: random.Random, length: int, gap: float, most: int = 4, any_word: float = 0.6) -> Row:
        """Facts told among prose and asked twice, after one to `gap` tokens of it, on a logarithmic scale."""
        row = _Writing(self._encode, self._end)

        def between() -> int:
            return int(2 ** rng.uniform(0, math.log2(gap)))

        def aside(chance: float) -> None:
            if rng.random() < chance:
                row.put(self.prose(rng, between() // 4 + 1), PROSE)

        while row.n <= length:
            facts = self._facts(rng, rng.randint(1, most), any_word)
            aside(0.5)
            for fact in facts:
                row.tell(fact)
                aside(0.5)
            row.put(self.prose(rng, between()), PROSE)
            for fact in rng.sample(facts, len(facts)) + rng.sample(facts, len(facts)):
                row.ask(self._asked(rng, fact), fact.value)
                aside(0.4)
            row.end()
        return row.cut(length)

    def few_names(self, rng: random.Random, length: int) -> list[int]:
        """`length` token ids of a captain who is called by one of `FEW_NAMES`, again and again, a sentence between."""
        row = _Writing(self._encode, self._end)
        while row.n <= length:
            said = "The captain was called"
            if rng.random() < 0.5:  # at the beginning of a text
                row.end()
            else:
                said = " " + said
            row.tell(Fact(said, " " + rng.choice(FEW_NAMES)))
            row.put(self.prose(rng, 1), PROSE)
        return row.ids[:length]

    def prose(self, rng: random.Random, n: int) -> list[int]:
        """At least `n` tokens of sentences that follow each other."""
        ids: list[int] = []
        at = rng.randrange(len(self.sentences))
        while len(ids) < n:
            ids += self._encode(" " + self.sentences[at % len(self.sentences)])
            at += 1
        return ids

    def questions(
        self, n: int, gap: int, facts: int = 1, held_out: bool = True, kind: str | None = None, seed: int = 7
    ) -> list[Question]:
        """Texts that tell `facts` facts, go on for `gap` tokens of prose, and ask for one of them.

        `held_out` says from which values; `kind` is one of `RELATIONS`, or None for all of them.
        """
        rng, made = random.Random(seed), []
        for _ in range(n):
            told = self._facts(rng, facts, 0.0, held_out, kind)
            row = _Writing(self._encode, self._end)
            row.put(self.prose(rng, 10), PROSE)
            for fact in told:
                row.tell(fact)
            if gap:
                row.put(self.prose(rng, gap), PROSE)
            asked = rng.choice(told)
            row.put(self._encode(self._asked(rng, asked)), PROSE)
            made.append(Question(row.ids, self._encode(asked.value)))
        return made

    def _facts(
        self, rng: random.Random, n: int, any_word: float, held_out: bool = False, kind: str | None = None
    ) -> list[Fact]:
        kinds = [kind] if kind else list(RELATIONS)
        facts = []
        for role, which in rng.sample([(r, k) for r in ROLES for k in kinds], n):
            if rng.random() < any_word:
                value = rng.choice(self.words) + (rng.choice(self.words) if rng.random() < 0.3 else "")
            else:
                pool = self._values[which, held_out]
                if not held_out and which != "number" and rng.random() < 0.15:
                    pool = self.invented
                value = " " + rng.choice(pool)
            facts.append(Fact(" " + rng.choice(RELATIONS[which]).format(role), value))
        return facts

    def _asked(self, rng: random.Random, fact: Fact) -> str:
        """The sentence again, up to the value."""
        opening = rng.choice(OPENINGS)
        return f" {opening}{fact.said.replace(' The', ' the', 1)}" if opening else fact.said

    def _encode(self, text: str) -> list[int]:
        if text not in self._known:
            self._known[text] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return self._known[text]


class _Writing:
    """A row as it grows."""

    def __init__(self, encode: Callable[[str], list[int]], end: int):
        self.encode, self._end = encode, end
        self.ids, self.weights = [end], [0.0]

    @property
    def n(self) -> int:
        return len(self.ids)

    def put(self, ids: list[int], weight: float) -> None:
        self.ids += ids
        self.weights += [weight] * len(ids)

    def tell(self, fact: Fact) -> None:
        for text, weight in ((fact.said, TOLD), (fact.value, 0.0), (".", TOLD)):
            self.put(self.encode(text), weight)

    def ask(self, question: str, answer: str) -> None:
        for text, weight in ((question, TOLD), (answer, ANSWER), (".", TOLD)):
            self.put(self.encode(text), weight)

    def end(self) -> None:
        self.put([self._end], 0.0)

    def cut(self, length: int) -> Row:
        return Row(self.ids[: length + 1], self.weights[: length + 1])


@torch.no_grad()
def recalled(model: Any, questions: Sequence[Question], batch: int = 25) -> list[bool]:
    """For each question, whether every token of the answer is the model's likeliest (the ones before it given)."""
    order = sorted(range(len(questions)), key=lambda i: len(questions[i].prompt))
    found = [False] * len(questions)
    for start in range(0, len(order), batch):
        part = order[start : start + batch]
        rows = [torch.tensor(questions[i].prompt + questions[i].answer) for i in part]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)  # on the right, where no answer sees it
        likeliest = model(input_ids=ids.to(model.device), use_cache=False).logits.argmax(-1).cpu()
        for row, i in zip(likeliest, part, strict=True):
            prompt, answer = questions[i]
            found[i] = row[len(prompt) - 1 :][: len(answer)].tolist() == answer
    return found
