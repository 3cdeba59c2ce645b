"""Training SAEs: atoms start from data, the decoder stays on the unit sphere, dead atoms are revived.

The paper's recipe (appendix D): Adam, warm-up then cosine, reconstruction error plus the auxiliary dead-atom loss,
resampling of atoms that stay silent. Here the data may stay in factors, and atoms start as rank-1 parts of random
samples rather than at random: with few active atoms, one atom has to carry as much of a write as it can.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from writesae.recurrence import Write
from writesae.saes.config import SAEConfig
from writesae.saes.files import write_whole
from writesae.saes.write_sae import Matrices, WriteSAE


def train_sae(
    cfg: SAEConfig,
    data: Matrices,
    *,
    steps: int = 1500,
    batch_size: int = 2048,
    lr: float = 5e-3,
    warmup: int = 50,
    unit_norm: bool = True,
    train_bias: bool = False,
    aux_weight: float = 0.01,
    aux_k: int = 32,
    dead_after: int = 100,
    resample_every: int = 250,
    validation: int | None = None,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 500,
    seed: int = 0,
    progress: bool = True,
) -> WriteSAE:
    """Train an SAE on matrices of one head.

    Args:
        cfg: the SAE to make; `train_site` fills in where it belongs.
        data: ``N`` matrices, a `Write` with leading dimension ``[N]`` (any rank) or dense ``[N, d_key, d_value]``, in
            the order of the text.
        steps: optimiser steps, ``batch_size`` samples drawn at random in each.
        lr: peak learning rate of Adam, reached after ``warmup`` steps; then a cosine down to a tenth.
        unit_norm: train on matrices scaled to norm 1, so that a small write counts as much as a large one. The SAE
            reads unscaled ones all the same: without bias and mean it is linear in scale. Not for target "state".
        train_bias: also train ``b_enc``; activations are then no longer linear in the scale of a matrix.
        aux_weight, aux_k: auxiliary loss, see `WriteSAE.loss`.
        dead_after: an atom that was not active for so many steps is dead.
        resample_every: every so many steps, until three quarters of the training, dead atoms start anew from samples
            drawn in proportion to their error. 0: never.
        validation: index of the first sample held out: training sees ``data[:validation]`` only. A boundary in the
            text, because neighbouring tokens write alike. None holds out nothing.
        checkpoint: file to continue from if it exists, and to write every ``checkpoint_every`` steps and on Ctrl-C;
            continued training gives bit-identical weights.
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
        "train_bias": train_bias, "aux_weight": aux_weight, "aux_k": aux_k, "dead_after": dead_after,
        "resample_every": resample_every, "validation": validation, "seed": seed,
    }  # fmt: skip
    n = _check_data(cfg, data)
    if validation is not None and not 0 < validation < n:
        raise ValueError(f"validation={validation} must split the {n} samples: 1 to {n - 1}")
    train = data[:validation]
    run = _Run(cfg, _unit_norm(train) if unit_norm and cfg.target != "state" else train, settings)
    path = None if checkpoint is None else Path(checkpoint)
    if path is not None and path.exists():
        run.restore(path)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, disable=not progress) as bar, _interrupts_wait() as interrupted:
        task = bar.add_task("training SAE", total=steps, completed=run.step)
        while run.step < steps:
            nmse = run.one_step()
            if not math.isfinite(nmse):
                raise FloatingPointError(f"training diverged: the loss of step {run.step} is {nmse}; lower lr={lr}")
            if path is not None and (run.step % checkpoint_every == 0 or run.step == steps or interrupted()):
                run.save(path)
            if interrupted():
                raise KeyboardInterrupt(f"training stopped after step {run.step} of {steps}")
            bar.update(task, completed=run.step, description=f"training SAE, nmse {nmse:.3f}")
    sae = run.sae.requires_grad_(True)
    record = settings | {"samples": n, "resampled": run.n_resampled, "train": evaluate(sae, train[:16384])}
    if validation is not None:
        record["held_out"] = evaluate(sae, data[validation:])
    sae.cfg = dataclasses.replace(cfg, training=cfg.training | record)
    return sae


@torch.no_grad()
def evaluate(sae: WriteSAE, data: Matrices, batch_size: int = 4096) -> dict[str, float]:
    """How well an SAE does on matrices ``[N]`` (a `Write`) or ``[N, d_key, d_value]``.

    Returns:
        ``nmse``: summed squared error over summed squared norm. ``cosine``: of the strongest atom to the matrix, mean
        over samples; ``cosine_p10``: a tenth of the samples have less. ``l0``: active atoms a sample. ``used``: share
        of atoms active at least once. ``n``: samples.
    """
    n = _check_data(sae.cfg, data)
    outs = [sae.loss(data[start : start + batch_size]) for start in range(0, n, batch_size)]
    cosine = torch.cat([out.cosine for out in outs])
    values = torch.cat([out.values for out in outs])
    fired = torch.cat([out.indices for out in outs])[values > 0]
    return {
        "nmse": float(sum(out.error2.sum() for out in outs) / sum(out.norm2.sum() for out in outs)),
        "cosine": float(cosine.mean()),
        "cosine_p10": float(cosine.kthvalue(max(1, n // 10)).values),
        "l0": fired.numel() / n,
        "used": fired.unique().numel() / sae.cfg.n_atoms,
        "n": n,
    }


class _Run:
    """The state of one training, and its steps. Every random draw depends on seed and step alone."""

    def __init__(self, cfg: SAEConfig, data: Matrices, settings: dict[str, Any]) -> None:
        self.data, self.settings = data, settings
        self.step = self.n_resampled = 0
        with torch.random.fork_rng(devices=[]):  # the random start is overwritten: leave the caller's generator alone
            self.sae = WriteSAE(cfg).to(_device(data))
        self.sae.b_enc.requires_grad_(settings["train_bias"])
        if self.sae.mean is not None:
            self.sae.mean.copy_(_mean(data))
        self._start_all_atoms()
        self.adam = torch.optim.Adam([p for p in self.sae.parameters() if p.requires_grad], fused=True)
        self.silent = torch.zeros(cfg.n_atoms, dtype=torch.int64, device=_device(data))  # steps since last active

    def one_step(self) -> float:
        """One optimiser step, and resampling when it is due; returns the batch's nmse."""
        s = self.settings
        n = len(_first(self.data))
        batch = torch.randint(n, (s["batch_size"],), generator=self._random(1)).to(_device(self.data))
        out = self.sae.loss(self.data[batch], dead=self.dead(), aux_weight=s["aux_weight"], aux_k=s["aux_k"])
        self.adam.zero_grad()
        out.loss.backward()
        with torch.no_grad():
            for p in (self.sae.V_dec, self.sae.W_dec):  # along the atom the loss only asks for another norm
                assert p.grad is not None
                p.grad -= (p.grad * p).sum(-1, keepdim=True) * p
        for group in self.adam.param_groups:
            group["lr"] = _rate(self.step, s)
        self.adam.step()
        self.sae.normalize_decoder()
        self.silent += 1
        self.silent[out.indices[out.values > 0]] = 0
        self.step += 1
        every = s["resample_every"]
        if every and self.step % every == 0 and self.step <= 0.75 * s["steps"]:
            self._resample()
        return float(out.nmse.detach())

    def dead(self) -> Tensor:
        return self.silent >= self.settings["dead_after"]

    @torch.no_grad()
    def _resample(self) -> None:
        """Start dead atoms anew from samples that are reconstructed badly."""
        dead = self.dead().nonzero()[:, 0]
        if not len(dead):
            return
        random = self._random(2)
        n = len(_first(self.data))
        pool = torch.randint(n, (min(n, 8192),), generator=random)
        error2 = torch.cat([self.sae.loss(x).error2.cpu() for x in self._pieces(pool)])
        chosen = torch.multinomial(error2.clamp_min(1e-12), min(len(dead), len(pool)), generator=random)
        dead = dead[: len(chosen)]
        self._start_atoms(dead, pool[chosen])
        self.silent[dead] = 0
        for state in self.adam.state.values():
            state["exp_avg"][dead] = 0
            state["exp_avg_sq"][dead] = 0
        self.n_resampled += len(dead)

    @torch.no_grad()
    def _start_all_atoms(self, rounds: int = 8) -> None:
        """k-means++ in rounds: each starts a share of the atoms from samples that those before reconstruct badly."""
        random, n = self._random(0), len(_first(self.data))
        n_atoms = self.sae.cfg.n_atoms
        pool = torch.randperm(n, generator=random)[: min(8 * n_atoms, 16384)]
        norm2 = left2 = torch.cat([self.sae.loss(x).norm2.cpu() for x in self._pieces(pool)])
        for atoms in torch.arange(n_atoms).chunk(rounds):
            enough = len(pool) >= len(atoms)
            chosen = torch.multinomial(left2.clamp_min(1e-12), len(atoms), replacement=not enough, generator=random)
            self._start_atoms(atoms, pool[chosen])
            best = torch.cat([self.sae.pre(x)[:, atoms].amax(-1).cpu() for x in self._pieces(pool)])
            left2 = torch.minimum(left2, norm2 - best.relu().square())

    def _pieces(self, samples: Tensor) -> Iterator[Matrices]:
        """The samples, in pieces that fit into memory."""
        return (self.data[piece.to(_device(self.data))] for piece in samples.split(1024))

    @torch.no_grad()
    def _start_atoms(self, atoms: Tensor, samples: Tensor) -> None:
        """Set atoms, encoder and decoder alike, to the leading rank-1 parts of samples."""
        v, w = _leading(self.data[samples.to(_device(self.data))], self.sae.mean)
        sae = self.sae
        for name, rows in (("V_dec", v), ("W_dec", w), ("V_enc", v), ("W_enc", w)):
            if hasattr(sae, name):
                getattr(sae, name)[atoms] = rows.to(sae.V_dec.dtype)
        sae.b_enc[atoms] = 0

    def _random(self, purpose: int) -> torch.Generator:
        return torch.Generator().manual_seed((self.settings["seed"] << 34) + (self.step << 2) + purpose)

    def _identity(self) -> dict[str, Any]:
        """What a checkpoint must agree in: the SAE, the settings, the data."""
        n = len(_first(self.data))
        few = self.data[:: max(1, n // 64)]
        digest = hashlib.sha256()
        for part in _parts(few):
            digest.update(part.float().cpu().contiguous().numpy().tobytes())
        return {
            "sae": {key: value for key, value in self.sae.cfg.to_dict().items() if key != "training"},
            "settings": self.settings,
            "data": f"{n} samples, {digest.hexdigest()[:16]}",
        }

    def save(self, path: Path) -> None:
        tensors = {f"sae.{name}": t.detach() for name, t in self.sae.state_dict().items()} | {"silent": self.silent}
        for name, p in self.sae.named_parameters():
            tensors |= {f"adam.{name}.{key}": value for key, value in self.adam.state.get(p, {}).items()}
        about = self._identity() | {"step": self.step, "n_resampled": self.n_resampled}
        write_whole(path, safetensors.torch.save(tensors, {"training": json.dumps(about)}))

    def restore(self, path: Path) -> None:
        try:
            with safetensors.safe_open(path, "pt") as f:
                about = json.loads((f.metadata() or {}).get("training", "null"))
                tensors = {name: f.get_tensor(name).to(self.silent.device) for name in f.keys()}  # noqa: SIM118
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
        self.step, self.n_resampled = about["step"], about["n_resampled"]
        self.silent = tensors["silent"]
        self.sae.load_state_dict({k.removeprefix("sae."): t for k, t in tensors.items() if k.startswith("sae.")})
        for name, p in self.sae.named_parameters():
            state = {k.rsplit(".", 1)[1]: t for k, t in tensors.items() if k.rsplit(".", 1)[0] == f"adam.{name}"}
            if state:
                self.adam.state[p] = state


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


# Samples, in factors or dense


def _parts(data: Matrices) -> tuple[Tensor, ...]:
    return (data.key, data.value) if isinstance(data, Write) else (data,)


def _first(data: Matrices) -> Tensor:
    return _parts(data)[0]


def _device(data: Matrices) -> torch.device:
    return _first(data).device


def _check_data(cfg: SAEConfig, data: Matrices) -> int:
    """The number of samples; ValueError if they are not a list of matrices of the SAE's size."""
    size = (*data.shape, data.d_key, data.d_value) if isinstance(data, Write) else tuple(data.shape)
    if len(size) != 3 or size[1:] != (cfg.d_key, cfg.d_value) or not size[0]:
        raise ValueError(
            f"an SAE of {cfg.d_key}x{cfg.d_value} learns from [N, {cfg.d_key}, {cfg.d_value}], dense or a Write with "
            f"leading dimension [N]; got {list(size)}"
        )
    for part in _parts(data):
        if not part.isfinite().all():
            raise ValueError("some of these matrices have numbers that are NaN or infinite; leave them out")
    return size[0]


def _unit_norm(data: Matrices) -> Matrices:
    if isinstance(data, Write):
        return data * (1 / data.norm().clamp_min(1e-30))
    return data / data.norm(dim=(-1, -2), keepdim=True).clamp_min(1e-30)


def _mean(data: Matrices) -> Tensor:
    if not isinstance(data, Write):
        return data.mean(0)
    keys, values = (x.reshape(-1, x.shape[-1]) for x in data.factors())
    return keys.T @ values / len(_first(data))


def _leading(x: Matrices, mean: Tensor | None = None, rounds: int = 8) -> tuple[Tensor, Tensor]:
    """Unit factors of the largest rank-1 part of each matrix ``X - M``, by power iteration."""
    if isinstance(x, Write) and x.rank == 1 and mean is None:
        return F.normalize(x.key, dim=-1), F.normalize(x.value, dim=-1)
    dense = x.dense() if isinstance(x, Write) else x
    dense = dense if mean is None else dense - mean
    v = dense[torch.arange(len(dense)), :, dense.square().sum(-2).argmax(-1)][..., None]  # its strongest column
    for _ in range(rounds):
        w = F.normalize(dense.mT @ v, dim=-2)
        v = F.normalize(dense @ w, dim=-2)
    return v[..., 0], w[..., 0]
