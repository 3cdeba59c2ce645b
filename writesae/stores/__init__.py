"""Texts to run a model on, and what its heads wrote there, on disk."""

from writesae.stores import texts
from writesae.stores.extraction import extract, record
from writesae.stores.store import ActivationStore
from writesae.stores.windows import Windows

__all__ = ["ActivationStore", "Windows", "extract", "record", "texts"]
