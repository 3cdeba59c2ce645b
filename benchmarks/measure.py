"""How the benchmarks measure: races in interleaved rounds, and the peak memory of one run in a fresh process."""

from __future__ import annotations

import ctypes
import gc
import json
import random
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any


def race(
    runs: dict[str, Callable[[], Any]],
    rounds: int,
    within: Mapping[str, Callable[[], AbstractContextManager[Any]]] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of every contestant in every round by this clock; what it runs ``within`` is entered before its time
    begins."""

    def timed(name: str) -> float:
        with (within or {}).get(name, nullcontext)():
            start = clock()
            runs[name]()
            return clock() - start

    for name in runs:
        timed(name)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name in random.sample(list(runs), len(runs)):
            seconds[name].append(timed(name))
    return seconds


def median(xs: list[float]) -> float:
    return sorted(xs)[len(xs) // 2]


def in_fresh_process(script: str, *spec: Any) -> list[float]:
    """Run ``script --child SPEC`` and return the numbers on the last line it prints."""
    run = subprocess.run([sys.executable, script, "--child", json.dumps(spec)], capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"{script} --child {json.dumps(spec)} failed:\n{run.stderr[-2000:]}")
    return [float(x) for x in run.stdout.splitlines()[-1].split()]


def resident() -> float:
    """Resident memory now, MiB (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def peak_memory(run: Callable[[], Any]) -> float:
    """MiB by which ``run`` raises this process's resident memory, at its highest: a thread watches. What earlier runs
    left behind is given back before, so that it is not taken for what was there."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    seen, done = [before := resident()], threading.Event()

    def watch() -> None:
        while not done.wait(0.0005):
            seen.append(resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        run()
    finally:
        done.set()
        watcher.join()
    return max(seen) - before
