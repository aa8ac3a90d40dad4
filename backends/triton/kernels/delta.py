"""Before backward: of each row, <grad_out, out> less the gradient of lse, which the softmax takes off every weight's."""
import triton
import triton.language as tl


@triton.jit(do_not_specialize=("q_heads", "q_len", "count"))
def delta(
    out, grad_out, grad_lse, result, g_b, g_h, g_row, g_column, q_heads, q_len, count,
    BLOCK_M: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_COLUMNS: tl.constexpr, HAS_LSE: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, VALUE_COLUMNS)
    inside = at < count
    there = inside[:, None] & (columns < VALUE_DIM)[None, :]
    b, h, row = at // q_len // q_heads, at // q_len % q_heads, at % q_len
    from_out = tl.load(out + at[:, None] * VALUE_DIM + columns[None, :], mask=there, other=0.0).to(real)
    start = b * g_b + h * g_h + row * g_row
    grad = tl.load(grad_out + start[:, None] + step(columns, g_column)[None, :], mask=there, other=0.0).to(real)
    total = tl.sum(from_out * grad, 1)
    if HAS_LSE:
        total -= tl.load(grad_lse + at, mask=inside, other=0.0).to(real)
    tl.store(result + at, total, mask=inside)
