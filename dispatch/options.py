"""kernel_options: what a caller may say to an engine. A name that nobody knows is an error."""

from __future__ import annotations

from collections.abc import Mapping

from flexref.backend import Backend
from flexref.dispatch.choose import nearest
from flexref.torch_names import FlexKernelOptions

# torch's documented tuning names are accepted so that code can move over; an engine that has no use for one ignores it
TORCH_NAMES = frozenset(FlexKernelOptions.__annotations__)
_BACKENDS = {"AUTO": "auto", "TRITON": "triton", "TRITON_DECODE": "triton"}


def checked_options(options: Mapping[str, object] | None, backends: Mapping[str, Backend]) -> dict[str, object]:
    """The options that some engine knows. Raises TypeError or ValueError that names the option and the nearest known one."""
    if options is None:
        return {}
    if not isinstance(options, Mapping):
        raise TypeError(f"kernel_options must be a dict or None, got {type(options).__name__}.")
    ours = {name for backend in backends.values() for name in backend.options}
    if "BACKEND" in options:
        _torch_backend(options)
    kept = {}
    for name, value in options.items():
        bare = str(name).removeprefix("fwd_").removeprefix("bwd_")
        if name in ours:
            kept[name] = value
        elif bare not in TORCH_NAMES:
            known = sorted([*ours, *TORCH_NAMES])
            raise ValueError(
                f"kernel_options has the unknown option {name!r}{nearest(str(name), known)}; known: {', '.join(known)}."
            )
    return kept


def wanted_backend(backend: str, options: Mapping[str, object] | None, environment: Mapping[str, str]) -> str:
    """The backend asked for: the argument, else torch's BACKEND option, else FLEXREF_BACKEND, else "auto"."""
    if not isinstance(backend, str):
        raise TypeError(f"backend must be a string, got {type(backend).__name__}.")
    if backend != "auto":
        return backend
    if options and "BACKEND" in options:
        named = _torch_backend(options)
        if named != "auto":
            return named
    return environment.get("FLEXREF_BACKEND", "") or "auto"


def _torch_backend(options: Mapping[str, object]) -> str:
    named = str(options["BACKEND"])
    if named not in _BACKENDS:
        raise ValueError(f"kernel_options BACKEND={named!r} is not available here; known: {', '.join(_BACKENDS)}.")
    return _BACKENDS[named]


def ignored(options: Mapping[str, object], chosen: str | None, known: Mapping[str, str]) -> list[str]:
    """What `explain` says of options that mean nothing to the engine that was chosen."""
    names = [str(name) for name in options if name not in known and name != "BACKEND"]
    return [f"kernel_options {', '.join(names)} mean nothing to {chosen or 'any engine here'}"] if names else []
