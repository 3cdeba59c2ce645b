"""Names of other libraries that a class does not have: its error says what is used here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn


class NamesElsewhere(nn.Module):
    """A module that knows what other libraries call things. A name of theirs is an AttributeError with the fix.

    Attributes:
        elsewhere: what to use, by the name that is not here.
    """

    elsewhere: ClassVar[Mapping[str, str]] = {}

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError as error:
            if name not in self.elsewhere:
                raise
            raise self._not_here(name) from error

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.elsewhere and not isinstance(value, nn.Parameter):  # it would be set, and ignored
            raise self._not_here(name)
        super().__setattr__(name, value)

    def _not_here(self, name: str) -> AttributeError:
        return AttributeError(f"{type(self).__name__} has no attribute {name!r}: {self.elsewhere[name]}")
