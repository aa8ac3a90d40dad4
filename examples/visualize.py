"""The pictures of docs/visualize.md: a mask of a million tokens from afar and from near, and what a call's scores are.

    python examples/visualize.py [FOLDER]        writes them into docs/images, or into FOLDER
"""
from __future__ import annotations

import sys
from pathlib import Path

import flexref
from flexref.cli import text
from flexref.variants import masks, score_mods
from flexref.visualize import mask, probabilities, score_gradients, scores

DOCS = Path(__file__).resolve().parent.parent / "docs" / "images"
TOKENS, WINDOW, DOCUMENTS = 1 << 20, 8192, [400_050, 250_000, 300_000, 98_526]


def long_mask() -> flexref.BlockMask:
    """A window within documents, and the first 8,192 keys of all for everyone."""

    def first(b, h, q_idx, kv_idx):
        return kv_idx < 8192

    window = masks.and_masks(masks.sliding_window(WINDOW), masks.document(masks.document_ids(DOCUMENTS)))
    allowed = masks.or_masks(window, masks.and_masks(masks.causal, first))
    return flexref.create_block_mask(allowed, None, None, TOKENS, TOKENS, device="cpu")


def draw_mask(folder: Path) -> None:
    """All of it, the blocks around the place where the second document begins, and the positions there."""
    block_mask, edge = long_mask(), DOCUMENTS[0]
    mask(block_mask, max_cells=128, path=folder / "mask-far.svg")
    blocks = range(edge - 6_000, edge + 10_000), range(edge - 10_000, edge + 6_000)
    mask(block_mask, queries=blocks[0], keys=blocks[1], path=folder / "mask-near.svg")
    positions = range(edge - 120, edge + 120), range(edge - 210, edge + 40)
    mask(block_mask, queries=positions[0], keys=positions[1], path=folder / "mask-positions.svg")


def draw_call(folder: Path) -> None:
    """Two heads of ALiBi, causal and within documents, on the text of the demo."""
    query, key, value, lengths = text.packed(text.documents(2048), heads=8, head_dim=32)
    document = masks.and_masks(masks.causal, masks.document(masks.document_ids(list(lengths))))
    block_mask = flexref.create_block_mask(document, None, None, query.shape[2], query.shape[2], device="cpu")
    call = query, key, value, score_mods.alibi(8), block_mask
    scores(*call, heads=(1, 5), max_cells=96, path=folder / "scores.svg")
    probabilities(*call, heads=(1, 5), max_cells=96, path=folder / "probabilities.svg")
    score_gradients(*call, heads=5, queries=slice(600, 664), keys=slice(568, 664), path=folder / "score-gradients.svg")


if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else DOCS
    folder.mkdir(parents=True, exist_ok=True)
    draw_mask(folder)
    draw_call(folder)
    print(long_mask().stats())
