"""Checks what users pass to make a BlockMask, so that what is below may trust it."""
from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from flexref.program.mod_objects import attribute, name_of, signature_of
from flexref.tensor_gate import check_memory

MASK_SIGNATURE = "mask_mod(b, h, q_idx, kv_idx)"
SCORE_SIGNATURE = "score_mod(score, b, h, q_idx, kv_idx)"


def checked_sizes(B: int | None, H: int | None, q_len: int, kv_len: int) -> tuple[int, int, int, int]:
    """Ints of at least 0; None is 1. Raises TypeError or ValueError naming the argument."""
    B, H = (1 if n is None else n for n in (B, H))
    return checked_size("B", B), checked_size("H", H), checked_size("Q_LEN", q_len), checked_size("KV_LEN", kv_len)


def checked_size(name: str, n, least: int = 0) -> int:
    """`n` as an int. Raises TypeError for what is no integer, ValueError for one below `least` or beyond 64 bits."""
    size = checked_index(name, n)
    if size < least:
        raise ValueError(f"{name} must be at least {least}, got {n}")
    if size >= 1 << 63:
        raise ValueError(f"{name} must fit into 64 bits, got {n}")
    return size


def checked_index(name: str, n) -> int:
    """`n` as an int. Raises TypeError for what is no integer."""
    if isinstance(n, (bool, Tensor)) or not hasattr(n, "__index__"):
        raise TypeError(f"{name} must be an int, got {type(n).__name__}")
    return int(n)


def check_start(start: Tensor, device: torch.device) -> None:
    """Raise TypeError or ValueError unless `start` is a 0-d tensor of integers on `device`."""
    if start.dim() or start.dtype == torch.bool or start.is_floating_point() or start.is_complex():
        raise TypeError(f"start must be an int or a 0-d tensor of integers, got {start.dtype} of shape {tuple(start.shape)}")
    if start.device != device:
        raise ValueError(f"start is on {start.device}, but the mask on {device}; move it, or give an int")
    check_memory("start", start)


def check_offset(name: str, offset: object) -> None:
    """Raise TypeError unless it is a whole number, or a 0-d tensor of one; ValueError for one beyond 62 bits."""
    if isinstance(offset, Tensor):
        if offset.dim() or offset.is_floating_point() or offset.is_complex() or offset.dtype == torch.bool:
            got = f"{offset.dtype} of shape {tuple(offset.shape)}"
            raise TypeError(f"{name} must be an integer, or a 0-d integer tensor, got {got}")
    elif abs(checked_index(name, offset)) >= 1 << 62:
        raise ValueError(f"{name} must fit into 62 bits, got {offset}")


def unserved(reads: Callable[[str], bool], have: Sequence[int], want: Sequence[int]) -> tuple[str, str, int] | None:
    """Where a mask for (B, H) is to serve others of which mask_mod would say something else: "B" or "H", the index that it reads,
    and for how many."""
    for name, index, own, others in zip("BH", "bh", have, want, strict=False):
        if own == 1 < others and reads(index):
            return name, index, others
    return None


def checked_lengths(lengths: object) -> tuple[int, int]:
    """(q_len, kv_len). Raises TypeError or ValueError for what is no pair of sizes."""
    if not isinstance(lengths, (tuple, list)) or len(lengths) != 2:
        raise TypeError(f"seq_lengths must be a pair (q_len, kv_len), got {lengths!r}")
    return checked_size("seq_lengths[0]", lengths[0]), checked_size("seq_lengths[1]", lengths[1])


def check_list(name: str, x: object) -> None:
    """Raise TypeError or ValueError unless `x` is a tensor of integers whose memory can be read (or on meta, where none is)."""
    if not isinstance(x, Tensor) or x.dtype == torch.bool or x.is_floating_point() or x.is_complex():
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{name} must be a tensor of integers, got {got}")
    if not x.is_meta:
        check_memory(name, x)


def checked_block_size(size) -> tuple[int, int]:
    """(q_block, kv_block) from an int or a pair."""
    pair = tuple(size) if isinstance(size, (tuple, list)) else (size, size)
    if len(pair) != 2:
        raise ValueError(f"BLOCK_SIZE must be an int or a pair (q_block, kv_block), got {size!r}")
    return checked_size("BLOCK_SIZE", pair[0], 1), checked_size("BLOCK_SIZE", pair[1], 1)


def checked_device(device: torch.device | str | None) -> torch.device:
    """None is the accelerator, or else the CPU."""
    if device is None:
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return torch.device("cpu" if device is None else device)


def kind_of_mod(fn: object, argument: str = "mod_fn") -> str:
    """ "mask" or "score", by what `fn` can be called with. Raises TypeError for what is neither."""
    if not callable(fn):
        wanted = MASK_SIGNATURE if argument == "mask_mod" else f"{MASK_SIGNATURE} or {SCORE_SIGNATURE}"
        raise TypeError(f"{argument} must be a function {wanted}, got {type(fn).__name__}")
    try:
        # what can be called is its own, and not that of a function that it wraps, unless it passes on whatever it is given
        signature = signature_of(fn)
        if any(x.kind is x.VAR_POSITIONAL for x in signature.parameters.values()):
            signature = signature_of(fn, follow_wrapped=True)
    except (TypeError, ValueError):
        return "mask"
    for kind, count in (("mask", 4), ("score", 5)):
        try:
            signature.bind(*range(count))
            return kind
        except TypeError:
            pass
    wanted = MASK_SIGNATURE if argument == "mask_mod" else f"{MASK_SIGNATURE} or {SCORE_SIGNATURE}"
    raise TypeError(f"{argument} {described(fn)} has the arguments {signature}; expected {wanted}")


def check_mask_mod(fn: object) -> None:
    """Raise TypeError unless `fn` is called as a mask_mod is."""
    if kind_of_mod(fn, "mask_mod") == "score":
        raise TypeError(f"mask_mod {described(fn)} takes 5 arguments, as a score_mod does; expected {MASK_SIGNATURE}")


def described(mod: object) -> str:
    """A mod's name with its file and line, if it has them."""
    code = attribute(mod, "__code__")
    return f"{name_of(mod)} ({code.co_filename}:{code.co_firstlineno})" if code else name_of(mod)


def as_bool(mod: object, result: object, device: torch.device) -> Tensor:
    """A mask_mod's answer for one position as a 0-d bool tensor. Raises TypeError or ValueError for any other answer."""
    if isinstance(result, bool):
        return torch.tensor(result, device=device)
    if not isinstance(result, Tensor) or result.dtype != torch.bool:
        kind = str(result.dtype) if isinstance(result, Tensor) else type(result).__name__
        hint = "does it miss a return?" if result is None else "return a comparison, such as `q_idx >= kv_idx`"
        raise TypeError(f"mask_mod {described(mod)} must return a bool or a bool tensor, got {kind}; {hint}")
    if result.device.type != device.type:
        raise ValueError(
            f"mask_mod {described(mod)} captures a tensor on {result.device}, but is asked on {device}; "
            "move the tensor, or pass device="
        )
    if result.dim():
        raise ValueError(
            f"mask_mod {described(mod)} must answer for one position, got a tensor of shape {tuple(result.shape)}; "
            "index every dimension of what it captures"
        )
    return result
