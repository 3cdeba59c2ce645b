"""One training in progress: its steps, its checkpoint, its log."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from writesae.jobs.disk import remove_halves, sealed, unsealed, write_whole
from writesae.jobs.processes import Processes
from writesae.jobs.tensors import read_checkpoint, write_checkpoint
from writesae.recurrence.dynamics import States
from writesae.recurrence.matrices import Matrices, mean, norm2, size, unit_norm
from writesae.saes.config import SAEConfig
from writesae.saes.sae import WriteSAE
from writesae.saes.training.data import Data, check_data, n_samples, per_unit, pieces, spread
from writesae.saes.training.evaluate import evaluate
from writesae.saes.training.initialise import initialise, initialise_atoms

Log = Callable[[dict[str, Any]], Any]


@dataclass(frozen=True)
class Settings:
    """How an SAE is trained.

    Attributes:
        steps: optimiser steps.
        batch_size: samples drawn at random in each; of `States`, whole sequences of about so many tokens.
        lr: peak learning rate of Adam, reached after ``warmup`` steps; then a cosine down to a tenth.
        warmup: steps over which the learning rate rises.
        unit_norm: train on matrices scaled to norm 1, so that a small write counts as much as a large one. The SAE
            reads unscaled ones all the same: without bias and mean it is linear in scale. Not for target "state".
        train_bias: also train ``b_enc``; activations are then no longer linear in the scale of a matrix. Default: for
            jumprelu and gated, which need it.
        aux_weight, aux_k: auxiliary loss, see `WriteSAE.loss`.
        dead_after: an atom that was not active for so many steps is dead.
        resample_every: every so many steps, until three quarters of the training, dead atoms are initialised again,
            from samples drawn in proportion to their error. 0: never.
        bandwidth: of thresholds, see `WriteSAE.loss`.
        seed: of the atoms' initialisation, the batches and the resampling.
    """

    steps: int = 1500
    batch_size: int = 2048
    lr: float = 5e-3
    warmup: int = 50
    unit_norm: bool = True
    train_bias: bool | None = None
    aux_weight: float = 0.01
    aux_k: int = 32
    dead_after: int = 100
    resample_every: int = 250
    bandwidth: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "aux_k", "dead_after"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)!r}")
        if not 0 < self.lr < math.inf:
            raise ValueError(f"lr must be a number above 0; got {self.lr!r}")

    def rate(self, step: int) -> float:
        """Learning rate: linear warm-up, then a cosine down to a tenth."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.lr * (0.1 + 0.9 * (1 + math.cos(math.pi * done)) / 2)


class Run:
    """The state of one training, and its steps. Every random draw depends on seed and step alone."""

    def __init__(
        self,
        cfg: SAEConfig,
        data: Data,
        settings: Settings,
        path: Path | None = None,
        checkpoint_every: int = 500,
        log: str | Path | Log | None = None,
        log_every: int = 50,
        evaluate_every: int | None = None,
        also_log: Log | None = None,
    ) -> None:
        self.data, self.settings, self.path, self.checkpoint_every = data, settings, path, checkpoint_every
        self.log, self.log_every, self.evaluate_every = log, log_every, evaluate_every
        self.also_log = also_log
        self.step = self.n_resampled = 0
        self.seconds, self._since = 0.0, time.monotonic()
        self.processes = Processes.launched()
        self._given: Matrices | None = None
        self.device = data.device
        with torch.random.fork_rng(devices=[]):  # the random atoms are overwritten: leave the caller's generator alone
            self.sae = WriteSAE(cfg).to(self.device)
        if settings.train_bias is None:
            self.settings = settings = dataclasses.replace(settings, train_bias=not cfg.chooses)
        self.sae.b_enc.requires_grad_(bool(settings.train_bias))
        self.adam = torch.optim.Adam([p for p in self.sae.parameters() if p.requires_grad], fused=True)
        self.silent = torch.zeros(cfg.n_atoms, dtype=torch.int64, device=self.device)  # steps since last active
        self.weight = torch.tensor([0.1, 1.0], device=self.device)  # of the sparsity penalty; and L0 / k, of late
        for file in (path, log):
            if isinstance(file, str | Path) and self.processes.first:
                remove_halves(Path(file).parent, Path(file).name)
        if path is not None and path.exists():
            self.restore(path)
        else:
            if self.sae.mean is not None:
                self.sae.mean.copy_(mean(self.samples()))
            random = self._random(0)
            initialise(self.sae, self._some(max(cfg.n_atoms, min(8 * cfg.n_atoms, 16384)), random), random)
        self._trim_log()

    @property
    def left(self) -> bool:
        return self.step < self.settings.steps

    def advance(self) -> float:
        """One step, with its log and its checkpoint; the batch's normalised MSE."""
        record = self.one_step()
        if not math.isfinite(record["nmse"]):
            raise FloatingPointError(
                f"training diverged: the loss of step {self.step} is {record['nmse']}; lower lr={self.settings.lr}"
            )
        last = not self.left
        if self.step % self.log_every == 0 or last:
            self._write(record)
        if self.evaluate_every and (self.step % self.evaluate_every == 0 or last) and self.data.held_out is not None:
            measured = evaluate(self.sae, self.data.held_out)
            self._write({"step": self.step} | {f"held_out_{key}": value for key, value in measured.items()})
        if self.step % self.checkpoint_every == 0 or last:
            self.save()
        return record["nmse"]

    def samples(self) -> Matrices:
        """What batches are drawn from now."""
        found = self.data.at(self.step, self.settings.batch_size)
        if found is not self._given:
            check_data(self.sae.cfg, found)
            scaled = self.settings.unit_norm and self.sae.cfg.target != "state" and not isinstance(found, States)
            self._given, self._samples = found, unit_norm(found) if scaled else found  # type: ignore[arg-type]
        return self._samples

    def one_step(self) -> dict[str, Any]:
        """One optimiser step, and resampling when it is due; what there is to log."""
        s, sae, data = self.settings, self.sae, self.samples()
        n_units = max(1, s.batch_size // per_unit(data))
        if n_units < self.processes.count:
            raise ValueError(
                f"batch_size={s.batch_size} is {n_units} sequence(s) of {per_unit(data)} states: too few for "
                f"{self.processes.count} processes to share; make it at least {self.processes.count * per_unit(data)}"
            )
        batch = torch.randint(size(data)[0], (n_units,), generator=self._random(1))
        x = data[self.processes.share(batch).to(self.device)]
        weight = 0.0 if sae.sparsity.chooses else self.weight[0]
        out = sae.loss(
            x, dead=self.dead(), aux_weight=s.aux_weight, aux_k=s.aux_k, sparsity_weight=weight,
            bandwidth=s.bandwidth, processes=self.processes,
        )  # fmt: skip
        self.adam.zero_grad()
        out.loss.backward()
        for p in sae.parameters():
            if p.grad is not None:
                p.grad = self.processes.total(p.grad)
        if sae.cfg.unit_atoms:
            sae.dictionary.keep_tangent()
        rate = s.rate(self.step)
        for group in self.adam.param_groups:
            group["lr"] = rate
        self.adam.step()
        if sae.cfg.unit_atoms:
            sae.normalize_decoder()
        fired = self.processes.total(out.fired)
        self.silent += 1
        self.silent[fired > 0] = 0
        self.step += 1
        l0 = int(fired.sum()) / (n_units * per_unit(data))
        if not sae.sparsity.chooses:
            self._lead(l0 / sae.cfg.k)
        every = s.resample_every
        if every and self.step % every == 0 and self.step <= 0.75 * s.steps:
            self._resample()
        nmse, aux = (float(self.processes.total(x)) for x in (out.nmse, out.aux))
        return {"step": self.step, "nmse": nmse, "aux": aux, "l0": l0, "dead": int(self.dead().sum()), "lr": rate}

    @torch.no_grad()
    def _lead(self, l0: float) -> None:
        """Bring L0 to ``k``: by the penalty's weight, which is slow, and by moving all thresholds alike."""
        self.weight[1] = 0.9 * self.weight[1] + 0.1 * l0
        excess = (self.weight[1] - 1).clamp(-1, 1)
        self.weight[0] *= (0.02 * excess).exp()
        self.sae.sparsity.lead(self.sae, excess)

    def dead(self) -> Tensor:
        return self.silent >= self.settings.dead_after

    def finish(self) -> WriteSAE:
        """The trained SAE, with the record of its training."""
        sae, train = self.sae.requires_grad_(True), self.data.at(self.step, self.settings.batch_size)
        few = train[: max(1, 16384 // per_unit(train))]
        if sae.sparsity.calibrated:
            sae.calibrate(self.samples()[: max(1, 2**25 // sae.cfg.n_atoms // per_unit(train))])
        record = asdict(self.settings) | {
            "samples": n_samples(train), "resampled": self.n_resampled, "train": evaluate(sae, few),
        }  # fmt: skip
        if self.data.held_out is not None:
            record["held_out"] = evaluate(sae, self.data.held_out)
        sae.cfg = dataclasses.replace(sae.cfg, training=sae.cfg.training | record)
        return sae

    # Atoms

    @torch.no_grad()
    def _resample(self) -> None:
        """Initialise dead atoms again, from samples that are reconstructed badly."""
        alive = ~self.dead()
        dead = (~alive).nonzero()[:, 0]
        if not len(dead):
            return
        random = self._random(2)
        pool = self._some(8192, random)
        error2 = torch.cat([self.sae.loss(x).error2.flatten() for x in pieces(pool, 1024)]).cpu()
        chosen = torch.multinomial(error2.clamp_min(1e-12), min(len(dead), len(error2)), generator=random)
        dead = dead[: len(chosen)]
        strength = float(norm2(self.sae.encoder)[alive].sqrt().mean()) if bool(alive.any()) else 1.0
        initialise_atoms(self.sae, dead, pool, chosen, strength)
        self.silent[dead] = 0
        for p, state in self.adam.state.items():
            if p.shape[0] == self.sae.cfg.n_atoms:
                state["exp_avg"][dead] = 0
                state["exp_avg_sq"][dead] = 0
        self.n_resampled += len(dead)

    def _some(self, n: int, random: torch.Generator) -> Matrices:
        """About ``n`` samples, drawn at random."""
        data = self.samples()
        units = torch.randperm(size(data)[0], generator=random)[: max(1, n // per_unit(data))]
        return data[units.to(self.device)]

    def _random(self, purpose: int) -> torch.Generator:
        return torch.Generator().manual_seed(spread(self.settings.seed, (self.step << 2) + purpose))

    # Files

    def _identity(self) -> dict[str, Any]:
        """What a checkpoint must agree in: the SAE, the settings, the data."""
        sae = {key: value for key, value in self.sae.cfg.to_dict().items() if key != "training"}
        return {"sae": sae, "settings": asdict(self.settings), "data": self.data.identity()}

    def save(self) -> None:
        """Write the checkpoint, if there is to be one."""
        now = time.monotonic()
        self.seconds, self._since = self.seconds + now - self._since, now
        if self.path is None or not self.processes.first:
            return
        tensors = {f"sae.{name}": t.detach() for name, t in self.sae.state_dict().items()}
        tensors |= {"silent": self.silent, "weight": self.weight}
        for name, p in self.sae.named_parameters():
            tensors |= {f"adam.{name}.{key}": value for key, value in self.adam.state.get(p, {}).items()}
        about = self._identity() | {"step": self.step, "n_resampled": self.n_resampled, "seconds": self.seconds}
        write_checkpoint(self.path, about, tensors)

    def restore(self, path: Path) -> None:
        about, tensors = read_checkpoint(path, "an SAE's training")
        tensors = {name: x.to(self.device) for name, x in tensors.items()}
        different = [key for key, value in json.loads(json.dumps(self._identity())).items() if about[key] != value]
        if different:
            raise ValueError(
                f"{path} is the checkpoint of another training: its {' and '.join(different)} differ; "
                f"give another file, or delete it to start anew"
            )
        self.step, self.n_resampled, self.seconds = about["step"], about["n_resampled"], about["seconds"]
        self.silent, self.weight = tensors["silent"], tensors["weight"]
        self.sae.load_state_dict({k.removeprefix("sae."): t for k, t in tensors.items() if k.startswith("sae.")})
        for name, p in self.sae.named_parameters():
            state = {k.rsplit(".", 1)[1]: t for k, t in tensors.items() if k.rsplit(".", 1)[0] == f"adam.{name}"}
            if state:
                self.adam.state[p] = state

    def _write(self, record: dict[str, Any]) -> None:
        if not self.processes.first:
            return
        record = record | {"seconds": round(self.seconds + time.monotonic() - self._since, 2)}
        if self.also_log is not None:
            self.also_log(record)
        if callable(self.log):
            self.log(record)
        elif self.log is not None:
            with Path(self.log).open("a", encoding="utf-8") as f:
                f.write(json.dumps(sealed(record)) + "\n")

    def _trim_log(self) -> None:
        """Drop the lines of steps after the checkpoint: they will be made again."""
        if self.log is None or callable(self.log) or not self.processes.first:
            return
        path = Path(self.log)
        lines = path.read_bytes().splitlines() if path.exists() else []
        kept = []
        for number, line in enumerate(lines, 1):
            try:
                if unsealed(json.loads(line))["step"] <= self.step:
                    kept.append(line)
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
                if number == len(lines) and not line.endswith(b"}"):
                    break  # a run was killed as it wrote this
                raise ValueError(
                    f"{path}, line {number}, was altered after it was written: mend or delete that line, or the file"
                ) from e
        write_whole(path, b"".join(line + b"\n" for line in kept))
