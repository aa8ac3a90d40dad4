"""What a user passes, checked once, becomes Problem and Tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from flexref.argument_shapes import check_block_mask, check_serves, check_shapes, checked_scale
from flexref.arrays import shared_tensors
from flexref.blocks.found import Found, find_mask, question
from flexref.blocks.mask import BlockMask, mask_of_call, noop_mask
from flexref.blocks.steps import StepWalk
from flexref.contents import Contents
from flexref.problem import ACC_DTYPE, Capture, Problem, Tensors
from flexref.program.compiled import original
from flexref.program.ir import differentiable_loads
from flexref.program.mods import Mod, shifted, traced_mod
from flexref.program.recipes import Made, roots_of
from flexref.recent import Recent
from flexref.sinks import checked_sink
from flexref.tensor_gate import check_memory, check_surroundings

_masks = Recent(32)
_taken_over: WeakKeyDictionary = WeakKeyDictionary()


def prepare(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: Callable | None = None,
    block_mask: BlockMask | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    mask_mod: Callable | None = None,
    deterministic: bool = False,
    need_max_scores: bool = False,
    options: dict[str, object] | None = None,
    sink: Tensor | None = None,
) -> tuple[Problem, Tensors]:
    """Check query (B, Hq, L, E), key (B or 1, Hkv, S, E), value (B or 1, Hkv, S, Ev) and the mods; trace the mods.

    Raises TypeError for a wrong type or dtype, ValueError for a wrong shape or value, TraceError for a mod.
    """
    check_surroundings()
    query, key, value = shared_tensors(query, key, value)
    _check_tensors(query, key, value)
    check_shapes(query.shape, key.shape, value.shape, enable_gqa)
    scale = checked_scale(scale, query.shape[3])
    acc_dtype = ACC_DTYPE[query.dtype]
    score_mod, mask_mod = original(score_mod), original(mask_mod)
    if block_mask is not None and mask_mod is not None:
        raise ValueError("mask_mod and block_mask are both given; a block_mask has a mask_mod of its own: pass one of the two.")
    score = None if score_mod is None else _traced(score_mod, "score", acc_dtype)
    if mask_mod is not None:
        block_mask, mask = _masked(mask_mod, query, key, acc_dtype)
    else:
        block_mask = _own_mask(block_mask)
        mask_mod = None if block_mask is None or block_mask.mask_mod is noop_mask else block_mask.mask_mod
        mask = None if mask_mod is None else _traced(mask_mod, "mask", acc_dtype)
    run, found = _programs(score, mask, block_mask, query, key)
    captures, captured, scalars = _merged(score, mask, query.device)
    roots = _roots(score, captures, captured)
    grad = torch.is_grad_enabled()
    problem = Problem(
        batch=query.shape[0],
        kv_batch=key.shape[0],
        q_heads=query.shape[1],
        kv_heads=key.shape[1],
        q_len=query.shape[2],
        kv_len=key.shape[2],
        head_dim=query.shape[3],
        value_dim=value.shape[3],
        dtype=query.dtype,
        key_dtype=key.dtype,
        value_dtype=value.dtype,
        device=query.device.type,
        score=run.score,
        mask=run.mask,
        captures=captures,
        block_size=None if run.blocks is None else run.blocks.BLOCK_SIZE,
        needs_grad=(grad and query.requires_grad, grad and key.requires_grad, grad and value.requires_grad),
        need_max_scores=need_max_scores,
        deterministic=bool(deterministic),
        options=tuple(sorted(options.items())) if options else (),
    )
    held = captured, scalars, score_mod, mask_mod, roots
    sinks = None if sink is None else checked_sink(sink, query)
    return problem, Tensors(query, key, value, scale, run.blocks, *held, found=found, sink=sinks)


def _sizes(score: Mod | None) -> tuple[int, int]:
    return (0, 0) if score is None else (len(score.captured), len(score.scalars))


def _check_tensors(query: Tensor, key: Tensor, value: Tensor) -> None:
    for name, x in (("query", query), ("key", key), ("value", value)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}.")
        check_memory(name, x)
        if x.dim() != 4:
            raise ValueError(
                f"{name} must have 4 dimensions (batch, heads, length, head_dim), got shape {tuple(x.shape)}."
            )
        if x.dtype not in ACC_DTYPE:
            raise TypeError(
                f"{name} must be float16, bfloat16, float32 or float64, got {x.dtype}; convert it with .to()."
            )
        if x.device != query.device:
            raise ValueError(
                f"{name} is on {x.device} but query is on {query.device}; move it with .to({str(query.device)!r})."
            )
    for name, x in (("key", key), ("value", value)):
        if x.dtype != query.dtype and x.dtype.itemsize >= query.dtype.itemsize:
            raise TypeError(
                f"{name} is {x.dtype} but query is {query.dtype}; {name} must have query's dtype or a lower precision."
            )


def _traced(fn: Callable, kind: str, acc_dtype: torch.dtype) -> Mod:
    mod = traced_mod(fn, kind, acc_dtype)
    for i, (name, tensor) in enumerate(zip(mod.names, mod.captured, strict=True)):
        try:
            check_memory(f"the captured tensor {name}", tensor)
        except (TypeError, ValueError) as error:
            line = next(node.where for node in mod.graph.nodes if node.op == "load" and node.attr == i)
            raise type(error)(f"{str(error).removesuffix('.')}; it is read at {line}.") from None
    return mod


def _own_mask(block_mask) -> BlockMask | None:
    """A BlockMask of ours; torch's own is taken over."""
    if block_mask is None or isinstance(block_mask, BlockMask):
        return block_mask
    if type(block_mask).__name__ == "BlockMask" and type(block_mask).__module__.startswith("torch."):
        return _taken(block_mask)
    hint = "pass a function as mask_mod=" if callable(block_mask) else "make one with flexref.create_block_mask"
    raise TypeError(f"block_mask must be a BlockMask or None, got {type(block_mask).__name__}; {hint}.")


def _taken(theirs) -> BlockMask:
    """torch's BlockMask as ours, once for as long as its parts stay the same."""
    lists = (theirs.kv_num_blocks, theirs.kv_indices, theirs.full_kv_num_blocks, theirs.full_kv_indices)
    tensors = [x for x in lists if isinstance(x, Tensor)]
    state = theirs.mask_mod, theirs.seq_lengths, theirs.BLOCK_SIZE, len(tensors)
    known = _taken_over.get(theirs)
    if known is None or known[0] != state or not known[1].same(tensors):
        # from_torch refuses what has no memory to be remembered
        taken = BlockMask.from_torch(theirs)
        known = _taken_over[theirs] = (state, Contents(tensors), taken)
    return known[2]


def _masked(mask_mod: Callable, query: Tensor, key: Tensor, acc_dtype: torch.dtype) -> tuple[BlockMask, Mod]:
    """The BlockMask of a bare mask_mod, kept as long as neither the mod nor the contents of its captures change."""
    mask = _traced(mask_mod, "mask", acc_dtype)
    sizes = (
        query.shape[0] if mask.graph.uses("b") else 1,
        query.shape[1] if mask.graph.uses("h") else 1,
        query.shape[2],
        key.shape[2],
    )
    return _kept(mask, mask.roots, sizes, query.device, lambda: mask_of_call(mask_mod, sizes, query.device, acc_dtype)), mask


def _programs(
    score: Mod | None, mask: Mod | None, block_mask: BlockMask | None, query: Tensor, key: Tensor
) -> tuple[Found, bool]:
    """What an engine runs, and whether that was found in score_mod."""
    if block_mask is not None:
        check_block_mask(block_mask, query, key)
        # the lists of a step of decoding may name a block too many, and yet they are its mask_mod's
        if mask is not None and (block_mask._agrees or isinstance(block_mask.walk, StepWalk)):
            check_serves(block_mask, mask.graph.uses, query.shape)
    elif score is not None and (sparse := _found(score, query, key)):
        return sparse, True
    moved = None if mask is None else shifted(mask.graph, *_sizes(score))
    return Found(None if score is None else score.graph, moved, block_mask), False


def _found(score: Mod, query: Tensor, key: Tensor) -> Found | None:
    """The mask of what a score_mod makes -inf; kept as a bare mask_mod's is."""
    asked = question(score, query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    if asked is None:
        return None
    places: frozenset[int] = frozenset().union(*(roots_of(score.recipes[i]) for i in asked.captured))
    roots = tuple(score.roots[place] for place in sorted(places))
    return _kept(score, roots, asked, query.device, lambda: find_mask(score, asked, query.device))


def _kept(mod: Mod, roots: tuple[Tensor, ...], sizes: tuple, device: torch.device, make: Callable[[], Any]) -> Any:
    """What `make` gives, again as long as the mod and the contents of `roots` are the same."""

    def build() -> tuple[Any, Contents]:
        contents = Contents(roots)
        with torch.no_grad():
            return make(), contents

    if mod.key is None or any(t.is_inference() for t in roots):
        return build()[0]
    versions = tuple((id(t), t._version, t.data_ptr()) for t in roots)
    kept = mod.key, versions, sizes, device
    return _masks.get(kept, build, keep_alive=roots, fits=lambda known: known[1].same(roots))[0]


def _roots(score: Mod | None, captures: tuple[Capture, ...], captured: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """What score_mod computes captured tensors from, and has no gradient as one that it reads itself."""
    if score is None or not any(isinstance(recipe, Made) for recipe in score.recipes):
        return ()
    learned = [x for x, capture in zip(captured, captures, strict=True) if capture.needs_grad]
    return tuple(x for x in score.learned if all(x is not read for read in learned))


def _merged(score: Mod | None, mask: Mod | None, device: torch.device):
    """The captures of both mods, score's first; only score's get gradients (R12)."""
    captures, captured, scalars = [], [], []
    for mod in (score, mask):
        if mod is None:
            continue
        reached = differentiable_loads(mod.graph) if mod is score else ()
        for place, (name, tensor) in enumerate(zip(mod.names, mod.captured, strict=True)):
            # as in PyTorch, a number on the CPU may meet tensors elsewhere
            if tensor.device != device and not (tensor.dim() == 0 and tensor.device.type == "cpu"):
                raise ValueError(
                    f"the captured tensor {name} is on {tensor.device} but query is on {device}; move it with .to()."
                )
            needs_grad = place in reached and tensor.requires_grad and torch.is_grad_enabled()
            captures.append(Capture(name, tensor.dtype, tuple(tensor.shape), needs_grad))
            captured.append(tensor)
        scalars += mod.scalars
    return tuple(captures), tuple(captured), tuple(scalars)
