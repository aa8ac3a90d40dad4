"""A user's file: pyright checks the types that it asserts (make lint), and nothing runs it but pyright."""
from typing import assert_type

from torch import Tensor

from flexref import AuxOutput, AuxRequest, BlockMask, FlexKernelOptions, create_block_mask, flex_attention


def of_a_user(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    mask = create_block_mask(lambda b, h, q_idx, kv_idx: q_idx >= kv_idx, None, None, 64, 64)
    options: FlexKernelOptions = {"num_warps": 4, "BACKEND": "AUTO"}
    assert_type(mask, BlockMask)
    assert_type(flex_attention(query, key, value, block_mask=mask, kernel_options=options), Tensor)
    assert_type(flex_attention(query, key, value, None, mask, 0.1, True), Tensor)
    assert_type(flex_attention(query, key, value, return_lse=True), tuple[Tensor, Tensor])
    out, aux = flex_attention(query, key, value, return_aux=AuxRequest(lse=True), mask_mod=lambda b, h, q, kv: q >= kv)
    assert_type(out, Tensor)
    assert_type(aux, AuxOutput)
    return out


def of_a_wrapper(query: Tensor, key: Tensor, value: Tensor, lse: bool, aux: AuxRequest | None) -> None:
    x: Tensor | tuple[Tensor, Tensor] | tuple[Tensor, AuxOutput] = flex_attention(query, key, value, return_lse=lse)
    x = flex_attention(query, key, value, return_aux=aux)
    x = flex_attention(query, key, value, None, None, None, False, True)
    print(x)
