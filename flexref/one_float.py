"""What numbers are within a mod (R1): one float and one integer, whatever widths PyTorch would give them."""
from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

_NARROW = frozenset({torch.int8, torch.int16, torch.int32, torch.uint8, torch.uint16, torch.uint32})
# steps whose derivative is 0, which PyTorch does not say
_STEPS = ("floor_divide", "__floordiv__", "__rfloordiv__", "heaviside")
# what PyTorch calls the numbers among a function's arguments
_NUMBERS = ("input", "other", "self", "exponent", "end", "weight", "values")
# functions by which a tensor is asked for its shape, its type and where it lies
METADATA = frozenset(
    """size dim numel stride ndimension nelement __len__ is_floating_point is_complex storage_offset is_contiguous
    element_size get_device""".split()
)


def asks_what_it_is(func: Callable) -> bool:
    """Whether a function asks a tensor what it is, such as its dtype, or for a view: of the user's own tensor."""
    name = getattr(func, "__name__", "")
    return name in METADATA or name in ("__get__", "is_signed")


@contextmanager
def whole_products() -> Iterator[None]:
    """Products of matrices in all digits of the one float, where the process has asked PyTorch for fewer (bfloat16, TF32)."""
    backends: Any = torch.backends
    kinds = [kind for kind in (backends.mkldnn.matmul, backends.cuda.matmul) if kind.fp32_precision in _FEWER]
    if not kinds:
        yield
        return
    with _precision:
        before = [kind.fp32_precision for kind in kinds]
        for kind in kinds:
            kind.fp32_precision = "ieee"
        try:
            yield
        finally:
            for kind, value in zip(kinds, before, strict=True):
                kind.fp32_precision = value


_precision = threading.RLock()
_FEWER = ("bf16", "tf32")


class OneFloat(TorchFunctionMode):
    """Within a mod there is one float, the accumulation type, and one integer, of 64 bits (R1).

    What the mod reads is raised to them; a conversion to another type of float goes to it; a function that makes a
    float of whole numbers, such as q_idx / 3, makes that one.
    """

    def __init__(self, acc: torch.dtype):
        super().__init__()
        self.acc = acc

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if asks_what_it_is(func):
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name == "view" and any(isinstance(x, torch.dtype) for x in (*args, *kwargs.values())):
            raise TypeError("x.view(dtype) takes bits for another type, but in a mod there is one float and one integer (R1)")
        args, kwargs = tree_map(self.widened, (args, kwargs))
        if name in ("float", "double", "half", "bfloat16"):
            return args[0].to(self.acc)
        if name in _STEPS:
            args, kwargs = tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, (args, kwargs))
        if name == "int":
            return args[0].to(torch.int64)
        result = func(*args, **kwargs)
        if not isinstance(result, Tensor) or not result.is_floating_point() or result.dtype == self.acc:
            return result
        if not any(isinstance(x, Tensor) for x in (*args, *kwargs.values())):
            return func(*args, **kwargs | {"dtype": self.acc})
        numbers = name == "where"
        args = [x if numbers and i == 0 else self.raised(x, numbers) for i, x in enumerate(args)]
        return func(*args, **{k: self.raised(x, numbers) if k in _NUMBERS else x for k, x in kwargs.items()}).to(self.acc)

    def widened(self, x: object) -> object:
        """A tensor or a dtype, of the one float or the one integer where it is of another width."""
        dtype = x.dtype if isinstance(x, Tensor) else x
        if not isinstance(dtype, torch.dtype):
            return x
        # a conversion to fewer bits than 32 would wrap, and is not made another one
        narrow = _NARROW if isinstance(x, Tensor) else {torch.int32}
        wide = self.acc if dtype.is_floating_point else torch.int64 if dtype in narrow else dtype
        return wide if dtype is x else x if wide == dtype else x.to(wide)  # type: ignore[union-attr]

    def raised(self, x: object, numbers: bool) -> object:
        """A whole number as the one float; `numbers`: one of Python's, too, where it decides about the result's type."""
        if isinstance(x, Tensor):
            return x.to(self.acc)
        return torch.tensor(x, dtype=self.acc, device="cpu") if numbers and isinstance(x, (int, float)) else x
