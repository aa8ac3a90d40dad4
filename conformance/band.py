"""The rounding band of compare.py: how far rounding can move each result of a sound algorithm, in float64.

Derivation and symbols: the docstring of compare.py. Arrays over positions are dense (B, Hq, L, S) and zero where
masked, or flat (N,) over the allowed positions.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from flexref.conformance.call import Call, Positions
from flexref.conformance.measure import Index, Mod, Run, measure
from flexref.conformance.rounding import Rounding, finite, half_ulp

PROBES = 12


class Operands(NamedTuple):
    """In float64, with query's heads and batches, and without NaN or Inf: where those count, no band does."""

    query: Tensor
    key: Tensor
    value: Tensor
    grad_out: Tensor
    grad_lse: Tensor
    scale: float

    @classmethod
    def of(cls, call: Call) -> Operands:
        B, H, L, E = call.query.shape
        group, Ev = H // call.key.shape[1], call.value.shape[3]
        key, value = (
            finite(x).repeat_interleave(group, 1).expand(B, -1, -1, -1) for x in (call.key, call.value)
        )
        grad_out = torch.zeros(B, H, L, Ev) if call.grad_out is None else call.grad_out
        grad_lse = torch.zeros(B, H, L) if call.grad_lse is None else call.grad_lse
        scale = 1 / math.sqrt(E) if call.scale is None else call.scale
        return cls(finite(call.query), key, value, finite(grad_out), finite(grad_lse), scale)


class Rows:
    """The softmax of each row and its errors: p, lse, out."""

    def __init__(self, x: Operands, index: Index, mod: Mod, r: Rounding):
        shape = *x.query.shape[:3], x.key.shape[2]
        self.allowed = torch.zeros(shape, dtype=torch.bool)
        self.allowed[index] = torch.isfinite(mod.post)
        post = dense(mod.post, index, shape, -math.inf).masked_fill(~self.allowed, -math.inf)
        row_max = post.amax(-1) if shape[3] else post.new_full(shape[:3], -math.inf)
        lse = finite(torch.logsumexp(post, -1))
        score = finite(post)

        error = dense(mod.post_error, index, shape) + 2 * r.u * (
            score.abs() + finite(row_max).abs()[..., None]
        )
        self.max_error = _reach(post, error, row_max)
        self.growth = torch.expm1(error.clamp(max=80.0)) * self.allowed
        self.p = torch.exp(score - lse[..., None]) * self.allowed
        shift = self.p * self.growth
        self.lse_error = shift.sum(-1) + r.total(shape[3]) + 2 * r.u * lse.abs()

        size = x.value.abs()
        self.out = self.p @ x.value
        self.out_error = (
            shift @ size
            + shift.sum(-1, keepdim=True) * self.out.abs()
            + r.tiny * (self.allowed.double() @ size)
        )
        self.out_error += (8 * r.u + r.w + 2 * r.total(shape[3])) * (self.p @ size)


def _reach(post: Tensor, error: Tensor, row_max: Tensor) -> Tensor:
    """How far the greatest score of a row moves if each score moves by its error."""
    if post.shape[3] == 0:
        return torch.zeros_like(row_max)
    error = torch.where(torch.isfinite(post), error, 0.0)
    return finite(torch.maximum((post + error).amax(-1) - row_max, row_max - (post - error).amax(-1)))


class Back:
    """d score after and before score_mod and their errors; `own` moves alone, D and lse move a whole row together."""

    def __init__(self, x: Operands, rows: Rows, mod: Mod, index: Index, r: Rounding, out_dtype: torch.dtype):
        shape = rows.p.shape
        size = x.grad_out.abs()
        sum_ev = r.total(x.value.shape[3])
        delta = (x.grad_out * rows.out).sum(-1) - x.grad_lse
        delta_error = self._delta_error(x, rows, r, out_dtype) + sum_ev * (size * rows.out.abs()).sum(-1)
        upward = x.grad_out @ x.value.mT - delta[..., None]

        self.post = rows.p * upward
        self.own = (rows.growth + 10 * r.u) * self.post.abs() + rows.p * sum_ev * (size @ x.value.abs().mT)
        self.own += r.flush * (1 + upward.abs()) * rows.allowed
        self.from_delta = rows.p * delta_error[..., None]
        self.from_lse = self.post * rows.lse_error[..., None]
        slope, slope_error = dense(mod.slope, index, shape), dense(mod.slope_error, index, shape)
        self.score = self.post * slope
        post_error = self.own + self.from_delta + self.from_lse.abs()
        self.score_error = (
            post_error * slope.abs() + self.post.abs() * slope_error + (r.u + r.w) * self.score.abs()
        )
        self.p_error = rows.p * (rows.growth + rows.lse_error[..., None] + 8 * r.u + r.w)

    @staticmethod
    def _delta_error(x: Operands, rows: Rows, r: Rounding, out_dtype: torch.dtype) -> Tensor:
        """Of <dout, out> - dlse, where out is the one that forward rounded and saved."""
        size, toward = x.grad_out.abs(), (x.grad_out @ x.value.mT).abs()
        error = (rows.p * (rows.growth + 8 * r.u + r.w) * toward).sum(-1)
        error += (rows.p * rows.growth).sum(-1) * (x.grad_out * rows.out).sum(-1).abs()
        error += 2 * r.total(rows.p.shape[3]) * (size * (rows.p @ x.value.abs())).sum(-1)
        error += r.tiny * (size * (rows.allowed.double() @ x.value.abs())).sum(-1)
        return error + half_ulp(out_dtype) * _independent(size * rows.out.abs()) + 2 * r.u * x.grad_lse.abs()


def _independent(terms: Tensor) -> Tensor:
    """What errors of at most these magnitudes, each of its own sign, add up to in the last dimension."""
    return torch.minimum(terms.sum(-1), 4 * terms.square().sum(-1).sqrt())


def dense(flat: Tensor, index: Index, shape, fill: float = 0.0) -> Tensor:
    full = torch.full(shape, fill, dtype=torch.float64)
    full[index] = flat
    return full


def rounding_band(call: Call, positions: Positions) -> dict[str, Tensor]:
    """The band of each result by name, in the result's shape; the last rounding to its own dtype is not in it."""
    r, x, index = Rounding.of(call.query.dtype), Operands.of(call), positions.index
    size = abs(x.scale) * (x.query.abs() @ x.key.abs().mT)[index]
    doubt = r.total(x.query.shape[3]) / 2 * size
    mod = measure(call, positions, r, doubt)
    rows = Rows(x, index, mod, r)
    bands = {"out": rows.out_error, "lse": rows.lse_error, "max_scores": rows.max_error}
    if not call.wanted:
        return bands
    back = Back(x, rows, mod, index, r, call.query.dtype)
    bands |= _input_bands(call, x, rows, back, r)
    names = [name for name in call.wanted if name in call.captured]
    return bands | (_captured_bands(call, positions, names, back, doubt, r) if names else {})


def _input_bands(call: Call, x: Operands, rows: Rows, back: Back, r: Rounding) -> dict[str, Tensor]:
    """Of the gradients of query, key and value."""
    scale, allowed = abs(x.scale), rows.allowed.double()
    terms = (
        x.query.shape[0]
        // max(1, call.key.shape[0])
        * (x.query.shape[1] // call.key.shape[1])
        * x.query.shape[2]
    )
    ds, ds_error, p, p_error = back.score.abs(), back.score_error, rows.p, back.p_error
    query = scale * (ds_error + r.total(p.shape[3]) * ds + r.tiny * allowed) @ x.key.abs()
    key = scale * (ds_error + r.total(terms) * ds + r.tiny * allowed).mT @ x.query.abs()
    value = (p_error + r.total(terms) * p + r.tiny * allowed).mT @ x.grad_out.abs()
    return {
        "grad query": query,
        "grad key": _fold(key, call.key.shape),
        "grad value": _fold(value, call.value.shape),
    }


def _fold(x: Tensor, shape: torch.Size) -> Tensor:
    """(B, Hq, S, E) summed over the query heads and batches that share a head of key or value."""
    x = x.unflatten(1, (shape[1], -1)).sum(2)
    return x if shape[0] == x.shape[0] else x.sum(0, keepdim=True)


def _captured_bands(
    call: Call, positions: Positions, names: list[str], back: Back, doubt: Tensor, r: Rounding
) -> dict[str, Tensor]:
    """Of the gradients of captured tensors: each error goes back through score_mod with Gaussian signs."""
    index, random = positions.index, torch.Generator().manual_seed(1)
    exact = Run(call, positions.score, index, torch.float64)
    leaves = [exact.leaves[name] for name in names]
    post, own = back.post[index], back.own[index]
    squares = [[torch.zeros_like(leaf) for leaf in leaves] for _ in range(3)]
    for i in range(PROBES):
        sign = torch.randn(len(post), generator=random, dtype=torch.float64)
        shared = [
            torch.randn(back.post.shape[:3], generator=random, dtype=torch.float64)[..., None]
            for _ in range(2)
        ]
        together = (shared[0] * back.from_delta + shared[1] * back.from_lse)[index]
        size = exact.pull(sign * post, leaves)
        run = Run(call, positions.score + doubt * (1 - 2 * (i % 2)), index, r.acc)
        rounded = run.pull(sign * post, [run.leaves[name] for name in names])
        probes = (
            exact.pull(sign * own + together, leaves),
            size,
            [a - b for a, b in zip(rounded, size, strict=True)],
        )
        for total, probe in zip(squares, probes, strict=True):
            for square, value in zip(total, probe, strict=True):
                square += finite(value).square()
    result = exact.pull(post, leaves)
    moved, size, off = [[(square / PROBES).sqrt() for square in total] for total in squares]
    n = r.total(len(post)) + 2 * r.u
    return {
        f"grad {name}": 4 * moved[i] + 4 * off[i] + n * (4 * size[i] + finite(result[i]).abs())
        for i, name in enumerate(names)
    }
