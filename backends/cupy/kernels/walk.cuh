// Which tile a thread block works on, and which tiles of the other side it walks: those that the block lists name.
#pragma once

// A tile's own positions: `count` from `first`, of one batch and head; `row` is its row of blocks.
struct Task {
    int b, h, row, first, count, split;
};

// One step of a walk: up to COLS positions of the other side; `ask`: mask_mod decides about them.
struct Tile {
    const int* blocks;  // GATHER: the blocks whose positions are side by side
    int first, count;
    bool ask;
};

// The walk of one tile: `parts` of tiles to be asked, then those of full blocks.
struct Walk {
    const int* partial;
    const int* full;
    int partial_blocks, full_blocks, partial_tiles, tiles;
};

DEVICE int ceil_div(long long a, int b) { return (int)((a + b - 1) / b); }

// `heads`: of the tiles' own side. With an order (over all flat rows of the mask) the rows with the most work come first.
DEVICE Task task_of(const Params& p, long long id, int batches, int heads) {
    Task task;
    task.split = (int)(id % p.splits);
    id /= p.splits;
    const int part = (int)(id % p.tiles);
    id /= p.tiles;
    const bool by_head = OWN_HEADS_ARE_THE_MASKS;
    const long long mask_batch = by_head ? p.mask_batch : 1, mask_heads = by_head ? p.mask_heads : 1;
    const long long rows = mask_batch * mask_heads * p.mask_rows;
    const long long at = id % rows, others = id / rows;
    const long long flat = p.order ? p.order[at] : by_head ? rows - 1 - at : at;
    const long long spread = heads / mask_heads;
    task.row = (int)(flat % p.mask_rows);
    task.h = (int)(mask_heads > 1 ? flat / p.mask_rows % mask_heads : others % spread);
    task.b = (int)(mask_batch > 1 ? flat / p.mask_rows / mask_heads : others / spread);
    task.first = (int)(task.row * p.own_block + (long long)part * ROWS);
    const long long end = smaller((task.row + 1) * p.own_block, p.own_len);
    task.count = (int)smaller((long long)ROWS, end - task.first);
    return task;
}

DEVICE Walk walk_of(const Params& p, int b, int h, int row) {
    Walk walk = {};
    if (!HAS_LISTS) {
        walk.partial_tiles = walk.tiles = ceil_div(p.list_len, COLS);
        return walk;
    }
    const long long flat = ((p.mask_batch > 1 ? b : 0) * p.mask_heads + (p.mask_heads > 1 ? h : 0)) * p.mask_rows + row;
    const long long first = p.offsets[flat], full_first = p.full_offsets[flat];
    walk.partial = p.indices + first;
    walk.full = p.full_indices + full_first;
    walk.partial_blocks = (int)(p.offsets[flat + 1] - first);
    walk.full_blocks = (int)(p.full_offsets[flat + 1] - full_first);
    if (GATHER) {
        const int together = COLS / (int)p.list_block;
        walk.partial_tiles = ceil_div(walk.partial_blocks, together);
        walk.tiles = walk.partial_tiles + ceil_div(walk.full_blocks, together);
    } else {
        const int tiles = ceil_div(smaller(p.list_block, p.list_len), COLS);
        walk.partial_tiles = walk.partial_blocks * tiles;
        walk.tiles = walk.partial_tiles + walk.full_blocks * tiles;
    }
    return walk;
}

DEVICE Tile tile_of(const Params& p, const Walk& walk, int item) {
    Tile tile = {};
    tile.ask = HAS_MASK && item < walk.partial_tiles;
    if (!HAS_LISTS) {
        tile.first = item * COLS;
        tile.count = (int)smaller((long long)COLS, p.list_len - tile.first);
        return tile;
    }
    const bool full = item >= walk.partial_tiles;
    const int* blocks = full ? walk.full : walk.partial;
    if (full) item -= walk.partial_tiles;
    if (GATHER) {
        const int together = COLS / (int)p.list_block;
        tile.blocks = blocks + item * together;
        const int left = (full ? walk.full_blocks : walk.partial_blocks) - item * together;
        tile.count = smaller(together, left) * (int)p.list_block;
    } else {
        const int tiles = ceil_div(smaller(p.list_block, p.list_len), COLS);
        const long long block = blocks[item / tiles];
        tile.first = (int)(block * p.list_block + item % tiles * COLS);
        const long long end = smaller((block + 1) * p.list_block, p.list_len);
        tile.count = (int)smaller((long long)COLS, end - tile.first);
    }
    return tile;
}

// The position of a tile's column `c`, or -1 if it has none.
DEVICE int position(const Params& p, const Tile& tile, int c) {
    if (c >= tile.count) return -1;
    if (!GATHER) return tile.first + c;
    const int block = (int)p.list_block;
    const long long at = (long long)tile.blocks[c / block] * block + c % block;
    return at < p.list_len ? (int)at : -1;
}

// Whether every position of a tile is there and allowed.
DEVICE bool plain(const Tile& tile, const Task& task) {
    return !GATHER && !tile.ask && tile.count == COLS && task.count == ROWS;
}
