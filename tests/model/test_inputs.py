"""What a user may give a model, in every form that people have it in; and what is refused rather than ignored."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import writesae as ws
from architectures import N_VOCAB, Architecture, each_architecture
from writesae.models.arguments import check_not_packed

TEXT = "The state of the Union"


def random_ids(*size: int) -> Tensor:
    return torch.randint(N_VOCAB, size)


SHIPPED = ("tiny-gdn", "tiny-mamba2", "tiny-rwkv7")


@pytest.fixture(scope="module", params=SHIPPED)
def model(request: pytest.FixtureRequest) -> ws.HookedRecurrentModel:
    return ws.HookedRecurrentModel.from_pretrained(request.param)


FORMS = {
    "what the tokenizer returns": lambda model: model.tokenizer(TEXT, return_tensors="pt"),
    "without tensors": lambda model: model.tokenizer(TEXT),
    "a dict": lambda model: dict(model.tokenizer(TEXT, return_tensors="pt")),
    "a numpy array": lambda model: model.tokenizer(TEXT, return_tensors="np")["input_ids"],
    "rows of numbers": lambda model: [model.tokenizer(TEXT)["input_ids"]],
}


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_every_form_is_the_same_input(model: ws.HookedRecurrentModel, form: str) -> None:
    x, expected = FORMS[form](model), model(TEXT)
    assert torch.equal(model(x), expected)
    assert torch.equal(model.run_with_cache(x)[0], expected)
    made = model.generate(x, max_new_tokens=4, do_sample=False)
    assert isinstance(made, Tensor)
    assert model.to_string(made[0]) == model.generate(TEXT, max_new_tokens=4, do_sample=False)
    assert not torch.equal(model("The states of the Union")[:, -1], expected[:, -1])  # the twin: other input


@torch.no_grad()
def test_a_padded_batch_of_a_tokenizer(model: ws.HookedRecurrentModel) -> None:
    texts = ["The state", "The state of the Union is strong"]
    x = model.tokenizer(texts, padding=True, return_tensors="pt", padding_side="left")
    assert not bool(x["attention_mask"].all())
    found, expected = model(x), model(texts)
    real = x["attention_mask"].bool()
    torch.testing.assert_close(found[real], expected[real])
    unmasked = model(x["input_ids"])  # the twin
    assert (unmasked[0, -1] - expected[0, -1]).abs().max() > 1e-3


@each_architecture
@torch.no_grad()
def test_embeddings_in_place_of_ids(architecture: Architecture) -> None:
    model, ids = ws.HookedRecurrentModel(architecture.build()), random_ids(2, 9)
    embeds = model.hf_model.get_input_embeddings()(ids)
    expected, cache = model.run_with_cache(ids)
    found, other = model.run_with_cache(inputs_embeds=embeds)
    torch.testing.assert_close(found, expected)
    layer = model.sites[0].layer
    torch.testing.assert_close(other["k", layer], cache["k", layer])
    with pytest.raises(ValueError, match="in place of them"):
        model(ids, inputs_embeds=embeds)
    with pytest.raises(ValueError, match="needs the token ids that come next"):
        model(inputs_embeds=embeds, return_type="loss")


@each_architecture
def test_an_argument_that_would_be_ignored(architecture: Architecture) -> None:
    model, ids = ws.HookedRecurrentModel(architecture.build()), random_ids(1, 6)
    with pytest.raises(TypeError, match="has no argument 'atention_mask'; nearest: attention_mask"):
        model(ids, atention_mask=torch.ones_like(ids))
    with pytest.raises(TypeError, match="has no argument 'prepend_bos'; it has input_ids"):
        model.run_with_cache(ids, prepend_bos=True)
    for packed in ({"seq_idx": torch.zeros_like(ids)}, {"cu_seq_lens_q": torch.tensor([0, 3, 6])}):
        with pytest.raises(ValueError, match="packs several texts into one row"):
            model(ids, **packed)
    again = torch.tensor([[0, 1, 2, 0, 1, 2]])
    with pytest.raises((ValueError, TypeError), match=r"begin again in row 0 at token 3|no argument 'position_ids'"):
        model(ids, position_ids=again)


def test_positions_that_begin_again_after_padding_are_no_packing() -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1]])
    positions = torch.tensor([[1, 1, 0, 1, 2]])  # as transformers makes them
    check_not_packed(positions, mask)
    with pytest.raises(ValueError, match="begin again in row 0 at token 1"):
        check_not_packed(positions)


@pytest.mark.parametrize(
    "x",
    [{"a": 1}, [], "", ["a", 1], None, 3.5, object(), [True, False], {"input_ids": [[1, 2], [1]]}, b"text"],
    ids=lambda x: type(x).__name__,  # the same in every process
)
def test_what_is_no_input(model: ws.HookedRecurrentModel, x: Any) -> None:
    for run in (model, model.generate, model.run_with_cache):
        with pytest.raises(
            ValueError, match=r"give (a non-empty )?text|a mapping needs input_ids|rows of 1 to 2 token ids"
        ):
            run(x)


def test_given_twice(model: ws.HookedRecurrentModel) -> None:
    x = model.tokenizer(TEXT, return_tensors="pt")
    with pytest.raises(TypeError, match="attention_mask is given twice"):
        model(x, attention_mask=x["attention_mask"])


def test_torch_dtype_is_not_swallowed() -> None:
    with pytest.raises(TypeError, match="dtype"):
        ws.HookedRecurrentModel.from_pretrained("tiny-gdn", torch_dtype=torch.bfloat16)


# Generation ----------------------------------------------------------------------------------------------------------


def test_texts_that_end_early_are_not_filled_up(model: ws.HookedRecurrentModel) -> None:
    prompts = ["The captain of the ship", "The captain"]
    given: dict[str, Any] = dict(max_new_tokens=25, do_sample=False)
    plain = [model.generate(prompt, **given) for prompt in prompts]
    end = model.to_single_token(",")
    found = model.generate(prompts, eos_token_id=end, **given)
    for prompt, text, whole in zip(prompts, found, plain, strict=True):
        cut = whole[len(prompt) :].partition(",")
        assert text == prompt + cut[0] + cut[1], (text, whole)
    assert any(text.endswith(",") for text in found) and not any(text.endswith(",,") for text in found)


def test_an_early_end_is_no_missed_position(model: ws.HookedRecurrentModel) -> None:
    edit, end = ws.Delete(model.sites[0].layer), model.to_single_token(",")
    ids = model.to_tokens("The captain of the ship")[0]
    first = int(model.generate(ids, max_new_tokens=1, do_sample=False)[0, -1])
    late = ids.shape[1] + 5
    config = model.hf_model.generation_config.__class__(max_new_tokens=9, eos_token_id=[end, first], do_sample=False)
    for given in (
        dict(max_new_tokens=9, eos_token_id=first, do_sample=False),
        dict(max_length=late + 3, eos_token_id=first, do_sample=False),
        dict(generation_config=config),
    ):
        with model.intervene(edit, positions=[0, late]):
            model.generate(ids, **given)
    with pytest.raises(IndexError, match=f"position {late} is out of range"), model.intervene(edit, positions=[late]):
        model.generate(ids, max_length=late, do_sample=False)


def test_a_dict_of_a_generation(model: ws.HookedRecurrentModel) -> None:
    made = model.generate(TEXT, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    assert model.to_string(made.sequences[0]) == model.generate(TEXT, max_new_tokens=3, do_sample=False)
