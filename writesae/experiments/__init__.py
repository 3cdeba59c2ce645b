"""The paper's protocols, and what goes beyond them, as functions that return results."""

from writesae.experiments.amplifying import AmplifyResult, amplify
from writesae.experiments.attribution import Attribution, attribute
from writesae.experiments.classes import AtomClasses, atom_classes
from writesae.experiments.deletions import AttributionTest, attribution_test
from writesae.experiments.erasing import EraseResult, erase
from writesae.experiments.installing import InstallResult, install
from writesae.experiments.logit_changes import LogitChange, logit_change
from writesae.experiments.population import PopulationResult, population_test
from writesae.experiments.replacement import ReplacementResult, replacement_test
from writesae.experiments.report.reproduction import reproduce
from writesae.experiments.results.result import Number, Result
from writesae.experiments.results.statistics import Rate, wilson
from writesae.experiments.signs import SignTest, sign_test
from writesae.experiments.stability import SeedStability, seed_stability
from writesae.experiments.token_classes import ChosenAtoms, choose_atoms

__all__ = [
    "AmplifyResult", "AtomClasses", "Attribution", "AttributionTest", "ChosenAtoms", "EraseResult", "InstallResult",
    "LogitChange", "Number", "PopulationResult", "Rate", "ReplacementResult", "Result", "SeedStability", "SignTest",
    "amplify", "atom_classes", "attribute", "attribution_test", "choose_atoms", "erase", "install", "logit_change",
    "population_test", "replacement_test", "reproduce", "seed_stability", "sign_test", "wilson",
]  # fmt: skip
