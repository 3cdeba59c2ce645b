"""Whole SAEs in the place of what they read; several atoms at once, and strengths for each row of a batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import writesae as ws
from architectures import ARCHITECTURES, N_VOCAB, Architecture
from edit_cases import annotations_unchecked, random_sae, random_write
from writesae import Add, HookedRecurrentModel, Recode, Replace, SAEConfig, WriteSAE

FIRST = ARCHITECTURES[0]


@pytest.fixture(scope="module")
def model() -> HookedRecurrentModel:
    return HookedRecurrentModel(FIRST.build())


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(N_VOCAB, (3, 20), generator=torch.Generator().manual_seed(0))


def made(target: str = "write", **given: Any) -> WriteSAE:
    """Trained on nothing, with atoms that fire."""
    torch.manual_seed(1)
    a = FIRST
    cfg = SAEConfig(16, a.d_value, n_atoms=24, **{"k": 5, "layer": 1, "head": 2, "target": target, **given})
    sae = WriteSAE(cfg)
    with torch.no_grad():
        sae.b_enc.normal_(std=0.02)
        for constant in (sae.mean, getattr(sae, "b_dec", None)):
            if constant is not None:
                constant.normal_(std=0.02)
        if cfg.sparsity == "batch_topk":
            sae.threshold.fill_(0.05)
        if cfg.sparsity == "jumprelu":
            sae.log_threshold.fill_(-3.0)
    return sae


KINDS: dict[str, dict[str, Any]] = {
    "topk": {},
    "batch_topk": {"sparsity": "batch_topk"},
    "jumprelu": {"sparsity": "jumprelu"},
    "gated": {"sparsity": "gated"},
    "rank 2": {"rank": 2},
    "dense": {"decoder": "dense"},
    "with a bias": {"decoder_bias": True, "center": True},
    "many": {"k": 24},
}


def changed(codes: Tensor, ablate: Any = (), scale: Any = None, clamp: Any = None) -> Tensor:
    new = codes.clone()
    new[..., list(ablate)] = 0
    for atom, factor in (scale or {}).items():
        new[..., atom] = codes[..., atom] * factor
    for atom, value in (clamp or {}).items():
        new[..., atom] = torch.where(codes[..., atom] > 0, value, 0.0)
    return new


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("error_term", [False, True])
@torch.no_grad()
def test_any_sae_in_the_place_of_a_write(model: HookedRecurrentModel, ids: Tensor, kind: str, error_term: bool) -> None:
    """Against a dense reconstruction put in by a hook; and that would be seen if an atom were not changed."""
    sae = made(**KINDS[kind])
    _, cache = model.run_with_cache(ids, names=[("write", 1)])
    X = cache.write(1)[:, :, 2].dense()
    codes = sae.encode(cache.write(1)[:, :, 2])
    assert float((codes > 0).float().sum(-1).mean()) > 2
    active = [int(i) for i in (codes > 0).sum((0, 1)).topk(3).indices]
    changes: dict[str, Any] = {"ablate": active[:1], "scale": {active[1]: -2.0}, "clamp": {active[2]: 0.7}}

    def dense(changes: dict[str, Any]) -> Tensor:
        after = sae.decode(changed(codes, **changes))
        return X + after - sae.decode(codes) if error_term else after

    def by_hand(matrix: Tensor) -> Tensor:
        whole = ws.Write(torch.eye(16).expand(*matrix.shape[:2], 16, 16), matrix, 16)
        with model.intervene(Replace(1, 2, write=whole), positions=list(range(20))):
            return model(ids)

    with model.intervene(Recode(sae, **changes, error_term=error_term)):
        ours = model(ids)
    torch.testing.assert_close(ours, by_hand(dense(changes)), atol=2e-4, rtol=0)
    for left_out in changes:  # the twin: each change is seen
        others = {name: value for name, value in changes.items() if name != left_out}
        assert (ours - by_hand(dense(others))).abs().max() > 1e-3, left_out
    if not error_term:
        with model.intervene(Recode(sae)):
            plain = model(ids)
        torch.testing.assert_close(plain, by_hand(dense({})), atol=2e-4, rtol=0)


@torch.no_grad()
def test_the_error_term_keeps_the_rest(model: HookedRecurrentModel, ids: Tensor) -> None:
    """A factor of one changes nothing, and neither does asking for no change; the reconstruction alone does."""
    sae, native = made(), model(ids)
    with model.intervene(Recode(sae, scale={3: 1.0}, error_term=True)):
        torch.testing.assert_close(model(ids), native, atol=1e-5, rtol=0)
    with model.intervene(Recode(sae, error_term=True)):
        torch.testing.assert_close(model(ids), native, atol=1e-5, rtol=0)
    with model.intervene(Recode(sae)):
        assert (model(ids) - native).abs().max() > 1e-2


@pytest.mark.parametrize("a", ARCHITECTURES, ids=str)
@torch.no_grad()
def test_states_of_every_architecture(a: Architecture, ids: Tensor) -> None:
    """A state is what the SAE makes of it; without the change of an atom it is another."""
    model, sae = HookedRecurrentModel(a.build()), random_sae(a, 1, 2, "state")
    changes: dict[str, Any] = {"scale": dict.fromkeys(range(24), -2.0)}
    with model.intervene(Recode(sae, **changes), positions=[7]):
        _, cache = model.run_with_cache(ids)
    _, native = model.run_with_cache(ids)
    before = native.state(1, [7])[:, 0, 2]
    expected = sae.decode(changed(sae.encode(before), **changes))
    torch.testing.assert_close(cache.state(1, [7])[:, 0, 2], expected, atol=1e-5, rtol=0)
    assert (expected - sae(before)).abs().max() > 1e-3


@pytest.mark.parametrize("a", [a for a in ARCHITECTURES if a.is_first_of_its_rule], ids=str)
@pytest.mark.parametrize("relative", [False, True])
@torch.no_grad()
def test_a_strength_for_each_row(a: Architecture, ids: Tensor, relative: bool) -> None:
    """Each row as it would be alone, with padding too; strengths in another order are others."""
    model, write = HookedRecurrentModel(a.build()), random_write(a, 1)
    strengths = torch.tensor([0.0, 2.0, -1.5])
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    edit = Add(1, 2, write=write, scale=strengths, relative=relative)
    with model.intervene(edit, positions=[3, 9]):
        ours = model(ids, attention_mask=mask)
    for row, strength in enumerate(strengths.tolist()):
        own = ids[row : row + 1, 4 if row == 1 else 0 :]
        with model.intervene(Add(1, 2, write=write, scale=strength, relative=relative), positions=[3, 9]):
            alone = model(own)
        torch.testing.assert_close(ours[row, -own.shape[1] :][None], alone, atol=1e-4, rtol=0)
    with model.intervene(Add(1, 2, write=write, scale=strengths.flip(0), relative=relative), positions=[3, 9]):
        assert (model(ids, attention_mask=mask) - ours).abs().max() > 1e-3
    table = torch.tensor([[1.0, 0.0], [0.0, 3.0], [2.0, -1.0]])  # one for each row and position
    with model.intervene(Add(1, 2, write=write, scale=table, relative=relative), positions=[3, 9]):
        ours = model(ids)
    with model.intervene(Add(1, 2, write=write, scale=3.0, relative=relative), positions=[9]):
        torch.testing.assert_close(ours[1], model(ids[1:2])[0], atol=1e-4, rtol=0)


@torch.no_grad()
def test_several_atoms_and_layers_at_once(model: HookedRecurrentModel, ids: Tensor) -> None:
    one, other = made(), made(layer=3, head=0)
    rows = torch.tensor([0.5, 1.0, 2.0])
    with model.intervene(one, atom=[3, 5], scale=[2, rows]):
        ours = model(ids)
    edits = [
        Add(1, 2, write=one.atom(3), scale=2, relative=True),
        Add(1, 2, write=one.atom(5), scale=rows, relative=True),
    ]
    with model.intervene(edits):
        torch.testing.assert_close(ours, model(ids))
    with model.intervene([(one, 3, 2), (one, 5, rows), (other, 1, -1.5)], positions=[4]):
        ours = model(ids)
    with model.intervene([*edits, Add(3, 0, write=other.atom(1), scale=-1.5, relative=True)], positions=[4]):
        torch.testing.assert_close(ours, model(ids))
    with model.intervene(edits, positions=[4]):
        assert not torch.allclose(ours, model(ids), atol=1e-3)


def test_what_does_not_fit(model: HookedRecurrentModel, ids: Tensor) -> None:
    sae = made()
    with pytest.raises(ValueError, match="2 atoms and 3 scales: give one scale for all"):
        model.intervene(sae, atom=[1, 2], scale=[1, 2, 3]).__enter__()
    with pytest.raises(ValueError, match="atom 3 is given twice"):
        Recode(sae, ablate=[3], scale={3: 2})
    with pytest.raises(IndexError, match="atom 24: this SAE has atoms 0 to 23"):
        Recode(sae, clamp={24: 1.0})
    with annotations_unchecked(), pytest.raises(ValueError, match=r"has shape \[2, 2\]: give a number, or one for"):
        Recode(sae, scale={3: torch.ones(2, 2)})
    few, two = Recode(sae, scale={3: torch.ones(2)}), Add(1, 2, write=sae.atom(1), scale=torch.ones(3, 2))
    with pytest.raises(ValueError, match=r"2 strengths for a batch of 3"), model.intervene(few):
        model(ids)
    with (
        pytest.raises(ValueError, match=r"scale \[2\] for a batch of 3"),
        model.intervene(sae, atom=1, scale=torch.ones(2)),
    ):
        model(ids)
    with pytest.raises(ValueError, match=r"scale has shape \[3, 2\] at positions=4"):
        model.intervene(two, positions=4).__enter__()
    foreign = made()
    foreign.cfg = WriteSAE(SAEConfig(16, FIRST.d_value, n_atoms=24, k=5, layer=1, head=2, fingerprint="0" * 16)).cfg
    with pytest.raises(ValueError, match="trained on layer 1"):
        model.intervene([(foreign, 1, 2.0)]).__enter__()
    with pytest.raises(TypeError, match=r"in a list, where an SAE stands with atom and scale, \(sae, 53, 3.0\)"):
        model.intervene([(sae, 1)]).__enter__()
