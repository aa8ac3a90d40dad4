"""The picture of docs/variants.md: masks of flexref.variants, 64 queries down and 64 keys across.

    python examples/variants_gallery.py [FILE]        writes docs/images/variants.png, or FILE
"""
from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from matplotlib.figure import Figure

from flexref import create_mask
from flexref.variants import masks

PICTURE = Path(__file__).resolve().parent.parent / "docs" / "images" / "variants.png"
N, COLUMNS = 64, 6
LENGTHS = [20, 13, 31]
MARKED = torch.zeros(N, dtype=torch.bool).index_fill(0, torch.tensor([0, 17, 40]), True)
INTERVALS = torch.tensor([[8, 30], [30, 64], [12, 40], [40, 64]])
CHOSEN = torch.rand(8, 8, generator=torch.Generator().manual_seed(0)) < 0.3

MASKS: dict[str, Callable] = {
    "causal": masks.causal,
    "window(10, 3)": masks.window(10, 3),
    "sliding_window(12)": masks.sliding_window(12),
    "dilated_window(6, 4)": masks.dilated_window(6, 4),
    "dilated(4, 4, 3)": masks.dilated(4, 4, 3),
    "longformer(5, marked)": masks.longformer(5, MARKED),
    "bigbird(64, 8)": masks.bigbird(N, 8, window=3, edge=1, random=1, heads=1, seed=1),
    "chunked(16)": masks.chunked(16),
    "prefix_lm(20)": masks.prefix_lm(20),
    "document": masks.document(masks.document_ids(LENGTHS)),
    "per_document(prefix_lm(5))": masks.per_document(masks.prefix_lm(5), LENGTHS),
    "per_chunk(causal, 16)": masks.per_chunk(masks.causal, 16),
    "shared_prefix": masks.shared_prefix([16, 12, 20, 16], [-1, 0, 1, 0]),
    "tree": masks.tree([(i - 1) // 2 for i in range(N)]),
    "after_prefix(causal, 16)": masks.after_prefix(masks.causal & masks.chunked(8), 16),  # type: ignore[operator]
    "block_diffusion(32, 8)": masks.block_diffusion(32, 8),
    "vision_cross": masks.vision_cross(INTERVALS, 16),
    "selected_tiles": masks.selected_tiles(CHOSEN, 8),
    "neighborhood(8, 2)": masks.neighborhood(8, 2),
    "natten((8, 8), 3)": masks.natten((8, 8), 3),
    "natten in tiles": masks.natten((8, 8), 3, order=masks.tile_order((8, 8), (4, 4))),
    "sliding_tile": masks.sliding_tile((8, 8), (6, 4), (2, 2)),
    "spatial_head(20)": masks.spatial_head(width=20, prompt=6),
    "temporal_head(12)": masks.temporal_head(12, width=4, prompt=6),
}


def draw() -> Figure:
    rows = -(-len(MASKS) // COLUMNS)
    figure = Figure(figsize=(1.65 * COLUMNS, 1.85 * rows), layout="constrained")
    for axes, (name, mask) in zip(figure.subplots(rows, COLUMNS).flat, MASKS.items(), strict=True):
        allowed = create_mask(mask, 1, 1, N, N, device="cpu")[0, 0].numpy()
        axes.imshow(allowed, cmap="Blues", vmin=0, vmax=1.25, interpolation="nearest")
        axes.set_title(name, fontsize=7)
        axes.set_xticks([])
        axes.set_yticks([])
    return figure


if __name__ == "__main__":
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else PICTURE
    path.parent.mkdir(parents=True, exist_ok=True)
    draw().savefig(path, dpi=100, metadata={"Software": None})
