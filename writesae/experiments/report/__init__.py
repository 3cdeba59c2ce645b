"""Outcomes on disk, the paper's numbers beside them, and all experiments in one run."""
