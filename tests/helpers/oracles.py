"""Reference implementations by other people, to test ours against."""

import ast
import functools
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor


@functools.cache
def fla_naive(folder: str, file: str = "naive") -> ModuleType:
    """A file ``naive.py``, or of another name, of flash-linear-attention, under ``fla/ops``.

    Importing it by its name would import the packages above it, which need triton and look for a GPU. The file itself
    needs only torch and einops.
    """
    fla = importlib.util.find_spec("fla")
    if fla is None or not fla.submodule_search_locations:
        raise ModuleNotFoundError('fla-core is not installed: pip install -c constraints.txt -e ".[test]"', name="fla")
    path = Path(fla.submodule_search_locations[0], "ops", folder, f"{file}.py")
    spec = importlib.util.spec_from_file_location(f"fla_{folder.replace('/', '_')}_naive", path)
    assert spec is not None and spec.loader is not None
    naive = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(naive)
    return naive


def dplr_recurrence() -> Callable[..., tuple[Tensor, Tensor | None]]:
    """Returns fla's plain PyTorch loop for the generalized delta rule (diagonal plus low rank).

    Its signature is ``dplr_recurrence(q, k, v, alpha, beta, gk, initial_state=None, output_final_state=True)`` and it
    returns ``(o, final_state)``. Per head it computes::

        S_t = exp(gk_t) ⊙ S_{t-1} + beta_t (alpha_t^T S_{t-1}) + k_t v_t^T        o_t = S_t^T q_t / sqrt(d_key)

    | ours                 | fla's          |                                                                         |
    |----------------------|----------------|-------------------------------------------------------------------------|
    | erase read ``b``     | ``alpha``      | **swapped**: fla's first letter reads the state (before its decay) ...  |
    | erase write ``a``    | ``beta``       | ... and its second one writes; neither is the ``beta`` of a delta rule  |
    | ``log_decay``        | ``gk``         | always one number per key channel: expand a scalar one                  |
    | ``q``                | ``q * scale``  | fla multiplies ``q`` by ``d_key ** -0.5`` itself and has no switch      |

    Layout: heads before positions, ``q, k, alpha, beta, gk [batch, head, pos, d_key]`` and
    ``v, o [batch, head, pos, d_value]``; the states are ``[batch, head, d_key, d_value]``, as ours.

    Give it float32: it casts everything to that, float64 too, but for ``alpha``, which it leaves as it is.
    """
    return fla_naive("generalized_delta_rule/dplr").dplr_recurrence


# The recurrence of each rule, from the canonical quantities ``x [batch, pos, head, ...]`` and the state before the
# first token, to outputs and final state. All scale the reads by ``d_key ** -0.5`` themselves: that is undone first.

Quantities = dict[str, Tensor]
Result = tuple[Tensor, Tensor]


def unscaled(x: Quantities) -> Tensor:
    return x["q"] * x["q"].shape[-1] ** 0.5


def heads_first(*tensors: Tensor) -> list[Tensor]:
    return [x.transpose(1, 2) for x in tensors]


def gated_delta(x: Quantities, state: Tensor) -> Result:
    from transformers.models.qwen3_next import modeling_qwen3_next as transformers_file

    return transformers_file.torch_recurrent_gated_delta_rule(
        unscaled(x), x["k"], x["v"], x["log_decay"], x["beta"], initial_state=state, output_final_state=True
    )


def kimi_delta(x: Quantities, state: Tensor) -> Result:
    return fla_naive("kda").naive_recurrent_kda(
        unscaled(x), x["k"], x["v"], x["log_decay"], x["beta"], initial_state=state, output_final_state=True
    )


def comba(x: Quantities, state: Tensor) -> Result:
    """Its loop in chunks: its loop over tokens erases what is left after the decay, other than its kernels do."""
    return fla_naive("comba").naive_chunk_comba(
        unscaled(x), x["k"], x["v"], x["kappa"], x["log_decay"], x["beta"], initial_state=state, output_final_state=True
    )


def delta_product(x: Quantities, state: Tensor) -> Result:
    k, v, beta = (x[name].transpose(2, 3).flatten(1, 2) for name in ("k", "v", "beta"))
    return fla_naive("gated_delta_product").naive_recurrent_gated_delta_product(
        x["q"], k, v, x["log_decay"], beta, 1.0, initial_state=state, num_householder=x["k"].shape[3]
    )


def mamba3(x: Quantities, state: Tensor) -> Result:
    """Every step as a token of simple GLA, of which the first decays and the last reads."""
    n = x["k"].shape[3]
    k, v = (x[name].transpose(2, 3).flatten(1, 2) for name in ("k", "v"))
    v = v * x["beta"].transpose(2, 3).flatten(1, 2)[..., None]
    g = F.pad(x["log_decay"][:, :, None], (0, 0, 0, n - 1)).flatten(1, 2)
    naive = fla_naive("simple_gla").naive_recurrent_simple_gla
    o, state = naive(unscaled(x).repeat_interleave(n, 1), k, v, g, initial_state=state)
    return o[:, n - 1 :: n], state


def gdn2(x: Quantities, state: Tensor) -> Result:
    values = (x["q"], x["k"], x["v"], x["log_decay"], x["erase_gate"], x["write_gate"])
    return fla_naive("gdn2").naive_recurrent_gdn2(*values, scale=1.0, initial_state=state, output_final_state=True)


def mamba3_mimo(x: Quantities, state: Tensor) -> Result:
    """Each read by itself, weighted and added up."""
    each = [mamba3({**x, "q": q}, state) for q in x["q"].unbind(3)]
    return sum(w * o for w, (o, _) in zip(x["read_weights"].unbind(3), each, strict=True)), each[0][1]


def delta(x: Quantities, state: Tensor) -> Result:
    values = heads_first(unscaled(x), x["k"], x["v"], x["beta"])
    o, state = fla_naive("delta_rule").delta_rule_recurrence(*values, initial_state=state)
    return o.transpose(1, 2), state


def gla(x: Quantities, state: Tensor) -> Result:
    return fla_naive("gla").naive_recurrent_gla(
        unscaled(x), x["k"], x["v"], x["log_decay"], initial_state=state, output_final_state=True
    )


def simple_gla(x: Quantities, state: Tensor) -> Result:
    naive = fla_naive("simple_gla").naive_recurrent_simple_gla
    return naive(unscaled(x), x["k"], x["v"], x["log_decay"], initial_state=state)


def linear_attention(x: Quantities, state: Tensor) -> Result:
    naive = fla_naive("linear_attn").naive_recurrent_linear_attn
    return naive(x["q"], x["k"], x["v"], scale=1.0, initial_state=state, output_final_state=True)


def rwkv6(x: Quantities, state: Tensor) -> Result:
    """Without the bonus, which the function adds for ``u``."""
    naive = fla_naive("rwkv6", "recurrent_naive").naive_recurrent_rwkv6
    values, u = heads_first(x["q"], x["k"], x["v"], x["log_decay"]), torch.zeros_like(x["k"][0, 0])
    o, state = naive(*values, u, scale=1.0, initial_state=state, output_final_state=True)
    return o.transpose(1, 2), state


def rwkv7(x: Quantities, state: Tensor) -> Result:
    values = heads_first(unscaled(x), x["k"], x["v"], -x["kappa"], x["kappa"] * x["iclr"], x["log_decay"])
    o, state = dplr_recurrence()(*values, initial_state=state)
    return o.transpose(1, 2), state


def mamba1_arguments(batch: int, pos: int, channel: int, d_key: int) -> dict[str, Any]:
    """Of transformers' selective scan, with everything in it that a checkpoint may have."""
    return dict(
        hidden_states=torch.randn(batch, channel, pos),
        dt=torch.randn(batch, channel, pos),
        A=-torch.rand(channel, d_key) - 0.1,
        B=torch.randn(batch, d_key, pos) / d_key**0.5,
        C=torch.randn(batch, d_key, pos) / d_key**0.5,
        D=torch.randn(channel),
        z=torch.randn(batch, channel, pos),
        delta_bias=torch.randn(channel),
        delta_softplus=True,
        return_last_state=True,
    )


def mamba1_scan(arguments: dict[str, Any]) -> Result:
    """transformers' selective scan: what the mixer gets, ``[batch, channel, pos]``, and the last state."""
    from transformers.models.mamba import modeling_mamba as transformers_file

    return transformers_file.mamba_selective_scan(**arguments)


def mamba1_steps(arguments: dict[str, Any]) -> Result:
    """Its update of one token, one after the other."""
    from transformers.models.mamba import modeling_mamba as transformers_file

    x, A = arguments["hidden_states"], arguments["A"]
    state, outputs = x.new_zeros(x.shape[0], *A.shape), []
    for t in range(x.shape[2]):
        x_t, dt_t, B_t, C_t, z_t = (arguments[name][..., t] for name in ("hidden_states", "dt", "B", "C", "z"))
        more = dict(D=arguments["D"], z=z_t, dt_bias=arguments["delta_bias"], dt_softplus=True)
        outputs.append(transformers_file.mamba_selective_state_update(state, x_t, dt_t, A, B_t, C_t, **more))
    return torch.stack(outputs, -1), state


def mamba1_of_authors(arguments: dict[str, Any]) -> Result:
    """mamba-ssm's reference, ``selective_scan_ref``, read out of a file that wants a GPU when it is imported. Its
    source is in the folder MAMBA_SSM, see tests/kernels/get_mamba_ssm.py."""
    path = Path(os.environ["MAMBA_SSM"], "mamba_ssm", "ops", "selective_scan_interface.py")
    parts = ast.parse(path.read_text("utf-8")).body
    found = [part for part in parts if isinstance(part, ast.FunctionDef) and part.name == "selective_scan_ref"]
    names: dict[str, Any] = {"torch": torch, "F": torch.nn.functional, "rearrange": rearrange, "repeat": repeat}
    exec(compile(ast.Module(found, []), str(path), "exec"), names)
    x, dt, *rest = arguments.values()
    keys = list(arguments)[2:]
    return names["selective_scan_ref"](x, dt, **dict(zip(keys, rest, strict=True)))


def mamba2_arguments(batch: int, pos: int, head: int, group: int, d_key: int, d_value: int) -> dict[str, Any]:
    """Of transformers' chunk scan, with everything in it that a checkpoint may have."""
    return dict(
        hidden_states=torch.randn(batch, pos, head, d_value),
        dt=torch.randn(batch, pos, head),
        A=-torch.rand(head) - 0.1,
        B=torch.randn(batch, pos, group, d_key) / d_key**0.5,
        C=torch.randn(batch, pos, group, d_key) / d_key**0.5,
        chunk_size=4,
        D=torch.randn(head),
        dt_bias=torch.randn(head),
        initial_states=torch.randn(batch, head, d_value, d_key),
        dt_softplus=True,
        dt_limit=(0.2, 1.5),
        return_final_states=True,
    )


def mamba2_chunks(arguments: dict[str, Any]) -> Result:
    """transformers' chunk scan, without its skip ``D x``, which passes the memory by."""
    from transformers.models.mamba2 import modeling_mamba2 as transformers_file

    y, state = transformers_file.mamba2_chunk_scan(**arguments)
    return y - arguments["D"][:, None] * arguments["hidden_states"], state.mT


def mamba2_steps(arguments: dict[str, Any]) -> Result:
    """transformers' update of one token, which knows no limits of dt, one after the other; likewise without skip."""
    from transformers.models.mamba2 import modeling_mamba2 as transformers_file

    x, state, reads = arguments["hidden_states"], arguments["initial_states"].clone(), []
    (_, _, head, d_value), d_key = x.shape, state.shape[-1]
    spread = lambda y: y[..., None].expand(*y.shape, d_value)  # noqa: E731
    for t in range(x.shape[1]):
        y = transformers_file.mamba2_selective_state_update(
            state,
            x[:, t],
            spread(arguments["dt"][:, t]),
            arguments["A"][:, None, None].expand(head, d_value, d_key),
            arguments["B"][:, t],
            arguments["C"][:, t],
            spread(arguments["D"]),
            dt_bias=spread(arguments["dt_bias"]),
            dt_softplus=True,
        )
        reads.append(y - arguments["D"][:, None] * x[:, t])
    return torch.stack(reads, 1), state.mT


def by_rwkv(theirs: Any, ids: Tensor) -> Tensor:
    """Logits ``[1, pos, vocab]`` of a model of the package `rwkv`: all at once, which must be what it says by token."""
    whole, _ = theirs.forward(ids[0].tolist(), None, full_output=True)
    state, steps = None, []
    for i in ids[0].tolist():
        logits, state = theirs.forward([i], state)
        steps.append(logits.clone())
    assert (whole - torch.stack(steps)).abs().max() < 1e-4
    return whole[None]
