"""What `evaluate` found about SAEs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from writesae.jobs.disk import write_json
from writesae.jobs.versions import versions
from writesae.results.result import Figure, Number, Result, figure
from writesae.results.statistics import bootstrap


@dataclass(frozen=True, eq=False)
class Quality:
    """How well an SAE reconstructs the matrices that it reads, ``X^`` of ``X``.

    Attributes:
        n: matrices.
        explained_variance: ``1 - sum ||X - X^||^2 / sum ||X - mean||^2``; ``1 - fvu``.
        nmse: ``sum ||X - X^||^2 / sum ||X||^2``.
        mse: mean of ``||X - X^||^2``, summed over the entries of a matrix, as in SAELens.
        cosine: of ``X^`` and ``X``, mean.
        l0, l1: active atoms, and the sum of activations, per matrix.
        length_in, length_out: mean norm of ``X`` and of ``X^``.
        bias: ``sum ||X^||^2 / sum <X, X^>``; below 1, reconstructions are too short (shrinkage).
        density: how often each atom is active.
    """

    n: int
    explained_variance: float
    nmse: float
    mse: float
    cosine: float
    l0: float
    l1: float
    length_in: float
    length_out: float
    bias: float
    density: Float[Tensor, " n_atoms"]

    @property
    def alive(self) -> float:
        """Share of the atoms that were active at least once."""
        return float((self.density > 0).float().mean())


@dataclass(frozen=True, eq=False)
class Evaluation(Result):
    """SAEs by themselves and, if there are several, all at once (the last set of each tensor).

    Attributes:
        model_id: of the model.
        heads: of the SAEs.
        context: tokens of a window.
        quality: of each SAE.
        native: cross entropy of the model as it is, of each window, in nats per token.
        ce_sae, ce_ablated: the same with the SAE (or all) in place, and with the head (or all) ablated.
        kl_sae, kl_ablated: KL divergence from the native model's next-token distribution, likewise.
    """

    model_id: str
    heads: tuple[str, ...]
    context: int
    quality: tuple[Quality, ...]
    native: Float[Tensor, " window"]
    ce_sae: Float[Tensor, "set window"]
    ce_ablated: Float[Tensor, "set window"]
    kl_sae: Float[Tensor, "set window"]
    kl_ablated: Float[Tensor, "set window"]

    @property
    def sets(self) -> tuple[str, ...]:
        """What each set of SAEs is called: its head, or ``"all heads"``."""
        return self.heads if len(self.heads) == 1 else (*self.heads, "all heads")

    @property
    def loss_recovered(self) -> Float[Tensor, " set"]:
        """How much of the loss that ablation costs does not arise with the SAE: 1 all, 0 nothing."""
        lost = self.ce_ablated.mean(1) - self.native.mean()
        return (self.ce_ablated.mean(1) - self.ce_sae.mean(1)) / lost

    @property
    def kl_recovered(self) -> Float[Tensor, " set"]:
        """The same of the KL divergence."""
        return 1 - self.kl_sae.mean(1) / self.kl_ablated.mean(1)

    @property
    def title(self) -> str:
        return f"SAEs of {self.model_id}, {', '.join(self.heads)}, on {len(self.native)} windows of {self.context}"

    @property
    def about(self) -> str:
        return (
            "The SAE's whole reconstruction stands in the place of what it reads, at every token. Ablation takes out "
            "all that the head writes. Loss recovered is (ablated - with SAE) / (ablated - native), of the cross "
            "entropy of the next token; KL recovered is the same of the divergence from the native model. Intervals "
            "are over windows."
        )

    def numbers(self) -> Sequence[Number]:
        made = [Number.estimate("loss, native", self.native, unit="nats")]
        for i, name in enumerate(self.sets):
            ce = torch.stack([self.native, self.ce_sae[i], self.ce_ablated[i]], 1)
            kl = torch.stack([self.kl_sae[i], self.kl_ablated[i]], 1)
            made += [
                self._ratio(f"{name}, loss recovered", ce, lambda x: (x[2] - x[1]) / (x[2] - x[0])),
                self._ratio(f"{name}, KL recovered", kl, lambda x: 1 - x[0] / x[1]),
                Number.estimate(f"{name}, loss with SAE", self.ce_sae[i], unit="nats"),
                Number.estimate(f"{name}, loss ablated", self.ce_ablated[i], unit="nats"),
            ]
            if i < len(self.quality):
                q = self.quality[i]
                made += [
                    Number(f"{name}, explained variance", q.explained_variance, "%", n=q.n),
                    Number(f"{name}, cosine", q.cosine, n=q.n),
                    Number(f"{name}, active atoms per matrix", q.l0, n=q.n),
                    Number(f"{name}, atoms alive", q.alive, "%", n=len(q.density)),
                ]
        return made

    def _ratio(self, name: str, values: Float[Tensor, "window _"], of: Any) -> Number:
        statistic = lambda x: float(of(np.asarray(x).mean(0)))  # noqa: E731
        if len(values) < 2:
            return Number(name, statistic(values), "%", n=len(values))
        return Number.of(name, bootstrap(values, statistic=statistic), "%")

    def columns(self) -> dict[str, Any]:
        n_sets, n_windows = self.ce_sae.shape
        each = {
            name: getattr(self, name).flatten().numpy() for name in ("ce_sae", "ce_ablated", "kl_sae", "kl_ablated")
        }
        return {
            "set": np.repeat(self.sets, n_windows),
            "window": np.tile(np.arange(n_windows), n_sets),
            "ce_native": self.native.repeat(n_sets).numpy(),
            **each,
        }

    def plot(self) -> Figure:
        """Loss of each set between native and ablated; how often atoms fire."""
        made, (left, right) = figure(2)
        at = np.arange(len(self.sets))
        left.bar(at, (self.ce_ablated.mean(1) - self.native.mean()).numpy(), color="0.85", label="ablated")
        left.bar(at, (self.ce_sae.mean(1) - self.native.mean()).numpy(), width=0.5, label="with SAE")
        left.set_xticks(at, self.sets, rotation=30)
        left.set_ylabel("loss above native, nats per token")
        left.legend(frameon=False)
        for head, quality in zip(self.heads, self.quality, strict=True):
            right.plot(quality.density.sort(descending=True).values.numpy(), label=head)
        right.set(xlabel="atoms, the most frequent first", ylabel="how often active")
        right.set_yscale("symlog", linthresh=1e-4)
        right.legend(frameon=False)
        return made

    def to_json(self) -> dict[str, Any]:
        """Everything by SAE, in the groups and names of SAEBench's core evaluation where they mean the same.

        ``ce_loss_score`` is loss recovered, ``with_ablation`` the head without any write. What has no name there stands
        under ``writesae``.
        """
        n_tokens = len(self.native) * (self.context - 1)
        found = []
        for i, name in enumerate(self.sets):
            metrics: dict[str, dict[str, Any]] = {
                "model_behavior_preservation": {
                    "kl_div_score": float(self.kl_recovered[i]),
                    "kl_div_with_ablation": float(self.kl_ablated[i].mean()),
                    "kl_div_with_sae": float(self.kl_sae[i].mean()),
                },
                "model_performance_preservation": {
                    "ce_loss_score": float(self.loss_recovered[i]),
                    "ce_loss_with_ablation": float(self.ce_ablated[i].mean()),
                    "ce_loss_with_sae": float(self.ce_sae[i].mean()),
                    "ce_loss_without_sae": float(self.native.mean()),
                },
                "token_stats": {"total_tokens_eval_reconstruction": n_tokens},
            }
            if i < len(self.quality):
                q = self.quality[i]
                metrics["reconstruction_quality"] = {
                    "explained_variance": q.explained_variance,
                    "mse": q.mse,
                    "cossim": q.cosine,
                }
                metrics["shrinkage"] = {
                    "l2_norm_in": q.length_in,
                    "l2_norm_out": q.length_out,
                    "l2_ratio": q.length_out / q.length_in if q.length_in else None,
                    "relative_reconstruction_bias": q.bias if np.isfinite(q.bias) else None,
                }
                metrics["sparsity"] = {"l0": q.l0, "l1": q.l1}
                metrics["token_stats"]["total_tokens_eval_sparsity_variance"] = q.n
                metrics["misc_metrics"] = {
                    "frac_alive": q.alive,
                    "freq_over_1_percent": float((q.density > 0.01).float().mean()),
                    "freq_over_10_percent": float((q.density > 0.1).float().mean()),
                }
                metrics["writesae"] = {"nmse": q.nmse, "feature_density": [round(x, 9) for x in q.density.tolist()]}
            found.append({"sae": name, "eval_result_metrics": metrics})
        return {
            "eval_type_id": "core",
            "eval_config": {"model": self.model_id, "context": self.context, "windows": len(self.native)},
            "versions": versions("writesae", "torch", "transformers"),
            "results": found,
        }

    def save(self, path: str | Path) -> Path:
        """Write `to_json` to a file, whole, with its checksum."""
        write_json(Path(path), self.to_json())
        return Path(path)
