"""The block mask of a score_mod: what it makes -inf, whatever the scores are, is masked (R5)."""
from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch

from flexref.blocks.lists import FULL, PARTIAL, Grid
from flexref.blocks.mask import BlockMask
from flexref.blocks.mask_mods import noop_mask
from flexref.blocks.split import lists_of, split
from flexref.program.intervals import Classifier, index_ranges
from flexref.program.ir import Graph
from flexref.program.minus_infinity import MaskedByScore, masking
from flexref.program.mods import Mod
from flexref.program.split_score import split_score

_BLOCK = 128
# fewer positions are calculated faster than looked at; more where the program is not kept, and so looked at in each call
_WORTH, _WORTH_EACH_CALL = 1 << 18, 1 << 22


class Question(NamedTuple):
    """What decides about the blocks that a score_mod masks: the grid, and of its captured tensors those that matter."""

    grid: Grid
    captured: tuple[int, ...]


class Found(NamedTuple):
    """The programs that an engine runs, here in the place of a score_mod's, and the mask that lists their blocks."""

    score: Graph | None
    mask: Graph | None
    blocks: BlockMask | None


def question(score: Mod, batch: int, heads: int, q_len: int, kv_len: int) -> Question | None:
    """None where the score_mod masks nothing, or too little is to be gained.

    Also where a read may be out of range, which is an error at masked positions too (R13).
    """
    read = masking(score.graph)
    if read is None or q_len * kv_len < (_WORTH if score.key is not None else _WORTH_EACH_CALL):
        return None
    extents = ("b", batch), ("h", heads), ("q_idx", q_len), ("kv_idx", kv_len)
    if not _in_range(score.graph, tuple(tuple(x.shape) for x in score.captured), extents):
        return None
    B, H = batch if "b" in read.inputs else 1, heads if "h" in read.inputs else 1
    return Question(Grid(B, H, q_len, kv_len, _BLOCK, _BLOCK), read.captured)


@lru_cache(maxsize=1024)
def _in_range(graph: Graph, shapes: tuple[tuple[int, ...], ...], extents: tuple[tuple[str, int], ...]) -> bool:
    """Whether the lengths alone prove every read; negative indices count from the end."""
    for position, ranges in index_ranges(graph, dict(extents)).items():
        shape = shapes[int(graph.nodes[position].attr)]  # type: ignore[arg-type]
        if not all(-size <= low and high < size for (low, high), size in zip(ranges, shape, strict=True)):
            return False
    return True


def find_mask(score: Mod, asked: Question, device: torch.device) -> Found | None:
    """None if every block is listed.

    A score_mod that ends in a choice is split into mask and score; one that goes on calculating with -inf stays as it is,
    and every block that it does not wholly mask is listed as full.
    """
    grid, apart = asked.grid, split_score(score.graph)
    if apart is None:
        tiles = split(MaskedByScore(score.graph, score.captured, score.scalars), grid)
        tiles = {PARTIAL: [], FULL: tiles[PARTIAL] + tiles[FULL]}
    else:
        tiles = split(Classifier(apart.mask, score.captured, score.scalars), grid)
    lists = lists_of(tiles, grid, device)
    if len(lists.indices) + int(lists.full_counts.sum()) == grid.flat_rows * grid.columns:
        return None
    blocks = BlockMask._make(grid, lists, noop_mask, True, False)
    return Found(score.graph, None, blocks) if apart is None else Found(*apart, blocks)
