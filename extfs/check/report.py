"""Findings: what is wrong, where, how bad, and whether --repair can put it right."""

from __future__ import annotations

import enum
from collections import Counter
from dataclasses import dataclass, field
from typing import Any


class Severity(enum.Enum):
    """ERROR: the filesystem contradicts itself. NOTE: worth knowing, nothing is wrong."""

    ERROR = "error"
    NOTE = "note"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing found. `repair`: what --repair does about it; empty when it cannot."""

    code: str
    severity: Severity
    where: str
    text: str
    repair: str = ""

    def as_json(self) -> dict[str, Any]:
        """For --json."""
        return {
            "code": self.code,
            "severity": self.severity.value,
            "where": self.where,
            "text": self.text,
            "repair": self.repair or None,
        }


LISTED_PER_CODE = 1000


@dataclass
class Report:
    """Findings of one pass. Of each code the first `LISTED_PER_CODE` are kept, all are counted."""

    findings: list[Finding] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    errors: int = 0
    repairable: int = 0
    facts: dict[str, int] = field(default_factory=dict)

    def add(self, code: str, where: str, text: str, repair: str = "") -> None:
        """Record an error."""
        self.errors += 1
        self.repairable += bool(repair)
        self._keep(Finding(code, Severity.ERROR, where, text, repair))

    def note(self, code: str, where: str, text: str) -> None:
        """Record something worth knowing."""
        self._keep(Finding(code, Severity.NOTE, where, text))

    def _keep(self, finding: Finding) -> None:
        self.counts[finding.code] += 1
        if self.counts[finding.code] <= LISTED_PER_CODE:
            self.findings.append(finding)

    @property
    def clean(self) -> bool:
        """Whether nothing is wrong."""
        return not self.errors

    def has(self, code: str) -> bool:
        """Whether something with this code was found."""
        return code in self.counts
