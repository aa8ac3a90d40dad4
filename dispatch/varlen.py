"""Attention over documents of any lengths that lie one behind another, without padding."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, TypedDict, Unpack, overload

import torch
from torch import Tensor

from flexref.arrays import shared_tensors
from flexref.blocks.packed import ALIGNMENTS, Packed, PackedScore
from flexref.dispatch.attention import AuxOutput, AuxRequest, flex_attention
from flexref.dispatch.jagged import check_offsets, is_jagged, kept_places
from flexref.tensor_gate import check_memory
from flexref.uncompiled import uncompiled


class Settings(TypedDict, total=False):
    """What is passed on to flex_attention as it is."""

    causal: Literal["start", "end"] | None
    scale: float | None
    enable_gqa: bool
    sink: Tensor | None
    kernel_options: Mapping[str, Any] | None
    backend: str
    deterministic: bool


@overload
def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    score_mod: Callable | None = None,
    mask_mod: Callable | None = None,
    *,
    return_lse: Literal[False] = False,
    return_aux: None = None,
    **settings: Unpack[Settings],
) -> Tensor: ...

@overload
def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    score_mod: Callable | None = None,
    mask_mod: Callable | None = None,
    *,
    return_lse: Literal[True],
    return_aux: None = None,
    **settings: Unpack[Settings],
) -> tuple[Tensor, Tensor]: ...

@overload
def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    score_mod: Callable | None = None,
    mask_mod: Callable | None = None,
    *,
    return_lse: Literal[False] = False,
    return_aux: AuxRequest,
    **settings: Unpack[Settings],
) -> tuple[Tensor, AuxOutput]: ...

@uncompiled
def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    score_mod: Callable | None = None,
    mask_mod: Callable | None = None,
    *,
    causal: Literal["start", "end"] | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    return_aux: Any = None,
    sink: Tensor | None = None,
    kernel_options: Mapping[str, Any] | None = None,
    backend: str = "auto",
    deterministic: bool = False,
) -> Any:
    """Attention of each document to itself: query (tokens, Hq, E), key (tokens, Hkv, E), value (tokens, Hkv, Ev), packed.

    Document i has the queries cu_seqlens_q[i] to cu_seqlens_q[i + 1], and the keys of cu_seqlens_k likewise: integer tensors
    (documents + 1,) that begin with 0 and end with the number of tokens; cu_seqlens_k None: as cu_seqlens_q. Documents may be
    empty; a query without keys gives 0. Nothing is padded, and blocks that belong to no document are not looked at.

    Args:
        score_mod, mask_mod: as for flex_attention, but of one document: b is its number, q_idx and kv_idx count from its
            begin. A tensor by packed token is read at cu_seqlens[b] + kv_idx.
        causal: "start": query i of a document attends to its keys up to i; "end": its last query attends to all of them.
        Everything else is flex_attention's.

    Returns out (tokens, Hq, Ev); with return_lse also lse (tokens, Hq); with return_aux (out, AuxOutput of (tokens, Hq)).
    Raises what flex_attention does, and TypeError or ValueError for offsets that fall, or begin or end wrongly.
    """
    if is_jagged(query, key, value):
        raise TypeError("query, key and value are jagged nested tensors: pass them to flex_attention, without cu_seqlens.")
    query, key, value = shared_tensors(query, key, value)
    for name, x in (("query", query), ("key", key), ("value", value)):
        if not isinstance(x, Tensor) or x.dim() != 3:
            got = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise (ValueError if isinstance(x, Tensor) else TypeError)(
                f"{name} must be a tensor of 3 dimensions (tokens, heads, head_dim), got {got}."
            )
    if causal not in ALIGNMENTS:
        raise ValueError(f'causal must be "start", "end" or None, got {causal!r}.')
    cu_seqlens_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
    ends = (("cu_seqlens_q", cu_seqlens_q, "query", query), ("cu_seqlens_k", cu_seqlens_k, "key", key))
    for end in ends:
        _check_tensor(*end)
    if len(cu_seqlens_q) != len(cu_seqlens_k):
        counts = len(cu_seqlens_q) - 1, len(cu_seqlens_k) - 1
        raise ValueError(f"cu_seqlens_q has {counts[0]} documents and cu_seqlens_k {counts[1]}: they must be as many.")
    tokens = query.shape[0], key.shape[0]

    def check() -> None:
        for name, offsets, of, x in ends:
            check_offsets(name, offsets, of, len(x))

    at = kept_places(cu_seqlens_q, cu_seqlens_k, causal, tokens, check)
    by_head = [x.transpose(0, 1)[None] for x in (query, key, value)]
    result: Any = flex_attention(
        by_head[0],
        by_head[1],
        by_head[2],
        None if score_mod is None else PackedScore(score_mod, at),
        scale=scale,
        enable_gqa=enable_gqa,
        return_lse=return_lse,
        return_aux=return_aux,
        kernel_options=kernel_options,
        mask_mod=Packed(mask_mod, at),
        sink=sink,
        backend=backend,
        deterministic=deterministic,
    )
    if return_aux is not None:
        out, aux = result
        return _by_token(out), AuxOutput(*(x if x is None else _by_token(x) for x in aux))
    return tuple(map(_by_token, result)) if return_lse else _by_token(result)


def _by_token(x: Tensor) -> Tensor:
    return x[0].transpose(0, 1)


def _check_tensor(name: str, offsets: Any, of: str, x: Tensor) -> None:
    """Raise TypeError or ValueError unless they are integers (documents + 1,) where `x` is."""
    if not isinstance(offsets, Tensor) or offsets.is_floating_point() or offsets.dtype == torch.bool or offsets.is_complex():
        got = str(offsets.dtype) if isinstance(offsets, Tensor) else type(offsets).__name__
        raise TypeError(f"{name} must be an integer tensor (documents + 1,), got {got}.")
    check_memory(name, offsets)
    if offsets.dim() != 1 or len(offsets) == 0:
        raise ValueError(f"{name} must have the shape (documents + 1,), got {tuple(offsets.shape)}.")
    if offsets.device != x.device:
        raise ValueError(f"{name} is on {offsets.device} but {of} on {x.device}; move it with .to({str(x.device)!r}).")
