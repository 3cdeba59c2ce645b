"""Train a tiny recurrent language model from scratch on a CPU: the recipe behind `tiny-gdn` and its siblings.

    python -m writesae.zoo.train_lm train runs/tiny                       # the default public-domain corpus
    python -m writesae.zoo.train_lm train runs/mamba --arch mamba2        # another architecture
    python -m writesae.zoo.train_lm train runs/mine --text my_texts/      # your own .txt files
    python -m writesae.zoo.train_lm export runs/tiny my-tiny-gdn          # the latest checkpoint as a model folder
    python -m writesae.zoo.train_lm ask my-tiny-gdn                       # how much a model recalls

Interrupt it whenever you like (Ctrl-C); the same command continues exactly from the last checkpoint.
"""

import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import transformers
import typer
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from writesae.jobs.progress import Bars
from writesae.model import HookedRecurrentModel
from writesae.models.load import load_model
from writesae.stores.texts import read
from writesae.zoo import corpus
from writesae.zoo.architectures import ARCHITECTURES, build_model
from writesae.zoo.batches import Batch, Course
from writesae.zoo.evaluate import bits_per_byte, head_memory, xz_bits_per_byte
from writesae.zoo.near import attention_sees
from writesae.zoo.recall import ANSWER, Recall, recalled
from writesae.zoo.vocabulary import NUMBERS, PEOPLE, PLACES, take_over, tell_apart, train_tokenizer

app = typer.Typer(add_completion=False, help=__doc__)
transformers.logging.set_verbosity_error()  # silences the advice to install GPU kernels
transformers.logging.disable_progress_bar()  # models this small load at once


def make_optimizers(model: torch.nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside, AdamW for embeddings, low-rank projections and all that is no matrix.

    Only matrices decay (not norms, gates' biases or the short convolutions).
    """
    inside = {n: p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n and "lora" not in n}
    others = [p for n, p in model.named_parameters() if n not in inside]
    groups = [
        {"params": [p for p in others if p.ndim == 2], "weight_decay": 0.1},
        {"params": [p for p in others if p.ndim != 2], "weight_decay": 0.0},
    ]
    muon = torch.optim.Muon(inside.values(), lr=0.0, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=True)]


def learning_rate(step: int, steps: int, cool: int, peak: float) -> float:
    """Linear warm-up over 40 steps, then the peak, then down to 2% of it over the last `cool` steps."""
    return peak * min(1.0, (step + 1) / 40, max(0.02, (steps - step) / max(1, cool)))


def loss_of(model: PreTrainedModel, batch: Batch, held_out: Tensor) -> Tensor:
    """Weighted mean of the next-token losses.

    Embeddings learn from prose alone. If they learn from facts, a model copies each value in a way of its own, and none
    that it was not taught: of held-out values 5% were recalled where 95% of the others were. Nor does an answer teach
    that it is *not* a held-out value: these have no part in its probabilities.
    """
    model.get_input_embeddings().requires_grad_(batch.kind == "prose")
    logits = model(input_ids=batch.ids[:, :-1], use_cache=False).logits.flatten(0, 1)
    targets, weights = batch.ids[:, 1:].flatten(), batch.weights[:, 1:].flatten()
    answers = weights == ANSWER
    if answers.any():
        uncounted = answers & held_out[targets]  # a piece of an invented name may be a value that is held out
        weights, targets = weights.masked_fill(uncounted, 0.0), targets.masked_fill(uncounted, 0)
        logits = logits.masked_fill(answers[:, None] & held_out, float("-inf"))
    return F.cross_entropy(logits, targets, reduction="none") @ weights / weights.sum()


@contextmanager
def jittered(model: PreTrainedModel, amount: float, step: int) -> Iterator[None]:
    """Within the block, every embedding has random noise added, `amount` times as long as the embedding itself.

    So a value that is told can only be repeated by copying its vector, whichever it is, not by recognising the word.
    """
    embeddings: Any = model.get_input_embeddings()
    weight = embeddings.weight.data
    if not amount:
        yield
        return
    kept = weight.clone()
    random = torch.Generator().manual_seed(step)
    noise = torch.randn(weight.shape, generator=random) / weight.shape[1] ** 0.5
    weight += amount * weight.norm(dim=1, keepdim=True) * noise
    try:
        yield
    finally:
        weight.copy_(kept)


def save_checkpoint(path: Path, **state) -> None:
    """Write the file whole or not at all, also if the run is killed meanwhile."""
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, path)


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write a Hugging Face model folder with bfloat16 weights. The model given is left as it was."""
    copy = type(model)(model.config)
    copy.load_state_dict(model.state_dict())
    copy.bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for file in folder.iterdir():
        file.chmod(0o644)  # safetensors makes files only their owner can read


@app.command()
def train(
    out: Annotated[Path, typer.Argument(help="Folder of this run: checkpoint, tokenizer, metrics, final model.")],
    arch: Annotated[str, typer.Option(help=f"One of {', '.join(ARCHITECTURES)}.")] = "gdn",
    text: Annotated[Path | None, typer.Option(help="A folder of .txt files, or one file.")] = None,
    cache: Annotated[Path | None, typer.Option(help="Where the default corpus is kept.")] = None,
    start_from: Annotated[
        Path | None, typer.Option(help="A model folder of this architecture to go on from; its tokenizer may differ.")
    ] = None,
    recall: Annotated[bool, typer.Option(help="Teach it to recall facts, beside prose.")] = True,
    steps: Annotated[int, typer.Option(help="Optimizer steps; the schedule ends here.")] = 5000,
    lists: Annotated[int, typer.Option(help="Steps until facts are told among prose.")] = 600,
    stretch: Annotated[int, typer.Option(help="Steps from there on until the prose between is at its longest.")] = 1200,
    cool: Annotated[int, typer.Option(help="Steps over which the learning rate falls.")] = 3000,
    jitter: Annotated[
        float, typer.Option(help="Noise on embeddings where facts are read, in their norms; a fifth while cooling.")
    ] = 0.5,
    apart: Annotated[
        float, typer.Option(help="Differences given at the start to embeddings of rare tokens, in the median norm.")
    ] = 0.0,
    rare: Annotated[int, typer.Option(help="Which are rare: those that the text has at most this often.")] = 20,
    batch: Annotated[int, typer.Option(help="Sequences per step.")] = 3,
    length: Annotated[int, typer.Option(help="Tokens per sequence.")] = 1024,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 3e-3,
    vocab: Annotated[int, typer.Option(help="Tokens in the vocabulary.")] = 4096,
    seed: Annotated[int, typer.Option(help="Random seed.")] = 0,
    minutes: Annotated[
        float | None, typer.Option(help="Stop after this many minutes; the same command continues.")
    ] = None,
    save_every: Annotated[float, typer.Option(help="Seconds between checkpoints.")] = 120.0,
    threads: Annotated[int, typer.Option(help="CPU threads; 0 leaves PyTorch's choice.")] = 0,
) -> None:
    """Train from scratch, or continue from OUT/checkpoint.pt; after the last step, export to OUT/model."""
    if arch not in ARCHITECTURES:
        raise typer.BadParameter(f"{arch!r}: allowed are {', '.join(ARCHITECTURES)}", param_hint="--arch")
    if threads:
        torch.set_num_threads(threads)
    out.mkdir(parents=True, exist_ok=True)
    source = text or corpus.fetch(cache)
    train_docs, held_out = corpus.split(read(source))
    texts = [d.text for d in train_docs]

    if (out / "tokenizer").is_dir():
        tokenizer = PreTrainedTokenizerFast.from_pretrained(out / "tokenizer")
    else:
        tokenizer = train_tokenizer(texts, vocab, [*PEOPLE, *PLACES, *NUMBERS] if recall else ())
        tokenizer.save_pretrained(out / "tokenizer")
    encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
    tokens = torch.tensor([i for ids in encoded for i in (tokenizer.eos_token_id, *ids)])
    probe = [d.text[:4000] for d in held_out[:: max(1, len(held_out) // 8)]]  # a quick look at held-out text
    facts = Recall(tokenizer, texts) if recall else None
    questions = facts.questions(60, gap=64, facts=3) if facts else []
    unsaid = torch.zeros(len(tokenizer), dtype=torch.bool)
    unsaid[facts.held_out if facts else []] = True
    course = Course(
        tokens, facts, steps=steps, batch=batch, length=length, lists=lists, stretch=stretch, cool=cool, seed=seed
    )

    model, step, seconds = build_model(arch, len(tokenizer), seed), 0, 0.0
    if arch in ("mamba1", "mamba2"):  # 1.4 times as fast as the torch functions of transformers, and more
        HookedRecurrentModel(model, tokenizer, kernels="writesae")
    optimizers = make_optimizers(model)
    checkpoint, metrics = out / "checkpoint.pt", out / "metrics.jsonl"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, kept in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(kept)
        step, seconds = state["step"], state["seconds"]
        rows = [line for line in metrics.read_text().splitlines() if json.loads(line)["step"] <= step]
        metrics.write_text("".join(f"{line}\n" for line in rows))  # later lines will be made again
    elif start_from is not None:
        old = load_model(start_from, dtype=torch.float32)
        take_over(model, tokenizer, old, PreTrainedTokenizerFast.from_pretrained(start_from))
        if apart:
            tell_apart(model, tokens, apart, rare, seed)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokens):,} training tokens, step {step}")

    settings = dict(
        arch=arch,
        text=str(text) if text else corpus.PACKAGE,
        held_out=[d.name for d in held_out],
        train_documents=len(train_docs),
        train_tokens=len(tokens),
        start_from=start_from and start_from.name,
        recall=recall,
        steps=steps,
        lists=lists,
        stretch=stretch,
        cool=cool,
        jitter=jitter,
        apart=apart,
        rare=rare,
        batch=batch,
        length=length,
        lr=lr,
        seed=seed,
    )

    def save() -> None:
        states = [optimizer.state_dict() for optimizer in optimizers]
        save_checkpoint(
            checkpoint, model=model.state_dict(), optimizers=states, step=step, seconds=seconds, settings=settings
        )

    stop = []  # the first Ctrl-C ends the run after the step in hand; a second one ends it at once
    previous = signal.signal(signal.SIGINT, lambda *_: stop.append(1) if not stop else signal.default_int_handler(*_))
    began = saved = time.monotonic()
    with Bars() as bars, metrics.open("a") as log:
        bar = bars.add("training", steps, done=step)
        while step < steps and not stop and (minutes is None or time.monotonic() - began < 60 * minutes):
            start = time.monotonic()
            rate = learning_rate(step, steps, cool, lr)
            for optimizer in optimizers:
                optimizer.zero_grad()
                for group in optimizer.param_groups:
                    group["lr"] = rate
            lesson = course[step]
            noise = 0.0 if lesson.kind == "prose" else jitter if step < steps - cool else jitter / 5
            with attention_sees(model, lesson.sees), jittered(model, noise, step):
                loss = loss_of(model, lesson, unsaid)
                loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
            step += 1
            seconds += time.monotonic() - start

            row = {"step": step, "kind": lesson.kind, "loss": loss.item(), "grad_norm": norm.item(), "lr": rate}
            row["seconds"] = seconds
            due = step == steps or time.monotonic() - saved > save_every
            if due:
                saved = time.monotonic()
                row["held_out_bits_per_byte"] = bits_per_byte(model, tokenizer, probe)
                row["recalled"] = sum(recalled(model, questions)) / max(1, len(questions))
            log.write(json.dumps(row) + "\n")
            log.flush()
            if due:
                save()  # after the log, which therefore never lacks a step that the checkpoint has
            bar(step, f"loss {row['loss']:.3f}")
        save()
    signal.signal(signal.SIGINT, previous)
    if step < steps:
        print(f"stopped at step {step} of {steps}; the same command continues from here")
    else:
        export(out, out / "model", text, cache)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="Folder of a training run.")],
    folder: Annotated[Path, typer.Argument(help="Model folder to write.")],
    text: Annotated[Path | None, typer.Option(help="The text it was trained on, if not the default corpus.")] = None,
    cache: Annotated[Path | None, typer.Option(help="Where the default corpus is kept.")] = None,
    quick: Annotated[bool, typer.Option(help="Score only the beginning of each held-out document.")] = False,
) -> None:
    """Write the run's latest checkpoint as a bfloat16 model folder, and score it there, in training.json."""
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(run / "tokenizer")
    model = build_model(state["settings"].get("arch", "gdn"), len(tokenizer))
    model.load_state_dict(state["model"])
    save_model(model, tokenizer, folder)

    # Score what a user will load: the rounded weights, computing in float32.
    model = load_model(folder, dtype=torch.float32).eval()
    _, held_out = corpus.split(read(text or corpus.fetch(cache)))
    texts = [d.text[:5000] if quick else d.text for d in held_out]
    settings = state["settings"]
    record = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "step": state["step"],
        "tokens_seen": state["step"] * settings["batch"] * settings["length"],
        "training_minutes": round(state["seconds"] / 60, 1),
        "held_out_bytes": sum(len(t.encode()) for t in texts),
        "held_out_bits_per_byte": round(bits_per_byte(model, tokenizer, texts), 4),
        "xz_bits_per_byte": round(xz_bits_per_byte(texts), 4),
        "heads": head_memory(model, tokenizer, texts),
        "settings": settings,
    }
    (folder / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps({k: v for k, v in record.items() if k not in ("heads", "settings")}, indent=1))


@app.command()
def ask(
    model: Annotated[str, typer.Argument(help="A shipped model or a model folder.")],
    questions: Annotated[int, typer.Option(help="Questions of each kind.")] = 200,
    text: Annotated[Path | None, typer.Option(help="The text it was trained on, if not the default corpus.")] = None,
    cache: Annotated[Path | None, typer.Option(help="Where the default corpus is kept.")] = None,
) -> None:
    """How many facts a model recalls, in percent, after 16, 64 and 200 tokens of prose."""
    hooked = HookedRecurrentModel.from_pretrained(model, dtype="float32")
    documents, _ = corpus.split(read(text or corpus.fetch(cache)))
    facts = Recall(hooked.tokenizer, [d.text for d in documents])
    for n, held_out in ((1, True), (3, True), (1, False)):
        asked = (facts.questions(questions, gap, n, held_out) for gap in (16, 64, 200))
        rates = (sum(recalled(hooked.hf_model, some)) / questions for some in asked)
        values = "held-out values" if held_out else "values seen in training"
        print(f"{n} told, {values}: {', '.join(f'{100 * rate:.1f}' for rate in rates)}", flush=True)


if __name__ == "__main__":
    app()
