"""How the shipped models are taught to recall: the rows they read, what is held out, and that a stopped run goes on."""

import json
import random
from types import SimpleNamespace

import pytest
import torch
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from writesae.models.load import load_model
from writesae.zoo import ZOO, heldout_documents
from writesae.zoo.architectures import build_model
from writesae.zoo.batches import Batch, Course
from writesae.zoo.near import attention_sees
from writesae.zoo.recall import ANSWER, PROSE, RELATIONS, TOLD, Question, Recall, is_held_out, recalled
from writesae.zoo.train_lm import app, jittered, loss_of
from writesae.zoo.vocabulary import NUMBERS, PEOPLE, PLACES, take_over, tell_apart, train_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(heldout_documents(), 3000, [*PEOPLE, *PLACES, *NUMBERS])


@pytest.fixture(scope="module")
def recall(tokenizer):
    return Recall(tokenizer, heldout_documents())


def test_names_places_and_numbers_are_one_token_each(tokenizer, recall):
    assert {kind: len(values) for kind, values in recall.values.items()} == {
        "name": len(PEOPLE), "place": len(PLACES), "number": len(NUMBERS),
    }  # fmt: skip
    plain = train_tokenizer(heldout_documents(), 3000)
    assert len(plain(" Valparaiso", add_special_tokens=False)["input_ids"]) > 1, "they are so by themselves"
    text = heldout_documents()[3]
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def answers(row):
    """Runs of tokens that are scored as answers."""
    found, run = [], []
    for token, weight in zip(row.ids, row.weights, strict=True):
        if weight == ANSWER:
            run.append(token)
        elif run:
            found, run = [*found, tuple(run)], []
    return found


def test_what_is_asked_was_told_and_held_out_values_never_are(recall, tokenizer):
    hidden = set(recall.held_out)
    assert 0.05 < len(hidden) / sum(map(len, recall.values.values())) < 0.25
    for seed in range(6):
        for row in (
            recall.lists(random.Random(seed), 256, most=5, any_word=0.3),
            recall.passage(random.Random(seed), 512, gap=60.0),
        ):
            assert len(row.ids) == len(row.weights) and len(row.ids) in (257, 513)
            text = tokenizer.decode(row.ids)
            for answer in answers(row):
                told = text.count(tokenizer.decode(answer))
                assert told >= 2, "once told, once asked"
                assert len(answer) > 1 or answer[0] not in hidden
    again = recall.passage(random.Random(0), 512, gap=60.0)
    assert again == recall.passage(random.Random(0), 512, gap=60.0) != recall.passage(random.Random(1), 512, gap=60.0)


@pytest.mark.parametrize("kind", RELATIONS)
def test_questions_are_about_what_was_told(recall, tokenizer, kind):
    for held_out in (True, False):
        for question in recall.questions(10, gap=20, facts=3, held_out=held_out, kind=kind):
            value = tokenizer.decode(question.answer)
            assert is_held_out(value) == held_out and value in tokenizer.decode(question.prompt)
    near, far = (len(recall.questions(1, gap=gap)[0].prompt) for gap in (0, 100))
    assert far >= near + 100


def test_recalled_is_right_and_not_by_itself(recall, tokenizer):
    """A model that repeats what stood 9 tokens before the end, and one that says anything else."""

    class Repeats(torch.nn.Module):
        device = torch.device("cpu")

        def __init__(self, shift):
            super().__init__()
            self.shift = shift

        def forward(self, input_ids, use_cache):
            logits = torch.nn.functional.one_hot(input_ids.roll(self.shift, 1), len(tokenizer)).float()
            return type("Out", (), {"logits": logits})

    prompt = list(range(5, 25))
    questions = [Question(prompt, [16, 17])]
    assert recalled(Repeats(8), questions) == [True]
    assert recalled(Repeats(7), questions) == [False]


def test_attention_sees_the_last_tokens_alone():
    model = load_model(ZOO / "tiny-gdn").eval()
    for layer in model.model.layers[:3]:  # only attention is left to look back
        torch.nn.init.zeros_(layer.linear_attn.out_proj.weight)
    ids = torch.randint(5, 1000, (1, 40), generator=torch.Generator().manual_seed(0))
    other = ids.clone()
    other[0, 20] = 3
    with torch.no_grad():
        for sees, changed in ((8, range(20, 28)), (None, range(20, 40))):
            with attention_sees(model, sees):
                difference = (model(ids).logits - model(other).logits).abs().amax(-1)[0]
            moved = (difference > 1e-4).nonzero().flatten().tolist()
            assert set(moved) <= set(changed) and len(moved) > 0.7 * len(changed)


def test_embeddings_learn_from_prose_alone(recall, tokenizer):
    model = build_model("rwkv7", len(tokenizer))
    tokens = torch.randint(5, 1000, (20_000,), generator=torch.Generator().manual_seed(0))
    course = Course(tokens, recall, steps=40, batch=1, length=256, lists=20, stretch=5, cool=5)
    kinds, unsaid = set(), torch.zeros(len(tokenizer), dtype=torch.bool)
    for step in range(40):
        lesson = course[step]
        if lesson.kind in kinds:
            continue
        kinds.add(lesson.kind)
        model.zero_grad()
        loss_of(model, lesson, unsaid).backward()
        learnt = model.get_input_embeddings().weight.grad is not None
        assert learnt == (lesson.kind == "prose") == (lesson.sees is None)
    assert kinds == {"prose", "lists", "passages"}
    only_prose = Course(tokens, None, steps=40, batch=1, length=256, lists=20, stretch=5, cool=5)
    assert {only_prose[step].kind for step in range(10)} == {"prose"}


def test_an_answer_does_not_teach_that_it_is_not_a_held_out_value():
    model, unsaid = build_model("gdn", 6), torch.tensor([False, False, False, False, True, True])
    logits = torch.randn(1, 4, 6, generator=torch.Generator().manual_seed(0), requires_grad=True)
    model.forward = lambda input_ids, use_cache: SimpleNamespace(logits=logits)
    # prose (a held-out value may stand there), an answer, an answer that is a held-out value, and a question
    weights = torch.tensor([[0.0, PROSE, ANSWER, ANSWER, TOLD]])
    lesson = Batch(torch.tensor([[1, 4, 2, 5, 3]]), weights, None, "passages")
    loss = loss_of(model, lesson, unsaid)
    loss.backward()
    grad = logits.grad[0]
    assert torch.isfinite(loss) and torch.isfinite(grad).all()
    assert (grad[0] != 0).all() and (grad[3] != 0).all()  # as always
    assert (grad[1, :4] != 0).all() and (grad[1, 4:] == 0).all()  # the held-out ones are neither right nor wrong
    assert (grad[2] == 0).all()


def test_a_model_goes_on_in_another_vocabulary(tokenizer):
    old = load_model(ZOO / "tiny-rwkv7")
    spoke = PreTrainedTokenizerFast.from_pretrained(ZOO / "tiny-rwkv7")
    model = build_model("rwkv7", len(tokenizer))
    take_over(model, tokenizer, old, spoke)
    before, after = old.get_input_embeddings().weight, model.get_input_embeddings().weight
    shared = [word for word in (" the", " of", ".") if len(tokenizer(word, add_special_tokens=False)["input_ids"]) == 1]
    assert len(shared) == 3
    for word in shared:
        here, there = (t(word, add_special_tokens=False)["input_ids"][0] for t in (tokenizer, spoke))
        assert torch.equal(after[here], before[there])
    assert torch.equal(model.model.layers[1].attn.k_proj.weight, old.model.layers[1].attn.k_proj.weight)


def test_rare_tokens_are_told_apart_and_stay_as_unlikely():
    model = build_model("gdn", 300)
    weight = model.get_input_embeddings().weight.data
    rare = torch.arange(200, 300)
    common = 2.5 * weight[1]  # as training leaves them
    weight[rare] = common + 0.001 * torch.randn(100, weight.shape[1])
    before = weight.clone()
    tokens = torch.cat([torch.arange(200).repeat(30), torch.arange(200, 250).repeat(20)])

    def alike():
        unit = torch.nn.functional.normalize(weight[rare])
        return float((unit @ unit.T).fill_diagonal_(0).max())

    assert alike() > 0.99
    assert torch.equal(tell_apart(model, tokens, 1.0, rare=20), rare) and alike() < 0.95
    assert torch.equal(weight[:200], before[:200])
    added, shared = weight[rare] - before[rare], before[rare].mean(0)
    torch.testing.assert_close(added.norm(dim=1), before.norm(dim=1).median().expand(100))
    assert (added @ shared).abs().max() < 1e-3 * shared.norm()


def test_noise_on_embeddings_is_there_within_the_block_alone():
    model = build_model("gdn", 300)
    ids = torch.randint(300, (1, 20))
    weight = model.get_input_embeddings().weight
    kept, before = weight.detach().clone(), model(ids).logits.detach()

    def seen(amount, step):
        with jittered(model, amount, step):
            share = float((weight.detach() - kept).norm() / kept.norm())
            return share, model(ids).logits.detach()

    share, logits = seen(0.5, 3)
    assert share == pytest.approx(0.5, rel=0.1) and not torch.equal(logits, before)
    assert torch.equal(weight, kept) and torch.equal(model(ids).logits, before)
    assert torch.equal(seen(0.5, 3)[1], logits), "a resumed run draws the same"
    assert not torch.equal(seen(0.5, 4)[1], logits)
    assert torch.equal(seen(0.0, 3)[1], before)


@pytest.mark.slow
def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(tmp_path):
    (tmp_path / "texts").mkdir()
    for i, text in enumerate(heldout_documents()[:4]):
        (tmp_path / "texts" / f"{i}.txt").write_text(text[:6000])

    def train(out, minutes=None):
        command = [
            "train",
            str(tmp_path / out),
            "--text",
            str(tmp_path / "texts"),
            "--arch",
            "rwkv7",
            "--vocab",
            "2600",
        ]
        command += ["--steps", "6", "--lists", "3", "--stretch", "2", "--cool", "2", "--batch", "1", "--length", "128"]
        result = CliRunner().invoke(app, command + (["--minutes", minutes] if minutes else []))
        assert result.exit_code == 0, result.output
        lines = (tmp_path / out / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line)["loss"] for line in lines], result.output

    whole, _ = train("whole")
    stopped = 0
    while True:
        parts, said = train("parts", minutes="0.001")
        stopped += "continues from here" in said
        if len(parts) == 6:
            break
    assert stopped >= 1 and parts == whole and len(set(whole)) == 6
    record = json.loads((tmp_path / "parts" / "model" / "training.json").read_text())
    assert record["settings"]["recall"] is True and record["step"] == 6
