"""Every feature on models of real size: true shapes, random weights, realistic gates.

    python benchmarks/real_size.py build FOLDER                       # once: four folders, 4 GiB
    python benchmarks/real_size.py walk FOLDER/qwen3_5-0.8b           # the table of one of them
    python benchmarks/real_size.py walk FOLDER/rwkv7-191m --only extract --only train

Each row runs in a fresh process. Its processor seconds are given as a multiple of those of the forward passes that it
needs by its definition: every text once as the model is, and once for every edit, whole passes, logits of the last
token alone; backward passes and generated tokens of the unwrapped model where it needs such. Memory is the peak above
the loaded model.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import transformers
import typer
from measure import peak_memory
from rich.console import Console
from rich.table import Table

import writesae as ws
from writesae.model.continuing import cache_argument

app = typer.Typer(add_completion=False)

QWEN = dict(
    vocab_size=248_320, hidden_size=1024, intermediate_size=3584, num_hidden_layers=24, num_attention_heads=8,
    num_key_value_heads=2, head_dim=256, linear_num_key_heads=16, linear_num_value_heads=16, linear_key_head_dim=128,
    linear_value_head_dim=128, linear_conv_kernel_dim=4, tie_word_embeddings=True, max_position_embeddings=262_144,
    layer_types=[*["linear_attention"] * 3, "full_attention"] * 6,
)  # fmt: skip
VISION = dict(
    depth=12, hidden_size=768, intermediate_size=3072, num_heads=12, out_hidden_size=1024, num_position_embeddings=2304
)
RWKV7 = dict(
    vocab_size=65_536, hidden_size=768, num_hidden_layers=12, head_dim=64, decay_low_rank_dim=64, gate_low_rank_dim=128,
    a_low_rank_dim=64, v_low_rank_dim=32, intermediate_size=3072,
)  # fmt: skip
MAMBA2 = dict(
    d_model=1024, n_layer=48, vocab_size=50_277, ssm_cfg={"layer": "Mamba2"}, rms_norm=True, residual_in_fp32=True,
    fused_add_norm=True, pad_vocab_size_multiple=16, tie_embeddings=True,
)  # fmt: skip
HALF_LIVES = (0.5, 500.0)  # tokens: of the first head of a layer and of the last, the others between


@app.command()
def build(folder: Path) -> None:
    """Make the folders, in bfloat16 as the real ones are published."""
    from writesae.models.load import RWKV7ForCausalLM
    from writesae.models.tokenizers import WorldTokenizer
    from writesae.zoo import shipped_model

    torch.set_default_dtype(torch.bfloat16)
    text = transformers.Qwen3_5TextConfig(**QWEN)
    tokenizer = transformers.AutoTokenizer.from_pretrained(shipped_model("tiny-gdn"))

    def save(name: str, model: Any, tokens: Any = tokenizer) -> None:
        _set_gates(model)
        model.save_pretrained(folder / name)
        tokens.save_pretrained(folder / name)
        if tokens is tokenizer:
            _fill(folder / name / "tokenizer.json", model.get_input_embeddings().weight.shape[0])
        print(f"{name}: {sum(p.numel() for p in model.parameters()) / 1e6:.0f} million weights")

    save("qwen3_5-0.8b", transformers.Qwen3_5ForCausalLM(text))
    both = transformers.Qwen3_5Config(text_config=QWEN, vision_config=VISION, tie_word_embeddings=True)
    save("qwen3_5-0.8b-vision", transformers.Qwen3_5ForConditionalGeneration(both))
    save("rwkv7-191m", RWKV7ForCausalLM(RWKV7ForCausalLM.config_class(**RWKV7)), WorldTokenizer())
    # transformers' Mamba-2, under the names and with the config of its authors
    from writesae.models.formats import mamba_of_authors

    name = "mamba2-370m"
    model = transformers.Mamba2ForCausalLM(mamba_of_authors(MAMBA2))
    save(name, model)
    tensors = {k.replace("backbone.embeddings.", "backbone.embedding."): v for k, v in model.state_dict().items()}
    for path in [*(folder / name).glob("*.safetensors"), folder / name / "config.json"]:
        path.unlink()
    (folder / name / "generation_config.json").unlink(missing_ok=True)
    torch.save(tensors, folder / name / "pytorch_model.bin")
    (folder / name / "config.json").write_text(json.dumps(MAMBA2))


def _fill(path: Path, n_vocab: int) -> None:
    """Give every id of the vocabulary a token; those of the shipped tokenizer are the ones that texts are made of."""
    file = json.loads(path.read_text())
    vocabulary = file["model"]["vocab"]
    taken = {*vocabulary.values(), *(token["id"] for token in file["added_tokens"])}
    vocabulary.update({f"token{i}": i for i in range(n_vocab) if i not in taken})
    path.write_text(json.dumps(file))


@torch.no_grad()
def _set_gates(model: torch.nn.Module) -> None:
    """So that heads forget at paces from `HALF_LIVES`, as trained ones do, and no projection is zero, as RWKV-7's are
    before training."""
    for p in model.parameters():
        if p.ndim == 2 and not bool(p.any()):
            p.normal_(0, 0.02)
    for module in model.modules():
        if not isinstance(getattr(module, "A_log", None), torch.Tensor):
            continue
        n = module.A_log.numel()
        half_lives = torch.logspace(*(math.log10(x) for x in HALF_LIVES), n, dtype=torch.float32)
        rate = math.log(2) / half_lives
        dt = torch.full((n,), 0.1 if hasattr(module, "D") else math.log(2))  # Mamba-2: also how much is written
        module.dt_bias.copy_(dt.expm1().log())
        module.A_log.copy_((rate / dt).log().reshape(module.A_log.shape))


# --- the walk ---------------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """A feature.

    Attributes:
        tokens: of the forward passes that it needs by its definition.
        run: the feature.
        generated: tokens generated one by one.
        backward: tokens of backward passes through all layers. (One through the upper half counts as half a pass.)
        shape: of the batch on which the passes are timed: a short text alone takes longer per token than several.
    """

    tokens: float
    run: Callable[[], Any]
    generated: int = 0
    backward: int = 0
    shape: tuple[int, int] = (4, 96)


def rows(model: ws.HookedRecurrentModel, sae: ws.WriteSAE) -> dict[str, Row]:
    """The features, each small enough for minutes."""
    from writesae.gradients import Logit, gradient
    from writesae.stores import Windows, extract
    from writesae.zoo import heldout_documents

    texts, (layer, head) = heldout_documents()[:12], sae.place
    ids = torch.cat([model.to_tokens(text)[0][0] for text in texts])
    four, one = ids[:2048].reshape(4, 512), ids[None, :143]
    few: dict[str, Any] = model.logits_of_last(1)
    prompts = ids[:48].reshape(2, 24)

    def reading(tokens: torch.Tensor, *edits: Any) -> None:
        with torch.no_grad(), model.intervene(list(edits)) if edits else model.hooks([]):
            model(tokens, **few)

    def cached(names: Any = None) -> None:
        with torch.no_grad():
            model.run_with_cache(four, names=names, **few)

    def logit(layers: list[int] | None) -> None:
        gradient(model, one, Logit(11, minus=12), layers)

    def extracting(n_tokens: int) -> None:
        with tempfile.TemporaryDirectory() as folder:
            rows = Windows.of_rows([ids], 512).spread(n_tokens).tokens
            extract(model, rows, [(layer, head) for head in range(4)], folder, progress=False)

    def paging() -> None:
        with tempfile.TemporaryDirectory() as folder:
            ws.write_pages(model, sae, texts[2:3], Path(folder, "pages"), atoms=4)

    def chosen() -> Any:
        from writesae.experiments.amplifying import choose_atoms

        return choose_atoms(model, sae, two_texts, lambda token: " t" in token, n=4)

    above = 1 - layer / model.n_layers  # of the layers, those that a backward pass to ours goes through
    two_texts = texts[:2]
    count = lambda texts: sum(len(model.to_tokens(text)[0][0]) for text in texts)  # noqa: E731
    return {
        "nothing attached": Row(2048, lambda: reading(four)),
        "run_with_cache, inputs of a layer": Row(
            2048, lambda: cached([f"blocks.{layer}.mixer.hook_{q}" for q in "qkv"])
        ),
        "run_with_cache, everything": Row(2048, cached),
        "an edit at every token, one head": Row(2048, lambda: reading(four, ws.Delete(layer, head))),
        "encode": Row(2048, lambda: model.encode(sae, four)),
        "gradient of a logit, one layer": Row(143, lambda: logit([layer]), backward=int(above * 143), shape=(1, 143)),
        "gradient of a logit, all layers": Row(143, lambda: logit(None), backward=143, shape=(1, 143)),
        "attribute": Row(143, lambda: ws.attribute(model, one[0]), backward=143, shape=(1, 143)),
        "attribution test, 4 prompts x 8 deletions": Row(
            4 * 96 * (2 + 8),
            lambda: ws.attribution_test(model, texts, n_prompts=4, n_deletions=32),
            backward=4 * 96,
        ),
        "logit change, 8 prompts, 2 atoms, context 64": Row(
            8 * 64 * (1 + 2 * (1 + above) + 2 * 4),
            lambda: ws.logit_change(model, sae, texts, n_prompts=8, atoms=2, context=64),
        ),
        "sign test, n=16": Row(64 * (4 + 16), lambda: ws.sign_test(model, *sae.place, texts, n=16)),
        "sign test by gradient, n=16": Row(
            64 * (4 + (2 + above) * 16),
            lambda: ws.sign_test(model, *sae.place, texts, n=16, direction="gradient"),
        ),
        "install, 2 prompts x 4 strata, 8 tokens": Row(
            (2 + 2 * 16) * 24,
            lambda: ws.install(model, *sae.place, prompts, max_new_tokens=8),
            (2 + 2 * 16) * 7,
            shape=(16, 24),
        ),
        "install by gradient": Row(
            (2 + 2 * 16 + 16) * 24,
            lambda: ws.install(model, *sae.place, prompts, max_new_tokens=8, direction="gradient"),
            (2 + 2 * 16) * 7,
            backward=int(above * 16 * 24),
            shape=(16, 24),
        ),
        "replacement test, 16 firings, 4 conditions": Row(
            96 * (8 + 16 * 4),
            lambda: ws.replacement_test(model, sae, two_texts, n_firings=16, per_window=2),
        ),
        "population test, 4 atoms x 3 firings": Row(
            2 * count(two_texts) + 4 * 3 * 3 * 96,
            lambda: ws.population_test(model, sae, two_texts, n_atoms=4, min_firings=3, max_firings=3),
        ),
        "atom classes, 4,096 tokens": Row(4096, lambda: ws.atom_classes(model, sae, texts, max_tokens=4096)),
        "amplify, 2 prompts, 8 tokens, 3 conditions": Row(
            count(two_texts) + 6 * 24,
            lambda: ws.amplify(model, chosen(), prompts, doses=[2.0], n_tokens=8),
            6 * 7,
        ),
        "erase, 8 firings, one dose": Row(
            count(two_texts) + 64 * (8 + 8 + 8 + 3 * 4),
            lambda: ws.erase(model, sae, None, two_texts, n=8, doses=[1.0]),
        ),
        "extract, 4 heads, 4,096 tokens": Row(4096, lambda: extracting(4096)),
        "pages, 589 tokens, 4 atoms": Row(589 + 4 * 3 * 128, paging),
    }


def _sae(model: ws.HookedRecurrentModel, folder: Path) -> ws.WriteSAE:
    """An SAE of a head in the middle of the model, kept beside it."""
    kept = folder / "sae"
    if not (kept / "cfg.json").exists():
        from writesae.saes import train_site
        from writesae.stores import Windows
        from writesae.zoo import heldout_documents

        ids = Windows.cut(model, heldout_documents(), 256).tokens[:16]
        layer = model.sites[len(model.sites) // 2].layer
        options: Any = dict(target="write", n_atoms=1024, k=1, steps=200, progress=False)
        train_site(model, ids, layer, 3, **options).save_pretrained(kept)
    return ws.WriteSAE.from_pretrained(kept)


@app.command()
def walk(
    folder: Path,
    only: Annotated[list[str] | None, typer.Option(help="Rows whose names begin so; repeat for several.")] = None,
    dtype: Annotated[str, typer.Option(help="Of the weights: float32, bfloat16.")] = "float32",
    out: Annotated[Path | None, typer.Option(help="Where records go, one JSON object a line.")] = None,
    child: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Run the rows, each in a fresh process, and print a table."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if child is None:
        names = _in_process(folder, dtype, "")["names"]
        table = Table(title=f"{folder.name}, {dtype}")
        for column in ("", "processor s", "of passes", "times these", "GiB above the model"):
            table.add_column(column, justify="left" if not column else "right")
        for name in names:
            if only and not any(name.startswith(x) for x in only):
                continue
            try:
                r = _in_process(folder, dtype, name)
            except RuntimeError as error:
                r, shown = {"error": str(error)}, [str(error)[-300:]]
            else:
                shown = [f"{r[k]:.2f}" for k in ("seconds", "passes", "ratio", "gib")]
            print(name, *shown, sep=" | ", flush=True)
            table.add_row(name, *shown)
            if out is not None:
                with out.open("a") as file:
                    file.write(json.dumps({"model": folder.name, "dtype": dtype, "row": name, **r}) + "\n")
        Console(width=140).print(table)
        return
    model = ws.HookedRecurrentModel.from_pretrained(folder, dtype=getattr(torch, dtype))
    sae = _sae(model, folder)
    all_rows = rows(model, sae)
    if not child:
        print(json.dumps({"names": list(all_rows)}))
        return
    row = all_rows[child]
    some = torch.randint(1000, row.shape, generator=torch.Generator().manual_seed(0))

    def plainly() -> float:
        start = time.process_time()
        with torch.no_grad():
            model.hf_model(some, use_cache=False, **model.logits_of_last(1))
        return time.process_time() - start

    def one_by_one() -> float:
        """Seconds of a token generated, in 16 rows at once."""
        cache = {cache_argument(model.hf_model): transformers.DynamicCache(config=model.config)}
        rows = some[:16, :24].repeat(16 // len(some), 1)
        with torch.no_grad():
            model.hf_model(rows, **cache, **model.logits_of_last(1))
            start = time.process_time()
            for t in range(4):
                model.hf_model(rows[:, t : t + 1], **cache, **model.logits_of_last(1))
        return (time.process_time() - start) / (4 * len(rows))

    def backwards() -> float:
        """Seconds of a token in a backward pass of one text, without gradients of weights."""
        model.hf_model.requires_grad_(False)
        x = model.hf_model.get_input_embeddings()(some[:1]).detach().requires_grad_()
        logits = model.hf_model(inputs_embeds=x, use_cache=False, **model.logits_of_last(1)).logits
        start = time.process_time()
        logits[:, -1, 11].sum().backward()
        return (time.process_time() - start) / x.shape[1]

    before = [plainly() for _ in range(3)][1:]
    if row.backward:
        backwards()  # the first one finds the weights where they have never been read
    start, spent = time.perf_counter(), time.process_time()
    gib = peak_memory(row.run) / 1024
    spent, wall = time.process_time() - spent, time.perf_counter() - start
    needed = min(*before, plainly()) / some.numel() * row.tokens
    needed += row.generated * one_by_one() if row.generated else 0
    needed += row.backward * min(backwards(), backwards()) if row.backward else 0
    print(json.dumps({"seconds": spent, "wall": wall, "passes": needed, "ratio": spent / needed, "gib": gib}))


def _in_process(folder: Path, dtype: str, row: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "walk", str(folder), "--dtype", dtype, "--child", row]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-600:])
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    app()
