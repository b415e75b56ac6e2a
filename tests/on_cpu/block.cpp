// A kernel's source (RK_SOURCE: prelude and handler) as a library whose one function runs a block until it ends.
#define RK_ON_CPU
#include RK_SOURCE

namespace {
struct Arguments {
    RkLaunch launch;
    uint *host_to_device, *device_to_host, *state;
};
thread_local const Arguments* arguments;

void run_thread() {
    rk_main(arguments->launch, arguments->host_to_device, arguments->device_to_host, arguments->state);
    rk_turns->done[rk_turns->running] = true;
    rk_next_turn();
}
}  // namespace

extern "C" void rk_run_block(const RkLaunch* launch, uint* host_to_device, uint* device_to_host, uint* state,
                             unsigned block, unsigned blocks, unsigned threads) {
    Arguments own{*launch, host_to_device, device_to_host, state};
    arguments = &own;
    blockIdx.x = block;
    gridDim.x = blocks;
    blockDim.x = threads;
    const size_t stack = 256 * 1024;
    std::vector<std::unique_ptr<char[]>> stacks;
    RkTurns turns;
    turns.contexts.resize(threads);
    turns.done.assign(threads, false);
    rk_turns = &turns;
    for (unsigned i = 0; i < threads; i++) {
        stacks.emplace_back(new char[stack]);
        ucontext_t& context = turns.contexts[i];
        getcontext(&context);
        context.uc_stack.ss_sp = stacks.back().get();
        context.uc_stack.ss_size = stack;
        context.uc_link = nullptr;
        makecontext(&context, run_thread, 0);
    }
    threadIdx.x = 0;
    swapcontext(&turns.home, &turns.contexts[0]);
}
