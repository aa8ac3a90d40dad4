"""The one gate that tensors pass before anything reads their memory: engines read raw addresses, so there must be memory.

It decides by what can be proved: a tensor that is no __torch_dispatch__ subclass and whose storage has an address and
is large enough has the memory that its strides describe. Names of classes only choose the words of a refusal.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_PLAIN = frozenset((Tensor, torch.nn.Parameter))
_DISABLED = vars(torch.Tensor)["__torch_dispatch__"]
_functorch: Any = vars(torch._C)["_functorch"]

# class names of PyTorch and what to do about each; a class is known by any of its bases
_REMEDIES = {
    "DTensor": "it is spread over devices; pass x.full_tensor(), or x.to_local() where each device attends to its own part",
    "MaskedTensor": "pass x.get_data(), and say with a mask_mod what x.get_mask() says",
    "AsyncCollectiveTensor": "its communication may be under way; pass x.wait()",
    "FakeTensor": "it has a shape and no numbers; call with real tensors",
    "FunctionalTensor": "it only records what happens to it; call outside of what is being functionalised",
    "NestedTensor": "pad it with torch.nested.to_padded_tensor; query, key and value may be nested, all with layout=torch.jagged",
    "UninitializedParameter": "its lazy module has not run yet; run it once",
    "UninitializedBuffer": "its lazy module has not run yet; run it once",
}
_TRANSFORMS = {
    "Vmap": "torch.vmap; fold the dimension that is mapped over into the batch instead",
    "Grad": "torch.func.grad or vjp; use torch.autograd.grad or backward() instead",
    "Jvp": "torch.func.jvp; it has no forward-mode derivative: use torch.autograd.grad or backward() instead",
    "Functionalize": "torch.func.functionalize; call it outside",
}
_NO_MEMORY = "tensors made there have no memory; call it outside"
_RECORDED = "make_fx and torch.export record operations of PyTorch, and its kernels are none; call it outside"
_PRE_DISPATCH = torch._C.DispatchKey.PreDispatch
_MODES = {
    "FakeTensorMode": _NO_MEMORY,
    "FunctionalTensorMode": _NO_MEMORY,
    "ProxyTorchDispatchMode": _RECORDED,
}


def check_memory(name: str, x: Tensor) -> None:
    """Raise TypeError, saying what `x` is and what to do, unless it has memory of its own; ValueError if freed, or on meta."""
    kind = type(x)
    if kind not in _PLAIN and (_dispatches(kind) or _remedy_for(kind)):
        raise TypeError(_refusal(name, x))
    try:
        storage = x.untyped_storage()
        address, size = storage.data_ptr(), storage.nbytes()
    except (RuntimeError, NotImplementedError):
        raise TypeError(_refusal(name, x)) from None
    if x.is_nested or x.is_quantized:
        raise TypeError(_refusal(name, x))
    if x.is_contiguous():
        needed = x.nbytes and x.nbytes + x.storage_offset() * x.itemsize
    else:
        steps = [(length - 1) * stride for length, stride in zip(x.shape, x.stride(), strict=True)]
        needed = (x.storage_offset() + sum(steps) + 1) * x.itemsize
    if size < needed:
        raise ValueError(
            f"{name} has no memory for its shape {tuple(x.shape)}: its storage was freed or made smaller, as offloading and "
            "FSDP do; bring it back before the call."
        )
    if not address and x.is_meta:
        raise ValueError(f"{name} is on meta: {_REMEDIES['FakeTensor']}.")
    if not address and needed:
        raise TypeError(_refusal(name, x))


def check_surroundings() -> None:
    """Raise TypeError where what runs has no memory or is recorded: inside PyTorch's transforms, fake modes and tracers."""
    if torch._C._is_tracing():
        raise TypeError("flexref cannot run inside torch.jit.trace, which records operations of PyTorch alone; call it outside.")
    transform = _functorch.peek_interpreter_stack()
    if transform is not None:
        raise TypeError(f"flexref cannot run inside {_TRANSFORMS[transform.key().name]}.")
    if torch._C._len_torch_dispatch_stack():
        from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

        for mode in _get_current_dispatch_mode_stack():
            for kind in type(mode).__mro__:
                if kind.__name__ in _MODES:
                    raise TypeError(f"flexref cannot run inside {type(mode).__name__}: {_MODES[kind.__name__]}.")
        # modes of somebody else's: whatever they are for, what is made under them must have memory
        made = torch.empty(1, device="cpu")
        if type(made) is not Tensor or not made.data_ptr():
            raise TypeError(f"flexref cannot run inside {type(mode).__name__}: {_NO_MEMORY}.")
    if torch._C._dispatch_tls_is_dispatch_key_included(_PRE_DISPATCH):
        raise TypeError(f"flexref cannot run inside make_fx(pre_dispatch=True): {_RECORDED}.")


def plain(x: Tensor) -> Tensor:
    """A harmless subclass as the torch.Tensor that it is, with its gradient; anything else as it is."""
    kind = type(x)
    if kind in _PLAIN or _dispatches(kind) or _remedy_for(kind):
        return x
    with torch._C.DisableTorchFunctionSubclass():
        return x.as_subclass(Tensor)


def _dispatches(kind: type) -> bool:
    """Whether a class says itself what PyTorch's operations mean."""
    return getattr(kind, "__torch_dispatch__") is not _DISABLED  # noqa: B009


def _remedy_for(kind: type) -> str | None:
    for base in kind.__mro__:
        if base.__module__.startswith("torch.") and base.__name__ in _REMEDIES:
            return _REMEDIES[base.__name__]
    return None


def _refusal(name: str, x: Tensor) -> str:
    kind, remedy = type(x), _remedy_for(type(x))
    if remedy is not None:
        return f"{name} is a {kind.__name__}, which has no memory of its own: {remedy}."
    if _functorch.is_functorch_wrapped_tensor(x):
        batched = _functorch.is_batchedtensor(x)
        where = "Vmap" if batched else "Functionalize" if _functorch.is_functionaltensor(x) else "Grad"
        return f"{name} is a tensor of {_TRANSFORMS[where]}."
    if _dispatches(kind):
        return (
            f"{name} is a {kind.__name__}, a tensor subclass with a __torch_dispatch__ of its own, whose memory need not be "
            "what it means; pass the plain tensor that it stands for."
        )
    if x.is_nested:
        return f"{name} is a nested tensor, but must be a dense tensor: {_REMEDIES['NestedTensor']}."
    if x.is_quantized:
        return f"{name} is quantised ({x.dtype}); pass x.dequantize()."
    if x.layout != torch.strided:
        return f"{name} must be a dense tensor, got layout {x.layout}; pass x.to_dense() and mask what is absent."
    if vars(torch)["_is_zerotensor"](x):
        return f"{name} is a tensor of zeros that PyTorch has not written anywhere; pass x.clone()."
    return f"{name} is on {x.device} and has no memory that can be read; move it to a CPU or a GPU with .to()."
