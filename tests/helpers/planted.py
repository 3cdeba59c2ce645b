"""An SAE whose atoms are known: each fires at one token, and at nothing else, in texts of its own."""

from __future__ import annotations

import functools
import random
import re

import torch

import writesae as ws


@functools.cache
def model() -> ws.HookedRecurrentModel:
    return ws.HookedRecurrentModel.from_pretrained("tiny-gdn")


@functools.cache
def words() -> dict[str, int]:
    """Words that are one token each, also in a row: 18 of them."""
    tokenizer = model().tokenizer
    found = {}
    for token in range(300, len(tokenizer)):
        word = tokenizer.decode([token])
        if re.fullmatch(" [a-z]{3,}", word) and tokenizer.encode(word * 2, add_special_tokens=False) == [token] * 2:
            found[word.strip()] = token
        if len(found) == 18:
            return found
    raise AssertionError("no such words")


NAMES = tuple(words())[-3:]  # what atoms fire at


@functools.cache
def texts() -> tuple[torch.Tensor, ...]:
    """Windows of token ids: words at random, of which those of `NAMES` come now and then."""
    rng = random.Random(0)
    ids, fill = words(), [word for word in words() if word not in NAMES]
    rows = []
    for _ in range(60):
        row = [ids[rng.choice(fill)] for _ in range(128)]
        for name in NAMES:
            for at in rng.sample(range(128), 2):
                row[at] = ids[name]
        rows.append(torch.tensor(row))
    return tuple(rows)


def token(name: str) -> int:
    return words()[name]


@functools.cache
def sae(layer: int = 0, head: int = 1) -> ws.WriteSAE:
    """Dense atoms that are least-squares classifiers of what the head writes at each of `NAMES`."""
    ids = torch.stack(texts())
    with torch.no_grad():
        _, cache = model().run_with_cache(ids)
        x = cache.write(layer)[:, :, head].dense().flatten(-2).flatten(0, 1).double()
    is_name = torch.stack([ids.flatten() == token(name) for name in NAMES], -1)
    target = torch.cat([is_name, ~is_name.any(-1, keepdim=True)], -1).double()
    a = torch.cat([x, torch.ones(len(x), 1).double()], -1)
    solved = torch.linalg.solve(a.T @ a + 1e-6 * torch.eye(a.shape[1]).double(), a.T @ target)[:, : len(NAMES)]
    readings = a @ solved
    worst, best = (readings[is_name].min(), readings[~is_name].max())
    assert worst > best, (worst, best)  # they can be told apart
    site = next(site for site in model().sites if site.layer == layer)
    cfg = ws.SAEConfig(
        d_key=site.d_key, d_value=site.d_value, n_atoms=len(NAMES) + 1, k=1, encoder="dense", decoder="dense",
        sparsity="jumprelu", layer=layer, head=head, model_id="tiny-gdn", fingerprint=model().fingerprint(layer),
    )  # fmt: skip
    made = ws.WriteSAE(cfg)
    state = made.state_dict()
    state["A_enc"].zero_()
    state["A_enc"][:-1] = solved[:-1].T.reshape(-1, site.d_key, site.d_value).float()
    state["b_enc"].zero_()
    state["b_enc"][:-1] = solved[-1].float()
    state["log_threshold"].fill_(float((worst + best) / 2).__abs__()).log_()  # the last atom never fires
    made.load_state_dict(state)
    return made.eval()
