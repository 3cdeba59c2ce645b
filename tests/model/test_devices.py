"""Everything that is public, on an accelerator that is not there (`tests/helpers/accelerator.py`).

The numbers are those of the CPU; what is tested is that no operation mixes devices or reads one in silence, and how
often one is waited for. Most of it runs on the kind ``mps``, which refuses what ``cuda`` refuses, and float64 as well.
"""

import copy
import itertools
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import writesae as ws
from accelerator import Accelerator, Elsewhere, accelerator
from architectures import Architecture, architecture_named, each_architecture
from pages import part
from writesae.cli import app
from writesae.experiments.protocol import EXPERIMENTS, Asked, Sizes, tasks_of
from writesae.models.devices import device_named, dtype_named
from writesae.zoo import heldout_documents, shipped_saes

TEXTS = ["The state of the Union is", "Madam"]
BOTH = pytest.mark.parametrize("kind", ["cuda", "mps"])


@pytest.fixture
def device(kind: str = "mps") -> Iterator[Accelerator]:
    with accelerator(kind) as found:
        yield found


@pytest.fixture
def model(device: Accelerator) -> ws.HookedRecurrentModel:
    return ws.HookedRecurrentModel.from_pretrained("tiny-gdn", device=device.device)


@pytest.fixture(scope="module")
def on_cpu() -> ws.HookedRecurrentModel:
    return ws.HookedRecurrentModel.from_pretrained("tiny-gdn")


def new_sae(model: ws.HookedRecurrentModel, target: str, **changes) -> ws.WriteSAE:
    """On the CPU, whatever the model's device."""
    site = model.sites[0]
    values = dict(d_key=site.d_key, d_value=site.d_value, n_atoms=24, k=2, target=target, encoder="bilinear")
    return ws.WriteSAE(ws.SAEConfig(**{**values, "layer": site.layer, "head": 0, **changes}))


# The device itself: what would fail on a real one has to fail here ---------------------------------------------------


@BOTH
@pytest.mark.parametrize(
    "wrong",
    [
        lambda x: x + torch.zeros(3),
        lambda x: torch.zeros(3) + x,
        lambda x: torch.cat([x, torch.zeros(3)]),
        lambda x: torch.zeros(3)[x.long()],
        lambda x: torch.zeros(3).index_add_(0, x.long(), x),
        lambda x: nn.Linear(3, 3)(x),
        lambda x: x.numpy(),
        lambda x: np.asarray(x),
        lambda x: x.data_ptr(),
        lambda x: x + torch.zeros(3, device=f"{x.device.type}:1"),
    ],
)
def test_what_a_device_refuses(kind, wrong):
    with accelerator(kind) as found:
        x = torch.zeros(3, device=found.device)
        with pytest.raises((RuntimeError, TypeError), match=r"device|memory"):
            wrong(x)


def test_what_it_allows(device):
    x = torch.arange(3.0).to(device.device)
    assert isinstance(x, Elsewhere) and x.device == device.device and x[1:].device == x.new_zeros(2).device == x.device
    assert (x + torch.tensor(1.0)).cpu().tolist() == [1, 2, 3]  # a number of the CPU may mix
    assert x[torch.tensor([2, 0])].tolist() == [2, 0]
    with pytest.raises(TypeError, match="float64"):
        x.double()
    weight = torch.ones(3, device=device.device, requires_grad=True)
    (x * weight).to("mps:1").sum().backward()
    assert weight.grad is not None and weight.grad.device == device.device and weight.grad.tolist() == [0, 1, 2]


def test_waiting_is_counted_where_we_ask_for_it(device):
    x = torch.ones(3, device=device.device)
    assert bool((x > 0).all()) and device.n_waits == 0  # that was this test
    ws.Write(x[None], x[None])[[0]]
    assert device.n_waits == 2 and all(place.startswith("recurrence/write.py") for place in device.waits)


# Models --------------------------------------------------------------------------------------------------------------


@each_architecture
def test_every_architecture_runs_there(architecture: Architecture):
    hf, ids = architecture.build(), torch.arange(18).reshape(2, 9) % 97
    model = ws.HookedRecurrentModel(hf)
    layer = model.sites[1].layer

    def run() -> list[torch.Tensor]:
        logits, cache = model.run_with_cache(ids)
        with model.intervene(ws.Delete(0, [0, 2]), positions=[2, 5]), torch.no_grad():
            edited = model(ids)
        logits.square().mean().backward()
        return [logits, edited, cache.state(layer, [3]), cache.write(layer).dense()]

    want = run()
    with accelerator() as found:
        model.to(found.device)
        for one, other in zip(run(), want, strict=True):
            assert one.device == found.device
            torch.testing.assert_close(one.detach().cpu(), other.detach(), rtol=1e-4, atol=1e-4)


def split_in_two(model: ws.HookedRecurrentModel) -> None:
    """Its later layers on a second device; what a layer is given goes there, as accelerate does it."""
    model.to("cuda:0")
    layers = list(model._installed.layers)

    def to(device: str) -> Callable:
        def move(_module, args, kwargs):
            moved = lambda x: x.to(device) if isinstance(x, torch.Tensor) else x  # noqa: E731
            kwargs = {name: moved(x) for name, x in kwargs.items()}
            if isinstance(pair := kwargs.get("position_embeddings"), tuple):
                kwargs["position_embeddings"] = tuple(map(moved, pair))
            return tuple(map(moved, args)), kwargs

        return move

    for layer in layers[len(layers) // 2 :]:
        layer.to("cuda:1").register_forward_pre_hook(to("cuda:1"), with_kwargs=True)
    model.hf_model.model.norm.register_forward_pre_hook(to("cuda:0"), with_kwargs=True)


@pytest.mark.parametrize("name", ["qwen3_5", "rwkv7", "gla"])
def test_layers_on_two_devices(name):
    model = ws.HookedRecurrentModel(architecture_named(name).build())
    ids, last = torch.arange(18).reshape(2, 9) % 97, model.sites[-1].layer
    saes = [new_sae(model, target, layer=layer) for target in ("write", "state") for layer in (0, last)]

    def run() -> list[torch.Tensor]:
        edits = [*map(ws.Substitute, saes), ws.Delete(0), ws.Delete(last, 1)]
        with model.intervene(edits, positions=[2, 5]):
            edited = model(ids)
        codes = [model.encode(sae, ids).values for sae in saes]
        found = ws.gradient(model, ids, ws.Logit(5))
        best = [found[layer].best([4]).norm() for layer in (0, last)]
        return [
            edited,
            *codes,
            *best,
            *(found[layer].price(sae.atom(3)) for layer, sae in zip((0, last), saes, strict=False)),
        ]

    want = run()
    with accelerator():
        split_in_two(model)
        assert [str(model.layer_device(layer)) for layer in (0, last)] == ["cuda:0", "cuda:1"]
        for one, other in zip(run(), want, strict=True):
            torch.testing.assert_close(one.detach().cpu(), other.detach(), rtol=1e-4, atol=1e-4)
        assert [str(sae.b_enc.device) for sae in saes] == ["cuda:0", "cuda:1"] * 2


# Reading and editing -------------------------------------------------------------------------------------------------


def edits(model: ws.HookedRecurrentModel) -> dict[str, object]:
    site = model.sites[0]
    key, value = torch.ones(site.d_key), torch.ones(site.d_value)
    write, two = ws.Write(key, value), ws.Write(key.expand(2, -1), value.expand(2, -1))
    return {
        "delete": ws.Delete(0),
        "add": ws.Add(0, [0, 2], write=write, scale=2.0, relative=True),
        "add one each": ws.Add(0, 1, write=two),
        "replace": ws.Replace(0, 0, write=write),
        "several": [ws.Delete(0, 1), ws.Add(0, 1, write=write)],
        **{f"substitute a {target}": ws.Substitute(new_sae(model, target)) for target in ("write", "delta", "state")},
    }


@pytest.mark.parametrize("name", edits(ws.HookedRecurrentModel(architecture_named("qwen3_5").build())))
def test_every_edit(name, on_cpu, device):
    wherever = [[1, 2], torch.tensor([[1, 4], [0, 3]]), slice(0, 2), None]
    torch.manual_seed(1)
    edit = edits(on_cpu)[name]
    model = ws.HookedRecurrentModel(copy.deepcopy(on_cpu.hf_model), on_cpu.tokenizer)
    ids = torch.arange(14).reshape(2, 7) + 40
    for positions, read in itertools.product(wherever, ("same", "next")):
        if name == "add one each" and not isinstance(positions, list):
            continue
        out = []
        for where in ("cpu", device.device):
            model.to(where)
            with model.intervene(edit, positions=positions, read=read), torch.no_grad():
                out.append(model(ids).cpu())
        torch.testing.assert_close(*out, rtol=1e-4, atol=1e-4)
    with model.intervene(edit, positions=[1, 9]):
        assert model.generate(ids, max_new_tokens=6, do_sample=False).device == device.device


def test_knockouts_and_what_is_read(model, on_cpu, device):
    cut = ws.Knockout(0, [0, 2], sources=[0, 1], targets=[3, 9])
    ids = torch.arange(14).reshape(2, 7) + 40
    out = []
    for each in (model, on_cpu):
        with each.intervene(cut), torch.no_grad():
            out.append(each.generate(ids, max_new_tokens=6, min_new_tokens=6, do_sample=False).cpu())
    assert torch.equal(*out)
    waits = []
    for targets in ([3], list(range(2, 7))):
        with model.intervene(ws.Knockout(0, sources=[0, 1], targets=targets)), torch.no_grad():
            before = device.n_waits
            model(ids)
            waits.append(device.n_waits - before)
    assert waits[0] == waits[1] <= 2, device.waits
    of = ws.Logit(5, minus=7)
    for each in (
        lambda m: ws.direct_attribution(m, TEXTS[0], of, by="token").contribution,
        lambda m: ws.pattern(m, TEXTS[0], 0, 1, of=of).grid,
        lambda m: ws.pattern(m, TEXTS[0], 0, 1).grid,
        lambda m: ws.knockout_sweep(m, TEXTS[0], of, sources=0).grid,
    ):
        torch.testing.assert_close(each(model), each(on_cpu), rtol=1e-3, atol=1e-4)


def test_hooks_caches_and_texts(model, device):
    double = lambda value, hook: 2 * value  # noqa: E731
    pairs = [(("k", 0), double), (("write", 1), lambda write, hook: write * 2.0), ("blocks.0.hook_resid_post", double)]
    assert model.run_with_hooks(TEXTS, pairs, return_type="loss", loss_per_token=True).device == device.device
    where = []
    with model.hooks([(("state", 0), lambda s, hook: where.append(hook.positions.device) or s * 1.1)],
                     state_positions=[1, 2]):  # fmt: skip
        model(TEXTS)
    assert set(where) == {device.device}
    _, cache = model.run_with_cache(TEXTS)
    assert cache.state(0, [0, 2]).device == cache["k", 0].device == device.device
    assert model.run_with_cache(TEXTS, device="cpu")[1].state(0, [1]).device == torch.device("cpu")
    assert model.to_str_tokens("hello there") and model.to_string(model.to_tokens("hello")[0]) == ["hello"]
    assert all(isinstance(text, str) for text in model.generate(TEXTS, max_new_tokens=3, num_beams=2))


def test_reading_with_an_sae(model, device):
    for target, sparsity in (("write", "topk"), ("delta", "gated"), ("state", "jumprelu")):
        sae = new_sae(model, target, sparsity=sparsity)
        codes = model.encode(sae, TEXTS)
        assert codes.values.device == sae.b_enc.device == device.device
        assert codes.fired.device == device.device and "Codes" in repr(codes)
        found = ws.top_contexts(model, new_sae(model, target), [heldout_documents()[0][:600]], n=2, context=64)
        assert found.table(found.most_frequent(1)[0])
    _, cache = model.run_with_cache(TEXTS)
    with pytest.raises(ValueError, match=r"this SAE is on cpu, and what it is to read on mps:0: .*sae.to\('mps:0'\)"):
        new_sae(model, "write").encode(cache.write(0)[:, :, 0])


def test_gradients(model, device):
    found = ws.gradient(model, TEXTS[0], ws.Logit(5, minus=7))
    layer = found[0]
    assert layer.at_fixed_scale.output.device == layer.best([1, 2]).key.device == device.device
    assert layer.effect(0, torch.tensor([[1, 2]]), layer.write[:, 1:3, 0]).device == device.device
    sae = new_sae(model, "write")
    assert layer.prices(0, sae.decoder).device == device.device
    assert ws.attribute(model, TEXTS[0], " the", saes=[sae], deletions=True).numbers


@pytest.mark.parametrize("target", ["write", "delta", "state"])
def test_stores_and_training(target, model, device, tmp_path):
    ids = torch.cat([model.to_tokens(text)[0][0, :192].reshape(-1, 32) for text in heldout_documents()[:2]])
    store = ws.extract(model, ids, [(0, 0)], tmp_path / "store", progress=False)
    few = dict(n_atoms=16, k=2, steps=2, progress=False, held_out=0.2)
    for sparsity in ("topk", "batch_topk", "jumprelu", "gated"):
        out = tmp_path / sparsity
        made = ws.train_store(store, target=target, sparsity=sparsity, out=out, device=device.device, **few)
        assert made[0, 0].b_enc.device == device.device
    for variant in ("TiedSAE", "FlatSAE"):
        ws.train_store(store, target=target, variant=variant, device=device.device, **few)
    sae = ws.train_site(model, ids, 0, 0, target=target, **few)
    assert sae.b_enc.device == device.device  # without device=, where the model is
    loaded = ws.WriteSAE.from_pretrained(sae.save_pretrained(tmp_path / "sae"))
    assert loaded.fingerprint() == sae.fingerprint()
    assert ws.WriteSAE.from_pretrained(tmp_path / "sae", device="auto").b_enc.device.type == "mps"


# What is made of them ------------------------------------------------------------------------------------------------

TINY = Sizes(firings=4, population=1, classes=1500, logit=4, deletions=8, erase=4, signs=6, prompts=1, tokens=8)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_with_saes_on_the_cpu(name, model, device):
    sae, texts = ws.WriteSAE.from_pretrained(shipped_saes("tiny-gdn")[0]), [text[:5000] for text in heldout_documents()]
    task, *_ = tasks_of(Asked(model, [sae], texts[:6], TINY, other_seeds=[copy.deepcopy(sae)]), [name])
    result = task.run(progress=None, **task.settings)
    assert result.numbers and len(result.records())
    if name not in ("seed_stability", "attribution_test", "sign_test", "install"):
        assert sae.b_enc.device == device.device


def test_the_report(model, tmp_path):
    texts = [text[:2500] for text in heldout_documents()[:6]]
    outcomes = ws.reproduce(model, [copy.deepcopy(part())], texts, tmp_path, sizes=TINY, only=["atom_classes"])
    assert [outcome.error for outcome in outcomes] == [None] and (tmp_path / "report.html").exists()


def test_pages(model, tmp_path):
    texts = [text[:700] for text in heldout_documents()[:3]]
    index = ws.write_pages(model, copy.deepcopy(part()), texts, tmp_path, atoms=1, neuronpedia=True)
    assert index.exists()


# Waiting -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["write", "state"])
def test_no_edit_waits_at_each_token(target, model, device):
    edit, ids = ws.Substitute(new_sae(model, target)), torch.arange(48).reshape(2, 24) + 40
    counts = []
    for n in (2, 20):
        with model.intervene(edit, positions=list(range(n)), check_model=False):
            before = device.n_waits
            model(ids)
            counts.append(device.n_waits - before)
    assert counts[0] == counts[1] <= 4, device.waits


def test_a_test_of_many_firings_waits_no_longer_for_each(model, device):
    sae, text = copy.deepcopy(part(shipped_saes("tiny-gdn")[0])), [text[:4000] for text in heldout_documents()[:6]]
    counts = []
    for n in (8, 24):
        before = device.n_waits
        ws.replacement_test(model, sae, text, n_firings=n, batch_size=32, horizon=4)
        counts.append(device.n_waits - before)
    assert counts[1] - counts[0] < 16, (counts, device.waits)


# Loading -------------------------------------------------------------------------------------------------------------


def test_a_device_by_name():
    with pytest.raises(ValueError, match=r"device='cuda': there is cpu \(torch finds no accelerator.*'auto' takes"):
        ws.HookedRecurrentModel.from_pretrained("no/such", device="cuda")  # before it is looked for
    with pytest.raises(ValueError, match="device='gpu': there is cpu"):
        ws.WriteSAE.from_pretrained("no/such", device="gpu")
    assert device_named("auto") == torch.device("cpu")
    with accelerator("cuda"):
        assert device_named("auto").type == "cuda" and device_named("cuda:1").index == 1
        for wrong in ("cuda:2", "mps"):
            with pytest.raises(ValueError, match=f"device='{wrong}': there is cpu, cuda, cuda:0, cuda:1;"):
                device_named(wrong)


def test_a_dtype_by_name():
    assert dtype_named("bfloat16") == dtype_named(torch.bfloat16) == torch.bfloat16 and dtype_named("auto") == "auto"
    with pytest.raises(ValueError, match="dtype='float8': allowed are float32, bfloat16, float16, float64, and 'auto'"):
        ws.HookedRecurrentModel.from_pretrained("no/such", dtype="float8")
    with accelerator("mps"), pytest.raises(ValueError, match="mps has no float64"):
        ws.HookedRecurrentModel.from_pretrained("no/such", dtype="float64", device="auto")


def test_a_quantised_checkpoint_is_loaded_where_it_stays(monkeypatch):
    seen = {}
    monkeypatch.setattr("writesae.model.hooked.load_model", lambda source, **given: seen.update(given) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ws.HookedRecurrentModel.from_pretrained("x", device="cpu", quantization_config=object())
    assert seen["device_map"] == {"": torch.device("cpu")}


COMMANDS = {
    "hooks": ["hooks", "tiny-gdn"],
    "demo": ["demo"],
    "extract": ["extract", "tiny-gdn", "out", "--site", "0.0", "--text", "."],
    "train": ["train", "tiny-gdn", "out", "--site", "0.0", "--text", "."],
    "contexts": ["contexts", "tiny-gdn/L2H1"],
    "pages": ["pages", "tiny-gdn/L2H1"],
    "reproduce": ["reproduce", "--model", "tiny-gdn"],
    "check": ["check", "tiny-gdn"],
    "evaluate": ["evaluate", "tiny-gdn", "tiny-gdn/L2H1"],
    "serve": ["serve", "tiny-gdn/L2H1"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_that_loads_a_model_takes_device_dtype_and_kernels(command):
    dtype = "--model-dtype" if command == "extract" else "--dtype"
    for option, value in (("--device", "cuda:7"), (dtype, "float9"), ("--kernels", "ours")):
        if (command, option) == ("hooks", "--kernels"):  # which runs nothing
            continue
        result = CliRunner().invoke(app, [*COMMANDS[command], option, value])
        assert result.exit_code == 1 and f"'{value}'" in result.output.replace("\n", " "), result.output
