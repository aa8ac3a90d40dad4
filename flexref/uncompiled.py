"""What torch.compile must not look into: it runs as it is, between two graphs.

These are marks that Dynamo reads; torch.compiler.disable, which sets the same ones, would import Dynamo, for a second or more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

Function = TypeVar("Function", bound=Callable)


def uncompiled(fn: Function) -> Function:
    """`fn`, at which torch.compile ends one graph and begins another; nothing that it calls is compiled either."""
    marks: Any = fn
    marks._torchdynamo_disable = True
    marks._torchdynamo_disable_recursive = True
    marks._torchdynamo_disable_msg = (
        f"flexref's {fn.__qualname__} compiles kernels of its own and runs between two graphs; leave out fullgraph=True, "
        "or compile the parts around it"
    )
    machine: Any = getattr(getattr(torch._C, "_dynamo", None), "eval_frame", None)
    if hasattr(machine, "_FrameExecStrategy"):
        # where the frame of `fn` itself is given to torch.compile, no mark of the function is read
        skip = machine._FrameAction.SKIP
        machine.set_code_exec_strategy(fn.__code__, machine._FrameExecStrategy(skip, skip))
    return fn
