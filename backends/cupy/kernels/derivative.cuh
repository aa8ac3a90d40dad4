// The derivative of score_mod, which PyTorch's autograd wrote in the same operations.
#pragma once

// What one thread adds up for captured elements that are the same for a whole tile, such as slope[h], and their places.
struct Sums {
    real value[SUMS];
    long long place[SUMS];
};

// d loss / d score from `grad`, d loss / d score_mod(score). Where the position is `seen`, adds what captured tensors get to
// `sums`, or else to `accumulators`.
DEVICE real score_grad(
    const Params& p, real score, real grad, int b, int h, int q_idx, int kv_idx, bool seen, double* accumulators, Sums& sums) {
    const bool concerned = false;
    int wrong = 0;
    // hole: score_grad
}

// Every warp's part of `sums` goes to `accumulators`; of a thread block of its own (ORDERED) one warp after the other.
DEVICE void add_sums(const Sums& sums, double* accumulators) {
#pragma unroll
    for (int i = 0; i < SUMS; ++i) {
        double x = (double)sums.value[i];
#pragma unroll
        for (int distance = 1; distance < 32; distance *= 2) x += across(x, distance);
        for (int turn = 0; turn < (ORDERED ? THREADS / 32 : 1); ++turn) {
            if ((threadIdx.x & 31) == 0 && x != 0 && (!ORDERED || threadIdx.x >> 5 == turn))
                add_atomically(accumulators + sums.place[i], x);
            if (ORDERED) barrier();
        }
    }
}
