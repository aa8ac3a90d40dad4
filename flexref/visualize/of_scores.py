"""Scores, probabilities and gradients of scores as pictures, calculated in float64 a tile of positions at a time.

A row's lse is over all its keys, whichever are drawn. Mods are asked where the call asks them, and nowhere else.
"""
from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from flexref.blocks.lists import FULL, PARTIAL
from flexref.problem import Problem, Tensors
from flexref.reference import at_each_position
from flexref.visualize.of_mask import block_rows
from flexref.visualize.picture import GRADIENTS, PROBABILITIES, SCORES, Picture
from flexref.visualize.window import Side, Window, side_of

# queries and keys of a tile
_ROWS, _KEYS = 256, 1024


class Tile(NamedTuple):
    """The allowed positions of some queries and keys: places row, column (N,) in the tile, their scores and d out . v (N,)."""

    row: Tensor
    column: Tensor
    score: Tensor
    dp: Tensor | None


class Rows(NamedTuple):
    """Of some queries: q_idx (R,), query (R, E), grad_out (R, Ev) or None, the kinds of their blocks or None."""

    q_idx: Tensor
    query: Tensor
    grad_out: Tensor | None
    kinds: tuple[Tensor, Tensor] | None


class Cells:
    """What is gathered of the values in each cell, flat, on the CPU."""

    def __init__(self, count: int):
        self.most = torch.full((count,), -math.inf, dtype=torch.float64, device="cpu")
        self.least = torch.full_like(self.most, math.inf)
        self.total = torch.zeros_like(self.most)
        self.count = torch.zeros(count, dtype=torch.int64, device="cpu")

    def add(self, cell: Tensor, value: Tensor) -> None:
        """Values (N,) of positions in cells (N,)."""
        cell, value = cell.cpu(), value.cpu()
        self.most.scatter_reduce_(0, cell, value, "amax")
        self.least.scatter_reduce_(0, cell, value, "amin")
        self.total.index_add_(0, cell, value)
        self.count.index_add_(0, cell, torch.ones_like(cell))


def score_pictures(kind: str, problem: Problem, tensors: Tensors, grad_out: Tensor | None, window: Window) -> list[Picture]:
    """One of each head, of what `kind` says."""
    with torch.no_grad():
        return [_Head(problem, tensors, grad_out, window, head).picture(kind) for head in window.heads]


class _Head:
    """One batch and query head of a call."""

    def __init__(self, problem: Problem, tensors: Tensors, grad_out: Tensor | None, window: Window, head: int):
        self.b, self.h, self.window, self.tensors = window.batch, head, window, tensors
        self.several, self.kv_len, self.device = problem.batch > 1, problem.kv_len, tensors.query.device
        kv = self.b if problem.kv_batch > 1 else 0, head // problem.group
        self.query, self.key, self.value = tensors.query[self.b, head], tensors.key[kv], tensors.value[kv]
        self.sink = None if tensors.sink is None else tensors.sink[head].double().logsumexp(0)
        self.grad_out = None if grad_out is None else grad_out[self.b, head]
        score_mod, mask_mod = tensors.score_mod, tensors.mask_mod
        self.score_mod = None if score_mod is None else at_each_position(score_mod, torch.float64)
        # which positions are allowed is decided as the call decides it
        self.mask_mod = None if mask_mod is None else at_each_position(mask_mod, problem.acc_dtype)

    def picture(self, kind: str) -> Picture:
        """Gather each tile's values into cells, and say one thing of each cell."""
        q, kv = (side_of(x, self.window.max_cells) for x in (self.window.queries, self.window.keys))
        cells = Cells(q.cells * kv.cells)
        for rows in self._rows():
            lse, D = (None, None) if kind == SCORES else self._softmax(rows)
            for kv_idx in _some(self.window.keys, _KEYS, self.device):
                tile = self._tile(rows, kv_idx)
                if tile is None:
                    continue
                value = tile.score
                if lse is not None:
                    value = torch.exp(tile.score - lse[tile.row])
                if D is not None and tile.dp is not None:
                    value = value * (tile.dp - D[tile.row])
                down, across = (rows.q_idx - q.first) // q.cell, (kv_idx - kv.first) // kv.cell
                cells.add(down[tile.row] * kv.cells + across[tile.column], value)
        values = _said(kind, cells, self._sizes(q, kv)).reshape(q.cells, kv.cells)
        title = f"batch {self.b}, head {self.h}" if self.several else f"head {self.h}"
        return Picture(kind, values, cells.count.reshape(values.shape) == 0, q, kv, title)

    def _sizes(self, q: Side, kv: Side) -> Tensor:
        """How many of the drawn positions there are in each cell, allowed or not: (q.cells * kv.cells,)."""
        sizes = []
        for side, positions in ((q, self.window.queries), (kv, self.window.keys)):
            each = side.cell // side.step
            sizes.append((len(positions) - each * torch.arange(side.cells, device="cpu")).clamp(max=each))
        return (sizes[0][:, None] * sizes[1]).reshape(-1)

    def _rows(self) -> Iterator[Rows]:
        mask = self.tensors.block_mask
        for q_idx in _some(self.window.queries, _ROWS, self.device):
            grad = None if self.grad_out is None else self.grad_out[q_idx].double()
            kinds = None if mask is None else block_rows(mask, self.b, self.h, q_idx)
            yield Rows(q_idx, self.query[q_idx].double(), grad, kinds)

    def _softmax(self, rows: Rows) -> tuple[Tensor, Tensor | None]:
        """lse (R,) over all keys and sinks, and D = sum of probability * d out . v over keys (R,), which is d out . out."""
        row_max = torch.full_like(rows.q_idx, -math.inf, dtype=torch.float64)
        row_sum, dot = torch.zeros_like(row_max), torch.zeros_like(row_max)
        for kv_idx in _some(range(self.kv_len), _KEYS, self.device):
            tile = self._tile(rows, kv_idx)
            if tile is None:
                continue
            before, row_max = row_max, row_max.scatter_reduce(0, tile.row, tile.score, "amax")
            base = torch.where(row_max == -math.inf, 0.0, row_max)
            weight, rescale = torch.exp(tile.score - base[tile.row]), torch.exp(before - base)
            row_sum = (row_sum * rescale).index_add(0, tile.row, weight)
            if tile.dp is not None:
                dot = (dot * rescale).index_add(0, tile.row, weight * tile.dp)
        of_keys = lse = row_max + torch.log(row_sum)
        if self.sink is not None:
            lse = torch.logaddexp(lse, torch.where(self.sink == math.inf, math.nan, self.sink))
        return lse, None if rows.grad_out is None else dot / row_sum * torch.exp(of_keys - lse)

    def _tile(self, rows: Rows, kv_idx: Tensor) -> Tile | None:
        """None where nothing is allowed. A score of -inf is a masked position."""
        allowed = self._allowed(rows, kv_idx)
        if allowed is None:
            return None
        row, column = allowed.nonzero(as_tuple=True)
        score = self.tensors.scale * (rows.query @ self.key[kv_idx].double().T)[row, column]
        if self.score_mod is not None and len(row):
            score = self.score_mod(score.clone(), *self._at(rows, kv_idx, row, column)).double()
        there = score != -math.inf
        row, column, score = row[there], column[there], score[there]
        dp = None if rows.grad_out is None else (rows.grad_out @ self.value[kv_idx].double().T)[row, column]
        return Tile(row, column, score, dp) if len(row) else None

    def _allowed(self, rows: Rows, kv_idx: Tensor) -> Tensor | None:
        """bool (R, C): listed, and (listed full, or mask_mod says so); None where no block is listed."""
        mask = self.tensors.block_mask
        if mask is None or rows.kinds is None:
            return torch.ones(len(rows.q_idx), len(kv_idx), dtype=torch.bool, device=self.device)
        kinds, place = rows.kinds
        kinds = kinds[:, kv_idx // mask.BLOCK_SIZE[1]]
        if not kinds.any():
            return None
        kinds = kinds[place]
        if self.mask_mod is None:
            return kinds > 0
        allowed = kinds == FULL
        row, column = (kinds == PARTIAL).nonzero(as_tuple=True)
        if len(row):
            allowed[row, column] = self.mask_mod(*self._at(rows, kv_idx, row, column))
        return allowed

    def _at(self, rows: Rows, kv_idx: Tensor, row: Tensor, column: Tensor) -> tuple[Tensor, ...]:
        return torch.full_like(row, self.b), torch.full_like(row, self.h), rows.q_idx[row], kv_idx[column]


def _some(positions: range, count: int, device: torch.device) -> Iterator[Tensor]:
    """The positions, at most `count` at a time."""
    for start in range(0, len(positions), count):
        part = positions[start : start + count]
        yield torch.arange(part.start, part.stop, part.step, device=device)


def _said(kind: str, cells: Cells, sizes: Tensor) -> Tensor:
    """A cell's greatest score, mean probability, where masked positions count 0, or gradient of the greatest magnitude."""
    if kind == SCORES:
        return cells.most
    if kind == PROBABILITIES:
        return cells.total / sizes
    assert kind == GRADIENTS
    return torch.where(cells.most.abs() >= cells.least.abs(), cells.most, cells.least)
