// delta = <d out, out> - d lse of every query row: a warp for each.
#include "prelude.cuh"

KERNEL __launch_bounds__(THREADS) delta(PARAMETERS) {
    const long long at = (long long)blockIdx.x * (THREADS / 32) + (threadIdx.x >> 5);
    if (at >= p.batch * p.q_heads * p.q_len) return;
    const long long q = at % p.q_len, h = at / p.q_len % p.q_heads, b = at / p.q_len / p.q_heads;
    const Q* out = (const Q*)p.o.at + b * p.o.b + h * p.o.h + q * p.o.row;
    const Q* grad = (const Q*)p.g.at + b * p.g.b + h * p.g.h + q * p.g.row;
    real sum = 0;
    for (int d = threadIdx.x & 31; d < p.value_dim; d += 32) sum += widen(out[d * p.o.col]) * widen(grad[d * p.g.col]);
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) sum += across(sum, distance);
    if (p.lse_grad) sum -= ((const real*)p.lse_grad)[at];
    if ((threadIdx.x & 31) == 0) ((real*)p.delta)[at] = sum;
}
