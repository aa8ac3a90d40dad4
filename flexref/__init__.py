"""FlexAttention with its meaning written down, and more than one engine to run it."""
from flexref import variants  # its masks load with torch.load(weights_only=True) as soon as flexref is imported
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
    "variants",
]
