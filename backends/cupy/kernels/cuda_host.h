// A GPU's thread block on the CPU: every thread is a fiber that runs until it must wait for others.
//
// The functions are those of device.cuh. Instructions of a warp are carried out when its last lane has come to them, lane
// by lane as the PTX manual lays fragments out. Background copies land as late as their thread waits for them in even
// blocks, at once in odd blocks, so that a missing wait and a buffer that is overwritten too early both show. Lanes that do
// not meet, matrices outside of shared memory and unaligned copies are errors, not hangs.
#pragma once

extern "C" {
void* malloc(unsigned long);
void free(void*);
void* memcpy(void*, const void*, unsigned long);
void* memset(void*, int, unsigned long);
int posix_memalign(void**, unsigned long, unsigned long);
int snprintf(char*, unsigned long, const char*, ...);
}

#define DEVICE static inline __attribute__((always_inline))
#define MEMBER __attribute__((always_inline))
#define KERNEL extern "C" void
#define PARAMETERS const Params& p
#define __launch_bounds__(...)
#define INFINITE __builtin_inff()
#define NOT_A_NUMBER __builtin_nanf("")
#if REAL_BYTES == 8
#define MATH(name) __builtin_##name
#else
#define MATH(name) __builtin_##name##f
#endif
#define MULTIPLY(TYPE, NAME)                                                                                            \
    DEVICE void multiply(TYPE, float& c0, float& c1, float& c2, float& c3, const unsigned (&a)[4], unsigned b0, unsigned b1) { \
        const unsigned b[2] = {b0, b1};                                                                                        \
        float* c[4] = {&c0, &c1, &c2, &c3};                                                                                    \
        host::meet({NAME[0] == 'b' ? host::MULTIPLY_BFLOAT : host::MULTIPLY_HALF, a, b, c});                                    \
    }

namespace host {

constexpr int WARPS_AT_MOST = 8, LANES = 32;

// what a lane brings to an instruction of its warp
enum Kind { NOTHING, SHUFFLE, ANY, LOAD, LOAD_TRANSPOSED, MULTIPLY_HALF, MULTIPLY_BFLOAT, WARP_BARRIER };
struct Meeting {
    Kind kind;
    const void* in;
    const void* in2;
    void* out;
};
enum State { READY, IN_WARP, IN_BLOCK, DONE };
struct Copy {
    void* to;
    const void* from;
    bool there;
};
constexpr int COPIES_AT_MOST = 4096, GROUPS_AT_MOST = 8;

struct Fiber {
    struct {
        unsigned x;
    } thread;
    State state;
    Meeting meeting;
    void* stack_pointer;
    char* stack;
    Copy* copies;
    int copy_count, open_from, group_count, group_ends[GROUPS_AT_MOST];
};
struct Warp {
    int count;
    Kind kind;
};

extern Fiber fibers[WARPS_AT_MOST * LANES];
extern Fiber* self;
extern struct Index {
    unsigned x;
} block, grid;
extern unsigned char* shared;
extern long shared_bytes;
extern long bank_conflicts;
extern float half_values[65536];

void meet(const Meeting& meeting);
bool meet_all(bool x);
void add_copy(const Copy& copy);
void close_group();
void wait_for_groups(int pending);
float value_of_half(unsigned short bits);
unsigned short half_of(float x);

inline unsigned bits_of(float x) {
    unsigned bits;
    memcpy(&bits, &x, 4);
    return bits;
}
inline float float_of(unsigned bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}
inline unsigned short bfloat_of(float x) {
    const unsigned bits = bits_of(x);
    if (x != x) return 0x7fff;
    return (unsigned short)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

}  // namespace host

#define threadIdx (host::self->thread)
#define blockIdx (host::block)
#define gridDim (host::grid)

DEVICE float bits_to_float(unsigned bits) { return host::float_of(bits); }
DEVICE float half_to_float(unsigned short bits) { return host::half_values[bits]; }
DEVICE unsigned short float_to_half(float x) { return host::half_of(x); }
DEVICE unsigned short float_to_bfloat(float x) { return host::bfloat_of(x); }
DEVICE unsigned float_to_half2(float low, float high) { return host::half_of(low) | (unsigned)host::half_of(high) << 16; }
DEVICE unsigned float_to_bfloat2(float low, float high) { return host::bfloat_of(low) | (unsigned)host::bfloat_of(high) << 16; }

// as far off as the instruction may be, in either direction: 2^-22 of the result; it is exact at 0
DEVICE float power_of_2(float x) {
    if (x == 0) return 1;
    const float y = __builtin_exp2f(x) * (host::bits_of(x) & 1 ? 1 + 0x1p-22f : 1 - 0x1p-22f);
    return y < 0x1p-126f ? 0 : y;
}
DEVICE double power_of_2(double x) { return __builtin_exp2(x); }
template <class T> DEVICE T minus(T a, T b) { return a - b; }

DEVICE unsigned char* shared_memory() { return host::shared; }
DEVICE void barrier() { host::meet_all(false); }
DEVICE void warp_barrier() { host::meet({host::WARP_BARRIER, 0, 0, 0}); }
DEVICE bool any_thread(bool x) { return host::meet_all(x); }
DEVICE bool any_lane(bool x) {
    bool result;
    host::meet({host::ANY, &x, 0, &result});
    return result;
}
template <class T> DEVICE T from_lane(T x, int lane) {
    double wide = x, result;
    host::meet({host::SHUFFLE, &wide, &lane, &result});
    return (T)result;
}
template <class T> DEVICE T across(T x, int distance) { return from_lane(x, (int)((threadIdx.x & 31) ^ distance)); }
DEVICE void add_atomically(float* at, float x) { *at += x; }
DEVICE void add_atomically(double* at, double x) { *at += x; }

DEVICE void copy_async(void* to, const void* from, bool there) { host::add_copy({to, from, there}); }
DEVICE void copy_commit() { host::close_group(); }
template <int PENDING> DEVICE void copy_wait() { host::wait_for_groups(PENDING); }
DEVICE void load_matrices(unsigned (&x)[4], const void* row) { host::meet({host::LOAD, row, 0, x}); }
DEVICE void load_matrices_transposed(unsigned (&x)[4], const void* row) { host::meet({host::LOAD_TRANSPOSED, row, 0, x}); }
