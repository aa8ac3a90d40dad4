"""Says how long it will take to ask a mask_mod that cannot be traced about every position, before the user wonders."""
from __future__ import annotations

import time
import warnings
from collections.abc import Callable

from flexref.blocks.inputs import described
from flexref.errors import TraceError

# what is left takes longer, seconds
_LONG = 2.0


class Estimate:
    """Told how many blocks were asked, it warns once if those that are left will take long."""

    def __init__(self, mask_mod: Callable, why: TraceError, blocks: int, positions: int):
        self.mask_mod, self.why, self.blocks, self.positions = mask_mod, why, blocks, positions
        self.asked, self.start, self.told = 0, time.perf_counter(), False

    def add(self, asked: int) -> None:
        self.asked += asked
        left = (time.perf_counter() - self.start) / self.asked * (self.blocks - self.asked)
        if left > _LONG and not self.told:
            self.told = True
            warnings.warn(self._text(left), stacklevel=2)

    def _text(self, left: float) -> str:
        return (
            f"mask_mod {described(self.mask_mod)} cannot be traced, so it is asked about all {self.positions:,} positions, which "
            f"takes about {left:,.0f} s more. Written in torch operations it is traced, and few positions are asked. {self.why}"
        )
