"""Programs of others that ask our engine: evaluation harnesses. Nothing here imports them before they are used."""

from __future__ import annotations

import importlib
from typing import Any

from wemm.errors import ParameterError


def module_of(harness: str, name: str, remedy: str) -> Any:
    """A module of a harness. Raises ParameterError with the remedy where the harness is absent or incomplete."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ParameterError(f"{harness} cannot be imported ({error}); {remedy}") from None
