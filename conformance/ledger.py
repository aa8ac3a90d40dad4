"""What one test did to one backend: how much it compared, and what was refused. plugin.py reads it after each test."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field


@dataclass
class Ledger:
    """`compared`: results held against the reference or a rule; `worst`: the greatest share of an error budget."""

    compared: int = 0
    refused: int = 0
    reasons: list[str] = field(default_factory=list)
    worst: float = 0.0

    def compare(self, share: float = 0.0) -> None:
        self.compared += 1
        self.worst = max(self.worst, share)

    def refuse(self, reasons: list[str]) -> None:
        self.refused += 1
        self.reasons += [reason for reason in reasons if reason not in self.reasons]

    def clear(self) -> None:
        self.__init__()

    def as_dict(self) -> dict:
        return asdict(self)


LEDGER = Ledger()
