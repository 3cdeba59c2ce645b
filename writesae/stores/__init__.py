"""Texts to run a model on, and what its heads wrote there, on disk."""

from writesae.stores import texts
from writesae.stores.extraction import extract, record
from writesae.stores.store import ActivationStore

__all__ = ["ActivationStore", "extract", "record", "texts"]
