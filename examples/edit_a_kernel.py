"""Change one line of the attention kernel, run it, and let the conformance suite say which rules of meaning no longer hold.

The kernels of the engine numba_cuda are Python. Here the weights of the softmax become those of a normalised sigmoid: in Numba's
simulator on any machine, on the GPU if there is one. To keep an edit, make it in backends/numba_cuda/kernels/forward.py itself.
"""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table

from flexref.arguments import prepare
from flexref.autograd import attend
from flexref.backends import numba_cuda
from flexref.backends.numba_cuda import kernels_for
from flexref.conformance.cases import Blocks, Case
from flexref.conformance.checks import check_same_bits, run_case
from flexref.conformance.compare import expectations

LINE = "s[i, j] = exp2(minus(s[i, j], base) * LOG2E)"
# whatever is added up is scaled by exp(-base), so the new weights must be, too; -inf, a masked score, still has weight 0
EDITED = "s[i, j] = exp2(-base * LOG2E) / (real(1) + exp2(-s[i, j] * LOG2E))"

# with scale 0 all scores are equal, and then a sigmoid weighs as a softmax does: what still differs is the rule's own
EQUAL = Case(q_len=20, kv_len=23, scale=0.0, wants=("query", "value"))
RULES = {
    "R1 the accumulation type": EQUAL.but(scale=None),
    "R3 allowed positions": EQUAL.but(mask="(q_idx + kv_idx) % 3 != 0", blocks=Blocks((16, 16), by_hand=True)),
    "R4 masked positions count nothing": EQUAL.but(mask="q_idx >= kv_idx", values="holes", wants=(), seed=1),
    "R5 a score of -inf is masked": EQUAL.but(score="torch.where(q_idx >= kv_idx, score, -inf)"),
    "R6 a row with nothing allowed": EQUAL.but(mask="q_idx < 0"),
    "R7 NaN stays in its row": EQUAL.but(score="torch.where(q_idx == 7, nan, score)", wants=()),
    "R8 lse is natural": EQUAL.but(loss="lse", wants=("query",)),
    "R9 any lengths": EQUAL.but(q_len=5, kv_len=0),
    "R10 grouped heads": EQUAL.but(kv_heads=2, group=3),
    "R14 any strides": EQUAL.but(layouts=("step", "columns", "row")),
}


@contextmanager
def sigmoid_kernel() -> Iterator[None]:
    """Within it every kernel is made from the edited text; the compiled ones are kept apart by their source."""
    plain = kernels_for.source

    def edited(name: str) -> str:
        return plain(name).replace(LINE, EDITED)

    assert LINE in plain("forward"), "the line to be edited is no longer in forward.py"
    with mock.patch.object(kernels_for, "source", edited):
        yield


def difference(backend, device: str) -> float:
    """How far the edited kernel is from the formula in PyTorch, on one small causal problem."""
    query, key, value = torch.randn(3, 1, 2, 24, 16, generator=torch.Generator().manual_seed(0)).to(device)
    problem, tensors = prepare(query, key, value, mask_mod=lambda b, h, q_idx, kv_idx: q_idx >= kv_idx)
    weight = torch.sigmoid(query @ key.mT / 4).tril()
    wanted = weight @ value / weight.sum(-1, keepdim=True)
    return float((attend(backend, problem, tensors).out - wanted).abs().max())


def verdicts(backend, case: Case) -> dict[str, str]:
    """For each result of a case, "" if the suite finds it within the error budget, else what it says of the worst element."""
    ran = run_case(backend, case)
    assert ran is not None, "the engine refuses this problem"
    wanted, found = expectations(ran.built.call), {}
    for name, result in ran.results.items():
        try:
            wanted[name].judge(result)
            found[name] = ""
        except AssertionError as error:
            found[name] = str(error)
    return found


def main() -> dict[str, dict[str, str]]:
    """Prints the difference and the table; returns what the suite says of each rule and result."""
    on_gpu = not numba_cuda.unavailable()
    backend: Any = numba_cuda if on_gpu else numba_cuda.emulated()
    print(f"on the {'GPU' if on_gpu else 'simulator'}:\n    {LINE}\nbecomes\n    {EDITED}")
    with sigmoid_kernel():
        far = difference(backend, "cuda" if on_gpu else "cpu")
        print(f"largest difference from the formula in PyTorch: {far:.1e}")
        found = {rule: verdicts(backend, case) for rule, case in RULES.items()}
        check_same_bits(backend, EQUAL)
    title = "What the conformance suite says of the edited kernel (the backward kernels are still those of a softmax)"
    table = Table("rule", "out", "lse", "gradients", title=title)
    for rule, results in found.items():
        grads = [says for name, says in results.items() if name.startswith("grad")]
        table.add_row(rule, _cell([results["out"]]), _cell([results["lse"]]), _cell(grads))
    table.add_row("R15 the same bits", "holds", "holds", "holds")
    Console().print(table)
    return found


def _cell(verdicts: list[str]) -> str:
    return "-" if not verdicts else "[bold]no longer[/bold]" if any(verdicts) else "holds"


if __name__ == "__main__":
    main()
