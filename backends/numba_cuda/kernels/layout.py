"""The numbers that a call gives to its kernels, in the order of the tuple `sizes`: nothing of them is compiled in."""
from __future__ import annotations

# MASK_ROWS, MASK_COLUMNS: of blocks. MASK_STEP_B, MASK_STEP_H: from one batch or head of the lists to the next, 0 where shared.
# MASK_HEADS: heads in the lists. RESTS: how many pairs of batch and head share a row of the lists, HEADS_LEFT: heads of them.
# KV_TASKS: pairs of batch and head of the keys
_NUMBERS = (
    "BATCH", "KV_BATCH", "Q_HEADS", "KV_HEADS", "GROUP", "Q_LEN", "KV_LEN", "Q_BLOCK", "KV_BLOCK", "MASK_ROWS",
    "MASK_COLUMNS", "MASK_HEADS", "MASK_STEP_B", "MASK_STEP_H", "RESTS", "HEADS_LEFT", "KV_TASKS", "SPLITS",
)  # fmt: skip
# query, key, value, out, grad_out and the gradients of the first three
TENSORS = ("Q", "K", "V", "O", "G", "DQ", "DK", "DV")
SIZES = (*_NUMBERS, *(f"{name}_{step}" for name in TENSORS for step in ("B", "H", "ROW", "COL")))
PLACE = {name: at for at, name in enumerate(SIZES)}
