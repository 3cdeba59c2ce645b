"""writesae: look inside recurrent language models, and change what they remember."""

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

from writesae.jobs.choices import meant
from writesae.jobs.late import give

if TYPE_CHECKING:
    from writesae.checking import check
    from writesae.experiments import (
        ReplacementResult,
        amplify,
        atom_classes,
        attribute,
        attribution_test,
        choose_atoms,
        erase,
        install,
        logit_change,
        population_test,
        replacement_test,
        reproduce,
        seed_stability,
        sign_test,
    )
    from writesae.explaining import ChatModel, ChatServer, explain, write_delphi
    from writesae.gradients import Gradient, Logit, gradient
    from writesae.hooks import (
        ActivationCache,
        Add,
        AddVector,
        Delete,
        HookPoint,
        Intervention,
        Knockout,
        Patch,
        Reconstruct,
        Replace,
        Site,
        Steer,
    )
    from writesae.methods import (
        Circuit,
        CircuitCheck,
        DeletionSweep,
        DirectAttribution,
        DoseResponse,
        EachText,
        Evaluation,
        KnockoutSweep,
        LogitLens,
        MemoryLength,
        Patching,
        Pattern,
        SteeringVector,
        TunedLens,
        TunedMemory,
        circuit,
        deletion_sweep,
        direct_attribution,
        dose_response,
        each_text,
        evaluate,
        knockout_sweep,
        logit_lens,
        memory_length,
        patching,
        pattern,
        steering_vector,
        tune_lens,
        tune_memory,
    )
    from writesae.model import HookedRecurrentModel, Memory, kl_divergence
    from writesae.pages import write_pages
    from writesae.recurrence import Recurrence, States, Write
    from writesae.saes import (
        Codes,
        Contexts,
        Label,
        Labels,
        Recode,
        SAEConfig,
        Substitute,
        WriteSAE,
        load_interventions,
        save_interventions,
        top_contexts,
        train_site,
        train_store,
    )
    from writesae.stores import ActivationStore, extract, record, texts

# Where each name lives. They load at first use, so that `writesae --help` need not wait for torch.
_HOME = {
    "writesae.checking": ("check",),
    "writesae.experiments": (
        "ReplacementResult", "amplify", "atom_classes", "attribute", "attribution_test", "choose_atoms", "erase",
        "install", "logit_change", "population_test", "replacement_test", "reproduce", "seed_stability", "sign_test",
    ),
    "writesae.explaining": ("ChatModel", "ChatServer", "explain", "write_delphi"),
    "writesae.gradients": ("Gradient", "Logit", "gradient"),
    "writesae.methods": (
        "Circuit", "CircuitCheck", "DeletionSweep", "DirectAttribution", "DoseResponse", "EachText", "Evaluation",
        "KnockoutSweep", "LogitLens", "MemoryLength", "Patching", "Pattern", "SteeringVector", "TunedLens",
        "TunedMemory", "circuit", "deletion_sweep", "direct_attribution", "dose_response", "each_text", "evaluate",
        "knockout_sweep", "logit_lens", "memory_length", "patching", "pattern", "steering_vector", "tune_lens",
        "tune_memory",
    ),
    "writesae.stores": ("ActivationStore", "extract", "record", "texts"),
    "writesae.hooks": (
        "ActivationCache", "Add", "AddVector", "Delete", "HookPoint", "Intervention", "Knockout", "Patch",
        "Reconstruct", "Replace", "Site", "Steer",
    ),
    "writesae.model": ("HookedRecurrentModel", "Memory", "kl_divergence"),
    "writesae.pages": ("write_pages",),
    "writesae.recurrence": ("Recurrence", "States", "Write"),
    "writesae.saes": (
        "Codes", "Contexts", "Label", "Labels", "Recode", "SAEConfig", "Substitute", "WriteSAE", "load_interventions",
        "save_interventions", "top_contexts", "train_site", "train_store",
    ),
}  # fmt: skip
_MODULE = {name: module for module, names in _HOME.items() for name in names}

__all__ = [
    "ActivationCache", "ActivationStore", "Add", "AddVector", "ChatModel", "ChatServer", "Circuit", "CircuitCheck",
    "Codes", "Contexts", "Delete", "DeletionSweep", "DirectAttribution", "DoseResponse", "EachText", "Evaluation",
    "Gradient", "HookPoint", "HookedRecurrentModel", "Intervention", "Knockout", "KnockoutSweep", "Label", "Labels",
    "Logit", "LogitLens", "Memory", "MemoryLength", "Patch", "Patching", "Pattern", "Recode", "Reconstruct",
    "Recurrence", "Replace", "ReplacementResult", "SAEConfig", "Site", "States", "Steer", "SteeringVector",
    "Substitute", "TunedLens", "TunedMemory", "Write", "WriteSAE", "amplify", "atom_classes", "attribute",
    "attribution_test", "check", "choose_atoms", "circuit", "deletion_sweep", "direct_attribution", "dose_response",
    "each_text", "erase", "evaluate", "explain", "extract", "gradient", "install", "kl_divergence", "knockout_sweep",
    "load_interventions", "logit_change", "logit_lens", "memory_length", "patching", "pattern", "population_test",
    "record", "replacement_test", "reproduce", "save_interventions", "seed_stability", "sign_test", "steering_vector",
    "texts", "top_contexts", "train_site", "train_store", "tune_lens", "tune_memory", "write_delphi", "write_pages",
]  # fmt: skip


give("show", lambda: importlib.import_module("writesae.pages.show").show)  # `WriteSAE.show`
give("show_circuit", lambda: importlib.import_module("writesae.pages.circuit").show_circuit)  # `Circuit.show`


def __getattr__(name: str) -> Any:
    if name == "__version__":  # it stands in pyproject.toml, once
        return importlib.metadata.version("writesae")
    if name not in _MODULE:
        near = {known.lower(): known for known in __all__}.get(name.lower())
        said = f"; did you mean {near!r}?" if near else meant(name, __all__, 0.7)
        raise AttributeError(f"module 'writesae' has no attribute {name!r}{said}")
    return getattr(importlib.import_module(_MODULE[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
