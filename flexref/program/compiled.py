"""Mods that went through torch.compile, or are called under autocast: flexref takes them as they were written."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from types import FunctionType
from typing import Any

import torch


def original(mod: Any) -> Any:
    """What was given to torch.compile, of a mod that came out of it; any other mod as it is."""
    while True:
        inner = _inner(mod)
        if inner is None:
            return mod
        mod = inner


def _inner(mod: Any) -> Any:
    """What Dynamo's own wrapper stands for. functools.wraps copies its attributes to others, which do more than it."""
    if "torch._dynamo" not in sys.modules:
        return None
    if isinstance(mod, sys.modules["torch._dynamo"].OptimizedModule):
        # hooks of the wrapper itself are not the module's
        return None if mod._forward_hooks or mod._forward_pre_hooks else mod._orig_mod
    if isinstance(mod, FunctionType) and mod.__globals__.get("__name__", "").startswith("torch._dynamo"):
        return vars(mod).get("_torchdynamo_orig_callable")
    return None


@contextmanager
def no_autocast() -> Iterator[None]:
    """Within it the caller's autocast chooses no type of float."""
    with ExitStack() as stack:
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


def nothing_compiled() -> AbstractContextManager:
    """Functions that a mod calls and that went through torch.compile run as they were written."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
