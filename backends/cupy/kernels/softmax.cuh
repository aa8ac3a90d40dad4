// The weights of a tile against a running maximum, by the threads that share a row.
#pragma once

// Scores are in natural units after a score_mod, else in powers of two: the product with log2(e) is part of `unit`.
DEVICE real power(real score, real base) { return power_of_2(HAS_SCORE ? minus(score, base) * LOG2E : score - base); }

template <class F> DEVICE real over_row(real x, F f) {
#pragma unroll
    for (int distance = 1; distance < ROW_LANES; distance *= 2) x = f(x, across(x, distance));
    return x;
}
DEVICE real row_sum_of(real x) {
    return over_row(x, [](real a, real b) { return a + b; });
}
// the larger; a NaN stays out of it, and comes back through the sum
DEVICE real row_max_of(real x) {
    return over_row(x, [](real a, real b) { return b > a ? b : a; });
}
