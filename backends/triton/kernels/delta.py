"""Before backward: of each row, <grad_out, out> less the gradient of lse, which the softmax takes off every weight's."""
import triton
import triton.language as tl


@triton.jit(do_not_specialize=("q_heads", "q_len"))
def delta(
    out, grad_out, grad_lse, result, g_b, g_h, g_row, g_column, q_heads, q_len,
    BLOCK_M: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_COLUMNS: tl.constexpr, HAS_LSE: tl.constexpr,
):
    bh = tl.program_id(1)
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, VALUE_COLUMNS)
    inside = row < q_len
    there = inside[:, None] & (columns < VALUE_DIM)[None, :]
    at = bh.to(tl.int64) * q_len + row
    from_out = tl.load(out + at[:, None] * VALUE_DIM + columns[None, :], mask=there, other=0.0).to(real)
    base = grad_out + (bh // q_heads).to(tl.int64) * g_b + (bh % q_heads).to(tl.int64) * g_h
    grad = tl.load(base + row.to(tl.int64)[:, None] * g_row + columns[None, :] * g_column, mask=there, other=0.0).to(real)
    total = tl.sum(from_out * grad, 1)
    if HAS_LSE:
        total -= tl.load(grad_lse + at, mask=inside, other=0.0).to(real)
    tl.store(result + at, total, mask=inside)
