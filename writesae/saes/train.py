"""Training SAEs: atoms start from data, stay on the unit sphere, and are revived when dead.

The paper's recipe (appendix D): Adam, warm-up then cosine, reconstruction error plus the auxiliary dead-atom loss,
resampling of atoms that stay silent. Here the data may stay in factors, and atoms start as rank-1 parts of random
samples rather than at random.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from writesae.saes.config import SAEConfig
from writesae.saes.data import Data, InMemory, check_data, n_samples, per_unit, pieces, rank_parts
from writesae.saes.files import write_whole
from writesae.saes.matrices import Matrices, dense, mean, norm2, parts, size, unit_norm
from writesae.saes.processes import Processes
from writesae.saes.sparsity import batch_threshold
from writesae.saes.write_sae import WriteSAE
from writesae.states import States

Log = Callable[[dict[str, Any]], Any]


def train_sae(
    cfg: SAEConfig,
    data: Matrices | Data,
    *,
    steps: int = 1500,
    batch_size: int = 2048,
    lr: float = 5e-3,
    warmup: int = 50,
    unit_norm: bool = True,
    train_bias: bool | None = None,
    aux_weight: float = 0.01,
    aux_k: int = 32,
    dead_after: int = 100,
    resample_every: int = 250,
    bandwidth: float = 0.5,
    validation: int | None = None,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 500,
    log: str | Path | Log | None = None,
    log_every: int = 50,
    evaluate_every: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> WriteSAE:
    """Train an SAE on matrices of one head.

    Started by ``accelerate launch`` in several processes, each takes a share of every batch; the result is that of one
    process but for rounding, and the first one writes the files.

    Args:
        cfg: the SAE to make; `train_site` fills in where it belongs.
        data: matrices in the order of the text: ``N`` of them, a `Write` with leading dimension ``[N]`` (any rank) or
            dense ``[N, d_key, d_value]``; or `States` of sequences. Or a `Data`, such as a head of a store.
        steps: optimiser steps, ``batch_size`` samples drawn at random in each (of `States`, whole sequences).
        lr: peak learning rate of Adam, reached after ``warmup`` steps; then a cosine down to a tenth.
        unit_norm: train on matrices scaled to norm 1, so that a small write counts as much as a large one. The SAE
            reads unscaled ones all the same: without bias and mean it is linear in scale. Not for target "state".
        train_bias: also train ``b_enc``; activations are then no longer linear in the scale of a matrix. Default: for
            jumprelu and gated, which need it.
        aux_weight, aux_k: auxiliary loss, see `WriteSAE.loss`.
        dead_after: an atom that was not active for so many steps is dead.
        resample_every: every so many steps, until three quarters of the training, dead atoms start anew from samples
            drawn in proportion to their error. 0: never.
        bandwidth: of thresholds, see `WriteSAE.loss`.
        validation: index of the first sample (for `States`, sequence) held out: training sees ``data[:validation]``
            only. A boundary in the text, because neighbouring tokens write alike. None holds out nothing.
        checkpoint: file to continue from if it exists, and to write every ``checkpoint_every`` steps and on Ctrl-C;
            continued training gives bit-identical weights.
        log: a file for one JSON line every ``log_every`` steps, or a function that is given them.
        evaluate_every: also measure on held-out samples every so many steps, into the log.
        seed: of the atoms' start, the batches and the resampling.
        progress: show a progress bar.

    Returns:
        The SAE, on the data's device; ``cfg.training`` holds the settings and what was measured on training and
        held-out samples (`evaluate`).

    Raises:
        ValueError: the data does not fit ``cfg`` or is not finite, or the checkpoint is of another training.
        FloatingPointError: the loss is no longer a finite number.
    """
    settings = {
        "steps": steps, "batch_size": batch_size, "lr": lr, "warmup": warmup, "unit_norm": unit_norm,
        "train_bias": cfg.sparsity in ("jumprelu", "gated") if train_bias is None else train_bias,
        "aux_weight": aux_weight, "aux_k": aux_k, "dead_after": dead_after, "resample_every": resample_every,
        "bandwidth": bandwidth, "validation": validation, "seed": seed,
    }  # fmt: skip
    if not isinstance(data, Data):
        check_data(cfg, data)
        data = InMemory(data, validation)
    path = None if checkpoint is None else Path(checkpoint)
    run = Run(cfg, data, settings, path, checkpoint_every, log, log_every, evaluate_every)
    return train_runs({"SAE": run}, progress)["SAE"]


def train_runs(runs: Mapping[str, Run], progress: bool = True) -> dict[str, WriteSAE]:
    """Several trainings side by side, a step of each in turn; see `train_sae`."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, disable=not progress) as bar, _interrupts_wait() as interrupted:
        tasks = {
            name: bar.add_task(f"training {name}", total=run.settings["steps"], completed=run.step)
            for name, run in runs.items()
        }
        while any(run.left for run in runs.values()):
            for name, run in runs.items():
                if run.left:
                    nmse = run.advance(stopping=interrupted())
                    bar.update(tasks[name], completed=run.step, description=f"training {name}, nmse {nmse:.3f}")
            if interrupted():
                for run in runs.values():
                    run.save()
                where = ", ".join(f"{name} after step {r.step} of {r.settings['steps']}" for name, r in runs.items())
                raise KeyboardInterrupt(f"training stopped: {where}")
    return {name: run.finish() for name, run in runs.items()}


@torch.no_grad()
def evaluate(sae: WriteSAE, data: Matrices, batch_size: int = 4096) -> dict[str, float]:
    """How well an SAE does on samples; batch_topk by its threshold, if it has one.

    Returns:
        ``nmse``: summed squared error over summed squared norm. ``mse``: mean squared error of one number.
        ``cosine``: of the strongest atom to the matrix (less the mean, if centred), mean over samples;
        ``cosine_p10``: a tenth of the samples have less. ``l0``: active atoms a sample. ``alive``: share of atoms
        active at least once. ``n``: samples.
    """
    check_data(sae.cfg, data)
    over_batch = sae.cfg.sparsity == "batch_topk" and bool(torch.isnan(sae.threshold))
    outs = [sae.loss(piece, over_batch=over_batch) for piece in pieces(data, batch_size)]
    cosine, errors = (
        torch.cat([x.flatten() for x in xs]) for xs in zip(*((o.cosine, o.error2) for o in outs), strict=True)
    )
    fired = torch.stack([out.fired for out in outs]).sum(0)
    n = len(cosine)
    return {
        "nmse": float(errors.sum() / sum(out.norm2.sum() for out in outs)),
        "mse": float(errors.mean()) / (sae.cfg.d_key * sae.cfg.d_value),
        "cosine": float(cosine.mean()),
        "cosine_p10": float(cosine.kthvalue(max(1, n // 10)).values),
        "l0": int(fired.sum()) / n,
        "alive": int((fired > 0).sum()) / sae.cfg.n_atoms,
        "n": n,
    }


class Run:
    """The state of one training, and its steps. Every random draw depends on seed and step alone."""

    def __init__(
        self,
        cfg: SAEConfig,
        data: Data,
        settings: dict[str, Any],
        path: Path | None = None,
        checkpoint_every: int = 500,
        log: str | Path | Log | None = None,
        log_every: int = 50,
        evaluate_every: int | None = None,
    ) -> None:
        self.data, self.settings, self.path, self.checkpoint_every = data, settings, path, checkpoint_every
        self.log, self.log_every, self.evaluate_every = log, log_every, evaluate_every
        self.step = self.n_resampled = 0
        self.seconds, self._since = 0.0, time.monotonic()
        self.processes = Processes.launched()
        self._given: Matrices | None = None
        self.device = parts(data.at(0, settings["batch_size"]))[0].device
        with torch.random.fork_rng(devices=[]):  # the random start is overwritten: leave the caller's generator alone
            self.sae = WriteSAE(cfg).to(self.device)
        self.sae.b_enc.requires_grad_(settings["train_bias"])
        self.adam = torch.optim.Adam([p for p in self.sae.parameters() if p.requires_grad], fused=True)
        self.silent = torch.zeros(cfg.n_atoms, dtype=torch.int64, device=self.device)  # steps since last active
        self.weight = torch.tensor(0.1, device=self.device)  # of the sparsity penalty: it moves until L0 is k
        if path is not None and path.exists():
            self.restore(path)
        else:
            if self.sae.mean is not None:
                self.sae.mean.copy_(mean(self.samples()))
            self._start_all_atoms()
        self._trim_log()

    @property
    def left(self) -> bool:
        return self.step < self.settings["steps"]

    def advance(self, stopping: bool = False) -> float:
        """One step, with its log and its checkpoint; the batch's nmse."""
        record = self.one_step()
        if not math.isfinite(record["nmse"]):
            raise FloatingPointError(
                f"training diverged: the loss of step {self.step} is {record['nmse']}; lower lr={self.settings['lr']}"
            )
        last = not self.left
        if self.log is not None and (self.step % self.log_every == 0 or last):
            self._write(record)
        if self.evaluate_every and (self.step % self.evaluate_every == 0 or last) and self.data.held_out is not None:
            measured = evaluate(self.sae, self.data.held_out)
            self._write({"step": self.step} | {f"held_out_{key}": value for key, value in measured.items()})
        if self.step % self.checkpoint_every == 0 or last:
            self.save()
        return record["nmse"]

    def samples(self) -> Matrices:
        """What batches are drawn from now."""
        found = self.data.at(self.step, self.settings["batch_size"])
        if found is not self._given:
            check_data(self.sae.cfg, found)
            scaled = self.settings["unit_norm"] and self.sae.cfg.target != "state" and not isinstance(found, States)
            self._given, self._samples = found, unit_norm(found) if scaled else found  # type: ignore[arg-type]
        return self._samples

    def one_step(self) -> dict[str, Any]:
        """One optimiser step, and resampling when it is due; what there is to log."""
        s, sae, data = self.settings, self.sae, self.samples()
        n_units = max(1, s["batch_size"] // per_unit(data))
        batch = torch.randint(size(data)[0], (n_units,), generator=self._random(1))
        x = data[self.processes.share(batch).to(self.device)]
        weight = self.weight if sae.cfg.sparsity in ("jumprelu", "gated") else 0.0
        out = sae.loss(
            x, dead=self.dead(), aux_weight=s["aux_weight"], aux_k=s["aux_k"], sparsity_weight=weight,
            bandwidth=s["bandwidth"], processes=self.processes,
        )  # fmt: skip
        self.adam.zero_grad()
        out.loss.backward()
        for p in sae.parameters():
            if p.grad is not None:
                p.grad = self.processes.total(p.grad)
        if sae.cfg.unit_atoms:
            self._keep_tangent()
        rate = _rate(self.step, s)
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
        if sae.cfg.sparsity in ("jumprelu", "gated"):
            self.weight *= math.exp(0.02 * max(-1.0, min(1.0, l0 / sae.cfg.k - 1)))
        every = s["resample_every"]
        if every and self.step % every == 0 and self.step <= 0.75 * s["steps"]:
            self._resample()
        nmse, aux = (float(self.processes.total(x)) for x in (out.nmse, out.aux))
        return {"step": self.step, "nmse": nmse, "aux": aux, "l0": l0, "dead": int(self.dead().sum()), "lr": rate}

    def dead(self) -> Tensor:
        return self.silent >= self.settings["dead_after"]

    def finish(self) -> WriteSAE:
        """The trained SAE, with the record of its training."""
        sae, train = self.sae.requires_grad_(True), self.data.at(self.step, self.settings["batch_size"])
        few = train[: max(1, 16384 // per_unit(train))]
        if sae.cfg.sparsity == "batch_topk":
            sae.calibrate(self.samples()[: max(1, 2**25 // sae.cfg.n_atoms // per_unit(train))])
        record = self.settings | {
            "samples": n_samples(train), "resampled": self.n_resampled, "train": evaluate(sae, few),
        }  # fmt: skip
        if self.data.held_out is not None:
            record["held_out"] = evaluate(sae, self.data.held_out)
        sae.cfg = dataclasses.replace(sae.cfg, training=sae.cfg.training | record)
        return sae

    # Atoms

    @torch.no_grad()
    def _keep_tangent(self) -> None:
        """Take out of the gradients what would only change an atom's norm."""
        sae = self.sae
        if sae.cfg.decoder == "dense":
            pairs = [(sae.A_dec, (-2, -1))]
        else:
            pairs = [(sae.V_dec, -1), (sae.W_dec, -1 if sae.cfg.rank == 1 else (-2, -1))]
        for p, dims in pairs:
            assert p.grad is not None
            p.grad -= (p.grad * p).sum(dims, keepdim=True) / p.square().sum(dims, keepdim=True).clamp_min(1e-30) * p

    @torch.no_grad()
    def _resample(self) -> None:
        """Start dead atoms anew from samples that are reconstructed badly."""
        dead = self.dead().nonzero()[:, 0]
        if not len(dead):
            return
        random = self._random(2)
        pool = self._some(8192, random)
        error2 = torch.cat([self.sae.loss(x).error2.flatten() for x in pieces(pool, 1024)]).cpu()
        chosen = torch.multinomial(error2.clamp_min(1e-12), min(len(dead), len(error2)), generator=random)
        dead = dead[: len(chosen)]
        self._start_atoms(dead, pool, chosen)
        self.silent[dead] = 0
        for p, state in self.adam.state.items():
            if p.shape[0] == self.sae.cfg.n_atoms:
                state["exp_avg"][dead] = 0
                state["exp_avg_sq"][dead] = 0
        self.n_resampled += len(dead)

    @torch.no_grad()
    def _start_all_atoms(self, rounds: int = 8) -> None:
        """k-means++ in rounds: each starts a share of the atoms from samples that those before reconstruct badly.

        Atoms of states start from what single tokens wrote. The leading parts of states are much alike, so that many
        atoms at once would reconstruct the same thing many times over.
        """
        random, n_atoms = self._random(0), self.sae.cfg.n_atoms
        pool = self._some(max(n_atoms, min(8 * n_atoms, 16384)), random)
        if isinstance(pool, States):
            size2, rounds = pool.gain.norm().square().flatten().cpu(), 1
        else:
            about = pool if self.sae.mean is None else dense(pool) - self.sae.mean
            size2 = norm2(about).cpu()
        left2 = size2
        for atoms in torch.arange(n_atoms).chunk(rounds):
            enough = int((left2 > 1e-12).sum()) >= len(atoms)
            chosen = torch.multinomial(left2.clamp_min(1e-12), len(atoms), replacement=not enough, generator=random)
            self._start_atoms(atoms, pool, chosen)
            if rounds > 1:
                best = torch.cat([self.sae.pre(x)[:, atoms].amax(-1).cpu() for x in pieces(pool, 1024)])
                left2 = torch.minimum(left2, size2 - best.relu().square())
        few = next(pieces(pool, 2048))
        self._start_thresholds(few)
        if self.sae.cfg.encoder != "tied":
            self._start_scale(few)
            self._start_thresholds(few)

    def _start_scale(self, x: Matrices) -> None:
        """Scale the encoder so that reconstructions have the right size: ``k`` atoms that are alike overshoot."""
        encoder = next(getattr(self.sae, name) for name in ("V_enc", "A_enc") if hasattr(self.sae, name))
        whole = self.sae.loss(x)
        encoder.mul_(0.5)
        # The error is N - 2 c P + c^2 Q in the scale c, now known at c = 0, 1/2 and 1.
        at_1, at_half = (float((out.error2 - out.norm2).sum()) for out in (whole, self.sae.loss(x)))
        Q = 2 * (at_1 - 2 * at_half)
        P = (Q - at_1) / 2
        encoder.mul_(2 * min(1.0, P / Q) if P > 0 and Q > 0 else 2)

    def _some(self, n: int, random: torch.Generator) -> Matrices:
        """About ``n`` samples, drawn at random."""
        data = self.samples()
        units = torch.randperm(size(data)[0], generator=random)[: max(1, n // per_unit(data))]
        return data[units.to(self.device)]

    def _start_thresholds(self, x: Matrices) -> None:
        """Where they are learnt: such that ``k`` atoms a matrix are active at the start."""
        sae = self.sae
        if sae.cfg.sparsity not in ("jumprelu", "gated"):
            return
        sae.b_enc.zero_()
        threshold = batch_threshold(sae.pre(x), sae.cfg.k).clamp_min(1e-12)
        if sae.cfg.sparsity == "jumprelu":
            sae.log_threshold.fill_(float(threshold.log()))
        else:
            sae.b_enc.fill_(-float(threshold))

    @torch.no_grad()
    def _start_atoms(self, atoms: Tensor, pool: Matrices, chosen: Tensor) -> None:
        """Set atoms, encoder and decoder alike, to the leading parts of samples (of states: of what was written)."""
        sae = self.sae
        for which, piece in zip(atoms.split(256), chosen.split(256), strict=True):
            piece = piece.to(self.device)
            if isinstance(pool, States):
                x = pool.gain[piece // pool.shape[1], piece % pool.shape[1]]
            else:
                x = pool[piece] if sae.mean is None else dense(pool[piece]) - sae.mean
            if sae.cfg.decoder == "dense":
                sae.A_dec[which] = dense(unit_norm(x))
            if sae.cfg.decoder == "factored" or sae.cfg.encoder == "bilinear":
                v, w = rank_parts(x, sae.cfg.rank)
                for name, rows in (("V_dec", v), ("W_dec", w), ("V_enc", v), ("W_enc", w)):
                    if hasattr(sae, name):
                        getattr(sae, name)[which] = rows.reshape(-1, *getattr(sae, name).shape[1:])
            if sae.cfg.encoder == "dense":
                sae.A_enc[which] = dense(sae.decoder[which])
        if sae.cfg.sparsity not in ("jumprelu", "gated"):
            sae.b_enc[atoms] = 0

    def _random(self, purpose: int) -> torch.Generator:
        return torch.Generator().manual_seed((self.settings["seed"] << 34) + (self.step << 2) + purpose)

    # Files

    def _identity(self) -> dict[str, Any]:
        """What a checkpoint must agree in: the SAE, the settings, the data."""
        sae = {key: value for key, value in self.sae.cfg.to_dict().items() if key != "training"}
        return {"sae": sae, "settings": self.settings, "data": self.data.identity()}

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
        write_whole(self.path, safetensors.torch.save(tensors, {"training": json.dumps(about)}))

    def restore(self, path: Path) -> None:
        try:
            with safetensors.safe_open(path, "pt") as f:
                about = json.loads((f.metadata() or {}).get("training", "null"))
                tensors = {name: f.get_tensor(name).to(self.device) for name in f.keys()}  # noqa: SIM118
        except (safetensors.SafetensorError, ValueError) as e:
            raise ValueError(f"{path} is not a whole checkpoint ({e}); delete it to start anew") from e
        if about is None:
            raise ValueError(f"{path} is not a checkpoint of an SAE's training; give another file")
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
        if not self.processes.first or self.log is None:
            return
        record = record | {"seconds": round(self.seconds + time.monotonic() - self._since, 2)}
        if callable(self.log):
            self.log(record)
            return
        with Path(self.log).open("a", encoding="utf-8") as f:
            f.write(json.dumps(record) + "\n")

    def _trim_log(self) -> None:
        """Drop the lines of steps after the checkpoint: they will be made again."""
        if self.log is None or callable(self.log) or not self.processes.first:
            return
        path = Path(self.log)
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= self.step]
        write_whole(path, "".join(f"{line}\n" for line in kept).encode())


@contextlib.contextmanager
def _interrupts_wait() -> Iterator[Callable[[], bool]]:
    """Hold Ctrl-C back until the step in progress is complete; yields a function that says whether it came."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    came: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: came.append(number))
    try:
        yield lambda: bool(came)
    finally:
        signal.signal(signal.SIGINT, before)


def _rate(step: int, settings: dict[str, Any]) -> float:
    """Learning rate: linear warm-up, then a cosine down to a tenth."""
    if step < settings["warmup"]:
        return settings["lr"] * (step + 1) / settings["warmup"]
    done = (step - settings["warmup"]) / max(1, settings["steps"] - settings["warmup"])
    return settings["lr"] * (0.1 + 0.9 * (1 + math.cos(math.pi * done)) / 2)
