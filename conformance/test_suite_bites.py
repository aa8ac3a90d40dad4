"""The suite itself is tested: a sound backend passes, planted faults do not, and a run that compared nothing fails."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch
from hypothesis import given, settings

from flexref.conformance.cases import Case
from flexref.conformance.checks import check_case, check_same_bits, run_case
from flexref.conformance.ledger import LEDGER
from flexref.conformance.matrix import Cell, Matrix
from flexref.conformance.mutants import FAULTS
from flexref.conformance.poison import poisoned
from flexref.conformance.strategies import cases
from flexref.conformance.tiled import Tiled


@given(case=cases(gradients=True))
@settings(max_examples=40)
def test_a_sound_backend_passes(case: Case):
    check_case(Tiled(), case)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught(fault: str):
    check_case(Tiled(), FAULTS[fault])
    with pytest.raises(AssertionError):
        check_case(Tiled(fault), FAULTS[fault])


class _Refuses(Tiled):
    def __init__(self):
        super().__init__("always")

    def unsupported(self, problem):
        return ["no problem is small enough"]


def test_a_refusal_is_no_comparison():
    LEDGER.clear()
    assert run_case(_Refuses(), Case()) is None
    assert (LEDGER.compared, LEDGER.refused, LEDGER.reasons) == (0, 1, ["no problem is small enough"])


class _Drifts(Tiled):
    calls = 0

    def forward(self, problem, tensors):
        output = super().forward(problem, tensors)
        self.calls += 1
        output.lse.view(torch.int32).add_(self.calls)
        return output


def test_other_bits_are_caught():
    check_same_bits(Tiled(), Case())
    with pytest.raises(AssertionError, match="other bits"):
        check_same_bits(_Drifts(), Case())


def test_unwritten_memory_is_nan():
    with poisoned():
        fresh = [torch.empty(3), torch.empty_like(torch.ones(3)), torch.ones(3).new_empty(3), numpy.empty(3)]
        assert all(bool((torch.as_tensor(x) != torch.as_tensor(x)).all()) for x in fresh)
        assert torch.empty(3, dtype=torch.int64).shape == (3,)
    assert torch.empty.__name__ == "empty" and not hasattr(torch.empty, "__wrapped__")


def test_nothing_compared_is_a_fault():
    matrix = Matrix(["a", "b"], asked=False)
    matrix.add("a", "test_x", Cell("pass", compared=2))
    matrix.add("b", "test_x", Cell("unavailable", "no GPU"))
    assert matrix.faults() == []
    matrix.add("b", "test_y", Cell("unsupported", "float64", refused=3))
    assert matrix.faults() == ["backend b: nothing was compared"]

    asked = Matrix(["b"], asked=True)
    assert asked.faults() == ["backend b: no test of the suite was run"]
    asked.add("b", "test_x", Cell("unavailable", "no GPU"))
    assert asked.faults() == ["backend b: nothing was compared"]


OUTSIDE = """
from flexref.conformance.tiled import Tiled
import torch
name, rank, options = "outside", 1, {{}}
_sound = Tiled()
forward, backward = _sound.forward, _sound.backward
def unavailable(): return {unavailable}
def unsupported(problem): return {unsupported}
"""
GAP = '[[gap]]\ntest = "{}"\nkind = "notyet"\nreason = "in work"\nlink = ""\n'


def _run(folder: Path, *arguments: str, gap: str = "", unavailable: str = "[]", unsupported: str = "[]"):
    """The suite in a process of its own, on a backend that lives in `folder`."""
    package = folder / "outside" / "engine"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").touch()
    (package / "__init__.py").write_text(OUTSIDE.format(unavailable=unavailable, unsupported=unsupported))
    if gap:
        (package / "gaps.toml").write_text(GAP.format(gap))
    root = Path(__file__).resolve().parent.parent
    command = [
        sys.executable,
        "-m",
        "flexref.conformance",
        "-p",
        "no:cacheprovider",
        "--backend=outside.engine",
        *arguments,
    ]
    paths = os.pathsep.join([str(folder), str(root), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        command, cwd=folder, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True
    )


def test_a_backend_from_outside(tmp_path):
    report = tmp_path / "matrix.json"
    done = _run(tmp_path, "-k", "r06 or r08", f"--json={report}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "pass (" in done.stdout and '"state": "pass"' in report.read_text()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (dict(unavailable='["no such device"]'), "unavailable(no such device)"),
        (dict(unsupported='["is never in the mood"]'), "unsupported(is never in the mood)"),
        (dict(gap="test_r06_row_with_no_allowed_position"), "XPASS"),
        (dict(gap="test_that_is_not_there"), "matches no test"),
    ],
)
def test_what_makes_a_run_fail(tmp_path, settings, says):
    done = _run(tmp_path, "-k", "r06", **settings)
    assert done.returncode != 0
    assert says in " ".join((done.stdout + done.stderr).split())
