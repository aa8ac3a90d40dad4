"""The Triton engine's kernels compiled for GPUs that are not here: registers, spills, shared memory, instructions, builds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from flexref.backends.triton.tiles import TABLE

HERE = Path(__file__).resolve().parent
# bytes of shared memory that a block may have
SHARED = {"80": 163 * 1024, "90": 227 * 1024, "100": 227 * 1024}
# bytes that a thread may set aside; on an H100 the tile of backward_kv that was fastest sets aside the most
ASIDE = {"80": 32, "90": 160, "100": 32}
DOTS = {"80": "mma\\.sync", "90": "wgmma\\.mma_async", "100": "tcgen05\\.mma"}


def ahead(*arguments: str):
    """What triton_ahead.py prints, from a process in which Triton compiles."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, str(HERE / "triton_ahead.py"), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("dim", ["64", "128"])
@pytest.mark.parametrize("arch", ["80", "90", "100"])
def test_default_tiles_do_not_spill(arch, dim):
    for report in ahead("report", arch, "bfloat16", dim):
        where = f"{report['kernel']}, {report['kind']}, sm_{arch}, head size {dim}: {report}"
        assert report["shared"] <= SHARED[arch], where
        assert 0 < report["registers"] <= 255, where
        if report["kernel"] in TABLE:
            assert report["stack"] <= ASIDE[arch], where
        if report["kernel"] in ("forward", "backward_kv", "backward_q"):
            assert report[DOTS[arch]] > 0, where
        if report["kernel"] == "forward" and arch != "80":
            assert report["tensor"] > 0, "tiles come by the tensor memory accelerator: " + where


def test_an_amd_gpu_gets_its_own_instructions():
    for report in ahead("report", "gfx942", "float16", "64", "soft-cap, ALiBi"):
        assert report["mfma"] > 0 or report["kernel"] in ("delta", "combine"), report


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_wide_types_compile(dtype):
    found = ahead("report", "90", dtype, "64", "soft-cap, ALiBi")
    assert {report["kernel"] for report in found} >= {"forward", "backward_kv", "backward_q", "delta", "decode", "combine"}
    for report in found:
        assert report["shared"] <= SHARED["90"] and report["wgmma\\.mma_async"] == 0, report
        # tensor cores would round float32 to tf32; float64 they multiply exactly, and careful passes count ones with them
        counts = "careful" in report["kernel"]
        assert dtype == "float64" or counts or report["mma\\.sync"] == 0, report


def test_a_read_that_depends_on_the_score_compiles():
    # the pipeliner of Triton 3.6 and 3.7 cannot do it with more than one stage
    found = ahead("report", "90", "bfloat16", "64", "read by score")
    kernels = {report["kernel"] for report in found if report["tile"][3] == 1}
    assert kernels >= {"forward", "backward_kv", "backward_q", "decode"}, found


@pytest.mark.parametrize("dim", ["16", "64"])
def test_no_product_on_hopper_is_narrow(dim):
    # docs/decisions/0023-no-narrow-products-on-hopper.md
    found = ahead("report", "90", "bfloat16", dim, "plain", "documents")
    assert all(report["narrow"] == 0 for report in found), [r for r in found if r["narrow"]]
    assert any(report["wgmma\\.mma_async"] for report in found)


def test_a_score_is_rounded_before_the_maximum_is_taken_from_it():
    # else 1e30 would leave of a rounded maximum the error of its rounding, 1e22, as a power of 2
    for report in ahead("report", "90", "float32", "64", "large"):
        if report["kernel"].startswith(("forward", "backward", "decode")):
            assert report["fused"] == 0 < report["rounded"], report
            # a plain sub could still be fused by the assembler
            assert report["kept apart"] > 0, report


@pytest.mark.parametrize("how", ["masked", "whole"])
def test_numbers_and_lengths_do_not_make_builds(how):
    found = ahead("builds", how)
    assert found.pop("calls") == 5 and found == dict.fromkeys(found, 1), found
