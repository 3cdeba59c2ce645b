"""Train a tiny recurrent language model from scratch on a CPU: the recipe behind `tiny-gdn` and its siblings.

    python -m writesae.zoo.train_lm train runs/tiny                       # the default public-domain corpus
    python -m writesae.zoo.train_lm train runs/mamba --arch mamba2        # another architecture
    python -m writesae.zoo.train_lm train runs/mine --text my_texts/      # your own .txt files
    python -m writesae.zoo.train_lm export runs/tiny my-tiny-gdn          # the latest checkpoint as a model folder

Interrupt it whenever you like (Ctrl-C); the same command continues exactly from the last checkpoint.
"""

import json
import math
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import transformers
import typer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    Mamba2Config,
    Mamba2ForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3_5ForCausalLM,
    Qwen3_5TextConfig,
)

from writesae.jobs.progress import Bars
from writesae.models.load import load_model
from writesae.models.rwkv7 import RWKV7Config, RWKV7ForCausalLM
from writesae.stores.texts import read
from writesae.zoo import corpus
from writesae.zoo.evaluate import bits_per_byte, head_memory, xz_bits_per_byte

END = "<|endoftext|>"
app = typer.Typer(add_completion=False, help=__doc__)
transformers.logging.set_verbosity_error()  # silences the advice to install GPU kernels
transformers.logging.disable_progress_bar()  # models this small load at once


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE: any text can be encoded, and decoding gives it back exactly."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=END, eos_token=END, pad_token=END, padding_side="left", model_max_length=4096
    )


SHARED: dict[str, Any] = dict(hidden_size=192, tie_word_embeddings=True, bos_token_id=0, eos_token_id=0, pad_token_id=0)


def build_gdn(vocab_size: int) -> PreTrainedModel:
    """A 2.1M-parameter Qwen3.5: three Gated DeltaNet layers of four 32x32 heads, then one attention layer."""
    return _qwen3_5(vocab_size, n_layers=3, n_heads=4, d_head=32)


def build_gdn128(vocab_size: int) -> PreTrainedModel:
    """A 1.9M-parameter Qwen3.5 whose states have the size of the real ones: two layers of two 128x128 heads, then one
    attention layer. Not shipped; it is what benchmarks train SAEs on."""
    return _qwen3_5(vocab_size, n_layers=2, n_heads=2, d_head=128)


def _qwen3_5(vocab_size: int, n_layers: int, n_heads: int, d_head: int) -> PreTrainedModel:
    config = Qwen3_5TextConfig(
        vocab_size=vocab_size,
        **SHARED,
        intermediate_size=512,
        num_hidden_layers=n_layers + 1,
        layer_types=n_layers * ["linear_attention"] + ["full_attention"],
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=64,
        linear_num_key_heads=n_heads,
        linear_num_value_heads=n_heads,
        linear_key_head_dim=d_head,
        linear_value_head_dim=d_head,
        max_position_embeddings=4096,
    )
    model = Qwen3_5ForCausalLM(config)
    for layer in model.model.layers:
        if hasattr(layer, "linear_attn"):
            init_decays(layer.linear_attn)
    return model


def build_mamba2(vocab_size: int) -> PreTrainedModel:
    """A 2.1M-parameter Mamba-2: seven layers of twelve 32x32 heads, and nothing else."""
    config = Mamba2Config(
        vocab_size=vocab_size,
        **SHARED,
        num_hidden_layers=7,
        state_size=32,
        head_dim=32,
        num_heads=12,
        n_groups=1,
        chunk_size=64,
        initializer_range=0.02,
    )
    return Mamba2ForCausalLM(config)


def build_rwkv7(vocab_size: int) -> PreTrainedModel:
    """A 2.0M-parameter RWKV-7: four layers of six 32x32 heads, each with channel mixing."""
    config = RWKV7Config(
        vocab_size=vocab_size,
        **SHARED,
        num_hidden_layers=4,
        head_dim=32,
        intermediate_size=512,
        decay_low_rank_dim=32,
        a_low_rank_dim=32,
        v_low_rank_dim=16,
        gate_low_rank_dim=48,
    )
    return RWKV7ForCausalLM(config)


ARCHITECTURES: dict[str, Callable[[int], PreTrainedModel]] = {
    "gdn": build_gdn,
    "gdn128": build_gdn128,
    "mamba2": build_mamba2,
    "rwkv7": build_rwkv7,
}


def build_model(arch: str, vocab_size: int, seed: int = 0) -> PreTrainedModel:
    """A tiny model of an architecture, freshly initialised."""
    torch.manual_seed(seed)
    return ARCHITECTURES[arch](vocab_size)


@torch.no_grad()
def init_decays(mixer: Any) -> None:
    """Let the heads start with decays spread from about 0.2 to 0.999 per token, as in Mamba-2.

    Transformers' own initialisation (dt_bias = 1, A up to 16) makes most heads forget everything within a token, and
    a short training run does not undo it. Here the step dt is log-uniform in 0.001..0.1, one stratum per head, and
    A uniform in 1..16; a head's decay per token starts near exp(-A dt).
    """
    heads = mixer.A_log.numel()
    stratum = (torch.arange(heads) + torch.rand(heads)) / heads
    dt = torch.exp(math.log(0.001) + stratum * math.log(0.1 / 0.001))
    mixer.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
    mixer.A_log.copy_(torch.empty(heads).uniform_(1, 16).log())


def make_optimizer(model: torch.nn.Module) -> torch.optim.Optimizer:
    """AdamW; only matrices decay (not norms, gates' biases or the short convolutions)."""
    matrices = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim != 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=True)


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over the first 4% of the steps (at most 100), then a cosine to 1% of the peak."""
    warmup = max(1, min(100, steps // 25))
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))))


def get_batch(tokens: torch.Tensor, step: int, batch: int, length: int, seed: int) -> torch.Tensor:
    """Batch number `step`, [batch, length + 1] token ids: a pure function of its arguments, so resuming is exact.

    Each pass over the corpus cuts it at a new random offset and visits the pieces in a new random order.
    """
    per_pass = (len(tokens) - length) // (length + 1)
    rows = []
    for n in range(step * batch, (step + 1) * batch):
        which_pass, index = divmod(n, per_pass)
        random = torch.Generator().manual_seed(seed * 1_000_003 + which_pass)
        offset = int(torch.randint(length, (), generator=random))
        piece = int(torch.randperm(per_pass, generator=random)[index])
        start = offset + piece * (length + 1)
        rows.append(tokens[start : start + length + 1])
    return torch.stack(rows)


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
    steps: Annotated[int, typer.Option(help="Optimizer steps; the cosine schedule ends here.")] = 1150,
    batch: Annotated[int, typer.Option(help="Sequences per step.")] = 4,
    length: Annotated[int, typer.Option(help="Tokens per sequence.")] = 1024,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 3e-3,
    vocab: Annotated[int, typer.Option(help="Tokens in the vocabulary.")] = 2048,
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

    if (out / "tokenizer").is_dir():
        tokenizer = PreTrainedTokenizerFast.from_pretrained(out / "tokenizer")
    else:
        tokenizer = train_tokenizer([d.text for d in train_docs], vocab)
        tokenizer.save_pretrained(out / "tokenizer")
    encoded = tokenizer([d.text for d in train_docs], add_special_tokens=False)["input_ids"]
    tokens = torch.tensor([i for ids in encoded for i in (tokenizer.eos_token_id, *ids)])
    probe = [d.text[:4000] for d in held_out[:: max(1, len(held_out) // 8)]]  # a quick look at held-out text

    model, step, seconds = build_model(arch, len(tokenizer), seed), 0, 0.0
    optimizer = make_optimizer(model)
    checkpoint, metrics = out / "checkpoint.pt", out / "metrics.jsonl"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, seconds = state["step"], state["seconds"]
        kept = [line for line in metrics.read_text().splitlines() if json.loads(line)["step"] <= step]
        metrics.write_text("".join(f"{line}\n" for line in kept))  # later lines will be made again
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokens):,} training tokens, step {step}")

    settings = dict(
        arch=arch,
        text=str(text) if text else corpus.PACKAGE,
        held_out=[d.name for d in held_out],
        train_documents=len(train_docs),
        train_tokens=len(tokens),
        steps=steps,
        batch=batch,
        length=length,
        lr=lr,
        seed=seed,
    )

    def save() -> None:
        save_checkpoint(
            checkpoint,
            model=model.state_dict(),
            optimizer=optimizer.state_dict(),
            step=step,
            seconds=seconds,
            settings=settings,
        )

    stop = []  # the first Ctrl-C ends the run after the step in hand; a second one ends it at once
    previous = signal.signal(signal.SIGINT, lambda *_: stop.append(1) if not stop else signal.default_int_handler(*_))
    began = saved = time.monotonic()
    with Bars() as bars, metrics.open("a") as log:
        bar = bars.add("training", steps, done=step)
        while step < steps and not stop and (minutes is None or time.monotonic() - began < 60 * minutes):
            start = time.monotonic()
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps, lr)
            ids = get_batch(tokens, step, batch, length, seed)
            logits = model(input_ids=ids[:, :-1], use_cache=False).logits
            loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            step += 1
            seconds += time.monotonic() - start

            row = {"step": step, "loss": loss.item(), "grad_norm": norm.item(), "lr": group["lr"], "seconds": seconds}
            due = step == steps or time.monotonic() - saved > save_every
            if due:
                saved = time.monotonic()
                row["held_out_bits_per_byte"] = bits_per_byte(model, tokenizer, probe)
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


if __name__ == "__main__":
    app()
