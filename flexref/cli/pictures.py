"""Draws each variant: which blocks of the whole sequence its mask lists, and its scores at the beginning."""
from __future__ import annotations

from pathlib import Path

import torch

import flexref
from flexref.arguments import prepare
from flexref.cli.cases import Case
from flexref.visualize import drawing
from flexref.visualize.of_mask import mask_pictures
from flexref.visualize.of_scores import score_pictures
from flexref.visualize.picture import SCORES, Picture
from flexref.visualize.window import checked_window

CELLS, CROP, ACROSS = 192, 640, 3


def draw(cases: list[Case], folder: Path) -> str:
    """Writes one PNG into `folder`; returns a line that says where, or what is missing."""
    down = -(-len(cases) // ACROSS)
    try:
        figure, axes = drawing.empty_figure(down, 2 * ACROSS, (5.2 * ACROSS, 2.9 * down))
    except ImportError as error:
        return f"no pictures: {error}"
    shown = []
    for left, right, case in zip(axes[::2], axes[1::2], cases, strict=False):
        mask, scores = pictures_of(case)
        drawing.on_axes(left, mask, drawing.norm_of([mask]), ticks=4)
        image = drawing.on_axes(right, scores, drawing.norm_of([scores]), ticks=5)
        figure.colorbar(image, ax=right, shrink=0.8).ax.tick_params(labelsize=6)
        for ax in (left, right):
            ax.set(xlabel="", ylabel="", title="")
            ax.tick_params(labelsize=6)
        left.set_title(case.name, fontsize=10, loc="left")
        right.set_title(f"scores, first {scores.q.stop:,}", fontsize=8, loc="left")
        shown += [mask, scores]
    for ax in axes[2 * len(cases) :]:
        ax.axis("off")
    drawing.add_legend(figure, shown, columns=8)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "variants.png"
    drawing.save(figure, path)
    return f"pictures: {path} (left: the mask of the whole sequence, right: scores of head 0, down by q_idx, across by kv_idx)"


def pictures_of(case: Case) -> tuple[Picture, Picture]:
    """The mask of all positions, of a score_mod that masks too, and the scores of head 0 of the first CROP, both of batch 0."""
    query, key, value, _ = case.inputs
    batch, heads, length, _ = query.shape
    allowed = case.mask_mod or case.allowed or flexref.noop_mask
    blocks = flexref.create_block_mask(allowed, batch, None, length, length, device="cpu")
    whole = checked_window(blocks.shape, 0, 0, None, None, CELLS)
    crop = checked_window((batch, heads, length, length), 0, 0, slice(CROP), slice(CROP), CELLS)
    with torch.no_grad():
        call = prepare(query, key, value, case.score_mod, mask_mod=case.mask_mod)
    return mask_pictures(blocks, whole)[0], score_pictures(SCORES, *call, None, crop)[0]
