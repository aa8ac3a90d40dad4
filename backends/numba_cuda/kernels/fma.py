"""Products of tiles by ordinary multiply-add, each thread for the elements that it owns. Every dtype; tiles hold `real`.

This file and mma.py are the two ways to multiply; both have these functions:

    product_NAME        s[i, j]  = sum over e of a[row i, e] * b[column j, e]
    add_NAME            o[i, d] += sum over j of p[row i, j] * b[j, column d], for tiles of values or of keys and queries
    add_NAME_carefully  the same without the p that are `gone`: 0 times NaN would be NaN there (R4)
"""


# each: product_NAME, WIDTH, STEP


@device
def product_NAME(a, b, thread):
    s = registers(ROWS, COLS)
    x = registers(ROWS)
    a_at = registers(ROWS)
    b_at = registers(COLS)
    my_row = row_of(thread)
    my_column = column_of(thread)
    for i in unrolled(ROWS):
        a_at[i] = (my_row + down(i)) * STEP
    for j in unrolled(COLS):
        b_at[j] = (my_column + across(j)) * STEP
    for i in unrolled(ROWS):
        for j in unrolled(COLS):
            s[i, j] = real(0)
    for e in range(WIDTH):
        for i in unrolled(ROWS):
            x[i] = a[a_at[i] + e]
        for j in unrolled(COLS):
            y = b[b_at[j] + e]
            for i in unrolled(ROWS):
                s[i, j] += x[i] * y
    return packed(s)


# end


# each: add_NAME, WIDE, STEP


@device
def add_NAME(o_before, p_given, b, weights, thread):
    o = registers(ROWS, WIDE)
    p = registers(ROWS, COLS)
    x = registers(ROWS)
    at = registers(ROWS)
    o = unpacked(o_before)
    p = unpacked(p_given)
    my_row = row_of(thread)
    my_column = column_of(thread)
    for i in unrolled(ROWS):
        at[i] = (my_row + down(i)) * WEIGHTS_STEP
        for j in unrolled(COLS):
            weights[at[i] + my_column + across(j)] = p[i, j]
    sync_warp()
    for j in range(COLUMN_TILE):
        for i in unrolled(ROWS):
            x[i] = weights[at[i] + j]
        for d in unrolled(WIDE):
            y = b[j * STEP + my_column + across(d)]
            for i in unrolled(ROWS):
                o[i, d] += x[i] * y
    sync_warp()
    return packed(o)


@device
def add_NAME_carefully(o_before, p_given, b, weights, gone, thread):
    o = registers(ROWS, WIDE)
    p = registers(ROWS, COLS)
    x = registers(ROWS)
    at = registers(ROWS)
    o = unpacked(o_before)
    p = unpacked(p_given)
    my_row = row_of(thread)
    my_column = column_of(thread)
    for i in unrolled(ROWS):
        at[i] = (my_row + down(i)) * WEIGHTS_STEP
        for j in unrolled(COLS):
            weights[at[i] + my_column + across(j)] = p[i, j]
    sync_warp()
    for j in range(COLUMN_TILE):
        for i in unrolled(ROWS):
            x[i] = weights[at[i] + j]
        for d in unrolled(WIDE):
            y = b[j * STEP + my_column + across(d)]
            for i in unrolled(ROWS):
                o[i, d] = select(x[i] == gone, o[i, d], o[i, d] + x[i] * y)
    sync_warp()
    return packed(o)


# end


# each: NAME, WIDTH, PADDED, STEP


@device
def fetch_NAME(tile, tile_rows, source, base, row_step, col_step, count, rows_a_head, head_step, thread):
    """Rows of heads, rows_a_head of each, to shared memory as `real`; zeros past the width and in rows past `count`."""
    for r in range(thread // LANES, tile_rows, THREADS // LANES):
        row = r % rows_a_head
        at = base + r // rows_a_head * head_step + row * row_step
        for e in range(thread % LANES, PADDED, LANES):
            if (row < count) & (e < WIDTH):
                tile[r * STEP + e] = read_NAME(source, at + e * col_step)
            else:
                tile[r * STEP + e] = real(0)


# end


@device
def arrived():
    """Nothing is fetched in the background."""
