"""Pictures on the axes of a matplotlib Figure. The one file that knows matplotlib, which is imported when it is used."""
from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from flexref.visualize.picture import BLOCKS, ELEMENTS, GRADIENTS, PROBABILITIES, SCORES, SHARE, Picture
from flexref.visualize.window import Side

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# told apart by every kind of colour vision, and by their darkness alone
DARK, MIDDLE, PALE, EMPTY, MASKED, WRONG = "#0072B2", "#E69F00", "#FBE3B0", "#F4F4F4", "#CFCFCF", "#00E5FF"
CLASSES = {
    BLOCKS: {0: ("empty block", EMPTY), 1: ("partial block", MIDDLE), 2: ("full block", DARK)},
    ELEMENTS: {
        0: ("masked, in an empty block", EMPTY),
        1: ("masked, in a partial block", PALE),
        2: ("allowed, in a full block", DARK),
        3: ("allowed, in a partial block", MIDDLE),
    },
}
SAYS = {
    SHARE: "allowed share of a cell",
    SCORES: "score after score_mod",
    PROBABILITIES: "probability",
    GRADIENTS: "gradient of the score after score_mod",
}
OF_A_CELL = {SCORES: "the greatest", PROBABILITIES: "the mean", GRADIENTS: "the one of the greatest magnitude"}
COLOURS = {SHARE: "Blues", SCORES: "viridis", PROBABILITIES: "magma_r", GRADIENTS: "PuOr_r"}
# pictures in a row, inches of one, block borders of a side; what share of the greatest still has a colour of its own
_ACROSS, _INCHES, _BORDERS, _LEAST = 4, 5.4, 32, 1e-4


def figure_of(pictures: Sequence[Picture]) -> Figure:
    """All of one kind, on one scale of colours."""
    across = min(_ACROSS, len(pictures))
    down = -(-len(pictures) // across)
    figure, axes = empty_figure(down, across, (_INCHES * across + 0.8, _INCHES * down + 0.4))
    norm = norm_of(pictures)
    image = [on_axes(ax, picture, norm) for ax, picture in zip(axes, pictures, strict=False)][-1]
    for ax in axes[len(pictures) :]:
        ax.axis("off")
    if norm is not None:
        kind = pictures[0].kind
        extend = "min" if kind == PROBABILITIES else "neither"
        bar = figure.colorbar(image, ax=axes, shrink=0.8, label=what(pictures[0]), extend=extend)
        if kind == GRADIENTS:
            bar.set_ticks(_both_ways(norm.vmax), minor=False)
            bar.minorticks_off()
    add_legend(figure, pictures, columns=3 if pictures[0].kind == BLOCKS else 2 * across)
    return figure


def empty_figure(down: int, across: int, inches: tuple[float, float]) -> tuple[Figure, list[Axes]]:
    """A Figure that no window holds, and its axes, row by row. Raises ImportError that says what to install."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        told = "flexref.visualize draws with matplotlib, which is missing here; pip install 'flexref[visualize]'"
        raise ImportError(told, name="matplotlib") from error
    figure = Figure(figsize=inches, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(down, across, squeeze=False).flat)


def save(figure: Figure, path: Path | None) -> None:
    """PNG or SVG by the path's ending, the same bytes for the same picture."""
    if path is None:
        return
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": "flexref"}):
        figure.savefig(path, dpi=140, metadata={"Date": None} if path.suffix.lower() == ".svg" else {"Software": None})


def on_axes(ax: Axes, picture: Picture, norm: Any, ticks: int = 8) -> Any:
    """Draw one picture with about so many ticks a side; returns the image, for a scale of colours beside it."""
    from matplotlib.colors import ListedColormap

    q, kv = picture.q, picture.kv
    extent = (*_ends(kv), *reversed(_ends(q)))
    common: dict[str, Any] = {"extent": extent, "interpolation": "none", "aspect": "auto"}
    if picture.kind in CLASSES:
        classes = CLASSES[picture.kind]
        colours: Any = ListedColormap([colour for _, colour in classes.values()])
        image = ax.imshow(picture.values.numpy(), cmap=colours, vmin=-0.5, vmax=len(classes) - 0.5, **common)
    else:
        shown = picture.values.masked_fill(picture.masked | ~picture.values.isfinite(), math.nan)
        image = ax.imshow(shown.numpy(), cmap=_colours(picture.kind), norm=norm, **common)
        if bad(picture).any():
            seen = bad(picture).double().masked_fill(~bad(picture), math.nan)
            ax.imshow(seen.numpy(), cmap=ListedColormap([WRONG]), vmin=0, vmax=1, **common)
    _borders(ax, picture)
    ax.set(xlabel="kv_idx", ylabel="q_idx")
    if max(q.stop - q.start, kv.stop - kv.start) <= 3 * min(q.stop - q.start, kv.stop - kv.start):
        ax.set_aspect("equal")
    ax.set_title(picture.title, fontsize=10)
    # the frame may hide no cell of the edge
    ax.spines[:].set_position(("outward", 1))
    ax.spines[:].set_linewidth(0.6)
    for axis, side in ((ax.xaxis, kv), (ax.yaxis, q)):
        axis.set_ticks(_ticks(side, ticks))
        axis.set_major_formatter(lambda x, _: f"{round(x):,}")
        axis.set_tick_params(labelsize=8)
    # last, as ticks would widen them
    ax.set(xlim=(kv.start - 0.5, kv.stop - 0.5), ylim=(q.stop - 0.5, q.start - 0.5))
    return image


def norm_of(pictures: Sequence[Picture]) -> Any:
    """The scale of colours of all pictures together; None for those of classes."""
    from matplotlib.colors import LogNorm, Normalize, SymLogNorm

    kind = pictures[0].kind
    if kind in CLASSES:
        return None
    if kind == SHARE:
        return Normalize(0, 1)
    values = torch.cat([x.values[~x.masked & x.values.isfinite()].flatten() for x in pictures])
    least, most = (float(values.min()), float(values.max())) if len(values) else (0.0, 1.0)
    if kind == PROBABILITIES:
        most = most or 1.0
        positive = values[values > 0]
        least = max(float(positive.min()) if len(positive) else 0.0, most * _LEAST)
        return LogNorm(least if least < most else most / 10, most, clip=True)
    if kind == GRADIENTS:
        most = max(abs(least), abs(most)) or 1.0
        return SymLogNorm(most * _LEAST**0.5, linscale=1, vmin=-most, vmax=most)
    return Normalize(least, most if most > least else least + 1)


def what(picture: Picture) -> str:
    """What its colours say, in words."""
    q, kv = picture.q, picture.kv
    if picture.kind == SHARE:
        sizes = (min(side.cell, side.stop - side.start) for side in (q, kv))
        return f"{SAYS[SHARE]}, {' x '.join(f'{size:,}' for size in sizes)} positions"
    drawn = q.cell // q.step, kv.cell // kv.step
    of = f",\n{OF_A_CELL[picture.kind]} of {drawn[0]:,} x {drawn[1]:,} positions" if max(drawn) > 1 else ""
    steps = f",\nin steps of {q.step:,} x {kv.step:,}" if max(q.step, kv.step) > 1 else ""
    return f"{SAYS[picture.kind]}{of}{steps}"


def add_legend(figure: Figure, pictures: Sequence[Picture], columns: int) -> None:
    """What colours stand for that are on no scale, below all pictures."""
    from matplotlib.patches import Patch

    named: dict[str, str] = {}
    for picture in pictures:
        if picture.kind in CLASSES:
            named |= dict(CLASSES[picture.kind].values())
        elif picture.masked.any():
            named["nothing allowed"] = _masked(picture.kind)
        if picture.kind not in CLASSES and bad(picture).any():
            named["NaN or infinite"] = WRONG
    patches = [Patch(facecolor=x, edgecolor="#888888", linewidth=0.5, label=label) for label, x in named.items()]
    if patches:
        figure.legend(handles=patches, loc="outside lower center", ncols=columns, frameon=False, fontsize=8)


def bad(picture: Picture) -> torch.Tensor:
    """Cells with an allowed position whose value is not finite."""
    return ~picture.masked & ~picture.values.isfinite()


def _colours(kind: str) -> Any:
    import matplotlib
    from matplotlib.colors import ListedColormap

    colours: Any = matplotlib.colormaps[COLOURS[kind]]
    if kind in (SHARE, PROBABILITIES):
        # the least of what is there has to be told from what is not
        colours = ListedColormap(colours([0.25 + 0.75 * i / 255 if kind == SHARE else 0.06 + 0.94 * i / 255 for i in range(256)]))
    return colours.with_extremes(bad=_masked(kind))


def _masked(kind: str) -> str:
    # a gradient of 0 is nearly white
    return EMPTY if kind == SHARE else MASKED


def _ends(side: Side) -> tuple[float, float]:
    """Position p lies from p - 1/2 to p + 1/2."""
    return side.first - 0.5, side.first + side.cells * side.cell - 0.5


def _ticks(side: Side, count: int) -> list[float]:
    """Multiples of a power of two, fewer where they have many digits; of a long side also its end, half a position off."""
    few = count if side.stop < 100_000 else count / 2
    step = 1 << max(0, math.ceil(math.log2((side.stop - side.start) / few)))
    places: list[float] = list(range(-(-side.start // step) * step, side.stop, step))
    return places + [side.stop - 0.5] if step >= 128 and side.stop % step == 0 else places


def _both_ways(most: float) -> list[float]:
    """0, and the powers of ten on each side that stand apart from it."""
    top = math.floor(math.log10(most))
    tens = [10.0**k for k in (top, top - 1) if 10.0**k > most * _LEAST**0.5]
    return [*(-x for x in tens), 0.0, *reversed(tens)]


def _borders(ax: Axes, picture: Picture) -> None:
    """Between blocks, along each side that has few."""
    if picture.block is None:
        return
    for size, side, line in zip(picture.block, (picture.q, picture.kv), (ax.axhline, ax.axvline), strict=True):
        places = range(-(-side.start // size) * size, side.stop, size)
        for place in places if len(places) <= _BORDERS else ():
            line(place - 0.5, color="#777777", linewidth=0.4)
