"""The paper's protocols, and what goes beyond them, as functions that return results.

Each is a module of this folder, and what its ``__all__`` names is public here. What a new one is made of, says
`writesae.experiments.protocol`.
"""
# ruff: noqa: F403, F405

import importlib
import pkgutil
from typing import TYPE_CHECKING

from writesae.experiments.protocol import EXPERIMENTS, Run, experiment
from writesae.experiments.report.reproduction import reproduce
from writesae.results.result import Number, Result, figure
from writesae.results.statistics import Rate, wilson

if TYPE_CHECKING:  # for editors and the reference, which do not run what is below
    from writesae.experiments.amplifying import *
    from writesae.experiments.attribution import *
    from writesae.experiments.classes import *
    from writesae.experiments.deletions import *
    from writesae.experiments.erasing import *
    from writesae.experiments.installing import *
    from writesae.experiments.logit_changes import *
    from writesae.experiments.population import *
    from writesae.experiments.replacement import *
    from writesae.experiments.signs import *
    from writesae.experiments.stability import *

__all__ = ["EXPERIMENTS", "Number", "Rate", "Result", "Run", "experiment", "figure", "reproduce", "wilson"]

for _module in pkgutil.iter_modules(__path__, f"{__name__}."):
    if not _module.ispkg:
        _found = importlib.import_module(_module.name)
        for _name in getattr(_found, "__all__", ()):
            globals()[_name] = getattr(_found, _name)
            __all__ += [_name]  # pyright: ignore[reportUnsupportedDunderAll]
__all__ = sorted(set(__all__))
