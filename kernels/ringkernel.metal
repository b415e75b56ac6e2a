// What is Metal's own in a persistent kernel; the rest is in `ringkernel.h`. A slice is one dispatch of `rk_main`; host and device
// share its buffers (`MTLStorageMode.shared`).
//
// SPEC: Metal's atomics are relaxed and of device scope (Metal Shading Language 3.1, 6.15.1), and nothing promises that a running
// kernel sees the host's stores, or sees them in order. With RK_SYSTEM_SCOPE memory is declared coherent with the host, and fences are of
// system scope, as Apple's MLX has it for the same purpose (its `fence.metal`); compilers before MSL 3.2 do not take that. Without it a
// kernel is to be used only for requests that were written before its slice was committed.

#define RK_FN static inline
#if defined(RK_SYSTEM_SCOPE) && !defined(RK_ON_CPU)
#pragma METAL internals : enable
#define RK_GLOBAL volatile coherent(system) device
#else
#define RK_GLOBAL device
#endif
#define RK_GROUP threadgroup
#define RK_THREAD thread

#ifdef RK_ON_CPU
typedef unsigned int uint;
#undef RK_GLOBAL
#define RK_GLOBAL
#undef RK_GROUP
#define RK_GROUP
#undef RK_THREAD
#define RK_THREAD
#include "on_cpu.h"
#else
#include <metal_stdlib>
using namespace metal;
typedef ulong rk_u64;

#ifdef RK_SYSTEM_SCOPE
static inline uint rk_load(const RK_GLOBAL uint* at) { return *at; }
static inline void rk_store(RK_GLOBAL uint* at, uint value) { *at = value; }
// Orders this thread's accesses to memory, for the host as well. The scope has no name in the library.
static inline void rk_fence() {
    atomic_thread_fence(mem_flags::mem_device, memory_order_seq_cst, static_cast<thread_scope>(3));
}
#else
static inline uint rk_load(const device uint* at) {
    return atomic_load_explicit((const device atomic_uint*)at, memory_order_relaxed);
}
static inline void rk_store(device uint* at, uint value) {
    atomic_store_explicit((device atomic_uint*)at, value, memory_order_relaxed);
}
// Orders this thread's accesses to device memory.
static inline void rk_fence() {
#if __METAL_VERSION__ >= 320
    atomic_thread_fence(mem_flags::mem_device, memory_order_seq_cst);
#else
    // None that one thread can make alone.
#endif
}
#endif
// ORDERING: publish, give-back, control. Pairs with the host's release stores.
static inline uint rk_load_acquire(const RK_GLOBAL uint* at) {
    uint value = rk_load(at);
    rk_fence();
    return value;
}
// ORDERING: publish, give-back, progress, telemetry. Pairs with the host's acquire loads.
static inline void rk_store_release(RK_GLOBAL uint* at, uint value) {
    rk_fence();
    rk_store(at, value);
}
static inline void rk_copy4(RK_GLOBAL uint* to, const RK_GLOBAL uint* from) {
    for (uint i = 0u; i < 4u; i++) rk_store(to + i, rk_load(from + i));
}
// ORDERING: publish. The sequence first; what is read after it was written before it.
static inline void rk_load4_acquire(const RK_GLOBAL uint* from, threadgroup uint* to) {
    to[0] = rk_load_acquire(from);
    for (uint i = 1u; i < 4u; i++) to[i] = rk_load(from + i);
}
static inline void rk_group_sync(uint) { threadgroup_barrier(mem_flags::mem_device | mem_flags::mem_threadgroup); }
// Metal has no instruction that gives way.
static inline void rk_nap(uint) {}
static inline float rk_as_f32(uint bits) { return as_type<float>(bits); }
static inline uint rk_from_f32(float value) { return as_type<uint>(value); }
// Rounded after each operation, as on the CPU: the library is to be compiled without fast math.
#pragma METAL fp contract(off)
static inline float rk_mul_f32(float a, float b) { return a * b; }
static inline float rk_add_f32(float a, float b) { return a + b; }
#endif
#define RK_HAS_U64

#include "ringkernel.h"

#ifdef RK_ON_CPU
extern "C" void rk_layout_3() {}
extern "C" void rk_main(RkLaunch launch, uint* host_to_device, uint* device_to_host, uint* state) {
    __shared__ RkGroup group;
    uint index = threadIdx.x, threads = blockDim.x, block = blockIdx.x, blocks = gridDim.x;
#else
kernel void rk_main(RK_GLOBAL uint* host_to_device [[buffer(0)]], RK_GLOBAL uint* device_to_host [[buffer(1)]],
                    RK_GLOBAL uint* state [[buffer(2)]], constant RkLaunch& launch [[buffer(3)]],
                    uint index [[thread_index_in_threadgroup]], uint threads [[threads_per_threadgroup]],
                    uint block [[threadgroup_position_in_grid]], uint blocks [[threadgroups_per_grid]]) {
    threadgroup RkGroup group;
#endif
    Rk rk;
    rk.launch = launch;
    rk.h2d = host_to_device;
    rk.d2h = device_to_host;
    rk.state = state;
    rk.group = &group;
    rk.index = index;
    rk.threads = threads;
    rk.block = block;
    rk.blocks = blocks;
    rk_run(rk);
}
