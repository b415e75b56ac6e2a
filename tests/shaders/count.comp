#version 450
#extension GL_GOOGLE_include_directive : require
#include "ringkernel.glsl"

// test.count: replies with how many messages this block has had (u64), and with its index.
RK_HANDLER {
    if (rk_thread() == 0u) {
        uint low = rk_state(0u) + 1u;
        rk_set_state(0u, low);
        if (low == 0u) rk_set_state(1u, rk_state(1u) + 1u);
        rk_out(0u, low);
        rk_out(1u, rk_state(1u));
        rk_out(2u, rk_block());
    }
    rk_reply_raw(12u);
}
