"""What is shipped: a real model of the real class, within its size, with SAEs that belong to it."""

import json

import pytest
import torch
from transformers import Mamba2ForCausalLM, PreTrainedTokenizerBase, Qwen3_5ForCausalLM

import writesae as ws
from writesae.models.load import load_model
from writesae.models.rwkv7 import RWKV7ForCausalLM
from writesae.zoo import ZOO, corpus, heldout_documents, shipped_model, shipped_models, shipped_saes
from writesae.zoo.evaluate import bits_per_byte, xz_bits_per_byte
from writesae.zoo.recall import Question, Recall, recalled

CLASSES = {"tiny-gdn": Qwen3_5ForCausalLM, "tiny-mamba2": Mamba2ForCausalLM, "tiny-rwkv7": RWKV7ForCausalLM}
each_model = pytest.mark.parametrize("name", shipped_models())


def test_what_is_shipped():
    assert set(shipped_models()) == set(CLASSES) and shipped_model("nothing") is None


@each_model
def test_a_shipped_model_is_of_the_real_class_within_eight_megabytes(name):
    folder = shipped_model(name)
    assert folder is not None
    assert type(load_model(folder)) is CLASSES[name]
    assert sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) <= 8_000_000


@each_model
@torch.no_grad()
def test_a_shipped_model_compresses_held_out_text_better_than_xz(name):
    model = ws.HookedRecurrentModel.from_pretrained(name)
    texts = [d[:3000] for d in heldout_documents()[:6]]
    assert bits_per_byte(model.hf_model, model.tokenizer, texts) < 0.8 * xz_bits_per_byte(texts)
    record = json.loads((ZOO / name / "training.json").read_text())
    assert record["held_out_bits_per_byte"] < record["xz_bits_per_byte"]


RECALLS = {"tiny-gdn": 0.8, "tiny-mamba2": 0.9, "tiny-rwkv7": 0.95}  # of held-out values, at least


def told(tokenizer: PreTrainedTokenizerBase, question: Question) -> list[int]:
    """Positions of the sentence that tells the fact, the full stop behind the value included."""
    assert question.prompt.count(question.answer[0]) == 1, "prose says it too"
    value = question.prompt.index(question.answer[0])
    begins = max(t for t in range(value) if tokenizer.decode(question.prompt[t]) == " The")
    return list(range(begins, value + 2))


@each_model
@torch.no_grad()
def test_a_shipped_model_recalls_what_it_was_told_once(name):
    """Values that no training told, 64 tokens later; and not, if nothing is written where they are told."""
    model = ws.HookedRecurrentModel.from_pretrained(name)
    questions = Recall(model.tokenizer, heldout_documents()).questions(60, gap=64)
    assert sum(recalled(model.hf_model, questions)) > RECALLS[name] * len(questions)
    nothing, forgetful = [ws.Delete(site.layer) for site in model.sites], []
    for question in questions:
        with model.intervene(nothing, positions=told(model.tokenizer, question)):
            forgetful += recalled(model.hf_model, [question])
    assert sum(forgetful) < 0.2 * len(questions)


def test_all_were_trained_with_the_same_text_held_out():
    records = [json.loads((ZOO / name / "training.json").read_text()) for name in shipped_models()]
    for key in ("held_out", "text", "train_documents", "train_tokens"):
        assert all(record["settings"][key] == records[0]["settings"][key] for record in records)
    assert len({record["held_out_bytes"] for record in records}) == 1


def test_held_out_documents_were_held_out():
    record = json.loads((ZOO / "tiny-gdn" / "training.json").read_text())
    held_out = record["settings"]["held_out"]
    assert len(heldout_documents()) == len(held_out) == len(set(held_out))
    docs = [corpus.Document(f"{n:03}", "text") for n in range(100)]
    train, out = corpus.split(docs)
    assert not {d.name for d in train} & {d.name for d in out} and len(train) + len(out) == 100


@each_model
def test_shipped_saes_fit_and_read_writes(name):
    model = ws.HookedRecurrentModel.from_pretrained(name)
    saes = [ws.WriteSAE.from_pretrained(folder) for folder in shipped_saes(name)]
    assert len({(sae.cfg.layer, sae.cfg.head) for sae in saes}) >= 2
    for sae in saes:
        sae.check_fits(model)
        assert sae.cfg.model_id == name
        assert sae.cfg.training["held_out"]["cosine"] > 0.5


@each_model
def test_one_atom_stands_in_for_a_write(name):
    """The replacement test, small: well above chance at every head shipped, summed over the tokens that follow."""
    model = ws.HookedRecurrentModel.from_pretrained(name)
    for folder in shipped_saes(name):
        sae = ws.WriteSAE.from_pretrained(folder)
        result = ws.replacement_test(model, sae, heldout_documents(), n_firings=60)
        assert result.wins("atom", "delete", "through").low > 0.6


def test_a_shipped_sae_loads_by_name():
    folder = shipped_saes("tiny-gdn")[0]
    sae = ws.WriteSAE.from_pretrained(f"tiny-gdn/{folder.name}")
    assert sae.cfg == ws.WriteSAE.from_pretrained(folder).cfg
    with pytest.raises(FileNotFoundError):
        ws.WriteSAE.from_pretrained("tiny-gdn/L9H9")
