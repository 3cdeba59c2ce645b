"""The paper's protocols as functions that return results."""

from writesae.experiments.replacement import Rate, ReplacementResult, replacement_test, wilson

__all__ = ["Rate", "ReplacementResult", "replacement_test", "wilson"]
