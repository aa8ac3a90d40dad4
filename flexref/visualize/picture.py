"""What is drawn of one head, before any drawing library comes in: cells with values, and what a cell's value means."""
from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from flexref.visualize.window import Side

# what the values are: of a mask the kind of a block or of a position, or a share; else what the function is named after
BLOCKS, ELEMENTS, SHARE = "blocks", "elements", "share"
SCORES, PROBABILITIES, GRADIENTS = "scores", "probabilities", "score_gradients"


@dataclass(frozen=True)
class Picture:
    """values, masked: float64 and bool (q.cells, kv.cells) on the CPU; a masked cell has no allowed position.

    `block`: (q_block, kv_block), whose borders are drawn where they are few; None if there are no blocks.
    """

    kind: str
    values: Tensor
    masked: Tensor
    q: Side
    kv: Side
    title: str
    block: tuple[int, int] | None = None
