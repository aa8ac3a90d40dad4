"""`python -m flexref doctor` and `show`, and what they say to wrong arguments."""
from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flexref.__main__ import main
from flexref.backend import find_backends
from flexref.cli import doctor, show

MODS = '''
import torch
slopes = torch.ones(8)

def alibi(score, b, h, q_idx, kv_idx):
    return score + slopes[h] * (kv_idx - q_idx)

def causal(b, h, q_idx, kv_idx):
    return kv_idx <= q_idx

def window(size):
    def near(b, h, q_idx, kv_idx):
        return q_idx - kv_idx < size
    return near

def branching(score, b, h, q_idx, kv_idx):
    if q_idx > kv_idx:
        return score
    return score * 2

number = 3
'''


@pytest.fixture
def mods(tmp_path: Path, monkeypatch) -> str:
    path = tmp_path / "some_mods.py"
    path.write_text(MODS)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return str(path)


def test_the_module_runs_from_the_command_line():
    done = subprocess.run([sys.executable, "-m", "flexref", "--help"], capture_output=True, text=True, check=True)
    assert all(name in done.stdout for name in ("demo", "doctor", "show"))


def test_doctor_names_every_backend(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in find_backends())
    assert "cache" in said and "torch 2." in said and "threads" in said


def test_doctor_says_what_mends_a_backend(capsys, monkeypatch):
    class Broken:
        name, rank, options = "broken", 9, {}

        @staticmethod
        def unavailable():
            return ["no such library: pip install 'flexref[broken]'"]

    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(doctor, "find_backends", lambda: {"broken": Broken})
    assert main(["doctor"]) == 1
    assert "pip install 'flexref[broken]'" in capsys.readouterr().out


def test_show_prints_every_stage_of_a_score_mod(capsys, mods):
    assert main(["show", f"{mods}:alibi"]) == 0
    said = capsys.readouterr().out
    assert "def alibi" in said and "== program" in said and "load 0" in said
    assert "buffer 0: slopes float32 (8,)" in said
    assert "== derivative" in said and "grad" in said
    assert re.search(r"numba_cpu +chosen", said) and "== numba_cpu derivative" in said


def test_show_knows_a_mask_by_its_four_arguments(capsys, mods):
    assert main(["show", f"{mods}:causal"]) == 0
    said = capsys.readouterr().out
    assert "== mask_mod causal" in said and "== derivative" not in said


def test_show_calls_a_factory(capsys, mods):
    assert main(["show", f"{mods}:window(size=8)"]) == 0
    said = capsys.readouterr().out
    assert "mask_mod near" in said and "scalar 0: 8" in said
    assert main(["show", "flexref.variants.score_mods:soft_cap(20.0)"]) == 0
    said = capsys.readouterr().out
    assert "torch.tanh" in said and "score = t" in said


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("mods.py", "is not FILE:FUNCTION, such as mods.py:causal"),
        ("absent.py:causal", "there is no file 'absent.py'"),
        ("no.such.module:causal", "is neither a .py file nor a module"),
        ("{mods}:absent", "has no 'absent'"),
        ("{mods}:window", "takes 1 arguments; a mask_mod takes (b, h, q_idx, kv_idx)"),
        ("{mods}:window(size)", "neither a name nor a factory with literal arguments"),
        ("{mods}:number", "is not a function"),
        ("{mods}:branching", "some_mods.py"),
    ],
)
def test_show_says_what_is_wrong(capsys, mods, what, message):
    assert main(["show", what.format(mods=mods)]) == 1
    assert message in capsys.readouterr().err


def test_a_program_is_shown_in_a_language_that_lacks_an_operation(mods):
    emitter = type("Poor", (show.Emitter,), {"lacks": {"le": "this language has no comparisons"}})()
    graph = show.traced_mod(show.load(f"{mods}:causal"), "mask", torch.float32).graph
    assert show.source(emitter, graph) == "lacks le: this language has no comparisons"


@pytest.mark.parametrize("command", ["show", "doctor"])
def test_a_reader_that_leaves_early_is_no_error(mods, command):
    arguments = [sys.executable, "-u", "-m", "flexref", command, *([f"{mods}:alibi"] if command == "show" else [])]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert "BrokenPipe" not in process.stderr.read()
