"""Atom pages: numbers equal to what the library says by other ways, sites that are whole, runs that go on.

Twins break one thing that a comparison must notice.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import shutil
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import pages
import writesae as ws
from pages import SEARCHED, hooked, part, part_of, studied, texts
from writesae import WriteSAE
from writesae.cli import app
from writesae.experiments.engine.directions import promotion
from writesae.experiments.engine.mixture import MIN_VALUES
from writesae.jobs.resumable import Kept
from writesae.pages import effects, write_pages
from writesae.pages import show as showing
from writesae.pages import study as steps
from writesae.pages.decoder import Decoder, direct_effect, nearest
from writesae.pages.render import (
    BETWEEN,
    TEMPLATES,
    atom_page,
    index_page,
    index_row,
    number,
    percent,
    plain,
    signed,
    visible,
)
from writesae.pages.study import study
from writesae.pages.survey import BIN, QUANTILES, cut_windows, survey
from writesae.saes import SAEConfig
from writesae.zoo import heldout_documents, shipped_models

each_model = pytest.mark.parametrize("name", shipped_models())


@pytest.fixture(scope="module")
def site() -> Path:
    return pages.site()


# --- the pass over the texts ------------------------------------------------------------------------------------------


@each_model
def test_one_pass_finds_what_separate_passes_find(name):
    model, sae = hooked(name), part_of(name)
    ids = cut_windows(model, texts()[0], 64)
    whole = torch.stack([window.tokens for window in ids if len(window.tokens) == 64])
    found = survey(model, sae, cut_windows(model, whole, 64), n=4, before=5, after=3)
    alone = ws.top_contexts(model, sae, whole, n=4, before=5, after=3, context=64, progress=False)
    for field in ("fired", "histogram", "values", "documents", "positions", "tokens", "activations"):
        assert torch.equal(getattr(found.strongest, field), getattr(alone, field)), field
    assert [context.token for context in found.strongest[3]] == [context.token for context in alone[3]]

    codes = model.encode(sae, whole)
    assert torch.equal(found.seen.firings, codes.fired)
    by_hand = torch.zeros(sae.cfg.n_atoms, 64 // BIN)
    for place in range(64):
        active = codes.indices[:, place][codes.values[:, place] > 0]
        by_hand[:, place // BIN] += active.bincount(minlength=sae.cfg.n_atoms)
    assert torch.equal(found.by_position.float(), by_hand)
    assert found.tokens_by_position.tolist() == [len(whole) * BIN] * (64 // BIN)


@torch.no_grad()
def test_classes_and_the_sample_are_those_of_the_firings():
    model, sae, found = hooked(), part(), studied().survey
    windows = cut_windows(model, texts())
    assert sum(len(window.tokens) for window in windows) == found.n_tokens
    n_checked = 0
    for atom in found.most_frequent(3):
        sample = found.sample(atom)
        assert len(sample["activation"]) == min(500, int(found.seen.firings[atom]))
        for i in range(len(sample["activation"])):
            window, place = windows[int(sample["window"][i])], int(sample["position"][i])
            assert int(sample["token"][i]) == int(window.tokens[place])
            if i < 2:
                _, cache = model.run_with_cache(window.tokens)
                write = cache.write(2)[:, [place], 1]
                value, index = (x.detach() for x in sae.topk(write, 1))
                assert int(index) == atom and float(value) == pytest.approx(float(sample["activation"][i]), rel=1e-3)
                cosine = float(sae.atom(atom).cosine(write).detach())
                assert float(sample["cosine"][i]) == pytest.approx(cosine, abs=1e-3)
                side = (sae.V_dec[atom].detach() * write.key[0, 0]).sum().sign()
                assert float(sample["side"][i]) == float(side)
                n_checked += 1
        assert float(found.classes.cosine[atom]) == pytest.approx(np.median(sample["cosine"].numpy()), abs=1e-6)
        shares = [share for _, share in found.fires_at[atom]]
        assert shares == sorted(shares, reverse=True) and sum(shares) <= 1 + 1e-6
    assert n_checked == 6
    dead = int((found.seen.firings == 0).nonzero()[0])
    assert len(found.sample(dead)["token"]) == 0 and found.fires_at[dead] == [] and found.strongest[dead] == []


def test_keys_point_as_the_models_own():
    made = studied()
    atom = made.survey.most_frequent(1)[0]
    side = made.survey.sample(atom)["side"].mean()
    plain_key = Decoder.of(part()).key[atom]
    assert torch.allclose(made.decoder.key[atom], plain_key * side.sign())
    assert torch.allclose(
        made.decoder.key[atom][:, None] * made.decoder.value[atom], part().atom(atom).dense(), atol=1e-6
    )


def test_atoms_that_fire_together_are_counted():
    """Against a count by hand, token by token; with one active atom a token, and with several."""
    model, read = hooked(), texts()[:2]
    for sae, near in ((part(), 4), (WriteSAE(dataclasses.replace(part().cfg, k=3)), 0)):
        sae.load_state_dict(part().state_dict())
        windows = cut_windows(model, read)
        found = survey(model, sae, windows)
        by_hand = torch.zeros(40, 40, dtype=torch.long)
        for window in windows:
            codes = model.encode(sae, window.tokens[None])
            active = [set(i[v > 0].tolist()) for i, v in zip(codes.indices[0], codes.values[0], strict=True)]
            for t, some in enumerate(active):
                for apart in range(-near, near + 1):
                    for b in active[t + apart] if 0 <= t + apart < len(active) else ():
                        for a in some - {b}:
                            by_hand[a, b] += 1
        assert torch.equal(by_hand, by_hand.T) and found.near == near
        n = found.seen.firings.float()
        cosine = by_hand / (n[:, None] * n).sqrt().clamp_min(1e-30)
        cosine[by_hand < 3] = 0
        assert (found.together >= 0).sum() > 20
        for a in range(40):
            b = found.together[a][found.together[a] >= 0]
            assert len(b) == min(8, int((cosine[a] > 0).sum()))
            assert torch.equal(found.together_n[a][: len(b)], by_hand[a, b])
            torch.testing.assert_close(cosine[a, b], cosine[a].topk(len(b)).values)


def test_samples_stand_at_quantiles():
    found = studied().survey
    atom = found.most_frequent(1)[0]
    activations = np.sort(found.sample(atom)["activation"].numpy())
    for (share, value, window, position), wanted in zip(found.at_quantiles(atom), QUANTILES, strict=True):
        assert share == wanted and value == pytest.approx(np.quantile(activations, share), rel=0.2)
        codes = hooked().encode(part(), studied().windows[window].tokens[None])
        assert atom in codes.indices[0, position] and value == pytest.approx(
            float(codes.values[0, position, 0]), rel=1e-3
        )
    dead = int((found.seen.firings == 0).nonzero()[0])
    assert found.at_quantiles(dead) == []


@each_model
@torch.no_grad()
def test_readers_are_the_reads_of_a_write(name):
    """With the model's own write in the place of an atom: the head's pattern times what was written. Another head's
    pattern is another."""
    model, sae = hooked(name), part_of(name)
    layer, head = sae.place
    ids = model.to_tokens(texts()[0])[0][0, :40]
    _, cache = model.run_with_cache(ids)
    write, o = cache.write(layer)[0, 5, head], cache["o", layer][0, :, head]
    found = effects.reads_of(model, layer, head, ids, 5, write, f"blocks.{layer}.mixer.hook_o")
    assert torch.equal(found[:5], torch.zeros(5)) and found[5] > 0
    for other in (head, (head + 1) % model.site(layer).n_heads):
        wanted = cache.pattern(layer, other)[0][:, 5].abs() * write.value.norm() / o.norm(dim=-1)
        close = torch.allclose(found[5:], wanted[5:], rtol=0.02, atol=1e-4)
        assert close == (other == head)
    atom = studied().survey.most_frequent(1)[0]
    shown = studied().measured[atom].readers
    assert len(shown) == 3 and all(len(r.tokens) == len(r.shares) and not any(r.shares[: r.place]) for r in shown)


def test_what_all_atoms_promote_is_taken_off():
    made = studied()
    fires = made.survey.seen.firings > 0
    value = made.decoder.value
    atom = made.survey.most_frequent(1)[0]
    effect = direct_effect(made.model, 2, 1, (value[atom] - value[fires].mean(0))[None])[0]
    assert made.distinct[atom].promoted[0][1] == pytest.approx(float(effect.max()), abs=1e-5)
    first = lambda lists: Counter(lists[i].promoted[0][0] for i in fires.nonzero()[:, 0].tolist())  # noqa: E731
    assert max(first(made.distinct).values()) <= max(first(made.direct).values())
    assert made.distinct[atom] != made.direct[atom]


# --- from the weights -------------------------------------------------------------------------------------------------


@each_model
def test_direct_effect_is_the_promotion_of_each_token(name):
    model, sae = hooked(name), part_of(name)
    value, (layer, head) = Decoder.of(sae).value, (sae.cfg.layer, sae.cfg.head)
    effect = direct_effect(model, layer, head, value[:4])
    every = promotion(model, layer, head, torch.arange(model.W_U.shape[1]))  # [vocab, d_value]
    wanted = value[:4] @ every.T
    wanted = wanted - wanted.mean(-1, keepdim=True)
    assert torch.allclose(effect, wanted, atol=1e-5)
    other = promotion(model, layer, (head + 1) % model.site(layer).n_heads, torch.arange(model.W_U.shape[1]))
    assert not torch.allclose(effect, value[:4] @ other.T - (value[:4] @ other.T).mean(-1, keepdim=True), atol=1e-2)


@pytest.mark.parametrize("variant", ["WriteSAE", "Rank2SAE", "FlatSAE"])
def test_pairs_and_nearest_are_those_of_the_dense_atoms(variant):
    sae = WriteSAE(SAEConfig.variant(variant, d_key=6, d_value=5, n_atoms=30, k=2, target="state"))
    atoms = sae.decoder.dense() if isinstance(sae.decoder, ws.Write) else sae.decoder
    atoms = atoms.detach()
    pair = Decoder.of(sae)
    left, size, right = torch.linalg.svd(atoms)
    assert torch.allclose(pair.share, size[:, 0] ** 2 / size.square().sum(-1), atol=2e-2)
    clear = size[:, 0] > 1.3 * size[:, 1]  # elsewhere the leading pair is hardly one
    made = (pair.key[:, :, None] * pair.value[:, None, :])[clear]
    wanted = (left[:, :, :1] * right[:, :1, :])[clear]
    assert clear.sum() > 3 and torch.allclose((made * wanted).sum((1, 2)), torch.ones(len(made)), atol=2e-2)
    indices, values = nearest(sae, 5)
    flat = torch.nn.functional.normalize(atoms.flatten(1), dim=-1)
    cosine = (flat @ flat.T).fill_diagonal_(-torch.inf)
    assert torch.allclose(values, cosine.topk(5).values, atol=1e-5)
    assert torch.allclose(cosine.gather(1, indices), values, atol=1e-5)


# --- from running the model -------------------------------------------------------------------------------------------


@each_model
def test_the_measured_effect_is_the_gradients(name):
    """For the most promoted and the most suppressed token: the product of the atom with that logit's gradient."""
    model, sae = hooked(name), part_of(name)
    windows = cut_windows(model, texts()[:3])
    found = survey(model, sae, windows)
    atoms = found.most_frequent(2)
    effect = effects.logit_effect(model, sae, found, windows, atoms, n_firings=1)
    assert torch.allclose(effect.mean(-1), torch.zeros(2), atol=1e-6)
    for atom, row in zip(atoms, effect, strict=True):
        firing = found.strongest[atom][0]
        place = firing.position % found.context
        window = next(w for w in windows if (w.document, w.start) == (firing.document, firing.position - place))
        ids = window.tokens[None, : place + effects.HORIZON + 1]
        for token in (int(row.argmax()), int(row.argmin())):

            def of(logits, token=token, place=place):
                return (logits[:, place:, token] - logits[:, place:].mean(-1)).mean(-1)

            grad, head = ws.gradient(model, ids, of, [sae.cfg.layer])[sae.cfg.layer], sae.cfg.head
            wanted = firing.activation * float(grad.prices(head, sae.decoder.detach())[0, place, atom])
            assert float(row[token]) == pytest.approx(wanted, rel=0.01)
            next_head = (head + 1) % model.site(sae.cfg.layer).n_heads
            other = firing.activation * float(grad.prices(next_head, sae.decoder.detach())[0, place, atom])
            assert float(row[token]) != pytest.approx(other, rel=0.02), "twin: another head"


@torch.no_grad()
def test_replaced_counts_are_those_of_substituting_by_hand():
    model, sae = hooked(), part()
    made, windows = studied(), cut_windows(hooked(), texts())
    atom = made.survey.most_frequent(1)[0]
    replaced = effects.replace(model, sae, made.survey, windows, atom, max_firings=4)
    assert replaced is not None and 1 <= replaced.n <= 4
    assert 0 <= replaced.wins <= replaced.n
    # The same firings, one after the other.
    halves = torch.stack([w.tokens[i : i + 128] for w in windows for i in (0, 128) if len(w.tokens) >= i + 128])
    tested = ws.population_test(
        model, sae, halves, atoms=[atom], min_firings=1, max_firings=400, context=128, check_model=False
    ).firings
    assert set(tested.atom.tolist()) == {atom}
    scores = []
    for window, place in list(zip(tested.window.tolist(), tested.position.tolist(), strict=True))[:3]:
        ids = halves[window : window + 1, : place + 1]
        plain_logits = model(ids)[:, -1].double().log_softmax(-1)
        for edit in (ws.Substitute(sae), ws.Delete(2, 1)):
            with model.intervene(edit, positions=[place], check_model=False):
                moved = model(ids)[:, -1].double().log_softmax(-1)
            scores.append(float((moved.exp() * (moved - plain_logits)).sum()))
    wanted = [float(tested.kl[c][i, 0]) for i in range(len(scores) // 2) for c in ("atom", "delete")]
    assert scores == pytest.approx(wanted, rel=0.02, abs=1e-8)
    with pytest.raises(ValueError, match="no atom asked for fires 1 times"):
        ws.population_test(model, sae, halves, atoms=[], min_firings=1, context=128)
    with pytest.raises(IndexError, match="atom 40"):
        ws.population_test(model, sae, halves, atoms=[40])


def test_an_atom_that_is_nowhere_testable_is_not_replaced():
    model, sae = hooked(), part()
    windows = cut_windows(model, "The State of the Union")  # shorter than a window of the test
    found = survey(model, sae, windows)
    assert [effects.replace(model, sae, found, windows, atom) for atom in found.most_frequent(2)] == [None, None]


def test_steering_is_what_intervene_does():
    model, sae = hooked(), part()
    prompts = [model.to_tokens(text)[0][0] for text in ("The captain", "The State of the Union is a")]
    atoms = [3, 7]
    found = effects.steer(model, sae, atoms, prompts, scales=(4.0, -4.0), n_tokens=8, temperature=1e-4)
    assert [len(rows) for rows in found] == [4, 4]
    texts_of = {0: "The captain", 1: "The State of the Union is a"}
    for atom, rows in zip(atoms, found, strict=True):
        for i, one in enumerate(rows):
            prompt, scale = texts_of[i // 2], (4.0, -4.0)[i % 2]
            assert (one.prompt, one.scale) == (prompt, scale)
            greedy: dict[str, Any] = dict(max_new_tokens=8, min_new_tokens=8, do_sample=False)
            assert prompt + "".join(one.plain) == model.generate(prompt, **greedy)
            with model.intervene(sae, atom=atom, scale=scale, check_model=False):
                assert prompt + "".join(one.steered) == model.generate(prompt, **greedy)
            assert one.plain[: one.same] == one.steered[: one.same]
            assert one.same == 8 or one.plain[one.same] != one.steered[one.same]
    assert any(one.same < 8 for rows in found for one in rows), "no text changed: the test would not see steering"


# --- runs that are stopped --------------------------------------------------------------------------------------------


def test_a_stopped_run_goes_on(tmp_path):
    model, sae, read = hooked(), part(), [text[:700] for text in texts()[:2]]
    passes: list[int] = []  # how many files of atoms there were before each pass of the model
    stop_at: list[int] = [1]

    def before_a_pass(*_: Any) -> None:
        passes.append(len(list((tmp_path / "atoms").glob("*.json"))))
        if passes[-1] in stop_at:
            raise KeyboardInterrupt

    def times() -> dict[str, int]:
        return {p.relative_to(tmp_path).as_posix(): p.stat().st_mtime_ns for p in tmp_path.rglob("*.*")}

    def again(read: Any = read, prompts: Any = ("The captain",), **settings: Any) -> tuple[Any, list[str]]:
        """The study, and the files that it made or made again."""
        before = times()
        with model.hf_model.register_forward_pre_hook(before_a_pass):
            made = study(model, sae, read, folder=tmp_path, prompts=prompts, at_once=1, **settings)
        return made, sorted(name for name, when in times().items() if when != before.get(name))

    with pytest.raises(KeyboardInterrupt):
        again(atoms=3)
    (first,) = [name for name in times() if name.startswith("atoms/")]
    stop_at.clear()

    went_on, done = again(atoms=3)
    assert len(done) == 2 and first not in done and all(name.startswith("atoms/") for name in done)
    assert len(went_on.measured) == 3
    whole = study(model, sae, read, atoms=3, prompts=["The captain"])
    assert whole.measured.keys() == went_on.measured.keys()
    for atom, measured in whole.measured.items():
        kept = went_on.measured[atom]
        assert kept.replaced == measured.replaced and kept.steered == measured.steered
        assert kept.agreement == pytest.approx(measured.agreement, abs=1e-3)  # other batches round otherwise
    for name, tensor in whole.survey.tensors().items():
        assert torch.equal(tensor, went_on.survey.tensors()[name]), name
    assert index_row(whole, 3) == index_row(went_on, 3)

    passes.clear()
    assert again(atoms=3)[1] == []
    assert again(atoms=0, also=[sorted(whole.measured)[0]])[1] == []
    assert not passes, "what is there is not computed again"
    path = tmp_path / first
    path.write_text(path.read_text()[:-20])
    assert again(atoms=3)[1] == [first], "a damaged file is made again"
    data = bytearray((tmp_path / "survey.safetensors.gz").read_bytes())
    data[-5] ^= 1
    (tmp_path / "survey.safetensors.gz").write_bytes(data)
    both = ["survey.json", "survey.safetensors.gz"]
    assert again(atoms=3)[1] == both
    _, done = again(read=read[:1], atoms=1)
    assert len(done) == 3 and done[1:] == both, "of another text, nothing is taken"
    _, done = again(atoms=1, prompts=["The whale"])
    assert len(done) == 3 and done[1:] == both


def test_what_was_measured_is_kept_as_it_was(tmp_path):
    """Texts of single tokens may hold halves of characters, and a test of replacements may be missing."""
    tokens = steps.Tokens(((" a", 0.25),), (("\ud800", -1e-6),))
    steered = (effects.Steered("The", 3.0, (" a", "\ud800"), (" b",)),)
    for replaced in (effects.Replaced(4, 3, 2, 1, 0.1, 0.2, 0.3, 0.4), None):
        measured = steps.Measured(tokens, 0.5, replaced, steered)
        kept = Kept(tmp_path, {"format": "x"})
        kept.write("one.json", {"measured": dataclasses.asdict(measured)})
        assert steps.Measured.loaded(kept.read("one.json")["measured"]) == measured


def test_what_cannot_be_done_is_said(tmp_path):
    model, sae = hooked(), part()
    with pytest.raises(ValueError, match="no text: give at least one"):
        study(model, sae, [])
    with pytest.raises(IndexError, match="atom 40: this SAE has atoms 0 to 39"):
        write_pages(model, sae, texts()[:1], tmp_path, also=[40])
    with pytest.raises(ValueError, match="does not say its layer and head"):
        study(model, WriteSAE(SAEConfig(d_key=32, d_value=32, n_atoms=3, k=1)), texts()[:1])


def test_the_first_prompts_are_whole_words():
    model = hooked()
    prompts = steps._prompts(model, cut_windows(model, [f"\n\n{t}" for t in texts()[:2]]), None)
    for row in prompts:
        text = model.tokenizer.decode(row)
        assert text == text.lstrip() and 1 < len(row) <= 16
        whole = next(t for t in texts() if t.startswith(text))
        assert whole[len(text)].isspace()


# --- the site ---------------------------------------------------------------------------------------------------------


class Reader(HTMLParser):
    """Elements with attributes, visible text, and the contents of scripts."""

    def __init__(self, html: str):
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.scripts, self.inside = "", [], ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.elements.append((tag, dict(attrs)))
        self.inside = tag

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    def handle_data(self, data: str) -> None:
        if self.inside == "script":
            self.scripts.append(data)
        elif self.inside != "style":
            self.text += data

    def all(self, name: str) -> list[str]:
        return [str(attributes[name]) for _, attributes in self.elements if name in attributes]


def data_of(read: Reader) -> dict[str, Any]:
    """The numbers at the end of an atom's page."""
    return json.loads(next(script for script in read.scripts if script.startswith('{"key"')))


def test_every_atom_has_a_page_and_links_lead_somewhere(site):
    names = sorted(path.name for path in (site / "atom").iterdir())
    assert names == [f"{i:05d}.html" for i in range(40)]
    for path in (*(site / "atom").iterdir(), site / "index.html", site / "help.html"):
        read = Reader(path.read_text())
        tags = {tag for tag, _ in read.elements}
        assert not tags & {"img", "b id", "iframe", "object", "embed", "form", "base", "audio", "video"}
        assert len(read.all("src")) == 1 and not [x for x in read.elements if any(a.startswith("on") for a in x[1])]
        assert "http" not in "".join(read.all("href"))
        for link in (*read.all("href"), *read.all("src")):
            file, _, part = link.partition("#")
            assert (path.parent / file).is_file(), link
            assert not part or f'<section id="{part}">' in (path.parent / file).read_text(), link
        scripts = [attributes for tag, attributes in read.elements if tag == "script"]
        assert all(script.get("type") == "application/json" or "src" in script for script in scripts)
        policy = next(a["content"] for _, a in read.elements if a.get("http-equiv"))
        assert policy is not None and policy.startswith("default-src 'none'") and "http" not in policy


def test_text_stays_text(site):
    """Where every token, name and prompt is markup, the page has the elements that it has otherwise."""
    atom = sorted(studied().measured)[0]
    plain_pages = {"atom": site / "atom" / f"{atom:05d}.html", "index": site / "index.html"}
    for name, page in pages.nasty_pages().items():
        read = Reader(page)
        tags = [tag for tag, _ in read.elements]
        assert "img" not in tags and not [x for x in read.elements if any(key.startswith("on") for key in x[1])]
        assert tags.count("script") == {"index": 3, "help": 1}.get(name, 2) and page.count("</script>") == tags.count(
            "script"
        )
        assert "bold" not in read.all("id") and '<script>alert("a")</script>' in read.text
        if name in plain_pages:
            wanted = {tag for tag, _ in Reader(plain_pages[name].read_text()).elements}
            assert set(tags) <= wanted | {"style", "details", "summary"}  # of help and style, which stand in the page
    rows = json.loads(next(s for s in Reader(pages.nasty_pages()["index"]).scripts if s.startswith("[")))
    assert '<script>alert("a")</script>' in rows[atom]["text"] and rows[atom]["at"].startswith("The <script>")


def test_pages_say_what_was_measured(site):
    made = studied()
    measured, fires = sorted(made.measured), made.survey.seen.firings
    other = next(i for i in range(40) if i not in measured and fires[i])
    dead = int((fires == 0).nonzero()[0])
    pages_of = {i: Reader((site / "atom" / f"{i:05d}.html").read_text()).text for i in (measured[0], other, dead)}
    assert (
        "By running the model" not in pages_of[measured[0]] and "Measured, through the model" in pages_of[measured[0]]
    )
    command = f"in the folder of this site: writesae pages tiny-gdn/L2H1 --out . --atom {other}"
    assert pages_of[other].count("Not measured for this atom") == 1 == pages_of[other].count(command)
    assert "It never fires in" in pages_of[dead] and "never fires in this text" in pages_of[dead]
    for atom, text in pages_of.items():
        assert f"Atom {atom}" in text and f"{int(fires[atom]):,} of {made.survey.n_tokens:,} tokens" in text
    one = made.measured[measured[0]]
    assert one.replaced is not None and f"({one.replaced.wins} of {one.replaced.n})" in pages_of[measured[0]]
    assert number(one.replaced.kl_delete) in pages_of[measured[0]]
    for token, value in one.tokens.promoted:
        assert visible(token) + signed(value) in pages_of[measured[0]]
    assert plain(one.steered[0].prompt) in pages_of[measured[0]]


def test_the_index_knows_every_atom(site):
    made = studied()
    rows = json.loads(next(s for s in Reader((site / "index.html").read_text()).scripts if s.startswith("[")))
    assert [row["atom"] for row in rows] == list(range(40))
    found = made.survey
    for row in rows:
        atom = row["atom"]
        assert row["rate"] == pytest.approx(int(found.seen.firings[atom]) / found.n_tokens)
        assert row["class"] == found.classes.classes[atom]
        assert (row["wins"] is not None) == (atom in made.measured)
        assert bool(row["context"]) == bool(found.seen.firings[atom])
    assert sum(SEARCHED in row["text"] for row in rows) >= 1


def test_pages_are_small(site):
    """What grows with the number of atoms: 2,048 of them take about 30 MB, with the data they are made of."""
    pages_of = sum(path.stat().st_size for path in (site / "atom").iterdir()) / 40
    index, empty = (site / "index.html").stat().st_size, len(index_page(studied(), command="").split('id="data"')[0])
    kept = (site / "data" / "survey.safetensors.gz").stat().st_size
    assert 2048 * (pages_of + (index - empty + kept) / 40) < 31e6


def test_a_smaller_sae_leaves_nothing_of_a_larger_one(tmp_path):
    for n_atoms in (7, 5):
        write_pages(hooked(), part(n_atoms=n_atoms), texts()[:1], tmp_path, atoms=0, neuronpedia=True)
    assert sorted(path.name for path in (tmp_path / "atom").iterdir()) == [f"{i:05d}.html" for i in range(5)]
    rows = json.loads(next(s for s in Reader((tmp_path / "index.html").read_text()).scripts if s.startswith("[")))
    assert len(rows) == 5


def test_how_tokens_and_numbers_are_shown():
    assert [visible(x) for x in (" the", "a ", "\n\n", "\t", "", " ", "x\0", "\r\n")] == [
        "·the", "a·", "↵↵", "⇥", "∅", "·", "x␀", "↵"
    ]  # fmt: skip
    assert plain("a\nb") == "a↵b"
    assert [number(x) for x in (0.26, 1234.5, 12.345, 0.0031249, 123.4, float("nan"))] == [
        "0.260", "1,234", "12.3", "0.00312", "123", "–"
    ]  # fmt: skip
    assert [signed(x) for x in (0.15, -0.2)] == ["+0.150", "−0.200"]
    assert [percent(x) for x in (0.123, 0.0053, 1.0, 0.0)] == ["12%", "0.53%", "100%", "0%"]


def test_templates_are_shipped_with_nothing_from_elsewhere():
    for path in TEMPLATES.iterdir():
        assert "http" not in path.read_text().replace("http-equiv", ""), path.name


@pytest.mark.parametrize(
    ("variant", "settings"),
    [
        ("FlatSAE", dict(target="state", k=4)),
        ("Rank2SAE", dict(target="delta", k=2)),
        ("MatrixSAE", dict(target="state", sparsity="jumprelu", k=3, decoder_bias=True)),
        ("MatrixSAE", dict(target="write", sparsity="jumprelu", k=1)),
    ],
    ids=["flat", "rank 2", "jumprelu", "none fires"],
)
def test_every_kind_of_sae_has_pages(variant, settings):
    """Of a model without a tokenizer, whose tokens are numbers."""
    model = ws.HookedRecurrentModel(hooked().hf_model, model_id="tiny-gdn")
    sae = WriteSAE(SAEConfig.variant(variant, d_key=32, d_value=32, n_atoms=12, layer=2, head=0, **settings))
    if settings["target"] == "state" and settings.get("sparsity") == "jumprelu":
        torch.nn.init.constant_(sae.log_threshold, -5.0)
    made = study(model, sae, hooked().to_tokens(texts()[0])[0][:, :200], atoms=2, name="random")
    alive = int((made.survey.seen.firings > 0).sum())
    assert len(made.measured) == min(2, alive) and (alive == 0) == (settings["target"] == "write")
    assert made.survey.classes.threshold == (0.05 if alive < MIN_VALUES else None)
    for atom in range(12):
        read = Reader(atom_page(made, atom, command="writesae pages random"))
        assert ("its squared norm" in read.text) == (float(made.decoder.share[atom]) < 0.995)
        fired = int(made.survey.seen.firings[atom])
        assert f"{fired} of 200 tokens" in read.text
        if fired:
            context = made.survey.strongest[atom][0]
            assert context.token.isdigit() and context.token in data_of(read)["contexts"][0][4].split(BETWEEN)
    assert len(json.loads(next(s for s in Reader(index_page(made, command="")).scripts if s.startswith("[")))) == 12


# --- one page in a notebook -------------------------------------------------------------------------------------------


def test_show_is_the_page_of_the_site(site):
    sae, atom = part(), sorted(studied().measured)[0]
    showing._last.clear()
    model, read = hooked(), texts()
    shown = sae.show(atom, model=model, texts=read)
    pass_over_the_texts = showing._last["study"].survey
    kept = sae.show(atom, pages=site)
    sections = ["contexts", "samples", "histogram", "positions", "tokens", "readers"]
    sections += ["replacement", "steering", "factors", "nearest", "together"]
    assert [i for i in Reader(shown.html).all("id") if i in sections] == sections
    first = [Reader(page.html).text.split("Measured, through")[0].split() for page in (shown, kept)]
    assert first[0] == first[1] and len(first[0]) > 200  # what follows was measured in other batches, which round
    frame = shown._repr_html_()
    ((tag, attributes),) = Reader(frame).elements
    assert (
        tag == "iframe"
        and attributes["srcdoc"] == shown.html
        and attributes["title"] == f"Atom {atom} of tiny-gdn/L2H1"
    )
    assert '<html lang="en" class="alone">' in shown.html and '<html lang="en" class="alone">' in kept.html
    sae.show(atom + 1, model=model, texts=read)
    assert showing._last["study"].survey is pass_over_the_texts, "it serves all atoms of an SAE"
    sae.show(atom, model=model, texts=["The State of the Union is strong."])
    assert showing._last["study"].survey is not pass_over_the_texts
    assert repr(shown) == f"Page(title='Atom {atom} of tiny-gdn/L2H1', height=900)"


def test_show_takes_the_shipped_model_and_texts(tmp_path):
    shown = part().show(5)
    assert f"Shipped held-out documents: {len(heldout_documents()):,} texts" in shown.html
    saved = shown.save(tmp_path / "page.html")
    assert saved.read_text() == shown.html


def test_show_says_what_it_needs(tmp_path):
    sae = part()
    with pytest.raises(IndexError, match="atom 40: this SAE has atoms 0 to 39"):
        sae.show(40)
    with pytest.raises(FileNotFoundError, match=r"00005.html does not exist: pages= is a folder that `writesae pages`"):
        sae.show(5, pages=tmp_path)
    with pytest.raises(ValueError, match="give pages=, a folder made before, or model= and texts="):
        sae.show(5, pages=tmp_path, model=hooked())
    other = WriteSAE(dataclasses.replace(sae.cfg, model_id="owner/large", fingerprint=None))
    with pytest.raises(ValueError, match="of owner/large, which is not shipped: give texts="):
        other.show(5)
    nameless = WriteSAE(dataclasses.replace(sae.cfg, model_id=None, fingerprint=None))
    with pytest.raises(ValueError, match="does not say which model it is of: give model="):
        nameless.show(5, texts=["a text"])


# --- Neuronpedia ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dashboard(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The module of sae-dashboard that defines the format; the package's own dependencies do not go with ours."""
    folder = tmp_path_factory.mktemp("dashboard")
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--target",
        str(folder),
        "sae-dashboard==0.8.0",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"sae-dashboard 0.8.0, which defines the format, could not be fetched: {done.stderr}"
    path = folder / "sae_dashboard" / "neuronpedia" / "neuronpedia_dashboard.py"
    spec = importlib.util.spec_from_file_location("neuronpedia_dashboard", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    shutil.rmtree(folder)
    return module


def test_neuronpedias_own_classes_read_the_export(site, dashboard):
    made = studied()
    found = made.survey
    read = json.loads((site / "neuronpedia" / "batch-0.json").read_text())
    batch = dashboard.NeuronpediaDashboardBatch(**read)
    assert batch.to_dict() == read, "a field is missing or has another name"
    assert (batch.model_id, batch.layer, batch.sae_set) == ("tiny-gdn", 2, "writesae-write-h1")
    alive = (found.seen.firings > 0).nonzero()[:, 0].tolist()
    assert [feature.feature_index for feature in batch.features] == alive
    skipped = json.loads((site / "neuronpedia" / "skipped_indexes.json").read_text())
    assert sorted([*skipped["skipped_indexes"], *alive]) == list(range(40))
    for feature in batch.features:
        atom = feature.feature_index
        assert feature.frac_nonzero == pytest.approx(int(found.seen.firings[atom]) / found.n_tokens)
        assert sum(feature.freq_hist_data_bar_heights) == min(500, int(found.seen.firings[atom]))
        assert sum(feature.logits_hist_data_bar_heights) == hooked().W_U.shape[1]
        assert feature.pos_values == sorted(feature.pos_values, reverse=True) and len(feature.pos_str) == 10
        assert feature.neg_values == sorted(feature.neg_values)
        for activation, context in zip(feature.activations, found.strongest[atom], strict=True):
            assert len(activation.tokens) == len(activation.values)
            at = activation.qualifying_token_index
            assert activation.tokens[at] == context.token
            assert activation.values[at] == pytest.approx(context.activation, abs=1e-4)
            assert all(type(value) is float for value in activation.values)
    with pytest.raises(TypeError):  # twin: a field that the format does not have
        dashboard.NeuronpediaDashboardFeature(**read["features"][0] | {"atom": 1})


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command(tmp_path):
    runner = CliRunner(env={"COLUMNS": "200", "TERM": "dumb"})
    folder = part().save_pretrained(tmp_path / "sae")
    text = tmp_path / "text.txt"
    text.write_text(texts()[0])
    out = tmp_path / "site"
    asked = ["pages", str(folder), "--text", str(text), "--out", str(out), "--atoms", "1", "--prompt", "The whale"]
    result = runner.invoke(app, [*asked, "--atom", "7", "--neuronpedia"])
    assert result.exit_code == 0, result.output
    assert f"Open {out / 'index.html'} in a browser." in result.output and "For Neuronpedia" in result.output
    measured = {int(path.stem) for path in (out / "data" / "atoms").iterdir()}
    rows = json.loads(next(s for s in Reader((out / "index.html").read_text()).scripts if s.startswith("[")))
    first = max(rows, key=lambda row: (row["rate"], -row["atom"]))["atom"]
    assert measured == {first} | ({7} if rows[7]["rate"] else set())
    assert "The whale" in (out / "atom" / f"{min(measured):05d}.html").read_text()
    for wrong, said in (
        (["pages", "no-such-sae"], "no-such-sae"),
        ([*asked, "--atom", "40"], "atom 40: this SAE has atoms 0 to 39"),
        (["pages", str(folder), "--text", str(tmp_path / "none.txt")], "none.txt does not exist"),
    ):
        result = runner.invoke(app, wrong)
        assert result.exit_code == 1 and said in result.output and "Traceback" not in result.output
