"""The folders beside flexref are the sub-packages in it: by links in a checkout, by setup.py in a wheel."""
from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import flexref

ROOT = Path(__file__).resolve().parent.parent
LINKED = ("backends", "dispatch", "conformance")
TEMPORARY = shutil.ignore_patterns(".venv", ".git", "build", "dist", "*.egg-info", "__pycache__", "flexref-demo")


@pytest.mark.parametrize("name", LINKED)
def test_a_link_is_its_folder(name):
    assert (ROOT / "flexref" / name).samefile(ROOT / name)
    assert not os.path.isabs(os.readlink(ROOT / "flexref" / name))


def test_the_version_is_said_once_and_again():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert flexref.__version__ == project["version"]


def test_constraints_hold_what_pyproject_asks_for():
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert (pinned["torch"], pinned["triton"]) == ("2.13.0", "3.7.1")
    asked = [*project["dependencies"], *(x for xs in project["optional-dependencies"].values() for x in xs)]
    names = {line.partition(">=")[0].partition("[")[0] for line in asked} - {"flexref"}
    assert names <= set(pinned), f"not pinned: {sorted(names - set(pinned))}"
    assert set(project["optional-dependencies"]) >= {"triton", "cupy", "numba-cuda", "all", "dev"}


def test_a_wheel_holds_every_folder_and_works(tmp_path):
    shutil.copytree(ROOT, tmp_path / "source", symlinks=True, ignore=TEMPORARY)
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", tmp_path]
    subprocess.run([*build, tmp_path / "source"], check=True, capture_output=True, text=True)
    (wheel,) = tmp_path.glob("flexref-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        inside = set(archive.namelist())
        archive.extractall(tmp_path / "installed")
    assert {name.split("/")[0] for name in inside if ".dist-info" not in name} == {"flexref"}
    for home in LINKED:
        wanted = [path for path in (ROOT / home).rglob("*") if path.is_file() and "__pycache__" not in path.parts]
        missing = [path for path in wanted if f"flexref/{path.relative_to(ROOT).as_posix()}" not in inside]
        assert not missing, f"not in the wheel: {missing}"
    assert {"flexref/py.typed", "flexref/cli/demo.py", "flexref/program/ops.py", "flexref/variants/masks.py"} <= inside

    code = "import flexref, flexref.conformance.compare; from flexref.backend import find_backends; "
    code += "print(flexref.__file__); print(sorted(find_backends()))"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "installed")}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, cwd=tmp_path, check=True, capture_output=True, text=True)
    place, found = done.stdout.splitlines()
    assert Path(place).is_relative_to(tmp_path / "installed")
    assert found == str(sorted(path.parent.name for path in (ROOT / "backends").glob("*/__init__.py")))
