"""The result of a run: tests down, backends across, and for each backend how much was compared."""

from __future__ import annotations

import io
import shutil
from dataclasses import asdict, dataclass, field

import pytest
from rich.console import Console
from rich.markup import escape
from rich.table import Table

STATES = ("FAIL", "pass", "known gap", "unsupported", "unavailable", "skipped")
STYLES = {
    "pass": "green",
    "FAIL": "bold red",
    "known gap": "yellow",
    "unsupported": "cyan",
    "unavailable": "dim",
}


@dataclass
class Cell:
    """One test on one backend; `state` is one of STATES, the other fields are the Ledger's."""

    state: str
    reason: str = ""
    compared: int = 0
    refused: int = 0
    reasons: list[str] = field(default_factory=list)
    worst: float = 0.0

    @classmethod
    def of(cls, report: pytest.TestReport, ledger: dict) -> Cell:
        reason = ""
        if hasattr(report, "wasxfail"):
            state, reason = "known gap", report.wasxfail.removeprefix("reason: ")
        elif report.skipped:
            text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            text = text.removeprefix("Skipped: ")
            state, _, reason = text.partition(": ")
            if state not in STATES:
                state, reason = "skipped", text
        else:
            state = "pass" if report.passed else "FAIL"
        return cls(state, reason, **ledger)

    def as_dict(self) -> dict:
        return asdict(self)

    def merge(self, other: Cell) -> Cell:
        """Two items of one test: the worse state counts."""
        first, second = sorted((self, other), key=lambda cell: STATES.index(cell.state))
        return Cell(
            first.state,
            first.reason or second.reason,
            self.compared + other.compared,
            self.refused + other.refused,
            self.reasons + [reason for reason in other.reasons if reason not in self.reasons],
            max(self.worst, other.worst),
        )

    def __str__(self) -> str:
        if self.state == "pass":
            refused = f", {self.refused} unsupported" if self.refused else ""
            return f"pass ({self.compared}{refused})"
        return f"{self.state}({self.reason})" if self.reason else self.state


class Matrix:
    """`asked`: the backends were named explicitly; for each of them something must have been compared.

    `how`: the word for the emulation of each backend that did not run on its own device.
    """

    def __init__(self, backends: list[str], asked: bool, how: dict[str, str] | None = None):
        self.backends, self.asked, self.how = backends, asked, how or {}
        self.rows: dict[str, dict[str, Cell]] = {}

    def add(self, backend: str, test: str, cell: Cell) -> None:
        row = self.rows.setdefault(test, {})
        row[backend] = row[backend].merge(cell) if backend in row else cell

    def compared(self, backend: str) -> int:
        return sum(row[backend].compared for row in self.rows.values() if backend in row)

    def faults(self) -> list[str]:
        """What is wrong with the run as a whole: a backend for which nothing was compared."""
        if not self.rows:
            return [f"backend {name}: no test of the suite was run" for name in self.backends if self.asked]
        faults = []
        for name in self.backends:
            cells = [row[name] for row in self.rows.values() if name in row]
            unavailable = all(cell.state == "unavailable" for cell in cells)
            if self.compared(name) == 0 and (self.asked or not unavailable):
                faults.append(f"backend {name}: nothing was compared")
        if not faults and not any(self.compared(name) for name in self.backends):
            faults.append("nothing was compared: no backend is available")
        return faults

    def as_dict(self) -> dict:
        """For JSON: the counts, and every cell by backend and test."""
        by_backend: dict[str, dict] = {name: {} for name in self.backends}
        for test, row in sorted(self.rows.items()):
            for name, cell in row.items():
                by_backend.setdefault(name, {})[test] = cell.as_dict()
        return {
            "how": self.how,
            "compared": {name: self.compared(name) for name in self.backends},
            "backends": by_backend,
            "faults": self.faults(),
        }

    def render(self) -> str:
        """The table as text, for a terminal."""
        names = [name for name in self.backends if any(name in row for row in self.rows.values())]
        lines = [(test, [row.get(name) for name in names]) for test, row in sorted(self.rows.items())]
        foot = [
            f"{self.compared(name)} compared, worst {self._worst(name):.0%} of the budget" for name in names
        ]
        titles = [f"{name} ({self.how[name]})" if name in self.how else name for name in names]
        table = Table("test", *titles, show_footer=False, show_lines=False, pad_edge=False)
        for test, cells in lines:
            table.add_row(test.removeprefix("test_"), *(_styled(cell) for cell in cells))
        table.add_section()
        table.add_row("", *foot)
        stream = io.StringIO()
        width = max(80, min(200, shutil.get_terminal_size((120, 40)).columns))
        Console(file=stream, width=width, force_terminal=False, highlight=False).print(table)
        return stream.getvalue()

    def _worst(self, backend: str) -> float:
        return max((row[backend].worst for row in self.rows.values() if backend in row), default=0.0)


def _styled(cell: Cell | None) -> str:
    if cell is None:
        return ""
    style = STYLES.get(cell.state)
    return f"[{style}]{escape(str(cell))}[/]" if style else escape(str(cell))
