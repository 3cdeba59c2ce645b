"""The paper's numbers, to stand beside ours: by experiment, id of the number (`Number.id`), model and head.

A value is the paper's own text. A number of another model is not comparable one to one, and says so.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from writesae.experiments.results.result import id_of

How: TypeAlias = Literal["same site", "another site", "another model"]


@dataclass(frozen=True)
class Cell:
    """What the paper measured at: a model, and heads of it.

    Attributes:
        model: its name.
        ids: regular expression for hub ids of it.
        rule: update rule, as `Site.rule` has it.
        sites: ``(layer, head)`` of each head.
        where: these in words.
    """

    model: str
    ids: str
    rule: str
    sites: tuple[tuple[int, int], ...]
    where: str


_SMALL = ("Qwen3.5-0.8B", r"qwen3\.5-0\.8b(-base)?$", "gated_delta")
_FOUR = ("Qwen3.5-4B", r"qwen3\.5-4b(-base)?$", "gated_delta")
CELLS = {
    "0.8B": Cell(*_SMALL, ((1, 4), (9, 4), (17, 4)), "L1, L9 and L17, H4"),
    "L1": Cell(*_SMALL, ((1, 4),), "L1 H4"),
    "L9": Cell(*_SMALL, ((9, 4),), "L9 H4"),
    "L17": Cell(*_SMALL, ((17, 4),), "L17 H4"),
    "all L9": Cell(*_SMALL, tuple((9, head) for head in range(16)), "L9, all heads"),
    "4B": Cell(*_FOUR, ((12, 8),), "L12 H8"),
    "4B L9": Cell(*_FOUR, tuple((9, head) for head in range(32)), "L9, ten atoms a head"),
    "27B": Cell("Qwen3.5-27B", r"qwen3\.5-27b(-base)?$", "gated_delta", ((32, 16),), "L32 H16"),
    "Mamba-2": Cell("Mamba-2-370M", r"mamba-?2-370m(-hf)?$", "mamba2", ((24, 0),), "L24 H0"),
    "RWKV-7": Cell("RWKV-7-1.5B", r"rwkv-?7.*1\.5b", "rwkv7", ((12, 0),), "L12 H0"),
    "DeltaNet": Cell("DeltaNet-1.3B", r"delta_?net-1\.3b", "delta", ((12, 8),), "L12 H8"),
    "GLA": Cell("GLA-1.3B", r"gla-1\.3b", "gla", ((12, 0),), "L12 H0"),
}


@dataclass(frozen=True)
class PaperValue:
    """A number of the paper.

    Attributes:
        text: as it is printed there.
        source: section or table.
        model, where: what it was measured on.
        how: whether that is what was asked about: ``"another site"`` of the same model, or ``"another model"`` of the
            same update rule, is not comparable one to one.
    """

    text: str
    source: str
    model: str
    where: str
    how: How

    def __str__(self) -> str:
        return f"{self.text} ({self.model} {self.where}, {self.source})"


_Rows: TypeAlias = dict[tuple[str, str], list[tuple[str, str, str]]]


def _read(table: str) -> _Rows:
    """``(experiment, id) -> [(cell, value, source)]`` from the text below."""
    found: _Rows = {}
    experiment = number = ""
    for line in filter(None, table.splitlines()):
        first, *row = (part.strip() for part in line.split("|"))
        if not line.startswith(" "):
            experiment = first
        else:
            number = first or number
        if row:
            cell, value, source = row
            found.setdefault((experiment, number), []).append((cell, value, source))
    return found


# id of the number | cell | value | source; without an id, the same number as above. Of the cells of one rule, the first
# is shown for other models of it.
TABLE = _read("""
replacement_test
  atom-beats-deletion | 0.8B | 92.4% [91.6, 93.1] | section 3.2
    | L1 | 93.9% | Table 2
    | L9 | 91.2% | Table 2
    | L17 | 92.3% | Table 2
    | all L9 | 89.3% ± 2.6, mean of 15 heads | App. F.1
    | 4B | 48% | section 6.2
    | Mamba-2 | 88.08% [86.8, 89.3] | section 3.3
    | RWKV-7 | 45.3% | section 3.4
    | DeltaNet | 48.3% | App. G.3
  atom-beats-deletion/l1h4 | 0.8B | 93.9% | Table 2
  atom-beats-deletion/l9h4 | 0.8B | 91.2% | Table 2
  atom-beats-deletion/l17h4 | 0.8B | 92.3% | Table 2
  atom-beats-deletion/mean-of-sites | all L9 | 89.3% ± 2.6 | App. F.1
  cluster-bootstrap-by-atom | 0.8B | 92.4% [90.91, 93.94] | section 3.2
  cluster-bootstrap-by-text | 0.8B | 92.4% [90.90, 93.39] | section 3.2, passages
  atom-<-deletion-<-random | 0.8B | 89.5% | section 3.2
    | DeltaNet | 17.7% [14.0, 21.5] | App. G.3
  flat-sae-top-svd-beats-deletion | L9 | 91.36% | section 3.4
    | Mamba-2 | 76.30% | section 3.4
    | RWKV-7 | 47.8% | section 3.4
  cliff's-delta | L9 | 0.825 | section 3.2
  paired-wilcoxon-p | L9 | < 1e-200 | section 3.2
  median-kl/atom | L9 | 0.40 nats | Table 2
    | L1 | 2.07 nats | Table 2
    | L17 | 1.82 nats | Table 2
    | Mamba-2 | 0.97 nats | section 3.3
    | DeltaNet | 2.70e-4 nats | App. G.3
  median-kl/deletion | L9 | 1.09 nats | Table 2
    | L1 | 2.82 nats | Table 2
    | L17 | 2.58 nats | Table 2
    | Mamba-2 | 1.62 nats | section 3.3
    | DeltaNet | 2.30e-4 nats | App. G.3
  median-kl/random | L9 | 2.02 nats | Table 2
    | L1 | 3.58 nats | Table 2
    | L17 | 3.43 nats | Table 2
    | Mamba-2 | 2.32 nats | section 3.3
  ratio-of-median-kl/deletion-:-atom | 0.8B | 2.70 | Table 2
  ratio-of-median-kl/random-:-atom | 0.8B | 4.90 | Table 2
  atom-beats-deletion/smallest-quarter-of-effects | 0.8B | 87.7% | Fig. 14
  atom-beats-deletion/second-quarter-of-effects | 0.8B | 91.9% | Fig. 14
  atom-beats-deletion/third-quarter-of-effects | 0.8B | 94.7% | Fig. 14
  atom-beats-deletion/largest-quarter-of-effects | 0.8B | 95.1% | Fig. 14
population_test
  atom-beats-deletion/mean-over-atoms | L9 | 89.8% [88.1, 91.3] | App. F.2
    | Mamba-2 | 88.08% [86.8, 89.3] | section 3.3
  atom-beats-deletion/register-atoms | L9 | 91.36% | App. F.2
  atom-beats-deletion/bundle-atoms | L9 | 88.98% | App. F.2
  mann-whitney-p/register-against-bundle/win-rate | L9 | 0.239 | App. F.2
    | Mamba-2 | 0.76 | section 3.3
  pearson-r/cosine-and-win-rate | L9 | 0.19 (p = 0.08) | App. F.2
    | Mamba-2 | 0.008 (p = 0.93) | section 3.3
  spearman-rho/cosine-and-win-rate | L9 | 0.06 (p = 0.60) | App. F.2
  top-1-flips-under-deletion/median-over-atoms | L9 | 70.0% registers, 63.3% bundles | Table 17
  top-1-flips-under-the-atom/median-over-atoms | L9 | 42.3% registers, 40.0% bundles | Table 17
  atom-beats-deletion/median-over-atoms | L9 | 90.0% | App. F.2
  atom-beats-deletion/lowest-atom | L9 | 60.9% | App. F.2
  atom-beats-deletion/all-firings | L9 | 89.85% | Table 13
  atom-beats-deletion/cosine-<-0.0 | L9 | 91.5% | Table 13
  atom-beats-deletion/cosine->=-0.0-and-<-0.05 | L9 | 88.0% | Table 13
  atom-beats-deletion/cosine->=-0.05-and-<-0.2 | L9 | 81.1% | Table 13
  atom-beats-deletion/cosine->=-0.2-and-<-0.3 | L9 | 92.9% | Table 13
  kl-of-deletion-less-that-of-the-atom/median-over-atoms | L9 | 0.682 registers, 0.579 bundles (nats) | Table 17
  cliff's-delta/register-against-bundle/flips-under-deletion | L9 | 0.294 (p = 0.041) | Table 17
  cliff's-delta/register-against-bundle/kl-lost | L9 | 0.109 (p = 0.45) | Table 17
atom_classes
  alive-atoms | L9 | 316 | section 3.1
  registers | L9 | 222 | section 3.1
    | 4B | 220 | Table 11
    | 27B | 147 | Table 11
    | Mamba-2 | 217 | Table 11
    | RWKV-7 | 200 | section 3.3
    | DeltaNet | 6 (k = 128) | Table 11
    | GLA | 564 | Table 11
  bundles | L9 | 94 | section 3.1
    | 4B | 23 | Table 11
    | 27B | 73 | Table 11
    | Mamba-2 | 1,831 | Table 11
    | RWKV-7 | 541, called null | section 3.3
    | DeltaNet | 425 (k = 128) | Table 11
    | GLA | 1,481 | Table 11
  null-atoms | L9 | 1,732 | section 3.1
    | 4B | 1,805 | Table 11
    | 27B | 1,828 | Table 11
    | Mamba-2 | 0 | Table 11
    | DeltaNet | 1,617 (k = 128) | Table 11
    | GLA | 3 | Table 11
  dbic/two-components-against-one | L9 | -296 | section 3.1
    | L1 | -6,774 | section 3.2
    | L17 | -390 | section 3.2
  dbic/three-components-against-two | L9 | -4.15 | App. G.1
  median-cosine/registers | L9 | 0.262 | Table 11
    | 4B | 0.152 | Table 11
    | 27B | 0.085 | Table 11
    | Mamba-2 | 0.0575 | Table 11
    | RWKV-7 | 0.180 | section 3.3
    | DeltaNet | 0.997 (k = 128) | Table 11
    | GLA | 0.110 | Table 11
  median-cosine/bundles | L9 | 0.009 | Table 5
  registers-at-cosine->=-0.02 | L9 | 243 | Table 15
    | 4B | 227 | Table 15
  registers-at-cosine->=-0.03 | L9 | 235 | Table 15
    | 4B | 224 | Table 15
  registers-at-cosine->=-0.05 | L9 | 222 | Table 15
    | 4B | 220 | Table 15
  registers-at-cosine->=-0.10 | L9 | 221 | Table 15
    | 4B | 183 | Table 15
  median-firings-per-atom/registers | L9 | 100 in 10,000 tokens | Table 17
  median-firings-per-atom/bundles | L9 | 70.5 in 10,000 tokens | Table 17
  cliff's-delta-of-firings/registers-against-bundles | L9 | 0.518 | Table 17
  spearman/cosine-and-firings | L9 | 0.73 | App. H
seed_stability
  atoms-with-a-partner | L9 | < 1% | section 3.1
  variation-of-the-number-of-registers | L9 | 4 to 12% | section 3.1
  variation-of-the-number-of-bundles | L9 | 4 to 12% | section 3.1
logit_change
  r²-of-a-cell/three-factors/prefactor-fitted
    | L9 | 0.98, its prefactor fitted for each prompt, atom and token | section 6.2, App. A
    | 4B | -0.05 | section 6.2
    | Mamba-2 | -0.07 | section 6.2
  r²-of-a-cell/proportional | L9 | 0.98, its prefactor fitted for each prompt, atom and token | section 6.2, App. A
sign_test
  sign-as-predicted | L9 | 84.6% [83.0, 86.2] | section 4
  pearson-r | L9 | 0.162 | section 4
  median-measured-/-predicted | L9 | 1.08 | section 4
  r-squared | L9 | -0.06 | section 4
erase
  median-change-of-log-p | L9 | -0.116 nats [-0.265, -0.042], same firings | section 4
  median-change-of-log-p/same-firings | L9 | -0.116 nats [-0.265, -0.042] | section 4
  p-(wilcoxon)/same-firings | L9 | 1.07e-6 | section 4
  mean-change-of-log-p | L9 | -0.349 nats, same firings | Table 18
  median-rank-before | L9 | 68,485 | Table 18
  median-rank-after | L9 | 77,444 | Table 18
  median-change-of-log-p/no-firing:-plus-1 | L9 | 3.1e-5 nats (p = 0.67) | Table 19
  median-change-of-log-p/no-firing:-plus-2 | L9 | 0.008 nats (p = 0.28) | Table 19
  median-change-of-log-p/no-firing:-plus-4 | L9 | 0.016 nats (p = 0.15) | Table 19
install
  inclusion | L9 | 25.0% | Table 3
    | Mamba-2 | no lift | section 6.2
  inclusion/unmodified | L9 | 8.3% | Table 3
  inclusion/ranks-101-to-1000 | L9 | 100% | Table 3
  inclusion/unmodified/ranks-101-to-1000 | L9 | 33.3% | Table 3
  inclusion-at-1.5x | L9 | 16.7% | Table 20
  inclusion-at-3x | L9 | 25.0% | Table 20
  inclusion-at-6x | L9 | 16.7% | Table 20
  rank-improved | L9 | 77.4% | section 4
  median-rank-shift | L9 | 517, ranks 100 to 1000 | section 4
  first-step-lift | L9 | 1.27 nats | section 4
    | Mamba-2 | about 0 | section 6.2
amplify
  newlines/baseline | 4B L9 | 16.8 [14.8, 18.9] | Table 4
  newlines/2x | 4B L9 | 12.7 [10.1, 15.5] | Table 4
  newlines/5x | 4B L9 | 11.2 [8.6, 13.9] | Table 4
  newlines/10x | 4B L9 | 13.4 [10.1, 16.8] | Table 4
  newlines/random-10x | 4B L9 | 19.0 [17.2, 20.8] | Table 4
  paragraphs/baseline | 4B L9 | 7.5 [6.6, 8.5] | Table 4
  paragraphs/2x | 4B L9 | 6.3 [5.2, 7.4] | Table 4
  paragraphs/5x | 4B L9 | 6.2 [4.9, 7.4] | Table 4
  paragraphs/10x | 4B L9 | 7.4 [5.9, 8.9] | Table 4
  paragraphs/random-10x | 4B L9 | 7.8 [7.0, 8.7] | Table 4
  word-length/baseline | 4B L9 | 5.54 | Table 4
  word-length/2x | 4B L9 | 5.34 | Table 4
  word-length/5x | 4B L9 | 5.24 | Table 4
  word-length/10x | 4B L9 | 5.29 | Table 4
  word-length/random-10x | 4B L9 | 5.50 | Table 4
  p/5x | 4B L9 | 0.001 | section 4
  p/2x | 4B L9 | 0.015 | section 4
  p-adjusted/5x | 4B L9 | 0.004 | section 4
  cohen's-d/5x | 4B L9 | 0.55, a fall | section 4
""")


def paper_value(
    experiment: str, number: str, model_id: str | None, sites: Sequence[tuple[int, int]] = (), rule: str | None = None
) -> PaperValue | None:
    """What the paper has for a number; None if nothing.

    Args:
        experiment: name of its function, ``"replacement_test"``.
        number: its id, or a name that the id is made from (outcomes made before there were ids have names only).
        model_id: of the model it was measured on here.
        sites: ``(layer, head)`` of each head it is about.
        rule: the model's update rule (``model.sites[0].rule``). With it, a model that the paper does not have gets the
            number of the paper's model of that rule, marked ``"another model"``.

    >>> str(paper_value("replacement_test", "atom beats deletion", "Qwen/Qwen3.5-0.8B", [(9, 4)]))
    '91.2% (Qwen3.5-0.8B L9 H4, Table 2)'
    >>> paper_value("replacement_test", "atom beats deletion", "tiny-gdn", [(2, 0)], rule="gated_delta").how
    'another model'
    """
    number = id_of(number)
    rows = TABLE.get((experiment, number)) or TABLE.get((experiment, number.rpartition("/epsilon-")[0]), [])
    of_model = [row for row in rows if model_id is not None and re.search(CELLS[row[0]].ids, model_id.lower())]
    of_site = [row for row in of_model if set(CELLS[row[0]].sites) == set(sites)]
    of_rule = [row for row in rows if CELLS[row[0]].rule == rule]
    choices: tuple[tuple[How, list[tuple[str, str, str]]], ...] = (
        ("same site", of_site), ("another site", of_model), ("another model", of_rule)
    )  # fmt: skip
    for how, found in choices:
        if found:
            cell, text, source = found[0]
            return PaperValue(text, source, CELLS[cell].model, CELLS[cell].where, how)
    return None
