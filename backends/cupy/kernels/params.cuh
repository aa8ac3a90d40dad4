// Everything that a launch tells a kernel, by value. launch.py reads this file to lay the same words out: each member
// takes 8 bytes, or 48 for a Tensor.
#pragma once

// An address, the strides of batch, head, row and column in elements, and whether rows can be read 16 bytes at a time.
struct Tensor {
    unsigned long long at;
    long long b, h, row, col, wide;
};

struct Params {
    Tensor q, k, v, o, g, dq, dk, dv;
    double scale;
    long long batch, kv_batch, q_heads, kv_heads, group, q_len, kv_len, head_dim, value_dim;
    // a tile's own positions are queries or keys; it walks the lists of the other ones. The block mask's batches, heads and
    // rows of blocks, and for both sides the length and the size of blocks
    long long mask_batch, mask_heads, mask_rows, own_len, own_block, list_len, list_block;
    const long long* offsets;
    const int* indices;
    const long long* full_offsets;
    const int* full_indices;
    const int* order;
    // how many tiles a row of blocks has, how many parts the walk of each is split into, how many tasks that makes
    long long tiles, splits, tasks;
    // one number a query row (B, Hq, L), in the accumulation type
    void* lse;
    void* max_scores;
    void* row_max;
    void* log_sum;
    void* delta;
    const void* lse_grad;
    // what splits leave for combine; d query before its last rounding, (B, Hq, L, head_dim)
    void* partial;
    void* dq_sum;
    // gradients of captured tensors, float64: one copy, or one for each thread block
    double* accumulators;
    long long accumulators_step;
    int* wrong;
    // of each captured tensor its address, then a stride and a size for each dimension; captured numbers
    long long captured[CAPTURED_WORDS];
    double floats[SCALARS];
    long long ints[SCALARS];
};
static_assert(sizeof(Params) == 8 * PARAMETER_WORDS, "launch.py and this layout disagree");
