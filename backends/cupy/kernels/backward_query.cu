// d query of one tile of query rows, which walks the same tiles of keys and values as in forward.
//
// FROM_SUM: backward_key has added it up already, in p.dq_sum. Then what is finite is only scaled and rounded, and the walk
// is for tiles where something is not: a masked NaN may have come in (R4), or a factor too large for float16.
#include "prelude.cuh"
#include "derivative.cuh"
#include "backward.cuh"

struct Stage {
    T k[TILE_SIZE<COLS, E_PAD>];
    T v[TILE_SIZE<COLS, V_PAD>];
};
struct alignas(128) Shared {
    T q[TILE_SIZE<ROWS, E_PAD>];
    T g[TILE_SIZE<ROWS, V_PAD>];
    Stage stages[STAGES];
    T kept[USES_KEPT ? TILE_SIZE<ROWS, COLS> : 1];
};
static_assert(sizeof(Shared) == SHARED_BYTES, "plan.py and this layout disagree");

DEVICE void load_stage(const Params& p, const Walk& walk, int item, long long k_at, long long v_at, Stage& stage) {
    const Tile tile = tile_of(p, walk, item);
    load_tile<COLS, E_PAD>(stage.k, p.k, K{}, (int)p.head_dim, [&](int row) {
        const int at = position(p, tile, row);
        return at < 0 ? -1ll : k_at + at * p.k.row;
    });
    load_tile<COLS, V_PAD>(stage.v, p.v, V{}, (int)p.value_dim, [&](int row) {
        const int at = position(p, tile, row);
        return at < 0 ? -1ll : v_at + at * p.v.row;
    });
}

// PLAIN: every position of the tile is there and allowed.
template <bool PLAIN> DEVICE void differentiate_tile(
    const Params& p, const Task& task, const Tile& tile, const Statistics (&rows)[TR], real scale, real (&s)[TR][TC],
    real (&grad)[TR][TC], int& wrong) {
    Sums none = {};
#pragma unroll
    for (int r = 0; r < TR; ++r) {
        const int q = task.first + (PLAIN ? row_of(r) : smaller(row_of(r), task.count - 1));
#pragma unroll
        for (int c = 0; c < TC; ++c) {
            const int at = PLAIN ? tile.first + col_of(c) : position(p, tile, col_of(c)), kv = at < 0 ? 0 : at;
            const bool there = at >= 0 && row_of(r) < task.count;
            differentiate<PLAIN>(
                p, s[r][c], grad[r][c], rows[r], scale, task.b, task.h, q, kv, there, tile.ask, false, none, wrong);
        }
    }
}

// What backward_key added up, and whether all of it is finite.
DEVICE bool read_sum(const Params& p, const Task& task, real (&dq)[TR][HELD<E_PAD>]) {
    clear(dq);
#pragma unroll
    for (int r = 0; r < TR; ++r) {
        if (row_of(r) >= task.count) continue;
        const long long at = (task.b * p.q_heads + task.h) * p.q_len + task.first + row_of(r);
        const real* from = (const real*)p.dq_sum + at * p.head_dim;
#pragma unroll
        for (int j = 0; j < HELD<E_PAD>; ++j)
            if (depth_of(j) < p.head_dim) dq[r][j] = from[depth_of(j)];
    }
    return !any_thread(not_finite(dq));
}

KERNEL __launch_bounds__(THREADS, 1) backward_query(PARAMETERS) {
    Shared& shared = *(Shared*)shared_memory();
    const Task task = task_of(p, blockIdx.x, (int)p.batch, (int)p.q_heads);
    if (task.count <= 0) return;
    real dq[TR][HELD<E_PAD>];
    if (FROM_SUM && read_sum(p, task, dq)) {
        write_rows(p.dq, Q{}, task, dq, p.head_dim, (real)p.scale);
        return;
    }
    const int kv_head = (int)(task.h / p.group);
    const long long k_at = task.b * p.k.b + kv_head * p.k.h, v_at = task.b * p.v.b + kv_head * p.v.h;
    const Walk walk = walk_of(p, task.b, task.h, task.row);
    const real scale = HAS_SCORE ? (real)p.scale : (real)p.scale * LOG2E;
    const bool idle = first_row_of_warp() >= task.count;
    int wrong = 0;
    Statistics rows[TR];
#pragma unroll
    for (int r = 0; r < TR; ++r)
        rows[r] = statistics_of(p, task.b, task.h, task.first + smaller(row_of(r), task.count - 1));
    load_tile<ROWS, E_PAD>(shared.q, p.q, Q{}, (int)p.head_dim, [&](int row) {
        return row < task.count ? task.b * p.q.b + task.h * p.q.h + (task.first + row) * p.q.row : -1ll;
    });
    load_tile<ROWS, V_PAD>(shared.g, p.g, Q{}, (int)p.value_dim, [&](int row) {
        return row < task.count ? task.b * p.g.b + task.h * p.g.h + (task.first + row) * p.g.row : -1ll;
    });
    for (int careful = FROM_SUM; careful < 2; ++careful) {
        clear(dq);
        for (int ahead = 0; ahead < STAGES - 1; ++ahead) {
            if (ahead < walk.tiles) load_stage(p, walk, ahead, k_at, v_at, shared.stages[ahead]);
            copy_commit();
        }
        for (int item = 0; item < walk.tiles; ++item) {
            Stage& stage = shared.stages[item % STAGES];
            if (STAGES == 1) {
                barrier();
                load_stage(p, walk, item, k_at, v_at, stage);
                copy_commit();
            }
            copy_wait<(STAGES > 2 ? STAGES - 2 : 0)>();
            barrier();
            if (STAGES > 1) {
                const int next = item + STAGES - 1;
                if (next < walk.tiles) load_stage(p, walk, next, k_at, v_at, shared.stages[next % STAGES]);
                copy_commit();
            }
            if (idle) continue;
            const Tile tile = tile_of(p, walk, item);
            real s[TR][TC] = {}, grad[TR][TC] = {};
            product_nt<E_PAD>(s, shared.q, stage.k);
            product_nt<V_PAD>(grad, shared.g, stage.v);
            if (plain(tile, task))
                differentiate_tile<true>(p, task, tile, rows, scale, s, grad, wrong);
            else
                differentiate_tile<false>(p, task, tile, rows, scale, s, grad, wrong);
            if (careful)
                careful_nn<E_PAD>(dq, grad, stage.k, shared.kept, masked_factor);
            else
                product_nn<E_PAD>(dq, grad, stage.k, shared.kept);
        }
        copy_commit();
        copy_wait<0>();
        if (!any_thread(not_finite(dq))) break;
    }
    write_rows(p.dq, Q{}, task, dq, p.head_dim, (real)p.scale);
}
