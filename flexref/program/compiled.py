"""Mods that went through torch.compile: flexref takes them as they were written."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def original(mod: Any) -> Any:
    """What was given to torch.compile, of a mod that came out of it; any other mod as it is."""
    while True:
        held = getattr(mod, "__dict__", {})
        inner = (held.get("_modules") or {}).get("_orig_mod") or held.get("_torchdynamo_orig_callable")
        if inner is None:
            return mod
        mod = inner


def nothing_compiled() -> AbstractContextManager:
    """Functions that a mod calls and that went through torch.compile run as they were written."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
