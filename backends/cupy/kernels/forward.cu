// out, lse and what backward wants, for one tile of query rows of one head (PACKED: of all heads that share a key head).
//
// The walk is software-pipelined over STAGES buffers of keys and values; softmax is online. If a result is not finite the
// tile is walked once more, carefully: then masked values are left out instead of being multiplied by 0 (R4).
#include "prelude.cuh"

struct Stage {
    T k[TILE_SIZE<COLS, E_PAD>];
    T v[TILE_SIZE<COLS, V_PAD>];
};
struct alignas(128) Shared {
    T q[TILE_SIZE<ROWS, E_PAD>];
    Stage stages[STAGES];
    T kept[USES_KEPT ? TILE_SIZE<ROWS, COLS> : 8];
    // what registers have no room for
    Task task;
    Walk walk;
};
static_assert(sizeof(Shared) == SHARED_BYTES, "launch.py and this layout disagree");

struct Row {
    int h, q;
};
// the query head and position of a row of the tile
DEVICE Row query_row(const Params& p, const Task& task, int row) {
    const int at = task.first + row;
    if (!PACKED) return {task.h, at};
    return {(int)(task.h * p.group + at / p.q_len), (int)(at % p.q_len)};
}

// Scores of one tile become those of score_mod, or -inf where a position is masked.
template <bool PLAIN>
DEVICE void modify(const Params& p, const Task& task, const Tile& tile, real scale, real (&s)[TR][TC], int& wrong) {
#pragma unroll
    for (int r = 0; r < TR; ++r) {
        const bool is_row = PLAIN || row_of(r) < task.count;
        const Row row = query_row(p, task, is_row ? row_of(r) : 0);
#pragma unroll
        for (int c = 0; c < TC; ++c) {
            const int at = PLAIN ? tile.first + col_of(c) : position(p, tile, col_of(c)), kv = at < 0 ? 0 : at;
            const bool there = is_row && at >= 0;
            bool allowed = there;
            if (!PLAIN && tile.ask) allowed = mask_mod(p, task.b, row.h, row.q, kv, there, wrong) && there;
            const real score = score_mod(p, s[r][c] * scale, task.b, row.h, row.q, kv, allowed, wrong);
            s[r][c] = allowed ? score : -INFINITE;
        }
    }
}

// Scores become weights against the new maximum; what was summed before shrinks with it. Careful: -1 where masked.
DEVICE void soften(real (&s)[TR][TC], real (&row_max)[TR], real (&row_sum)[TR], real (&o)[TR][HELD<V_PAD>], bool careful) {
    real shrink[TR];
    bool grown = false;
#pragma unroll
    for (int r = 0; r < TR; ++r) {
        real top = row_max[r];
#pragma unroll
        for (int c = 0; c < TC; ++c) top = s[r][c] > top ? s[r][c] : top;
        top = row_max_of(top);
        const real base = top == -INFINITE ? (real)0 : top;
        shrink[r] = power(row_max[r], base);
        grown |= top != row_max[r];
        row_max[r] = top;
        real sum = 0;
#pragma unroll
        for (int c = 0; c < TC; ++c) {
            const real weight = power(s[r][c], base);
            sum += weight;
            s[r][c] = careful && s[r][c] == -INFINITE ? (real)-1 : weight;
        }
        row_sum[r] = row_sum[r] * shrink[r] + sum;
    }
    // after the first tiles of a row its maximum seldom changes
    if (!any_lane(grown)) return;
#pragma unroll
    for (int r = 0; r < TR; ++r)
#pragma unroll
        for (int j = 0; j < HELD<V_PAD>; ++j) o[r][j] *= shrink[r];
}

DEVICE void load_stage(const Params& p, const Task& task, const Walk& walk, int item, Stage& stage) {
    const Tile tile = tile_of(p, walk, item);
    const int kv_head = PACKED ? task.h : task.h / (int)p.group;
    load_tile<COLS, E_PAD>(stage.k, p.k, K{}, (int)p.head_dim, [&](int row) {
        const int at = position(p, tile, row);
        return at < 0 ? -1ll : task.b * p.k.b + kv_head * p.k.h + at * p.k.row;
    });
    load_tile<COLS, V_PAD>(stage.v, p.v, V{}, (int)p.value_dim, [&](int row) {
        const int at = position(p, tile, row);
        return at < 0 ? -1ll : task.b * p.v.b + kv_head * p.v.h + at * p.v.row;
    });
}

// Divide by the sum and write: rows of out, lse, max_scores, and what backward wants; or, of a split, what combine wants.
DEVICE void write(
    const Params& p, const Task& task, real (&row_max)[TR], real (&row_sum)[TR], real (&o)[TR][HELD<V_PAD>]) {
#pragma unroll
    for (int r = 0; r < TR; ++r) {
        if (row_of(r) >= task.count) continue;
        const Row row = query_row(p, task, row_of(r));
        const long long at = (task.b * p.q_heads + row.h) * p.q_len + row.q;
        if (SPLIT) {
            // of each query row: its splits, each row_max, row_sum and the unfinished out
            real* to = (real*)p.partial + (at * p.splits + task.split) * (2 + p.value_dim);
            if (depth_of(0) == 0) to[0] = row_max[r], to[1] = row_sum[r];
#pragma unroll
            for (int j = 0; j < HELD<V_PAD>; ++j)
                if (depth_of(j) < p.value_dim) to[2 + depth_of(j)] = o[r][j];
            continue;
        }
        const real inverse = row_sum[r] == 0 ? (real)0 : (real)1 / row_sum[r];
        Q* to = (Q*)p.o.at + task.b * p.o.b + row.h * p.o.h + row.q * p.o.row;
#pragma unroll
        for (int j = 0; j < HELD<V_PAD>; ++j)
            if (depth_of(j) < p.value_dim) narrow(to[depth_of(j) * p.o.col], o[r][j] * inverse);
        if (depth_of(0) == 0) write_statistics(p, at, row_max[r], row_sum[r]);
    }
}

KERNEL __launch_bounds__(THREADS, 1) forward(PARAMETERS) {
    Shared& shared = *(Shared*)shared_memory();
    if (threadIdx.x == 0) {
        shared.task = task_of(p, blockIdx.x, (int)p.batch, (int)(PACKED ? p.kv_heads : p.q_heads));
        shared.walk = walk_of(p, shared.task.b, shared.task.h, shared.task.row);
    }
    barrier();
    const Task& task = shared.task;
    const Walk& walk = shared.walk;
    if (task.count <= 0) return;
    const int begin = (int)(walk.tiles * (long long)task.split / p.splits);
    const int end = (int)(walk.tiles * (task.split + 1ll) / p.splits);
    // without a score_mod, scores are powers of two from the start
    const real scale = HAS_SCORE ? (real)p.scale : (real)p.scale * LOG2E;
    const bool idle = first_row_of_warp() >= task.count;
    int wrong = 0;
    real row_max[TR], row_sum[TR], o[TR][HELD<V_PAD>];
    load_tile<ROWS, E_PAD>(shared.q, p.q, Q{}, (int)p.head_dim, [&](int row) {
        if (row >= task.count) return -1ll;
        const Row at = query_row(p, task, row);
        return task.b * p.q.b + at.h * p.q.h + at.q * p.q.row;
    });
    for (int careful = 0; careful < 2; ++careful) {
#pragma unroll
        for (int r = 0; r < TR; ++r) {
            row_max[r] = -INFINITE;
            row_sum[r] = 0;
#pragma unroll
            for (int j = 0; j < HELD<V_PAD>; ++j) o[r][j] = 0;
        }
        for (int ahead = 0; ahead < STAGES - 1; ++ahead) {
            if (begin + ahead < end) load_stage(p, task, walk, begin + ahead, shared.stages[ahead]);
            copy_commit();
        }
        for (int item = begin; item < end; ++item) {
            Stage& stage = shared.stages[(item - begin) % STAGES];
            if (STAGES == 1) {
                barrier();
                load_stage(p, task, walk, item, stage);
                copy_commit();
            }
            copy_wait<(STAGES > 2 ? STAGES - 2 : 0)>();
            barrier();
            if (STAGES > 1) {
                const int next = item + STAGES - 1;
                if (next < end) load_stage(p, task, walk, next, shared.stages[(next - begin) % STAGES]);
                copy_commit();
            }
            if (idle) continue;
            const Tile tile = tile_of(p, walk, item);
            real s[TR][TC] = {};
            product_nt<E_PAD>(s, shared.q, stage.k);
            if (plain(tile, task))
                modify<true>(p, task, tile, scale, s, wrong);
            else
                modify<false>(p, task, tile, scale, s, wrong);
            soften(s, row_max, row_sum, o, careful);
            if (careful)
                careful_nn<V_PAD>(o, s, stage.v, shared.kept, [](real x) { return x < 0; });
            else
                product_nn<V_PAD>(o, s, stage.v, shared.kept);
        }
        bool strange = false;
#pragma unroll
        for (int r = 0; r < TR; ++r) {
            row_sum[r] = row_sum_of(row_sum[r]);
#pragma unroll
            for (int j = 0; j < HELD<V_PAD>; ++j) strange |= !(o[r][j] - o[r][j] == 0);
        }
        copy_commit();
        copy_wait<0>();
        if (!any_thread(strange)) break;
    }
    write(p, task, row_max, row_sum, o);
    if (CHECKED && wrong) *p.wrong = 1;
}
