"""Names beside the public ones that code for torch.nn.attention.flex_attention imports: what they are here, or what to use."""
from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn, TypedDict

from torch import Tensor

# (b, h, q_idx, kv_idx) -> bool, and (score, b, h, q_idx, kv_idx) -> score
_mask_mod_signature = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
_score_mod_signature = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
_DEFAULT_SPARSE_BLOCK_SIZE = 128


class FlexKernelOptions(TypedDict, total=False):
    """torch's tuning options, as code for it writes them; `explain` says which of those given mean nothing to an engine.

    Options of flexref's engines go into the same dict; `python -m flexref doctor` names the engines.
    """

    num_warps: int
    num_stages: int
    BLOCK_M: int
    BLOCK_N: int
    BLOCK_M1: int
    BLOCK_N1: int
    BLOCK_M2: int
    BLOCK_N2: int
    PRESCALE_QK: bool
    ROWS_GUARANTEED_SAFE: bool
    BLOCKS_ARE_CONTIGUOUS: bool
    WRITE_DQ: bool
    FORCE_USE_FLEX_ATTENTION: bool
    USE_TMA: bool
    kpack: int
    matrix_instr_nonkdim: int
    waves_per_eu: int
    BACKEND: str


INSTEAD = {
    "_LARGE_SPARSE_BLOCK_SIZE": "leave block_mask out: flexref needs no block mask of one block",
    "_ModificationType": "a mod is told by its arguments: 4 of a mask_mod, 5 of a score_mod",
    "_get_mod_type": "a mod is told by its arguments: 4 of a mask_mod, 5 of a score_mod",
    "_vmap_for_bhqkv": "create_mask(mod, B, H, Q_LEN, KV_LEN) asks a mod at every position",
    "_convert_mask_to_block_mask": "create_block_mask(lambda b, h, q, kv: mask[b, h, q, kv], ...) makes one of a dense mask",
    "_create_sparse_block_from_block_mask": "BlockMask.from_kv_blocks(kv_num_blocks, kv_indices, ...) makes one of lists",
    "_create_empty_block_mask": "leave block_mask out: every position is allowed then",
    "_identity": "leave score_mod out",
    "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG": 'backend="reference" runs the mods as they are, so that print works in them',
}


def unknown(name: str) -> NoReturn:
    """Raise AttributeError for a name that `flexref` does not have, saying what to use instead of one of torch's."""
    instead = f", which torch has; {INSTEAD[name]}" if name in INSTEAD else ""
    raise AttributeError(f"module 'flexref' has no attribute {name!r}{instead}", name=name)
