"""The SAEs of the paper's own code, written from their definitions: tensors by its names and what they compute.

Letters, for a batch ``X [b, k, v]``: pre-activations ``<X, E_i> + b_i``, reconstruction ``B + sum_i a_i D_i``.
"""

import torch

TYPES = ["flat", "rank1", "bilinear", "bilinear_tied", "bilinear_flat", "bilinear_gated", "bilinear_jumprelu"]


def random_tensors(sae_type, n, d_k, d_v, rank):
    """Tensors of such an SAE, none of them trivial, atoms not of norm 1."""
    linear, flat = sae_type in ("flat", "rank1"), sae_type in ("flat", "bilinear_flat")
    found = {"steps_since_active": torch.arange(n)}
    if linear:
        found |= {"encoder.weight": torch.randn(n, d_k * d_v) / 8, "encoder.bias": torch.randn(n) / 9}
    elif sae_type != "bilinear_tied":
        found |= {"V_enc": torch.randn(n, rank, d_k) / 2, "W_enc": torch.randn(n, rank, d_v) / 2}
    if sae_type == "bilinear_gated":
        found |= {name: torch.randn(n) / 9 for name in ("b_gate", "r_mag", "b_mag")}
    elif not linear:
        found["b_enc"] = torch.randn(n) / 9
    if sae_type == "bilinear_jumprelu":
        found["log_threshold"] = torch.randn(n) / 3 - 1
    if flat:
        return found | {"decoder.weight": torch.randn(d_k * d_v, n) / 8, "decoder.bias": torch.randn(d_k * d_v) / 9}
    ending = "" if sae_type == "rank1" else "_dec"
    found |= {f"V{ending}": torch.randn(n, rank, d_k) / 2, f"W{ending}": torch.randn(n, rank, d_v) / 2}
    return found | {"bias": torch.randn(d_k, d_v) / 9}


def codes(sae_type, t, X, k, over_batch=False):
    """Activations ``[b, n]``."""
    if "encoder.weight" in t:
        pre = X.reshape(len(X), -1) @ t["encoder.weight"].T + t["encoder.bias"]
    else:
        side = "dec" if sae_type == "bilinear_tied" else "enc"
        pre = torch.einsum("nrk,bkv,nrv->bn", t[f"V_{side}"], X, t[f"W_{side}"])
        if sae_type == "bilinear_gated":
            gate = torch.sigmoid((pre + t["b_gate"]) / 0.1)
            return gate * torch.relu(torch.exp(t["r_mag"]) * pre + t["b_mag"])
        pre = pre + t["b_enc"]
    if sae_type == "bilinear_jumprelu":
        return pre * (pre > torch.exp(t["log_threshold"]))
    if over_batch:
        least = pre.flatten().sort(descending=True).values[k * len(X) - 1]
        return torch.relu(pre) * (pre >= least)
    return torch.relu(pre) * (pre >= pre.sort(-1, descending=True).values[:, k - 1 : k])


def reconstruction(sae_type, t, a):
    """``[b, k, v]``, or ``[b, k * v]`` where the decoder is flat."""
    if "decoder.weight" in t:
        return a @ t["decoder.weight"].T + t["decoder.bias"]
    V, W = (t["V"], t["W"]) if sae_type == "rank1" else (t["V_dec"], t["W_dec"])
    return torch.einsum("bn,nrk,nrv->bkv", a, V, W) + t["bias"]
