// d key and d value of one tile of keys of one head, which walks the tiles of query rows that read it, of every query head
// (and, where the batch of keys is shared, of every batch). Scores are transposed: rows are keys, columns are queries.
//
// DK, DV, DQ, CAPTURED: what is wanted. DQ is added to p.dq_sum with atomics, as captured gradients are to p.accumulators.
// ORDERED: a thread block has accumulators of its own, and its warps add to them one after the other (SERIAL: its threads),
// so that the same call gives the same bits. If a result is not finite the tile is walked once more, carefully (R4), adding nothing twice.
#include "prelude.cuh"
#include "derivative.cuh"
#include "backward.cuh"

struct Stage {
    T q[TILE_SIZE<COLS, E_PAD>];
    T g[TILE_SIZE<COLS, V_PAD>];
    Statistics rows[COLS];
};
struct alignas(128) Shared {
    T k[TILE_SIZE<ROWS, E_PAD>];
    T v[TILE_SIZE<ROWS, V_PAD>];
    T kept[TILE_SIZE<ROWS, COLS>];
    Stage stages[STAGES];
    // what registers have no room for: the tile, and the walk over the query rows of one batch and head
    Task task;
    int b, h;
    Walk walk;
};
static_assert(sizeof(Shared) == SHARED_BYTES, "plan.py and this layout disagree");
constexpr bool WEIGHTS_ONLY = !DK && !DQ && !CAPTURED;

DEVICE void load_stage(const Params& p, const Walk& walk, int item, int b, int h, Stage& stage) {
    const Tile tile = tile_of(p, walk, item);
    load_tile<COLS, E_PAD>(stage.q, p.q, Q{}, (int)p.head_dim, [&](int row) {
        const int at = position(p, tile, row);
        return at < 0 ? -1ll : b * p.q.b + h * p.q.h + at * p.q.row;
    });
    load_tile<COLS, V_PAD>(stage.g, p.g, Q{}, (int)p.value_dim, [&](int row) {
        const int at = position(p, tile, row);
        return at < 0 ? -1ll : b * p.g.b + h * p.g.h + at * p.g.row;
    });
    for (int c = threadIdx.x; c < COLS; c += THREADS) {
        const int at = position(p, tile, c);
        stage.rows[c] = at < 0 ? Statistics{} : statistics_of(p, b, h, at);
    }
}

// PLAIN: every position of the tile is there and allowed.
template <bool PLAIN> DEVICE void differentiate_tile(
    const Params& p, const Shared& shared, const Tile& tile, const Stage& stage, real scale, bool adds, real (&s)[TR][TC],
    real (&grad)[TR][TC], Sums& sums, int& wrong) {
    const Task& task = shared.task;
#pragma unroll
    for (int c = 0; c < TC; ++c) {
        const int at = PLAIN ? tile.first + col_of(c) : position(p, tile, col_of(c)), q = at < 0 ? 0 : at;
        const Statistics row = stage.rows[col_of(c)];
#pragma unroll
        for (int r = 0; r < TR; ++r) {
            const int kv = task.first + (PLAIN ? row_of(r) : smaller(row_of(r), task.count - 1));
            const bool there = at >= 0 && row_of(r) < task.count;
            differentiate<PLAIN>(
                p, s[r][c], grad[r][c], row, scale, shared.b, shared.h, q, kv, there, tile.ask, adds, sums, wrong);
        }
    }
}

DEVICE void add_to_query(const Params& p, const Tile& tile, int b, int h, const T* kept, const T* k) {
    product_tn<E_PAD>(kept, k, [&](int col, int depth, real x) {
        const int at = position(p, tile, col);
        if (at < 0 || depth >= p.head_dim) return;
        add_atomically((real*)p.dq_sum + ((b * p.q_heads + h) * p.q_len + at) * p.head_dim + depth, x);
    });
}

DEVICE void walk_queries(
    const Params& p, Shared& shared, bool careful, real (&dk)[TR][HELD<E_PAD>], real (&dv)[TR][HELD<V_PAD>], int& wrong) {
    const Task& task = shared.task;
    const Walk& walk = shared.walk;
    const real scale = HAS_SCORE ? (real)p.scale : (real)p.scale * LOG2E;
    const bool idle = !DQ && !ORDERED && first_row_of_warp() >= task.count;
    for (int ahead = 0; ahead < STAGES - 1; ++ahead) {
        if (ahead < walk.tiles) load_stage(p, walk, ahead, shared.b, shared.h, shared.stages[ahead]);
        copy_commit();
    }
    for (int item = 0; item < walk.tiles; ++item) {
        Stage& stage = shared.stages[item % STAGES];
        if (STAGES == 1) {
            barrier();
            load_stage(p, walk, item, shared.b, shared.h, stage);
            copy_commit();
        }
        copy_wait<(STAGES > 2 ? STAGES - 2 : 0)>();
        barrier();
        if (STAGES > 1) {
            const int next = item + STAGES - 1;
            if (next < walk.tiles) load_stage(p, walk, next, shared.b, shared.h, shared.stages[next % STAGES]);
            copy_commit();
        }
        if (idle) continue;
        const Tile tile = tile_of(p, walk, item);
        real s[TR][TC] = {}, grad[TR][TC] = {};
        product_nt<E_PAD>(s, shared.k, stage.q);
        if (!WEIGHTS_ONLY) product_nt<V_PAD>(grad, shared.v, stage.g);
        Sums sums = {};
        for (int turn = 0; turn < (SERIAL ? THREADS : 1); ++turn) {
            if (!SERIAL && plain(tile, task))
                differentiate_tile<true>(p, shared, tile, stage, scale, CAPTURED && !careful, s, grad, sums, wrong);
            else if (!SERIAL || threadIdx.x == turn)
                differentiate_tile<false>(p, shared, tile, stage, scale, CAPTURED && !careful, s, grad, sums, wrong);
            if (SERIAL) barrier();
        }
        if (HAS_SUMS && !careful) add_sums(sums, accumulators_of(p));
        if (careful) {
            if (DV) careful_nn<V_PAD>(dv, s, stage.g, shared.kept, masked_factor);
            if (DK) careful_nn<E_PAD>(dk, grad, stage.q, shared.kept, masked_factor);
        } else {
            if (DV) product_nn<V_PAD>(dv, s, stage.g, shared.kept);
            if (DK) product_nn<E_PAD>(dk, grad, stage.q, shared.kept);
        }
        if (DQ && !careful) {
            keep_factors(grad, shared.kept);
            barrier();
            add_to_query(p, tile, shared.b, shared.h, shared.kept, shared.k);
        }
    }
    copy_commit();
    copy_wait<0>();
}

DEVICE void key_tile(const Params& p, Shared& shared, int& wrong) {
    real dk[TR][HELD<E_PAD>], dv[TR][HELD<V_PAD>];
    const Task& task = shared.task;
    load_tile<ROWS, E_PAD>(shared.k, p.k, K{}, (int)p.head_dim, [&](int row) {
        return row < task.count ? task.b * p.k.b + task.h * p.k.h + (task.first + row) * p.k.row : -1ll;
    });
    load_tile<ROWS, V_PAD>(shared.v, p.v, V{}, (int)p.value_dim, [&](int row) {
        return row < task.count ? task.b * p.v.b + task.h * p.v.h + (task.first + row) * p.v.row : -1ll;
    });
    const int batches = (int)(p.batch / p.kv_batch);
    for (int careful = 0; careful < 2; ++careful) {
        if (DK) clear(dk);
        if (DV) clear(dv);
        for (int turn = 0; turn < batches * p.group; ++turn) {
            barrier();
            if (threadIdx.x == 0) {
                shared.b = task.b + (int)(turn / p.group);
                shared.h = (int)(task.h * p.group + turn % p.group);
                shared.walk = walk_of(p, shared.b, shared.h, task.row);
            }
            barrier();
            walk_queries(p, shared, careful, dk, dv, wrong);
        }
        if (!any_thread((DK && not_finite(dk)) || (DV && not_finite(dv)))) break;
    }
    if (DK) write_rows(p.dk, K{}, task, dk, p.head_dim, (real)p.scale);
    if (DV) write_rows(p.dv, V{}, task, dv, p.value_dim, (real)1);
}

KERNEL __launch_bounds__(THREADS, 1) backward_key(PARAMETERS) {
    Shared& shared = *(Shared*)shared_memory();
    int wrong = 0;
    // as many thread blocks as tasks, or fewer with accumulators of their own
    for (long long id = blockIdx.x; id < p.tasks; id += gridDim.x) {
        barrier();
        if (threadIdx.x == 0) shared.task = task_of(p, id, (int)p.kv_batch, (int)p.kv_heads);
        barrier();
        if (shared.task.count > 0) key_tile(p, shared, wrong);
    }
}
