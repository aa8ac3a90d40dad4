// What both backward kernels do with one number of a tile.
#pragma once

// What forward kept of a query row, and delta.
struct Statistics {
    real row_max, log_sum, delta;
};

DEVICE Statistics statistics_of(const Params& p, int b, int h, int q) {
    const long long at = (b * p.q_heads + h) * p.q_len + q;
    return {((const real*)p.row_max)[at], ((const real*)p.log_sum)[at], ((const real*)p.delta)[at]};
}

// One copy for all, or the thread block's own.
DEVICE double* accumulators_of(const Params& p) { return p.accumulators + blockIdx.x * p.accumulators_step; }

// `score`, still without scale, becomes the weight, and `grad`, d loss / d weight, becomes d loss / d score: both are
// exactly 0 where a position is masked. `adds`: whether captured tensors get their part.
template <bool PLAIN> DEVICE void differentiate(
    const Params& p, real& score, real& grad, const Statistics& row, real scale, int b, int h, int q, int kv, bool there,
    bool ask, bool adds, Sums& sums, int& wrong) {
    const bool allowed = PLAIN || there && (!ask || mask_mod(p, b, h, q, kv, there, wrong));
    const real raw = score * scale, modified = score_mod(p, raw, b, h, q, kv, allowed, wrong);
    const bool seen = allowed && modified != -INFINITE;
    const real distance = HAS_SCORE ? minus(modified, row.row_max) * LOG2E : modified - row.row_max;
    score = seen ? power_of_2(distance - row.log_sum) : (real)0;
    grad = seen ? score * (grad - row.delta) : (real)0;
    const real result = score_grad(p, raw, grad, b, h, q, kv, seen && adds, accumulators_of(p), sums);
    grad = seen ? result : (real)0;
}

DEVICE bool masked_factor(real x) { return x == 0; }

template <int N> DEVICE bool not_finite(const real (&x)[TR][N]) {
    bool strange = false;
#pragma unroll
    for (int r = 0; r < TR; ++r)
#pragma unroll
        for (int j = 0; j < N; ++j) strange |= !(x[r][j] - x[r][j] == 0);
    return strange;
}

template <int N> DEVICE void clear(real (&x)[TR][N]) {
#pragma unroll
    for (int r = 0; r < TR; ++r)
#pragma unroll
        for (int j = 0; j < N; ++j) x[r][j] = 0;
}

// The rows of a gradient, times `scale`; N is how many columns of a row a thread holds.
template <int N, class S>
DEVICE void write_rows(const Tensor& to, S, const Task& task, const real (&x)[TR][N], long long width, real scale) {
#pragma unroll
    for (int r = 0; r < TR; ++r) {
        if (row_of(r) >= task.count) continue;
        S* row = (S*)to.at + task.b * to.b + task.h * to.h + (task.first + row_of(r)) * to.row;
#pragma unroll
        for (int j = 0; j < N; ++j)
            if (depth_of(j) < width) narrow(row[depth_of(j) * to.col], x[r][j] * scale);
    }
}
