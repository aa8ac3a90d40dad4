"""What the kernels share: loading rows, finding the next tile of a walk, products that a masked NaN cannot enter.

launch puts this text, and that of mods.py, before a kernel's own: together they are one module. Conventions of all:
b, h are the query's; q_idx, kv_idx have the shape (rows, 1) or (1, columns) of the tile; `real` is the accumulation type.
"""
import triton
import triton.language as tl
from triton.language.target_info import is_cuda

real, WIDE, COMPILED = tl.constexpr(tl.float32), tl.constexpr(False), tl.constexpr(True)
# hole: types
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def divide(a, b):
    """Rounded to nearest, which Triton's / is in float64 alone."""
    if real == tl.float32:
        return tl.div_rn(a, b)
    else:
        return a / b


@triton.jit
def minus(a, b):
    """a - b of a rounded a, and not of the product that a may be: both must have been rounded alike to cancel out."""
    if COMPILED and is_cuda():
        # a plain sub, of libdevice too, may become a fused multiply-add in the assembler
        if real == tl.float32:
            return tl.inline_asm_elementwise("sub.rn.f32 $0, $1, $2;", "=f,f,f", [a, b], tl.float32, True, 1)
        else:
            return tl.inline_asm_elementwise("sub.rn.f64 $0, $1, $2;", "=d,d,d", [a, b], tl.float64, True, 1)
    else:
        return a - b


@triton.jit
def rough_tanh(a):
    """Without a branch, to 4 units in the last place: near 0 an odd polynomial, fitted by least squares to 0.6, else by exp2."""
    size = tl.abs(a)
    square = a * a
    inner = -0.053875137 + square * (0.021116208 + square * -0.0062763804)
    near = a + a * square * (-0.33333331 + square * (0.13332924 + square * inner))
    # 2 log2(e)
    far = 1.0 - 2.0 / (tl.exp2(size * 2.8853900817779268) + 1.0)
    return tl.where(size < 0.6, near, tl.where(a < 0, -far, far))


@triton.jit
def square_root(a):
    """Rounded to nearest."""
    if real == tl.float32:
        return tl.sqrt_rn(a)
    else:
        return tl.sqrt(a)


@triton.jit
def step(index, stride):
    """How far an index of a tile is from its beginning; 32 bits are enough but for the greatest strides (WIDE)."""
    if WIDE:
        return index.to(tl.int64) * stride
    else:
        return index * stride


@triton.jit
def load_rows(base, rows, row_step, column_step, inside, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, CHECKED: tl.constexpr):
    """A tile (rows, COLUMNS) of which the first WIDTH columns are there; 0 for the others, and for rows not `inside`."""
    columns = tl.arange(0, COLUMNS)
    at = base + step(rows, row_step)[:, None] + step(columns, column_step)[None, :]
    if CHECKED and WIDTH < COLUMNS:
        return tl.load(at, mask=inside[:, None] & (columns < WIDTH)[None, :], other=0.0)
    elif CHECKED:
        return tl.load(at, mask=inside[:, None], other=0.0)
    elif WIDTH < COLUMNS:
        return tl.load(at, mask=(columns < WIDTH)[None, :], other=0.0)
    else:
        return tl.load(at)


@triton.jit
def load_few(base, rows, columns, row_step, column_step, inside, WIDTH: tl.constexpr):
    """Some columns of some rows; 0 where there are none."""
    there = inside[:, None] & (columns < WIDTH)[None, :]
    return tl.load(base + rows.to(tl.int64)[:, None] * row_step + step(columns, column_step)[None, :], mask=there, other=0.0)


@triton.jit
def load_tile(
    base, descriptor, b, h, first, rows, row_step, column_step, inside,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, CHECKED: tl.constexpr, TMA: tl.constexpr,
):
    """Rows `first` and on of one head, as load_rows; through the descriptor of the whole tensor where there is one."""
    if TMA:
        return descriptor.load([b, h, first, 0]).reshape(ROWS, COLUMNS)
    else:
        return load_rows(base + first.to(tl.int64) * row_step, rows, row_step, column_step, inside, COLUMNS, WIDTH, CHECKED)


@triton.jit
def listed(it, at, full_at, tail, indices, full_indices, CHECKED: tl.constexpr, LISTS: tl.constexpr, TILES: tl.constexpr):
    """The block that tile `it` of a walk lies in, and whether it is listed full.

    An unchecked walk goes through full blocks from `full_at`. A checked one goes through `tail` full ones, then through
    the partial ones from `at`. Without LISTS the blocks follow one another, and all are full.
    """
    entry = it // TILES
    if not LISTS:
        return full_at + entry, full_at >= 0
    elif not CHECKED:
        return tl.load(full_indices + full_at + entry), full_at >= 0
    else:
        full = entry < tail
        block = tl.load(full_indices + full_at + entry, mask=full, other=0)
        block += tl.load(indices + at + entry - tail, mask=entry >= tail, other=0)
        return block, full


@triton.jit
def row_range(offsets, full_offsets, full_indices, row, count, ragged, LISTS: tl.constexpr, EXACT: tl.constexpr):
    """Of a list: where its partial and its full blocks start, how many there are, how many of the full need no check.

    `count` is how many blocks there can be, `ragged` whether the last of them is cut off by the length. Only if EXACT
    do tiles fit into blocks.
    """
    if LISTS:
        at, full_at = tl.load(offsets + row).to(tl.int32), tl.load(full_offsets + row).to(tl.int32)
        partial = tl.load(offsets + row + 1).to(tl.int32) - at
        full = tl.load(full_offsets + row + 1).to(tl.int32) - full_at
        last = tl.load(full_indices + full_at + full - 1, mask=full > 0, other=0)
        cut = (full > 0) & (last == count - 1) & ragged
    else:
        at, full_at, partial, full = row * 0, row * 0, row * 0, row * 0 + count
        cut = ragged
    interior = full - cut.to(tl.int32)
    if not EXACT:
        interior = interior * 0
    return at, full_at, partial, full, interior


@triton.jit
def place_of(
    pid, order, lines, section, list_rows, replicas, heads, mask_heads, tiles, LISTS: tl.constexpr,
):
    """Which list program `pid` works on, and which tile of its block, line of blocks, batch and head that is.

    Lists by descending work come first. The heads of a section run beside one another, so that what they read stays in
    the cache; `replicas` are the batches and heads that share a list.
    """
    of_section = section * list_rows * tiles
    before = pid // of_section * section
    width = tl.minimum(section, replicas - before)
    rank, replica = pid % of_section // width, before + pid % of_section % width
    flat = rank // tiles
    if LISTS:
        flat = tl.load(order + flat)
    fan = tl.where(mask_heads == 1, heads, 1)
    b = flat // lines // mask_heads + replica // fan
    h = flat // lines % mask_heads + replica % fan
    return flat, rank % tiles, flat % lines, b, h


@triton.jit
def finite(x):
    """x with 0 for NaN and infinities."""
    wide = x.to(real)
    return tl.where(wide - wide == 0, x, tl.zeros_like(x))


@triton.jit
def careful_dot(weights, seen, x, acc, PRECISION: tl.constexpr):
    """acc + weights @ x where only the positions `seen` take part: 0 x NaN would be NaN where nobody looks (R4).

    The weights are not negative, so that an infinite x keeps its sign.
    """
    acc = tl.dot(weights.to(x.dtype), finite(x), acc, input_precision=PRECISION, out_dtype=real)
    counts, one = seen.to(tl.float16), tl.full(x.shape, 1.0, tl.float16)
    wide = x.to(real)
    nan = tl.dot(counts, tl.where(wide != wide, one, 0.0).to(tl.float16))
    up = tl.dot(counts, tl.where(wide == float("inf"), one, 0.0).to(tl.float16))
    down = tl.dot(counts, tl.where(wide == float("-inf"), one, 0.0).to(tl.float16))
    acc = tl.where(up > 0, acc + float("inf"), acc)
    acc = tl.where(down > 0, acc - float("inf"), acc)
    return tl.where(nan > 0, float("nan"), acc)


@triton.jit
def any_of(x):
    """Whether any element of a tile is true, as 0 or 1."""
    return tl.max(x.to(tl.int32))


@triton.jit
def write(
    acc, row_max, row_sum, row, inside, out, lse, max_scores, saved_max, saved_sum, out_row, scale, column, part, split, splits,
    FOLD: tl.constexpr, FUSED: tl.constexpr, SPLIT: tl.constexpr, COLUMNS: tl.constexpr, VALUE_DIM: tl.constexpr,
    SAVE: tl.constexpr, MAX_SCORES: tl.constexpr,
):
    """Columns `column` and on of out, and once the numbers of each row; or for SPLIT, the share as it is."""
    columns = column + tl.arange(0, COLUMNS)
    there = inside[:, None] & (columns < VALUE_DIM)[None, :]
    if SPLIT:
        at = row * splits + split
        tl.store(out + at[:, None] * VALUE_DIM + columns[None, :], acc, mask=there)
        tl.store(part + 2 * at, row_max, mask=inside)
        tl.store(part + 2 * at + 1, row_sum, mask=inside)
    else:
        inverse = tl.where(row_sum == 0, 0.0, divide(tl.full([], 1.0, real), row_sum))
        result = acc * inverse[:, None]
        tl.store(out + out_row[:, None] + columns[None, :], result.to(out.dtype.element_ty), mask=there)
        log_sum = libdevice.log(row_sum)
        if FUSED:
            top = row_max * LN2
        elif FOLD:
            top = row_max * scale
        else:
            top = row_max
        # a row that saw a NaN has a row_sum of NaN, whatever its greatest number is
        top = tl.where(row_sum == row_sum, top, row_sum)
        tl.store(lse + row, top + log_sum, mask=inside)
        if MAX_SCORES:
            tl.store(max_scores + row, top, mask=inside)
        if SAVE:
            empty = row_max == float("-inf")
            tl.store(saved_max + row, tl.where(empty, 0.0, row_max), mask=inside)
            tl.store(saved_sum + row, tl.where(empty, float("inf"), libdevice.log2(row_sum)), mask=inside)
