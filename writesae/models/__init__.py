"""Models of our own in plain PyTorch, where all other code needs a GPU; and the loading of every checkpoint format."""

from writesae.models.gpu import use_fla_kernels

__all__ = ["use_fla_kernels"]
