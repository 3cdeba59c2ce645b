"""Sparse autoencoders whose atoms are matrices of the shape in which a recurrent layer writes."""

from writesae.saes.activity.contexts import Context, Contexts
from writesae.saes.activity.reading import Codes
from writesae.saes.activity.search import top_contexts
from writesae.saes.config import VARIANTS, SAEConfig
from writesae.saes.formats import FORMATS, Format, register_format
from writesae.saes.labels import Label, Labels
from writesae.saes.loss import SAELoss
from writesae.saes.paper.reference import load_reference
from writesae.saes.recode import Recode
from writesae.saes.sae import WriteSAE
from writesae.saes.saved_edits import load_interventions, save_interventions
from writesae.saes.sparsities import SPARSITIES, Choosing, Sparsity, Thresholds, register_sparsity
from writesae.saes.substitute import Substitute
from writesae.saes.training.collect import collect, train_site, train_store
from writesae.saes.training.evaluate import evaluate
from writesae.saes.training.run import Settings
from writesae.saes.training.train import train_sae

__all__ = [
    "FORMATS", "SPARSITIES", "VARIANTS", "Choosing", "Codes", "Context", "Contexts", "Format", "Label", "Labels",
    "Recode", "SAEConfig", "SAELoss", "Settings", "Sparsity", "Substitute", "Thresholds", "WriteSAE", "collect",
    "evaluate", "load_interventions", "load_reference", "register_format", "register_sparsity", "save_interventions",
    "top_contexts", "train_sae", "train_site", "train_store",
]  # fmt: skip
