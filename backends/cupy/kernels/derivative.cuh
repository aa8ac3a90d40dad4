// The derivative of score_mod, which PyTorch's autograd wrote in the same operations.
#pragma once

// d loss / d score from `grad`, d loss / d score_mod(score). Where the position is `seen`, adds what captured tensors get to
// `accumulators`.
DEVICE real score_grad(
    const Params& p, real score, real grad, int b, int h, int q_idx, int kv_idx, bool seen, double* accumulators) {
    const bool concerned = false;
    int wrong = 0;
    // hole: score_grad
}
