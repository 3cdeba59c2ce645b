"""What is shipped: a real model of the real class, within its size, with SAEs that belong to it."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3_5ForCausalLM

import writesae as ws
from writesae.zoo import ZOO, corpus, heldout_documents, shipped_model, shipped_models, shipped_saes
from writesae.zoo.evaluate import bits_per_byte, xz_bits_per_byte


def test_tiny_gdn_is_a_qwen3_5_within_five_megabytes():
    folder = shipped_model("tiny-gdn")
    assert folder is not None and "tiny-gdn" in shipped_models() and shipped_model("nothing") is None
    assert isinstance(AutoModelForCausalLM.from_pretrained(folder), Qwen3_5ForCausalLM)
    assert sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) <= 5_000_000


@torch.no_grad()
def test_tiny_gdn_compresses_held_out_text_better_than_xz():
    model = ws.HookedRecurrentModel.from_pretrained("tiny-gdn")
    texts = [d[:3000] for d in heldout_documents()[:6]]
    assert bits_per_byte(model.hf_model, model.tokenizer, texts) < 0.8 * xz_bits_per_byte(texts)
    record = json.loads((ZOO / "tiny-gdn" / "training.json").read_text())
    assert record["held_out_bits_per_byte"] < record["xz_bits_per_byte"]


def test_held_out_documents_were_held_out():
    record = json.loads((ZOO / "tiny-gdn" / "training.json").read_text())
    held_out = record["settings"]["held_out"]
    assert len(heldout_documents()) == len(held_out) == len(set(held_out))
    docs = [corpus.Document(f"{n:03}", "text") for n in range(100)]
    train, out = corpus.split(docs)
    assert not {d.name for d in train} & {d.name for d in out} and len(train) + len(out) == 100


def test_shipped_saes_fit_and_sit_at_different_layers():
    model = ws.HookedRecurrentModel.from_pretrained("tiny-gdn")
    saes = [ws.WriteSAE.from_pretrained(folder) for folder in shipped_saes("tiny-gdn")]
    assert len({sae.cfg.layer for sae in saes}) >= 2
    for sae in saes:
        sae.check_fits(model)
        assert sae.cfg.model_id == "tiny-gdn"
        assert sae.cfg.training["held_out"]["cosine"] > 0.5


def test_a_shipped_sae_loads_by_name():
    folder = shipped_saes("tiny-gdn")[0]
    sae = ws.WriteSAE.from_pretrained(f"tiny-gdn/{folder.name}")
    assert sae.cfg == ws.WriteSAE.from_pretrained(folder).cfg
    with pytest.raises(FileNotFoundError):
        ws.WriteSAE.from_pretrained("tiny-gdn/L9H9")
