"""What numbers are within a mod (R1): one float and one integer, whatever widths PyTorch would give them."""
from __future__ import annotations

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

_NARROW = frozenset({torch.int8, torch.int16, torch.int32, torch.uint8, torch.uint16, torch.uint32})


class OneFloat(TorchFunctionMode):
    """Within a mod there is one float, the accumulation type, and one integer, of 64 bits (R1).

    What the mod reads is raised to them; a conversion to another type of float goes to it; a function that makes a
    float of whole numbers, such as q_idx / 3, makes that one. `acc` None leaves floats as they are.
    """

    def __init__(self, acc: torch.dtype | None):
        super().__init__()
        self.acc = acc

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        args, kwargs = tree_map(self.widened, (args, kwargs or {}))
        if self.acc and name in ("float", "double", "half", "bfloat16"):
            return args[0].to(self.acc)
        if name == "int":
            return args[0].to(torch.int64)
        result = func(*args, **kwargs)
        if not self.acc or not isinstance(result, Tensor) or not result.is_floating_point() or result.dtype == self.acc:
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
        # a conversion to fewer bits than 32 would wrap, and is not made another one
        narrow = _NARROW if isinstance(x, Tensor) else {torch.int32}
        wide = torch.int64 if dtype in narrow else dtype
        if dtype.is_floating_point and self.acc:
            wide = self.acc
        return wide if dtype is x else x if wide == dtype else x.to(wide)  # type: ignore[union-attr]

    def raised(self, x: object) -> object:
        """A whole number or a number of Python's as the one float."""
        if isinstance(x, Tensor):
            return x.to(self.acc)
        return torch.tensor(x, dtype=self.acc, device="cpu") if isinstance(x, (int, float)) else x
