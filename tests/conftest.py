"""Settings that every test shares; fixtures of one topic belong beside its tests."""

import os

# Read by the Hugging Face libraries when they are imported, so these come before any such import.
os.environ["HF_HUB_OFFLINE"] = "1"  # a test that needs the network is a bug
os.environ["TRANSFORMERS_VERBOSITY"] = "error"  # or every model says that it runs without fused kernels

import pytest
import torch

# How a sum is split over threads changes its last bits: the same number everywhere. One, since the tensors are tiny.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed() -> None:
    """Every test draws the same random numbers, alone or in the whole run."""
    torch.manual_seed(0)
