"""Whether texts begin with BOS, and have special tokens: said once, to the model, and kept by all that reads texts."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from typer.testing import CliRunner

import writesae as ws
from writesae.cli import app
from writesae.saes import top_contexts
from writesae.stores import texts
from writesae.stores.shards import StoreInfo

TEXT = "The state of the Union is strong, and the people of the United States are free."
BOS, EOS = "<|endoftext|>", "."
MODELS = ("tiny-gdn", "tiny-mamba2", "tiny-rwkv7")


def a_model(name: str = "tiny-gdn", *, adds: bool = True, **reading: Any) -> ws.HookedRecurrentModel:
    """A shipped model whose tokenizer adds BOS and EOS, as many do, or has them and adds nothing."""
    model = ws.HookedRecurrentModel.from_pretrained(name, **reading)
    tokenizer = copy.deepcopy(model.tokenizer)
    tokenizer.bos_token = BOS
    if adds:
        ids = [(token, tokenizer.convert_tokens_to_ids(token)) for token in (BOS, EOS)]
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{BOS} $A {EOS}", special_tokens=ids)
    model.tokenizer = tokenizer
    return model


def ids_of(model: ws.HookedRecurrentModel, text: str = TEXT, **how: Any) -> list[int]:
    return model.to_tokens(text, **how)[0][0].tolist()


@pytest.fixture(scope="module")
def plain() -> list[int]:
    return ids_of(ws.HookedRecurrentModel.from_pretrained("tiny-gdn"))


def test_the_tokenizer_s_own_way_is_the_default(plain: list[int]) -> None:
    model = a_model()
    bos, eos = model.tokenizer.bos_token_id, model.tokenizer.convert_tokens_to_ids(EOS)
    assert ids_of(model) == [bos, *plain, eos] == model.tokenizer(TEXT)["input_ids"]
    assert ids_of(a_model(adds=False)) == plain
    assert model.reading == {}


@pytest.mark.parametrize("name", MODELS)
def test_every_way(name: str) -> None:
    plain = ids_of(ws.HookedRecurrentModel.from_pretrained(name))
    adding, not_adding = a_model(name), a_model(name, adds=False)
    bos, eos = adding.tokenizer.bos_token_id, adding.tokenizer.convert_tokens_to_ids(EOS)
    assert ids_of(adding, prepend_bos=True) == [bos, *plain, eos]
    assert ids_of(adding, prepend_bos=False) == [*plain, eos]
    assert ids_of(adding, special_tokens=False) == plain
    assert ids_of(adding, special_tokens=False, prepend_bos=True) == [bos, *plain]
    assert ids_of(not_adding, prepend_bos=True) == [bos, *plain]
    assert ids_of(not_adding, prepend_bos=False) == plain
    ids, mask = not_adding.to_tokens([TEXT, "The state"], prepend_bos=True)
    assert mask is not None and ids[1][mask[1].bool()][0] == bos


@pytest.mark.parametrize("adds", [True, False])
@pytest.mark.parametrize("prepend_bos", [None, True, False])
def test_a_text_with_a_bos_of_its_own_gets_no_second_one(adds: bool, prepend_bos: bool | None) -> None:
    model = a_model(adds=adds)
    found = ids_of(model, BOS + TEXT, prepend_bos=prepend_bos)
    assert found.count(model.tokenizer.bos_token_id) == 1 and found[0] == model.tokenizer.bos_token_id
    if adds:  # the twin: the tokenizer itself makes two
        assert model.tokenizer(BOS + TEXT)["input_ids"].count(model.tokenizer.bos_token_id) == 2
    twice = ids_of(model, BOS + BOS + TEXT, prepend_bos=prepend_bos)
    assert twice.count(model.tokenizer.bos_token_id) == 2  # what the text has is the text's


def test_what_cannot_be() -> None:
    model = a_model(adds=False)
    model.tokenizer.bos_token = None
    with pytest.raises(ValueError, match="prepend_bos=True: the tokenizer has no BOS token"):
        model.to_tokens(TEXT, prepend_bos=True)


def test_said_to_the_model_it_is_so_everywhere(tmp_path: Path) -> None:
    """Texts of stores, SAEs' training and contexts: the same ids, and a record of it where something is kept."""
    (tmp_path / "text.txt").write_text(TEXT * 12)
    found = {}
    for how in ({}, {"prepend_bos": False}, {"special_tokens": False}, {"prepend_bos": True, "special_tokens": False}):
        model = a_model(**how)
        again = ws.HookedRecurrentModel(model)
        assert model.reading == again.reading == how
        ids = texts.from_files(model, tmp_path / "text.txt", 16)
        assert ids.flatten().tolist() == ids_of(model, TEXT * 12)[: ids.numel()]
        folder = tmp_path / str(len(found))
        store = ws.extract(model, ids, [(0, 0)], folder, progress=False)
        assert store.info.reading == how
        assert json.loads((folder / "store.json").read_text()).get("reading", {}) == how
        sae = ws.train_store(store, n_atoms=8, steps=2, progress=False)[0, 0]
        own = ws.train_site(model, TEXT * 12, 0, 0, context=16, n_atoms=8, steps=2, progress=False)
        for one in (sae, own):
            assert {name: one.cfg.training[name] for name in how} == how
            assert not ({"prepend_bos", "special_tokens"} - how.keys()) & one.cfg.training.keys()
        seen = top_contexts(model, sae, TEXT, context=512, progress=False)
        assert seen.n_tokens == len(ids_of(model))
        found[str(how)] = ids
    begins = [int(ids[0, 0]) == a_model().tokenizer.bos_token_id for ids in found.values()]
    assert begins == [True, False, False, True]


def test_a_store_is_not_continued_with_other_tokens(tmp_path: Path) -> None:
    ids = torch.randint(4096, (2, 8), generator=torch.Generator().manual_seed(0))
    ws.extract(a_model(), ids, [(0, 0)], tmp_path, progress=False)
    with pytest.raises(ValueError, match="was begun otherwise: reading"):
        ws.extract(a_model(prepend_bos=False), ids, [(0, 0)], tmp_path, progress=False)


def test_headers_without_it_are_those_of_before() -> None:
    """Shards carry a hash of the header: it must be the one that older versions made."""
    model = ws.HookedRecurrentModel.from_pretrained("tiny-gdn")
    store = ws.record(model, torch.randint(4096, (1, 8)), [(0, 0)], progress=False)
    header = store.info.to_dict()
    assert "reading" not in header and StoreInfo.from_json(dict(header)) == store.info
    assert StoreInfo.from_json(dict(header)).identity == store.info.identity
    other = StoreInfo.from_json({**header, "reading": {"prepend_bos": True}})
    assert other.identity != store.info.identity


def test_on_the_command_line(tmp_path: Path) -> None:
    def run(*arguments: Any) -> Any:
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    (tmp_path / "text.txt").write_text(TEXT * 40)
    made = run("extract", "tiny-gdn", tmp_path / "store", "--site", "0.0", "--text", tmp_path / "text.txt",
               "--context", 32, "--prepend-bos")  # fmt: skip
    assert made.exit_code == 0, made.output
    store = ws.ActivationStore.open(tmp_path / "store")
    assert store.info.reading == {"prepend_bos": True}
    made = run("train", tmp_path / "store", tmp_path / "saes", "--atoms", 8, "--steps", 2)
    assert made.exit_code == 0, made.output
    sae = ws.WriteSAE.from_pretrained(tmp_path / "saes" / "L0H0")
    assert sae.cfg.training["prepend_bos"] is True
    n_tokens = len(ids_of(ws.HookedRecurrentModel.from_pretrained("tiny-gdn"), TEXT * 40))
    for option, n in (((), n_tokens + 1), (("--no-prepend-bos",), n_tokens)):  # as the training had it, or as said
        made = run("contexts", tmp_path / "saes" / "L0H0", "--text", tmp_path / "text.txt", *option)
        assert made.exit_code == 0 and f"{n:,} tokens" in made.output.replace("\n", " "), made.output
    refused = run("train", tmp_path / "store", tmp_path / "more", "--no-special-tokens")
    assert refused.exit_code == 1 and "is a store of tokens" in " ".join(refused.output.split())
