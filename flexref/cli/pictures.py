"""Draws each variant: which positions of the whole sequence it allows, and its scores at the beginning."""
from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from flexref.cli.cases import Case

CELLS, CROP = 192, 640


def draw(cases: list[Case], folder: Path) -> str:
    """Writes one PNG into `folder`; returns a line that says where, or what is missing."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return "no pictures: they need matplotlib; pip install 'flexref[demo]'"
    columns = 3
    rows = -(-len(cases) // columns)
    figure = Figure(figsize=(5.2 * columns, 2.9 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, 2 * columns).reshape(rows * columns, 2)
    for (left, right), case in zip(axes, cases, strict=False):
        length = case.inputs.query.shape[2]
        left.imshow(allowed_share(case).numpy(), cmap="Blues", vmin=0, vmax=1, extent=(0, length, length, 0))
        left.set_title(case.name, fontsize=10, loc="left")
        crop = min(CROP, length)
        image = right.imshow(scores(case, crop).numpy(), cmap="viridis", extent=(0, crop, crop, 0))
        right.set_title(f"scores, first {crop}", fontsize=8, loc="left")
        figure.colorbar(image, ax=right, shrink=0.8).ax.tick_params(labelsize=6)
        for axis in (left, right):
            axis.tick_params(labelsize=6)
    for left, right in axes[len(cases) :]:
        left.axis("off")
        right.axis("off")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "variants.png"
    figure.savefig(path, dpi=110)
    return f"pictures: {path} (left: allowed positions of the whole sequence, right: scores of head 0, masked ones white)"


def allowed_share(case: Case) -> Tensor:
    """(CELLS, CELLS) float: the share of positions of each cell that is allowed, by 4 x 4 samples of it."""
    if case.allowed is None:
        return torch.ones(CELLS, CELLS)
    at = torch.linspace(0, case.inputs.query.shape[2] - 1, 4 * CELLS).long()
    zero = torch.zeros((), dtype=torch.int64)
    dense = case.allowed(zero, zero, at[:, None], at[None, :]).float()
    return dense.view(CELLS, 4, CELLS, 4).mean((1, 3))


def scores(case: Case, crop: int) -> Tensor:
    """(crop, crop) float: the scores of batch 0, head 0 after the variant's formula; NaN where masked."""
    query, key, _, _ = case.inputs
    s = query[0, 0, :crop] @ key[0, 0, :crop].T / query.shape[3] ** 0.5
    i, j = torch.arange(crop)[:, None], torch.arange(crop)[None, :]
    zero = torch.zeros((), dtype=torch.int64)
    if case.score is not None:
        s = case.score(s, zero, zero, i, j)
    if case.allowed is not None:
        s = s.masked_fill(~case.allowed(zero, zero, i, j), torch.nan)
    return s
