"""Training SAEs: atoms are initialised from data, stay on the unit sphere, and are revived when dead.

The paper's recipe (appendix D): Adam, warm-up then cosine, reconstruction error plus the auxiliary dead-atom loss,
resampling of atoms that stay silent. Here the data may stay in factors, and atoms are initialised as rank-1 parts of
random samples rather than at random.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from writesae.jobs.progress import Bars
from writesae.recurrence.matrices import Matrices
from writesae.saes.config import SAEConfig
from writesae.saes.sae import WriteSAE
from writesae.saes.training.data import Data, InMemory, check_data
from writesae.saes.training.run import Log, Run, Settings


def train_sae(
    cfg: SAEConfig,
    data: Matrices | Data,
    *,
    validation: int | None = None,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 500,
    log: str | Path | Log | None = None,
    log_every: int = 50,
    evaluate_every: int | None = None,
    progress: bool = True,
    **settings: Any,
) -> WriteSAE:
    """Train an SAE on matrices of one head.

    Started by ``accelerate launch`` in several processes, each takes a share of every batch; the result is that of one
    process but for rounding, and the first one writes the files.

    Args:
        cfg: the SAE to make; `train_site` fills in where it belongs.
        data: matrices in the order of the text: ``N`` of them, a `Write` with leading dimension ``[N]`` (any rank) or
            dense ``[N, d_key, d_value]``; or `States` of sequences. Or a `Data`, such as a head of a store.
        validation: index of the first sample (for `States`, sequence) held out: training sees ``data[:validation]``
            only. A boundary in the text, because neighbouring tokens write alike. None holds out nothing.
        checkpoint: file to continue from if it exists, and to write every ``checkpoint_every`` steps and on Ctrl-C;
            continued training gives bit-identical weights.
        log: a file for one JSON line every ``log_every`` steps, or a function that is given them.
        evaluate_every: also measure on held-out samples every so many steps, into the log.
        progress: show a progress bar.
        **settings: fields of `Settings`: ``steps``, ``batch_size``, ``lr``, ``seed``, ...

    Returns:
        The SAE, on the data's device; ``cfg.training`` holds the settings and what was measured on training and
        held-out samples (`evaluate`).

    Raises:
        ValueError: the data does not fit ``cfg`` or is not finite, or the checkpoint is of another training.
        FloatingPointError: the loss is no longer a finite number.
    """
    if not isinstance(data, Data):
        check_data(cfg, data)
        data = InMemory(data, validation)
    path = None if checkpoint is None else Path(checkpoint)
    run = Run(cfg, data, Settings(**settings), path, checkpoint_every, log, log_every, evaluate_every)
    return train_runs({"SAE": run}, progress)["SAE"]


def train_runs(runs: Mapping[str, Run], progress: bool = True) -> dict[str, WriteSAE]:
    """Several trainings side by side, a step of each in turn; see `train_sae`."""
    # A notebook may have switched gradients off.
    with Bars(progress) as bars, _interrupts_wait() as interrupted, torch.enable_grad():
        lines = {
            name: bars.add(f"training {name}" if run.left else f"{name}, trained already", run.settings.steps, run.step)
            for name, run in runs.items()
        }
        while any(run.left for run in runs.values()):
            for name, run in runs.items():
                if run.left:
                    error = run.advance()
                    lines[name](run.step, f"training {name}, normalised MSE {error:.3f}")
            if interrupted():
                for run in runs.values():
                    run.save()
                where = ", ".join(f"{name} after step {r.step} of {r.settings.steps}" for name, r in runs.items())
                raise KeyboardInterrupt(f"training stopped: {where}")
    return {name: run.finish() for name, run in runs.items()}


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
