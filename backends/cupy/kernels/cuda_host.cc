// The scheduler of fibers, the instructions of a warp, and `run`, which Python calls. See cuda_host.h.
#define REAL_BYTES 4
#include "cuda_host.h"

#if !defined(__x86_64__) || defined(FLEXREF_UCONTEXT)
#define PORTABLE_SWITCH 1
#include <ucontext.h>
#endif

namespace host {

constexpr long STACK_BYTES = 1 << 18;

Fiber fibers[WARPS_AT_MOST * LANES];
Fiber* self;
Index block, grid;
unsigned char* shared;
long shared_bytes, bank_conflicts;
float half_values[65536];

static Warp warps[WARPS_AT_MOST];
static int threads, waiting, finished, step;
static bool any_now, any_before;
static char* message;
static long message_size;
static void (*kernel)(const void*);
static const void* parameters;

#ifdef PORTABLE_SWITCH
static ucontext_t contexts[WARPS_AT_MOST * LANES + 1];
static void jump(Fiber* from, Fiber* to) {
    swapcontext(from ? &contexts[from - fibers + 1] : &contexts[0], to ? &contexts[to - fibers + 1] : &contexts[0]);
}
#else
static void* main_stack_pointer;
extern "C" void flexref_switch(void** save, void* load);
// what a function call keeps, on the stack that is left and from the stack that is entered
asm(R"(
.text
.hidden flexref_switch
.globl flexref_switch
flexref_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
)");
static void jump(Fiber* from, Fiber* to) {
    flexref_switch(from ? &from->stack_pointer : &main_stack_pointer, to ? to->stack_pointer : main_stack_pointer);
}
#endif

static void fail(const char* what) {
    static const char* const states[] = {"runs", "waits for its warp", "waits for its block", "has returned"};
    if (!*message) {
        const Fiber& other = fibers[self == fibers];
        snprintf(message, message_size, "block %u, thread %u: %s; it %s, thread %u %s", block.x, self->thread.x, what,
                 states[self->state], other.thread.x, states[other.state]);
    }
    Fiber* from = self;
    self = 0;
    jump(from, 0);
}

// Go on with a fiber that can: of the same warp if possible. None left: the block is done, or stuck.
static void pass_on() {
    const int me = (int)(self - fibers), warp = me / LANES;
    const int warps_here = threads / LANES;
    for (int w = 0; w < warps_here; ++w) {
        const int base = (warp + w * step + warps_here) % warps_here * LANES;
        for (int i = 1; i <= LANES; ++i) {
            Fiber* next = &fibers[base + (me + i * step + LANES) % LANES];
            if (next->state != READY) continue;
            Fiber* from = self;
            if (next == from) return;
            self = next;
            jump(from, next);
            return;
        }
    }
    if (finished < threads) fail("threads wait for others that never come");
    Fiber* from = self;
    self = 0;
    jump(from, 0);
}

static void fiber_main() {
    kernel(parameters);
    self->state = DONE;
    ++finished;
    pass_on();
}

static void check_shared(const void* at, long bytes, const char* what) {
    const long place = (const unsigned char*)at - shared;
    if (place < 0 || place + bytes > shared_bytes || place % bytes) fail(what);
}

static void shuffle(Fiber* lanes) {
    for (int i = 0; i < LANES; ++i)
        *(double*)lanes[i].meeting.out = *(const double*)lanes[*(const int*)lanes[i].meeting.in2 & 31].meeting.in;
}

static void any(Fiber* lanes) {
    bool found = false;
    for (int i = 0; i < LANES; ++i) found |= *(const bool*)lanes[i].meeting.in;
    for (int i = 0; i < LANES; ++i) *(bool*)lanes[i].meeting.out = found;
}

static void load(Fiber* lanes, bool transposed) {
    for (int matrix = 0; matrix < 4; ++matrix) {
        const unsigned short* rows[8];
        unsigned banks = 0;
        for (int i = 0; i < 8; ++i) {
            rows[i] = (const unsigned short*)lanes[matrix * 8 + i].meeting.in;
            check_shared(rows[i], 16, "ldmatrix reads outside of shared memory or unaligned");
            banks |= 1u << (((const unsigned char*)rows[i] - shared) / 16 % 8);
        }
        bank_conflicts += banks != 0xff;
        for (int i = 0; i < LANES; ++i) {
            const int g = i / 4, t = 2 * (i % 4);
            const unsigned short low = transposed ? rows[t][g] : rows[g][t], high = transposed ? rows[t + 1][g] : rows[g][t + 1];
            ((unsigned*)lanes[i].meeting.out)[matrix] = low | (unsigned)high << 16;
        }
    }
}

static float value(unsigned short bits, bool half) { return half ? half_values[bits] : float_of((unsigned)bits << 16); }

// Tensor cores cut sums off where other units round them.
static float cut_off(double x) {
    const float y = (float)x;
    return (x > 0 ? y > x : y < x) && y - y == 0 ? float_of(bits_of(y) - 1) : y;
}

__attribute__((optimize("O3"))) static void multiply(Fiber* lanes, bool half) {
    float a[16][16], b[16][8];
    double c[16][8];
    for (int i = 0; i < LANES; ++i) {
        const int g = i / 4, t = 2 * (i % 4);
        const unsigned* x = (const unsigned*)lanes[i].meeting.in;
        for (int r = 0; r < 4; ++r)
            for (int e = 0; e < 2; ++e) a[g + 8 * (r & 1)][t + e + 8 * (r >> 1)] = value((unsigned short)(x[r] >> 16 * e), half);
        const unsigned* y = (const unsigned*)lanes[i].meeting.in2;
        for (int r = 0; r < 2; ++r)
            for (int e = 0; e < 2; ++e) b[t + e + 8 * r][g] = value((unsigned short)(y[r] >> 16 * e), half);
        float** z = (float**)lanes[i].meeting.out;
        for (int r = 0; r < 4; ++r) c[g + 8 * (r >> 1)][t + (r & 1)] = *z[r];
    }
    for (int i = 0; i < 16; ++i)
        for (int k = 0; k < 16; ++k)
            for (int j = 0; j < 8; ++j) c[i][j] += (double)a[i][k] * b[k][j];
    for (int i = 0; i < LANES; ++i) {
        float** z = (float**)lanes[i].meeting.out;
        for (int r = 0; r < 4; ++r) *z[r] = cut_off(c[i / 4 + 8 * (r >> 1)][2 * (i % 4) + (r & 1)]);
    }
}

void meet(const Meeting& meeting) {
    const int w = (int)(self - fibers) / LANES;
    Fiber* lanes = &fibers[w * LANES];
    if (warps[w].count && warps[w].kind != meeting.kind) fail("lanes of a warp meet in different instructions");
    self->meeting = meeting;
    warps[w].kind = meeting.kind;
    if (++warps[w].count < LANES) {
        self->state = IN_WARP;
        pass_on();
        return;
    }
    if (meeting.kind == SHUFFLE) shuffle(lanes);
    if (meeting.kind == ANY) any(lanes);
    if (meeting.kind == LOAD || meeting.kind == LOAD_TRANSPOSED) load(lanes, meeting.kind == LOAD_TRANSPOSED);
    if (meeting.kind == MULTIPLY_HALF || meeting.kind == MULTIPLY_BFLOAT) multiply(lanes, meeting.kind == MULTIPLY_HALF);
    warps[w].count = 0;
    for (int i = 0; i < LANES; ++i) lanes[i].state = READY;
}

bool meet_all(bool x) {
    any_now |= x;
    if (++waiting < threads) {
        self->state = IN_BLOCK;
        pass_on();
        return any_before;
    }
    any_before = any_now;
    any_now = false;
    waiting = 0;
    for (int i = 0; i < threads; ++i) fibers[i].state = READY;
    return any_before;
}

static void carry_out(const Copy& copy) {
    if (copy.there)
        memcpy(copy.to, copy.from, 16);
    else
        memset(copy.to, 0, 16);
}

void add_copy(const Copy& copy) {
    check_shared(copy.to, 16, "cp.async writes outside of shared memory or unaligned");
    if (copy.there && (unsigned long)copy.from % 16) fail("cp.async reads an address that is no multiple of 16");
    if (self->copy_count == COPIES_AT_MOST) fail("more background copies than the model has room for");
    if (block.x & 1)
        carry_out(copy);
    else
        self->copies[self->copy_count++] = copy;
}

void close_group() {
    if (self->group_count == GROUPS_AT_MOST) fail("more groups of background copies than the model has room for");
    self->group_ends[self->group_count++] = self->copy_count;
}

void wait_for_groups(int pending) {
    const int done = self->group_count - pending;
    if (done <= 0) return;
    const int end = self->group_ends[done - 1];
    for (int i = 0; i < end; ++i) carry_out(self->copies[i]);
    for (int i = end; i < self->copy_count; ++i) self->copies[i - end] = self->copies[i];
    self->copy_count -= end;
    for (int i = done; i < self->group_count; ++i) self->group_ends[i - done] = self->group_ends[i] - end;
    self->group_count = pending;
}

unsigned short half_of(float x) {
    const unsigned bits = bits_of(x), sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
    if (size > 0x7f800000) return 0x7fff;
    if (size >= 0x477ff000) return (unsigned short)(sign | 0x7c00);
    if (size >= 0x38800000) return (unsigned short)(sign | ((size + 0xfff + (size >> 13 & 1) - 0x38000000) >> 13));
    // below the smallest normal number adding 0.5 rounds to a whole number of its steps
    return (unsigned short)(sign | (bits_of(float_of(size) + 0.5f) - bits_of(0.5f)));
}

static float half_value(unsigned bits) {
    const unsigned power = bits >> 10 & 31, digits = bits & 0x3ff;
    const float size = power == 31 ? (digits ? __builtin_nanf("") : __builtin_inff())
                       : power     ? float_of((power + 112) << 23 | digits << 13)
                                   : (float)digits * float_of(0x33800000);
    return bits & 0x8000 ? -size : size;
}

static void prepare(Fiber& fiber) {
    if (!fiber.stack) {
        posix_memalign((void**)&fiber.stack, 64, STACK_BYTES);
        fiber.copies = (Copy*)malloc(sizeof(Copy) * COPIES_AT_MOST);
    }
    fiber.state = READY;
    fiber.copy_count = fiber.group_count = 0;
#ifdef PORTABLE_SWITCH
    ucontext_t* context = &contexts[&fiber - fibers + 1];
    getcontext(context);
    context->uc_stack.ss_sp = fiber.stack;
    context->uc_stack.ss_size = STACK_BYTES;
    context->uc_link = 0;
    makecontext(context, fiber_main, 0);
#else
    // what flexref_switch pops: six registers and where to go
    void** top = (void**)(fiber.stack + STACK_BYTES - 56);
    top[0] = 0;
    *--top = (void*)fiber_main;
    for (int i = 0; i < 6; ++i) *--top = 0;
    fiber.stack_pointer = top;
#endif
}

static void run_block() {
    waiting = finished = 0;
    any_now = any_before = false;
    for (int w = 0; w < threads / LANES; ++w) warps[w].count = 0;
    for (int i = 0; i < threads; ++i) {
        fibers[i].thread.x = (unsigned)i;
        prepare(fibers[i]);
    }
    // what nobody wrote is NaN in every type
    memset(shared, 0xff, (unsigned long)shared_bytes);
    self = &fibers[step > 0 ? 0 : threads - 1];
    jump(0, self);
}

}  // namespace host

// Run a kernel block after block, or `backwards` from the last block and thread; what went wrong, if anything, is in
// `message`. Returns how many reads of matrices met bank conflicts.
extern "C" long run(void (*kernel)(const void*), const void* parameters, unsigned blocks, unsigned threads, long bytes,
                    int backwards, char* message, long message_size) {
    host::kernel = kernel;
    host::parameters = parameters;
    host::threads = (int)threads;
    host::grid.x = blocks;
    host::step = backwards ? -1 : 1;
    host::message = message;
    host::message_size = message_size;
    host::shared_bytes = bytes;
    host::bank_conflicts = 0;
    if (host::half_values[1] == 0)
        for (unsigned i = 0; i < 65536; ++i) host::half_values[i] = host::half_value(i);
    for (unsigned i = 0; i < blocks && !*message; ++i) {
        host::block.x = backwards ? blocks - 1 - i : i;
        if (posix_memalign((void**)&host::shared, 128, bytes ? (unsigned long)bytes : 1)) return -1;
        host::run_block();
        free(host::shared);
    }
    return host::bank_conflicts;
}
