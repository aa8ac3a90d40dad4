// Number types and the functions that emitted mods call. `real` is the accumulation type: float, or double.
#pragma once

struct Half {
    unsigned short bits;
};
struct Bfloat {
    unsigned short bits;
};

#define LOG2E ((real)1.4426950408889634)
#define LN2 ((real)0.6931471805599453)

DEVICE float widen(float x) { return x; }
DEVICE double widen(double x) { return x; }
DEVICE float widen(Half x) { return half_to_float(x.bits); }
DEVICE float widen(Bfloat x) { return bits_to_float((unsigned)x.bits << 16); }

DEVICE void narrow(float& to, double x) { to = (float)x; }
DEVICE void narrow(double& to, double x) { to = x; }
DEVICE void narrow(Half& to, double x) { to.bits = float_to_half((float)x); }
DEVICE void narrow(Bfloat& to, double x) { to.bits = float_to_bfloat((float)x); }
DEVICE void narrow(float& to, float x) { to = x; }
DEVICE void narrow(double& to, float x) { to = x; }
DEVICE void narrow(Half& to, float x) { to.bits = float_to_half(x); }
DEVICE void narrow(Bfloat& to, float x) { to.bits = float_to_bfloat(x); }

// two numbers side by side, the first in the low half, as a fragment holds them
DEVICE unsigned pack(Half, float low, float high) { return float_to_half2(low, high); }
DEVICE unsigned pack(Bfloat, float low, float high) { return float_to_bfloat2(low, high); }

template <class T> DEVICE T smaller(T a, T b) { return a < b ? a : b; }

// one element of a captured tensor
template <class T> DEVICE real read_float(long long at, long long i) { return (real)widen(((const T*)at)[i]); }
template <class T> DEVICE long long read_int(long long at, long long i) { return ((const T*)at)[i]; }
DEVICE bool read_bool(long long at, long long i) { return ((const unsigned char*)at)[i] != 0; }

DEVICE real sign_of(real x) { return x > 0 ? (real)1 : x < 0 ? (real)-1 : (real)0; }
DEVICE real smaller_or_nan(real a, real b) { return a < b || a != a ? a : b; }
DEVICE real larger_or_nan(real a, real b) { return a > b || a != a ? a : b; }

// PyTorch's remainder has the sign of the divisor
DEVICE real remainder_of(real a, real b) {
    const real rest = MATH(fmod)(a, b);
    return rest != 0 && (rest < 0) != (b < 0) ? rest + b : rest;
}

// PyTorch's floor division of floats goes by the remainder: a / b may already be rounded to the next whole number
DEVICE real floor_div_of(real a, real b) {
    if (b == 0) return a / b;
    const real rest = MATH(fmod)(a, b);
    real quotient = (a - rest) / b;
    if (rest != 0 && (rest < 0) != (b < 0)) quotient -= 1;
    const real below = MATH(floor)(quotient);
    return quotient - below > (real)0.5 ? below + 1 : below;
}

// integer division: by 0 it is 0, where PyTorch raises; by -1 it must not trap
template <class I> DEVICE I trunc_div(I a, I b) { return b == 0 ? 0 : b == -1 ? (I)(0ull - (unsigned long long)a) : a / b; }
template <class I> DEVICE I fmod_int(I a, I b) { return b == 0 ? a : b == -1 ? 0 : a % b; }
template <class I> DEVICE I floor_div(I a, I b) {
    return trunc_div(a, b) - (b != 0 && fmod_int(a, b) != 0 && (a < 0) != (b < 0) ? 1 : 0);
}
template <class I> DEVICE I remainder_int(I a, I b) {
    const I rest = fmod_int(a, b);
    return rest != 0 && b != 0 && (rest < 0) != (b < 0) ? rest + b : rest;
}

// shifting by more than there are bits leaves nothing but the sign
DEVICE long long shift_left(long long a, long long n) {
    return n < 0 || n > 63 ? 0 : (long long)((unsigned long long)a << n);
}
DEVICE long long shift_right(long long a, long long n) { return a >> (n < 0 || n > 63 ? 63 : n); }

// what is no 64-bit integer becomes the smallest one, as on a CPU
DEVICE long long to_int(real x) {
    return x >= (real)-9223372036854775808.0 && x < (real)9223372036854775808.0 ? (long long)x : (long long)(1ull << 63);
}
