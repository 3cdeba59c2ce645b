"""Settings that every test shares; fixtures of one topic belong beside its tests.

Which tests are slow is measured, not guessed: ``pytest --measure`` notes in `slow.json` what each test function took,
all its cases together, for all but the quickest that fit into `QUICK` seconds of one core. These are marked ``slow``.
"""

import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

# Read by the Hugging Face libraries when they are imported, so these come before any such import.
os.environ["HF_HUB_OFFLINE"] = "1"  # a test that needs the network is a bug
os.environ["TRANSFORMERS_VERBOSITY"] = "error"  # or every model says that it runs without fused kernels

import jaxtyping
import pytest
import torch

from annotations import calls, sparing

jaxtyping.jaxtyped = sparing  # before anything of ours is imported

SLOW = Path(__file__).parent / "slow.json"
QUICK = 50.0  # seconds; as much again goes into imports and fixtures

# How a sum is split over threads changes its last bits: the same number everywhere. One, since the tensors are tiny.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed() -> None:
    """Every test draws the same random numbers, alone or in the whole run."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def annotations(request: pytest.FixtureRequest) -> Iterator[None]:
    """They are checked on the first architecture of each rule; on the others, the same functions run."""
    calls.clear()
    given = getattr(request.node, "callspec", None)
    shared = given is not None and not all(getattr(x, "is_first_of_its_rule", True) for x in given.params.values())
    if shared:
        jaxtyping.config.update("jaxtyping_disable", True)
    yield
    if shared:
        jaxtyping.config.update("jaxtyping_disable", False)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--measure", action="store_true", help="note in tests/slow.json which tests are slow")
    parser.addoption("--device", help="run tests/kernels/test_gpu.py there, not on the accelerator that is found")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    slow = json.loads(SLOW.read_text())
    for item in items:
        if function_of(item.nodeid) in slow:
            item.add_marker("slow")


def pytest_configure(config: pytest.Config) -> None:
    if config.option.measure and not hasattr(config, "workerinput"):  # workers report to the process that began them
        config.pluginmanager.register(Measuring())


class Measuring:
    """Adds up how long each test function takes."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds[function_of(report.nodeid)] += report.duration

    def pytest_sessionfinish(self) -> None:
        slow = dict(self.slow())
        SLOW.write_text(json.dumps({name: round(slow[name], 1) for name in sorted(slow)}, indent=2) + "\n")

    def slow(self) -> Iterator[tuple[str, float]]:
        """All but the quickest that fit into `QUICK` seconds together."""
        spent = 0.0
        for name, seconds in sorted(self.seconds.items(), key=lambda item: item[1]):
            spent += seconds
            if spent > QUICK:
                yield name, seconds


def function_of(nodeid: str) -> str:
    """A test's name without its parameters."""
    return nodeid.partition("[")[0]
