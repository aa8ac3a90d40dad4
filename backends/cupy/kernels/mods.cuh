// The user's mods, printed into these functions one operation a line. `concerned`: whether it matters what is read here;
// `wrong` is set where a captured tensor is then read out of range.
#pragma once

DEVICE bool mask_mod(const Params& p, int b, int h, int q_idx, int kv_idx, bool concerned, int& wrong) {
    // hole: mask_mod
}

DEVICE real score_mod(const Params& p, real score, int b, int h, int q_idx, int kv_idx, bool concerned, int& wrong) {
    // hole: score_mod
}
