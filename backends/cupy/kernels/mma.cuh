// Products of tiles on the tensor cores, for float16 and bfloat16. `T` is the type, `real` is float.
//
// A tile of scores is ROWS x COLS. Warp w has the 16 * SLABS rows from 16 * SLABS * w; of each slab of 16 rows a lane holds,
// as mma.sync lays it out, rows lane / 4 and lane / 4 + 8, and of every 8 columns 2 (lane % 4) and the next.
#pragma once

using T = Q;
MULTIPLY(Half, "f16")
MULTIPLY(Bfloat, "bf16")

constexpr int SLABS = ROWS / 64;
constexpr int TR = 2 * SLABS;  // rows that a thread holds
constexpr int TC = COLS / 4;   // columns that it holds
constexpr int ROW_LANES = 4;   // lanes that share a row
template <int D> constexpr int HELD = D / 4;  // columns that it holds of a (ROWS, D) result

DEVICE int lane() { return threadIdx.x & 31; }
DEVICE int warp() { return threadIdx.x >> 5; }
DEVICE int row_of(int r) { return (warp() * SLABS + (r >> 1)) * 16 + (lane() >> 2) + (r & 1) * 8; }
DEVICE int col_of(int c) { return (c >> 1) * 8 + 2 * (lane() & 3) + (c & 1); }
DEVICE int first_row_of_warp() { return warp() * SLABS * 16; }
// the column of a (ROWS, D) result
DEVICE int depth_of(int j) { return col_of(j); }

// how many numbers of shared memory a tile of N rows takes
template <int N, int D> constexpr int TILE_SIZE = N * D;

// Where 16-byte chunk `chunk` of a row of D numbers lies: chunks change places, by a pattern that differs between rows, so
// that eight rows that are read together fall into different banks.
template <int D> DEVICE int turn(int row) { return D / 8 % 8 == 0 ? row & 7 : (row >> 1) & 3; }
template <int D> DEVICE int swizzled(int row, int chunk) { return row * D + (chunk ^ turn<D>(row)) * 8; }

// A lane's place in a tile for ldmatrix: row `row`, chunk `side` (0 or 1) of each pair. at(16 * i, k) is 16 * i rows below,
// in the k-th pair of chunks; rows that are 16 apart have the same pattern.
template <int D> struct Cursor {
    const T* start;
    int low;
    MEMBER Cursor(const T* tile, int row, int side) : start(tile + row * D), low((side ^ turn<D>(row)) * 8) {}
    MEMBER const T* at(int below, int k) const { return start + below * D + (low ^ (16 * k)); }
};

template <int D> DEVICE T element(const T* tile, int row, int depth) { return tile[swizzled<D>(row, depth >> 3) + (depth & 7)]; }

// Copy N rows of `width` numbers into shared memory, padded to D with zeros. `place(row)` is where a row starts, in
// elements, or -1 for a row that is not there. The copies that x.wide allows to go on in the background are not committed.
template <int N, int D, class S, class Place> DEVICE void load_tile(T* tile, const Tensor& x, S, int width, Place place) {
    const T* from = (const T*)x.at;
    for (int i = threadIdx.x; i < N * (D / 8); i += THREADS) {
        const int row = i / (D / 8), chunk = i % (D / 8);
        const long long at = place(row);
        T* to = tile + swizzled<D>(row, chunk);
        if (x.wide) {
            const bool there = at >= 0 && chunk * 8 < width;
            copy_async(to, there ? from + at + chunk * 8 : from, there);
        } else {
            for (int e = 0; e < 8; ++e) {
                const int depth = chunk * 8 + e;
                to[e] = at >= 0 && depth < width ? from[at + depth * x.col] : T{0};
            }
        }
    }
}

// s (ROWS, COLS) += a (ROWS, D) x b (COLS, D) transposed
template <int D> DEVICE void product_nt(real (&s)[TR][TC], const T* a, const T* b) {
    const Cursor<D> left(a, first_row_of_warp() + (lane() & 15), lane() >> 4);
    const Cursor<D> right(b, (lane() >> 4) * 8 + (lane() & 7), (lane() >> 3) & 1);
#pragma unroll UNROLL
    for (int k = 0; k < D / 16; ++k) {
        unsigned fa[SLABS][4];
#pragma unroll
        for (int m = 0; m < SLABS; ++m) load_matrices(fa[m], left.at(16 * m, k));
#pragma unroll
        for (int n = 0; n < COLS / 16; ++n) {
            unsigned fb[4];
            load_matrices(fb, right.at(16 * n, k));
#pragma unroll
            for (int m = 0; m < SLABS; ++m) {
                real(&up)[TC] = s[2 * m], (&down)[TC] = s[2 * m + 1];
                const int c = 4 * n;
                multiply(T{}, up[c], up[c + 1], down[c], down[c + 1], fa[m], fb[0], fb[1]);
                multiply(T{}, up[c + 2], up[c + 3], down[c + 2], down[c + 3], fa[m], fb[2], fb[3]);
            }
        }
    }
}

// o (ROWS, D) += p (ROWS, COLS) x b (COLS, D): p goes from registers to registers
template <int D> DEVICE void product_nn(real (&o)[TR][D / 4], const real (&p)[TR][TC], const T* b, T*) {
    const Cursor<D> right(b, lane() & 15, lane() >> 4);
#pragma unroll
    for (int k = 0; k < COLS / 16; ++k) {
        unsigned fa[SLABS][4];
#pragma unroll
        for (int m = 0; m < SLABS; ++m) {
            const real(&up)[TC] = p[2 * m], (&down)[TC] = p[2 * m + 1];
            const int c = 4 * k;
            fa[m][0] = pack(T{}, up[c], up[c + 1]);
            fa[m][1] = pack(T{}, down[c], down[c + 1]);
            fa[m][2] = pack(T{}, up[c + 2], up[c + 3]);
            fa[m][3] = pack(T{}, down[c + 2], down[c + 3]);
        }
#pragma unroll
        for (int n = 0; n < D / 16; ++n) {
            unsigned fb[4];
            load_matrices_transposed(fb, right.at(16 * k, n));
#pragma unroll
            for (int m = 0; m < SLABS; ++m) {
                real(&up)[D / 4] = o[2 * m], (&down)[D / 4] = o[2 * m + 1];
                const int c = 4 * n;
                multiply(T{}, up[c], up[c + 1], down[c], down[c + 1], fa[m], fb[0], fb[1]);
                multiply(T{}, up[c + 2], up[c + 3], down[c + 2], down[c + 3], fa[m], fb[2], fb[3]);
            }
        }
    }
}

// The same one number at a time in float32, without what p marks as masked: 0 times NaN would be NaN there (R4).
template <int D, class Masked>
DEVICE void careful_nn(real (&o)[TR][D / 4], const real (&p)[TR][TC], const T* b, T*, Masked masked) {
    // indexed at run time, so that this rare path is short
    real copy[TC][TR];
#pragma unroll
    for (int c = 0; c < TC; ++c)
#pragma unroll
        for (int r = 0; r < TR; ++r) copy[c][r] = p[r][c];
#pragma unroll 1
    for (int c = 0; c < TC; ++c)
#pragma unroll 1
        for (int t = 0; t < ROW_LANES; ++t) {
            const int k = (c >> 1) * 8 + 2 * t + (c & 1);
#pragma unroll
            for (int r = 0; r < TR; ++r) {
                const real x = from_lane(copy[c][r], (lane() & ~3) | t);
                if (!masked(x))
#pragma unroll
                    for (int j = 0; j < D / 4; ++j) o[r][j] += x * widen(element<D>(b, k, depth_of(j)));
            }
        }
}

// Keep a tile of factors (ROWS, COLS) in shared memory, for product_tn.
DEVICE void keep_factors(const real (&p)[TR][TC], T* kept) {
#pragma unroll
    for (int r = 0; r < TR; ++r)
#pragma unroll
        for (int c = 0; c < TC; c += 2) {
            const int col = col_of(c);
            *(unsigned*)(kept + swizzled<COLS>(row_of(r), col >> 3) + (col & 7)) = pack(T{}, p[r][c], p[r][c + 1]);
        }
}

// p transposed (COLS, ROWS) x b (ROWS, D), p as keep_factors left it; `give(col, depth, x)` takes each number.
template <int D, class Give> DEVICE void product_tn(const T* kept, const T* b, Give give) {
    if (warp() * 16 >= COLS) return;
    const Cursor<COLS> left(kept, (lane() >> 4) * 8 + (lane() & 7), (lane() >> 3) & 1);
    const Cursor<D> right(b, lane() & 15, lane() >> 4);
    unsigned fa[ROWS / 16][4];
#pragma unroll
    for (int k = 0; k < ROWS / 16; ++k) load_matrices_transposed(fa[k], left.at(16 * k, warp()));
#pragma unroll 1
    for (int n = 0; n < D / 16; ++n) {
        real x[2][4] = {};
#pragma unroll
        for (int k = 0; k < ROWS / 16; ++k) {
            unsigned fb[4];
            load_matrices_transposed(fb, right.at(16 * k, n));
            multiply(T{}, x[0][0], x[0][1], x[1][0], x[1][1], fa[k], fb[0], fb[1]);
            multiply(T{}, x[0][2], x[0][3], x[1][2], x[1][3], fa[k], fb[2], fb[3]);
        }
#pragma unroll
        for (int r = 0; r < 2; ++r)
#pragma unroll
            for (int c = 0; c < 4; ++c) give(warp() * 16 + (lane() >> 2) + 8 * r, n * 16 + col_of(c), x[r][c]);
    }
}
