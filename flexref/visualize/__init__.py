"""See a mask, scores, probabilities and gradients of scores: of chosen heads and ranges, without S x S memory.

    flexref.visualize.mask(block_mask, path="mask.png")
    flexref.visualize.probabilities(query, key, value, score_mod, block_mask, heads=(0, 3), queries=slice(0, 512))

`mask` takes a BlockMask; the others take the arguments of `flexref.flex_attention`, checked as there. Each returns a
matplotlib Figure with one picture a head and, given a `path`, writes it as PNG or SVG by the path's ending.

Arguments of all:
    batch              which of the batch (of a mask for 1: 0)
    heads              one query head or several (of a mask for 1: 0)
    queries, keys      a slice or range of positions, None for all; a step draws every n-th
    max_cells          cells on a side at most; where there are more positions, several share a cell
    path               .png or .svg; None writes nothing

Raises TypeError, ValueError or IndexError for wrong arguments, ImportError without matplotlib (pip install
'flexref[visualize]'), and what flex_attention raises for its own. docs/visualize.md shows examples.
"""
from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

import torch
from torch import Tensor

from flexref.arguments import prepare
from flexref.blocks.mask import BlockMask
from flexref.uncompiled import uncompiled
from flexref.visualize import drawing
from flexref.visualize.of_mask import mask_pictures
from flexref.visualize.of_scores import score_pictures
from flexref.visualize.picture import GRADIENTS, PROBABILITIES, SCORES
from flexref.visualize.window import Positions, checked_path, checked_window

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["mask", "probabilities", "score_gradients", "scores"]


class ForAnEngine(TypedDict, total=False):
    """Arguments of flex_attention that change no picture, taken so that a call's own arguments can be passed as they are."""

    return_lse: bool
    kernel_options: Mapping[str, Any] | None
    return_aux: Any
    backend: str
    deterministic: bool


@uncompiled
def mask(
    block_mask: BlockMask | Any,
    *,
    batch: int = 0,
    heads: int | Iterable[int] = 0,
    queries: Positions = None,
    keys: Positions = None,
    max_cells: int = 256,
    path: str | Path | None = None,
) -> Figure:
    """Which positions a BlockMask, flexref's or torch's, allows: single positions if they fit into max_cells on a side.

    Else the kind of each block, full, partial or empty; and where blocks do not fit either, the share of positions that is
    allowed in each cell, counted exactly, of as many blocks as need be; whole blocks then, and a step must be 1.
    batch, heads, queries, keys, max_cells and path are said at flexref.visualize.
    """
    if not isinstance(block_mask, BlockMask):
        if not hasattr(block_mask, "kv_num_blocks"):
            hint = "make one with flexref.create_block_mask(mask_mod, B, H, Q_LEN, KV_LEN)"
            raise TypeError(f"block_mask must be a BlockMask, got {type(block_mask).__name__}; {hint}.")
        block_mask = BlockMask.from_torch(block_mask)
    where = checked_path(path)
    window = checked_window(block_mask.shape, batch, heads, queries, keys, max_cells)
    block_mask.check_lists()
    figure = drawing.figure_of(mask_pictures(block_mask, window))
    drawing.save(figure, where)
    return figure


@uncompiled
def scores(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: Callable | None = None,
    block_mask: BlockMask | Any = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    mask_mod: Callable | None = None,
    sink: Tensor | None = None,
    batch: int = 0,
    heads: int | Iterable[int] = 0,
    queries: Positions = None,
    keys: Positions = None,
    max_cells: int = 256,
    path: str | Path | None = None,
    **engine: Unpack[ForAnEngine],
) -> Figure:
    """score_mod(scale * <q, k>) where it is allowed, in float64; of several positions in a cell the greatest.

    The arguments are flex_attention's; batch, heads, queries, keys, max_cells and path are said at flexref.visualize.
    """
    call = query, key, value, score_mod, block_mask, scale, enable_gqa
    return _drawn(SCORES, call, (mask_mod, sink), None, (batch, heads, queries, keys, max_cells), path, engine)


@uncompiled
def probabilities(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: Callable | None = None,
    block_mask: BlockMask | Any = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    mask_mod: Callable | None = None,
    sink: Tensor | None = None,
    batch: int = 0,
    heads: int | Iterable[int] = 0,
    queries: Positions = None,
    keys: Positions = None,
    max_cells: int = 256,
    path: str | Path | None = None,
    **engine: Unpack[ForAnEngine],
) -> Figure:
    """exp(score - lse) in float64, lse of all the row's keys and sinks, drawn or not; of a cell the mean, masked ones counting 0.

    The arguments are flex_attention's; batch, heads, queries, keys, max_cells and path are said at flexref.visualize.
    Colours are logarithmic, down to 1/10,000 of the greatest.
    """
    call = query, key, value, score_mod, block_mask, scale, enable_gqa
    return _drawn(PROBABILITIES, call, (mask_mod, sink), None, (batch, heads, queries, keys, max_cells), path, engine)


@uncompiled
def score_gradients(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: Callable | None = None,
    block_mask: BlockMask | Any = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    mask_mod: Callable | None = None,
    sink: Tensor | None = None,
    grad_out: Tensor | None = None,
    batch: int = 0,
    heads: int | Iterable[int] = 0,
    queries: Positions = None,
    keys: Positions = None,
    max_cells: int = 256,
    path: str | Path | None = None,
    **engine: Unpack[ForAnEngine],
) -> Figure:
    """The gradient by the score that score_mod returned: probability * <grad_out, v - out>, in float64.

    The arguments are flex_attention's; batch, heads, queries, keys, max_cells and path are said at flexref.visualize.
    grad_out: the gradient of the output, (B, Hq, L, Ev) of any float dtype on query's device, ones by default. Of several
    positions in a cell the gradient of the greatest magnitude is drawn, with its sign. Colours are logarithmic both ways
    from 1/100 of the greatest, and linear between.
    """
    call = query, key, value, score_mod, block_mask, scale, enable_gqa
    return _drawn(GRADIENTS, call, (mask_mod, sink), grad_out, (batch, heads, queries, keys, max_cells), path, engine)


def _drawn(
    kind: str,
    call: tuple,
    named: tuple[Callable | None, Tensor | None],
    grad_out: Tensor | None,
    shown: tuple,
    path: str | Path | None,
    engine: ForAnEngine,
) -> Figure:
    unknown = set(engine) - set(ForAnEngine.__annotations__)
    if unknown:
        raise TypeError(f"flexref.visualize.{kind} has no argument {', '.join(map(repr, sorted(unknown)))}.")
    if any(isinstance(x, Tensor) and x.is_nested for x in call[:3]):
        raise TypeError("query, key or value is nested; pictures are of dense tensors: draw one sequence, x.unbind()[i][None].")
    where = checked_path(path)
    with torch.no_grad():
        problem, tensors = prepare(*call, mask_mod=named[0], sink=named[1])
    window = checked_window((problem.batch, problem.q_heads, problem.q_len, problem.kv_len), *shown)
    if kind == GRADIENTS:
        grad_out = _gradient(grad_out, (problem.batch, problem.q_heads, problem.q_len, problem.value_dim), tensors.query)
    figure = drawing.figure_of(score_pictures(kind, problem, tensors, grad_out, window))
    drawing.save(figure, where)
    return figure


def _gradient(grad_out: object, shape: tuple[int, ...], query: Tensor) -> Tensor:
    """Ones take no memory."""
    if grad_out is None:
        return torch.ones((), dtype=torch.float64, device=query.device).expand(shape)
    if not isinstance(grad_out, Tensor) or not grad_out.is_floating_point():
        got = grad_out.dtype if isinstance(grad_out, Tensor) else type(grad_out).__name__
        raise TypeError(f"grad_out must be a tensor of floats, got {got}.")
    if grad_out.shape != shape or grad_out.device != query.device:
        there = f"{tuple(grad_out.shape)} on {grad_out.device}"
        raise ValueError(f"grad_out must have the output's shape {shape} on {query.device}, got {there}.")
    return grad_out.detach()
