"""Reading with an SAE: codes equal the dense encoder's, whatever the pass; contexts equal a search by hand.

Every comparison goes through `assert_close`; twins break one thing that it must notice.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache
from typer.testing import CliRunner

import brute_force as bf
import writesae as ws
import writesae.zoo
from architectures import D_KEY, N_VOCAB, Architecture, architecture_named, each_architecture, each_rule
from writesae import HookedRecurrentModel, SAEConfig, States, Substitute, WriteSAE, top_contexts
from writesae.cli import app
from writesae.hooks.names import inputs
from writesae.saes.activity.contexts import EDGES
from writesae.saes.activity.reading import encode_matrices, target_of

LAYER, HEAD = 3, 2
N_POS = 150  # three blocks of positions
VARIANTS = list(
    itertools.product(
        ("tied", "bilinear", "dense"), ("topk", "batch_topk", "jumprelu", "gated"), ("rank 1", "rank 2", "dense")
    )
)
by_variant = pytest.mark.parametrize(("encoder", "sparsity", "decoder"), VARIANTS)
GDN = architecture_named("qwen3_5")


@functools.cache
def hooked(a: Architecture) -> HookedRecurrentModel:
    return HookedRecurrentModel(a.build())


@functools.cache
def seen(a: Architecture) -> tuple[Tensor, Any]:
    """Tokens and the cache of a pass."""
    ids = random_ids(2, N_POS)
    with torch.no_grad():
        return ids, hooked(a).run_with_cache(ids, names=inputs(hooked(a).family(LAYER).rule, LAYER))[1]


@functools.cache
def states(a: Architecture) -> Tensor:
    """All of one head, built, ``[batch, pos, d_key, d_value]``."""
    return seen(a)[1].state(LAYER, range(N_POS), heads=[HEAD])[:, :, 0]


def random_ids(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, N_VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def make(
    d_value: int,
    target: str = "state",
    encoder="bilinear",
    sparsity="topk",
    decoder="rank 1",
    seed: int = 0,
    **more: Any,
) -> WriteSAE:
    """An SAE in which no parameter is trivial and a few atoms are active."""
    torch.manual_seed(seed)
    rank = 0 if decoder == "dense" else min(int(decoder[-1]), d_value)
    kinds: dict[str, Any] = dict(decoder="factored", rank=rank) if rank else dict(decoder="dense")
    place: dict[str, Any] = dict(layer=LAYER, head=HEAD) | more
    values: dict[str, Any] = dict(encoder=encoder, sparsity=sparsity, target=target) | kinds | place
    sae = WriteSAE(SAEConfig(**dict(d_key=D_KEY, d_value=d_value, n_atoms=24, k=3) | values))
    with torch.no_grad():
        sae.b_enc.normal_(std=0.02)
        if sae.mean is not None:
            sae.mean.normal_(std=0.02)
        if sparsity == "batch_topk":
            sae.threshold.fill_(0.05)
        if sparsity == "jumprelu":
            sae.log_threshold.normal_(std=0.3).sub_(3.0)
        if sparsity == "gated":
            sae.r_mag.normal_(std=0.3)
            sae.b_mag.normal_(std=0.02)
    return sae


def assert_close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-5) -> float:
    assert ours.shape == theirs.shape and (theirs > 0).any() and (theirs == 0).any()
    difference = (ours - theirs).abs().max().item()
    assert difference <= tolerance * max(1.0, theirs.max().item()), f"not close: activations differ by {difference:.2e}"
    return difference


SMALL = 2**15  # a block: 64 positions of two sequences


# Codes ---------------------------------------------------------------------------------------------------------------


@by_variant
@each_rule
@torch.no_grad()
def test_states_are_read_as_the_dense_encoder_reads_them(
    architecture: Architecture, encoder: str, sparsity: str, decoder: str
) -> None:
    sae, (ids, cache) = make(architecture.d_value, "state", encoder, sparsity, decoder), seen(architecture)
    values, indices = encode_matrices(sae, *target_of(cache, LAYER, HEAD, "state"), block=SMALL)
    assert (values.diff(dim=-1) <= 0).all() and (values >= 0).all()
    codes = ws.Codes(values, indices, ids, cache.positions, sae.cfg)
    assert_close(codes.dense(), sae.encode(states(architecture)))


@each_architecture
@torch.no_grad()
def test_encode(architecture: Architecture) -> None:
    """From tokens, every target, every architecture."""
    ids, cache = seen(architecture)
    write, delta = cache.write(LAYER)[:, :, HEAD], cache.delta(LAYER)[:, :, HEAD]
    for target, dense in (("write", write.dense()), ("delta", delta.dense()), ("state", states(architecture))):
        sae = make(architecture.d_value, target)
        codes = hooked(architecture).encode(sae, ids)
        expected = sae.encode(dense)
        assert_close(codes.dense(), expected)
        often = int(codes.fired.argmax())
        torch.testing.assert_close(codes.atom(often), expected[..., often], atol=1e-5, rtol=0)
        assert torch.equal(codes.fired, (codes.dense() > 0).flatten(0, 1).sum(0))
        assert torch.equal(codes.tokens, ids) and torch.equal(codes.positions, torch.arange(N_POS).expand(2, -1))
        assert codes.values.shape == (2, N_POS, 3) and not codes.values.requires_grad


def test_encode_keeps_no_gradient() -> None:
    assert not hooked(GDN).encode(make(GDN.d_value), seen(GDN)[0]).values.requires_grad


@each_rule
@torch.no_grad()
def test_a_wrong_stream_is_noticed(architecture: Architecture) -> None:
    """The native write in place of the delta where something is erased; no decay for one, and one for none."""
    sae, (ids, cache) = make(architecture.d_value), seen(architecture)
    found, _ = target_of(cache, LAYER, HEAD, "state")
    assert isinstance(found, States)
    broken = []
    if architecture.rule.erase is not None:
        broken.append(States(cache.write(LAYER)[:, :, HEAD], found.log_decay))
    broken.append(States(found.gain, found.log_decay * 0 if found.log_decay.any() else found.log_decay - 0.1))
    for x in broken:
        codes = ws.Codes(*encode_matrices(sae, x), ids, cache.positions, sae.cfg)
        with pytest.raises(AssertionError, match="not close"):
            assert_close(codes.dense(), sae.encode(states(architecture)))


@each_rule
@pytest.mark.parametrize("target", ["write", "delta", "state"])
@torch.no_grad()
def test_a_padded_batch_gives_each_sequence_what_it_gives_alone(architecture: Architecture, target: str) -> None:
    model = hooked(architecture)
    sae = make(architecture.d_value, target, sparsity="jumprelu")
    sae.b_enc += 0.3
    sae.log_threshold.fill_(-1.2)  # about 0.3: the bias alone makes atoms fire, at padding too
    rows = [random_ids(n, seed=n) for n in (40, 7, 90, 1)]
    ids, mask = (torch.zeros(4, 90, dtype=torch.long) for _ in range(2))
    for i, row in enumerate(rows):
        ids[i, 90 - len(row) :], mask[i, 90 - len(row) :] = row, 1
    everyone = [model.encode(sae, row) for row in rows]
    for batch_size in (8, 2):
        codes = model.encode(sae, ids, attention_mask=mask, batch_size=batch_size)
        assert torch.equal(codes.tokens, ids) and codes.n_tokens == 138
        for i, (row, alone) in enumerate(zip(rows, everyone, strict=True)):
            assert_close(codes.dense()[i, 90 - len(row) :], alone.dense()[0])
            assert torch.equal(codes.positions[i, 90 - len(row) :], alone.positions[0])
            assert not codes.values[i, : 90 - len(row)].any() and (codes.positions[i, : 90 - len(row)] == -1).all()
    unmasked = model.encode(sae, ids).dense()
    with pytest.raises(AssertionError, match="not close"):
        assert_close(unmasked[0, 50:], everyone[0].dense()[0])


def test_padding_on_the_right() -> None:
    model, sae = hooked(GDN), make(GDN.d_value)
    ids, mask = random_ids(2, 30), torch.ones(2, 30, dtype=torch.long)
    mask[0, 20:] = 0
    codes = model.encode(sae, ids, attention_mask=mask)
    assert_close(codes.dense()[:1, :20], model.encode(sae, ids[:1, :20]).dense())
    assert not codes.values[0, 20:].any()


@each_rule
@torch.no_grad()
def test_a_sequence_in_pieces(architecture: Architecture) -> None:
    """The state before the second piece is not zero."""
    model = hooked(architecture)
    for target in ("delta", "state"):
        sae, ids = make(architecture.d_value, target), random_ids(2, 80)
        cache, parts = DynamicCache(config=model.config), []
        for piece in ids.split([33, 47], 1):
            parts.append(model.encode(sae, piece, past_key_values=cache).dense())
        whole = model.encode(sae, ids).dense()
        assert_close(torch.cat(parts, 1), whole)
        if target == "state":
            with pytest.raises(AssertionError, match="not close"):
                assert_close(model.encode(sae, ids[:, 33:]).dense(), whole[:, 33:])


@each_rule
@torch.no_grad()
def test_inside_an_intervention(architecture: Architecture) -> None:
    """Edits are in the states, hooks on the write in the writes."""
    model, sae, ids = hooked(architecture), make(architecture.d_value), random_ids(2, 60)
    before = model.encode(sae, ids).dense()
    edits = [ws.Delete(LAYER, [1, HEAD]), ws.Add(LAYER, write=sae.atom(3), scale=2, relative=True)]
    with model.intervene(edits, positions=[5, 30]):
        codes = model.encode(sae, ids).dense()
        _, cache = model.run_with_cache(ids)
        assert_close(codes, sae.encode(cache.state(LAYER, range(60), heads=[HEAD])[:, :, 0]))
    assert_close(codes[:, :5], before[:, :5])
    assert (codes - before).abs().max() > 0.1


class Shapes(TorchDispatchMode):
    """Notes the shape of every tensor that is computed while the block runs."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.seen += [tuple(x.shape) for x in (out if isinstance(out, tuple) else (out,)) if isinstance(x, Tensor)]
        return out


def test_a_hook_that_changes_the_state_is_refused() -> None:
    model, sae, ids = hooked(GDN), make(GDN.d_value), random_ids(1, 9)
    name = f"blocks.{LAYER}.mixer.hook_state"
    with (
        model.hooks([(name, lambda S, hook: S * 0.5)], state_positions=[4]),
        pytest.raises(ValueError, match="a hook on the state of layer 3 changes it"),
    ):
        model.encode(sae, ids)


@each_rule
@torch.no_grad()
def test_neither_all_pre_activations_nor_states_are_held(architecture: Architecture) -> None:
    """As torch sees it: shapes of all that is computed. The twin takes everything as one block."""
    if architecture.d_value == 1:
        pytest.skip("a state of one column has the shape of a key")
    sae, (_, cache) = make(architecture.d_value), seen(architecture)
    x = target_of(cache, LAYER, HEAD, "state")
    for block in (SMALL, 2**30):
        with Shapes() as shapes:
            encode_matrices(sae, *x, block=block)
        for of_each, is_built in (
            ((sae.cfg.n_atoms,), True), ((D_KEY, architecture.d_value), architecture.rule.decay_per_key)
        ):  # fmt: skip
            at_once = max((shape[1] for shape in shapes.seen if shape[:1] == (2,) and shape[2:] == of_each), default=0)
            assert (at_once <= 64) if block == SMALL else (at_once >= N_POS) == is_built
            assert (at_once > 0) == is_built


def test_a_state_is_read_as_wide_as_the_widest_block() -> None:
    """With a threshold, blocks differ in how many atoms are active."""
    sae, x = make(GDN.d_value, "write", sparsity="jumprelu"), torch.randn(1, 5, D_KEY, GDN.d_value)
    x[:, :3] *= 0.1
    values, indices = encode_matrices(sae, x, block=1)
    expected, _ = sae.topk(x)
    assert values.shape == expected.shape == indices.shape
    torch.testing.assert_close(values, expected)


def test_codes_say_what_they_are() -> None:
    codes = hooked(GDN).encode(make(GDN.d_value, "write"), random_ids(2, 9))
    assert repr(codes).startswith("Codes(2 sequences, 18 tokens: 3.0 of 24 atoms active per token")
    with pytest.raises(IndexError, match="atom 24: this SAE has atoms 0 to 23"):
        codes.atom(24)


@pytest.mark.parametrize("name", ["tiny-gdn", "tiny-mamba2", "tiny-rwkv7"])
@torch.no_grad()
def test_the_shipped_models(name: str) -> None:
    model, texts = HookedRecurrentModel.from_pretrained(name), ["The state of the Union is strong.", "Call me Ishmael."]
    shipped = WriteSAE.from_pretrained(ws.zoo.shipped_saes(name)[0])
    layer, head = shipped.cfg.layer, shipped.cfg.head
    assert layer is not None and head is not None
    sizes = dict(d_key=shipped.cfg.d_key, d_value=shipped.cfg.d_value, n_atoms=256, k=4, layer=layer, head=head)
    both = WriteSAE(SAEConfig(**sizes, target="state", encoder="bilinear", rank=2))  # type: ignore[arg-type]
    for sae in (shipped, both):
        codes = model.encode(sae, texts)
        for i, text in enumerate(texts):
            _, cache = model.run_with_cache(text)
            n_pos = cache.positions.shape[1]
            dense = cache.state(layer, range(n_pos), heads=[head])[:, :, 0]
            expected = sae.encode(cache.write(layer)[:, :, head].dense() if sae is shipped else dense)
            assert_close(codes.dense()[i : i + 1, -n_pos:], expected)


# Contexts ------------------------------------------------------------------------------------------------------------


def search(codes: Tensor, ids: Tensor, atom: int, n: int, context: int) -> list[tuple[float, int, int]]:
    """By hand: activation, document and position of the strongest firing of each window, the strongest first."""
    found = []
    for document, row in enumerate(codes[..., atom].tolist()):
        for start in range(0, len(row), context):
            window = row[start : start + context]
            best = max(window)
            if best > 0:
                found.append((best, document, start + window.index(best)))
    return sorted(found, key=lambda firing: -firing[0])[:n]


@pytest.mark.parametrize("sparsity", ["topk", "jumprelu"])
@pytest.mark.parametrize(("batch_size", "context"), [(1, 30), (4, 30), (3, 26)])
@torch.no_grad()
def test_contexts_are_what_a_search_by_hand_finds(batch_size: int, context: int, sparsity: str) -> None:
    model, sae, ids = hooked(GDN), make(GDN.d_value, "write", sparsity=sparsity), random_ids(5, 90)
    parts = [model.encode(sae, part).dense() for part in ids.split(context, 1)]
    codes = torch.cat(parts, 1)
    found = top_contexts(
        model, sae, ids, n=4, before=3, after=2, batch_size=batch_size, context=context, progress=False
    )
    assert (found.n_documents, found.n_tokens) == (5, 450)
    assert torch.equal(found.fired, (codes > 0).flatten(0, 1).sum(0))
    for atom in range(24):
        expected = search(codes, ids, atom, 4, context)
        assert [(c.document, c.position) for c in found[atom]] == [(d, p) for _, d, p in expected]
        for c, (value, document, position) in zip(found[atom], expected, strict=True):
            assert c.activation == pytest.approx(value, abs=1e-6)
            start = position // context * context
            first, last = max(start, position - 3), min(start + context, position + 3, 90)
            around = [str(i) for i in ids[document, first:last].tolist()]  # without a tokenizer, ids
            assert [*c.before, c.token, *c.after] == around and len(c.before) == position - first
            assert c.activations == pytest.approx(codes[document, first:last, atom].tolist(), abs=1e-6)
        active = codes[..., atom][codes[..., atom] > 0]
        assert torch.equal(found.histogram[atom], torch.bucketize(active, EDGES).bincount(minlength=len(EDGES) + 1))


def test_equal_firings_stay_in_the_order_of_the_corpus() -> None:
    model, sae = hooked(GDN), make(GDN.d_value, "write")
    ids = random_ids(1, 20).expand(7, -1)
    for batch_size in (1, 3, 7):
        found = top_contexts(model, sae, ids, n=3, batch_size=batch_size, progress=False)
        for atom in found.most_frequent(5):
            assert [c.document for c in found[atom]] == [0, 1, 2]
            assert len({c.position for c in found[atom]}) == 1


def test_contexts_of_some_atoms() -> None:
    model, sae, ids = hooked(GDN), make(GDN.d_value, "write"), random_ids(5, 40)
    everything = top_contexts(model, sae, ids, progress=False)
    some = top_contexts(model, sae, iter(ids), atoms=[7, 3, 7], progress=False)
    assert some.atoms.tolist() == [7, 3] and some[7] == everything[7] and some[3] == everything[3]
    assert "(2 of 2 atoms fired in 200 tokens" in repr(some)
    with pytest.raises(IndexError, match=r"atom 4 was not looked for; top_contexts was asked for 7, 3$"):
        some[4]
    with pytest.raises(IndexError, match="atom 24: this SAE has atoms 0 to 23"):
        top_contexts(model, sae, ids, atoms=[3, 24], progress=False)
    with pytest.raises(ValueError, match=r"atoms=\[\]: name at least one"):
        top_contexts(model, sae, ids, atoms=[], progress=False)


@pytest.fixture(scope="module")
def tiny() -> tuple[HookedRecurrentModel, WriteSAE]:
    return HookedRecurrentModel.from_pretrained("tiny-gdn"), WriteSAE.from_pretrained("tiny-gdn/L2H1")


def text_of(table: Any) -> str:
    from rich.console import Console

    console = Console(width=200)
    with console.capture() as captured:
        console.print(table)
    return captured.get()


def test_contexts_of_texts(tiny: tuple[HookedRecurrentModel, WriteSAE]) -> None:
    model, sae = tiny
    texts = ["The state of the Union is strong, and the people are free.", "", "Call me Ishmael.\nSome years ago, ..."]
    found = top_contexts(model, sae, texts, n=2, progress=False)
    assert found.n_documents == 3 and found.n_tokens == sum(len(model.to_str_tokens(t)) for t in texts if t)
    atom = int(model.encode(sae, texts[2]).indices[0, 7, 0])
    context = next(c for c in found[atom] if c.document == 2)
    strings = model.to_str_tokens(texts[2])
    assert context.token == strings[context.position] and list(context.before) == strings[: context.position][-16:]
    assert f"«{context.token}»".replace("\n", "⏎") in text_of(found.table(atom))
    never = int((found.fired == 0).nonzero()[0])
    assert found[never] == [] and f"atom {never} never fires in {found.n_tokens} tokens" in found.about(never)
    read = json.loads(json.dumps(found.to_dict()))
    assert read["n_tokens"] == found.n_tokens and read["sae"]["n_atoms"] == 2048
    assert read["atoms"][atom]["contexts"][0]["token"] == found[atom][0].token
    assert read["atoms"][atom]["fired"] == found.fired[atom] and sum(read["atoms"][atom]["histogram"]) > 0


# Atoms of every kind in edits ----------------------------------------------------------------------------------------

KINDS = [
    ("write", "bilinear", "topk", "rank 2"),
    ("write", "dense", "jumprelu", "dense"),
    ("delta", "tied", "gated", "dense"),
    ("state", "bilinear", "batch_topk", "rank 2"),
    ("state", "dense", "batch_topk", "dense"),
    ("state", "tied", "topk", "rank 1"),
]


def by_hand(sae: WriteSAE, norm: str) -> Any:
    """The SAE's strongest atom for the native write, by dense matrices."""
    atoms = sae.atom(torch.arange(sae.cfg.n_atoms)).dense().detach().double()

    def fn(now: bf.Now, i: int) -> Tensor:
        codes = sae.encode(getattr(now, sae.cfg.target).float()).double()
        if not (codes > 0).any():
            return torch.zeros_like(now.write)
        atom = atoms[codes.argmax()]
        return atom * (codes.max() if norm == "code" else now.write.norm() / atom.norm()) - now.write

    return fn


@pytest.mark.parametrize("kind", KINDS, ids="-".join)
@each_rule
@torch.no_grad()
def test_atoms_of_every_kind_in_edits_are_what_brute_force_says(
    architecture: Architecture, kind: tuple[str, ...]
) -> None:
    model, sae, ids = hooked(architecture), make(architecture.d_value, *kind), random_ids(1, 24, seed=4)
    positions, atom = [2, 3, 9, 17], sae.atom(5).dense()
    cases = [
        (model.intervene(Substitute(sae), positions=positions), by_hand(sae, "code")),
        (model.intervene(Substitute(sae, norm="native"), positions=positions, read="next"), by_hand(sae, "native")),
        (model.intervene(sae, atom=5, scale=2, positions=positions), bf.add(atom, relative=2)),
    ]
    reads = ("same", "next", "same")
    edits = [[bf.DenseEdit(LAYER, HEAD, fn, positions, read=r)] for (_, fn), r in zip(cases, reads, strict=True)]
    expected = bf.brute_force(architecture, architecture.build(), ids.expand(4, -1), [*edits, []])
    for (attached, _), logits in zip(cases, expected[:3], strict=True):
        with attached:
            ours = model(ids)[0]
        assert (ours - logits).abs().max() <= 1e-4 and (logits - expected[3]).abs().max() > 1e-3


def test_where_no_atom_fires_the_native_write_stays() -> None:
    sae, ids = make(GDN.d_value, "write", sparsity="batch_topk", decoder="rank 2"), random_ids(1, 24)
    sae.threshold.fill_(1e9)
    with torch.no_grad(), hooked(GDN).intervene(Substitute(sae)):
        edited = hooked(GDN)(ids)
    with torch.no_grad():
        torch.testing.assert_close(edited, hooked(GDN)(ids), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "kind", [("write", "bilinear", "topk", "rank 2"), ("state", "dense", "jumprelu", "dense")], ids="-".join
)
def test_the_replacement_test_with_every_kind_of_atom(
    tiny: tuple[HookedRecurrentModel, WriteSAE], kind: tuple[str, ...]
) -> None:
    model, shipped = tiny
    sae = make(shipped.cfg.d_value, *kind, layer=2, head=0, d_key=shipped.cfg.d_key)
    result = ws.replacement_test(model, sae, ws.zoo.heldout_documents()[:3], n_firings=3, context=32, horizon=2)
    assert result.n == 3 and (result.activation > 0).all() and (result.score("atom") > 0).all()
    assert (result.cosine.abs() <= 1 + 1e-5).all()


# What goes wrong -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("read", [HookedRecurrentModel.encode, functools.partial(top_contexts, progress=False)])
def test_an_sae_that_does_not_fit(read: Any) -> None:
    model, ids = hooked(GDN), random_ids(2, 5)
    with pytest.raises(ValueError, match=r"does not say its layer and head; if you know them: sae.cfg = "):
        read(model, make(GDN.d_value, layer=None), ids)
    other = make(GDN.d_value, fingerprint="0" * 16)
    with pytest.raises(ValueError, match=r"the weights of that layer here are others.*check_model=False"):
        read(model, other, ids)
    read(model, other, ids, check_model=False)
    with pytest.raises(ValueError, match=r"text needs a tokenizer: .* or pass token ids"):
        read(model, make(GDN.d_value), "The state")
    with pytest.raises(ValueError, match="no threshold yet"):
        sae = make(GDN.d_value, sparsity="batch_topk")
        sae.threshold.fill_(float("nan"))
        read(model, sae, ids)


@pytest.mark.parametrize("texts", [[], [""], iter(())])
def test_an_empty_corpus(tiny: tuple[HookedRecurrentModel, WriteSAE], texts: Any) -> None:
    with pytest.raises(ValueError, match="no text: top_contexts needs at least one that is not empty"):
        top_contexts(*tiny, texts, progress=False)


@pytest.mark.parametrize("given", [{"n": 0}, {"before": -1}, {"after": -1}, {"batch_size": 0}, {"context": 0}])
def test_sizes_that_make_no_sense(given: dict[str, int]) -> None:
    ((name, number),) = given.items()
    with pytest.raises(ValueError, match=f"{name}={number}: must be at least"):
        top_contexts(hooked(GDN), make(GDN.d_value), random_ids(2, 5), **given)  # type: ignore[arg-type]


# The command line ----------------------------------------------------------------------------------------------------

runner = CliRunner(env={"COLUMNS": "200", "TERM": "dumb"})


def test_the_command(tmp_path: Any, tiny: tuple[HookedRecurrentModel, WriteSAE]) -> None:
    model, sae = tiny
    text = "The state of the Union is strong, and the people are free."
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    codes = model.encode(sae, text)
    fires, never = int(codes.indices[0, 3, 0]), int((codes.fired == 0).nonzero()[0])
    command = ["contexts", "tiny-gdn/L2H1", "--text", str(tmp_path / "a.txt")]
    result = runner.invoke(app, [*command, "--atom", str(fires), "--atom", str(never), "-n", "3"])
    assert result.exit_code == 0, result.output
    assert f"atom {fires} fires" in result.output and "«" in result.output
    assert f"atom {never} never fires in {codes.n_tokens} tokens" in result.output
    most = runner.invoke(app, command)
    assert most.exit_code == 0 and most.output.count("«» where it fires") == 5


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["tiny-gdn/none"], "no SAE tiny-gdn/none is shipped"),
        (["tiny-gdn/L2H1", "--text", "no-such-file"], "no-such-file does not exist"),
        (["tiny-gdn/L2H1", "--atom", "2048"], "atom 2048: this SAE has atoms 0 to 2047"),
        (["tiny-gdn/L2H1", "--model", "tiny-rwkv7"], "this SAE "),
    ],
)
def test_wrong_input_is_one_clear_line(arguments: list[str], says: str) -> None:
    result = runner.invoke(app, ["contexts", *arguments])
    assert result.exit_code == 1 and says in result.output and "Traceback" not in result.output


def test_an_sae_without_a_model_says_so(tmp_path: Any, tiny: tuple[HookedRecurrentModel, WriteSAE]) -> None:
    sae = WriteSAE(dataclasses.replace(tiny[1].cfg, model_id=None))
    sae.save_pretrained(tmp_path)
    result = runner.invoke(app, ["contexts", str(tmp_path)])
    assert result.exit_code == 1 and "does not say which model it is of: give --model" in result.output
