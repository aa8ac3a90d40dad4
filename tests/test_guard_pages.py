"""No engine reads or writes outside of the memory that it was given: everything lies between pages that nobody may touch."""
from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from flexref.backends.cupy import host

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(os.name != "posix", reason="forbidden pages are made with mprotect")
NO_COMPILER = host.unavailable()


def run(*arguments: str) -> subprocess.CompletedProcess:
    """guard_pages.py in a process of its own, on threads of one core."""
    command = [sys.executable, "-W", "ignore", str(ROOT / "tests" / "guard_pages.py"), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT, env=environment)


@pytest.mark.parametrize("engine", ("numba_cpu", "cupy", "triton"))
def test_no_engine_touches_what_lies_beside_its_memory(engine):
    if engine == "cupy" and NO_COMPILER:
        pytest.skip("; ".join(NO_COMPILER))
    if engine == "triton":
        pytest.importorskip("triton")
    done = run(engine)
    assert done.returncode == 0 and done.stdout.endswith("all\n"), f"died in: {done.stdout[-300:]}\n{done.stderr[-2000:]}"


def test_one_key_too_many_takes_the_process_down():
    done = run("numba_cpu", "planted")
    assert done.returncode in (-signal.SIGSEGV, -signal.SIGBUS), done.stdout[-300:] + done.stderr[-300:]
