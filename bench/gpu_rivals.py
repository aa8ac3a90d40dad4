"""What an engine is timed beside on a GPU: torch's compiled flex_attention, and SDPA's kernels where they have the variant."""
from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask as torch_block_mask
from torch.nn.attention.flex_attention import flex_attention as torch_flex

from bench.cases import Variant

if TYPE_CHECKING:
    from bench.gpu import GpuBench

FLEX, FA2, CUDNN = "torch flex", "FlashAttention-2", "cuDNN"
KERNELS = {FA2: SDPBackend.FLASH_ATTENTION, CUDNN: SDPBackend.CUDNN_ATTENTION}


def rivals(bench: GpuBench, variant: Variant, inputs: tuple[Tensor, ...]) -> dict[str, Callable[[], Tensor]]:
    """The calls that run here, by name. On the CPU, where this only rehearses, none is compiled."""
    found = _flex(bench, variant, inputs) if bench.device == "cuda" else {}
    if variant.name in ("full", "causal"):
        for name, kernel in KERNELS.items():
            found[name] = lambda k=kernel: _sdpa(inputs, variant.name == "causal", k)
    return {name: call for name, call in found.items() if _runs(bench, name, call)}


def _flex(bench: GpuBench, variant: Variant, inputs: tuple[Tensor, ...]) -> dict[str, Callable[[], Tensor]]:
    length = inputs[0].shape[2]
    mask = None
    if variant.mask_mod is not None:
        mask = torch_block_mask(variant.mask_mod, None, None, length, length, device=bench.device)
    found: dict[str, Callable[[], Tensor]] = {}
    for mode in ("default", "max-autotune-no-cudagraphs") if bench.autotuned else ("default",):
        torch._dynamo.reset()
        compiled = torch.compile(torch_flex, dynamic=False, mode=mode)
        name = FLEX if mode == "default" else f"{FLEX}, autotuned"
        found[name] = lambda c=compiled: c(*inputs, score_mod=variant.score_mod, block_mask=mask)
    return found


def _sdpa(inputs: tuple[Tensor, ...], causal: bool, kernel: SDPBackend) -> Tensor:
    with sdpa_kernel(kernel):
        return F.scaled_dot_product_attention(inputs[0], inputs[1], inputs[2], is_causal=causal)


def _runs(bench: GpuBench, name: str, call: Callable[[], Tensor]) -> bool:
    try:
        call()
        return True
    except Exception as error:
        bench.say(f"          {name} does not run this: {type(error).__name__}: {str(error)[:200]}")
        return False
