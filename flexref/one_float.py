"""What numbers are within a mod (R1): one float and one integer, whatever widths PyTorch would give them."""
from __future__ import annotations

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map


class OneFloat(TorchFunctionMode):
    """Within a mod there is one float, the accumulation type, and one integer, of 64 bits (R1).

    What the mod reads is raised to them; a conversion to another type of float goes to it; a function that makes a
    float of whole numbers, such as q_idx / 3, makes that one.
    """

    def __init__(self, acc: torch.dtype):
        super().__init__()
        self.acc = acc

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        args, kwargs = tree_map(self.widened, (args, kwargs or {}))
        if name in ("float", "double", "half", "bfloat16"):
            return args[0].to(self.acc)
        if name == "int":
            return args[0].to(torch.int64)
        result = func(*args, **kwargs)
        if not isinstance(result, Tensor) or not result.is_floating_point() or result.dtype == self.acc:
            return result
        if not any(isinstance(x, Tensor) for x in args):
            return func(*args, **kwargs | {"dtype": self.acc})
        first = 1 if name == "where" else 0
        return func(*args[:first], *map(self.raised, args[first:]), **kwargs).to(self.acc)

    def widened(self, x: object) -> object:
        """A tensor or a dtype, of the one float or the one integer where it is of another width."""
        dtype = x.dtype if isinstance(x, Tensor) else x
        if not isinstance(dtype, torch.dtype):
            return x
        wide = self.acc if dtype.is_floating_point else torch.int64 if dtype == torch.int32 else dtype
        return wide if dtype is x else x if wide == dtype else x.to(wide)  # type: ignore[union-attr]

    def raised(self, x: object) -> object:
        """A whole number or a number of Python's as the one float."""
        if isinstance(x, Tensor):
            return x.to(self.acc)
        return torch.tensor(x, dtype=self.acc, device="cpu") if isinstance(x, (int, float)) else x
