"""What can be wrong with a mod, in words: what it did, its file and line, the rule, and what to write instead."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flexref.errors import TraceError
from flexref.one_float import METADATA
from flexref.program.mod_objects import signature_of
from flexref.program.places import definition, label, name_of, trace_lines, user_line

_STATIC = frozenset(
    """ndim itemsize nbytes requires_grad is_leaf is_cpu is_cuda is_meta is_sparse is_nested is_quantized is_signed()
    is_same_size() is_tensor() name""".split()
)
_DECISIONS = frozenset(
    """__bool__ __int__ __float__ __index__ __complex__ item tolist numpy __array__ __contains__ nonzero""".split()
)
_RANDOM = frozenset(
    """rand rand_like randn randn_like randint randint_like bernoulli dropout normal multinomial poisson
    feature_dropout alpha_dropout randperm rrelu gumbel_softmax dropout1d dropout2d dropout3d feature_alpha_dropout""".split()
)
_REDUCTIONS = frozenset(
    """sum mean prod amax amin aminmax argmax argmin softmax log_softmax cumsum cumprod sort topk any all logsumexp
    norm var std median mode cummax cummin kthvalue nansum nanmean unique argsort""".split()
)
_AUTOGRAD = frozenset("backward register_hook register_post_accumulate_grad_hook retain_grad requires_grad_".split())
_RULES = {
    "decision": "a mod is traced once for all positions, so Python cannot branch on or convert a traced value",
    "reduction": "a mod sees one score at a time, so it cannot reduce over rows or columns",
    "random": "a mod must give the same value each time it is evaluated, so it cannot draw random numbers",
    "own_backward": "the derivative of a mod is derived from its operations, so it cannot have a backward of its own",
    "one_float": "within a mod every float is of the accumulation type (R1), and every integer has 64 bits",
    "mutation": "a mod is a pure function, so it cannot change a tensor in place",
}


def refuse(fn: Callable, kind: str, name: str, args: tuple, of_tensors: bool) -> None:
    """Raise TraceError if this call, seen while the mod runs, breaks a rule; `of_tensors`: no position takes part in it."""
    if name in _DECISIONS:
        instead = (
            "write torch.where(condition, a, b) for `if`, `&` `|` `~` for `and` `or` `not`, "
            "torch.maximum / torch.minimum for max / min"
        )
        if isinstance(args[0] if args else None, Tensor) and not hasattr(args[0], "ref"):
            what = f"calls {_spoken(name)} on a captured tensor"
            raise _broken(fn, kind, "decision", what, "read the number before the call and capture it")
        raise _broken(fn, kind, "decision", f"calls {_spoken(name)} on a traced value", instead)
    extreme = name in ("max", "min") and len(args) == 1
    if not of_tensors and (name in _REDUCTIONS or extreme):
        raise _broken(fn, kind, "reduction", f"calls {name}()", "compute it before the call and capture the result as a tensor")
    if name in _RANDOM:
        raise _broken(fn, kind, "random", f"calls {name}()", "draw the numbers before the call and capture them as a tensor")
    if name in _AUTOGRAD:
        what, instead = f"calls {name}()", "write plain operations; hook tensors outside of the mod; detach() stops a gradient"
        raise _broken(fn, kind, "own_backward", what, instead)
    in_place = name.endswith("_") and not name.endswith("__")
    if in_place or name == "__setitem__" or (name.startswith("__i") and name[3:] in _IN_PLACE):
        raise _broken(
            fn,
            kind,
            "mutation",
            f"calls {_spoken(name)}",
            "write `x = x + y` for `x += y`, and return a new value",
        )


def refuse_state(fn: Callable, kind: str, func: Callable, args: tuple, kwargs: dict[str, Any]) -> None:
    """Raise TraceError for what is no matter of numbers: what earlier steps left behind, their bits, autocast."""
    name = getattr(func, "__name__", "")
    if kwargs.get("out") is not None or kwargs.get("inplace") or kwargs.get("max_norm") is not None:
        what = f"calls {name}() with out=, inplace= or max_norm="
        raise _broken(fn, kind, "mutation", what, "use what it returns without them")
    if name == "view" and any(isinstance(x, torch.dtype) for x in args):
        raise _broken(fn, kind, "one_float", "calls view(dtype), which reads bits", "call it before and capture the result")
    if name == "__get__" and getattr(func, "__self__", None) is Tensor.grad:
        what, instead = "asks a captured tensor for grad", "read it before the call and capture what it is"
        raise _broken(fn, kind, "decision", what, instead)
    if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
        raise _broken(fn, kind, "one_float", "turns autocast on", "convert the result with .to(dtype) before the call")


def refuse_number(fn: Callable, kind: str, func: Callable, name: str) -> None:
    """Raise TraceError for a number or None that is made of captured tensors, unless it is a matter of dtype and shape alone."""
    asked = getattr(getattr(func, "__self__", None), "__name__", name) if name == "__get__" else f"{name}()"
    if asked not in _STATIC and name not in METADATA:
        what = f"asks a captured tensor for {asked}"
        raise _broken(fn, kind, "decision", what, "read it before the call and capture the number")


def own_backward(fn: Callable, kind: str) -> TraceError:
    instead = "write it in plain operations; a straight-through value is x + (f(x) - x).detach()"
    return _broken(fn, kind, "own_backward", "calls a torch.autograd.Function", instead)


def without_in_place(name: str) -> str | None:
    """`__add__` of `__iadd__`, `mul` of `mul_`: the function that gives what the one in place would write; else None."""
    if name.startswith("__i") and name[3:] in _IN_PLACE:
        return f"__{name[3:]}"
    plain = name[:-1] if name.endswith("_") and not name.endswith("__") else ""
    return plain if plain not in _RANDOM and callable(getattr(Tensor, plain, None)) else None


def in_place(fn: Callable, kind: str, name: str, new: torch.dtype, old: torch.dtype) -> TraceError:
    why = f"which makes {new} of {old}" if new != old else "of which there is a view or a detached alias"
    instead = "write `x = x + y` for `x += y`, and return a new value"
    return _broken(fn, kind, "mutation", f"calls {_spoken(name)} in place on a value, {why}", instead)


_IN_PLACE = frozenset(
    """add__ sub__ mul__ truediv__ div__ floordiv__ mod__ pow__ and__ or__ xor__ lshift__ rshift__""".split()
)


def _spoken(name: str) -> str:
    return {
        "__bool__": "bool() (`if`, `and`, `or`, `not`, max, min)",
        "__int__": "int()",
        "__float__": "float()",
        "__index__": "range() or list indexing",
    }.get(name, f"{name}()" if not name.startswith("__") else name)


def _broken(fn: Callable, kind: str, rule: str, what: str, instead: str) -> TraceError:
    return TraceError(f"{kind}_mod {label(fn)} {what}, at {user_line(fn)}. Rule: {_RULES[rule]}. Instead: {instead}.")


def wrong_arity(fn: Callable, kind: str, names: tuple[str, ...]) -> TraceError:
    try:
        got = f"{label(fn)}{signature_of(fn, follow_wrapped=True)}"
    except (TypeError, ValueError):
        got = label(fn)
    hint = {
        "score": "a function of (b, h, q_idx, kv_idx) is a mask: pass it as mask_mod= or through create_block_mask",
        "mask": "a function of (score, b, h, q_idx, kv_idx) is a score_mod: pass it as score_mod=",
    }[kind]
    return TraceError(
        f"{kind}_mod must take {len(names)} arguments ({', '.join(names)}), got {got}, at {definition(fn)}; {hint}."
    )


def wrong_result(fn: Callable, kind: str, result) -> TraceError:
    got = f"a tensor of shape {tuple(result.shape)} and {result.dtype}" if isinstance(result, Tensor) else f"{result!r}"
    wanted = {"score": "a number or a 0-d float or int tensor", "mask": "a bool or a 0-d bool tensor"}[kind]
    instead = {"score": "return the changed score", "mask": "return a comparison, such as q_idx >= kv_idx"}[kind]
    return TraceError(f"{kind}_mod {label(fn)} must return {wanted}, got {got}, at {definition(fn)}; {instead}.")


def partial(part) -> TraceError:
    fn, kind = part.recorder.fn, part.recorder.kind
    name, rank, given = name_of(part.tensor, fn), part.tensor.dim(), len(part.items)
    indices = ", ".join(["h", "q_idx", "kv_idx", "b", "0", "0", "0", "0"][:rank])
    return TraceError(
        f"{kind}_mod {label(fn)} uses the captured tensor {name} of shape {tuple(part.tensor.shape)} with {given} of its {rank} "
        f"indices, at {user_line(fn)}. Rule: a mod sees one position at a time, so a captured tensor is read one element at "
        f"a time. Instead: index every dimension, such as {name}[{indices}], "
        "and do other work on it before the call."
    )


def check_index(fn: Callable, kind: str, tensor: Tensor, before: tuple, items: tuple[Any, ...], name: str) -> None:
    """Raise TraceError for an index that is no integer, slice, None or `...`, and for too many of them."""
    for item in items:
        if not (item is None or item is Ellipsis or isinstance(item, slice) or _one_integer(item)):
            shown = f"{item.dtype} tensor of shape {tuple(item.shape)}" if isinstance(item, Tensor) else repr(item)
            raise TraceError(
                f"{kind}_mod {label(fn)} indexes the captured tensor {name} with {shown}, at {user_line(fn)}. Rule: an index is "
                "one integer. Instead: use b, h, q_idx, kv_idx, integers, or integer arithmetic on them (`//`, not `/`)."
            )
    given = len(before) + sum(x is not None and x is not Ellipsis for x in items)
    if given > tensor.dim():
        raise TraceError(
            f"{kind}_mod {label(fn)} indexes the captured tensor {name} of shape {tuple(tensor.shape)} with "
            f"{given} indices, at {user_line(fn)}; it has {tensor.dim()} dimensions."
        )


def _one_integer(item: Any) -> bool:
    if isinstance(item, Tensor):
        return item.dim() == 0 and not item.dtype.is_floating_point and item.dtype != torch.bool
    return isinstance(item, int) and not isinstance(item, bool)


# what every engine reads; others have no arithmetic in PyTorch, or not all of it
_READABLE = frozenset(
    (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
    + (torch.float16, torch.bfloat16, torch.float32, torch.float64)
)


def check_captured(fn: Callable, kind: str, tensor: Tensor, name: str) -> None:
    """Raise TraceError for a captured tensor of a dtype that no program can read; its memory is looked at by the gate."""
    if tensor.dtype not in _READABLE:
        raise TraceError(
            f"{kind}_mod {label(fn)} reads the captured tensor {name} of {tensor.dtype}, at "
            f"{user_line(fn)}; capture a dense tensor of bool, uint8, int8 to int64, or float16 to float64 instead, "
            "made before the call with .to(), such as .long() or .float()."
        )


def not_pointwise(fn: Callable, kind: str, mistake) -> TraceError:
    why = f": {mistake.why}" if mistake.why else ""
    return TraceError(
        f"{kind}_mod {label(fn)} uses the operator {mistake.operator}{why}, at {definition(fn)}. Rule: a mod is pointwise: "
        "arithmetic, comparisons, torch.where and elementary functions of one score and its indices. Instead: compute the "
        "value before the call and capture it as a tensor."
    )


def failed(fn: Callable, kind: str, error: Exception) -> TraceError:
    lines = [f for f in trace_lines(error)]
    at = lines[-1] if lines else definition(fn)
    return TraceError(
        f"{kind}_mod {label(fn)} failed while it was traced, at {at}: {type(error).__name__}: "
        f"{str(error).splitlines()[0] if str(error) else ''}. Rule: {_RULES['decision']}. "
        "Instead: use only torch functions on one score and its indices."
    )
