"""Sparse autoencoders whose atoms are matrices of the shape in which a recurrent layer writes."""

from writesae.saes.collect import collect, train_site, train_store
from writesae.saes.config import VARIANTS, SAEConfig
from writesae.saes.contexts import Context, Contexts
from writesae.saes.evaluate import evaluate
from writesae.saes.reading import Codes
from writesae.saes.run import Settings
from writesae.saes.search import top_contexts
from writesae.saes.train import train_sae
from writesae.saes.write_sae import SAELoss, WriteSAE

__all__ = [
    "VARIANTS", "Codes", "Context", "Contexts", "SAEConfig", "SAELoss", "Settings", "WriteSAE", "collect", "evaluate",
    "top_contexts", "train_sae", "train_site", "train_store",
]  # fmt: skip
