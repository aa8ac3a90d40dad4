"""FlexAttention with its meaning written down, and more than one engine to run it."""
import importlib

from flexref.block_mask import (
    BlockMask,
    and_masks,
    create_block_mask,
    create_mask,
    noop_mask,
    or_masks,
)
from flexref.dispatch import AuxOutput, AuxRequest, explain, flex_attention
from flexref.errors import FlexrefError, TraceError, Unsupported

__version__ = "0.1.0"
__all__ = [
    "AuxOutput",
    "AuxRequest",
    "BlockMask",
    "FlexrefError",
    "TraceError",
    "Unsupported",
    "and_masks",
    "create_block_mask",
    "create_mask",
    "explain",
    "flex_attention",
    "noop_mask",
    "or_masks",
]


def __getattr__(name: str):
    # a sub-package that nobody imported yet; importing it here would cost every user its time
    if name == "variants":
        return importlib.import_module("flexref.variants")
    raise AttributeError(f"module 'flexref' has no attribute {name!r}")
