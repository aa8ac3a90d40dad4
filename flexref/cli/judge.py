"""Judges sampled rows of a result by the conformance suite's one error budget, with the case's plain formulas."""
from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flexref.cli.cases import Case
from flexref.conformance.compare import Call, expectations

SAMPLES = 12


class Verdict(NamedTuple):
    """The largest absolute error of `out`, and the largest ratio of an element's error to its budget (at most 1)."""

    error: float
    ratio: float
    complaint: str = ""


def sampled_rows(length: int) -> Tensor:
    """Query positions: the first, the last, and some between, the same every time."""
    between = torch.randperm(length, generator=torch.Generator().manual_seed(1))[:SAMPLES]
    return torch.cat([between, torch.tensor([0, length - 1])]).unique()


def judge(case: Case, out: Tensor) -> Verdict:
    """`out` (B, H, L, D) against float64 on the sampled rows of every batch and head."""
    rows = sampled_rows(out.shape[2])
    query, key, value, _ = case.inputs
    score, allowed = case.score, case.allowed
    call = Call(
        query[:, :, rows],
        key,
        value,
        # the formulas see the row's own position, not its place in the sample
        make_score=None if score is None else lambda _: lambda s, b, h, r, j: score(s, b, h, rows[r], j),
        mask_mod=None if allowed is None else lambda b, h, r, j: allowed(b, h, rows[r], j),
    )
    expected = expectations(call)["out"]
    got = out.detach()[:, :, rows]
    error = float((got.double() - expected.exact).abs().max())
    try:
        return Verdict(error, expected.judge(got))
    except AssertionError as complaint:
        return Verdict(error, torch.inf, str(complaint))
