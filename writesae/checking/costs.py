"""What hooks, caches and edits cost beside the unwrapped model, in time and, on a GPU, in memory."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import torch

from writesae.checking.recurrences import random_write
from writesae.checking.result import Row
from writesae.checking.subject import Subject
from writesae.hooks import Add, name_of
from writesae.hooks.detached import detached

SECONDS = 15.0  # that the races may take, about
ROUNDS = (3, 30)


def check_costs(subject: Subject) -> Iterator[Row]:
    """Interleaved rounds, each way once in every round; the ratio is the median over rounds. Nothing is demanded."""
    model, (layer, *_) = subject.model, subject.layers
    inputs = [name_of(q, layer) for q in model.family(layer).rule.inputs]
    edit = Add(layer, 0, write=random_write(subject, model.site(layer)), relative=True)

    def edited() -> None:
        with model.intervene(edit):
            subject.run()

    def on_ours() -> None:
        model.kernels = "writesae"
        try:
            subject.run()
        finally:
            model.kernels = "native"

    ways: dict[str, Callable[[], Any]] = {
        "nothing attached": subject.run,
        **({"kernels='writesae'": on_ours} if model.kernels == "native" else {}),
        f"cache of layer {layer}": lambda: model.run_with_cache(subject.ids, inputs, **subject.of_last),
        f"edit of layer {layer}": edited,
    }
    with detached(model.hf_model):
        base = _seconds(subject, subject.run)
    rounds = max(ROUNDS[0], min(ROUNDS[1], int(SECONDS / (base * (len(ways) + 1)))))
    ratios: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        with detached(model.hf_model):
            base = _seconds(subject, subject.run)
        for name in random.sample(list(ways), len(ways)):
            ratios[name].append(_seconds(subject, ways[name]) / base)
    yield Row("time", "unwrapped", 1000 * base, unit="ms", note=f"{subject.n_pos} tokens, {rounds} rounds")
    for name, found in ratios.items():
        yield Row("time", name, median(found), unit="x native")
    if subject.model.device.type != "cuda":
        yield Row("peak memory", "on CUDA alone", unit="MiB")
        return
    with detached(model.hf_model):
        yield Row("peak memory", "unwrapped", _peak(subject, subject.run), unit="MiB")
    for name, way in ways.items():
        yield Row("peak memory", name, _peak(subject, way), unit="MiB")


def _wait(subject: Subject) -> None:
    """Until the device has done what it was told to."""
    if subject.model.device.type != "cpu":
        torch.accelerator.synchronize(subject.model.device)


def _seconds(subject: Subject, run: Callable[[], Any]) -> float:
    _wait(subject)
    start = time.perf_counter()
    run()
    _wait(subject)
    return time.perf_counter() - start


def _peak(subject: Subject, run: Callable[[], Any]) -> float:
    """MiB, of all devices of this kind together."""
    devices = range(torch.cuda.device_count())
    _wait(subject)
    before = sum(torch.cuda.memory_allocated(i) for i in devices)
    for i in devices:
        torch.cuda.reset_peak_memory_stats(i)
    run()
    _wait(subject)
    return (sum(torch.cuda.max_memory_allocated(i) for i in devices) - before) / 2**20
