"""The GPU day: limits, order, a page that says what ran; each step alone is tested where it lives."""
from __future__ import annotations

import json
import sys

import pytest

from bench import gpu_day
from bench.gpu_day import Day, Step


def python(text: str) -> tuple[str, ...]:
    return sys.executable, "-c", text


def test_a_step_is_cut_off_at_its_limit_and_the_next_one_runs(tmp_path, capsys):
    day = Day(tmp_path, minutes=1)
    slow = Step("slow", python("import time; print('begun', flush=True); time.sleep(60)"), 3)
    day.run([slow, Step("good", python("print(7)"), 30)])
    assert [running.state() for running in day.done] == ["cut off", "good"]
    assert "| good | good: 7 |" in (tmp_path / "page.md").read_text()
    assert "slow: cut off" in capsys.readouterr().out


def test_what_is_to_be_alone_waits_for_what_runs_beside(tmp_path):
    day = Day(tmp_path, minutes=1)
    beside = Step("beside", python("import time; time.sleep(1)"), 30, beside=True)
    day.run([beside, Step("timed", python("pass"), 30, alone=True), Step("wrong", python("raise SystemExit(3)"), 30)])
    assert [running.step.name for running in day.done] == ["beside", "timed", "wrong"]
    assert day.done[2].state() == "exit code 3"


def test_nothing_is_begun_when_the_time_is_up(tmp_path):
    day = Day(tmp_path, minutes=0)
    day.run([Step("late", python("pass"), 30)])
    assert day.done == []


@pytest.mark.parametrize("dry", [False, True])
def test_the_plan_goes_by_information(tmp_path, dry):
    plan = gpu_day.steps(Day(tmp_path, 9, dry))
    names = [step.name for step in plan]
    assert names[0] == "versions" and names.index("smoke_triton") < names.index("training") < names.index("conformance_triton")
    assert all(step.alone for step in plan if step.name in ("training", "decode"))
    assert any("--emulated" in step.command for step in plan) is dry


def test_the_page_holds_cases_refusals_and_what_was_missed(tmp_path):
    where = {"variant": "full", "dtype": "bfloat16", "D": 128, "S": 64, "B": 1, "engine": "triton"}
    timed = {"what": "forward", **where, "seconds": {"median": 0.002}, "TFLOP/s": 5.0, "ratios": {"torch flex": {"median": 0.9}}}
    refused = {"what": "backward", **where, "refused": "AssertionError: wrong"}
    target = {"value": 0.9, "asked": 1.15, "unit": "x", "met": False}
    kept = {"cases": [timed, refused], "targets": {"triton": {"forward / torch flex": target}}}
    (tmp_path / "training.json").write_text(json.dumps(kept))
    page = gpu_day.page(Day(tmp_path, 9))
    assert "2.000 | 5 TFLOP/s" in page and "torch flex 0.90" in page and "refused | AssertionError: wrong" in page
    assert "- triton, forward / torch flex: 0.9 x, asked 1.15" in page


def test_a_step_that_is_not_there_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit):
        gpu_day.main(["--out", str(tmp_path), "--only", "nothing"])
    assert "names no step; steps: versions" in capsys.readouterr().err
