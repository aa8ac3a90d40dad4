// What is written of each query row beside out.
#pragma once

// `row_max` in the units of scores (see softmax.cuh), `row_sum` of the powers against it; both of a whole row.
DEVICE void write_statistics(const Params& p, long long at, real row_max, real row_sum) {
    const real natural = HAS_SCORE ? row_max : row_max * LN2;
    const real lse = row_sum == 0 ? -INFINITE : natural + MATH(log)(row_sum);
    ((real*)p.lse)[at] = lse;
    // a NaN among the scores shows in the sum alone
    if (p.max_scores) ((real*)p.max_scores)[at] = row_sum == row_sum ? natural : row_sum;
    if (p.row_max) {
        ((real*)p.row_max)[at] = row_max;
        ((real*)p.log_sum)[at] = MATH(log2)(row_sum);
    }
}
