"""Arrays of other libraries as tensors on the same memory."""

from __future__ import annotations

import torch
from torch import Tensor

from flexref.tensor_gate import plain


def shared_tensors(query, key, value) -> tuple:
    """Tensors as plain torch tensors; arrays of CuPy, Numba or NumPy as tensors on the same memory; anything else as it is.

    Raises TypeError, naming the argument, for an array whose memory torch cannot share.
    """
    if type(query) is type(key) is type(value) is Tensor:
        return query, key, value
    return tuple(_shared(name, x) for name, x in (("query", query), ("key", key), ("value", value)))


def _shared(name: str, x):
    if isinstance(x, Tensor):
        return plain(x)
    try:
        if hasattr(x, "__dlpack__"):
            return torch.from_dlpack(x)
        return torch.as_tensor(x, device="cuda") if hasattr(x, "__cuda_array_interface__") else x
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        raise TypeError(
            f"{name} is a {type(x).__name__} whose memory torch cannot share: {error}; copy it to a torch.Tensor."
        ) from error
