// What is CUDA's own in a persistent kernel; the rest is in `ringkernel.h`. A kernel is this file and a handler behind it:
//
//     #include "ringkernel.cuh"
//     RK_HANDLER { RK_FOR(i, rk_in_words()) { rk_out(i, rk_in(i)); } rk_reply(rk_in_bytes()); }
//
// Compute capability 7.0 or newer, for loads and stores of system scope (PTX ISA 6.0) and `nanosleep` (PTX ISA 6.3).

#define RK_FN static __device__ __forceinline__
#define RK_GLOBAL
#define RK_GROUP
#define RK_THREAD

typedef unsigned int uint;
typedef unsigned long long rk_u64;
#define RK_HAS_U64
#define RK_HAS_F64
#define RK_HAS_CLOCK
#define RK_HAS_ADDRESSES

#ifdef RK_ON_CPU
#include "on_cpu.h"
#else
RK_FN uint rk_load(const uint* at) {
    uint value;
    asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(at) : "memory");
    return value;
}
// ORDERING: publish, give-back, control. Pairs with the host's release stores.
RK_FN uint rk_load_acquire(const uint* at) {
    uint value;
    asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(at) : "memory");
    return value;
}
RK_FN void rk_store(uint* at, uint value) {
    asm volatile("st.relaxed.sys.global.u32 [%0], %1;" ::"l"(at), "r"(value) : "memory");
}
// ORDERING: publish, give-back, progress, telemetry. Pairs with the host's acquire loads. Cumulative over the block: its
// threads' stores before a barrier are seen before this one (PTX ISA, "Memory Consistency Model", causality order).
RK_FN void rk_store_release(uint* at, uint value) {
    asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(at), "r"(value) : "memory");
}
RK_FN void rk_copy4(uint* to, const uint* from) {
    uint a, b, c, d;
    asm volatile("ld.relaxed.sys.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(a), "=r"(b), "=r"(c), "=r"(d)
                 : "l"(from)
                 : "memory");
    asm volatile("st.relaxed.sys.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(a), "r"(b), "r"(c), "r"(d)
                 : "memory");
}
// ORDERING: publish, control. Pairs with the host's release of a sequence, which is the first of a header's words, and of its commands.
// SPEC: PTX promises no order among the parts of a vector access. Aligned accesses of 16 bytes of system scope are made as one on every
// device (CUDA C++ Core Libraries, "Memory Consistency Model", atomicity of mapped memory), and the host writes the
// sequence last.
RK_FN void rk_load4_acquire(const uint* from, uint* to) {
    uint a, b, c, d;
    asm volatile("ld.acquire.sys.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(a), "=r"(b), "=r"(c), "=r"(d)
                 : "l"(from)
                 : "memory");
    to[0] = a;
    to[1] = b;
    to[2] = c;
    to[3] = d;
}
RK_FN void rk_fence() { asm volatile("fence.acq_rel.sys;" ::: "memory"); }
// A block of one warp needs no barrier of the whole multiprocessor.
RK_FN void rk_group_sync(uint threads) {
    if (threads <= 32u) {
        __syncwarp();
    } else {
        __syncthreads();
    }
}
RK_FN void rk_nap(uint nanoseconds) {
    if (nanoseconds > 0u) __nanosleep(nanoseconds);
}
RK_FN rk_u64 rk_clock_ns() {
    rk_u64 now;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
    return now;
}
RK_FN float rk_as_f32(uint bits) { return __uint_as_float(bits); }
RK_FN uint rk_from_f32(float value) { return __float_as_uint(value); }
RK_FN double rk_as_f64(rk_u64 bits) { return __longlong_as_double((long long)bits); }
RK_FN rk_u64 rk_from_f64(double value) { return (rk_u64)__double_as_longlong(value); }
// Rounded after each operation, as on the CPU; a plain expression may be fused.
RK_FN float rk_mul_f32(float a, float b) { return __fmul_rn(a, b); }
RK_FN float rk_add_f32(float a, float b) { return __fadd_rn(a, b); }
#endif

RK_FN uint* rk_at(uint low, uint high) {
    return reinterpret_cast<uint*>(rk_u64(low) | rk_u64(high) << 32);
}

#include "ringkernel.h"

// Says by its name for which layout this was built; the host looks for it before it launches anything.
extern "C" __global__ void rk_layout_3() {}

extern "C" __global__ void __launch_bounds__(RK_MAX_THREADS) rk_main(RkLaunch launch, uint* host_to_device, uint* device_to_host, uint* state) {
    __shared__ RkGroup group;
    Rk rk;
    rk.launch = launch;
    rk.h2d = host_to_device;
    rk.d2h = device_to_host;
    rk.state = state;
    rk.group = &group;
    rk.index = threadIdx.x;
    rk.threads = blockDim.x;
    rk.block = blockIdx.x;
    rk.blocks = gridDim.x;
    rk_run(rk);
}
