// The splits of a query row, each with a maximum, a sum and an unfinished out of its own, become one row: a warp for each.
#include "prelude.cuh"

KERNEL __launch_bounds__(THREADS) combine(PARAMETERS) {
    const long long at = (long long)blockIdx.x * (THREADS / 32) + (threadIdx.x >> 5);
    if (at >= p.batch * p.q_heads * p.q_len) return;
    const long long q = at % p.q_len, h = at / p.q_len % p.q_heads, b = at / p.q_len / p.q_heads;
    const long long step = 2 + p.value_dim;
    const real* from = (const real*)p.partial + at * p.splits * step;
    real top = -INFINITE;
    for (int i = 0; i < p.splits; ++i) top = from[i * step] > top ? from[i * step] : top;
    const real base = top == -INFINITE ? (real)0 : top;
    real row_sum = 0;
    for (int i = 0; i < p.splits; ++i) row_sum += from[i * step + 1] * power(from[i * step], base);
    const real inverse = row_sum == 0 ? (real)0 : (real)1 / row_sum;
    Q* to = (Q*)p.o.at + b * p.o.b + h * p.o.h + q * p.o.row;
    for (int d = threadIdx.x & 31; d < p.value_dim; d += 32) {
        real x = 0;
        for (int i = 0; i < p.splits; ++i) x += from[i * step + 2 + d] * power(from[i * step], base);
        narrow(to[d * p.o.col], x * inverse);
    }
    if ((threadIdx.x & 31) == 0) write_statistics(p, at, top, row_sum);
}
