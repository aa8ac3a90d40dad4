"""FlexAttention with its meaning written down, and more than one engine to run it."""
from importlib import import_module
from typing import TYPE_CHECKING, Any

from flexref import variants  # its masks load with torch.load(weights_only=True) as soon as flexref is imported
from flexref.blocks.mask import (
    BlockMask,
    and_masks,
    create_block_mask,
    create_mask,
    noop_mask,
    or_masks,
)
from flexref.blocks.nested import create_nested_block_mask
from flexref.blocks.operators import concat_masks
from flexref.dispatch import AuxOutput, AuxRequest, explain, flex_attention, varlen_attention
from flexref.errors import FlexrefError, TraceError, Unsupported
from flexref.torch_names import (
    _DEFAULT_SPARSE_BLOCK_SIZE as _DEFAULT_SPARSE_BLOCK_SIZE,
)
from flexref.torch_names import (
    FlexKernelOptions,
    unknown,
)
from flexref.torch_names import (
    _mask_mod_signature as _mask_mod_signature,
)
from flexref.torch_names import (
    _score_mod_signature as _score_mod_signature,
)

if TYPE_CHECKING:
    from flexref import visualize

__version__ = "0.1.0"
__all__ = [
    "AuxOutput",
    "AuxRequest",
    "BlockMask",
    "FlexKernelOptions",
    "FlexrefError",
    "TraceError",
    "Unsupported",
    "and_masks",
    "concat_masks",
    "create_block_mask",
    "create_mask",
    "create_nested_block_mask",
    "explain",
    "flex_attention",
    "noop_mask",
    "or_masks",
    "variants",
    "varlen_attention",
    "visualize",
]


def __getattr__(name: str) -> Any:
    if name == "visualize":
        return import_module("flexref.visualize")
    unknown(name)
