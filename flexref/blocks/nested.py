"""The BlockMask of packed tokens, where sequences of a jagged nested tensor lie one behind the other."""
from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from flexref.blocks.inputs import check_mask_mod
from flexref.blocks.mask import BlockMask, create_block_mask
from flexref.blocks.packed import Packed, places
from flexref.uncompiled import uncompiled


@uncompiled
def create_nested_block_mask(
    mask_mod: Callable,
    B: int | None,
    H: int | None,
    q_nt: Tensor,
    kv_nt: Tensor | None = None,
    BLOCK_SIZE: int | tuple[int, int] = 128,
    _compile: bool = False,
) -> BlockMask:
    """The BlockMask of the packed tokens of jagged nested tensors (B, H, S*, E), each sequence attending to itself alone.

    mask_mod is written for one sequence: its b is the number of the sequence in the nested tensor, and its q_idx and kv_idx
    count from where that sequence begins. The mask is for the tokens as they lie in memory: B is None or 1, and
    flex_attention takes it as block_mask beside the jagged tensors (B, H, S*, E) themselves. kv_nt None: as q_nt.
    BLOCK_SIZE as for create_block_mask; _compile changes nothing.

    Raises TypeError for what is no jagged nested tensor, ValueError for tensors that do not fit together.
    """
    check_mask_mod(mask_mod)
    kv_nt = q_nt if kv_nt is None else kv_nt
    q_offsets, kv_offsets = (jagged_offsets(n, x) for n, x in (("q_nt", q_nt), ("kv_nt", kv_nt)))
    if q_nt.device != kv_nt.device or q_nt.shape[0] != kv_nt.shape[0]:
        raise ValueError(
            f"q_nt has {q_nt.shape[0]} sequences on {q_nt.device}, kv_nt {kv_nt.shape[0]} on {kv_nt.device}: "
            "they must be as many, on one device"
        )
    mod = Packed(mask_mod, places(q_offsets, kv_offsets))
    return create_block_mask(mod, B, H, int(q_offsets[-1]), int(kv_offsets[-1]), q_nt.device, BLOCK_SIZE)


def jagged_offsets(name: str, nt: object) -> Tensor:
    """Where each sequence of a jagged nested tensor begins among its packed tokens, and how many those are: int64 (B + 1,).

    Raises TypeError for anything else, ValueError for one with holes.
    """
    if not isinstance(nt, Tensor) or not nt.is_nested or nt.layout != torch.jagged:
        got = f"layout {nt.layout}" if isinstance(nt, Tensor) else type(nt).__name__
        raise TypeError(
            f"{name} must be a nested tensor of layout torch.jagged, got {got}; for dense packed tokens use "
            "create_block_mask with masks.document(ids), as examples/packed_documents.py does"
        )
    if nt.lengths() is not None:  # type: ignore[attr-defined]
        raise ValueError(f"{name} has holes between its sequences; make it whole with .contiguous()")
    return nt.offsets().long()  # type: ignore[attr-defined]
