"""What a user reads after a mistake: the error says what was wrong and what exists, and the model is as it was."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jaxtyping
import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from architectures import ARCHITECTURES, D_KEY, D_VALUE, N_HEADS, N_VOCAB
from writesae import Add, Delete, HookedRecurrentModel, Replace, SAEConfig, Substitute, Write, WriteSAE
from writesae.hooks.tap import running

QWEN = ARCHITECTURES[0]
K = "blocks.1.mixer.hook_k"


@pytest.fixture(autouse=True)
def as_users_run_it() -> Iterator[None]:
    """Without the checks of annotations, which would complain first."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="module")
def wrapped() -> tuple[HookedRecurrentModel, Tensor, Tensor]:
    model, ids = HookedRecurrentModel(QWEN.build()), torch.arange(12)[None]
    with torch.no_grad():
        return model, ids, model(ids)


@pytest.fixture
def model(wrapped: Any) -> Iterator[HookedRecurrentModel]:
    """One model for all tests: each must leave it as it was."""
    model, ids, logits = wrapped
    yield model
    assert not model.busy
    assert not any(m._forward_hooks for m in model.hook_dict.values())
    with torch.no_grad():
        assert torch.equal(model(ids), logits)


@pytest.fixture
def ids(wrapped: Any) -> Tensor:
    return wrapped[1]


class Tokenizer:
    """A token a letter."""

    pad_token_id = eos_token_id = None

    def __call__(self, text: str, **kwargs: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) % N_VOCAB for c in text]}

    def decode(self, ids: Any, skip_special_tokens: bool = False) -> str:
        return "".join(chr(int(i)) for i in ids)


def write(*lead: int, d_key: int = D_KEY, d_value: int = D_VALUE) -> Write:
    return Write(torch.randn(*lead, d_key), torch.randn(*lead, d_value))


def sae(**changes: Any) -> WriteSAE:
    cfg = dict(d_key=D_KEY, d_value=D_VALUE, n_atoms=8, k=2, layer=1, head=2)
    return WriteSAE(SAEConfig(**(cfg | changes)))


# The model -----------------------------------------------------------------------------------------------------------


def test_a_model_without_recurrent_layers() -> None:
    sizes = dict(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    with pytest.raises(
        ValueError, match=r"LlamaForCausalLM has no recurrent layer: it is attention: it remembers keys .* TransformerL"
    ):
        HookedRecurrentModel(LlamaForCausalLM(LlamaConfig(**sizes)))


@pytest.mark.parametrize("name", ["torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"])
def test_a_transformers_release_without_the_functions(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hf_model = QWEN.build()
    monkeypatch.delattr(QWEN.modeling, name)
    with pytest.raises(
        RuntimeError, match=rf"transformers \d.* has no {name} in transformers\.models\.qwen3_5.*install transformers>="
    ):
        HookedRecurrentModel(hf_model)
    assert not any("writesae" in key for module in hf_model.modules() for key in vars(module))


def test_packed_sequences_on_a_cpu(model: HookedRecurrentModel, ids: Tensor) -> None:
    borders = torch.tensor([0, 5, 12], dtype=torch.int32)
    packed = dict(cu_seq_lens_q=borders, cu_seq_lens_k=borders, max_length_q=7, max_length_k=7)
    with pytest.raises(ValueError, match=r"cannot keep packed sequences \(\w+\) apart on a CPU"):
        model.hf_model(ids, **packed)
    with pytest.raises(ValueError, match="cu_seq_lens_q packs several texts into one row"):
        model(ids, **packed)


# Names ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["blocks.1.mixer.hook_kk", "blocks.1.mixer.k", "blocks.2.mixer.hook_k", "hook_k"])
def test_an_unknown_name(model: HookedRecurrentModel, ids: Tensor, name: str) -> None:
    text = rf"^no hook point named '{name}'; nearest: blocks\.\d\.\S*hook_\w+.* \(all: model\.hook_names\)$"
    with pytest.raises(KeyError, match=text):
        model.run_with_hooks(ids, [(name, lambda value, hook: None)])
    with pytest.raises(KeyError, match=text):
        model.run_with_cache(ids, [K, name])
    with pytest.raises(KeyError, match=text):
        model.run_with_cache(ids, K)[1][name]


def test_the_nearest_name_comes_first(model: HookedRecurrentModel) -> None:
    with (
        pytest.raises(KeyError, match=r"nearest: blocks\.1\.mixer\.hook_log_decay"),
        model.hooks([("blocks.1.mixer.hook_logdecay", lambda value, hook: None)]),
    ):
        pass


def test_a_function_that_chooses_no_name(model: HookedRecurrentModel, ids: Tensor) -> None:
    with pytest.raises(KeyError, match="the names function chose no"):
        model.run_with_cache(ids, lambda name: "attn" in name)


def test_states_without_positions(model: HookedRecurrentModel, ids: Tensor) -> None:
    state = "blocks.1.mixer.hook_state"
    with pytest.raises(ValueError, match=r"blocks\.1\.mixer\.hook_state holds a d_key x d_value .*state_positions="):
        model.run_with_hooks(ids, [(K, lambda value, hook: value * 2), (state, lambda value, hook: None)])
    for names, positions in [(state, None), (K, [3])]:
        with pytest.raises(ValueError, match=r"pass both a hook_state in names= and state_positions="):
            model.run_with_cache(ids, names, state_positions=positions)


# Places --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [2, 4, -1])
def test_a_layer_that_is_not_recurrent(model: HookedRecurrentModel, layer: int) -> None:
    text = rf"layer {layer} is not recurrent; recurrent layers are \[0, 1, 3\]"
    with pytest.raises(IndexError, match=text), model.intervene(Delete(layer)):
        pass
    with pytest.raises(IndexError, match=text):
        model.site(layer)


@pytest.mark.parametrize("head", [N_HEADS, -1, [0, 9], 1.0])
def test_a_head_out_of_range(model: HookedRecurrentModel, head: Any) -> None:
    with (
        pytest.raises(IndexError, match=r"head (4|-1|9|1\.0) at layer 1: allowed are 0 to 3"),
        model.intervene([Delete(0), Delete(1, head)]),
    ):
        pass


@pytest.mark.parametrize("head", [[], [1, 1]])
def test_heads_that_would_do_nothing_or_twice(model: HookedRecurrentModel, head: list[int]) -> None:
    with (
        pytest.raises(ValueError, match=r"at layer 1: give each head once, or None for all"),
        model.intervene(Delete(1, head)),
    ):
        pass


@pytest.mark.parametrize(
    ("positions", "text"),
    [
        (12, "position 12 is out of range: sequence 0 has 12 tokens .positions 0 to 11."),
        ([3, 40], "position 40 is out of range"),
        (slice(5, 13), "position 12 is out of range"),
        (slice(12, None), "position 12 is out of range"),
        (torch.tensor([[3, 99]]), "position 99 is out of range"),
    ],
)
def test_positions_out_of_range(model: HookedRecurrentModel, ids: Tensor, positions: Any, text: str) -> None:
    with pytest.raises(IndexError, match=text), model.intervene(Delete(0, 1), positions=positions):
        model(ids)
    with pytest.raises(IndexError, match=text):
        model.run_with_hooks(
            ids, [("blocks.1.mixer.hook_state", lambda value, hook: value * 2)], state_positions=positions
        )


def test_positions_of_the_shorter_sequence(model: HookedRecurrentModel, ids: Tensor) -> None:
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, :4] = 0
    with (
        pytest.raises(IndexError, match="position 9 is out of range: sequence 1 has 8 tokens"),
        model.intervene(Delete(0), positions=[9]),
    ):
        model(ids.expand(2, -1), attention_mask=mask)


def test_positions_that_generation_does_not_reach(model: HookedRecurrentModel, ids: Tensor) -> None:
    with model.intervene(Delete(0), positions=[14]):
        model.generate(ids, max_new_tokens=4)
    for positions in ([15], slice(3, 16)):  # the last token is never fed
        with (
            pytest.raises(IndexError, match="position 15 is out of range: sequence 0 has 15 tokens"),
            model.intervene(Delete(0), positions=positions),
        ):
            model.generate(ids, max_new_tokens=4)


@pytest.mark.parametrize("positions", [[2, 30, 31], slice(30, 40), torch.tensor([[2, 30], [2, 3]])])
def test_positions_never_reached_in_pieces(model: HookedRecurrentModel, ids: Tensor, positions: Any) -> None:
    """Only the end of the block can tell."""
    with (
        pytest.raises(IndexError, match=r"a sequence that ran in this block never reached positions? 30"),
        torch.no_grad(),
        model.intervene(Delete(0), positions=positions),
    ):
        cache = DynamicCache(config=model.config)
        batch = ids.expand(2, -1)
        model(batch[:, :6], past_key_values=cache)
        model(batch[:, 6:], past_key_values=cache)


@torch.no_grad()
def test_positions_reached_at_different_times(model: HookedRecurrentModel, ids: Tensor) -> None:
    """A left-padded sequence comes later to the same position, in another piece: no reason to complain."""
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, :4] = 0
    cache, batch = DynamicCache(config=model.config), ids.expand(2, -1)
    with model.intervene(Delete(0), positions=[6]):
        model(batch[:, :8], attention_mask=mask[:, :8], past_key_values=cache)
        model(batch[:, 8:], attention_mask=mask, past_key_values=cache)


@pytest.mark.parametrize(
    ("positions", "text"),
    [
        (-1, "positions count from 0 at the first token; the end moves while generating"),
        ([3, -2], "negative ones have no meaning here"),
        ([], "give an int, a list of ints, a slice"),
        ([1.5], "give an int, a list of ints, a slice"),
        (True, "give an int, a list of ints, a slice"),
        (torch.zeros(1, 1, 1, dtype=torch.long), "give an int, a list of ints, a slice"),
        (slice(-3, None), "a slice needs 0 <= start < stop and step >= 1; it counts from the start"),
        (slice(5, 5), "a slice needs 0 <= start < stop"),
        (slice(9, 2, -1), "a slice needs 0 <= start < stop"),
        (slice(2, 9, 0), "a slice needs 0 <= start < stop"),
    ],
)
def test_positions_that_mean_nothing(model: HookedRecurrentModel, positions: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text), model.intervene(Delete(0), positions=positions):
        pass


def test_positions_for_another_batch(model: HookedRecurrentModel, ids: Tensor) -> None:
    with (
        pytest.raises(ValueError, match=r"positions \[2, 1\] for a batch of 3"),
        model.intervene(Delete(0), positions=torch.tensor([[1], [2]])),
    ):
        model(ids.expand(3, -1))


@pytest.mark.parametrize(
    ("mask", "error"),
    [
        (torch.ones(1, 1, 12, 12, dtype=torch.bool).tril(), r"got a tensor \[1, 1, 12, 12\]"),
        (torch.ones(1, 9, dtype=torch.long), r"got a tensor \[1, 9\]"),
        (torch.ones(1, 15, dtype=torch.long), r"got a tensor \[1, 15\]"),
    ],
)
@torch.no_grad()
def test_a_mask_that_does_not_say_what_is_padding(
    model: HookedRecurrentModel, ids: Tensor, mask: Tensor, error: str
) -> None:
    """Only edits need to know positions; without any, the mask is transformers' business."""
    model.hf_model.config._attn_implementation = "eager"
    text = rf"positions need an attention mask \[batch, 12\] .*\(0 cached and 12 new tokens\); {error}"
    with pytest.raises(ValueError, match=text), model.intervene(Delete(0), positions=[3]):
        model(ids, attention_mask=mask)
    if mask.ndim == 4:
        _, cache = model.run_with_cache(ids, attention_mask=mask)
        with pytest.raises(ValueError, match="this pass's attention mask does not say which tokens are padding"):
            cache.state(1, [3])
    model.hf_model.config._attn_implementation = "sdpa"


def test_positions_of_the_cache(model: HookedRecurrentModel, ids: Tensor) -> None:
    _, cache = model.run_with_cache(ids)
    for position in (12, -13):
        with pytest.raises(IndexError, match=f"position {position} of sequence 0: this pass has its positions 0 to 11"):
            cache.state(1, [3, position])


# What is written -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Add, Replace])
def test_a_write_of_another_size(model: HookedRecurrentModel, kind: type[Add]) -> None:
    text = "a write of 12 x 16 does not fit layer 1, whose states are 16 x 12"
    with pytest.raises(ValueError, match=text), model.intervene(kind(1, write=write(d_key=D_VALUE, d_value=D_KEY))):
        pass


@pytest.mark.parametrize(
    ("lead", "positions"),
    [((2,), [1, 2, 3]), ((4,), [1, 2, 3]), ((3,), None), ((3,), slice(0, 3)), ((2,), [3, 3]), ((1, 1, 1), [3])],
)
def test_writes_that_do_not_fit_the_positions(
    model: HookedRecurrentModel, lead: tuple[int, ...], positions: Any
) -> None:
    with (
        pytest.raises(
            ValueError, match=r"a write with leading dimensions \[.*\] at positions=.*\[n\] \(one per position"
        ),
        model.intervene(Add(1, write=write(*lead)), positions=positions),
    ):
        pass


def test_writes_for_another_batch(model: HookedRecurrentModel, ids: Tensor) -> None:
    with (
        pytest.raises(ValueError, match=r"a write with leading dimensions \[2, 1\] for a batch of 3"),
        model.intervene(Add(1, write=write(2, 1))),
    ):
        model(ids.expand(3, -1))


@pytest.mark.parametrize(
    ("quantity", "result", "error", "text"),
    [
        ("k", lambda x: x[..., :-1], ValueError, r"returned shape \[1, 12, 4, 15\]; expected \[1, 12, 4, 16\]"),
        ("v", lambda x: x[:, :, 0], ValueError, r"returned shape \[1, 12, 12\]; expected \[1, 12, 4, 12\]"),
        ("beta", lambda x: x.double(), ValueError, r"returned torch.float64; expected torch.float32: use \.to\(value"),
        ("q", lambda x: x.numpy(), TypeError, "returned ndarray .*; return a tensor, or None to read only"),
        ("log_decay", lambda x: 3, TypeError, "returned int 3; return a tensor"),
        ("o", lambda x: Write(x, x), TypeError, r"returned Write\(.*; return a tensor"),
        ("z", lambda x: x.sum(), ValueError, r"returned shape \[\]; expected \[1, 12, 4, 12\]"),
        ("write", lambda x: x.dense(), TypeError, r"returned a torch.float32 tensor .*; return a Write, or None"),
        (
            "write",
            lambda x: x[:, 1:],
            ValueError,
            r"returned Write\(\[1, 11, 4\], .*; expected Write\(\[1, 12, 4\], d_key=16",
        ),
        (
            "write",
            lambda x: Write(x.value, x.key),
            ValueError,
            r"returned Write.*expected Write\(.* d_key=16, d_value=12\), any rank",
        ),
        ("state", lambda x: x[0], ValueError, r"returned shape \[1, 4, 16, 12\]; expected \[1, 1, 4, 16, 12\]"),
    ],
)
def test_a_hook_that_returns_something_else(
    model: HookedRecurrentModel, ids: Tensor, quantity: str, result: Any, error: type[Exception], text: str
) -> None:
    name = f"blocks.1.mixer.hook_{quantity}"
    with torch.no_grad(), pytest.raises(error, match=rf"a hook on {name} {text}".replace(".mixer.", r"\.mixer\.")):
        model.run_with_hooks(
            ids, [(name, lambda value, hook: result(value))], state_positions=[3] if quantity == "state" else None
        )


# Interventions and SAEs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["delete", 3, Delete, [Delete(0), None]])
def test_what_is_no_intervention(model: HookedRecurrentModel, what: Any) -> None:
    text = r"intervene takes an intervention \(Add, Delete, \.\.\.\) or an SAE; got"
    with pytest.raises(TypeError, match=text), model.intervene(what):
        pass


def test_read(model: HookedRecurrentModel) -> None:
    with (
        pytest.raises(ValueError, match="read='now': allowed are 'same' and 'next'"),
        model.intervene(
            Delete(0),
            read="now",  # type: ignore[arg-type]
        ),
    ):
        pass


@pytest.mark.parametrize("given", [{}, {"atom": 3}, {"scale": 2.0}])
def test_an_sae_without_atom_or_scale(model: HookedRecurrentModel, given: dict[str, Any]) -> None:
    with (
        pytest.raises(TypeError, match=r"needs atom= and scale=.*use intervene\(Substitute\(sae\)\)"),
        model.intervene(sae(), **given),
    ):
        pass


@pytest.mark.parametrize("given", [{"atom": 3}, {"scale": 2.0}])
def test_atom_or_scale_without_an_sae(model: HookedRecurrentModel, given: dict[str, Any]) -> None:
    with (
        pytest.raises(TypeError, match="atom= and scale= go with an SAE; an intervention carries its own"),
        model.intervene(Delete(0), **given),
    ):
        pass


@pytest.mark.parametrize("atom", [8, -1])
def test_an_atom_out_of_range(model: HookedRecurrentModel, atom: int) -> None:
    with (
        pytest.raises(IndexError, match=f"atom {atom}: this SAE has atoms 0 to 7"),
        model.intervene(sae(), atom=atom, scale=1),
    ):
        pass
    with pytest.raises(IndexError, match=f"atom {atom}: this SAE has atoms 0 to 7"):
        Substitute(sae(), atom=atom)


def test_norm_of_a_substitute() -> None:
    with pytest.raises(ValueError, match="norm='unit': allowed are 'code'"):
        Substitute(sae(), norm="unit")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"d_key": D_VALUE}, "this SAE reads 12x12 matrices; layer 1 writes 16x12"),
        ({"layer": 2}, "this SAE is for layer 2, .*not recurrent here; recurrent layers: 0, 1, 3"),
        ({"head": 4}, "this SAE is for head 4.* layer 1.* has heads 0 to 3"),
        ({"layer": None}, "this SAE does not say its layer and head"),
        ({"head": None}, "this SAE does not say its layer and head"),
        ({"fingerprint": "0" * 16, "model_id": "other"}, "trained on layer 1 of other .*check_model=False uses it"),
    ],
)
def test_an_sae_that_does_not_fit(model: HookedRecurrentModel, changes: dict[str, Any], text: str) -> None:
    other = sae(**changes)
    for what, given in [
        (other, {"atom": 1, "scale": 1}),
        (Substitute(other), {}),
        ([Delete(0), Substitute(other)], {}),
    ]:
        with pytest.raises(ValueError, match=text), model.intervene(what, **given):
            pass


@torch.no_grad()
def test_check_model_can_be_left_out(model: HookedRecurrentModel, ids: Tensor) -> None:
    other = sae(fingerprint="0" * 16)
    with model.intervene(other, atom=1, scale=2, check_model=False):
        steered = model(ids)
    with model.intervene(Add(1, 2, write=other.atom(1), scale=2, relative=True)):
        assert torch.equal(model(ids), steered)
    right = sae()
    right.cfg = dataclasses.replace(right.cfg, fingerprint=model.fingerprint(1))
    with model.intervene(Substitute(right)):
        model(ids)


def test_fingerprint(model: HookedRecurrentModel) -> None:
    """Of one layer's weights, whatever their dtype; not of what is attached."""
    assert len({model.fingerprint(layer) for layer in (0, 1, 3)}) == 3
    with model.intervene(Delete(1)):
        other = HookedRecurrentModel(QWEN.build().to(torch.bfloat16))
        assert model.fingerprint(1) == other.fingerprint(1)
    with torch.no_grad():
        other.hf_model.model.layers[1].linear_attn.out_proj.weight[0, 0] += 1
    assert model.fingerprint(1) != other.fingerprint(1) and model.fingerprint(0) == other.fingerprint(0)


# Text and tokens -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "text"),
    [
        ("", "give a non-empty text, a list of such, or token ids"),
        ([], "give a non-empty text, a list of such, or token ids"),
        (["some", ""], "give a non-empty text, a list of such, or token ids"),
        (["some", 3], "give a non-empty text, a list of such, or token ids"),
        ("some text", r"text needs a tokenizer: HookedRecurrentModel\(hf_model, tokenizer\), or pass token ids"),
        (torch.tensor([0.5]), r"token ids must be integers \[pos\] or \[batch, pos\]; got torch.float32 \[1\]"),
        (torch.zeros(1, 2, 3, dtype=torch.long), r"token ids must be integers .*got torch.int64 \[1, 2, 3\]"),
        (torch.zeros(1, 0, dtype=torch.long), r"token ids must be integers .*got torch.int64 \[1, 0\]"),
        ([3, N_VOCAB], f"token id {N_VOCAB} is outside the model's vocabulary of {N_VOCAB}"),
        (torch.tensor([[3, -1]]), "token id -1 is outside the model's vocabulary"),
    ],
)
def test_what_is_no_text(model: HookedRecurrentModel, x: Any, text: str) -> None:
    for run in (model, model.generate, model.run_with_cache):
        with pytest.raises(ValueError, match=text):
            run(x)


def test_a_batch_of_texts(model: HookedRecurrentModel) -> None:
    with_tokens = HookedRecurrentModel(model.hf_model, Tokenizer())
    with pytest.raises(ValueError, match=r"to_str_tokens takes one sequence of token ids, .*; got \[2, 3\]"):
        with_tokens.to_str_tokens(torch.ones(2, 3, dtype=torch.long))
    cache = DynamicCache(config=model.config)
    with pytest.raises(ValueError, match="texts of unequal length can't continue a cache: the shorter ones"):
        with_tokens(["one", "other"], past_key_values=cache)
    assert cache.get_seq_length() == 0


def test_padding_on_the_right_while_generating(model: HookedRecurrentModel, ids: Tensor) -> None:
    mask = torch.ones_like(ids)
    mask[0, -2:] = 0
    with pytest.raises(ValueError, match="generation needs padding on the left: the attention mask ends with padding"):
        model.generate(ids, attention_mask=mask, max_new_tokens=2)


def test_what_runs_is_not_left_marked_as_running(model: HookedRecurrentModel, ids: Tensor) -> None:
    """After an error in the middle of a layer."""
    with pytest.raises(ZeroDivisionError):
        model.run_with_hooks(ids, [(K, lambda value, hook: 1 / 0)])
    assert running.get() is None
    assert model.taps[0].clock.now.call == {}
