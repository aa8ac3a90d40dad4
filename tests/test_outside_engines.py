"""Engines of other packages, found by their entry points: whatever is wrong with one, it is listed with that, and others run."""

from __future__ import annotations

import importlib
import pkgutil
import signal
from functools import partial
from importlib.metadata import EntryPoint
from types import SimpleNamespace

import pytest
import torch

from flexref import Unsupported, backend, explain, flex_attention
from flexref.__main__ import main
from flexref.backend import Broken, find_backends
from flexref.backends import numba_cpu, reference
from flexref.dispatch import attention

x = torch.randn(1, 1, 8, 8)


def engine(**changes):
    """An engine that can do all that the reference does."""
    parts = {
        "name": "mine",
        "rank": 99,
        "options": {},
        "unavailable": lambda: [],
        "unsupported": lambda problem: [],
        "forward": reference.forward,
        "backward": reference.backward,
    }
    return SimpleNamespace(**{k: v for k, v in (parts | changes).items() if v is not None})


class Entry:
    """An entry point of a package that is not installed."""

    dist = SimpleNamespace(name="their-package")

    def __init__(self, load, name="theirs"):
        self.load, self.name, self.value = load, name, "their.module"


def raising(error: BaseException):
    def load(*_):
        raise error

    return load


@pytest.fixture
def installed(monkeypatch):
    """Install engines: each given as what its entry point loads."""

    def install(*entries):
        monkeypatch.setattr(backend, "entry_points", lambda group: list(entries))
        forget()

    def forget():
        find_backends.cache_clear()
        attention._unavailable.clear()
        attention._choices.clear()

    yield install
    monkeypatch.undo()
    forget()


def listed(name: str) -> str:
    """The line of an engine in explain."""
    return next(line for line in str(explain(x, x, x)).splitlines() if line.strip().startswith(f"{name} "))


class Odd:
    """An engine whose attributes cannot be read."""

    def __getattr__(self, name):
        raise RuntimeError("no attributes today")


UNUSABLE = {
    "import error": (raising(ImportError("no module their")), "its import failed: ImportError: no module their"),
    "any error": (raising(KeyError("x")), "its import failed: KeyError: 'x'"),
    "no text": (raising(AssertionError()), "its import failed: AssertionError;"),
    "exit": (raising(SystemExit(3)), "its import failed: SystemExit: 3"),
    "attributes raise": (Odd, "its import failed: RuntimeError: no attributes today"),
    "nothing": (lambda: None, "it is no backend: it has no name, rank, options, unavailable, unsupported, forward, backward"),
    "no rank": (lambda: engine(rank=None), "it is no backend: it has no rank;"),
    "no options": (lambda: engine(options=None), "it is no backend: it has no options;"),
    "no forward": (lambda: engine(forward=None), "it is no backend: it has no forward;"),
    "rank of words": (lambda: engine(rank="high"), "its rank must be a number, got 'high'"),
    "rank is nan": (lambda: engine(rank=float("nan")), "its rank must be a number, got nan"),
    "options of a list": (lambda: engine(options=["fast"]), "its options must be a dict from names to explanations, got list"),
    "name of nothing": (lambda: engine(name=""), "its name must be a string and not 'auto', got ''"),
    "name auto": (lambda: engine(name="auto"), "its name must be a string and not 'auto'"),
    "forward is no function": (lambda: engine(forward=3), "it is no backend: forward cannot be called"),
}


@pytest.mark.parametrize("what", UNUSABLE)
def test_what_is_no_engine_is_listed_with_its_fault_and_others_run(what, installed, capsys, monkeypatch):
    load, says = UNUSABLE[what]
    installed(Entry(load))
    assert f"cannot: {says}" in listed("theirs")
    assert "mend or uninstall the entry point theirs = their.module of the package their-package" in listed("theirs")
    assert flex_attention(x, x, x).shape == x.shape
    with pytest.raises(Unsupported, match="backend 'theirs' cannot run this problem"):
        flex_attention(x, x, x, backend="theirs")
    monkeypatch.setenv("COLUMNS", "400")
    assert main(["doctor"]) == 0
    assert says.partition(":")[0] in capsys.readouterr().out


def test_an_engine_that_works_is_used(installed):
    installed(Entry(engine), Entry(lambda: engine(name="second", rank=98.5)))
    assert list(find_backends())[:2] == ["mine", "second"]
    assert explain(x, x, x).choice.name == "mine"
    torch.testing.assert_close(flex_attention(x, x, x), flex_attention(x, x, x, backend="reference"))


@pytest.mark.parametrize("taken", ["numba_cpu", "reference", "triton"])
def test_a_built_in_engine_keeps_its_name(taken, installed):
    installed(Entry(lambda: engine(name=taken), name=taken))
    assert getattr(find_backends()[taken], "__name__", "") == f"flexref.backends.{taken}"
    name = f"{taken} (the entry point {taken} = their.module of the package their-package)"
    assert f"cannot: its name '{taken}' is that of another engine, which came first" in listed(name)
    assert explain(x, x, x).choice.name == "numba_cpu"


def test_the_first_of_two_has_the_name(installed):
    first, second = engine(), engine(rank=100)
    installed(Entry(lambda: first), Entry(lambda: second, name="mine"))
    assert find_backends()["mine"] is first
    assert "its name 'mine' is that of another engine" in listed("mine (the")


def test_a_built_in_folder_that_cannot_be_imported_is_listed(installed, monkeypatch):
    true = importlib.import_module

    def broken(name, *rest):
        if name == "flexref.backends.triton":
            raise OSError("libcuda.so: wrong ELF class")
        return true(name, *rest)

    monkeypatch.setattr(backend.importlib, "import_module", broken)
    installed()
    assert "its import failed: OSError: libcuda.so: wrong ELF class; mend or uninstall the folder" in listed("triton")
    assert flex_attention(x, x, x).shape == x.shape


def test_an_interrupted_import_is_the_callers(installed):
    installed(Entry(raising(KeyboardInterrupt())))
    with pytest.raises(KeyboardInterrupt):
        find_backends()
    installed()
    assert set(find_backends()) == {m.name for m in pkgutil.iter_modules(importlib.import_module("flexref.backends").__path__)}


class Alarm:
    """Signal handlers of every form; each raises what would else be an engine's own error."""

    def function(*_):
        raise TimeoutError("too long")

    def __call__(self, signum, frame):
        raise RuntimeError("too long")

    def method(self, signum, frame):
        raise ImportError("too long")

    def through_another(self, signum, frame):
        self.method(signum, frame)


HANDLERS = (Alarm.function, Alarm(), Alarm().method, partial(Alarm.function, 3), Alarm().through_another)


@pytest.mark.parametrize("handler", HANDLERS)
def test_what_a_signal_raises_in_an_import_or_an_answer_is_the_callers(handler, installed):
    before = signal.signal(signal.SIGALRM, handler)
    try:

        def interrupted(*_):
            try:
                signal.raise_signal(signal.SIGALRM)
            except Exception as error:
                raise ValueError("said again in other words") from error

        installed(Entry(interrupted))
        with pytest.raises(ValueError, match="other words"):
            find_backends()
        installed(Entry(lambda: engine(unavailable=lambda: signal.raise_signal(signal.SIGALRM))))
        with pytest.raises((TimeoutError, RuntimeError, ImportError), match="too long"):
            explain(x, x, x)
        # the same error, but not out of the handler
        installed(Entry(raising(RuntimeError("too long"))))
        assert isinstance(find_backends()["theirs"], Broken)
    finally:
        signal.signal(signal.SIGALRM, before)


NO_LIST = "must answer with a list of strings, got"
ANSWERS = {
    "unavailable raises": (dict(unavailable=raising(OSError("no driver"))), "its unavailable() failed: OSError: no driver"),
    "unavailable exits": (dict(unavailable=raising(SystemExit("bye"))), "its unavailable() failed: SystemExit: bye"),
    "unsupported raises": (dict(unsupported=raising(KeyError("float8"))), "its unsupported() failed: KeyError: 'float8'"),
    "unsupported says nothing": (dict(unsupported=lambda problem: None), f"its unsupported() {NO_LIST} None"),
    "unavailable says one string": (dict(unavailable=lambda: "no"), f"its unavailable() {NO_LIST} 'no'"),
}


@pytest.mark.parametrize("what", ANSWERS)
def test_an_engine_whose_answers_fail_is_not_chosen(what, installed, monkeypatch, capsys):
    changes, says = ANSWERS[what]
    installed(Entry(lambda: engine(**changes)))
    assert f"cannot: {says}" in listed("mine")
    assert explain(x, x, x).choice.name == "numba_cpu"
    torch.testing.assert_close(flex_attention(x, x, x), flex_attention(x, x, x, backend="reference"))
    monkeypatch.setenv("COLUMNS", "400")
    assert main(["doctor"]) == 0
    if "unavailable" in says:
        assert says in capsys.readouterr().out


def test_notes_that_fail_are_a_note(installed):
    installed(Entry(lambda: engine(notes=raising(ValueError("no notes")))))
    assert explain(x, x, x).notes == ("its notes() failed: ValueError: no notes",)


def test_the_entry_points_are_asked_for_by_their_group(installed, monkeypatch):
    """The fake above has the parts of a true one that are used."""
    entry = EntryPoint("name", "flexref.backends.reference", "flexref.backends")
    assert entry.load() is reference and entry.dist is None
    installed(entry)
    assert "its name 'reference' is that of another engine" in listed("reference (the")
    assert find_backends()["numba_cpu"] is numba_cpu
