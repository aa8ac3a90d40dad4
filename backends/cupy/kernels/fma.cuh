// Products of tiles on the ordinary units, for float32 and float64. `T` is `real`.
//
// A tile of scores is ROWS x COLS. Thread (ty, tx) of 16 x 8 holds rows ty, ty + 16, ... and columns tx, tx + 8, ...
#pragma once

using T = real;

constexpr int TR = ROWS / 16;
constexpr int TC = COLS / 8;
constexpr int ROW_LANES = 8;
constexpr int VEC = 16 / (int)sizeof(T);  // numbers of 16 bytes
constexpr int PAD = VEC;                  // keeps rows that are read together in different banks
template <int D> constexpr int HELD = D / 8;

DEVICE int tx() { return threadIdx.x & 7; }
DEVICE int ty() { return threadIdx.x >> 3; }
DEVICE int row_of(int r) { return ty() + 16 * r; }
DEVICE int col_of(int c) { return tx() + 8 * c; }
DEVICE int first_row_of_warp() { return 0; }  // every warp has rows from top to bottom
DEVICE int depth_of(int j) { return (j / VEC) * 8 * VEC + tx() * VEC + j % VEC; }

template <int N, int D> constexpr int TILE_SIZE = N * (D + PAD);
template <int D> DEVICE T element(const T* tile, int row, int depth) { return tile[row * (D + PAD) + depth]; }

// Copy N rows of `width` numbers of type S into shared memory, padded to D with zeros; see mma.cuh.
template <int N, int D, class S, class Place> DEVICE void load_tile(T* tile, const Tensor& x, S, int width, Place place) {
    const S* from = (const S*)x.at;
    for (int i = threadIdx.x; i < N * (D / VEC); i += THREADS) {
        const int row = i / (D / VEC), first = i % (D / VEC) * VEC;
        const long long at = place(row);
        T* to = tile + row * (D + PAD) + first;
        if (sizeof(S) == sizeof(T) && x.wide) {
            const bool there = at >= 0 && first < width;
            copy_async(to, there ? from + at + first : from, there);
        } else {
            for (int e = 0; e < VEC; ++e)
                to[e] = at >= 0 && first + e < width ? (T)widen(from[at + (first + e) * x.col]) : (T)0;
        }
    }
}

struct alignas(16) Vector {
    T x[VEC];
};

// s (ROWS, COLS) += a (ROWS, D) x b (COLS, D) transposed
template <int D> DEVICE void product_nt(real (&s)[TR][TC], const T* a, const T* b) {
#pragma unroll 2
    for (int d = 0; d < D; d += VEC) {
        Vector left[TR];
#pragma unroll
        for (int r = 0; r < TR; ++r) left[r] = *(const Vector*)(a + row_of(r) * (D + PAD) + d);
#pragma unroll
        for (int c = 0; c < TC; ++c) {
            const Vector right = *(const Vector*)(b + col_of(c) * (D + PAD) + d);
#pragma unroll
            for (int r = 0; r < TR; ++r)
#pragma unroll
                for (int e = 0; e < VEC; ++e) s[r][c] += left[r].x[e] * right.x[e];
        }
    }
}

// Keep a tile of factors (ROWS, COLS) in shared memory.
DEVICE void keep_factors(const real (&p)[TR][TC], T* kept) {
#pragma unroll
    for (int r = 0; r < TR; ++r)
#pragma unroll
        for (int c = 0; c < TC; ++c) kept[row_of(r) * (COLS + PAD) + col_of(c)] = p[r][c];
}

// o (ROWS, D) += p (ROWS, COLS) x b (COLS, D), through `kept`, which only the threads that share a row read again
template <int D> DEVICE void product_nn(real (&o)[TR][D / 8], const real (&p)[TR][TC], const T* b, T* kept) {
    keep_factors(p, kept);
    warp_barrier();
#pragma unroll 2
    for (int k = 0; k < COLS; ++k) {
        real left[TR];
#pragma unroll
        for (int r = 0; r < TR; ++r) left[r] = kept[row_of(r) * (COLS + PAD) + k];
#pragma unroll
        for (int j = 0; j < D / 8; j += VEC) {
            const Vector right = *(const Vector*)(b + k * (D + PAD) + depth_of(j));
#pragma unroll
            for (int r = 0; r < TR; ++r)
#pragma unroll
                for (int e = 0; e < VEC; ++e) o[r][j + e] += left[r] * right.x[e];
        }
    }
    warp_barrier();
}

// The same without what p marks as masked: 0 times NaN would be NaN there (R4).
template <int D, class Masked>
DEVICE void careful_nn(real (&o)[TR][D / 8], const real (&p)[TR][TC], const T* b, T* kept, Masked masked) {
    keep_factors(p, kept);
    warp_barrier();
#pragma unroll 1
    for (int k = 0; k < COLS; ++k)
#pragma unroll
        for (int r = 0; r < TR; ++r) {
            const real x = kept[row_of(r) * (COLS + PAD) + k];
            if (!masked(x))
#pragma unroll
                for (int j = 0; j < D / 8; ++j) o[r][j] += x * element<D>(b, k, depth_of(j));
        }
    warp_barrier();
}

// p transposed (COLS, ROWS) x b (ROWS, D), p as keep_factors left it; `give(col, depth, x)` takes each number.
template <int D, class Give> DEVICE void product_tn(const T* kept, const T* b, Give give) {
    for (int col = ty(); col < COLS; col += 16)
#pragma unroll 1
        for (int j = 0; j < D / 8; ++j) {
            real x = 0;
            for (int k = 0; k < ROWS; ++k) x += kept[k * (COLS + PAD) + col] * element<D>(b, k, depth_of(j));
            give(col, depth_of(j), x);
        }
}
