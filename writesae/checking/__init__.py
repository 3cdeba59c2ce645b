"""Whether all of this is right on your model, device, dtype and installed kernels: `check`, and what it returns."""

from writesae.checking.result import CheckResult, Row
from writesae.checking.run import check

__all__ = ["CheckResult", "Row", "check"]
