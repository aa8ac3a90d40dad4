"""The suite as a pytest plugin: which backends, their known gaps, and the matrix at the end.

A test of the suite that takes an argument `backend` runs once for each. Its row in the matrix is its name; a cell is
pass, unsupported(reason), unavailable(reason), known gap or FAIL. A run that compared nothing for a backend fails.
"""

from __future__ import annotations

import ast
import importlib
import json
import tomllib
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, settings

from flexref.backend import Backend, find_backends
from flexref.conformance.ledger import LEDGER
from flexref.conformance.matrix import Cell, Matrix

SUITE = Path(__file__).resolve().parent
PROFILES = {"quick": 25, "full": 250}
# an emulated engine runs about a thousand times slower than on its own device
EMULATED = {"quick": 8, "full": 80}
# where hypothesis keeps the settings of a test; it has no public way to change them for one item
_SETTINGS = "_hypothesis_internal_use_settings"
MATRIX = pytest.StashKey[Matrix]()


class Gap(NamedTuple):
    """One known failure of a backend, as its gaps.toml states it; `kind` is "notyet" or "never"."""

    backend: str
    test: str
    kind: str
    reason: str
    link: str


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("flexref conformance")
    group.addoption(
        "--backend",
        action="append",
        default=[],
        help="a backend's name, or the dotted path of a module; default: all",
    )
    group.addoption(
        "--conformance-profile", choices=sorted(PROFILES), default="quick", help="how many examples"
    )
    group.addoption("--conformance-json", metavar="PATH", help="write the matrix as JSON")


def pytest_configure(config: pytest.Config) -> None:
    profile = str(config.getoption("--conformance-profile"))
    common = dict(
        deadline=None,
        print_blob=False,
        suppress_health_check=list(HealthCheck),
        max_examples=PROFILES[profile],
    )
    # quick: the same examples in every run, so that a backend's cache of compiled kernels serves the next run
    quick = profile == "quick"
    settings.register_profile("flexref", **common, derandomize=quick, database=None)  # type: ignore[arg-type]
    settings.load_profile("flexref")
    how = {backend.name: how_of(backend) for backend in selected(config)}
    config.stash[MATRIX] = Matrix(list(how), bool(asked(config)), {name: word for name, word in how.items() if word})


def pytest_report_header(config: pytest.Config) -> list[str]:
    lines = []
    for backend in selected(config):
        why = backend.unavailable()
        known = len(gaps_of(backend))
        state = f"unavailable: {'; '.join(why)}" if why else how_of(backend) or "available"
        lines.append(f"flexref backend {backend.name}: {state}" + (f"; {known} known gaps" if known else ""))
    return lines


def selected(config: pytest.Config) -> list[Backend]:
    """The backends that `--backend` names, or all that are found; one that this machine cannot run, as it is emulated."""
    return list(_selected(asked(config)))


def how_of(backend: Backend) -> str:
    """ "" for a backend on its own device, else the word for its emulation: "interpreted", "simulated"."""
    return str(getattr(backend, "how", ""))


def asked(config: pytest.Config) -> tuple[str, ...]:
    return tuple(config.getoption("--backend") or ())


@cache
def _selected(names: tuple[str, ...]) -> tuple[Backend, ...]:
    found = find_backends()
    chosen = [_named(name, found) for name in names] if names else found.values()
    return tuple(_runnable(backend) for backend in chosen)


def _runnable(backend: Backend) -> Backend:
    """The backend, or where it has no device here, the same kernels emulated on the CPU if it can do that."""
    emulated = getattr(backend, "emulated", None)
    if emulated is None or not backend.unavailable():
        return backend
    stand_in = emulated()
    return backend if stand_in.unavailable() else stand_in


def _named(name: str, found: dict[str, Backend]) -> Backend:
    if name in found:
        return found[name]
    if "." not in name:
        raise pytest.UsageError(
            f"--backend {name}: no such backend; found {', '.join(found)}, or give a module's dotted path"
        )
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        raise pytest.UsageError(f"--backend {name}: cannot be imported: {error}") from error
    missing = [
        part
        for part in ("name", "rank", "options", "unavailable", "unsupported", "forward", "backward")
        if not hasattr(module, part)
    ]
    if missing:
        raise pytest.UsageError(
            f"--backend {name}: is no backend, it lacks {', '.join(missing)} (see flexref.backend.Backend)"
        )
    return module  # type: ignore[return-value]


@cache
def suite_tests() -> frozenset[str]:
    """The name of every test of the suite that runs once for each backend."""
    names = set()
    for path in SUITE.glob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                if "backend" in [argument.arg for argument in node.args.args]:
                    names.add(node.name)
    return frozenset(names)


def gaps_of(backend: Backend) -> list[Gap]:
    """The known gaps in gaps.toml beside a backend's module; UsageError if one is incomplete or matches no test."""
    home = getattr(find_backends().get(backend.name, backend), "__file__", None)
    path = Path(home).parent / "gaps.toml" if home else None
    if path is None or not path.exists():
        return []
    gaps = []
    for row in tomllib.loads(path.read_text()).get("gap", []):
        if (
            set(row) != {"test", "kind", "reason", "link"}
            or row["kind"] not in ("notyet", "never")
            or not row["reason"]
        ):
            raise pytest.UsageError(
                f"{path}: a gap has test, kind (notyet or never), reason and link; got {row}"
            )
        if row["test"] not in suite_tests():
            raise pytest.UsageError(
                f"{path}: the gap {row['test']!r} matches no test of the suite; remove it or correct its name"
            )
        gaps.append(Gap(backend.name, **row))
    return gaps


def is_of_suite(path: Path) -> bool:
    return path.resolve().parent == SUITE


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend" in metafunc.fixturenames and is_of_suite(metafunc.definition.path):
        backends = selected(metafunc.config)
        metafunc.parametrize("backend", backends, ids=[backend.name for backend in backends])


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    gaps = {(gap.backend, gap.test): gap for backend in selected(config) for gap in gaps_of(backend)}
    for item in items:
        backend = backend_of(item)
        if backend is None:
            continue
        if why := backend.unavailable():
            item.add_marker(pytest.mark.skip(reason=f"unavailable: {'; '.join(why)}"))
        elif gap := gaps.get((backend.name, row_of(item))):
            reason = f"{gap.kind}: {gap.reason} {gap.link}".strip()
            item.add_marker(pytest.mark.xfail(reason=reason, strict=True))


def backend_of(item: pytest.Item) -> Backend | None:
    """The backend that an item of the suite runs, None for every other item."""
    callspec = getattr(item, "callspec", None)
    if callspec is None or "backend" not in callspec.params or not is_of_suite(item.path):
        return None
    return callspec.params["backend"]


def row_of(item: pytest.Item) -> str:
    return getattr(item, "originalname", None) or item.name


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_call(item: pytest.Item):
    LEDGER.clear()
    backend, test = backend_of(item), getattr(item, "obj", None)
    given = getattr(test, _SETTINGS, None)
    if backend is None or not how_of(backend) or given is None:
        return (yield)
    count = EMULATED[str(item.config.getoption("--conformance-profile"))]
    setattr(test, _SETTINGS, settings(given, max_examples=min(count, given.max_examples)))
    try:
        return (yield)
    finally:
        setattr(test, _SETTINGS, given)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    report = yield
    backend = backend_of(item)
    if backend is None:
        return report
    if report.when == "call" and report.passed and not hasattr(report, "wasxfail") and LEDGER.compared == 0:
        file, line, _ = item.location
        if LEDGER.refused:
            report.outcome = "skipped"
            report.longrepr = (file, line or 0, f"Skipped: unsupported: {'; '.join(LEDGER.reasons)}")
        else:
            report.outcome = "failed"
            report.longrepr = f"{item.nodeid} passed without comparing anything and without a refusal"
    if report.when == "call" or (report.when == "setup" and not report.passed):
        cell = Cell.of(report, LEDGER.as_dict() if report.when == "call" else {})
        report.user_properties.append(
            ("flexref", {"backend": backend.name, "test": row_of(item), **cell.as_dict()})
        )
    return report


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    # with xdist the reports of every worker arrive here, in the process that prints
    if report.when == "call" or report.when == "setup":
        for key, value in report.user_properties:
            if key == "flexref":
                _PENDING.append(value)


_PENDING: list[Any] = []


def pytest_sessionfinish(session: pytest.Session) -> None:
    config = session.config
    if hasattr(config, "workerinput"):
        return
    matrix = config.stash[MATRIX]
    for row in _PENDING:
        matrix.add(row.pop("backend"), row.pop("test"), Cell(**row))
    _PENDING.clear()
    if path := config.getoption("--conformance-json"):
        Path(str(path)).write_text(json.dumps(matrix.as_dict(), indent=1) + "\n")
    if matrix.faults() and session.exitstatus in (0, pytest.ExitCode.NO_TESTS_COLLECTED):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    matrix = config.stash[MATRIX]
    if matrix.rows:
        terminalreporter.section("flexref conformance")
        terminalreporter.write(matrix.render())
    for fault in matrix.faults():
        terminalreporter.write_line(fault, red=True)
