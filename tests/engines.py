"""The engines that a test may run here."""

from __future__ import annotations

from flexref.backend import Backend, find_backends


def runnable() -> list[Backend]:
    """Every engine, on its own device or emulated."""
    found = []
    for backend in find_backends().values():
        if backend.unavailable() and hasattr(backend, "emulated"):
            backend = backend.emulated()  # type: ignore[attr-defined]
        if not backend.unavailable():
            found.append(backend)
    return found
