"""RWKV-7 with the tokenizer of its authors, whose tokens are bytes: experiments draw tokens, and show them."""

import pytest
import torch

import writesae as ws
from writesae.experiments.engine.targets import ordinary_tokens, show_token
from writesae.experiments.protocol import EXPERIMENTS, Asked, Sizes, tasks_of
from writesae.models.rwkv7 import RWKV7Config, RWKV7ForCausalLM
from writesae.models.tokenizers import WorldTokenizer
from writesae.zoo import heldout_documents

pytest.importorskip("rwkv")
TINY = Sizes(firings=4, population=1, classes=500, logit=4, deletions=8, erase=4, signs=8, prompts=1, tokens=8)


@pytest.fixture(scope="module")
def model() -> ws.HookedRecurrentModel:
    torch.manual_seed(0)
    low = {f"{name}_low_rank_dim": 4 for name in ("decay", "gate", "a", "v")}
    config = RWKV7Config(
        vocab_size=65536, hidden_size=16, num_hidden_layers=2, head_dim=8, intermediate_size=16, bos_token_id=0,
        eos_token_id=0, pad_token_id=0, **low,
    )  # fmt: skip
    hf_model = RWKV7ForCausalLM(config).eval()
    with torch.no_grad():
        for p in hf_model.parameters():
            p.add_(0.2 * torch.randn(p.shape))  # what begins at zero would write nothing
    return ws.HookedRecurrentModel(hf_model, WorldTokenizer())


def test_targets_are_tokens_that_there_are(model):
    usable = ordinary_tokens(model)
    assert not usable[0] and not usable[len(model.tokenizer) :].any() and usable[65]
    assert show_token(model, 65) == "@"


@pytest.mark.parametrize("name", [name for name in EXPERIMENTS if name not in ("amplify", "population_test")])
def test_every_experiment_runs(name, model):
    """(Amplifying needs atoms of a class, which random ones are not; the population test replaces as the other.)"""
    site = model.sites[1]
    cfg = ws.SAEConfig(d_key=site.d_key, d_value=site.d_value, n_atoms=16, k=1, target="write", encoder="tied", layer=1,
                       head=0)  # fmt: skip
    torch.manual_seed(0)
    sae = ws.WriteSAE(cfg)
    texts = [text[:1500] for text in heldout_documents()[:12]]
    task, *_ = tasks_of(Asked(model, [sae], texts, TINY, other_seeds=[ws.WriteSAE(cfg)]), [name])
    assert task.run(progress=None, **task.settings).numbers
