// The instructions of a GPU that C++ has no words for. host/cuda_host.h has the same functions for the CPU.
#pragma once

#define DEVICE static __device__ __forceinline__
#define MEMBER __device__ __forceinline__
#define KERNEL extern "C" __global__ void
#define PARAMETERS const __grid_constant__ Params p
#define INFINITE __int_as_float(0x7f800000)
#define NOT_A_NUMBER __int_as_float(0x7fffffff)

// MATH(exp) is expf or exp, whichever `real` needs
#if REAL_BYTES == 8
#define MATH(name) name
#else
#define MATH(name) name##f
#endif

DEVICE float bits_to_float(unsigned bits) { return __uint_as_float(bits); }
DEVICE float half_to_float(unsigned short bits) {
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
    return x;
}
DEVICE unsigned short float_to_half(float x) {
    unsigned short bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return bits;
}
DEVICE unsigned short float_to_bfloat(float x) {
    unsigned short bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return bits;
}
DEVICE unsigned float_to_half2(float low, float high) {
    unsigned bits;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
    return bits;
}
DEVICE unsigned float_to_bfloat2(float low, float high) {
    unsigned bits;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
    return bits;
}

// 2 to the x: one instruction in float32, good to 2 units in the last place, 0 below the smallest normal number
DEVICE float power_of_2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
DEVICE double power_of_2(double x) { return exp2(x); }

// a - b of a rounded a, and not of the product that a may be: both must have been rounded alike to cancel out
DEVICE float minus(float a, float b) { return __fsub_rn(a, b); }
DEVICE double minus(double a, double b) { return __dsub_rn(a, b); }

DEVICE unsigned char* shared_memory() {
    extern __shared__ __align__(128) unsigned char everything[];
    return everything;
}
DEVICE unsigned shared_address(const void* at) { return (unsigned)__cvta_generic_to_shared(at); }

DEVICE void barrier() { __syncthreads(); }
DEVICE void warp_barrier() { __syncwarp(); }
DEVICE bool any_thread(bool x) { return __syncthreads_or(x); }
DEVICE bool any_lane(bool x) { return __any_sync(0xffffffffu, x); }
template <class T> DEVICE T from_lane(T x, int lane) { return __shfl_sync(0xffffffffu, x, lane); }
template <class T> DEVICE T across(T x, int distance) { return __shfl_xor_sync(0xffffffffu, x, distance); }
DEVICE void add_atomically(float* at, float x) { atomicAdd(at, x); }
DEVICE void add_atomically(double* at, double x) { atomicAdd(at, x); }

// 16 bytes from global to shared memory, in the background; 16 zeros where there is nothing to copy
DEVICE void copy_async(void* to, const void* from, bool there) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(there ? 16 : 0));
}
DEVICE void copy_commit() { asm volatile("cp.async.commit_group;"); }
// until at most `PENDING` groups of this thread's copies are still under way
template <int PENDING> DEVICE void copy_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory"); }

// four 8x8 matrices of 16-bit numbers: lane l gives the address of row l % 8 of matrix l / 8 and receives, of each,
// row l / 4, columns 2 (l % 4) and the next; transposed, column l / 4, rows 2 (l % 4) and the next
DEVICE void load_matrices(unsigned (&x)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(shared_address(row))
                 : "memory");
}
DEVICE void load_matrices_transposed(unsigned (&x)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// c (16, 8) += a (16, 16) x b (16, 8), c in float32
#define MULTIPLY(TYPE, NAME)                                                                                          \
    DEVICE void multiply(TYPE, float& c0, float& c1, float& c2, float& c3, const unsigned (&a)[4], unsigned b0, unsigned b1) { \
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." NAME "." NAME ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "        \
                     "{%8, %9}, {%0, %1, %2, %3};"                                                                      \
                     : "+f"(c0), "+f"(c1), "+f"(c2), "+f"(c3)                                                              \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                                            \
    }
