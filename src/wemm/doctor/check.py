"""What one check found, and the whole of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

OK, WARN, FAIL, SKIPPED = "ok", "warn", "fail", "skipped"


@dataclass(frozen=True)
class Check:
    """One line of the report."""

    name: str
    status: str
    """ok, warn, fail or skipped."""
    detail: str
    """What was seen, in one sentence."""
    cause: str | None = None
    """Why, and what to do; where something is wrong."""
    figures: Mapping[str, Any] = field(default_factory=dict)
    """The same, measured: JSON-ready."""


@dataclass(frozen=True)
class Report:
    """Every check in the order it ran."""

    model: str
    directory: str
    dtype: str
    device: str
    checks: Sequence[Check]

    @property
    def ok(self) -> bool:
        """True if nothing failed; warnings are allowed."""
        return all(check.status != FAIL for check in self.checks)

    @property
    def causes(self) -> list[str]:
        """Of what failed, the most certain first."""
        found = [check.cause for check in self.checks if check.status == FAIL and check.cause]
        return list(dict.fromkeys(found))
