"""What is asked of a backend about one Case: it runs and conforms, or refuses with the reasons that it gave."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from flexref.arguments import prepare
from flexref.autograd import attend
from flexref.backend import Backend
from flexref.conformance.cases import Built, Case, build
from flexref.conformance.compare import expectations
from flexref.conformance.ledger import LEDGER
from flexref.conformance.poison import poisoned
from flexref.errors import Unsupported
from flexref.problem import Output, Problem, Tensors


@dataclass
class Ran:
    """A case that a backend has run: results by the names of compare.expectations."""

    built: Built
    results: dict[str, Tensor]


def check_case(backend: Backend, case: Case) -> Ran | None:
    """Every result within the error budget and every input unwritten; None if the backend refuses, rightly.

    Raises AssertionError for whatever does not conform.
    """
    ran = run_case(backend, case)
    if ran is not None:
        wanted = expectations(ran.built.call)
        for name, result in ran.results.items():
            LEDGER.compare(wanted[name].judge(result))
    return ran


def run_case(backend: Backend, case: Case) -> Ran | None:
    """The results, not yet compared; None if the backend refuses."""
    built = build(case.within(getattr(backend, "reach", None)), device_of(backend))
    problem, tensors = prepare(**built.arguments)
    if reasons := backend.unsupported(problem):
        check_refusal(backend, problem, tensors, reasons)
        return None
    before = {name: _bytes(tensor) for name, tensor in built.leaves.items()}
    with poisoned():
        output = attend(backend, problem, tensors)
        results = _results(case, output) | _gradients(built, output)
    for name, tensor in built.leaves.items():
        assert torch.equal(_bytes(tensor), before[name]), f"{name} was written to"
    return Ran(built, results)


def check_refusal(backend: Backend, problem: Problem, tensors: Tensors, reasons: list[str]) -> None:
    """What `unsupported` refuses raises Unsupported with each of the reasons."""
    assert all(isinstance(reason, str) and reason for reason in reasons), (
        f"reasons are sentences, got {reasons}"
    )
    with pytest.raises(Unsupported) as caught:
        attend(backend, problem, tensors)
    told = [str(caught.value), *caught.value.reasons.get(backend.name, [])]
    silent = [reason for reason in reasons if not any(reason in text for text in told)]
    assert not silent, f"{backend.name} refused without telling {silent}"
    LEDGER.refuse(reasons)


def check_same_bits(backend: Backend, case: Case) -> None:
    """Two calls give the same bits."""
    first, second = run_case(backend, case), run_case(backend, case)
    if first is None or second is None:
        return
    for name, result in first.results.items():
        same = torch.equal(_bits(result), _bits(second.results[name]))
        assert same, f"{name}: a second call on the same input gave other bits"
        LEDGER.compare()


def device_of(backend: Backend) -> str:
    """Where this backend wants its tensors: the CPU, or a GPU if it refuses a plain problem on the CPU."""
    if not torch.cuda.is_available():
        return "cpu"
    problem, _ = prepare(**build(Case()).arguments)
    return "cuda" if backend.unsupported(problem) else "cpu"


def _results(case: Case, output: Output) -> dict[str, Tensor]:
    results = {"out": output.out, "lse": output.lse}
    if case.max_scores:
        assert output.max_scores is not None, "max_scores was asked for and not given"
        assert not output.max_scores.requires_grad, "max_scores is not differentiable"
        results["max_scores"] = output.max_scores
    return results


def _gradients(built: Built, output: Output) -> dict[str, Tensor]:
    """The gradients of the case's loss by name; zeros where a result does not depend on what is wanted."""
    call = built.call
    if not call.wanted:
        return {}
    terms = [(output.out, call.grad_out), (output.lse, call.grad_lse)]
    terms = [(y, grad.to(y.device)) for y, grad in terms if grad is not None]
    leaves = [built.leaves[name] for name in call.wanted]
    outputs, grads = zip(*terms, strict=True)
    found = torch.autograd.grad(outputs, leaves, grads, allow_unused=True)
    results = {}
    for name, leaf, grad in zip(call.wanted, leaves, found, strict=True):
        results[f"grad {name}"] = torch.zeros_like(leaf) if grad is None else grad
    return results


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().flatten().contiguous().view(torch.uint8)


def _bytes(tensor: Tensor) -> Tensor:
    """A copy of all bytes of the tensor's storage, also of those between its elements."""
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage()).clone()
