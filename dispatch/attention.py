"""The public function: check, trace, choose, attend."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from flexref.arguments import prepare
from flexref.arrays import shared_tensors
from flexref.autograd import attend
from flexref.backend import find_backends, said
from flexref.blocks.mask import BlockMask
from flexref.dispatch.choose import Choice, choose, refusal
from flexref.dispatch.explanation import Explanation, explained
from flexref.dispatch.jagged import PackedCall, is_jagged, packed_call
from flexref.dispatch.options import checked_options, wanted_backend
from flexref.problem import Problem, Tensors
from flexref.recent import Recent
from flexref.uncompiled import uncompiled

_choices = Recent(4096)
_unavailable = Recent(64)


class AuxRequest(NamedTuple):
    """Which results to return beside the output."""

    lse: bool = False
    max_scores: bool = False


class AuxOutput(NamedTuple):
    """lse and max_scores, each (B, Hq, L) in the accumulation type, or None where not asked for."""

    lse: Tensor | None = None
    max_scores: Tensor | None = None


@overload
def flex_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: Callable | None = None,
    block_mask: BlockMask | Any = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: Literal[False] = False,
    kernel_options: Mapping[str, Any] | None = None,
    *,
    return_aux: None = None,
    mask_mod: Callable | None = None,
    sink: Tensor | None = None,
    backend: str = "auto",
    deterministic: bool = False,
) -> Tensor: ...

@overload
def flex_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: Callable | None = None,
    block_mask: BlockMask | Any = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    return_lse: Literal[True],
    kernel_options: Mapping[str, Any] | None = None,
    return_aux: None = None,
    mask_mod: Callable | None = None,
    sink: Tensor | None = None,
    backend: str = "auto",
    deterministic: bool = False,
) -> tuple[Tensor, Tensor]: ...

@overload
def flex_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: Callable | None = None,
    block_mask: BlockMask | Any = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: Literal[False] = False,
    kernel_options: Mapping[str, Any] | None = None,
    *,
    return_aux: AuxRequest,
    mask_mod: Callable | None = None,
    sink: Tensor | None = None,
    backend: str = "auto",
    deterministic: bool = False,
) -> tuple[Tensor, AuxOutput]: ...

@overload
def flex_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: Callable | None = None,
    block_mask: BlockMask | Any = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    kernel_options: Mapping[str, Any] | None = None,
    *,
    return_aux: AuxRequest | None = None,
    mask_mod: Callable | None = None,
    sink: Tensor | None = None,
    backend: str = "auto",
    deterministic: bool = False,
) -> Tensor | tuple[Tensor, Tensor] | tuple[Tensor, AuxOutput]: ...

@uncompiled
def flex_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: Callable | None = None,
    block_mask: BlockMask | Any = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    kernel_options: Mapping[str, Any] | None = None,
    *,
    return_aux: AuxRequest | Any = None,
    mask_mod: Callable | None = None,
    sink: Tensor | None = None,
    backend: str = "auto",
    deterministic: bool = False,
) -> Any:
    """softmax(score_mod(scale * query @ key.T)) @ value, over the positions that the mask allows.

    Shapes: query (B, Hq, L, E), key (B or 1, Hkv, S, E), value (B or 1, Hkv, S, Ev); float16, bfloat16, float32 or
    float64, any strides; arrays of CuPy, Numba and NumPy are taken as tensors on the same memory. The result is
    (B, Hq, L, Ev) in query's dtype; `docs/semantics.md` says what each element is. Jagged nested tensors (B, H, S*, E)
    give jagged ones: each sequence attends to itself, the mods see its number as b and its own positions, and block_mask
    is one of create_nested_block_mask.

    Args:
        query, key, value: see above.
        score_mod: score_mod(score, b, h, q_idx, kv_idx) -> score.
        block_mask: a BlockMask of flexref or of torch; or `mask_mod`.
        mask_mod: mask_mod(b, h, q_idx, kv_idx) -> bool, whose BlockMask is kept until what it reads changes.
        sink: (Hq,) or (Hq, n), one or n logits a head that take weight and give no value, with a gradient.
        scale: the factor of the scores, 1/sqrt(E) by default.
        enable_gqa: allow fewer key and value heads than query heads.
        return_lse: also return the natural log-sum-exp (B, Hq, L).
        return_aux: AuxRequest(lse=, max_scores=); returns (out, AuxOutput) then.
        kernel_options: tuning options of an engine, or torch's; an unknown one is an error.
        backend: "auto" (or FLEXREF_BACKEND), or an engine's name, which then runs it or raises.
        deterministic: the same bits at every call, or Unsupported.

    Example: a soft cap and a causal mask, each a function of one position:

        flex_attention(query, key, value, lambda score, b, h, q, kv: 20 * torch.tanh(score / 20),
                       mask_mod=lambda b, h, q, kv: q >= kv)

    Raises TypeError, ValueError, IndexError (a captured index out of range), TraceError and Unsupported.
    Signature and meaning follow torch.nn.attention.flex_attention.
    """
    if return_lse and return_aux is not None:
        raise ValueError("return_lse and return_aux are both given; use return_aux=AuxRequest(lse=True) alone.")
    lse, max_scores = _wanted_aux(return_aux)
    settings = scale, enable_gqa, kernel_options, mask_mod, sink, backend, deterministic, max_scores
    problem, tensors, wanted, packed = _prepared(query, key, value, score_mod, block_mask, *settings)
    name = _choice(problem, wanted).name
    if name is None:
        raise refusal(problem, _choice(problem, wanted))
    output = attend(find_backends()[name], problem, tensors)
    as_given = (lambda x: x) if packed is None else packed.jagged
    if return_aux is not None:
        aux = output.lse if lse else None, output.max_scores if max_scores else None
        return as_given(output.out), AuxOutput(*map(as_given, aux))
    return (as_given(output.out), as_given(output.lse)) if return_lse else as_given(output.out)


@uncompiled
def explain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: Callable | None = None,
    block_mask: BlockMask | Any = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    kernel_options: Mapping[str, Any] | None = None,
    *,
    return_aux: AuxRequest | Any = None,
    mask_mod: Callable | None = None,
    sink: Tensor | None = None,
    backend: str = "auto",
    deterministic: bool = False,
) -> Explanation:
    """What flex_attention would do with the same arguments, which are described there, without doing it: print the result.

    It names the engine, every other one's reasons, and whether each mod is kept. Raises what it would, but Unsupported.
    """
    _, max_scores = _wanted_aux(return_aux)
    settings = scale, enable_gqa, kernel_options, mask_mod, sink, backend, deterministic, max_scores
    problem, tensors, wanted, _ = _prepared(query, key, value, score_mod, block_mask, *settings)
    return explained(problem, tensors, _choice(problem, wanted), kernel_options)


def _wanted_aux(request) -> tuple[bool, bool]:
    if request is None:
        return False, False
    if not hasattr(request, "lse") or not hasattr(request, "max_scores"):
        raise TypeError(f"return_aux must be an AuxRequest or None, got {type(request).__name__}.")
    return bool(request.lse), bool(request.max_scores)


def _prepared(
    query, key, value, score_mod, block_mask, scale, enable_gqa, kernel_options, mask_mod, sink, backend, deterministic,
    max_scores,
) -> tuple[Problem, Tensors, str, PackedCall | None]:
    """What an engine is given, the engine that is asked for, and how jagged tensors were packed."""
    packed = None
    if is_jagged(query, key, value):
        packed = packed_call(query, key, value, score_mod, block_mask, mask_mod)
        query, key, value, score_mod, mask_mod, _ = packed
    wanted = wanted_backend(backend, kernel_options, os.environ)
    options = checked_options(kernel_options, find_backends()) if kernel_options else None
    query, key, value = shared_tensors(query, key, value)
    device = query.device.type if isinstance(query, Tensor) else "cpu"
    arguments = {
        "mask_mod": mask_mod,
        "sink": sink,
        "deterministic": deterministic,
        "need_max_scores": max_scores,
        "options": options,
    }
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        query, key, value = (_autocast(x, device) for x in (query, key, value))
        with torch.autocast(device, enabled=False):
            return *prepare(query, key, value, score_mod, block_mask, scale, enable_gqa, **arguments), wanted, packed
    return *prepare(query, key, value, score_mod, block_mask, scale, enable_gqa, **arguments), wanted, packed


def _autocast(x, device: str):
    """As torch's autocast does: to its dtype, but float64 stays."""
    castable = isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64
    return x.to(torch.get_autocast_dtype(device)) if castable else x


def _choice(problem: Problem, wanted: str) -> Choice:
    def unavailable(backend):
        return _unavailable.get(backend.name, lambda: said(backend, "unavailable"))

    return _choices.get((problem, wanted), lambda: choose(problem, find_backends(), wanted, unavailable))
