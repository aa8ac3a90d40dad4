"""The two objects that travel: Problem, static and hashable; Tensors, what changes from call to call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch

from flexref.blocks.mask import BlockMask
from flexref.program.ir import Graph

ACC_DTYPE = {
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float32: torch.float32,
    torch.float64: torch.float64,
}


@dataclass(frozen=True)
class Capture:
    """What is static of a captured tensor: its name in the mod, dtype, shape, and whether it gets a gradient."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    needs_grad: bool = False


@dataclass(frozen=True)
class Problem:
    """Everything a backend may specialise on. THE cache key: equal problems may share a kernel.

    `score`, `mask`: programs whose loads name positions of `captures`, whose scalars name positions of Tensors.scalars.
    `block_size`: (q_block, kv_block) of the block mask; None means that there is no block mask (every position allowed).
    `needs_grad`: whether query, key, value need a gradient.
    """

    batch: int
    kv_batch: int
    q_heads: int
    kv_heads: int
    q_len: int
    kv_len: int
    head_dim: int
    value_dim: int
    dtype: torch.dtype
    key_dtype: torch.dtype
    value_dtype: torch.dtype
    device: str = "cpu"
    score: Graph | None = None
    mask: Graph | None = None
    captures: tuple[Capture, ...] = ()
    block_size: tuple[int, int] | None = None
    needs_grad: tuple[bool, bool, bool] = (False, False, False)
    need_max_scores: bool = False
    deterministic: bool = False
    options: tuple[tuple[str, object], ...] = ()

    @property
    def acc_dtype(self) -> torch.dtype:
        """float64 for float64 inputs, else float32 (R1)."""
        return ACC_DTYPE[self.dtype]

    @property
    def group(self) -> int:
        """How many query heads read one key and value head (R10)."""
        return self.q_heads // self.kv_heads

    @property
    def extents(self) -> dict[str, int]:
        """How many values each index of a mod takes: 0 to one less."""
        return {"b": self.batch, "h": self.q_heads, "q_idx": self.q_len, "kv_idx": self.kv_len}

    @property
    def needs_backward(self) -> bool:
        """Whether anything at all needs a gradient."""
        return any(self.needs_grad) or any(c.needs_grad for c in self.captures)

    @cached_property
    def _hash(self) -> int:
        return hash(tuple(getattr(self, name) for name in self.__dataclass_fields__))

    def __hash__(self) -> int:
        return self._hash


@dataclass
class Tensors:
    """What a call brings: query (B, Hq, L, E), key (Bk, Hkv, S, E), value (Bk, Hkv, S, Ev), any strides.

    `captured`: one tensor for each of Problem.captures. `scalars`: the captured Python numbers.
    `score_mod`, `mask_mod`: the user's own functions, which only the reference backend calls.
    `found`: that block_mask was found in score_mod by its program, for engines to be quicker by; it means nothing more.
    `roots`: tensors that a captured one is computed from in the mod; the reference, which calls the mod itself,
    differentiates by them.
    `sink`: (Hq, n) logits beside the keys, which no engine sees: they are added above all of them (sinks.py).
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    scale: float
    block_mask: BlockMask | None = None
    captured: tuple[torch.Tensor, ...] = ()
    scalars: tuple[int | float, ...] = ()
    score_mod: Callable | None = None
    mask_mod: Callable | None = None
    roots: tuple[torch.Tensor, ...] = ()
    found: bool = False
    sink: torch.Tensor | None = None


@dataclass
class Output:
    """out (B, Hq, L, Ev) in query's dtype; lse and max_scores (B, Hq, L) in the accumulation type, natural log.

    `saved`: what the backend's own backward wants back beside them; `kept`: the same, where it is no tensor.
    """

    out: torch.Tensor
    lse: torch.Tensor
    max_scores: torch.Tensor | None = None
    saved: tuple[torch.Tensor, ...] = ()
    kept: object = None


@dataclass
class Gradients:
    """d query, d key, d value and one entry for each of Problem.captures; None where none is needed.

    `roots`: one for each of Tensors.roots, from the reference alone.
    """

    query: torch.Tensor | None
    key: torch.Tensor | None
    value: torch.Tensor | None
    captured: tuple[torch.Tensor | None, ...] = field(default=())
    roots: tuple[torch.Tensor | None, ...] = ()
