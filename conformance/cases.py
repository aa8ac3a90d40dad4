"""A Case is one attention problem as plain text and numbers, so that a failing one can be printed and pasted.

A mod is the text of an expression over score, b, h, q_idx, kv_idx and the names in CAPTURES, whose shapes follow
from the problem. `build` makes the tensors from the seed alone, and a `Call` of them that compare.py understands.
"""
from __future__ import annotations

import itertools
import linecache
import math
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from flexref.block_mask import BlockMask, create_block_mask
from flexref.conformance.compare import Call

# what a mod may capture: the shape from B, H, L, S; "float" ones are score_mod's and may want a gradient
CAPTURES: dict[str, tuple[str, Callable[..., tuple[int, ...]]]] = {
    "gain": ("float", lambda B, H, L, S: ()),
    "slope": ("float", lambda B, H, L, S: (H,)),
    "row": ("float", lambda B, H, L, S: (L,)),
    "col": ("float", lambda B, H, L, S: (B, S)),
    "bias": ("float", lambda B, H, L, S: (H, L, S)),
    "grid": ("float", lambda B, H, L, S: (B, H, L, S)),
    "rel": ("float", lambda B, H, L, S: (L + S,)),
    "window": ("window", lambda B, H, L, S: ()),
    "doc": ("doc", lambda B, H, L, S: (max(L, S),)),
    "length": ("length", lambda B, H, L, S: (B,)),
    "pick": ("index", lambda B, H, L, S: (S,)),
    "wrap": ("negative", lambda B, H, L, S: (S,)),
    "flag": ("bool", lambda B, H, L, S: (S,)),
    "keep": ("bool", lambda B, H, L, S: (H, L, S)),
}
FLOATS = tuple(name for name, (kind, _) in CAPTURES.items() if kind == "float")
NUMBERS = {"cap": 4.5, "shift": 3}
SIGNATURES = {"score": "score, b, h, q_idx, kv_idx", "mask": "b, h, q_idx, kv_idx"}
_serial = itertools.count()


class Blocks(NamedTuple):
    """A block mask: built from the mask_mod, or lists drawn by hand that need not agree with it."""

    size: tuple[int, int] = (16, 16)
    batch: bool = False
    heads: bool = False
    by_hand: bool = False


@dataclass(frozen=True, repr=False)
class Case:
    """`layouts`, of query, key and value, are names in LAYOUTS; `values` is a name in VALUES.

    `wants`: of "query", "key", "value", "captured", what gets a gradient; `loss`: "out", "lse" or "both".
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
    captured_dtype: str = "float32"
    layouts: tuple[str, str, str] = ("plain", "plain", "plain")
    values: str = "normal"
    wants: tuple[str, ...] = ()
    loss: str = "both"
    max_scores: bool = False
    deterministic: bool = False
    seed: int = 0

    def __repr__(self) -> str:
        given = ((f.name, getattr(self, f.name), f.default) for f in fields(self))
        return f"Case({', '.join(f'{name}={value!r}' for name, value, default in given if value != default)})"

    @property
    def heads(self) -> int:
        return self.kv_heads * self.group


@dataclass
class Built:
    """A case's tensors on one device, and what a backend is given. `call` is the same problem for the comparison."""

    call: Call
    arguments: dict = field(default_factory=dict)
    captured: dict[str, Tensor] = field(default_factory=dict)

    @property
    def leaves(self) -> dict[str, Tensor]:
        return {name: self.arguments[name] for name in ("query", "key", "value")} | self.captured


@cache
def make_mod(text: str, kind: str, names: tuple[str, ...]) -> Callable[[dict[str, Tensor]], Callable]:
    """A factory: given the captured tensors by name, a mod whose closure holds them."""
    source = (
        f"def make({', '.join((*names, *NUMBERS))}):\n"
        f"    def {kind}_mod({SIGNATURES[kind]}):\n"
        f"        return {text}\n"
        f"    return {kind}_mod\n"
    )
    # a name of its own, so that tracebacks and the errors of the tracer show the mod's line
    filename = f"<conformance mod {next(_serial)}>"
    linecache.cache[filename] = (len(source), None, source.splitlines(True), filename)
    scope: dict = {"torch": torch, "F": torch.nn.functional, "inf": math.inf, "nan": math.nan}
    exec(compile(source, filename, "exec"), scope)
    return lambda tensors: scope["make"](**{name: tensors[name] for name in names}, **NUMBERS)


def names_in(text: str | None) -> tuple[str, ...]:
    """The captured tensors that a mod's text reads."""
    return tuple(name for name in CAPTURES if text and re.search(rf"\b{name}\b", text))


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
    B, H, L, S = case.batch, case.heads, case.q_len, case.kv_len
    kv_batch = B if case.kv_batch is None else case.kv_batch
    shapes = (B, H, L, case.head_dim), (kv_batch, case.kv_heads, S, case.head_dim), (kv_batch, case.kv_heads, S, case.value_dim)
    names = ("query", "key", "value")
    tensors = {name: _input(case, name, shape, how) for name, shape, how in zip(names, shapes, case.layouts, strict=True)}
    captured = {name: captured_tensor(case, name) for name in CAPTURES if name in names_in(case.score) + names_in(case.mask)}
    floats = tuple(name for name in names_in(case.score) if name in FLOATS)
    wanted = tuple(n for n in names if n in case.wants) + (floats if "captured" in case.wants else ())

    make_score = make_mod(case.score, "score", names_in(case.score)) if case.score else None
    make_mask = make_mod(case.mask, "mask", names_in(case.mask)) if case.mask else None
    grids = _block_grids(case) if case.blocks and case.blocks.by_hand else None

    at = {name: _leaf(t.to(device) if device != "cpu" else t, name in wanted) for name, t in tensors.items()}
    held = {name: _leaf(t.to(device), name in wanted) for name, t in captured.items()}
    arguments: dict = dict(at, scale=case.scale, enable_gqa=case.group > 1, need_max_scores=case.max_scores)
    arguments |= dict(score_mod=make_score and make_score(held), deterministic=case.deterministic)
    if case.blocks is None:
        arguments["mask_mod"] = make_mask and make_mask(held)
    else:
        arguments["block_mask"] = _block_mask(case, make_mask and make_mask(held), grids, device)

    call = Call(
        **{name: tensor.detach() for name, tensor in tensors.items()},
        scale=case.scale,
        make_score=make_score,
        mask_mod=make_mask and make_mask(captured),
        captured=captured,
        blocks=grids and tuple(_expand(grid, case) for grid in grids),
        wanted=wanted,
        grad_out=_noise(case, "grad_out", (B, H, L, case.value_dim)).to(at["query"].dtype),
        grad_lse=_noise(case, "grad_lse", (B, H, L)).to(torch.float64 if case.dtype == "float64" else torch.float32),
    )
    if case.loss == "out":
        call = replace(call, grad_lse=None)
    if case.loss == "lse":
        call = replace(call, grad_out=None)
    return Built(call, arguments, held)


def _leaf(tensor: Tensor, wants_grad: bool) -> Tensor:
    """The same storage and strides, as a leaf of its own."""
    return tensor.detach().requires_grad_(wants_grad)


def _generator(case: Case, name: str) -> torch.Generator:
    return torch.Generator().manual_seed(case.seed * 1_000_003 + zlib.crc32(name.encode()))


def _noise(case: Case, name: str, shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=_generator(case, name), dtype=torch.float64)


VALUES: dict[str, Callable[[Tensor], Tensor]] = {
    "normal": lambda x: x,
    "integers": lambda x: (1.5 * x).round().clamp(-2, 2),
    "large": lambda x: 6 * x,
    "equal": lambda x: torch.ones_like(x),
    "positive": lambda x: x.abs(),
    "holes": lambda x: x,
}


def _input(case: Case, name: str, shape: tuple[int, ...], layout: str) -> Tensor:
    """Query, key or value; with values="holes" a few rows of key and value are NaN (and of the captured `col`)."""
    data = VALUES[case.values](_noise(case, name, shape)).to(getattr(torch, case.dtype))
    if case.values == "holes" and name != "query" and shape[2]:
        hole = torch.rand(shape[2], generator=_generator(case, "holes of " + name)) < 2 / shape[2]
        data = torch.where(hole[:, None], math.nan, data)
    return LAYOUTS[layout](data)


def _transposed(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _columns(x: Tensor) -> Tensor:
    """The last dimension is not the dense one."""
    return x.transpose(2, 3).contiguous().transpose(2, 3)


def _offset(x: Tensor) -> Tensor:
    """A window of a larger buffer whose other elements are NaN: reading outside shows."""
    around = x.new_full([n + 3 for n in x.shape], math.nan)
    around[tuple(slice(1, 1 + n) for n in x.shape)] = x
    return around[tuple(slice(1, 1 + n) for n in x.shape)]


def _step(x: Tensor) -> Tensor:
    """Every second element of a larger buffer whose other elements are NaN."""
    around = x.new_full([2 * n for n in x.shape], math.nan)
    around[tuple(slice(None, None, 2) for _ in x.shape)] = x
    return around[tuple(slice(None, None, 2) for _ in x.shape)]


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "plain": lambda x: x,
    "transposed": _transposed,
    "columns": _columns,
    "offset": _offset,
    "step": _step,
    "expanded": lambda x: x[:, :1].expand(x.shape),
    "row": lambda x: x[:, :, :1].expand(x.shape),
}


def _block_grids(case: Case) -> tuple[Tensor, Tensor]:
    """Which blocks are listed, and which of them full: bool (B or 1, H or 1, rows, columns), some rows empty."""
    assert case.blocks is not None
    (q_block, kv_block), batch, heads, _ = case.blocks
    rows, columns = -(-case.q_len // q_block), -(-case.kv_len // kv_block)
    shape = case.batch if batch else 1, case.heads if heads else 1, rows, columns
    draw = torch.rand(shape, generator=_generator(case, "blocks"))
    draw = torch.where(torch.rand(shape[:3], generator=_generator(case, "rows"))[..., None] < 0.15, 1.0, draw)
    return draw < 0.6, draw < 0.25


def _expand(grid: Tensor, case: Case) -> Tensor:
    """A grid of blocks as one of positions (B or 1, H or 1, L, S)."""
    assert case.blocks is not None
    q_block, kv_block = case.blocks.size
    wide = grid.repeat_interleave(q_block, 2).repeat_interleave(kv_block, 3)
    return wide[:, :, : case.q_len, : case.kv_len]


def _block_mask(case: Case, mask_mod, grids: tuple[Tensor, Tensor] | None, device: str) -> BlockMask:
    assert case.blocks is not None
    if grids is None:
        batch, heads = case.batch if case.blocks.batch else None, case.heads if case.blocks.heads else None
        return create_block_mask(mask_mod, batch, heads, case.q_len, case.kv_len, device=device, BLOCK_SIZE=case.blocks.size)
    listed, full = grids
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
