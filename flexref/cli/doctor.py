"""Says of every backend whether this machine can run it, and what would mend it where not."""
from __future__ import annotations

import argparse
import platform
from importlib.metadata import PackageNotFoundError, version

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import flexref
from flexref.backend import find_backends, said
from flexref.cache_folder import home
from flexref.dispatch.hardware import probe

PACKAGES = ("torch", "numpy", "numba", "llvmlite", "triton", "cupy-cuda13x", "numba-cuda")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`doctor` has no options."""


def run(options: argparse.Namespace) -> int:
    """0 if some backend other than the reference can run here, else 1."""
    console = Console()
    console.print(f"flexref   {flexref.__version__}, Python {platform.python_version()} on {platform.system()}")
    console.print(f"versions  {', '.join(f'{name} {installed(name)}' for name in PACKAGES)}", highlight=False)
    console.print(f"machine   {probe()}, torch uses {torch.get_num_threads()} threads", highlight=False)
    console.print(f"cache     {cache_folder()}", highlight=False, markup=False, soft_wrap=True)
    backends = find_backends()
    reasons = {name: said(backend, "unavailable") for name, backend in backends.items()}
    table = Table("backend", "rank", "here", "what is missing, and what mends it")
    for name, backend in backends.items():
        here = "[red]no[/red]" if reasons[name] else "[green]yes[/green]"
        table.add_row(name, str(backend.rank), here, escape("\n".join(reasons[name])))
    console.print(table)
    return 0 if any(not why for name, why in reasons.items() if name != "reference") else 1


def cache_folder() -> str:
    """Where compiled kernels are kept, how much is there, and what moves it."""
    folder = home()
    files = [path for path in folder.rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files) / 2**20
    return f"{folder}, {len(files)} files, {size:.1f} MiB; FLEXREF_CACHE names another"


def installed(package: str) -> str:
    """Its version, or "missing"."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"
