"""Interleaved timing: both sides are called in turn, so that what disturbs the machine disturbs both."""
from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple


class Timing(NamedTuple):
    """Seconds: the median, and the quartiles as its spread."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, samples: list[float]) -> Timing:
        """The summary of at least one sample."""
        if len(samples) == 1:
            return cls(samples[0], samples[0], samples[0])
        low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
        return cls(median, low, high)


def interleaved(calls: dict[str, Callable[[], object]], rounds: int, seconds: float) -> dict[str, list[float]]:
    """Seconds of each call in each round, after one that warms up; fewer rounds once `seconds` are spent, at least 3."""
    for call in calls.values():
        call()
    samples: dict[str, list[float]] = {name: [] for name in calls}
    begin = time.perf_counter()
    for done in range(rounds):
        if done >= 3 and time.perf_counter() - begin > seconds:
            break
        # who goes first changes from round to round
        for name in sorted(calls, reverse=bool(done % 2)):
            start = time.perf_counter()
            calls[name]()
            samples[name].append(time.perf_counter() - start)
    return samples


def ratio(ours: list[float], theirs: list[float]) -> Timing:
    """How many times faster ours is, round by round: the median of those ratios, and their quartiles."""
    return Timing.of([t / o for o, t in zip(ours, theirs, strict=True)])


def geometric_mean(ratios: list[float]) -> float:
    """Of at least one positive number."""
    return statistics.geometric_mean(ratios)
