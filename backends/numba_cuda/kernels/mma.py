"""Products of tiles by the tensor cores' m16n8k16, for float16 and bfloat16; tiles hold the bits of the inputs.

The same functions as in fma.py. A warp has 16 rows. A register of `a` or `b` is two numbers side by side, fetched from shared
memory by ldmatrix, four 8 x 8 matrices at once; lane l gives the address of row l % 8 of matrix l // 8.
"""


@device
def a_place(lane):
    """Row and column, in a 16 x 16 piece, that a lane points ldmatrix at for the left operand, or for a right one read down."""
    return lane % 16, lane // 16 * 8


@device
def b_place(lane):
    """Row (that is n) and column (k), in a 16 x 16 piece, that a lane points ldmatrix at for two right operands."""
    return lane % 8 + lane // 16 * 8, lane // 8 % 2 * 8


# each: product_NAME, WIDTH, STEP


@device
def product_NAME(a, b, thread):
    s = registers(ROWS, COLS)
    for i in unrolled(ROWS):
        for j in unrolled(COLS):
            s[i, j] = real(0)
    lane = thread % LANES
    row, column = a_place(lane)
    a_at = (thread // LANES * 16 + row) * STEP + column
    row, column = b_place(lane)
    b_at = row * STEP + column
    for e in range(0, WIDTH, 16):
        a0, a1, a2, a3 = ldmatrix(a, a_at + e, 0)
        for n in unrolled(0, COLS // 2, 2):
            b0, b1, b2, b3 = ldmatrix(b, b_at + e, n * 8 * STEP)
            s[0, 2 * n], s[0, 2 * n + 1], s[1, 2 * n], s[1, 2 * n + 1] = mma(
                s[0, 2 * n], s[0, 2 * n + 1], s[1, 2 * n], s[1, 2 * n + 1], a0, a1, a2, a3, b0, b1
            )
            s[0, 2 * n + 2], s[0, 2 * n + 3], s[1, 2 * n + 2], s[1, 2 * n + 3] = mma(
                s[0, 2 * n + 2], s[0, 2 * n + 3], s[1, 2 * n + 2], s[1, 2 * n + 3], a0, a1, a2, a3, b2, b3
            )
    return packed(s)


# end


# each: add_NAME, WIDE, STEP


@device
def add_NAME(o_before, p_given, b, weights, thread):
    o = registers(ROWS, WIDE)
    p = registers(ROWS, COLS)
    o = unpacked(o_before)
    p = unpacked(p_given)
    row, column = a_place(thread % LANES)
    b_at = row * STEP + column
    for k in unrolled(COLS // 4):
        # the layout of a result is that of a left operand: two results side by side are 16 columns of it
        a0 = pack(p[0, 4 * k], p[0, 4 * k + 1])
        a1 = pack(p[1, 4 * k], p[1, 4 * k + 1])
        a2 = pack(p[0, 4 * k + 2], p[0, 4 * k + 3])
        a3 = pack(p[1, 4 * k + 2], p[1, 4 * k + 3])
        for n in unrolled(0, WIDE // 2, 2):
            b0, b1, b2, b3 = ldmatrix_down(b, b_at, k * 16 * STEP + n * 8)
            o[0, 2 * n], o[0, 2 * n + 1], o[1, 2 * n], o[1, 2 * n + 1] = mma(
                o[0, 2 * n], o[0, 2 * n + 1], o[1, 2 * n], o[1, 2 * n + 1], a0, a1, a2, a3, b0, b1
            )
            o[0, 2 * n + 2], o[0, 2 * n + 3], o[1, 2 * n + 2], o[1, 2 * n + 3] = mma(
                o[0, 2 * n + 2], o[0, 2 * n + 3], o[1, 2 * n + 2], o[1, 2 * n + 3], a0, a1, a2, a3, b2, b3
            )
    return packed(o)


@device
def add_NAME_carefully(o_before, p_given, b, weights, gone, thread):
    o = registers(ROWS, WIDE)
    p = registers(ROWS, COLS)
    x = registers(ROWS)
    o = unpacked(o_before)
    p = unpacked(p_given)
    lane = thread % LANES
    my_column = column_of(thread)
    for j in range(COLUMN_TILE):
        # column j is a register of one lane of the four that share a row
        register = j // (PAIR * SPREAD) * PAIR + j % PAIR
        owner = lane // SPREAD * SPREAD + j % (PAIR * SPREAD) // PAIR
        for i in unrolled(ROWS):
            x[i] = p[i, 0]
            for c in unrolled(1, COLS):
                x[i] = select(register == c, p[i, c], x[i])
            x[i] = shuffle(x[i], owner)
        for d in unrolled(WIDE):
            y = from_half(b[j * STEP + my_column + across(d)])
            for i in unrolled(ROWS):
                o[i, d] = select(x[i] == gone, o[i, d], o[i, d] + x[i] * y)
    return packed(o)


# end


# each: NAME, WIDTH, PADDED, STEP, RUNS


@device
def fetch_NAME(tile, tile_rows, source, base, row_step, col_step, count, rows_a_head, head_step, thread):
    """Rows of heads, rows_a_head of each, to shared memory as they are; zeros past the width and in rows past `count`.

    ALIGNED: rows are whole runs of 16 bytes, which travel in the background until `arrived`.
    """
    if ALIGNED:
        for r in range(thread // RUNS, tile_rows, THREADS // RUNS):
            row = r % rows_a_head
            for e in range(thread % RUNS * 8, PADDED, RUNS * 8):
                inside = (row < count) & (e < WIDTH)
                # an address that nothing is read from shall be a valid one, too
                start = select(inside, base + r // rows_a_head * head_step + row * row_step + e, int64(0))
                copy16(tile, r * STEP + e, source, start, inside)
    else:
        for r in range(thread // LANES, tile_rows, THREADS // LANES):
            row = r % rows_a_head
            at = base + r // rows_a_head * head_step + row * row_step
            for e in range(thread % LANES, PADDED, LANES):
                if (row < count) & (e < WIDTH):
                    tile[r * STEP + e] = source[at + e * col_step]
                else:
                    tile[r * STEP + e] = zero_bits


# end


@device
def arrived():
    """Wait for what this thread has fetched; a barrier must follow before others read it."""
    if ALIGNED:
        wait_copies()
