"""The cache folder in bad weather: written by others, full, read-only, gone, interrupted; each engine's way of keeping files."""

from __future__ import annotations

import errno
import multiprocessing
import os
from pathlib import Path

import pytest
import torch

from flexref import cache_folder, flex_attention
from flexref.backends.cupy import cache as cupy_cache
from flexref.backends.numba_cpu import cache as numba_cache
from flexref.backends.numba_cpu import launch
from flexref.backends.numba_cuda import compiler as cuda_compiler
from flexref.backends.triton import kernels_for as triton_kernels
from flexref.cache_folder import CacheWarning

CODE = b"x = 1\n"


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("FLEXREF_CACHE", str(tmp_path))
    return tmp_path


def keep_numba_cpu(name: str) -> Path | None:
    path = (numba_cache.folder("numba_cpu") or Path()) / name
    return path if numba_cache.keep(path, CODE) else None


def keep_numba_cuda(name: str) -> Path | None:
    written = Path(cuda_compiler._written(CODE.decode(), name))
    return written if written.exists() else None


# each engine's own way to a kept file: the file, or None where the engine does without
ENGINES = {
    "numba_cpu": keep_numba_cpu,
    "numba_cuda": keep_numba_cuda,
    "cupy": lambda name: cupy_cache.kept(name, lambda: CODE),
    "triton": lambda name: triton_kernels._written(name, CODE),
}


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("engine", ENGINES)
def test_a_file_is_kept_in_the_folder_of_its_engine(engine, home):
    assert ENGINES[engine]("k.py") == home / engine / "k.py"
    assert (home / engine / "k.py").read_bytes() == CODE and files(home) == ["k.py"]
    assert (home / engine).stat().st_mode & 0o777 == 0o700


def failing(number: int):
    def fail(*_, **__):
        raise OSError(number, os.strerror(number))

    return fail


class Full:
    """A file on a full disk."""

    def __init__(self, handle, mode):
        os.close(handle)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def write(self, content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


FAULTS = {
    "full disk": ("fdopen", Full),
    "no right to replace": ("replace", failing(errno.EACCES)),
    "read-only folder": ("mkstemp", failing(errno.EROFS)),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("engine", ENGINES)
def test_a_failed_write_is_a_warning_and_leaves_nothing(engine, fault, home, monkeypatch):
    name, instead = FAULTS[fault]
    place = cache_folder.tempfile if name == "mkstemp" else os
    true, own = getattr(place, name), home / "own"
    own.mkdir()
    monkeypatch.setattr(cache_folder, "own_folder", lambda backend: own)
    monkeypatch.setattr(triton_kernels, "own_folder", lambda backend: own)
    calls = []

    def once(*args, **kwargs):
        calls.append(args)
        return (instead if len(calls) == 1 else true)(*args, **kwargs)

    monkeypatch.setattr(place, name, once)
    with pytest.warns(CacheWarning, match="k.py cannot be written .*"):
        path = ENGINES[engine]("k.py")
    assert path == (own / "k.py" if engine in ("cupy", "triton") else None)
    assert files(home / engine) == []


def test_an_interrupted_write_leaves_nothing(home, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        cache_folder.write(home / "k.py", CODE)
    assert files(home) == []


@pytest.mark.parametrize("engine", ENGINES)
def test_a_folder_that_others_can_write_is_not_used(engine, home):
    (home / engine).mkdir()
    (home / engine).chmod(0o777)
    with pytest.warns(CacheWarning, match=f"{engine} belongs to another user or is writable by others.*set FLEXREF_CACHE"):
        assert cache_folder.folder(engine) is None
    own = cache_folder.own_folder(engine)
    assert own.stat().st_mode & 0o777 == 0o700 and not own.is_relative_to(home)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_folder_that_cannot_be_made(engine, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FLEXREF_CACHE", str(tmp_path / "file"))
    with pytest.warns(CacheWarning, match="cannot be made"):
        assert cache_folder.folder(engine) is None


def _write_often(path: str, letter: bytes) -> None:
    for _ in range(100):
        cache_folder.write(Path(path), letter * 10_000)


def test_two_processes_at_once_leave_one_whole_file(tmp_path):
    path = tmp_path / "k.py"
    cache_folder.write(path, b"a" * 10_000)
    context = multiprocessing.get_context("fork")
    others = [context.Process(target=_write_often, args=(str(path), letter)) for letter in (b"a", b"b")]
    for other in others:
        other.start()
    while any(other.is_alive() for other in others):
        assert path.read_bytes() in (b"a" * 10_000, b"b" * 10_000)
    for other in others:
        other.join()
        assert other.exitcode == 0
    assert files(tmp_path) == ["k.py"]


def test_a_call_runs_where_nothing_can_be_kept(home, monkeypatch):
    x = torch.randn(1, 1, 8, 8)
    monkeypatch.setattr(numba_cache, "_loaded", {})
    monkeypatch.setattr(cache_folder.tempfile, "mkstemp", failing(errno.EROFS))
    launch._plan.cache_clear()
    with pytest.warns(CacheWarning, match="cannot be written"):
        out = flex_attention(x, x, x, backend="numba_cpu")
    torch.testing.assert_close(out, flex_attention(x, x, x, backend="reference"))
    assert files(home) == []
