"""The benchmark: its arithmetic, its refusal of a wrong backend, its fresh processes, its JSON."""
from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

import flexref
from bench import check, gpu, gpu_cases, run
from bench.cases import TARGETS, Target, variants
from bench.clock import Timing, interleaved, ratio
from bench.fresh import in_new_process
from bench.gpu_rivals import FA2, FLEX


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
    found = in_new_process("mask", tmp_path, "--mask", "documents and window", "--length", "4096")
    assert found["first"] > 0 < found["later"] and found["peak"] >= 0
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


def test_cuda_needs_a_gpu_and_sections_belong_to_a_device(capsys):
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit):
            run.main(["--device", "cuda"])
        assert "needs a CUDA GPU" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run.main(["--only", "decode"])
    assert "decode is no section of --device cpu" in capsys.readouterr().err


def _gpu_bench(**how) -> gpu.GpuBench:
    """The GPU's bench on the CPU, with a clock that only counts."""
    ticks = iter(range(1, 10_000))

    def clock(call) -> float:
        call()
        return float(next(ticks))

    return gpu.GpuBench(("reference",), device="cpu", rounds=2, clock=clock, say=lambda text: None, **how)


def test_a_gpu_case_is_compared_then_timed_beside_its_rivals(monkeypatch):
    bench = _gpu_bench()
    monkeypatch.setattr(gpu, "rivals", lambda bench, variant, inputs: {FLEX: lambda: sum(inputs)})
    for variant in gpu_cases.variants(2, 64, "cpu").values():
        gpu.one_case(bench, torch.float32, (1, 2, 64, 16), variant)
    assert [case["what"] for case in bench.cases] == ["forward", "backward"] * 7
    assert all(case["TFLOP/s"] > 0 and case["ratios"][FLEX]["median"] > 0 for case in bench.cases)
    broken = gpu_cases.variants(2, 64, "cpu")["causal"]
    monkeypatch.setattr(gpu.flexref, "flex_attention", lambda q, *rest, **named: (q * 0, q[..., 0] * 0))
    gpu.one_case(bench, torch.float32, (1, 2, 64, 16), broken)
    assert "over the error budget" in bench.cases[-1]["refused"]


def test_gradients_are_judged_before_a_gpu_case_is_timed(monkeypatch):
    bench = _gpu_bench(emulated=True)
    reference = gpu.find_backends()["reference"]

    class Off:
        name, options = "reference", {}
        unsupported, forward = staticmethod(reference.unsupported), staticmethod(reference.forward)

        @staticmethod
        def backward(*arguments):
            found = reference.backward(*arguments)
            assert found.key is not None
            return replace(found, key=found.key * 1.01)

    monkeypatch.setattr(bench, "backend", lambda engine: Off)
    gpu.one_case(bench, torch.float32, (1, 2, 64, 16), gpu_cases.variants(2, 64, "cpu")["full"])
    assert [case["refused"] for case in bench.cases if "grad key" in case["refused"]], bench.cases


def test_gpu_targets_come_from_what_was_timed(monkeypatch):
    bench = _gpu_bench()
    bench.engines = ("triton", "cupy")
    assert all(r["value"] is None and not r["met"] for r in gpu.targets(bench, "triton").values())
    sides = {"triton": [1.0, 1.0], "cupy": [0.5, 0.5], FLEX: [1.5, 1.5], FA2: [0.9, 0.9]}
    where = {"variant": "full", "dtype": "bfloat16", "D": 128, "S": 8192, "B": 2}
    for engine in bench.engines:
        bench.record(engine, "forward", where, sides, 400.0, "TFLOP/s")
    for size, copy in ((1 << 30, 0.4), (1 << 20, 4.0)):
        bench.record("triton", "decode", where | {"bytes": size}, {"triton": [0.5, 0.5], "copy": [copy, copy]}, 2.0, "TB/s")
    found = gpu.targets(bench, "triton")
    assert found["forward / torch flex: geometric mean"]["value"] == 1.5
    assert found["forward / FlashAttention-2: geometric mean"]["met"] is False
    assert found["decode / copy: geometric mean"]["value"] == 0.8, "only what no cache holds counts"
    assert found["backward / torch flex: geometric mean"]["value"] is None
    met = gpu.targets(bench, "cupy")["forward / FlashAttention-2: geometric mean"]
    assert abs(met.pop("value") - 1.8) < 1e-6 and met == {"asked": 0.9, "unit": "x", "met": True, "cases": 1}


def test_decoding_is_compared_and_counted(tmp_path):
    bench = _gpu_bench()
    gpu.decoding(bench, torch.float32, sizes=(2 << 20,), lengths=(256,))
    assert [case["what"] for case in bench.cases] == ["decode"] and bench.cases[0]["TB/s"] > 0
    bench.minutes = 0
    gpu.training(bench, (torch.float32,), (64,), (64,))
    assert len(bench.cases) == 1, "no case is begun after the time is up"
    bench.path = tmp_path / "gpu.json"
    assert gpu.run(bench, ()) == 0
    assert json.loads((tmp_path / "gpu.json").read_text())["cases"] == bench.cases


def test_densities():
    found = gpu_cases.variants(2, 1024, "cpu")
    assert gpu_cases.density(found["full"], 1024) == 1.0
    assert abs(gpu_cases.density(found["causal"], 1024) - 0.5) < 0.01
    assert gpu_cases.shape(1024, 64) == (16, 32, 1024, 64) and gpu_cases.shape(32768, 128)[0] == 1
