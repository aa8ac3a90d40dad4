"""THE error budget: one rule for every backend, dtype, length and result, with nothing to tune.

    |result - float64 reference|  <=  2 * |plain reference - float64 reference|  +  rounding band        elementwise

`plain` is the same reference on the tensors as they are. NaN and infinities must be where the references have them;
an element where the two references themselves disagree about that says nothing and is left out.

The band is what rounding can do to *any* sound algorithm, by first-order analysis of the mathematics in float64. Let
u be half an ulp of the accumulation type (plus that of float64, for the reference rounds too), and let a sum of n
terms, in any order, err by g(n) = u * (2 sqrt(n) + 2) of the sum of their magnitudes (roundings are independent: this
is 6 sigma for the worst order, terms of one sign added one by one). Then, for one row i,

    A_ij   error of a score after score_mod: g(E) * scale * sum |q||k| goes through score_mod, whose own rounding and
           conditioning are measured: score_mod runs in the accumulation type on scores moved both ways by that much;
           then u * (|score| + |row_max|) for the subtraction inside exp
    lse    sum_j p A  +  g(S)
    out    sum_j p A (|v| + |out|)  +  (8u + w + g(S)) sum_j p |v|        8 u: exp, rescaling, the division
    D      sum_e |dout| * (error of out)  +  g(Ev) sum_e |dout||out|      D_i = <dout_i, out_i> - dlse_i
    dS     p * (error of p) |dout.v - D|  +  p * (errors of dout.v and of D)
    dq     scale * sum_j (error of dS dm/ds + w |dS dm/ds|) |k|  +  g(S) ...,   dk and dv alike
    captured   the errors of dS through d score_mod / d captured: the root mean square over Gaussian signs, times 4,
           with the errors that a row shares (D, lse) moved together

w is the half ulp of a half-precision type and 0 otherwise: a product of matrices may read its operands in the
inputs' type, and must add in the accumulation type. What is below the smallest normal number may be 0. Each result
may at last be rounded once to its own dtype.
tests/test_compare.py and test_suite_bites.py show that sound algorithms pass and that small faults do not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from flexref.conformance.band import rounding_band
from flexref.conformance.call import INPUTS, Call, Positions
from flexref.conformance.rounding import half_ulp, smallest
from flexref.reference import ACC_DTYPE, einsum


@dataclass(frozen=True)
class Expectation:
    """One result's float64 reference, plain reference, and the error that is allowed on top, all float64."""

    name: str
    dtype: torch.dtype
    exact: Tensor
    plain: Tensor
    band: Tensor

    def judge(self, result: Tensor) -> float:
        """The worst ratio of error to budget. Raises AssertionError, naming the worst element, if it is over 1."""
        assert result.shape == self.exact.shape, (
            f"{self.name}: shape {tuple(result.shape)}, not {tuple(self.exact.shape)}"
        )
        assert result.dtype == self.dtype, f"{self.name}: {result.dtype}, not {self.dtype}"
        result = result.detach().to("cpu", torch.float64)
        decided = kind(self.plain) == kind(self.exact)
        self._all(
            decided & (kind(result) != kind(self.exact)),
            result,
            "is not finite, NaN or infinite where it should be",
        )

        finite = decided & torch.isfinite(self.exact)
        error = torch.where(finite, (result - self.exact).abs(), 0.0)
        budget = 2 * (self.plain - self.exact).abs() + self.band
        ratio = torch.where(finite & (error > 0), error / budget, 0.0)
        self._all(ratio > 1, result, "is over the error budget", ratio)
        return float(ratio.max()) if ratio.numel() else 0.0

    def _all(self, wrong: Tensor, result: Tensor, what: str, ratio: Tensor | None = None) -> None:
        if not wrong.any():
            return
        flat = int((ratio if ratio is not None else wrong.to(torch.int8)).argmax())
        at = tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), wrong.shape))
        values = f"got {result[at]:.9g}, float64 reference {self.exact[at]:.9g}, plain reference {self.plain[at]:.9g}"
        times = f", {ratio[at]:.3g} times the budget (band {self.band[at]:.3g})" if ratio is not None else ""
        count = f"{int(wrong.sum())} of {wrong.numel()} elements"
        raise AssertionError(f"{self.name}{list(at)} {what}: {values}{times}; {count}")


def kind(x: Tensor) -> Tensor:
    """0 finite, 1 +inf, 2 -inf, 3 NaN."""
    return torch.isposinf(x) * 1 + torch.isneginf(x) * 2 + torch.isnan(x) * 3


def expectations(call: Call) -> dict[str, Expectation]:
    """What is expected of "out", "lse", "max_scores" and "grad NAME" for each wanted name."""
    exact, positions = evaluate(call.to(torch.float64))
    plain, _ = evaluate(call)
    assert positions is not None
    bands = rounding_band(call, positions)
    return {name: _expectation(name, *(_of_keys(call, name, x[name]) for x in (exact, plain, bands))) for name in exact}


def _of_keys(call: Call, name: str, x: Tensor) -> Tensor:
    """Without what belongs to keys that are sinks."""
    return x[:, :, : x.shape[2] - call.sinks] if name in ("grad key", "grad value") else x


def _expectation(name: str, exact: Tensor, plain: Tensor, band: Tensor) -> Expectation:
    """With the last rounding, to the result's own dtype, added to the band."""
    band = band + half_ulp(plain.dtype) * exact.abs() + smallest(plain.dtype)
    # where the analysis itself overflows nothing can be said
    band = torch.where(torch.isnan(band), math.inf, band)
    return Expectation(name, plain.dtype, exact, plain.to(torch.float64), band)


def evaluate(call: Call) -> tuple[dict[str, Tensor], Positions]:
    """The reference's results by name, and the positions that score_mod saw."""
    given = {name: getattr(call, name) for name in INPUTS} | call.captured
    # what is captured is read in the accumulation type, where its gradient is added up too
    acc = ACC_DTYPE[call.query.dtype]
    raised = {name for name, x in call.captured.items() if x.is_floating_point()}
    leaves = {name: x.detach().to(acc if name in raised else x.dtype, copy=True) for name, x in given.items()}
    leaves = {name: x.requires_grad_(name in call.wanted) for name, x in leaves.items()}
    seen: list[Positions] = []
    score_mod = call.make_score(leaves) if call.make_score else lambda score, b, h, q_idx, kv_idx: score

    def recorded(score, *index):
        b, h, q_idx, kv_idx = map(_flat, index)
        seen.append(Positions(_flat(score).detach(), (b, h, q_idx, kv_idx)))
        return score_mod(score, *index)

    query, key, value = (leaves[name] for name in INPUTS)
    result = einsum(query, key, value, recorded, call.mask_mod, scale=call.scale, blocks=call.blocks)
    results: dict[str, Tensor] = {name: x.detach() for name, x in result._asdict().items()}
    terms = [(result.out, call.grad_out), (result.lse, call.grad_lse)]
    terms = [(y, grad) for y, grad in terms if grad is not None and y.requires_grad]
    wanted = [leaves[name] for name in call.wanted]
    grads: tuple = (None,) * len(wanted)
    if terms and wanted:
        outputs, grad_outputs = zip(*terms, strict=True)
        grads = torch.autograd.grad(outputs, wanted, grad_outputs, allow_unused=True)
    for name, grad in zip(call.wanted, grads, strict=True):
        results[f"grad {name}"] = torch.zeros_like(given[name]) if grad is None else grad.to(given[name].dtype)
    none = torch.zeros(0, dtype=torch.int64)
    nowhere = none, none, none, none
    return results, seen[-1] if seen else Positions(torch.zeros(0, dtype=acc), nowhere)


def _flat(x: Tensor) -> Tensor:
    """All positions of what a mod is given for one of them."""
    return torch._C._functorch.get_unwrapped(x)  # type: ignore[attr-defined]
