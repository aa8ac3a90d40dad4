"""One problem as the reference understands it: what compare.py and band.py pass around."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

INPUTS = ("query", "key", "value")


@dataclass(frozen=True)
class Call:
    """One problem as the reference understands it, on the CPU.

    `make_score(captured)` makes the score_mod over those tensors, so that it can also be made over float64 copies.
    `blocks`: None, or (listed, full) as reference.einsum takes them. `wanted`: inputs and captured names that get
    a gradient, of sum(out * grad_out) + sum(lse * grad_lse); None leaves that term out. `sinks`: so many of the last keys
    are none (sunk.py): nobody looks at their gradients.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scale: float | None = None
    make_score: Callable[[dict[str, Tensor]], Callable] | None = None
    mask_mod: Callable | None = None
    captured: dict[str, Tensor] = field(default_factory=dict)
    blocks: tuple[Tensor, Tensor] | None = None
    wanted: tuple[str, ...] = ()
    grad_out: Tensor | None = None
    grad_lse: Tensor | None = None
    sinks: int = 0

    def to(self, dtype: torch.dtype) -> Call:
        """Copies in `dtype` of everything that is a float."""

        def cast(x: Tensor | None) -> Tensor | None:
            return x.detach().to(dtype) if x is not None and x.is_floating_point() else x

        floats = {name: cast(getattr(self, name)) for name in (*INPUTS, "grad_out", "grad_lse")}
        return replace(self, **floats, captured={name: cast(x) for name, x in self.captured.items()})


@dataclass(frozen=True)
class Positions:
    """What score_mod was given: flat float64 scores (N,), and b, h, q_idx, kv_idx of the allowed positions."""

    score: Tensor
    index: tuple[Tensor, Tensor, Tensor, Tensor]
