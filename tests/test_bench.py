"""The benchmark: its arithmetic, its refusal of a wrong backend, its fresh processes, its JSON."""
from __future__ import annotations

import json

import pytest
import torch

import flexref
from bench import check, run
from bench.cases import TARGETS, Target, variants
from bench.clock import Timing, interleaved, ratio
from bench.fresh import in_new_process


def test_a_target_is_met_on_its_side():
    assert Target("speed", 1.8).met(1.8) and not Target("speed", 1.8).met(1.79)
    assert Target("time", 0.3, "s", at_most=True).met(0.3) and not Target("time", 0.3, "s", at_most=True).met(0.31)


def test_calls_are_interleaved_and_first_in_turn():
    order = []
    samples = interleaved({"ours": lambda: order.append("o"), "theirs": lambda: order.append("t")}, 4, 60)
    assert "".join(order) == "ot" + "ot" + "to" + "ot" + "to"
    assert {name: len(taken) for name, taken in samples.items()} == {"ours": 4, "theirs": 4}


def test_a_ratio_is_the_median_of_the_rounds_with_their_spread():
    found = ratio([1.0, 2.0, 1.0], [3.0, 4.0, 3.0])
    assert found.median == 3.0 and found.low == 2.5 and found.high == 3.0
    assert Timing.of([2.0]) == (2.0, 2.0, 2.0)


@pytest.mark.parametrize("name", variants(8, 64))
def test_a_right_backend_may_be_timed(name):
    bench = run.Bench(length=96, heads=2, head_dim=16)
    assert check.complaint(variants(2, 96)[name], bench.inputs(), "reference", gradients=True) == ""


def test_a_wrong_backend_is_refused_and_not_timed(monkeypatch):
    right = flexref.flex_attention

    def wrong(*arguments, **named):
        result = right(*arguments, **named)
        return (result[0] * 1.001, result[1]) if isinstance(result, tuple) else result * 1.001

    monkeypatch.setattr(check.flexref, "flex_attention", wrong)
    said = []
    bench = run.Bench("reference", quick=True, length=96, heads=2, head_dim=16, say=said.append)
    rival = pytest.fail
    assert bench.pair("forward", variants(2, 96)["causal"], bench.inputs(), False, rival) is None
    assert "over the error budget" in bench.cases[0]["refused"] and said[0].startswith("refused")


def test_a_target_that_was_not_measured_is_missed():
    bench = run.Bench(say=lambda text: None)
    bench.target("two threads over one", None, "refused")
    assert bench.results["two threads over one"]["met"] is False
    assert bench.results["two threads over one"]["why"] == "refused"


def test_a_pair_is_timed_forward_and_backward():
    bench = run.Bench("reference", quick=True, length=64, heads=2, head_dim=16, say=lambda text: None)
    inputs = bench.inputs()
    rival = lambda: torch.nn.functional.scaled_dot_product_attention(*inputs, is_causal=True)  # noqa: E731
    for gradients in (False, True):
        found = bench.pair("case", variants(2, 64)["causal"], inputs, gradients, rival)
        assert found is not None and found.median > 0
    assert not any(x.requires_grad for x in inputs)
    assert bench.cases[1]["seconds"]["ours"]["median"] > 0


def test_fresh_processes_measure_first_calls_and_memory(tmp_path):
    found = in_new_process("import", tmp_path)
    assert found["torch"] > 0 and found["flexref"] > 0
    found = in_new_process("first", tmp_path, "--length", "128")
    assert found["first"] > found["again"] > 0 < found["backward"]
    found = in_new_process("memory", tmp_path, "--length", "256")
    assert found["tensors"] == 8 * 8 * 256 * 64 * 4
    with pytest.raises(RuntimeError, match="bench.fresh first"):
        in_new_process("first", tmp_path, "--backend", "no such backend")


def test_results_are_written_as_json(tmp_path, capsys):
    path = tmp_path / "results" / "out.json"
    code = run.main(["--quick", "--only", "fixed", "--json", str(path)])
    kept = json.loads(path.read_text())
    (name,) = kept["targets"]
    assert name in TARGETS and kept["quick"] is True and kept["machine"]["torch"] == torch.__version__
    assert code == (0 if kept["targets"][name]["met"] else 1)
    assert "fixed cost" in capsys.readouterr().out


def test_cuda_is_reserved(capsys):
    with pytest.raises(SystemExit):
        run.main(["--device", "cuda"])
    assert "kept for the GPU backends" in capsys.readouterr().err
