// What CUDA and Metal give a kernel, on a CPU: for tests of the device's half where there is no device. A block is one thread of
// the host, and the block's threads are contexts that take turns at its barriers.
#pragma once
#include <sched.h>
#include <ucontext.h>

#include <cstdint>
#include <cstring>
#include <ctime>
#include <memory>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __shared__ static thread_local
#define __launch_bounds__(threads)

struct RkIndex {
    unsigned x;
};
static thread_local RkIndex threadIdx, blockDim, blockIdx, gridDim;

// The contexts of the block that this thread runs.
struct RkTurns {
    std::vector<ucontext_t> contexts;
    std::vector<bool> done;
    unsigned running = 0;
    ucontext_t home;
};
static thread_local RkTurns* rk_turns;

// Lets the next context run. All of them come by every barrier, so that nobody passes one before all have reached it.
static void rk_next_turn() {
    RkTurns& turns = *rk_turns;
    unsigned from = turns.running, count = unsigned(turns.contexts.size());
    for (unsigned step = 1; step <= count; step++) {
        unsigned to = (from + step) % count;
        if (!turns.done[to]) {
            if (to == from) return;
            turns.running = to;
            threadIdx.x = to;
            swapcontext(&turns.contexts[from], &turns.contexts[to]);
            return;
        }
    }
    setcontext(&turns.home);
}

typedef unsigned long long rk_cpu_u64;
#ifndef RK_HAS_U64
typedef rk_cpu_u64 rk_u64;
#endif

RK_FN uint rk_load(const uint* at) { return __atomic_load_n(at, __ATOMIC_RELAXED); }
RK_FN uint rk_load_acquire(const uint* at) { return __atomic_load_n(at, __ATOMIC_ACQUIRE); }
RK_FN void rk_store(uint* at, uint value) { __atomic_store_n(at, value, __ATOMIC_RELAXED); }
RK_FN void rk_store_release(uint* at, uint value) { __atomic_store_n(at, value, __ATOMIC_RELEASE); }
RK_FN void rk_copy4(uint* to, const uint* from) {
    for (int i = 0; i < 4; i++) rk_store(to + i, rk_load(from + i));
}
RK_FN void rk_load4_acquire(const uint* from, uint* to) {
    to[0] = rk_load_acquire(from);
    for (int i = 1; i < 4; i++) to[i] = rk_load_acquire(from + i);
}
RK_FN void rk_fence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
RK_FN void rk_group_sync(uint threads) {
    if (threads > 1) rk_next_turn();
}
// Two cores, and a caller that wants one of them.
RK_FN void rk_nap(uint) { sched_yield(); }
RK_FN rk_cpu_u64 rk_clock_ns() {
    timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return rk_cpu_u64(now.tv_sec) * 1000000000ull + rk_cpu_u64(now.tv_nsec);
}
template <class To, class From>
static To rk_bits(From from) {
    static_assert(sizeof(To) == sizeof(From), "of one size");
    To to;
    std::memcpy(&to, &from, sizeof(to));
    return to;
}
RK_FN float rk_as_f32(uint bits) { return rk_bits<float>(bits); }
RK_FN uint rk_from_f32(float value) { return rk_bits<uint>(value); }
RK_FN double rk_as_f64(rk_cpu_u64 bits) { return rk_bits<double>(bits); }
RK_FN rk_cpu_u64 rk_from_f64(double value) { return rk_bits<rk_cpu_u64>(value); }
// Compiled with -ffp-contract=off.
RK_FN float rk_mul_f32(float a, float b) { return a * b; }
RK_FN float rk_add_f32(float a, float b) { return a + b; }
