"""Sparse autoencoders whose atoms are rank-1 matrices, the shape in which a recurrent layer writes."""

from writesae.saes.collect import collect, train_site
from writesae.saes.config import SAEConfig
from writesae.saes.train import evaluate, train_sae
from writesae.saes.write_sae import SAELoss, WriteSAE

__all__ = ["SAEConfig", "SAELoss", "WriteSAE", "collect", "evaluate", "train_sae", "train_site"]
