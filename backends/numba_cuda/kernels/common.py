"""What every kernel shares: which thread owns which element of a tile, how tiles are fetched, where the listed blocks are.

A tile has ROW_TILE rows and COLUMN_TILE columns. SPREAD neighbouring lanes share a row; a thread owns ROWS rows and COLS columns,
always PAIR columns side by side. With ROWS = 2, SPREAD = 4, PAIR = 2 that is the layout of a matrix instruction's result.
"""
# hole: machine

# hole: constants


@device
def row_of(thread):
    """The first row of the tile that is a thread's; its i-th is down(i) further."""
    return thread // LANES * (LANES // SPREAD * ROWS) + thread % LANES // SPREAD


@device
def column_of(thread):
    """The first column of a tile, or of an accumulator, that is a thread's; its j-th is across(j) further."""
    return thread % SPREAD * PAIR


@device
def row_maximum(x):
    """The greatest of what the lanes of a row hold."""
    for step in unrolled(SPREAD_BITS):
        x = maximum(x, shuffle_xor(x, 1 << step))
    return x


@device
def row_total(x):
    """The sum of what the lanes of a row hold."""
    for step in unrolled(SPREAD_BITS):
        x = x + shuffle_xor(x, 1 << step)
    return x


@device
def smaller(a, b):
    return a if a < b else b


# hole: readers


# each: add_NAME, WIDTH, WIDE


@device
def finite_NAME(o_given, counts_given):
    """Whether an accumulator is finite in all the rows that count."""
    o = registers(ROWS, WIDE)
    counts = registers(ROWS)
    o = unpacked(o_given)
    counts = unpacked(counts_given)
    strange = False
    for i in unrolled(ROWS):
        for d in unrolled(WIDE):
            strange = strange | ((o[i, d] - o[i, d] != 0) & counts[i])
    return not strange


@device
def store_NAME(target, places_given, step, o_given, factors_given, my_column):
    """Rows of an accumulator times a factor each to global memory; a place of -1 is no row."""
    o = registers(ROWS, WIDE)
    places = registers(ROWS)
    factors = registers(ROWS)
    o = unpacked(o_given)
    places = unpacked(places_given)
    factors = unpacked(factors_given)
    for i in unrolled(ROWS):
        if places[i] >= 0:
            for d in unrolled(WIDE):
                if WIDTH == PADDED:
                    write_NAME(target, places[i] + (my_column + across(d)) * step, o[i, d] * factors[i])
                else:
                    if my_column + across(d) < WIDTH:
                        write_NAME(target, places[i] + (my_column + across(d)) * step, o[i, d] * factors[i])


# end


@device
def listed(t, list_row, offsets, indices, full_offsets, full_indices, tiles_a_block, block_size, tile, length):
    """(start, end, partial) of the t-th tile of a row of the block mask: first the partial blocks, then the full ones."""
    if HAS_LISTS:
        turn = t // tiles_a_block
        first = offsets[list_row]
        count = offsets[list_row + 1] - first
        partial = turn < count
        if partial:
            block = int64(indices[first + turn])
        else:
            block = int64(full_indices[full_offsets[list_row] + turn - count])
        start = block * block_size + (t - turn * tiles_a_block) * tile
        return start, smaller((block + 1) * block_size, length), partial
    else:
        return t * tile, length, False


@device
def tiles_listed(list_row, offsets, full_offsets, tiles_a_block):
    """How many tiles there are in a row of the block mask."""
    if HAS_LISTS:
        blocks = offsets[list_row + 1] - offsets[list_row] + full_offsets[list_row + 1] - full_offsets[list_row]
        return blocks * tiles_a_block
    else:
        return tiles_a_block


@device
def row_task(task, sizes, order):
    """(batch, first head, row of the block mask, first query) of a tile of query rows; rows with most blocks come first."""
    tiles = (smaller(sizes[Q_BLOCK], sizes[Q_LEN]) + Q_ROWS - 1) // Q_ROWS
    if HAS_LISTS:
        rest = task % sizes[RESTS]
        flat = task // sizes[RESTS]
        list_row = int64(order[flat // tiles])
        row = list_row % sizes[MASK_ROWS]
        head = list_row // sizes[MASK_ROWS]
        h0 = head % sizes[MASK_HEADS] + rest % sizes[HEADS_LEFT] * PACK
        b = head // sizes[MASK_HEADS] + rest // sizes[HEADS_LEFT]
        return b, h0, row, row * sizes[Q_BLOCK] + flat % tiles * Q_ROWS
    else:
        rest = task // tiles
        return rest // sizes[HEADS_LEFT], rest % sizes[HEADS_LEFT] * PACK, int64(0), task % tiles * Q_ROWS
