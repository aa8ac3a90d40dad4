"""A Case is one attention problem as plain text and numbers, so that a failing one can be printed and pasted.

A mod is the text of an expression over score, b, h, q_idx, kv_idx and the names in mods.CAPTURES, whose shapes follow
from the problem. `build` makes the tensors from the seed alone, and a `Call` of them that compare.py understands.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flexref.blocks.mask import BlockMask, create_block_mask
from flexref.conformance.call import INPUTS, Call
from flexref.conformance.layouts import LAYOUTS, VALUES
from flexref.conformance.mods import CAPTURES, FLOATS, make_mod, names_in
from flexref.conformance.sunk import with_sinks
from flexref.reference import ACC_DTYPE

# of blocks smaller than any tile, each of which is a tile to an engine
_FEW_BLOCKS = 4


class Blocks(NamedTuple):
    """A block mask: built from the mask_mod, or lists drawn by hand that need not agree with it."""

    size: tuple[int, int] = (16, 16)
    batch: bool = False
    heads: bool = False
    by_hand: bool = False


@dataclass(frozen=True, repr=False)
class Case:
    """`layouts`, of query, key and value, are names in layouts.LAYOUTS; `values` is a name in VALUES.

    `wants`: of "query", "key", "value", "captured", what gets a gradient; `loss`: "out", "lse" or "both".
    `sinks`: so many a head, which get a gradient as what is captured does.
    """

    q_len: int = 16
    kv_len: int = 16
    head_dim: int = 8
    value_dim: int = 8
    batch: int = 1
    kv_batch: int | None = None
    kv_heads: int = 1
    group: int = 1
    dtype: str = "float32"
    score: str | None = None
    mask: str | None = None
    blocks: Blocks | None = None
    scale: float | None = None
    sinks: int = 0
    captured_dtype: str = "float32"
    layouts: tuple[str, ...] = ("plain", "plain", "plain")
    values: str = "normal"
    wants: tuple[str, ...] = ()
    loss: str = "both"
    max_scores: bool = False
    deterministic: bool = False
    seed: int = 0

    def __repr__(self) -> str:
        given = ((f.name, getattr(self, f.name), f.default) for f in fields(self))
        return f"Case({', '.join(f'{name}={value!r}' for name, value, default in given if value != default)})"

    def _repr_pretty_(self, printer, cycle: bool) -> None:
        # hypothesis would print every field
        printer.text(repr(self))

    @property
    def heads(self) -> int:
        return self.kv_heads * self.group

    def within(self, reach: int | None) -> Case:
        """The same for an emulated engine: lengths of at most about `reach`, and of few small blocks.

        A ragged tail stays as ragged.
        """
        if reach is None:
            return self
        blocks = self.blocks.size if self.blocks else (reach, reach)
        most = [min(reach, _FEW_BLOCKS * size) if size < 16 else reach for size in blocks]
        lengths = zip((self.q_len, self.kv_len), most, strict=True)
        q_len, kv_len = (n if n <= m else max(1, m - m % 16 + n % 16 - 16) if m >= 32 else m for n, m in lengths)
        return self.but(q_len=q_len, kv_len=kv_len)

    def but(self, **changes: Any) -> Case:
        """The same with some fields changed."""
        return replace(self, **changes)


@dataclass
class Built:
    """A case's tensors on one device, and what a backend is given. `call` is the same problem for the comparison."""

    call: Call
    arguments: dict
    captured: dict[str, Tensor]

    @property
    def leaves(self) -> dict[str, Tensor]:
        return {name: self.arguments[name] for name in INPUTS} | self.captured


def captured_tensor(case: Case, name: str) -> Tensor:
    """The captured tensor of this name, never empty, from the case's seed."""
    kind, shape_of = CAPTURES[name]
    shape = tuple(max(1, n) for n in shape_of(case.batch, case.heads, case.q_len, case.kv_len))
    random = _generator(case, name)
    S = max(1, case.kv_len)
    if kind == "float":
        data = torch.randn(shape, generator=random, dtype=torch.float64)
        if case.values == "holes" and name == "col":
            data[:, torch.rand(shape[1], generator=random) < 1 / shape[1]] = math.nan
        return data.to(getattr(torch, case.captured_dtype))
    if kind == "bool":
        return torch.rand(shape, generator=random) < 0.6
    if kind == "doc":
        return torch.randint(0, 3, shape, generator=random).sort().values
    low, high = {"window": (1, S + 1), "length": (0, S + 1), "index": (0, S), "negative": (-S, S)}[kind]
    return torch.randint(low, high, shape, generator=random)


def build(case: Case, device: str = "cpu") -> Built:
    """The case's tensors on `device`; the Call, for the comparison, holds the same numbers on the CPU."""
    call = _call(case)
    at = {name: tensor.requires_grad_(name in call.wanted) for name, tensor in _inputs(case, device).items()}
    held = {
        name: t.to(device, copy=True).requires_grad_(name in call.wanted) for name, t in call.captured.items()
    }
    mask_mod = _made(case.mask, "mask", held)
    masked = (
        dict(mask_mod=mask_mod)
        if case.blocks is None
        else dict(block_mask=_block_mask(case, mask_mod, device))
    )
    arguments = dict(
        at,
        **masked,
        score_mod=_made(case.score, "score", held),
        sink=held.get("sink"),
        scale=case.scale,
        enable_gqa=case.group > 1,
        need_max_scores=case.max_scores,
        deterministic=case.deterministic,
    )
    return Built(call, arguments, held)


def _call(case: Case) -> Call:
    """The same problem for the reference."""
    read = names_in(case.score)
    captured = {name: captured_tensor(case, name) for name in CAPTURES if name in read + names_in(case.mask)}
    wanted = tuple(name for name in INPUTS if name in case.wants)
    if "captured" in case.wants:
        wanted += tuple(name for name in read if name in FLOATS)
    shape = case.batch, case.heads, case.q_len
    grad_out = _noise(case, "grad_out", (*shape, case.value_dim)).to(getattr(torch, case.dtype))
    grad_lse = _noise(case, "grad_lse", shape).to(ACC_DTYPE[grad_out.dtype])
    by_hand = case.blocks is not None and case.blocks.by_hand
    inputs = _inputs(case, "cpu")
    call = Call(
        query=inputs["query"],
        key=inputs["key"],
        value=inputs["value"],
        scale=case.scale,
        make_score=_make(case.score, "score"),
        mask_mod=_made(case.mask, "mask", captured),
        captured=captured,
        blocks=_positions(case) if by_hand else None,
        wanted=wanted,
        grad_out=None if case.loss == "lse" else grad_out,
        grad_lse=None if case.loss == "out" else grad_lse,
    )
    if not case.sinks:
        return call
    sink = _noise(case, "sink", (case.heads, case.sinks)).to(grad_out.dtype)
    return with_sinks(replace(call, wanted=wanted + ("sink",) * ("captured" in case.wants)), sink)


def _made(text: str | None, kind: str, captured: dict[str, Tensor]):
    make = _make(text, kind)
    return make and make(captured)


def _make(text: str | None, kind: str):
    return make_mod(text, kind, names_in(text)) if text else None


def _inputs(case: Case, device: str) -> dict[str, Tensor]:
    B, Bk, H, Hkv = case.batch, case.kv_batch or case.batch, case.heads, case.kv_heads
    query = (B, H, case.q_len, case.head_dim)
    key, value = (Bk, Hkv, case.kv_len, case.head_dim), (Bk, Hkv, case.kv_len, case.value_dim)
    given = zip(INPUTS, (query, key, value), case.layouts, strict=True)
    return {name: _input(case, name, shape, layout, device) for name, shape, layout in given}


def _generator(case: Case, name: str) -> torch.Generator:
    return torch.Generator().manual_seed(case.seed * 1_000_003 + zlib.crc32(name.encode()))


def _noise(case: Case, name: str, shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=_generator(case, name), dtype=torch.float64)


def _input(case: Case, name: str, shape: tuple[int, ...], layout: str, device: str) -> Tensor:
    """Query, key or value; with values="holes" a few rows of key and value are NaN (and of the captured `col`)."""
    data = VALUES[case.values](_noise(case, name, shape)).to(getattr(torch, case.dtype))
    if case.values == "holes" and name != "query" and shape[2]:
        hole = torch.rand(shape[2], generator=_generator(case, "holes of " + name)) < 2 / shape[2]
        data = torch.where(hole[:, None], math.nan, data)
    return LAYOUTS[layout](data.to(device)).detach()


def _block_grids(case: Case) -> tuple[Tensor, Tensor]:
    """Which blocks are listed, and which of them full: bool (B or 1, H or 1, rows, columns), some rows empty."""
    assert case.blocks is not None
    (q_block, kv_block), batch, heads, _ = case.blocks
    rows, columns = -(-case.q_len // q_block), -(-case.kv_len // kv_block)
    shape = case.batch if batch else 1, case.heads if heads else 1, rows, columns
    draw = torch.rand(shape, generator=_generator(case, "blocks"))
    draw = torch.where(torch.rand(shape[:3], generator=_generator(case, "rows"))[..., None] < 0.15, 1.0, draw)
    return draw < 0.6, draw < 0.25


def _positions(case: Case) -> tuple[Tensor, Tensor]:
    """The same as positions (B or 1, H or 1, L, S), without the help of BlockMask."""
    assert case.blocks is not None
    q_block, kv_block = case.blocks.size
    wide = (grid.repeat_interleave(q_block, 2).repeat_interleave(kv_block, 3) for grid in _block_grids(case))
    listed, full = (grid[:, :, : case.q_len, : case.kv_len] for grid in wide)
    return listed, full


def _block_mask(case: Case, mask_mod, device: str) -> BlockMask:
    assert case.blocks is not None
    if not case.blocks.by_hand:
        batch, heads = case.batch if case.blocks.batch else None, case.heads if case.blocks.heads else None
        return create_block_mask(
            mask_mod, batch, heads, case.q_len, case.kv_len, device=device, BLOCK_SIZE=case.blocks.size
        )
    listed, full = _block_grids(case)
    return BlockMask.from_kv_blocks(
        *_lists(listed & ~full, device),
        *_lists(full, device),
        BLOCK_SIZE=case.blocks.size,
        mask_mod=mask_mod,
        seq_lengths=(case.q_len, case.kv_len),
    )


def _lists(grid: Tensor, device: str) -> tuple[Tensor, Tensor]:
    """PyTorch's form of a grid: how many blocks each row lists, and which (the rest of each row is no block)."""
    order = grid.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return grid.sum(-1, dtype=torch.int32).to(device), order.to(torch.int32).to(device)
