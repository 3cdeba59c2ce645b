"""Checkpoints of the paper's own code."""
