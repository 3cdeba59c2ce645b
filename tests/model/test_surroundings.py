"""What runs a model for its users: worker processes, pipelines, trainers. Edits act in these, and leave no trace."""

from __future__ import annotations

import multiprocessing
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments, pipeline

import writesae as ws

TEXT = "The state of the Union"
V = "blocks.1.mixer.hook_v"


@pytest.fixture(scope="module", params=["tiny-gdn", "tiny-mamba2", "tiny-rwkv7"])
def model(request: pytest.FixtureRequest) -> ws.HookedRecurrentModel:
    return ws.HookedRecurrentModel.from_pretrained(request.param)


# Processes ------------------------------------------------------------------------------------------------------------


def in_a_child(model: ws.HookedRecurrentModel, ids: Tensor, edited: bool, answers: Any) -> None:
    torch.set_num_threads(1)
    with torch.no_grad():
        if edited:
            with model.intervene(ws.Delete(1), positions=[3]):
                logits, cache = model.run_with_cache(ids, V)
        else:
            logits, cache = model.run_with_cache(ids, V)
    answers.put((logits.numpy(), cache[V].numpy()))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="processes are forked on Linux alone")
@torch.no_grad()
def test_forked_processes(model: ws.HookedRecurrentModel) -> None:
    """A child has what was attached when it began, and what it attaches itself; the parent has none of the latter."""
    ids = torch.randint(100, 500, (1, 12))
    context = multiprocessing.get_context("fork")

    def child(edited: bool) -> list[Tensor]:
        answers = context.Queue()
        process = context.Process(target=in_a_child, args=(model, ids, edited, answers))
        process.start()
        found = [torch.from_numpy(x) for x in answers.get(timeout=60)]
        process.join()
        return found

    plain, cache = model.run_with_cache(ids, V)
    with model.intervene(ws.Delete(1), positions=[3]):
        edited, _ = model.run_with_cache(ids, V)
        assert torch.equal(child(edited=False)[0], edited)
    found = child(edited=True)
    assert torch.equal(found[0], edited) and torch.equal(found[1], cache[V])
    assert torch.equal(model(ids), plain) and torch.equal(child(edited=False)[0], plain)
    assert not torch.equal(plain, edited)


# Pipelines ------------------------------------------------------------------------------------------------------------


def test_a_pipeline(model: ws.HookedRecurrentModel) -> None:
    """transformers' own, around the model that is wrapped: edits act, also on texts in a batch."""
    generate = pipeline("text-generation", model=model.hf_model, tokenizer=model.tokenizer, device="cpu")
    settings = dict(max_new_tokens=6, do_sample=False)
    plain = generate(TEXT, **settings)[0]["generated_text"]
    assert plain == model.generate(TEXT, **settings)
    with model.intervene(ws.Delete(1)):
        expected = model.generate(TEXT, **settings)
        assert generate(TEXT, **settings)[0]["generated_text"] == expected != plain
    assert generate(TEXT, **settings)[0]["generated_text"] == plain


# Trainers -------------------------------------------------------------------------------------------------------------


def losses(model: ws.HookedRecurrentModel, folder: Path, checkpointing: bool) -> list[float]:
    """Of a few steps of transformers' trainer."""
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(100, 500, (4, 16))]
    before = {name: value.clone() for name, value in model.hf_model.state_dict().items()}
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=2, per_device_train_batch_size=2, report_to=[], save_strategy="no",
        logging_steps=1, use_cpu=True, disable_tqdm=True, learning_rate=1e-3, seed=0,
        activation_checkpointing=checkpointing,
    )  # fmt: skip
    trainer = Trainer(model=model.hf_model, args=arguments, train_dataset=rows)  # type: ignore[arg-type]
    trainer.train()
    model.hf_model.load_state_dict(before)
    model.hf_model.eval()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_a_trainer(model: ws.HookedRecurrentModel, tmp_path: Path) -> None:
    """It trains through an edit, with and without layers that run again; hooks see every step."""
    torch.manual_seed(0)
    plain = losses(model, tmp_path, checkpointing=False)
    seen: list[tuple[int, ...]] = []
    with model.intervene(ws.Delete(1), positions=[3]), model.hooks([(V, lambda v, hook: seen.append(v.shape[:2]))]):
        torch.manual_seed(0)
        edited = losses(model, tmp_path, checkpointing=False)
        assert seen == [(2, 16)] * 2
        torch.manual_seed(0)
        again = losses(model, tmp_path, checkpointing=True)
    assert edited != plain
    assert again == pytest.approx(edited, rel=1e-5)
